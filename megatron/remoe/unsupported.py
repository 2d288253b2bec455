"""Values of Megatron's flags that do not work here, in tables.

`REFUSALS` holds for every entry point, a script of one's own included. The tables after it hold for
`remoe train`: Megatron has one parser for all its programs, so that a flag of another program would
do nothing, and some flags end every rank after the start. What is there was found by `python -m
tests.fuzz`. Every flag stands in one table only.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from megatron.remoe import cpu, options


def has_package(name: str) -> bool:
    """Return whether a package is installed, without importing it."""
    return importlib.util.find_spec(name) is not None


def _is_local(args: argparse.Namespace) -> bool:
    return bool(args.transformer_impl == "local")


def _is_masked_lm(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "masked_lm", False))


def _is_hybrid(args: argparse.Namespace) -> bool:
    return args.hybrid_layer_pattern is not None


def _has_null_experts(args: argparse.Namespace) -> bool:
    return bool(args.num_experts) and options.router_name(vars(args)) == "null_experts"


def _has_null_experts_without_loss(args: argparse.Namespace) -> bool:
    coeffs = args.moe_aux_loss_coeff
    return _has_null_experts(args) and not any(coeffs if isinstance(coeffs, list) else [coeffs])


class Refusal(NamedTuple):
    """A flag of which only some values are accepted.

    Attributes:
        name: in Megatron's arguments.
        why: what is wrong with the other values, and the remedy.
        allowed: the accepted values.
        when: the runs in which the others are refused; None means all runs.
        flag: as a user writes it, where the name differs.
    """

    name: str
    why: str
    allowed: tuple[Any, ...] = (None, False)
    when: Callable[[argparse.Namespace], bool] | None = None
    flag: str | None = None


_OR_TE = "leave it out, or use transformer_impl transformer_engine"
_ALL_ALIKE = "our layers are all alike; leave it out, or use Megatron's own script"
_NO_FSDP = (
    "sharded parameters have not been run with our experts and checkpoints; use "
    "use_distributed_optimizer"
)
_LOCAL_IGNORES_IT = f"the layers of transformer_impl local ignore it; {_OR_TE}"
_OR_GPT = "leave it out, or leave hybrid_layer_pattern out"
_COUNTS_LETTERS = f"it would count all letters of hybrid_layer_pattern as layers; {_OR_GPT}"
_SAVED_BY_TE = (
    "Megatron takes what it saves from Transformer Engine's layers; leave it out (metrics_file has "
    "the load of the experts)"
)
REFUSALS = (
    # layers and arguments that ours would replace without a word
    Refusal("spec", "our layers take its place; leave it out"),
    Refusal("heterogeneous_layers_config_path", _ALL_ALIKE),
    Refusal("heterogeneous_layers_config_encoded_json", _ALL_ALIKE),
    Refusal("experimental_attention_variant", "it needs layers of its own; leave it out"),
    Refusal("hybrid_override_pattern", "it is the former name of hybrid_layer_pattern; use that"),
    Refusal("yaml_cfg", "its arguments take the place of all others, ours included; pass flags, or "
            "a config of remoe train"),
    Refusal("moe_use_upcycling", "Megatron then builds its dense model as a mixture too; make the "
            "start with remoe convert upcycle"),
    Refusal("reset_attention_mask", "no_create_attention_mask_in_dataloader leaves no mask to "
            "reset, so that documents would see each other; leave one of them out",
            when=lambda args: not args.create_attention_mask_in_dataloader),
    Refusal("moe_routing_trace_path", "Megatron traces the k experts of a TopK router on a GPU "
            "only, and would write empty files; leave it out (metrics_file has the load of the "
            "experts)",
            when=lambda args: not args.num_experts or cpu.is_enabled()
            or options.router_name(vars(args)) != "topk"),
    # hybrid models
    Refusal("rotary_interleaved", f"Megatron's HybridModel ignores it; {_OR_GPT}", when=_is_hybrid),
    Refusal("use_rope_scaling", f"Megatron's HybridModel ignores it; {_OR_GPT}", when=_is_hybrid),
    Refusal("position_embedding_type", "it has not been run in hybrid models; use rope, "
            "learned_absolute or none, or leave hybrid_layer_pattern out",
            ("rope", "learned_absolute", "none"), _is_hybrid),
    Refusal("no_rope_freq", _COUNTS_LETTERS, when=_is_hybrid),
    Refusal("window_attn_skip_freq", _COUNTS_LETTERS, when=_is_hybrid),
    # encoders
    Refusal("transformer_impl", "masked_lm has not been run with it; use transformer_impl local",
            ("local",), when=_is_masked_lm),
    Refusal("reset_attention_mask", "the tokens of masked_lm see the whole sequence, and other "
            "documents in it as well; leave it out", when=_is_masked_lm),
    Refusal("eod_mask_loss", "masked_lm never hides the end of a document; leave it out",
            when=_is_masked_lm),
    Refusal("mtp_num_layers", "masked_lm has no next tokens to predict; leave it out",
            when=_is_masked_lm),
    Refusal("window_size", "masked_lm attends to whole sequences; leave it out",
            when=_is_masked_lm),
    # the backend
    Refusal("transformer_impl", "it does not train; use local or transformer_engine",
            ("local", "transformer_engine")),
    Refusal("transformer_impl", "that is not installed; install it (pip install 'remoe[te]', needs "
            "CUDA), or use transformer_impl local", ("local",),
            when=lambda args: not has_package("transformer_engine")),
    Refusal("context_parallel_size", "the attention of transformer_impl local sees one rank's part "
            "of the sequence only; use context_parallel_size 1, or transformer_impl "
            "transformer_engine", (1,), _is_local),
    Refusal("multi_latent_attention", f"it has not been run with transformer_impl local; {_OR_TE}",
            when=_is_local),
    Refusal("qk_layernorm", "the norms of transformer_impl local cannot be split over "
            "tensor-parallel ranks; use tensor_model_parallel_size 1, or transformer_impl "
            "transformer_engine",
            when=lambda args: _is_local(args) and args.tensor_model_parallel_size > 1),
    Refusal("te_precision_config_file", f"it is for layers of Transformer Engine; {_OR_TE}",
            when=_is_local),
    Refusal("layernorm_zero_centered_gamma",
            f"the norms of transformer_impl local do not have it; {_OR_TE}",
            when=_is_local, flag="apply_layernorm_1p"),
    Refusal("fp32_residual_connection", "the norms of transformer_impl local hand on fp32 to "
            f"layers in half precision; {_OR_TE}",
            when=lambda args: _is_local(args) and (args.bf16 or args.fp16)),
    Refusal("cpu_offloading_num_layers", "Megatron offloads activations with Transformer Engine "
            "only; leave it out", when=_is_local),
    Refusal("save_tokens_per_expert_interval", _SAVED_BY_TE, when=_is_local),
    Refusal("save_activations_interval", _SAVED_BY_TE, when=_is_local),
    Refusal("save_dgrads_interval", _SAVED_BY_TE, when=_is_local),
    Refusal("attention_backend", _LOCAL_IGNORES_IT, ("auto", "local"), _is_local),
    Refusal("use_kitchen_attention", _LOCAL_IGNORES_IT, when=_is_local),
    Refusal("use_grouped_gemm_for_dense_mlp", _LOCAL_IGNORES_IT, when=_is_local),
    Refusal("recompute_modules", "Megatron recomputes layernorm with Transformer Engine only; "
            "leave it out",
            when=lambda args: _is_local(args) and "layernorm" in (args.recompute_modules or ())),
    # checkpoints, and how weights are held
    Refusal("ckpt_format", "runs continue from torch_dist only (whole checkpoints, other layouts, "
            "save_keep_last); leave it out", ("torch_dist",)),
    Refusal("auto_detect_ckpt_format", "runs continue from torch_dist only; leave it out"),
    Refusal("ckpt_convert_format", "other formats than torch_dist cannot continue a run; leave it "
            "out (remoe convert writes models for transformers)"),
    Refusal("non_persistent_ckpt_type", "a run continues from the checkpoints of save, which have "
            "hashes and are pruned; leave it out and lower save_interval"),
    Refusal("use_megatron_fsdp", _NO_FSDP),
    Refusal("use_torch_fsdp2", _NO_FSDP),
    Refusal("init_model_with_meta_device", "only FSDP, which is refused, gives such a model its "
            "first weights; leave it out"),
    Refusal("use_persistent_ckpt_worker", "on a CPU that worker shares the memory of the weights "
            "and writes values of later steps; leave it out (async_save forks a writer)",
            when=lambda args: cpu.is_enabled()),
    Refusal("async_save", "without use_persistent_ckpt_worker Megatron saves synchronously; set "
            "both, or neither",
            when=lambda args: not (cpu.is_enabled() or args.use_persistent_ckpt_worker)),
    # logs
    Refusal("wandb_project", "wandb is not installed; run: pip install 'remoe[wandb]', or leave "
            "wandb_project out", (None, ""), lambda args: not has_package("wandb")),
)  # fmt: skip

# Flags that are for Megatron's own scripts to act on.
_UNUSED = tuple(
    Refusal(name, "this entry point ignores it; leave it out, or use a script of Megatron-LM that "
            "acts on it (docs/own_script.md says how)")
    for name in (
        "allow_ambiguous_pad_tokens", "check_for_spiky_loss", "dataloader_fast_cache_load",
        "dataloader_defer_npy_index_mmap", "dataloader_inter_document_masking", "fim_data",
        "hybrid_context_parallel", "is_hybrid_model", "logits_load_dir",
        "object_storage_cache_path", "per_dataset_sequences_path", "perform_rl_step", "sft",
    )
)  # fmt: skip
# What `refuse_in_training` refuses.
_NO_BUDGET = "nothing but an auxiliary loss keeps a mean of k experts with null experts; set it to"
_TRAINS_WRONG = (
    Refusal("moe_router_load_balancing_type", f"{_NO_BUDGET} aux_loss",
            ("aux_loss", "seq_aux_loss", "global_aux_loss"), _has_null_experts),
    Refusal("moe_aux_loss_coeff", f"{_NO_BUDGET} 0.01, for example",
            (None,), _has_null_experts_without_loss),
)  # fmt: skip

# Groups of flags by their titles, and the program that reads them.
_OTHER_PROGRAMS = {
    "rl": "reinforcement learning",
    "biencoder": "retrieval",
    "vision": "vision models",
    "inference": "inference",
    "sft": "fine-tuning on conversations",
    "Logits Distillation": "distillation",
    "autoresume": "NVIDIA's own clusters",
    "one logger": "NVIDIA's own clusters",
    "workload inspector": "NVIDIA's own clusters",
}
# Flags in these groups that pretraining reads, or that stand in `_UNUSED`.
_NOT_BY_GROUP = ("cuda_graph_modules", *(refusal.name for refusal in _UNUSED))
# Flags that never work here, by their names in `args`: any other value than the default is refused.
_REFUSED = {
    "perform_initialization": "weights would be whatever the memory holds; leave it out",
    "init_method_xavier_uniform": "Megatron 0.19 cannot build a model with it; use init_method_std",
    "lazy_mpu_init": "it needs a program that makes the process groups itself; leave it out",
    "fake_process_group": "ranks would not exchange anything; leave it out",
    "config_logger_dir": "Megatron 0.19 cannot write configs with process groups; leave it out",
    "skip_train": "nothing would be trained; use remoe evaluate",
    "test_mode": "it belongs to Megatron's own tests; leave it out",
    "dataloader_type.external": "it needs a program with a data loader of its own; leave it out",
}
# Flags that need CUDA, and those that need a package: flags, or a whole group.
_NEEDS_GPU = (
    "optimizer_cuda_graph", "record_memory_history", "log_memory_to_tensorboard", "log_straggler",
    "pipeline_model_parallel_comm_backend", "nccl_ub", "use_sharp", "log_device_memory_used",
    "cuda_graph_impl", "high_priority_stream_groups", "nccl_communicator_config_path",
)  # fmt: skip
_NEEDS_PACKAGE = {
    "enable_ft_package": "nvidia_resiliency_ext",
    "calc_ft_timeouts": "nvidia_resiliency_ext",
    "inprocess_restart": "nvidia_resiliency_ext",
    "fault injector": "nvidia_resiliency_ext",
    "log_energy": "pynvml",
    "enable_msc": "multistorageclient",
}


def refuse(args: argparse.Namespace) -> None:
    """Refuse what does not work in any entry point; raises a ValueError as `check` does."""
    _refuse(args, REFUSALS)


def refuse_unused(args: argparse.Namespace) -> None:
    """Refuse flags that our pretraining would ignore; raises a ValueError as `check` does."""
    _refuse(args, _UNUSED)


def refuse_in_training(args: argparse.Namespace) -> None:
    """Refuse what would train wrong, though such a model can be built and converted.

    Raises:
        ValueError: as `check` does.
    """
    _refuse(args, _TRAINS_WRONG)


def _refuse(args: argparse.Namespace, refusals: Iterable[Refusal]) -> None:
    for name, why, allowed, when, flag in refusals:
        value = getattr(args, name, allowed[0])
        value = getattr(value, "name", value)  # that of an enum
        if value not in allowed and (when is None or when(args)):
            raise ValueError(f"{flag or name} is {_said(value)}, but {why}")


def _said(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "set" if value is True else str(value)


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what would do nothing, or end every rank after the start.

    Args:
        args: the parsed arguments.
        parser: the parser that they come from.

    Raises:
        ValueError: naming the flag, its value, the reason and the remedy.
    """
    for group in parser._action_groups:
        title = group.title or ""
        program, needed = _OTHER_PROGRAMS.get(title), _NEEDS_PACKAGE.get(title)
        for action in group._group_actions:
            value = getattr(args, action.dest, action.default)
            if action.dest in _NOT_BY_GROUP or value == parser.get_default(action.dest):
                continue
            package = needed or _NEEDS_PACKAGE.get(action.dest)
            reason = _REFUSED.get(action.dest) or _REFUSED.get(f"{action.dest}.{value}")
            if program is not None:
                reason = f"it is read by Megatron's programs for {program} only; leave it out"
            elif action.dest in _NEEDS_GPU and cpu.is_enabled() and _runs_here(args):
                reason = "it needs a GPU; leave it out on this machine"
            elif package is not None and not has_package(package):
                reason = f"it needs {package}, which is not installed; install it, or leave it out"
            if reason is not None:
                option = action.option_strings[0].removeprefix("--").replace("-", "_")
                said = "set" if action.nargs == 0 else str(value)
                raise ValueError(f"{option} is {said}, but {reason}")


def _runs_here(args: argparse.Namespace) -> bool:
    """Return whether the run is for this machine; what is only described may be for another."""
    return bool(args.distributed_backend == "gloo")
