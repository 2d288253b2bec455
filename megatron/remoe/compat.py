"""Everything that depends on the version of Megatron: a check of it, and the fixes it needs.

Each fix says what is wrong and names the version in which that was seen. A fix does nothing once
Megatron has mended the cause. The entry point and `add_arguments` call `apply()`.
"""

import contextlib
import functools
import importlib.util
import io
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTED_VERSION = "0.19.2"
# The minor versions that `apply` accepts, and what each of them was when it was run
# (docs/compatibility.md).
VERSIONS = {
    "0.19": "megatron-core 0.19.2 from PyPI",
    "0.20": "Megatron-LM's main of 22 August 2026 (d98e8a64)",
}

_MOE = "megatron.core.transformer.moe"
_OPTIMIZER = "megatron.core.optimizer"
# Every private name of Megatron's that we read, replace or override, and every public one that we
# replace or take out of its class: what breaks without it. All but the first two groups are used
# in this module only.
RELIES_ON = {
    # in modules that override or replace them
    f"{_MOE}.token_dispatcher.MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize": (
        "the all-to-all dispatcher (`moe.dispatcher`) would copy sizes to the host again"
    ),
    f"{_MOE}.token_dispatcher.maybe_move_tensor_to_cpu": (
        "TopK with all-to-all on gloo, which takes no tensors as sizes (`cpu.enable`)"
    ),
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": (
        "random states where a CPU stands in (`cpu.enable`)"
    ),
    f"{_MOE}.router.TopKRouter.apply_input_jitter": "input jitter of `moe.router`",
    f"{_MOE}.router.TopKRouter.apply_z_loss": "the z-loss of `moe.router`",
    # in modules that call them
    "megatron.training.global_vars._build_tokenizer": (
        "the check of a tokenizer before a run (`run.rehearsal`)"
    ),
    "megatron.training.checkpointing._build_sharded_state_dict_metadata": (
        "`remoe verify resume` (`verify.resume`)"
    ),
    # here
    "megatron.training.global_vars._GLOBAL_TENSORBOARD_WRITER": (
        "the metrics of steps in TensorBoard (`tensorboard_writer`, `set_tensorboard_writer`)"
    ),
    "megatron.core.datasets.utils.compile_helpers": (
        "starting on a wheel, which has no Makefile (`_skip_compiling_dataset_helpers`)"
    ),
    f"{_OPTIMIZER}.DistributedOptimizer": "all fixes of the distributed optimizer",
    **{
        f"{_OPTIMIZER}.distrib_optimizer.{flag}": "knowing whose Adam is used (`adam`)"
        for flag in ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER")
    },
    **{
        f"{_OPTIMIZER}.distrib_optimizer.DistributedOptimizer.{method}": breaks
        for method, breaks in {
            "_build_optimizer_group_ranges": "states of weights in half precision would be mixed",
            "sharded_param_state_fully_reshardable": "states after a padded bucket would be mixed",
            "_get_model_param_range_map": "the check of what a fully reshardable save writes",
            "_get_main_param_and_optimizer_states": "the same check",
            "_get_state_key_dtype": "the state of torch's Adam before its first step",
            "_set_main_param_and_optimizer_states": "resuming torch's Adam, fully reshardable",
        }.items()
    },
    **{
        f"megatron.core.rerun_state_machine.{name}": "`step_will_be_repeated`"
        for name in (
            "RerunMode.DISABLED",
            "RerunState.INITIAL_RUN",
            "RerunState.RERUNNING_IN_PLACE",
        )
    },
}


def apply() -> None:
    """Check the megatron.core that is imported, and apply the fixes; a second call does nothing.

    Raises:
        ValueError: megatron-core is missing, or of a minor version that we have not run.
    """
    version, path = imported_version()
    if ".".join(version.split(".")[:2]) not in VERSIONS:
        raise ValueError(
            f"megatron-core {version} is imported from {path}, but this release of remoe works "
            f"with {TESTED_VERSION}; take that folder off PYTHONPATH, or run: pip install "
            f"megatron-core=={TESTED_VERSION}"
        )
    _skip_compiling_dataset_helpers()
    _resume_distributed_optimizer()


def imported_version() -> tuple[str, Path]:
    """Return the version and the folder of the `megatron.core` that is imported.

    It need not be the one that pip has installed: a checkout of Megatron-LM may come first on the
    path.

    Raises:
        ValueError: megatron-core is not installed.
    """
    try:
        from megatron.core import package_info
    except ModuleNotFoundError as error:
        if error.name not in ("megatron.core", "megatron.core.package_info"):
            raise
        raise ValueError(
            f"megatron-core is not installed; run: pip install 'remoe[megatron]' "
            f"(tested with {TESTED_VERSION})"
        ) from None
    # Megatron appends the commit of the git repository around it, which may be any repository.
    version = package_info.__version__.partition("+")[0]
    return version, Path(package_info.__file__).parent


def _skip_compiling_dataset_helpers() -> None:
    """Stop 0.19.2 from running `make` in its datasets folder.

    The wheel has the built helper, but no Makefile.
    """
    from megatron.core.datasets import utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None


