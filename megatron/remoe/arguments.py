"""Our command-line flags beside Megatron's, and what they do to a model's configuration.

The published flags keep their names, so that published launch scripts carry over.
"""

import argparse
import functools
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from megatron.remoe import compat, cpu, options, ranges
from remoe.config import LoadBalancing, apply_granularity

if TYPE_CHECKING:
    from megatron.remoe.moe.router import ReLURouting
    from megatron.remoe.moe.spec import Routing
    from megatron.remoe.train.step import FinalizeStep

Provider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron's `extra_args_provider`: adds our flags, and defaults that fit this machine.

    The returned parser applies granularity and checks our flags as soon as it has parsed them, so
    that Megatron validates the model that will be built. Granularity is thereby applied once:
    `--use-checkpoint-args` replaces the results by the saved run's and never multiplies them again.
    """
    compat.apply()
    group = parser.add_argument_group(title="remoe")
    group.add_argument(
        "--moe-relu-routing",
        action="store_true",
        help="Route with ReLU(x W) instead of TopK(Softmax(x W)).",
    )
    group.add_argument(
        "--moe-relu-l1-reg-coeff-init",
        type=float,
        default=1e-8,
        help="Initial coefficient of the L1 penalty on router outputs.",
    )
    group.add_argument(
        "--moe-relu-l1-reg-coeff-multiplier",
        type=float,
        default=1.2,
        help="Factor by which a step multiplies or divides the coefficient.",
    )
    group.add_argument(
        "--moe-relu-load-balancing",
        choices=get_args(LoadBalancing),
        default="aux_loss",
        help="Weight the L1 penalty by the load of each expert, or not.",
    )
    group.add_argument(
        "--moe-relu-max-assignments",
        type=int,
        default=None,
        help="Assignments per layer and rank (mean over layers) that are computed at once; what is "
        "above runs chunk by chunk, and again in backward. Default: topk per token.",
    )
    group.add_argument(
        "--moe-relu-max-active-experts",
        type=int,
        default=None,
        help="Shortcut: keep a token's largest gates only, so many before granularity.",
    )
    group.add_argument(
        "--moe-relu-at-least-one-expert",
        action="store_true",
        help="Shortcut: a token without experts gets that of its largest logit.",
    )
    group.add_argument(
        "--moe-granularity",
        type=int,
        default=1,
        help="G: multiplies --num-experts and --moe-router-topk, divides the expert width.",
    )
    group.add_argument(
        "--moe-topk-warmup-steps",
        type=int,
        default=0,
        help="TopK routing: activate --moe-topk-warmup-topk experts in the first training steps.",
    )
    group.add_argument(
        "--moe-topk-warmup-topk",
        type=int,
        default=None,
        help="TopK routing: k of the near-dense warm-up, before granularity.",
    )
    group.add_argument(
        "--moe-change-routing",
        action="store_true",
        help="Continue a checkpoint although its router, load balancing or k was another.",
    )
    group.add_argument(
        "--metrics-file",
        default=None,
        help="Write one JSON object per logged step and evaluation to this file.",
    )
    group.add_argument(
        "--save-keep-last",
        type=int,
        default=None,
        help="Keep that many of the last checkpoints, and those of --save-retain-interval.",
    )
    group.add_argument("--wandb-tags", nargs="+", default=None, help="Tags of the W&B run.")
    group.add_argument(
        "--wandb-mode",
        choices=("online", "offline", "disabled"),
        default=None,
        help="Whether W&B sends what it logs, or writes it to --wandb-save-dir only.",
    )
    parser.set_defaults(**_machine_defaults())
    return _Parser(
        prog=parser.prog,
        description=parser.description,
        parents=[parser],
        add_help=False,
        allow_abbrev=False,
    )


def args_provider(other: Provider | None = None) -> Provider:
    """`add_arguments` for a script that has an `extra_args_provider` of its own, or None."""

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_arguments(parser if other is None else other(parser))

    return provider


class _Parser(argparse.ArgumentParser):
    """Megatron's parser, finishing its work with `finish`; a mistake is one line, exit code 2."""

    def parse_known_args(  # type: ignore[override]
        self, args: list[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        parsed, unknown = super().parse_known_args(args, namespace)
        try:
            ranges.check(parsed, self)
            finish(parsed)
        except ValueError as error:
            self.error(str(error))
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


@functools.cache
def megatron_parser() -> argparse.ArgumentParser:
    """Megatron's parser with our flags, as the entry point uses it."""
    from megatron.training.arguments import add_megatron_arguments

    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def _machine_defaults() -> dict[str, Any]:
    """Defaults of Megatron's flags where theirs need what this machine lacks."""
    defaults: dict[str, Any] = {}
    if not _has_transformer_engine():
        defaults["transformer_impl"] = "local"
        defaults["apply_rope_fusion"] = False
        defaults["no_persist_layer_norm"] = True
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        defaults["gradient_accumulation_fusion"] = False
    if importlib.util.find_spec("nvidia_resiliency_ext") is None:
        defaults["async_strategy"] = "mcore"
    if cpu.is_enabled():
        defaults["distributed_backend"] = "gloo"
    return defaults


def finish(args: argparse.Namespace) -> None:
    """Check our flags and apply what they imply to Megatron's, in place.

    Raises:
        ValueError: flags that do not fit together, naming the value and the remedy.
    """
    if args.full_validation:
        # Megatron then reads one sequence per rank at a time, whatever the batch size says.
        ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
        ranks *= args.context_parallel_size
        args.eval_micro_batch_size = 1
        args.eval_global_batch_size = int(os.environ.get("WORLD_SIZE", "1")) // ranks
    _refuse_what_is_replaced(args)
    _check_backend(args)
    _finish_checkpoints(args)
    _finish_wandb(args)
    if args.metrics_file is not None and args.log_interval % args.tensorboard_log_interval:
        raise ValueError(
            f"log_interval is {args.log_interval}, no multiple of tensorboard_log_interval "
            f"{args.tensorboard_log_interval}; metrics_file is written from what Megatron reports "
            f"to TensorBoard, so choose a tensorboard_log_interval that divides log_interval"
        )
    if args.num_experts is None and not args.use_checkpoint_args:
        _refuse_moe_flags_of_a_dense_model(args)
        return
    if args.moe_granularity != 1 and (args.moe_ffn_hidden_size or args.ffn_hidden_size) is None:
        raise ValueError(
            f"moe_granularity is {args.moe_granularity}, but the width that it divides is not "
            f"given; pass --moe-ffn-hidden-size or --ffn-hidden-size"
        )
    _check_topk_warmup(args)
    _check_max_assignments(args)
    _check_shortcuts(args)
    if args.num_experts is not None:
        width = args.moe_ffn_hidden_size or args.ffn_hidden_size
        shape = apply_granularity(
            num_experts=args.num_experts,
            topk=args.moe_router_topk,
            ffn_hidden_size=width or args.moe_granularity,
            granularity=args.moe_granularity,
        )
        args.num_experts, args.moe_router_topk = shape.num_experts, shape.topk
        for most in ("moe_topk_warmup_topk", "moe_relu_max_active_experts"):
            if getattr(args, most) is not None:
                setattr(args, most, getattr(args, most) * args.moe_granularity)
        if width is not None:
            args.moe_ffn_hidden_size = shape.ffn_hidden_size
    _refuse_uneven_gather_on_gloo(args)
    if args.tensor_model_parallel_size > 1:
        # Without it Megatron refuses to train experts with tensor parallelism, at the first step.
        args.sequence_parallel = True
    if args.moe_relu_routing:
        _finish_relu_routing(args)


# Of checkpoints and of how weights are held: name, allowed values, and why not another.
_CHECKPOINTS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    (
        "ckpt_format", ("torch_dist",),
        "runs continue from torch_dist only (whole checkpoints, other layouts, save_keep_last); "
        "leave it out",
    ),
    (
        "auto_detect_ckpt_format", (False,),
        "runs continue from torch_dist only; leave it out",
    ),
    (
        "ckpt_convert_format", (None,),
        "other formats than torch_dist cannot continue a run; leave it out (remoe convert writes "
        "models for transformers)",
    ),
    (
        "non_persistent_ckpt_type", (None,),
        "a run continues from the checkpoints of save, which have hashes and are pruned; leave it "
        "out and lower save_interval",
    ),
    (
        "use_megatron_fsdp", (False,),
        "sharded parameters have not been run with our experts and checkpoints; use "
        "use_distributed_optimizer",
    ),
    (
        "use_torch_fsdp2", (False,),
        "sharded parameters have not been run with our experts and checkpoints; use "
        "use_distributed_optimizer",
    ),
    (
        "init_model_with_meta_device", (False,),
        "only FSDP, which is refused, gives such a model its first weights; leave it out",
    ),
    (
        "moe_use_upcycling", (False,),
        "Megatron then builds its dense model as a mixture too; make the start with remoe convert "
        "upcycle",
    ),
)  # fmt: skip


def _finish_checkpoints(args: argparse.Namespace) -> None:
    args.adam_implementation = compat.adam()  # saved with every checkpoint
    for name, allowed, why in _CHECKPOINTS:
        if (value := getattr(args, name)) not in allowed:
            raise ValueError(f"{name} is {value}, but {why}")
    if args.use_persistent_ckpt_worker and cpu.is_enabled():
        raise ValueError(
            "use_persistent_ckpt_worker is set, but on a CPU that worker shares the memory of the "
            "weights and writes values of later steps; leave it out (async_save forks a writer)"
        )
    args.fork_async_save = args.async_save and cpu.is_enabled()
    if args.async_save and not args.fork_async_save and not args.use_persistent_ckpt_worker:
        raise ValueError(
            "async_save is set without use_persistent_ckpt_worker, and Megatron then saves "
            "synchronously; set both, or neither"
        )
    args.save_milestone_interval = None
    if args.save_keep_last is None:
        return
    if args.save_keep_last < 1:
        raise ValueError(
            f"save_keep_last is {args.save_keep_last}; keep at least 1, or leave it out to keep all"
        )
    interval = args.save_retain_interval
    if interval is not None and (interval < 1 or interval % (args.save_interval or 1)):
        raise ValueError(
            f"save_retain_interval is {interval}, no multiple of save_interval "
            f"{args.save_interval}; choose one that is"
        )
    # Megatron would delete all but the last itself.
    args.save_milestone_interval, args.save_retain_interval = interval, None


def _refuse_what_is_replaced(args: argparse.Namespace) -> None:
    """Refuse flags whose layers or arguments ours would replace without a word."""
    if args.spec is not None:
        raise ValueError(
            f"spec is {' '.join(args.spec)}, but our layers take its place; leave it out"
        )
    for name in ("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"{name} is set, but our layers are all alike; leave it out, or use Megatron's own "
                f"script"
            )
    if args.experimental_attention_variant is not None:
        raise ValueError(
            f"experimental_attention_variant is {args.experimental_attention_variant}, which needs "
            f"layers of its own; leave it out"
        )
    if args.yaml_cfg is not None:
        raise ValueError(
            f"yaml_cfg is {args.yaml_cfg}, whose arguments take the place of all others, ours "
            f"included; pass flags, or a config of remoe train"
        )
    if args.reset_attention_mask and not args.create_attention_mask_in_dataloader:
        raise ValueError(
            "reset_attention_mask is set with no_create_attention_mask_in_dataloader, so that "
            "there is no mask to reset and documents would see each other; leave one of them out"
        )
    if args.moe_routing_trace_path is not None and (
        args.moe_relu_routing or args.num_experts is None or cpu.is_enabled()
    ):
        raise ValueError(
            f"moe_routing_trace_path is {args.moe_routing_trace_path}, but Megatron traces the k "
            f"experts of a TopK router on a GPU only, and would write empty files; leave it out "
            f"(metrics_file has the load of the experts)"
        )


def _check_backend(args: argparse.Namespace) -> None:
    if args.transformer_impl == "transformer_engine" and not _has_transformer_engine():
        raise ValueError(
            "transformer_impl is transformer_engine, which is not installed; install it (pip "
            "install 'remoe[te]', needs CUDA), or use transformer_impl local"
        )
    if args.context_parallel_size > 1 and args.transformer_impl == "local":
        raise ValueError(
            f"context_parallel_size is {args.context_parallel_size}, but the attention of "
            f"transformer_impl local sees one rank's part of the sequence only; use "
            f"context_parallel_size 1, or transformer_impl transformer_engine"
        )
    if args.transformer_impl not in ("local", "transformer_engine"):
        raise ValueError(
            f"transformer_impl is {args.transformer_impl}, which does not train; use local or "
            f"transformer_engine"
        )
    if args.transformer_impl == "local":
        _refuse_what_local_lacks(args)


def _refuse_what_local_lacks(args: argparse.Namespace) -> None:
    """Refuse what Megatron finds only when it builds the layers, or in the first step."""
    if args.multi_latent_attention:
        raise ValueError(
            "multi_latent_attention is set, which has not been run with transformer_impl local; "
            "leave it out, or use transformer_impl transformer_engine"
        )
    if args.qk_layernorm and args.tensor_model_parallel_size > 1:
        raise ValueError(
            f"qk_layernorm is set with tensor_model_parallel_size "
            f"{args.tensor_model_parallel_size}, where the norms of transformer_impl local cannot "
            f"be split; use tensor_model_parallel_size 1, or transformer_impl transformer_engine"
        )
    if args.te_precision_config_file is not None:
        raise ValueError(
            f"te_precision_config_file is {args.te_precision_config_file}, which is for layers of "
            f"Transformer Engine; leave it out, or use transformer_impl transformer_engine"
        )
    if args.layernorm_zero_centered_gamma:
        raise ValueError(
            "apply_layernorm_1p is set, which the norms of transformer_impl local do not have; "
            "leave it out, or use transformer_impl transformer_engine"
        )
    if args.fp32_residual_connection and (args.bf16 or args.fp16):
        raise ValueError(
            "fp32_residual_connection is set, but the norms of transformer_impl local hand on fp32 "
            "to layers in half precision; leave it out, or use transformer_impl transformer_engine"
        )
    if args.cpu_offloading_num_layers:
        raise ValueError(
            f"cpu_offloading_num_layers is {args.cpu_offloading_num_layers}, but Megatron offloads "
            f"activations with Transformer Engine only; leave it out"
        )
    for name in (
        "save_tokens_per_expert_interval",
        "save_activations_interval",
        "save_dgrads_interval",
    ):
        if getattr(args, name) is not None:
            raise ValueError(
                f"{name} is {getattr(args, name)}, but Megatron takes what it saves from "
                f"Transformer Engine's layers; leave it out (metrics_file has the load of the "
                f"experts)"
            )
    for name, allowed in (
        ("attention_backend", ("auto", "local")),
        ("use_kitchen_attention", (False,)),
        ("use_grouped_gemm_for_dense_mlp", (False,)),
    ):
        value = getattr(args, name)
        value = getattr(value, "name", value)  # of an enum
        if value not in allowed:
            raise ValueError(
                f"{name} is {value}, which the layers of transformer_impl local ignore; leave it "
                f"out, or use transformer_impl transformer_engine"
            )
    if "layernorm" in (args.recompute_modules or ()):
        raise ValueError(
            "recompute_modules has layernorm, which Megatron recomputes with Transformer Engine "
            "only; leave it out"
        )


def _has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def _finish_wandb(args: argparse.Namespace) -> None:
    """Check W&B, and hand it what Megatron has no flag for, through its environment variables."""
    if args.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"wandb_project is {args.wandb_project}, but wandb is not installed; run: pip install "
            f"'remoe[wandb]', or leave wandb_project out"
        )
    if args.wandb_mode is not None:
        os.environ["WANDB_MODE"] = args.wandb_mode
    if args.wandb_tags is not None:
        os.environ["WANDB_TAGS"] = ",".join(args.wandb_tags)


