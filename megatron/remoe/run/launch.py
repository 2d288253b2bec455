"""Start a run from this machine and stay its parent until it ends."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from megatron.remoe.run import rundir, torchrun
from megatron.remoe.run.config import RunConfig
from megatron.remoe.run.plan import Place, Plan, plan, train_iters
from megatron.remoe.run.progress import follow, new_rows
from megatron.remoe.run.torchrun import Stop

POLL_SECONDS = 0.5
_LAST_LINES = 25  # of the log, which are shown when a run has failed


def prepare(config: RunConfig, place: Place | None = None, *, force: bool = False) -> Plan:
    """Plan a run that starts from this machine, and write its `config.yaml`.

    Nothing is written before everything is checked.

    Args:
        config: A resolved config.
        place: The machines; None is this one alone.
        force: Whether to continue a run with other settings.

    Raises:
        ValueError: The run would reject an argument, or its directory holds another run.
    """
    planned = plan(config, place or Place())
    if not force:
        rundir.refuse_another_run(planned.config)
    run_dir = planned.config.run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    os.close(rundir.hold(run_dir))
    rundir.write(planned.config)
    return planned


def start(
    config: RunConfig,
    argv: list[str],
    log: TextIO,
    *,
    runs_beside: int = 1,
    first: Callable[[], None] = lambda: None,
    **options: Any,
) -> subprocess.Popen[bytes]:
    """Start a run on this machine, which holds its directory for as long as it has ranks.

    Args:
        config: The config of a run that `prepare` or a sweep has checked.
        argv: Its command line.
        log: The file that gets the output.
        runs_beside: Number of runs that share this machine, this one included.
        first: Called while the directory is held and nothing has started.
        options: Further options of `Popen`.

    Raises:
        ValueError: Another process holds the directory.
    """
    nproc = config.nproc or 1
    environment = torchrun.cpu_environment(nproc * runs_beside)
    lock = rundir.hold(config.run_dir)
    try:
        first()
        words = torchrun.command(argv, nproc)
        options |= {"stdout": log, "stderr": subprocess.STDOUT}
        return torchrun.start(words, environment, lock=lock, **options)
    finally:
        os.close(lock)


def train(config: RunConfig, argv: list[str], console: Console) -> int:
    """Run to the end with a progress line; the output of the processes goes to `log.txt`.

    Returns:
        The exit code of torchrun.
    """
    log_path, stop = config.run_dir / "log.txt", Stop()
    with log_path.open("a") as log, log_path.open(errors="replace") as own_log:
        own_log.seek(log.tell())
        started = time.time()
        process = start(config, argv, log)
        goes_on = partial(_goes_on, process, stop, config.flags)
        with stop.when(signal.SIGTERM):
            try:
                rows = new_rows(Path(config.flags["metrics_file"]), started, goes_on)
                follow(rows, own_log, train_iters(config.flags), console)
            except KeyboardInterrupt:  # The terminal has sent it to torchrun too.
                process.wait()
    if process.returncode != 0:
        tail = log_path.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        console.print("\n".join(tail), markup=False, highlight=False)
        console.print(f"the run failed (exit code {process.returncode}); see {log_path}")
    elif stop.requested.is_set():
        console.print("stopped by SIGTERM after a checkpoint; the same command continues")
    return process.returncode


def launch(planned: Plan, place: Place, *, name: str, endpoint: str, stop: Stop) -> int:
    """Run this machine's part of a run to the end; its output goes where this process's goes.

    Args:
        planned: The run, as `prepare` has planned it.
        place: All of its machines.
        name: Name of the rendezvous.
        endpoint: Where several machines meet.
        stop: The request to stop the run, which may have been made already.

    Returns:
        The exit code of torchrun.
    """
    config = planned.config
    words = torchrun.command(
        planned.argv, config.nproc or 1, nodes=place.nodes, name=name, endpoint=endpoint
    )
    # Several machines share the directory, so that none of them may hold it alone.
    lock = rundir.hold(config.run_dir) if place.nodes == 1 else None
    try:
        process = torchrun.start(words, torchrun.launch_environment(), lock=lock)
    finally:
        if lock is not None:
            os.close(lock)
    try:
        while _goes_on(process, stop, config.flags):
            pass
    except KeyboardInterrupt:  # The terminal has sent it to torchrun too.
        process.wait()
    return process.returncode


def _goes_on(process: subprocess.Popen[bytes], stop: Stop, flags: dict[str, Any]) -> bool:
    """Wait for a moment, and return whether the run had not ended before."""
    if process.poll() is not None:
        return False
    stop.pass_on(process, flags)
    time.sleep(POLL_SECONDS)
    return True