def _resume_distributed_optimizer() -> None:
    """Let the distributed optimizer resume in cases that 0.19.2 cannot.

    These are torch's Adam, which it uses without Transformer Engine and apex; bf16 models with fp32
    weights; and models whose buckets are padded.
    """
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    optimizers.DistributedOptimizer = (
        _mended_distributed_optimizer()
        if distrib_optimizer.HAVE_APEX_OR_TE
        else _resumable_distributed_optimizer()
    )


@functools.cache
def _mended_distributed_optimizer() -> Any:
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    class MendedDistributedOptimizer(DistributedOptimizer):
        """Megatron's optimizer without two faults of 0.19.2, which mix up the states of weights.

        It gives the fp32 weights of a group of half precision to Adam first, but numbers all
        weights in the order of their buffers, and then saves and loads the state of other weights.

        Its fully reshardable save joins the buckets of a buffer without their padding, and then
        looks for the weights at their places in the padded buffer. After a padded bucket, it saves
        the states of other weights. 0.20 subtracts the padding.
        """

        @classmethod
        def _build_optimizer_group_ranges(cls, param_groups: Any, gbuf_ranges: Any) -> Any:
            places, ranges = super()._build_optimizer_group_ranges(param_groups, gbuf_ranges)
            for number, group in enumerate(ranges):
                group["params"].sort(key=lambda weight: weight.dtype != torch.float32)
                places |= {weight: (number, i) for i, weight in enumerate(group["params"])}
            return places, ranges

        def sharded_param_state_fully_reshardable(
            self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
        ) -> Any:
            make = super().sharded_param_state_fully_reshardable
            if not any(any(_padding_before_buckets(buffer)) for buffer in self.buffers):
                return make(model_sharded_state_dict, is_loading, metadata)
            # Only a method that looks at the buckets can know their padding.
            is_mended = "buckets" in make.__code__.co_names
            with contextlib.nullcontext() if is_mended else _unpadded_places(self.buffers):
                states = make(model_sharded_state_dict, is_loading, metadata)
            if states is not None and not is_loading:
                self._check_own_shards(states)
            return states

        def _check_own_shards(self, states: dict[int, dict[str, Any]]) -> None:
            """Raise if a state that is about to be saved is not that of its weight."""
            weights = (weight for buffer in self.buffers for weight in buffer.param_index_map)
            for number, weight in enumerate(weights):
                if weight not in self.model_param_gbuf_map:
                    continue  # this rank has no part of it
                own = self._get_model_param_range_map(weight)["param"]
                expected = self._get_main_param_and_optimizer_states(weight)
                for name, saved in states[number].items():
                    shard = saved.data.flatten()[own.start : own.end]
                    ours = expected[name].detach().to(shard)
                    if not torch.allclose(shard, ours, rtol=0, atol=0, equal_nan=True):
                        raise RuntimeError(
                            f"megatron-core {imported_version()[0]} would save {saved.key} with "
                            f"values of another weight; leave out overlap_grad_reduce, or run: "
                            f"pip install megatron-core=={TESTED_VERSION}"
                        )

    return MendedDistributedOptimizer


def _padding_before_buckets(buffer: Any) -> list[int]:
    """Return for every bucket of a buffer how many padding elements the buckets before it have."""
    paddings = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
    return list(itertools.accumulate(paddings[:-1], initial=0))


@contextlib.contextmanager
def _unpadded_places(buffers: list[Any]) -> Iterator[None]:
    """Let `param_index_map` say where weights are in a buffer whose buckets have no padding."""
    padded = [buffer.param_index_map for buffer in buffers]
    try:
        for buffer in buffers:
            before = _padding_before_buckets(buffer)
            buffer.param_index_map = {
                weight: (start - before[bucket], end - before[bucket], bucket)
                for weight, (start, end, bucket) in buffer.param_index_map.items()
            }
        yield
    finally:
        for buffer, places in zip(buffers, padded, strict=True):
            buffer.param_index_map = places


@functools.cache
def _resumable_distributed_optimizer() -> type:
    import torch

    base: Any = _mended_distributed_optimizer()

    class ResumableDistributedOptimizer(base):
        """Megatron's optimizer for torch's Adam, which keeps a `step` tensor per parameter."""

        def state_dict(self) -> Any:
            # Megatron reads the step from the state, which a new Adam makes in its first step only.
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    state = self.optimizer.state[parameter]
                    if not state:
                        state["step"] = torch.tensor(0.0)
                        for key in self.optimizer_state_keys:
                            dtype = self._get_state_key_dtype(key)
                            state[key] = torch.zeros_like(parameter, dtype=dtype)
            return super().state_dict()

        @torch.no_grad()  # it copies into parameters
        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            # Megatron gives all parameters one step tensor, which each of them would then count up.
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

        def _set_main_param_and_optimizer_states(
            self, model_param: torch.nn.Parameter, tensors: dict[str, Any]
        ) -> None:
            # The step is loaded with the groups. Some formats omit it here, but the key is needed.
            super()._set_main_param_and_optimizer_states(model_param, tensors | {"step": None})

    return ResumableDistributedOptimizer