def _refuse_moe_flags_of_a_dense_model(args: argparse.Namespace) -> None:
    for flag, off in (
        ("moe_relu_routing", False),
        ("moe_granularity", 1),
        ("moe_topk_warmup_steps", 0),
        ("moe_relu_max_assignments", None),
        ("moe_change_routing", False),
        *_SHORTCUTS.items(),
    ):
        if getattr(args, flag) != off:
            raise ValueError(
                f"{flag} is set but num_experts is not; pass --num-experts, or leave {flag} out "
                f"for a dense model"
            )


def _check_topk_warmup(args: argparse.Namespace) -> None:
    steps, topk = args.moe_topk_warmup_steps, args.moe_topk_warmup_topk
    if steps < 0:
        raise ValueError(f"moe_topk_warmup_steps is {steps}; it must be 0 (no warm-up) or more")
    if steps == 0 and topk is None:
        return
    if steps == 0 or topk is None:
        raise ValueError(
            f"moe_topk_warmup_steps is {steps} and moe_topk_warmup_topk is {topk}; give both (the "
            f"published control: 100 steps with 6 experts), or neither"
        )
    if args.moe_relu_routing:
        raise ValueError(
            "moe_topk_warmup_steps is set with moe_relu_routing, which has a dense stage of its "
            "own; leave one of them out"
        )
    if args.num_experts is not None and not 1 <= topk <= args.num_experts:
        raise ValueError(
            f"moe_topk_warmup_topk is {topk} of {args.num_experts} experts; choose it between 1 "
            f"and num_experts"
        )
    options.check(args, names=options.NEEDS_KNOWN_COUNT, by="TopK with near-dense warm-up")


