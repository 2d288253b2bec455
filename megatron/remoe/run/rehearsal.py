"""Build what every rank of a run builds, before the run starts, and report what fails.

Torch's `fake` process groups stand in for the other ranks, and tensors are on the `meta` device, so
that a model of any size and layout takes about a second and no memory. The rehearsal builds the
tokenizer, the model, DDP, the optimizer and its schedule as the first rank does, and runs a forward
pass in which layers of experts do nothing, because their sizes depend on the tokens. All this sets
the state of a process, so it happens in a child process.
"""

import argparse
import contextlib
import copy
import gc
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from typing import IO, Any

from megatron.remoe import cpu
from megatron.remoe.run.mistakes import Foreign, explain, one_line

_SECONDS = 120
_LONGEST_MESSAGE = 2000
_FOREIGN = "Megatron: "  # The child's answer begins with this if it is to be raised as `Foreign`.

# Runs of a sweep differ in these, and nothing that is built depends on them.
_NOT_BUILT = ("seed", "save", "load", "metrics_file", "data_cache_path", "tensorboard_dir",
              "wandb_exp_name", "wandb_save_dir")  # fmt: skip
_passed: set[str] = set()  # the arguments that were accepted in this process


def rehearse(args: argparse.Namespace, *, tokenizer: bool = True) -> str | None:
    """Build the run of these arguments in a child process.

    A child that takes longer than two minutes is ended, and the run is accepted. What has been
    built once in this process is not built again, so a sweep over seeds builds one run.

    Args:
        args: The arguments, validated by Megatron.
        tokenizer: Whether the tokenizer is on this machine.

    Returns:
        A warning if the run was accepted although it could not be built in time.

    Raises:
        ValueError: Every rank would raise this error, in one line.
    """
    known = {k: v for k, v in vars(args).items() if k not in _NOT_BUILT} | {"tokenizer": tokenizer}
    if repr(known) in _passed:
        return None
    code: int | None = -1
    if cpu.is_enabled():
        code = _judge(*_fork(args, tokenizer))
    if code is not None and code < 0:  # A fork of a process with threads may die of a signal.
        code = _judge(*_spawn(args, tokenizer))
    if code:
        raise Foreign(f"building it ends with exit code {code}")
    _passed.add(repr(known))
    if code is None:
        return (
            f"the run is accepted, but its check is not complete: building the model and the "
            f"optimizer took longer than {_SECONDS} seconds and was stopped; if the run fails at "
            f"its start, its log says why"
        )
    return None


def _judge(pid: int, answer: IO[bytes]) -> int | None:
    """Wait for the child and return its exit code, negative for a signal.

    Returns:
        The exit code, or None if the child was ended because it took too long.

    Raises:
        ValueError: The child has answered with an error.
    """
    message, end = b"", time.monotonic() + _SECONDS
    try:
        with answer:
            while ready := select.select([answer], [], [], max(0.0, end - time.monotonic()))[0]:
                part = os.read(answer.fileno(), 1 << 16)
                message += part
                if not part:
                    break
    finally:
        if not (ready and not part):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if not ready:
        return None
    if message:
        text = message.decode(errors="replace")
        if text.startswith(_FOREIGN):
            raise Foreign(text.removeprefix(_FOREIGN))
        raise ValueError(text)
    return os.waitstatus_to_exitcode(status)


def _fork(args: argparse.Namespace, tokenizer: bool) -> tuple[int, IO[bytes]]:
    import megatron.core.tokenizers.text  # noqa: F401  many rehearsals import it once
    import megatron.training.training  # noqa: F401

    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        gc.freeze()  # The parent's garbage may wait for threads that the child does not have.
        os.close(reader)
        _answer(args, tokenizer, writer)
    os.close(writer)
    return pid, os.fdopen(reader, "rb", buffering=0)


def _spawn(args: argparse.Namespace, tokenizer: bool) -> tuple[int, IO[bytes]]:
    """Start a new process without GPUs, since a fork of a process with GPUs cannot use CUDA."""
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "megatron.remoe.run.rehearsal"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert child.stdin is not None and child.stdout is not None
    with contextlib.suppress(BrokenPipeError), child.stdin as pipe:
        pipe.write(pickle.dumps((args, tokenizer)))
    return child.pid, child.stdout


