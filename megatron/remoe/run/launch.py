"""Start a run on this machine, follow it, and sum it up."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from megatron.remoe import cpu, processes
from megatron.remoe.analysis.runs import parse_row
from megatron.remoe.arguments import megatron_parser
from megatron.remoe.run import rundir
from megatron.remoe.run.argv import to_argv
from megatron.remoe.run.check import check
from megatron.remoe.run.config import RunConfig

_POLL_SECONDS = 0.5
_LOG_INTERVAL = 100  # Megatron's default
_SECONDS_BETWEEN_LINES = 15  # where the output is not a terminal
_STEPS_OF_ETA = 20
_NOTICES = ("remoe: warning: ", "remoe: error: ", "remoe: continuing ")  # of the log, to be shown


def default_nproc() -> int:
    import torch

    return 1 if cpu.is_enabled() else max(1, torch.cuda.device_count())


def train_iters(flags: dict[str, Any]) -> int | None:
    """Steps of the whole run; None where the flags leave that to Megatron's defaults."""
    samples, batch, steps = (
        flags.get(key) for key in ("train_samples", "global_batch_size", "train_iters")
    )
    if isinstance(samples, int) and isinstance(batch, int) and samples > 0 and batch > 0:
        return samples // batch
    return steps if isinstance(steps, int) else None


def complete(config: RunConfig) -> RunConfig:
    """Add what follows from the run directory: where metrics, checkpoints and logs go, and how.

    Raises:
        ValueError: metrics that would be elsewhere, or nowhere.
    """
    run_dir, flags = config.run_dir, dict(config.flags)
    metrics, steps = str(run_dir / "metrics.jsonl"), train_iters(flags)
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
    flags.setdefault("eval_interval", steps)  # Megatron has no default, and needs one
    if isinstance(steps, int) and steps > 0:
        log_interval = flags.setdefault("log_interval", min(steps, _LOG_INTERVAL))
        if isinstance(log_interval, int) and log_interval > steps:
            raise ValueError(
                f"log_interval is {log_interval}, but the run has {steps} steps and would log "
                f"nothing; choose a log_interval up to {steps}"
            )
    # No fault loses the run: see docs/reliability.md.
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
    return RunConfig(run_dir, config.nproc or default_nproc(), added | config.flags)


def prepare(
    config: RunConfig, *, force: bool = False, nodes: int = 1
) -> tuple[RunConfig, list[str]]:
    """Complete a config with its run directory's paths, check it, and write `config.yaml`.

    Nothing is written before everything is checked.

    Args:
        config: a run.
        force: continue a run with other settings.
        nodes: machines, each with the config's number of processes.

    Returns:
        The completed config, with a number of processes, and its command line.

    Raises:
        ValueError: arguments that the run would reject, or a directory that holds another run.
    """
    config = complete(config)
    refuse_nccl_without_gpu(config)
    argv = to_argv(config.flags, megatron_parser())
    rundir.check(config)
    check(argv, nodes * (config.nproc or 1))
    if not force:
        rundir.refuse_another_run(config)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    os.close(_lock(config.run_dir))
    write_config(config)
    return config, argv


def refuse_nccl_without_gpu(config: RunConfig) -> None:
    """Raise `ValueError` for a backend that this machine cannot run."""
    backend = config.flags.get("distributed_backend")
    if cpu.is_enabled() and backend not in (None, "gloo"):
        raise ValueError(
            f"distributed_backend is {backend}, which needs GPUs, and this machine has none; leave "
            f"it out"
        )


def _lock(run_dir: Path) -> int:
    return processes.hold_lock(run_dir / ".lock", run_dir)