def _check_max_assignments(args: argparse.Namespace) -> None:
    limit = args.moe_relu_max_assignments
    if limit is None:
        return
    if limit < 1:
        raise ValueError(
            f"moe_relu_max_assignments is {limit}; it must be at least 1 (a number above tokens x "
            f"experts never chunks), or leave it out for topk per token"
        )
    if not args.moe_relu_routing and not args.moe_topk_warmup_steps:
        raise ValueError(
            f"moe_relu_max_assignments is {limit}, but TopK without warm-up always has topk "
            f"assignments per token; leave it out, or set moe_relu_routing"
        )


_SHORTCUTS: dict[str, Any] = {
    "moe_relu_max_active_experts": None,
    "moe_relu_at_least_one_expert": False,
}


def _check_shortcuts(args: argparse.Namespace) -> None:
    for name, off in _SHORTCUTS.items():
        if getattr(args, name) != off and not args.moe_relu_routing:
            raise ValueError(
                f"{name} is set without moe_relu_routing, of whose router it is a shortcut; set "
                f"both, or leave it out"
            )
    most = args.moe_relu_max_active_experts
    if most is not None and most < args.moe_router_topk:
        raise ValueError(
            f"moe_relu_max_active_experts is {most}, fewer than the mean of moe_router_topk "
            f"{args.moe_router_topk}; choose more, or leave it out"
        )


