"""Faults of a run, made with real processes and real signals; see docs/reliability.md."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest

from megatron.remoe import checkpoint, processes
from tests.mcore import tiny

STEPS = 8
FLAGS = {
    "train_iters": STEPS,
    "save_interval": 2,
    "eval_iters": 1,
    "eval_interval": 4,
    "moe_relu_l1_reg_coeff_init": 0.01,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
}
NOBODY_ELSE = pytest.mark.skipif(sys.platform != "linux", reason="death signals are Linux's")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def start(home, call):
    """Return a function that starts a run with a fault, and returns its process and its marker."""
    started = []

    def start(run: str, *, nproc: int = 1, fault: str | None = None, **changes):
        argv = call(argv_of, home, run, nproc, FLAGS | changes)
        module = "tests.mcore.faulty" if fault else "megatron.remoe.pretrain"
        launcher = ["-m", "megatron.remoe.agent", "--standalone", f"--nproc-per-node={nproc}"]
        launcher += ["--signals-to-handle=SIGINT"]
        command = [sys.executable, "-W", "ignore", *(launcher if nproc > 1 else []), "-m", module]
        marker = uuid.uuid4().hex
        environment = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": "", "FAULT": str(fault)}
        environment |= {"OMP_NUM_THREADS": "1", "FAULT_MARKER": marker}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        if nproc == 1:
            environment |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        log = (home / run / "log.txt").open("a")
        process = subprocess.Popen(
            [*command, *argv], cwd=home, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        log.close()
        started.append(process)
        return process, marker

    yield start
    for process in started:
        process.kill()


def argv_of(home: Path, run: str, nproc: int, flags: dict) -> list[str]:
    import contextlib

    from megatron.remoe.run import launch
    from megatron.remoe.run.config import load_config

    path = tiny.write_config(home / f"{run}.yaml", run_dir=run, nproc=nproc, **flags)
    with contextlib.chdir(home):
        return launch.prepare(load_config(path), force=True).argv


def alive(marker: str) -> list[int]:
    """Return the processes that have this marker in their environment, and their children."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_zombie = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if marker.encode() in (folder / "environ").read_bytes() and not is_zombie:
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def wait_for(condition, seconds: float = 90):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    return value


def log(home: Path, run: str) -> str:
    return (home / run / "log.txt").read_text(errors="replace")


def finish(process, home: Path, run: str) -> None:
    assert process.wait(120) == 0, log(home, run)[-3000:]


def iterations(home: Path, run: str) -> list[int]:
    if not (home / run / "metrics.jsonl").exists():
        return []
    return [row["iteration"] for row in tiny.rows(home / run) if "split" not in row]


def trajectory(home: Path, run: str) -> list[dict]:
    varies = ("tokens_per_second", "peak_memory")
    return [{k: v for k, v in r.items() if k not in varies} for r in tiny.rows(home / run)]


@pytest.fixture(scope="module")
def whole(home, start) -> Path:
    """Make a run without a fault."""
    finish(start("whole")[0], home, "whole")
    return home / "whole"


def copy_of(whole: Path, run: str, *, until: int = STEPS) -> Path:
    """Copy the run and delete its checkpoints after an iteration; its metrics are longer."""
    copy = whole.parent / run
    shutil.copytree(whole, copy)
    for found in checkpoint.find(copy / "checkpoints"):
        if found.iteration > until:
            shutil.rmtree(found.path)
    checkpoint.write_tracker(copy / "checkpoints", until)
    return copy


def test_a_resumed_run_with_dropout_is_equal_bit_for_bit(home, start, whole):
    """Data loaders, which are made after the random state is loaded, do not advance it."""
    copy_of(whole, "dropout", until=4)
    finish(start("dropout")[0], home, "dropout")
    assert trajectory(home, "dropout") == trajectory(home, "whole")


def test_a_kill_in_an_asynchronous_save_costs_the_steps_after_the_last_one(home, start, whole):
    folder = copy_of(whole, "killed", until=2) / "checkpoints"
    process, marker = start("killed", fault="slow-writer", async_save=True, save_interval=4)
    # Training continues while the writer waits: rows of later steps appear, but no checkpoint.
    wait_for(lambda: len(folder_names(folder)) > 1 and iterations(home, "killed")[-1] > 4)
    assert folder_names(folder) == {"iter_0000002", "iter_0000004"}
    assert checkpoint.tracked(folder) == 2
    assert [c.is_complete for c in checkpoint.find(folder)] == [True, False]
    writers = processes.children(process.pid)
    assert writers
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not alive(marker), 5)
    assert checkpoint.tracked(folder) == 2
    finish(start("killed")[0], home, "killed")
    assert trajectory(home, "killed") == trajectory(home, "whole")
    assert checkpoint.tracked(folder) == STEPS


def folder_names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("iter_*")}


