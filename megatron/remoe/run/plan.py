"""Plan a run: turn a config and the place where it will run into a checked command line."""

import argparse
import os
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron.remoe import cpu, unsupported
from megatron.remoe.arguments import megatron_parser
from megatron.remoe.run import kept, rundir
from megatron.remoe.run.argv import to_argv
from megatron.remoe.run.check import check
from megatron.remoe.run.config import METRICS, RunConfig

_LOG_INTERVAL = 100  # Megatron's default
# A launched run that receives this signal saves a checkpoint and exits with 0. It is not SIGTERM,
# which other tools send to every process of a job.
_STOP = {"exit_signal_handler": True, "exit_signal": "SIGUSR1"}


@dataclass(frozen=True)
class Place:
    """Where a run will run, and for what purpose it is planned.

    Attributes:
        nodes: Number of machines.
        processes: Number of processes on each machine, with which a launched run is planned. None
            plans a run on this machine with the config's `nproc`.
        purpose: "run" starts it from this machine. "submit" hands it to machines that have GPUs.
            "print" only shows how such machines would run it, so that neither its data nor its run
            directory need exist here. "describe" also leaves out what the run directory implies.
    """

    nodes: int = 1
    processes: int | None = None
    purpose: Literal["run", "submit", "print", "describe"] = "run"


@dataclass(frozen=True)
class Plan:
    """A checked run.

    Attributes:
        config: The completed config, with its number of processes.
        argv: The command line of every process.
        args: Megatron's arguments as the run will have them.
    """

    config: RunConfig
    argv: list[str]
    args: argparse.Namespace


def plan(config: RunConfig, place: Place) -> Plan:
    """Complete a config, and check everything that can be checked without starting or writing.

    Raises:
        ValueError: The run would reject an argument, or something of it does not exist.
    """
    config, argv = resolve(config, place)
    is_whole = place.purpose in ("run", "submit")
    if is_whole:
        rundir.check(config)
    args = check(argv, place.nodes * (config.nproc or 1), paths=is_whole)
    unsupported.refuse_in_training(args)
    return Plan(config, argv, args)


def resolve(config: RunConfig, place: Place) -> tuple[RunConfig, list[str]]:
    """Return the config as it will run in a place, and its command line; neither is checked yet.

    Raises:
        ValueError: A key is unknown, or a value is of the wrong kind or does not fit the place.
    """
    if place.processes is not None:
        defaults: dict[str, Any] = dict(_STOP)
        if place.purpose != "run" or not cpu.is_enabled():
            defaults["distributed_backend"] = "nccl"
        config = replace(config, nproc=place.processes, flags=defaults | config.flags)
    if place.purpose != "describe":
        config = complete(config)
    if place.purpose == "run":
        _refuse_nccl_without_gpu(config)
    return config, to_argv(config.flags, megatron_parser())


def train_iters(flags: dict[str, Any]) -> int | None:
    """Return the steps of the whole run, or None where the flags leave that to Megatron."""
    samples, batch, steps = (
        flags.get(key) for key in ("train_samples", "global_batch_size", "train_iters")
    )
    if isinstance(samples, int) and isinstance(batch, int) and samples > 0 and batch > 0:
        return samples // batch
    return steps if isinstance(steps, int) else None


def complete(config: RunConfig) -> RunConfig:
    """Add the flags that follow from the run directory: where the run writes, how often and how.

    Raises:
        ValueError: The metrics would be elsewhere, or nowhere.
    """
    run_dir, flags = config.run_dir, kept.resolve(config.flags, config.run_dir)
    metrics, steps = str(run_dir / METRICS), train_iters(flags)
    given = flags.setdefault("metrics_file", metrics)
    if not isinstance(given, str) or os.path.abspath(given) != os.path.abspath(metrics):
        raise ValueError(
            f"metrics_file is {given}, but progress, curves and comparisons of a run are read from "
            f"{metrics}; leave it out, or choose another run_dir"
        )
    flags.setdefault("data_cache_path", str(run_dir / "cache"))
    flags.setdefault("save", str(run_dir / "checkpoints"))
    flags.setdefault("load", flags["save"])
    flags.setdefault("save_interval", steps)
    flags.setdefault("eval_interval", steps)  # Megatron needs one, and has no default.
    if isinstance(steps, int) and steps > 0:
        log_interval = flags.setdefault("log_interval", min(steps, _LOG_INTERVAL))
        if isinstance(log_interval, int) and log_interval > steps:
            raise ValueError(
                f"log_interval is {log_interval}, but the run has {steps} steps and would log "
                f"nothing; choose a log_interval up to {steps}"
            )
    # With these no fault loses the run: see docs/reliability.md.
    flags.setdefault("exit_signal_handler", True)
    flags.setdefault("rerun_mode", "disabled")
    if flags.get("ckpt_format", "torch_dist") == "torch_dist":
        flags.setdefault("verify_integrity", True)
        if flags.get("use_distributed_optimizer"):
            flags.setdefault("dist_ckpt_optim_fully_reshardable", True)
    if flags.get("wandb_project"):
        flags.setdefault("wandb_exp_name", run_dir.name)
        flags.setdefault("wandb_save_dir", str(run_dir))
    added = {key: value for key, value in flags.items() if key not in config.flags}
    nproc = config.nproc or _default_nproc()
    return replace(config, nproc=nproc, flags=added | {key: flags[key] for key in config.flags})


def _default_nproc() -> int:
    import torch

    return 1 if cpu.is_enabled() else max(1, torch.cuda.device_count())


def _refuse_nccl_without_gpu(config: RunConfig) -> None:
    backend = config.flags.get("distributed_backend")
    if cpu.is_enabled() and backend not in (None, "gloo"):
        raise ValueError(
            f"distributed_backend is {backend}, which needs GPUs, and this machine has none; leave "
            f"it out"
        )