def _refuse_uneven_gather_on_gloo(args: argparse.Namespace) -> None:
    expert_tp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    is_alltoall = args.moe_token_dispatcher_type == "alltoall"
    if args.distributed_backend == "gloo" and is_alltoall and expert_tp > 1:
        raise ValueError(
            f"expert_tensor_parallel_size is {expert_tp} (that of tensor parallelism when not "
            f"given) with the alltoall dispatcher, which then gathers uneven parts, and gloo "
            f"gathers even ones only; use --expert-tensor-parallel-size 1, or the allgather "
            f"dispatcher"
        )


def _finish_relu_routing(args: argparse.Namespace) -> None:
    options.check(args)
    if args.moe_router_dtype is None:
        args.moe_router_dtype = "fp32"
    # Megatron demands this of softmax routers with topk 1; a ReLU router has no softmax.
    args.moe_router_pre_softmax = True
    # The published scripts pass aux_loss, which their ReLU router ignores. Here it would make
    # Megatron report a loss that does not exist.
    args.moe_router_load_balancing_type = "none"
    if args.num_experts is not None:
        _relu_routing(args).controller_for(args.num_experts, args.moe_router_topk)


def routing_from_args(args: argparse.Namespace) -> "Routing":
    """The settings of ReLU routing, or of TopK routing."""
    from megatron.remoe.moe.topk_router import TopKRouting

    if args.moe_relu_routing:
        return _relu_routing(args)
    if args.moe_topk_warmup_steps:
        return TopKRouting(
            args.moe_topk_warmup_steps, args.moe_topk_warmup_topk, args.moe_relu_max_assignments
        )
    return TopKRouting()