def test_damaged_checkpoints_are_named_and_the_last_good_one_is_used(home, start, whole):
    folder = copy_of(whole, "damaged") / "checkpoints"
    flipped, cut = folder / "iter_0000008/__0_0.distcp", folder / "iter_0000006/__0_0.distcp"
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    os.truncate(cut, cut.stat().st_size // 2)
    finish(start("damaged")[0], home, "damaged")
    output = log(home, "damaged")
    for name in ("iter_0000008", "iter_0000006"):
        assert (
            f"remoe: warning: checkpoint damaged/checkpoints/{name} is damaged: __0_0.distcp has "
            f"changed since it was written" in output
        )
    assert "remoe: warning: continuing from iteration 4 instead" in output
    assert trajectory(home, "damaged") == trajectory(home, "whole")
    assert not any(found.damage for found in checkpoint.find(folder))


def test_a_full_disk_leaves_the_earlier_checkpoint(home, start, whole):
    folder = home / "full/checkpoints"
    folder.mkdir(parents=True)
    size = checkpoint.find(whole / "checkpoints")[0].size
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size)}", "tmpfs", folder],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        pytest.skip(f"needs a small tmpfs: {mounted.stderr.strip()}")
    try:
        process, marker = start("full")
        assert process.wait(120) != 0
        wait_for(lambda: not alive(marker), 5)
        chosen = checkpoint.choose(folder, need_manifest=True)
        assert chosen.iteration == 4 and not chosen.damage
        lines = log(home, "full").splitlines()
        hint = "remoe: error: full/checkpoints has 0."
        needed = f"MB left, and a checkpoint has {size / 1e6:.1f}"
        assert any(x.startswith(hint) and needed in x for x in lines)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def diverged(home, start):
    """Return exit codes of runs whose loss becomes NaN, or inf in a step that is repeated."""
    runs = {"nan": "disabled", "inf": "validate_results"}
    started = {
        fault: start(fault, fault=fault, rerun_mode=mode, save_interval=1)
        for fault, mode in runs.items()
    }
    return {run: process.wait(120) for run, (process, _) in started.items()}


def test_nan_stops_the_run_with_a_clear_message(diverged, home):
    assert diverged["nan"] == 1
    last = iterations(home, "nan")[-1]
    line = next(x for x in log(home, "nan").splitlines() if x.startswith("remoe: error: "))
    assert "Unexpected result nan (message='the loss is nan, the step is not taken; " in line
    assert checkpoint.tracked(home / "nan/checkpoints") == last == 2


def test_a_step_whose_loss_is_inf_moves_the_coefficient_at_most_once(diverged, home, call):
    assert diverged["inf"] == 16  # Megatron wants to repeat the step elsewhere
    folder = home / "inf/checkpoints"
    row = [r for r in tiny.rows(home / "inf") if "split" not in r][-1]
    assert checkpoint.tracked(folder) == row["iteration"]
    up = np.float32(row["l1_coeff"]) * np.float32(1.2)
    down = np.float32(row["l1_coeff"]) / np.float32(1.2)
    saved = call(coefficients, folder / f"iter_{row['iteration']:07d}")
    assert set(saved) == {float(up if row["sparsity"] < 0.75 else down)}


def coefficients(path: Path) -> list[float]:
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load_plain_tensors(str(path))
    return [x for k, v in state.items() if k.endswith("l1_coeff") for x in v.flatten().tolist()]


@NOBODY_ELSE
def test_when_one_rank_hangs_all_end(home, start):
    """With the exit-signal handler on, which hung rank and data loaders have for SIGTERM.

    The other rank fails by its timeout. Ranks that raise or die are in `test_processes`.
    """
    flags = {"expert_model_parallel_size": 2, "num_workers": 1, "train_iters": 10**4}
    flags |= {"distributed_timeout_seconds_after_init": 5, "eval_interval": 10**4}
    flags |= {"moe_token_dispatcher_type": "alltoall", "save_interval": 10**4}
    process, marker = start("hang", nproc=2, fault="hang", **flags)
    wait_for(lambda: iterations(home, "hang"))
    assert process.wait(90) == 1  # after 5 seconds, and the 30 that torchrun gives a deaf rank
    wait_for(lambda: not alive(marker), 10)
    assert "remoe: error: rank 0: RuntimeError: " in log(home, "hang")


@NOBODY_ELSE
def test_a_run_can_be_stopped_by_sigterm_and_refuses_a_second_one(home, call):
    changes = {"train_iters": 10**5, "save_interval": 10**5, "eval_interval": 10**5}
    tiny.write_config(home / "long.yaml", run_dir="long", **(FLAGS | changes))
    first = tiny.start("train", "long.yaml", cwd=home)
    wait_for(lambda: iterations(home, "long"))
    code, _, error = call(tiny.remoe, home, "train", "long.yaml")
    assert code == 2
    assert error.startswith("error: long is in use by a run (process ")
    first.send_signal(signal.SIGTERM)
    out, error = first.communicate(timeout=60)
    assert first.returncode == 0, out + error
    assert "stopped by SIGTERM after a checkpoint; the same command continues\n" in out
    last = iterations(home, "long")[-1]
    assert checkpoint.tracked(home / "long/checkpoints") == last
    assert checkpoint.choose(home / "long/checkpoints", need_manifest=True).iteration == last
