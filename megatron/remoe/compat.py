"""Everything that depends on the version of Megatron: the check, and the fixes that it needs.

Each fix says what is wrong, names the version in which it was seen, and does nothing once Megatron
has mended it. `apply()` is called by the entry point and by `add_arguments`.
"""

import contextlib
import functools
import importlib.util
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TESTED_VERSION = "0.19.2"


def apply() -> None:
    """Check the megatron.core that is imported and apply the fixes. Idempotent.

    Raises:
        ValueError: megatron-core is missing, or another minor version than the tested one.
    """
    version, path = imported_version()
    if version.split(".")[:2] != TESTED_VERSION.split(".")[:2]:
        raise ValueError(
            f"megatron-core {version} is imported from {path}, but this release of remoe works "
            f"with {TESTED_VERSION}; take that folder off PYTHONPATH, or run: pip install "
            f"megatron-core=={TESTED_VERSION}"
        )
    _skip_compiling_dataset_helpers()
    _resume_distributed_optimizer()


def imported_version() -> tuple[str, Path]:
    """Version and folder of the `megatron.core` that is imported.

    It need not be the one that pip has installed: a checkout of Megatron-LM may be before it on the
    path.

    Raises:
        ValueError: there is none.
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
    # It adds the commit of the repository that it lies in, which may be another one's.
    version = package_info.__version__.partition("+")[0]
    return version, Path(package_info.__file__).parent


def _skip_compiling_dataset_helpers() -> None:
    """0.19.2 runs `make` in its datasets folder; the wheel has the built helper, no Makefile."""
    from megatron.core.datasets import utils

    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        utils.compile_helpers = lambda: None


def _resume_distributed_optimizer() -> None:
    """0.19.2 cannot resume its distributed optimizer over torch's Adam (without TE and apex)."""
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    if not distrib_optimizer.HAVE_APEX_OR_TE:
        optimizers.DistributedOptimizer = _resumable_distributed_optimizer()


@functools.cache
def _resumable_distributed_optimizer() -> type:
    import torch
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    class ResumableDistributedOptimizer(DistributedOptimizer):
        """Megatron's, with torch's Adam, whose `step` is a tensor of each parameter's state."""

        def state_dict(self) -> Any:
            # It reads the step from the state, which a new Adam makes in its first step only.
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
            # It gives all parameters one step tensor, which each of them would then count up.
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

        def _set_main_param_and_optimizer_states(
            self, model_param: torch.nn.Parameter, tensors: dict[str, Any]
        ) -> None:
            # The step is loaded with the groups; some formats leave it out here, and it needs one.
            super()._set_main_param_and_optimizer_states(model_param, tensors | {"step": None})

    return ResumableDistributedOptimizer


def mark_experts(models: list[Any]) -> list[Any]:
    """Let expert parameters have an optimizer of their own, also without expert parallelism.

    0.19.2 gives them one only with expert parallelism, and optimizers of different number cannot
    read each other's checkpoints. On one expert-parallel rank it changes nothing else. For
    `pre_wrap_hooks` of Megatron's model configuration.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer

    for model in models:
        for layer in model.modules():
            if isinstance(layer, MoELayer):
                for parameter in layer.experts.parameters():
                    parameter.allreduce = False
    return models


def step_will_be_repeated() -> bool:
    """Whether Megatron is about to run this step again, here or from a checkpoint; on all ranks.

    Every rank must ask, at the end of a forward-backward pass. The flags are those that the rerun
    state machine acts on next (`should_run_forward_backward`): of a first run `rerun_requested`; of
    a second one `checkpoint_requested`, unless a failure that is not fatal lets the run go on.
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
    """Whose Adam Megatron uses here: "Transformer Engine", "apex" or "torch".

    They keep their step counts in different places, and read each other's as zero.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.USING_TE_OPTIMIZER:
        return "Transformer Engine"
    return "apex" if distrib_optimizer.USING_APEX_OPTIMIZER else "torch"


def tensorboard_writer() -> Any:
    """The TensorBoard writer that Megatron made for this rank, or None."""
    from megatron.training import global_vars

    return global_vars._GLOBAL_TENSORBOARD_WRITER


def set_tensorboard_writer(writer: object) -> None:
    """Make Megatron report to `writer`; 0.19.2 has a getter for it, and no setter."""
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