def write_config(config: RunConfig) -> None:
    """Write `config.yaml` at once: the machines of a run write the same file together."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    temporary = config.run_dir / f".config.yaml.{socket.gethostname()}.{os.getpid()}"
    temporary.write_text(config.to_yaml())
    os.replace(temporary, config.run_dir / "config.yaml")


def command(argv: list[str], nproc: int) -> list[str]:
    """The torchrun command of a run on this machine."""
    torchrun = ["-m", "megatron.remoe.agent", "--standalone", f"--nproc-per-node={nproc}"]
    torchrun += ["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT"]
    return [sys.executable, "-W", "ignore", *torchrun, "-m", "megatron.remoe.pretrain", *argv]


def cpu_environment(nproc: int) -> dict[str, str]:
    """What makes torch fast on a CPU, for every process of a run; what is set already stays.

    Threads are divided, large tensors get huge pages, and freed memory is kept for the next step:
    activations and gradients of many experts are otherwise fresh memory at every step, whose first
    touch costs more than writing to it (glibc; elsewhere these have no effect).
    """
    return {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc)),
        "THP_MEM_ALLOC_ENABLE": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**36),
    }


def train(config: RunConfig, argv: list[str], console: Console) -> int:
    """Run to the end with a progress line; the processes' output goes to `log.txt`.

    Returns:
        The exit code of torchrun.
    """
    log_path = config.run_dir / "log.txt"
    metrics = Path(config.flags["metrics_file"])
    stop = Stop(saves=bool(config.flags.get("exit_signal_handler")))
    with log_path.open("a") as log:
        start_of_log = log.tell()
        process = start(config, argv, log)
        previous = signal.signal(signal.SIGTERM, lambda *_: stop.requested.set())
        try:
            with log_path.open(errors="replace") as own_log:
                own_log.seek(start_of_log)
                rows = _new_rows(metrics, process, stop)
                _follow(rows, own_log, train_iters(config.flags), console)
        except KeyboardInterrupt:  # the terminal has sent it to torchrun too
            process.wait()
        finally:
            signal.signal(signal.SIGTERM, previous)
    if process.returncode != 0:
        tail = log_path.read_text(errors="replace").splitlines()[-25:]
        console.print("\n".join(tail), markup=False, highlight=False)
        console.print(f"the run failed (exit code {process.returncode}); see {log_path}")
    elif stop.requested.is_set():
        console.print("stopped by SIGTERM after a checkpoint; the same command continues")
    return process.returncode


def start(
    config: RunConfig,
    argv: list[str],
    log: TextIO,
    *,
    runs_beside: int = 1,
    first: Callable[[], None] = lambda: None,
    **options: Any,
) -> subprocess.Popen[bytes]:
    """Start torchrun, which holds the run's directory for as long as it has ranks.

    Args:
        config: of a run that `prepare` or a sweep has checked.
        argv: its command line.
        log: gets the output.
        runs_beside: how many runs share this machine, this one included.
        first: called while the directory is held and nothing has started.
        options: of `Popen`.

    Raises:
        ValueError: another process holds the directory.
    """
    nproc = config.nproc or 1
    environment = cpu_environment(nproc * runs_beside) | os.environ
    lock = _lock(config.run_dir)
    try:
        first()
        return subprocess.Popen(
            command(argv, nproc),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment | {processes.PARENT: str(os.getpid())},
            pass_fds=(lock,),
            **options,
        )
    finally:
        os.close(lock)


class Stop:
    """SIGTERM on its way to the ranks, each of which hears it once, as soon as it listens.

    Attributes:
        saves: the ranks save on SIGTERM; otherwise the run is killed.
        requested: set by the signal.
    """

    def __init__(self, *, saves: bool) -> None:
        self.saves, self.requested = saves, threading.Event()
        self._told: set[int] = set()

    def pass_on(self, torchrun: subprocess.Popen[bytes]) -> None:
        if not self.requested.is_set():
            return
        if not self.saves:
            torchrun.kill()
        for rank in processes.children(torchrun.pid):
            if rank not in self._told and processes.catches(rank, signal.SIGTERM):
                self._told.add(rank)
                os.kill(rank, signal.SIGTERM)


def _follow(
    rows: Iterator[dict[str, Any] | None], log: TextIO, total: int | None, console: Console
) -> None:
    report, close = (_bar if console.is_terminal else _lines)(total, console)
    try:
        for row in rows:
            for line in _complete_lines(log):
                if line.startswith(_NOTICES):
                    console.print(line.strip(), markup=False, highlight=False, soft_wrap=True)
            if row is not None and "split" not in row:
                report(row)
    finally:
        close()


def _complete_lines(file: TextIO) -> Iterator[str]:
    """The lines from here on; the beginning of one that is being written is left for later."""
    position = file.tell()
    while (line := file.readline()).endswith("\n"):
        position = file.tell()
        yield line
    file.seek(position)


def _new_rows(
    path: Path, process: subprocess.Popen[bytes], stop: "Stop"
) -> Iterator[dict[str, Any] | None]:
    """Rows as they are written by this process, until it ends; None while there is nothing new."""
    started, position = time.time(), 0
    while True:
        ended = process.poll() is not None
        if path.exists() and path.stat().st_mtime >= started:
            with path.open(errors="replace") as file:
                file.seek(position)
                for line in _complete_lines(file):
                    position = file.tell()
                    with contextlib.suppress(ValueError):  # `Run.load` names a damaged line
                        yield parse_row(line)
        yield None
        if ended:
            return
        stop.pass_on(process)
        time.sleep(_POLL_SECONDS)


Report = tuple[Callable[[dict[str, Any]], None], Callable[[], None]]


def _bar(total: int | None, console: Console) -> Report:
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console
    )
    progress.start()
    task = progress.add_task("starting", total=total)
    speeds: deque[float] = deque(maxlen=_STEPS_OF_ETA)

    def report(row: dict[str, Any]) -> None:
        text = describe_row(row) + _eta(row, speeds, total)
        progress.update(task, completed=row["iteration"], description=text)

    return report, progress.stop


def _lines(total: int | None, console: Console) -> Report:
    last_time = 0.0
    speeds: deque[float] = deque(maxlen=_STEPS_OF_ETA)

    def report(row: dict[str, Any]) -> None:
        nonlocal last_time
        text = describe_row(row) + _eta(row, speeds, total)
        now, iteration = time.monotonic(), row["iteration"]
        if now - last_time >= _SECONDS_BETWEEN_LINES or iteration == total:
            last_time = now
            console.print(f"{iteration}/{total or '?'}  {text}", highlight=False)

    return report, lambda: None


def _eta(row: dict[str, Any], speeds: deque[float], total: int | None) -> str:
    """Time left at the speed of the last rows, which also holds for a continued run."""
    speeds.append(row["tokens_per_second"])
    if total is None:
        return ""
    tokens_left = row["tokens"] * (total / row["iteration"] - 1)
    return f"  ETA {tokens_left / (sum(speeds) / len(speeds)):.0f} s"


def summarise(run_dir: Path, console: Console) -> None:
    """Print what a finished run has reached, and draw `curves.png`."""
    from megatron.remoe.analysis.plots import plot_curves
    from megatron.remoe.analysis.runs import Run

    try:
        run = Run.load(run_dir)
    except ValueError as error:  # the run itself has ended well
        console.print(f"no summary: {error}", markup=False, highlight=False)
        return
    plot_curves(run, run_dir / "curves.png")
    table = Table(title=str(run_dir), show_header=False)
    table.add_row("iterations", str(run.train[-1]["iteration"]))
    table.add_row("training loss", _loss(run.train[-1]["lm_loss"], 4))
    if run.has_relu_routing and run.measured:
        last = [row["sparsity"] for row in run.measured[-20:]]
        table.add_row(
            f"sparsity, mean of the last {len(last)} rows",
            f"{sum(last) / len(last):.4f} (target {run.target_sparsity:g})",
        )
        stages = run.stages
        table.add_row("dense until step", str(stages.dense_until))
        table.add_row("sparsity settles at step", str(stages.sparse_from or "not settled"))
        for cost in run.stage_costs:
            text = f"steps {cost.first}-{cost.last}: {cost.seconds:.0f} s ({cost.share:.2%})"
            if cost.peak_memory is not None:
                text += f", peak memory {cost.peak_memory / 1e9:.2f} GB"
            table.add_row(f"{cost.name} stage", text)
        overhead = run.early_overhead
        if overhead is not None:
            table.add_row("time above the stable stage's speed", f"{overhead:.2%}")
    for split, loss in sorted(run.last_evaluation().items()):
        table.add_row(f"loss, {split}", _loss(loss, 4))
    console.print(table)
    console.print(f"curves: {run_dir / 'curves.png'}", highlight=False)


def describe_row(row: dict[str, Any]) -> str:
    """A training row in a few words."""
    text = f"loss {_loss(row['lm_loss'], 3)}"
    if row.get("sparsity") is not None:  # null: the batch was padding alone
        text += f"  sparsity {row['sparsity']:.3f}"
    if "l1_coeff" in row:
        text += f"  coefficient {row['l1_coeff']:.1e}"
    return text


def _loss(value: float | None, digits: int) -> str:
    return "nan" if value is None else f"{value:.{digits}f}"
