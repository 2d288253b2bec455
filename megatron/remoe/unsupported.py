"""Flags of Megatron's parser that pretraining does not read, or that this machine cannot run.

Megatron has one parser for all its programs. A flag of another program would do nothing here, and
several others end every rank after the start. What is here was found by `python -m tests.fuzz`. It
holds for our entry point: a script of one's own may read more flags.
"""

import argparse
import importlib.util
from typing import Any

from megatron.remoe import cpu

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
# Flags in these groups that pretraining reads.
_READ = ("cuda_graph_modules",)
# Flags that never work here, by their names in `args`: any other value than the default is refused.
_REFUSED = {
    "perform_initialization": "weights would be whatever the memory holds; leave it out",
    "init_method_xavier_uniform": "Megatron 0.19 cannot build a model with it; use init_method_std",
    "lazy_mpu_init": "it needs a program that makes the process groups itself; leave it out",
    "fake_process_group": "ranks would not exchange anything; leave it out",
    "config_logger_dir": "Megatron 0.19 cannot write configs with process groups; leave it out",
    "yaml_cfg": "Megatron would read the other flags from that file; write them into the config",
    "skip_train": "nothing would be trained; use remoe evaluate",
    "test_mode": "it belongs to Megatron's own tests; leave it out",
    "moe_use_upcycling": "Megatron's upcycling makes TopK mixtures; use remoe convert upcycle",
    "ckpt_convert_format": "it ends after a conversion; leave it out",
    "dataloader_type.external": "it needs a program with a data loader of its own; leave it out",
}
# Flags that need CUDA, and those that need a package: flags, or a whole group.
_NEEDS_GPU = (
    "optimizer_cuda_graph", "record_memory_history", "log_memory_to_tensorboard", "log_straggler",
    "pipeline_model_parallel_comm_backend", "nccl_ub", "use_sharp", "use_torch_fsdp2",
    "init_model_with_meta_device", "log_device_memory_used", "cuda_graph_impl",
    "high_priority_stream_groups", "nccl_communicator_config_path",
)  # fmt: skip
_NEEDS_PACKAGE = {
    "enable_ft_package": "nvidia_resiliency_ext",
    "calc_ft_timeouts": "nvidia_resiliency_ext",
    "inprocess_restart": "nvidia_resiliency_ext",
    "fault injector": "nvidia_resiliency_ext",
    "log_energy": "pynvml",
    "enable_msc": "multistorageclient",
}
# Flags that are for Megatron's own scripts to act on, with their defaults.
_UNUSED: dict[str, Any] = {
    "allow_ambiguous_pad_tokens": False,
    "check_for_spiky_loss": False,
    "dataloader_fast_cache_load": False,
    "dataloader_defer_npy_index_mmap": False,
    "dataloader_inter_document_masking": False,
    "fim_data": False,
    "hybrid_context_parallel": False,
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,
    "is_hybrid_model": False,
    "logits_load_dir": None,
    "object_storage_cache_path": None,
    "per_dataset_sequences_path": None,
    "perform_rl_step": False,
    "sft": False,
}


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse what would do nothing, or end every rank after the start.

    Args:
        args: as parsed.
        parser: that parsed them.

    Raises:
        ValueError: naming the flag, its value, the reason and the remedy.
    """
    for group in parser._action_groups:
        title = group.title or ""
        program, needed = _OTHER_PROGRAMS.get(title), _NEEDS_PACKAGE.get(title)
        for action in group._group_actions:
            value = getattr(args, action.dest, action.default)
            if action.dest in _READ or value == parser.get_default(action.dest):
                continue
            package = needed or _NEEDS_PACKAGE.get(action.dest)
            reason = _REFUSED.get(action.dest) or _REFUSED.get(f"{action.dest}.{value}")
            if program is not None:
                reason = f"it is read by Megatron's programs for {program} only; leave it out"
            elif action.dest in _NEEDS_GPU and cpu.is_enabled() and _runs_here(args):
                reason = "it needs a GPU; leave it out on this machine"
            elif package is not None and importlib.util.find_spec(package) is None:
                reason = f"it needs {package}, which is not installed; install it, or leave it out"
            if reason is not None:
                raise ValueError(f"{_option(action)} is {_said(action, value)}, but {reason}")


def _runs_here(args: argparse.Namespace) -> bool:
    """Whether it is not for machines with GPUs, as what is printed or described often is."""
    return bool(args.distributed_backend == "gloo")


def _option(action: argparse.Action) -> str:
    return action.option_strings[0].removeprefix("--").replace("-", "_")


def _said(action: argparse.Action, value: object) -> str:
    return "set" if action.nargs == 0 else str(value)


def refuse_unused(args: argparse.Namespace) -> None:
    """Raise ValueError for a flag of Megatron's that this entry point would ignore."""
    for name, default in _UNUSED.items():
        value = getattr(args, name, default)
        if value != default:
            raise ValueError(
                f"{name} is {value}, which this entry point ignores; leave it out, or use a script "
                f"of Megatron-LM that acts on it (the README says how)"
            )
