"""Sweeps: what is checked before anything starts, and how runs are started, resumed, reported."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from megatron.remoe.run import rundir, sweep_jobs, torchrun
from megatron.remoe.run.config import RunConfig
from megatron.remoe.run.sweep import SweepRun
from tests.mcore import tiny

pytestmark = pytest.mark.processes


def write_sweep(folder: Path, **keys) -> Path:
    tiny.write_config(folder / "tiny.yaml")
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump({"base": "tiny.yaml"} | keys, sort_keys=False))
    return path


def described(path: Path, only: str | None = None) -> dict[str, tuple[str, dict]]:
    """Directory and flags of every run by name, or the mistake."""
    from megatron.remoe.run.sweep import load_sweep

    with contextlib.chdir(path.parent):
        runs = load_sweep(Path(path.name), only=only)
    return {run.name: (str(run.config.run_dir), run.config.flags) for run in runs}


def test_a_list_and_a_grid_make_every_combination(call, tmp_path):
    path = write_sweep(
        tmp_path,
        train_iters=7,
        sweep={
            "list": {"dense": {"num_experts": None}, "remoe": None},
            "grid": {"seed": [1, 2], "lr": [0.001]},
        },
    )
    runs = call(described, path)
    names = ["dense-seed=1-lr=0.001", "dense-seed=2-lr=0.001"]
    names += ["remoe-seed=1-lr=0.001", "remoe-seed=2-lr=0.001"]
    assert list(runs) == names
    for name, (run_dir, flags) in runs.items():
        assert run_dir == f"runs/sweep/{name}"
        assert flags["metrics_file"] == f"runs/sweep/{name}/metrics.jsonl"
        assert flags["train_iters"] == 7 and flags["swiglu"] is True
        assert flags.get("num_experts") == (4 if "remoe" in name else None)
    assert runs[names[3]][1]["seed"] == 2
    assert list(call(described, path, "remoe-*")) == names[2:]
    assert list(call(described, path, "seed=1")) == names[::2]
    assert not (tmp_path / "runs").exists()


def test_everything_that_is_wrong_is_named_before_anything_starts(call, tmp_path):
    """A misspelt flag, an impossible combination and a missing base, all three at once."""
    path = write_sweep(
        tmp_path,
        base=["tiny.yaml", "nowhere.yaml"],
        moe_relu_l1_reg_coef_init=1e-8,
        sweep={"grid": {"moe_router_topk": [1, 8], "seed": [1, 2]}},
    )
    code, out, error = call(tiny.remoe, tmp_path, "sweep", "sweep.yaml")
    assert (code, out) == (2, "")
    assert error.splitlines() == [
        "error: sweep.yaml: nothing was started",
        "  base nowhere.yaml does not exist; correct the path",
        "  unknown config key 'moe_relu_l1_reg_coef_init'; did you mean "
        "'moe_relu_l1_reg_coeff_init'? (in moe_router_topk=1-seed=1, moe_router_topk=1-seed=2, "
        "moe_router_topk=8-seed=1 and 1 more)",
        "  topk is 8 of 4 experts (topk 8, num_experts 4, granularity 1); choose topk between 1 "
        "and num_experts (in moe_router_topk=8-seed=1, moe_router_topk=8-seed=2)",
    ]
    assert sorted(p.name for p in path.parent.iterdir()) == ["sweep.yaml", "tiny.yaml"]


def test_a_sweep_is_described_by_a_row_for_each_run_and_one_for_all(call, tmp_path):
    write_sweep(tmp_path, sweep={"list": {"a": {"train_iters": 10}, "b": {"train_iters": 30}}})
    argv = ["describe", "sweep.yaml", "--gpus-per-node", "1", "--tokens-per-second", "8"]
    code, out, error = call(tiny.remoe, tmp_path, *argv, "padded_vocab_size=128")
    assert code == 2 and "'padded_vocab_size=128' is given with a sweep" in error
    tiny.write_config(tmp_path / "tiny.yaml", padded_vocab_size=128)
    code, out, error = call(tiny.remoe, tmp_path, *argv)
    assert code == 0, error
    rows = [line.strip("│").split("│") for line in out.splitlines() if line.startswith("│")]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert list(cells) == ["a", "b", "2 runs"] and "hours" in out
    # 8 sequences of 32 tokens in every step
    assert [cells[name][-1] for name in cells] == ["0.09", "0.27", "0.36"]
    flops = [float(cells[name][3]) for name in cells]
    assert flops[1] == pytest.approx(3 * flops[0], rel=0.01)
    assert flops[2] == pytest.approx(4 * flops[0], rel=0.01)
    assert not (tmp_path / "runs").exists()


MISTAKES = {
    "no sweep": ({}, "sweep must have the keys list or grid"),
    "a value": ({"sweep": {"grid": {"seed": 1}}}, "grid must map seed to a list of values"),
    "no mapping": ({"sweep": {"list": {"a": 3}}}, "the flags of 'a' are 3; write a mapping"),
    "two of a name": ({"sweep": {"grid": {"seed": [1, 1]}}}, "two runs would be named seed=1"),
    "megatron": (
        {"sweep": {"list": {"a": {"hidden_size": 33}, "b": {}}}},
        "Megatron requires hidden_size % num_attention_heads == 0 (hidden_size is 33, "
        "num_attention_heads is 2; change one of them) (in a)",
    ),
}


@pytest.mark.parametrize(("keys", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_exits_with_2(call, tmp_path, keys, message):
    write_sweep(tmp_path, **keys)
    code, _, error = call(tiny.remoe, tmp_path, "sweep", "sweep.yaml")
    assert code == 2 and message in error and "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_a_pattern_without_a_match_lists_the_names(call, tmp_path):
    write_sweep(tmp_path, sweep={"grid": {"seed": [1, 2]}})
    code, _, error = call(tiny.remoe, tmp_path, "sweep", "sweep.yaml", "--only", "x*")
    assert code == 2 and "no run of sweep.yaml matches 'x*'; it has seed=1, seed=2" in error


# The scheduling, with scripts in the place of training.

STEPS = 3
ROWS = "".join(json.dumps({"iteration": i, "lm_loss": 1.0}) + "\n" for i in range(1, STEPS + 1))
LAST = json.dumps({"iteration": STEPS, "split": "valid", "lm_loss": 1.0}) + "\n"


def fake_run(folder: Path, name: str) -> SweepRun:
    run_dir = folder / name
    flags = {"train_iters": STEPS, "metrics_file": str(run_dir / "metrics.jsonl")}
    return SweepRun(name, RunConfig(run_dir, 1, flags), [name], Namespace())


def scripts(monkeypatch, folder: Path, bodies: dict[str, str]) -> None:
    """Make a run's command a script, which finds its metrics file as `out`."""

    def command(argv, nproc):
        out = folder / argv[0] / "metrics.jsonl"
        return [sys.executable, "-c", f"out = open({str(out)!r}, 'a')\n{bodies[argv[0]]}"]

    monkeypatch.setattr(torchrun, "command", command)


