"""Running a sweep: several runs at a time here, or one Slurm job each; finished ones are left."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from megatron.remoe.analysis.runs import read_rows
from megatron.remoe.run import cluster, launch, rundir
from megatron.remoe.run.sweep import SweepRun

_POLL_SECONDS = 0.5
_SECONDS_BETWEEN_LINES = 30  # where the output is not a terminal
_SECONDS_TO_SAVE = 60
_JOB_FILE = "slurm_job"

Active = dict[str, tuple[SweepRun, subprocess.Popen[bytes]]]  # runs that are going on, by name


def is_finished(run: SweepRun) -> bool:
    """Whether the last step that is logged is there, and the validation after the last one.

    Raises:
        ValueError: a damaged line.
    """
    flags = run.config.flags
    steps = launch.train_iters(flags)
    if steps is None:
        return False
    evaluates = flags.get("eval_iters", 100) != 0
    last = steps if evaluates else steps - steps % flags.get("log_interval", 1)
    split = "valid" if evaluates else None
    return any(row["iteration"] == last and row.get("split") == split for row in _rows(run))


def _rows(run: SweepRun) -> list[dict[str, Any]]:
    path = Path(run.config.flags["metrics_file"])
    return read_rows(path) if path.exists() else []


@dataclass
class Outcome:
    """Names of the runs by what became of them; a failed one with its reason."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def run_here(runs: list[SweepRun], jobs: int, console: Console) -> Outcome:
    """Train the runs on this machine, `jobs` at a time; a failed one does not stop the others.

    Interrupted (Ctrl-C, SIGTERM), the present runs are stopped, and save where their config has
    `exit_signal_handler`; the same call goes on.

    Raises:
        KeyboardInterrupt: it was interrupted.
    """
    outcome = Outcome(finished=[run.name for run in runs if is_finished(run)])
    waiting = [run for run in runs if run.name not in outcome.finished]
    active: Active = {}
    report = (_Bars if console.is_terminal else _Lines)(len(runs), outcome, console)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        report.show(active)
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                try:
                    if is_finished(run):  # by another sweep, since this one has looked
                        outcome.finished.append(run.name)
                        continue
                    active[run.name] = (run, _start(run, jobs))
                except ValueError as error:  # its directory is in use, or another run's by now
                    outcome.failed[run.name] = str(error)
                else:
                    report.started(run.name)
            time.sleep(_POLL_SECONDS)
            for name in [name for name, (_, p) in active.items() if p.poll() is not None]:
                run, process = active.pop(name)
                _finish(run, process, outcome)
                report.ended(name)
            report.show(active)
    finally:
        _stop(active)
        report.close()
        signal.signal(signal.SIGTERM, previous)
    return outcome


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _start(run: SweepRun, jobs: int) -> subprocess.Popen[bytes]:
    """Start a run in a session of its own, so that Ctrl-C reaches it through us only."""

    def claim() -> None:
        """With the directory held: another sweep may have put its config there meanwhile."""
        rundir.refuse_another_run(run.config)
        launch.write_config(run.config)

    run.config.run_dir.mkdir(parents=True, exist_ok=True)
    with (run.config.run_dir / "log.txt").open("a") as log:
        return launch.start(
            run.config, run.argv, log, runs_beside=jobs, first=claim, start_new_session=True
        )


def _finish(run: SweepRun, process: subprocess.Popen[bytes], outcome: Outcome) -> None:
    from megatron.remoe.analysis.plots import plot_curves
    from megatron.remoe.analysis.runs import Run

    log = run.config.run_dir / "log.txt"
    if process.returncode != 0:
        outcome.failed[run.name] = f"exit code {process.returncode}, see {log}{_reason(log)}"
        return
    try:
        if not is_finished(run):
            outcome.failed[run.name] = f"ended before its last step, see {log}"
            return
        plot_curves(Run.load(run.config.run_dir), run.config.run_dir / "curves.png")
    except ValueError as error:
        outcome.failed[run.name] = str(error)
        return
    outcome.finished.append(run.name)


