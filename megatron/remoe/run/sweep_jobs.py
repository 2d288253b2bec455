"""Run a sweep: several runs at a time here, or one Slurm job each. Finished runs are left alone."""

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

from megatron.remoe.analysis.runs import read_rows
from megatron.remoe.run import cluster, launch, rundir
from megatron.remoe.run.launch import POLL_SECONDS
from megatron.remoe.run.plan import Place, train_iters
from megatron.remoe.run.progress import Display, describe_row
from megatron.remoe.run.sweep import SweepRun
from megatron.remoe.run.torchrun import Stop

_SECONDS_BETWEEN_LINES = 30  # about a run, where the output is no terminal
_SECONDS_TO_SAVE = 60
_JOB_FILE = "slurm_job"

Active = dict[str, tuple[SweepRun, subprocess.Popen[bytes]]]  # the runs that are going on, by name


def is_finished(run: SweepRun) -> bool:
    """Return whether the last step that is logged is there, and the validation after it.

    Raises:
        ValueError: A line of the metrics is damaged.
    """
    flags = run.config.flags
    steps = train_iters(flags)
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
    """Names of the runs by what became of them.

    Attributes:
        finished: The runs that are done, or in Slurm's queue.
        failed: The other runs, each with its reason.
    """

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of runs that have ended."""
        return len(self.finished) + len(self.failed)


def run_here(runs: list[SweepRun], jobs: int, console: Console) -> Outcome:
    """Train the runs on this machine, `jobs` at a time; a failed one does not stop the others.

    On Ctrl-C or SIGTERM the present runs are stopped, and those whose config has
    `exit_signal_handler` save. The same call then continues.

    Raises:
        KeyboardInterrupt: The sweep was interrupted.
    """
    outcome = Outcome(finished=[run.name for run in runs if is_finished(run)])
    waiting = [run for run in runs if run.name not in outcome.finished]
    active: Active = {}
    report = _Report(len(runs), outcome, console)
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        report.show(active)
        while waiting or active:
            while waiting and len(active) < jobs:
                run = waiting.pop(0)
                try:
                    if is_finished(run):  # Another sweep has finished it meanwhile.
                        outcome.finished.append(run.name)
                        continue
                    active[run.name] = (run, _start(run, jobs))
                except ValueError as error:  # Its directory is in use, or another run's by now.
                    outcome.failed[run.name] = str(error)
                else:
                    report.started(run.name)
            time.sleep(POLL_SECONDS)
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
    """Start a run in a session of its own, so that Ctrl-C only reaches it through this process."""

    def claim() -> None:
        """Check again with the directory held: another sweep may have written its config."""
        rundir.refuse_another_run(run.config)
        rundir.write(run.config)

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
    """Return the last error in a log before torchrun's own report."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [m[1] for line in lines if (m := re.search(r"((?:\w+Error|error): .+)", line))]
    own = [error for error in errors if not error.startswith("ChildFailedError")]
    return f": {own[-1]}" if own else ""


def _stop(active: Active) -> None:
    """Let the runs save that do so, and end the others."""
    stops = [(Stop(requested=True), run, process) for run, process in active.values()]
    deadline = time.monotonic() + _SECONDS_TO_SAVE
    while time.monotonic() < deadline and any(p.poll() is None for _, _, p in stops):
        for stop, run, process in stops:
            stop.pass_on(process, run.config.flags)
        time.sleep(POLL_SECONDS)
    for _, _, process in stops:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _progress(run: SweepRun) -> tuple[int, str]:
    """Return the last logged step, and what it says."""
    try:
        rows = [row for row in _rows(run) if "split" not in row]
    except ValueError as error:
        return 0, str(error)
    return (rows[-1]["iteration"], describe_row(rows[-1])) if rows else (0, "starting")


class _Report:
    """What a sweep tells while it is going on.

    Args:
        total: Number of runs.
        outcome: The runs that have ended, to which the sweep adds.
        console: The console to write to.
    """

    def __init__(self, total: int, outcome: Outcome, console: Console) -> None:
        self._total, self._outcome = total, outcome
        self._display = Display(console, _SECONDS_BETWEEN_LINES)
        self._display.begin("runs", "runs", total)
        if outcome.finished:
            self._display.say(f"{len(outcome.finished)} of {total} runs are finished already")
        self.close = self._display.close

    def started(self, name: str) -> None:
        self._display.begin(name, name)
        self._display.say(f"{name}: started")

    def ended(self, name: str) -> None:
        self._display.end(name)
        failed = self._outcome.failed
        verdict = f"failed: {failed[name]}" if name in failed else "done"
        self._display.say(f"{self._outcome.count}/{self._total} {name}: {verdict}")

    def show(self, active: Active) -> None:
        if self._display.has_bars:
            self._display.show("runs", self._outcome.count, self._total, "")
        for name, (run, _) in active.items():
            step, text = _progress(run)
            self._display.show(name, step, train_iters(run.config.flags), text)


def submit(runs: list[SweepRun], place: Place, report: Callable[[str], None]) -> Outcome:
    """Submit every run that is neither finished nor in Slurm's queue, as a job of its own.

    Args:
        runs: The runs, loaded for this place.
        place: The machines of each run.
        report: Called with a line for each run.

    Raises:
        ValueError: This machine has no Slurm.
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
            rundir.write(run.config)
            path = run.config.run_dir / "config.yaml"
            command = cluster.sbatch(path, [], place, name=run.name)
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