def sweep(runs, jobs=1):
    console = Console(file=io.StringIO(), width=200)
    outcome = sweep_jobs.run_here(runs, jobs, console)
    return outcome, console.file.getvalue().splitlines()


GOOD = f"out.write({ROWS + LAST!r})"


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failed_run_is_reported_and_the_others_go_on(monkeypatch, tmp_path, jobs):
    scripts(monkeypatch, tmp_path, {"a": "raise ValueError('no luck')", "b": GOOD, "c": GOOD})
    runs = [fake_run(tmp_path, name) for name in "abc"]
    outcome, lines = sweep(runs, jobs)
    assert sorted(outcome.finished) == ["b", "c"]
    log = tmp_path / "a/log.txt"
    assert outcome.failed == {"a": f"exit code 1, see {log}: ValueError: no luck"}
    assert lines.count("b: started") == 1 and lines[-1].startswith("3/3 ")
    assert sum("a: failed: exit code 1" in line for line in lines) == 1
    assert (tmp_path / "b/curves.png").is_file() and (tmp_path / "b/config.yaml").is_file()


def test_finished_runs_are_left_and_unfinished_ones_go_on(monkeypatch, tmp_path):
    half = f"out.write({ROWS.splitlines(keepends=True)[0]!r})\nraise SystemExit(1)"
    runs = [fake_run(tmp_path, name) for name in "abc"]
    scripts(monkeypatch, tmp_path, {"a": GOOD, "b": half, "c": f"out.write({ROWS!r})"})
    outcome, _ = sweep(runs)
    assert outcome.finished == ["a"] and set(outcome.failed) == {"b", "c"}
    assert "ended before its last step" in outcome.failed["c"]  # the validation is missing
    before = (tmp_path / "a/metrics.jsonl").stat().st_mtime_ns
    scripts(monkeypatch, tmp_path, {"a": "raise SystemExit(9)", "b": GOOD, "c": GOOD})
    outcome, lines = sweep(runs)
    assert sorted(outcome.finished) == ["a", "b", "c"] and outcome.failed == {}
    assert lines[0] == "1 of 3 runs are finished already" and "a: started" not in lines
    assert (tmp_path / "a/metrics.jsonl").stat().st_mtime_ns == before