def _answer(args: argparse.Namespace, tokenizer: bool, to: int) -> None:
    """Write the error, or nothing if all goes well, and end this process."""
    status, message = 1, ""
    try:
        from megatron.remoe import processes

        processes.end_with_parent()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            if stream != to:
                os.dup2(null, stream)
        _build(args, tokenizer)
        status = 0
    except Exception as error:
        found = explain(error, args)
        message = f"{_FOREIGN if isinstance(found, Foreign) else ''}{found}"
    except SystemExit as end:
        message = f"{_FOREIGN}Megatron ends at its start with code {end.code}"
    finally:
        if message:
            os.write(to, one_line(message).encode()[:_LONGEST_MESSAGE])
        os._exit(0 if message else status)


def _build(args: argparse.Namespace, tokenizer: bool) -> None:
    import torch
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.global_vars import set_global_variables
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import setup_model_and_optimizer

    from megatron.remoe import compat
    from megatron.remoe.arguments import configure, model_config_of
    from megatron.remoe.pretrain import dataset_config

    torch.set_num_threads(1)
    compat.apply()
    _forget_state()
    _fake_process_groups(args.world_size)
    args = copy.copy(args)
    # Nothing is read or written.
    args.load = args.pretrained_checkpoint = args.save = args.tensorboard_dir = None
    args.wandb_project = args.config_logger_dir = ""
    args.async_save = args.log_progress = False
    if not tokenizer and args.padded_vocab_size is None:
        args.padded_vocab_size = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    set_global_variables(args, build_tokenizer=False)
    if tokenizer:
        _build_tokenizer(args)
        dataset_config(args)
    initialize_megatron()
    model_config = model_config_of(args)
    configure(model_config, args, hides_tokens=args.masked_lm)
    container = pretrain_cfg_container_from_args(args, model_config)
    if args.transformer_impl == "transformer_engine":
        return  # Its modules can only be built on a GPU.
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment, return-value]
    with torch.device("meta"):
        models, _, _ = setup_model_and_optimizer(
            ModelType.encoder_or_decoder,
            checkpointing_context={},
            cfg_container=container,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        _pass(models[0], args)


def _forget_state() -> None:
    """Forget the state of Megatron and torch that the child has inherited from its parent."""
    import torch.distributed.distributed_c10d as c10d
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training import global_vars

    global _kept  # Their destructors would wait for threads that a fork does not have.
    world = c10d._world
    maps: tuple[dict[Any, Any], ...]
    maps = (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config)
    maps += (world.pg_to_tag, world.tags_to_pg, world.pg_coalesce_state)
    _kept = (dict(vars(parallel_state)), *(dict(one) for one in maps))
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    for one in maps:
        one.clear()
    c10d.GroupMember.WORLD = None
    global_vars.unset_global_variables()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    destroy_rerun_state_machine()


_kept: Any = None


def _fake_process_groups(world_size: int) -> None:
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    new_group = torch.distributed.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **(kwargs | {"backend": "fake", "pg_options": None}))

    torch.distributed.new_group = fake_group


def _build_tokenizer(args: argparse.Namespace) -> None:
    from megatron.training import global_vars

    try:
        tokenizer = global_vars._build_tokenizer(args)
    except Exception as error:  # Tokenizers come from many libraries.
        raise ValueError(
            f"tokenizer_type is {args.tokenizer_type} with tokenizer_model {args.tokenizer_model} "
            f"and vocab_size {args.vocab_size}, and cannot be loaded: "
            f"{one_line(error).rstrip('.')}; correct these"
        ) from error
    if args.padded_vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"padded_vocab_size is {args.padded_vocab_size}, less than the {tokenizer.vocab_size} "
            f"tokens of the tokenizer; choose at least as many, or leave it out"
        )


def _pass(model: Any, args: argparse.Namespace) -> None:
    import torch
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from megatron.remoe.moe.recurrent import RecurrentMoELayer

    for module in model.modules():
        if isinstance(module, RecurrentMoELayer):
            module.forward = module.rehearse
        elif isinstance(module, MoELayer):
            module.forward = lambda hidden, *args, **kwargs: (hidden, None)
    if args.overlap_param_gather and args.use_distributed_optimizer:
        model.disable_forward_pre_hook(param_sync=False)  # Nothing can be gathered on meta.
    tokens = torch.zeros(args.micro_batch_size, args.seq_length, dtype=torch.long)
    with torch.no_grad():  # The backward pass of dropout and masks fails on the meta device only.
        model(tokens, torch.zeros_like(tokens), None, labels=tokens)


if __name__ == "__main__":
    cpu.prepare_megatron()
    out = os.dup(1)
    given, with_tokenizer = pickle.load(sys.stdin.buffer)
    _answer(given, with_tokenizer, out)