def _reason(log: Path) -> str:
    """The last error in a log, which torchrun's own report follows."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [m[1] for line in lines if (m := re.search(r"((?:\w+Error|error): .+)", line))]
    own = [error for error in errors if not error.startswith("ChildFailedError")]
    return f": {own[-1]}" if own else ""


def _stop(active: Active) -> None:
    """Let the runs save, those that do, and end the others."""
    stops = []
    for run, process in active.values():
        stop = launch.Stop(saves=bool(run.config.flags.get("exit_signal_handler")))
        stop.requested.set()
        stops.append((stop, process))
    deadline = time.monotonic() + _SECONDS_TO_SAVE
    while time.monotonic() < deadline and any(p.poll() is None for _, p in stops):
        for stop, process in stops:
            stop.pass_on(process)
        time.sleep(_POLL_SECONDS)
    for _, process in stops:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _progress(run: SweepRun) -> tuple[int, str]:
    """Last logged step, and what it says."""
    try:
        rows = [row for row in _rows(run) if "split" not in row]
    except ValueError as error:
        return 0, str(error)
    return (rows[-1]["iteration"], launch.describe_row(rows[-1])) if rows else (0, "starting")


class _Bars:
    """A bar for the sweep, and one for each run that is going on."""

    def __init__(self, total: int, outcome: Outcome, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, console=console)
        self._progress.start()
        self._outcome = outcome
        self._whole = self._progress.add_task("runs", total=total)
        self._tasks: dict[str, TaskID] = {}

    def started(self, name: str) -> None:
        self._tasks[name] = self._progress.add_task(name, total=None)

    def ended(self, name: str) -> None:
        self._progress.remove_task(self._tasks.pop(name))
        verdict = (
            f"failed: {self._outcome.failed[name]}" if name in self._outcome.failed else "done"
        )
        self._progress.console.print(f"{name}: {verdict}", markup=False, highlight=False)

    def show(self, active: Active) -> None:
        done = len(self._outcome.finished) + len(self._outcome.failed)
        self._progress.update(self._whole, completed=done)
        for name, (run, _) in active.items():
            step, text = _progress(run)
            self._progress.update(
                self._tasks[name],
                completed=step,
                total=launch.train_iters(run.config.flags),
                description=f"{name}  {text}",
            )

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    """Lines, where there is no terminal."""

    def __init__(self, total: int, outcome: Outcome, console: Console) -> None:
        self._total, self._outcome, self._console = total, outcome, console
        self._last = time.monotonic()
        if outcome.finished:
            self._print(f"{len(outcome.finished)} of {total} runs are finished already")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def started(self, name: str) -> None:
        self._print(f"{name}: started")

    def ended(self, name: str) -> None:
        failed = self._outcome.failed
        done = len(self._outcome.finished) + len(failed)
        verdict = f"failed: {failed[name]}" if name in failed else "done"
        self._print(f"{done}/{self._total} {name}: {verdict}")

    def show(self, active: Active) -> None:
        if time.monotonic() - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = time.monotonic()
        for name, (run, _) in active.items():
            step, text = _progress(run)
            self._print(f"{name}: {step}/{launch.train_iters(run.config.flags)}  {text}")

    def close(self) -> None:
        pass


def submit(
    runs: list[SweepRun], machines: cluster.Cluster, report: Callable[[str], None]
) -> Outcome:
    """Submit every run that is neither finished nor in Slurm's queue, as a job of its own.

    Args:
        runs: loaded for these machines.
        machines: of each run.
        report: gets a line for each run.

    Raises:
        ValueError: this machine has no Slurm.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch is not installed here; run this where Slurm is, or use --jobs")
    outcome = Outcome()
    for run in runs:
        job_file = run.config.run_dir / _JOB_FILE
        if is_finished(run):
            report(f"{run.name}: finished already")
        elif job_file.exists() and _is_queued(job_file.read_text().strip()):
            report(f"{run.name}: in the queue as job {job_file.read_text().strip()}")
        else:
            launch.write_config(run.config)
            path = run.config.run_dir / "config.yaml"
            command = cluster.sbatch(path, [], machines, name=run.name)
            done = subprocess.run(
                [command[0], "--parsable", *command[1:]],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                outcome.failed[run.name] = done.stderr.strip() or f"exit code {done.returncode}"
                report(f"{run.name}: not submitted: {outcome.failed[run.name]}")
                continue
            job = done.stdout.strip().split(";")[0]
            job_file.write_text(f"{job}\n")
            report(f"{run.name}: submitted as job {job}")
        outcome.finished.append(run.name)
    return outcome


def _is_queued(job: str) -> bool:
    command = ["squeue", "--noheader", "--jobs", job]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0 and bool(done.stdout.strip())