def test_a_run_whose_metrics_are_damaged_fails_alone(monkeypatch, tmp_path):
    scripts(monkeypatch, tmp_path, {"a": f"out.write('{{\\n')\n{GOOD}", "b": GOOD})
    outcome, _ = sweep([fake_run(tmp_path, name) for name in "ab"])
    assert outcome.finished == ["b"]
    assert "a/metrics.jsonl, line 1: it is not JSON" in outcome.failed["a"]
    with pytest.raises(ValueError, match="a/metrics.jsonl, line 1: it is not JSON"):
        sweep([fake_run(tmp_path, "a")])


def test_a_run_is_finished_when_its_last_logged_step_is_there(tmp_path):
    run = fake_run(tmp_path, "a")
    run.config.flags.update(log_interval=2, eval_iters=0)
    run.config.run_dir.mkdir()
    metrics = run.config.run_dir / "metrics.jsonl"
    metrics.write_text(json.dumps({"iteration": 1, "lm_loss": 1.0}) + "\n")
    assert not sweep_jobs.is_finished(run)
    metrics.write_text(json.dumps({"iteration": 2, "lm_loss": 1.0}) + "\n")
    assert sweep_jobs.is_finished(run)


def test_an_interrupted_sweep_stops_its_runs(monkeypatch, tmp_path):
    slow = "import time\nopen('started', 'w')\ntime.sleep(60)"
    monkeypatch.chdir(tmp_path)
    scripts(monkeypatch, tmp_path, {"a": slow})
    processes = []
    popen = subprocess.Popen

    def remember(*args, **kwargs):
        processes.append(popen(*args, **kwargs))
        return processes[-1]

    def interrupt(seconds):
        if (tmp_path / "started").exists():
            (tmp_path / "started").unlink()
            os.kill(os.getpid(), signal.SIGTERM)
        sleep(seconds)

    sleep = time.sleep
    monkeypatch.setattr(sweep_jobs.subprocess, "Popen", remember)
    monkeypatch.setattr(sweep_jobs.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sweep([fake_run(tmp_path, "a")])
    assert [p.returncode for p in processes] == [-signal.SIGKILL]  # it does not save


def test_two_sweeps_of_one_folder_start_a_run_once(monkeypatch, tmp_path):
    """What the other trains is reported, what it has finished is left, and its config stays."""
    runs = [fake_run(tmp_path, name) for name in "ab"]
    other = fake_run(tmp_path, "a")
    other.config.flags["lr"] = 0.5
    rundir.write(other.config)
    before = (tmp_path / "a/config.yaml").read_text()
    other_starts = f"out.write({ROWS + LAST!r})"
    scripts(monkeypatch, tmp_path, {"a": other_starts, "b": GOOD})

    def start(run, jobs):
        """While this sweep is at its first run, the other one finishes the second."""
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b/metrics.jsonl").write_text(ROWS + LAST)
        return start_(run, jobs)

    start_ = sweep_jobs._start
    monkeypatch.setattr(sweep_jobs, "_start", start)
    lock = rundir.hold(tmp_path / "a")
    outcome, lines = sweep(runs)
    os.close(lock)
    assert list(outcome.failed) == ["a"] and "is in use by a run (process" in outcome.failed["a"]
    assert outcome.finished == ["b"] and "b: started" not in lines
    assert (tmp_path / "a/config.yaml").read_text() == before
    outcome, _ = sweep(runs[:1])  # the other has ended, and its config is another
    assert "holds a run that differs in lr" in outcome.failed["a"]
    assert (tmp_path / "a/config.yaml").read_text() == before


# A sweep whose runs are the real agent with a script that waits in the place of training.
SWEEP = """
import sys
from argparse import Namespace
from pathlib import Path
from rich.console import Console
from megatron.remoe.run import rundir, sweep_jobs, torchrun
from megatron.remoe.run.config import RunConfig
from megatron.remoe.run.sweep import SweepRun
import typer

def command(argv, nproc):
    agent = ["-m", "megatron.remoe.agent", "--standalone", "--nproc-per-node=1"]
    return [sys.executable, "-W", "ignore", *agent, "waits.py", *argv]

def sweep():
    torchrun.command = command
    flags = {"train_iters": 3, "metrics_file": "a/metrics.jsonl"}
    run = SweepRun("a", RunConfig(Path("a"), 1, flags), ["a"], Namespace())
    try:
        sweep_jobs.run_here([run], 1, Console())
    except KeyboardInterrupt:
        raise typer.Exit(130) from None

typer.run(sweep)
"""
WAITS = """
import os, time
from pathlib import Path
from megatron.remoe import processes
processes.end_with_parent()  # as every rank
Path("rank.tmp").write_text(f"{os.getpid()} {os.getppid()}")
os.replace("rank.tmp", "rank")
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_run_outlives_its_sweep(tmp_path, number):
    """Killed, or interrupted by Ctrl-C, which reaches the whole process group."""
    (tmp_path / "sweep.py").write_text(SWEEP)
    (tmp_path / "waits.py").write_text(WAITS)
    process = subprocess.Popen(
        [sys.executable, "sweep.py"],
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until((tmp_path / "rank").exists)
    pids = (tmp_path / "rank").read_text().split()
    os.killpg(process.pid, number)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in text
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    os.close(rundir.hold(tmp_path / "a"))  # nobody holds the directory


def wait_until(is_true) -> None:
    deadline = time.monotonic() + 120
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


SLURM = {
    "sbatch": 'echo "$@" >> calls.txt; echo "4$(wc -l < calls.txt);cluster"',
    "squeue": '[[ $3 == 41 ]] && echo "41 running"',
}


def test_slurm_gets_a_job_for_each_run_that_is_not_there(call, monkeypatch, tmp_path):
    write_sweep(tmp_path, sweep={"list": {"a": {}, "b": {}, "c": {}}})
    for name, body in SLURM.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    finished = tmp_path / "runs/sweep/a/metrics.jsonl"
    finished.parent.mkdir(parents=True)
    last = {"iteration": tiny.CONFIG["train_iters"], "split": "valid", "lm_loss": 1.0}
    finished.write_text(json.dumps(last) + "\n")
    argv = ["sweep", "sweep.yaml", "--slurm", "--gpus-per-node", "4"]
    first, second = (call(with_path, tmp_path, *argv) for _ in range(2))
    end = "3 of 3 runs are in\n"
    assert first == (
        0, f"a: finished already\nb: submitted as job 41\nc: submitted as job 42\n{end}", "",
    )  # fmt: skip
    assert second == (
        0, f"a: finished already\nb: in the queue as job 41\nc: submitted as job 43\n{end}", "",
    )  # fmt: skip
    submitted = (tmp_path / "calls.txt").read_text().splitlines()[0]
    assert submitted.startswith("--parsable --job-name=b --nodes=1 --gpus-per-node=4 --export=ALL,")
    assert submitted.endswith("run/pretrain.sbatch runs/sweep/b/config.yaml")
    written = yaml.safe_load((tmp_path / "runs/sweep/b/config.yaml").read_text())
    assert written["exit_signal"] == "SIGUSR1" and written["nproc"] == 4


def with_path(folder: Path, *argv: str):
    """The `remoe` command, with the folder's programs first on the PATH."""
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{folder}:{before}"
    try:
        return tiny.remoe(folder, *argv)
    finally:
        os.environ["PATH"] = before


def names_of(path: Path) -> list[str]:
    """The runs of an example, without its data."""
    from megatron.remoe.run import plan, sweep

    with pytest.MonkeyPatch.context() as patch:
        check = plan.check
        patch.setattr(plan, "check", lambda argv, nproc, paths: check(argv, nproc, paths=False))
        return [run.name for run in sweep.load_sweep(path)]


def test_the_routers_example_is_four_routers_with_three_seeds(call):
    path = tiny.EXAMPLES / "ablations/routers.yaml"
    routers = ("dense", "topk", "topk_warmup", "remoe")
    assert call(names_of, path) == [f"{r}-seed={seed}" for r in routers for seed in (1, 2, 3)]


def test_the_recurrence_example_is_seven_routers_at_two_depths_with_three_seeds(call):
    path = tiny.EXAMPLES / "ablations/recurrence.yaml"
    names = call(names_of, path)
    assert len(names) == len(set(names)) == 7 * 2 * 3
    assert "remoe_gru-num_layers=8-seed=3" in names


def test_the_family_example_is_every_causal_router_with_three_seeds(call):
    from remoe.config import ROUTINGS

    path = tiny.EXAMPLES / "ablations/family.yaml"
    assert len(call(names_of, path)) == 16 * 3
    runs = yaml.safe_load(path.read_text())["sweep"]["list"].values()
    causal = {name for name, routing in ROUTINGS.items() if routing.causal}
    assert {run["moe_routing"] for run in runs if "moe_routing" in run} == causal
    path = tiny.EXAMPLES / "ablations/family_long.yaml"
    assert len(call(names_of, path)) == 8 * 3
