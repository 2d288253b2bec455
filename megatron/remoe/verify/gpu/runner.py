"""Run stages one after another within a budget of time; the failure of one ends no other."""

import contextlib
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import torch

import megatron.remoe
import remoe
from megatron.remoe import cpu
from megatron.remoe.run import examples
from megatron.remoe.verify.gpu.report import Entry, Found, Report
from megatron.remoe.verify.gpu.stages import ON_GPU, REHEARSAL, Stage, stages

# No stage is stopped sooner, so that a small budget finishes the first stages.
LEAST_SECONDS = 180.0
_LONGEST_LINE = 300
_PROGRAMS = {
    "remoe": [sys.executable, "-W", "ignore", "-m", "megatron.remoe"],
    "python": [sys.executable, "-W", "ignore"],
}


def parse_budget(text: str) -> float:
    """Return the seconds of a time such as 90s, 40m or 1.5h.

    Raises:
        ValueError: It is no such time, or zero.
    """
    parts = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    seconds = float(parts[1]) * {"s": 1, "m": 60, "h": 3600}[parts[2]] if parts else 0.0
    if seconds <= 0:
        raise ValueError(f"budget is {text}; give a time such as 90s, 40m or 1.5h")
    return seconds


def prove(
    out: Path,
    budget: float,
    golden: Path | None,
    *,
    rehearse: bool,
    without: Collection[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run all stages on the GPU, or rehearse them on the CPU.

    Args:
        out: The folder of the report and of all that is run.
        budget: Seconds for all stages together.
        golden: The folder with the published trajectories; None is that of this checkout.
        rehearse: Whether to run on the CPU, at a small size.
        without: Names of stages that are not run; the report does not have them.
        say: Called with a line when a stage begins and ends.

    Raises:
        ValueError: There is no GPU, the output folder is not empty, or the other one has no
            trajectories.
    """
    if not rehearse and not cpu.has_gpu():
        raise ValueError(
            "this machine has no GPU that torch can use; run this where there is one, or try the "
            "stages on the CPU with --rehearse"
        )
    sizes = REHEARSAL if rehearse else ON_GPU
    checkout = Path(_root()) / "tests/golden"
    if golden is None and (checkout / sizes.trajectories[0]).exists():
        golden = checkout
    for name in sizes.trajectories:
        if golden is not None and not (golden / name).exists():
            raise ValueError(f"{golden} has no {name}; pass tests/golden of a checkout as --golden")
    facts = {
        "what": "a rehearsal on the CPU, which proves nothing about a GPU" if rehearse else "GPU",
        "budget": f"{budget / 60:g} minutes",
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": f"remoe {remoe.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "directory of the commands": str(out),
    }
    chosen = [stage for stage in stages(sizes, golden) if stage.name not in without]
    return run(chosen, out, budget, facts, say, on_cpu=rehearse)


def run(
    stages: list[Stage],
    folder: Path,
    budget: float,
    facts: dict[str, str],
    say: Callable[[str], None] = lambda line: None,
    *,
    on_cpu: bool = False,
) -> Report:
    """Run the stages in order, and write the report after each of them.

    A stage may take its share of the budget, but at least three minutes, and no longer than the
    budget lasts. Its commands run in the folder, which gets a copy of the examples. Their output
    goes to `logs/` there.

    Args:
        stages: What to run.
        folder: An empty folder, or one that does not exist yet.
        budget: Seconds for all stages together.
        facts: What the report says at its top.
        say: Called with a line when a stage begins and ends.
        on_cpu: Whether to hide all GPUs from the commands.

    Raises:
        ValueError: The folder is not empty, or a file.
    """
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; delete it, or choose another folder with --out")
    for name in ("logs", "results"):
        (folder / name).mkdir(parents=True)
    examples.copy(folder / "examples")
    end = time.monotonic() + budget
    entries = [Entry(stage.name, list(stage.commands)) for stage in stages]
    report = Report(folder, facts, entries)
    report.write()
    with _stopped_by(signal.SIGTERM):
        for stage, entry in zip(stages, entries, strict=True):
            left = end - time.monotonic()
            if stage.missing or left <= 0:
                entry.status = "left out"
                entry.reason = stage.missing or "the budget is spent"
            else:
                say(f"{stage.name} ...")
                limit = min(left, max(stage.share * budget, LEAST_SECONDS))
                _run_stage(stage, entry, folder, limit, on_cpu=on_cpu)
            report.write()
            say(f"{entry.status:8} {stage.name}, {entry.seconds:.0f} s: {entry.summary}")
    return report


def _run_stage(stage: Stage, entry: Entry, folder: Path, limit: float, *, on_cpu: bool) -> None:
    """Run the commands of a stage, read their results, and note what has become of it.

    All commands run although one has failed, because benchmarks do not need each other.
    """
    started = time.monotonic()
    log = folder / "logs" / f"{stage.name.replace(' ', '_')}.txt"
    problems = []
    for line in stage.commands:
        left = limit - (time.monotonic() - started)
        code = run_command(line, folder, log, left, on_cpu=on_cpu) if left > 0 else None
        if code is None and not stage.is_open_ended:
            problems.append(f"stopped after {limit:.0f} s, in `{line}`")
            break
        if code:
            problems.append(f"`{line}` ended with exit code {code}: {_last_line(log)}")
    try:
        entry.found = stage.read(folder)
        problems += [entry.found.problem] if entry.found.problem else []
    except Exception as error:  # whatever a failed command has or has not written
        if not problems:
            problems.append(f"its result cannot be read: {type(error).__name__}: {error}")
        entry.found = Found("no result", text=_tail(log))
    entry.seconds = time.monotonic() - started
    entry.status = "failed" if problems else "passed"
    # What fails after a first problem mostly needed what that one should have made.
    more = f" (and {len(problems) - 1} more; see {log.name})" if len(problems) > 1 else ""
    entry.reason = " ".join(problems[0].split()) + more if problems else ""


def run_command(
    line: str, folder: Path, log: Path, seconds: float, *, on_cpu: bool = False
) -> int | None:
    """Run a command line, which may begin with variables (`NAME=value`), and append its output.

    Args:
        line: The words of the command, quoted as for a shell; the first one is remoe or python.
        folder: Where it runs.
        log: The file that gets its output.
        seconds: After this time it is killed, with all processes that it has started.
        on_cpu: Whether to hide all GPUs from it.

    Returns:
        Its exit code, or None if it was killed because of the time.
    """
    words, variables = shlex.split(line), {}
    while "=" in words[0]:
        name, _, variables[name] = words.pop(0).partition("=")
    words = _PROGRAMS[words[0]] + words[1:]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
    path = [variables.pop("PYTHONPATH", ""), _root(), os.environ.get("PYTHONPATH", "")]
    fixed = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "COLUMNS": "200"}
    with log.open("a") as output:
        output.write(f"$ {line}\n")
        output.flush()
        process = subprocess.Popen(
            words,
            cwd=folder,
            env=os.environ | fixed | hidden | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _root() -> str:
    """Return the folder from which this package is imported, since commands run elsewhere."""
    return str(Path(megatron.remoe.__file__).resolve().parents[2])


@contextlib.contextmanager
def _stopped_by(number: signal.Signals) -> Iterator[None]:
    """End this process orderly by a signal, so that the command that is running ends with it."""

    def stop(*_: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(number, stop)
    try:
        yield
    finally:
        signal.signal(number, before)


def _tail(log: Path, count: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])


def _last_line(log: Path) -> str:
    written = [line for line in _tail(log).splitlines() if line.strip()]
    return written[-1].strip()[:_LONGEST_LINE] if written else ""