def _relu_routing(args: argparse.Namespace) -> "ReLURouting":
    from megatron.remoe.moe.router import ReLURouting

    return ReLURouting(
        l1_reg_coeff_init=args.moe_relu_l1_reg_coeff_init,
        l1_reg_coeff_multiplier=args.moe_relu_l1_reg_coeff_multiplier,
        load_balancing=args.moe_relu_load_balancing,
        max_active_experts=args.moe_relu_max_active_experts,
        at_least_one_expert=args.moe_relu_at_least_one_expert,
        max_assignments=args.moe_relu_max_assignments,
    )


def configure(model_config: Any, args: argparse.Namespace) -> "FinalizeStep":
    """Put our layers and our once-per-step hook into Megatron's `GPTModelConfig`.

    Without `--moe-relu-routing` the model is Megatron's TopK mixture, or dense without experts, on
    the same backend.

    Returns:
        The hook, a `FinalizeStep`, for `running`.

    Raises:
        ValueError: another kind of model, layers of the script's own, or a checkpoint to load that
            was trained with another router.
    """
    from megatron.remoe.moe.spec import layer_spec
    from megatron.remoe.train import saved
    from megatron.remoe.train.step import FinalizeStep

    _check_model(model_config)
    _refuse_what_is_replaced(args)  # again, since --use-checkpoint-args brings some
    saved.check_before_start(args)
    model_config.transformer_layer_spec = layer_spec(routing_from_args(args))
    hook = FinalizeStep()
    model_config.finalize_model_grads_func = hook
    model_config.pre_wrap_hooks.append(compat.mark_experts)
    if args.fork_async_save:
        # Megatron switches it off without the persistent worker, which a CPU must not use.
        args.async_save, args.async_strategy = True, "mcore"
    return hook


def _check_model(model_config: Any) -> None:
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

    kind = type(model_config).__name__
    is_gpt = isinstance(model_config, GPTModelConfig)
    if not is_gpt or model_config.get_builder_cls() is not GPTModelBuilder:
        raise ValueError(
            f"the model's config is a {kind}, whose layers cannot be exchanged for ours; use the "
            f"GPTModelConfig of gpt_config_from_args"
        )
    if model_config.transformer_layer_spec is not None:
        raise ValueError(
            f"transformer_layer_spec of the {kind} is set already, and our layers take its place; "
            f"leave it None"
        )