def mark_experts(models: list[Any]) -> list[Any]:
    """Let expert parameters have an optimizer of their own, also without expert parallelism.

    0.19.2 gives them one only with expert parallelism, and a different number of optimizers cannot
    read a checkpoint. With one expert-parallel rank nothing else changes. This function is for
    `pre_wrap_hooks` of Megatron's model configuration.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer

    for model in models:
        for layer in model.modules():
            if isinstance(layer, MoELayer):
                for parameter in layer.experts.parameters():
                    parameter.allreduce = False
    return models


def split_padding(models: list[Any]) -> list[Any]:
    """Split padding over tensor-parallel ranks on every pipeline stage.

    With sequence parallelism, 0.19.2 does so on the first stage of a GPT model and nowhere in a
    hybrid model, and hands on the padding of whole sequences, bool `[b, s]`, to routers that have a
    part of them. This function is for `pre_wrap_hooks` of Megatron's model configuration.
    """
    from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

    def split(decoder: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        padding_mask = kwargs.get("padding_mask")
        if padding_mask is None:
            return args, kwargs
        tokens = kwargs["hidden_states"] if decoder.pre_process else decoder.input_tensor
        if padding_mask.shape[1] == len(tokens):
            return args, kwargs
        whole_sb = padding_mask.transpose(0, 1).contiguous()
        ours_sb = scatter_to_sequence_parallel_region(whole_sb)
        return args, kwargs | {"padding_mask": ours_sb.transpose(0, 1).contiguous()}

    for model in models:
        if model.config.sequence_parallel:
            model.decoder.register_forward_pre_hook(split, with_kwargs=True)
    return models


# What has to be in `pre_wrap_hooks` of Megatron's configuration of every model with our layers.
PRE_WRAP_HOOKS = (mark_experts, split_padding)


def make_room_for_losses(config: Any) -> None:
    """Let a pipeline stage without experts report the losses of a hybrid model's routers.

    In 0.19.2 such a stage makes room for the layers with experts, and a stage with experts for all
    layers, so that the sum over stages cannot be taken. Room that is made before is kept.

    Args:
        config: Megatron's TransformerConfig, on a rank that knows its device.
    """
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    if not config.is_hybrid_model:
        return
    for loss in ("load_balancing_loss", "seq_load_balancing_loss", "global_load_balancing_loss",
                 "z_loss"):  # fmt: skip
        get_moe_metrics_tracker().ensure_initialized(loss, config.num_layers)


def step_will_be_repeated() -> bool:
    """Return whether Megatron is about to repeat this step, here or from a checkpoint.

    Every rank must ask at the end of a forward-backward pass, and all get the same answer. The
    flags are those that the rerun state machine acts on next (`should_run_forward_backward`):
    `rerun_requested` after a first run, and `checkpoint_requested` after a second one, unless a
    failure that is not fatal lets the run go on.
    """
    import torch
    from megatron.core.rerun_state_machine import RerunMode, RerunState, get_rerun_state_machine

    machine = get_rerun_state_machine()
    if machine.mode == RerunMode.DISABLED:
        return False
    if machine.state == RerunState.INITIAL_RUN:
        flags = [machine.rerun_requested, False]
    elif machine.state == RerunState.RERUNNING_IN_PLACE:
        flags = [machine.checkpoint_requested, machine.continue_requested]
    else:
        return False
    reduced = torch.tensor(flags, dtype=torch.int32, device="cuda")
    torch.distributed.all_reduce(reduced, op=torch.distributed.ReduceOp.MAX)
    repeats, goes_on = reduced.tolist()
    return bool(repeats and not goes_on)


def adam() -> str:
    """Return whose Adam Megatron uses here: "Transformer Engine", "apex" or "torch".

    Each keeps its step count in a different place, and reads the count of another one as zero.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.USING_TE_OPTIMIZER:
        return "Transformer Engine"
    return "apex" if distrib_optimizer.USING_APEX_OPTIMIZER else "torch"


def tensorboard_writer() -> Any:
    """Return the TensorBoard writer that Megatron made for this rank, or None."""
    from megatron.training import global_vars

    return global_vars._GLOBAL_TENSORBOARD_WRITER


def set_tensorboard_writer(writer: object) -> None:
    """Make Megatron report to `writer`, for which 0.19.2 has a getter but no setter."""
    from megatron.training import global_vars

    global_vars._GLOBAL_TENSORBOARD_WRITER = writer


@contextlib.contextmanager
def command_line(argv: list[str], world_size: int) -> Iterator[io.StringIO]:
    """Let Megatron's parser and validation see a command line as the first rank of a run would.

    Megatron 0.19.2 reads `sys.argv` and the environment, prints while it validates, and writes what
    is wrong to standard error before it exits.

    Args:
        argv: The command line without the program's name.
        world_size: Number of processes of the whole run, on all machines.

    Yields:
        What has been written to standard error. Standard output is dropped.
    """
    environment, before, size = dict(os.environ), sys.argv, str(world_size)
    os.environ |= {"RANK": "0", "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    sys.argv = [before[0], *argv]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            yield said
    finally:
        os.environ.clear()
        os.environ |= environment
        sys.argv = before
