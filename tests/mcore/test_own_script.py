"""Somebody's own Megatron script becomes ReMoE with the diff that docs/own_script.md shows."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.remoe import checkpoint

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "own_script"
STEPS, STOP = 4, 3
FLAGS = f"""
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4
    --num-experts 4 --moe-router-topk 1 --moe-router-pre-softmax --seq-length 32
    --max-position-embeddings 32 --position-embedding-type rope --swiglu --normalization RMSNorm
    --disable-bias-linear --untie-embeddings-and-output-weights --micro-batch-size 2
    --global-batch-size 4 --train-iters {STEPS} --lr 1e-3 --eval-iters 0 --eval-interval 100
    --mock-data --split 90,8,2 --tokenizer-type NullTokenizer --vocab-size 127 --num-workers 0
    --log-interval 1 --moe-token-dispatcher-type alltoall --metrics-file metrics.jsonl
    --save checkpoints --load checkpoints --save-interval 1 --save-keep-last 2 --verify-integrity
""".split()
# A script's own arguments: what a checkout of Megatron-LM with ModelOpt adds to the parser.
OWN_ARGUMENTS = """
def add_modelopt_args(parser):
    parser.add_argument("--modelopt-enabled", action="store_true")
    return parser
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The patched script, beside a module that has arguments of its own."""
    folder = tmp_path_factory.mktemp("own_script")
    shutil.copy(FOLDER / "pretrain_gpt.py", folder)
    patch(folder)
    own = folder / "path/megatron/post_training"
    own.mkdir(parents=True)
    (own / "arguments.py").write_text(OWN_ARGUMENTS)
    return folder


def patch(folder: Path, script: str = "pretrain_gpt.py") -> None:
    diff = (FOLDER / "remoe.diff").read_text()
    command = ["patch", "--fuzz=0", script]
    subprocess.run(command, input=diff, cwd=folder, text=True, check=True)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def start(folder: Path, *command: str, **variables: str) -> subprocess.Popen:
    """Python in the folder, with the Megatron of these tests, which `PYTHONPATH` may name."""
    paths = [str(folder / "path"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment |= {"PYTHONPATH": ":".join(filter(None, paths)), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder: Path, *flags: str, program: tuple[str, ...] = ("pretrain_gpt.py",)):
    process = start(folder, *TORCHRUN, *program, *FLAGS, *flags)
    out, error = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def first(folder):
    """Metrics and checkpoints of a run that stops early."""
    done = run(folder, "--moe-relu-routing", "--exit-interval", str(STOP))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return rows(folder), iterations(folder)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """Metrics and checkpoints of a script for hybrid models, with the same diff.

    It differs from the script for GPT models as `pretrain_hybrid.py` of Megatron-LM does.
    """
    folder = tmp_path_factory.mktemp("hybrid")
    script = (FOLDER / "pretrain_gpt.py").read_text()
    renamed = script.replace("gpt_config_from_args", "hybrid_config_from_args")
    assert renamed.count("hybrid_config_from_args") == 2
    (folder / "pretrain_hybrid.py").write_text(renamed)
    patch(folder, "pretrain_hybrid.py")
    flags = ("--moe-relu-routing", "--hybrid-layer-pattern", "*E*E", "--exit-interval", str(STOP))
    done = run(folder, *flags, program=("pretrain_hybrid.py",))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return rows(folder), iterations(folder)


def iterations(folder: Path) -> list[int]:
    return [found.iteration for found in checkpoint.find(folder / "checkpoints")]


@pytest.fixture(scope="module")
def forgotten(folder, first):
    """The same script, and our entry point, without the flag; also with the script's own flag."""
    entry = ("-m", "megatron.remoe.pretrain")
    return run(folder, "--modelopt-enabled"), run(folder), run(folder, program=entry)


@pytest.fixture(scope="module")
def second(folder, first, forgotten):
    """The run goes on after its last checkpoint was damaged: metrics, checkpoints, log."""
    file = folder / f"checkpoints/iter_{STOP:07d}/__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = run(folder, "--moe-relu-routing")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return rows(folder), iterations(folder), done.stdout


def test_at_most_ten_lines_are_added():
    diff = (FOLDER / "remoe.diff").read_text().splitlines()
    added = [line for line in diff if line.startswith("+") and not line.startswith("+++")]
    assert 0 < len(added) <= 10


def test_the_page_shows_the_diff():
    diff = (FOLDER / "remoe.diff").read_text()
    assert f"```diff\n{diff}```" in (ROOT / "docs/own_script.md").read_text()


def test_the_script_itself_knows_nothing_of_remoe():
    code = (FOLDER / "pretrain_gpt.py").read_text().split('"""', 2)[2]
    assert "remoe" not in code


# Where the lines that the diff touches are: "import torch", "parse_and_validate_args(", and
# "full_config =". Main is the commit d98e8a64 of 22 August 2026.
PLACES = {
    "pretrain_gpt.py of core_v0.19.0": (24, 512, 522),
    "pretrain_hybrid.py of core_v0.19.0": (23, 458, 468),
    "pretrain_gpt.py of main": (37, 525, 535),
    "pretrain_hybrid.py of main": (36, 542, 552),
}


@pytest.mark.parametrize("script", PLACES)
def test_the_diff_applies_to_the_scripts_of_megatron_lm(script, tmp_path):
    """Without fuzz, to the lines that it touches, at their places."""
    imports, arguments, config = PLACES[script]
    lines = [""] * 560
    for number, text in (
        (imports, "import torch"),
        (arguments, "    args = parse_and_validate_args("),
        (
            arguments + 1,
            "        extra_args_provider=add_modelopt_args if has_nvidia_modelopt else None,",
        ),
        (arguments + 2, "        args_defaults={'tokenizer_type': 'GPT2BPETokenizer'},"),
        (config, "    full_config = pretrain_cfg_container_from_args(args, model_cfg)"),
        (config + 1, "    pretrain("),
    ):
        lines[number - 1] = text
    name = script.split()[0]
    (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    diff = (FOLDER / "remoe.diff").read_text()
    done = subprocess.run(
        ["patch", "--fuzz=0", name], input=diff, cwd=tmp_path, text=True, capture_output=True
    )
    assert done.returncode == 0 and "FAILED" not in done.stdout
    patched = (tmp_path / name).read_text().splitlines()
    assert len(patched) == len(lines) + 4
    assert patched[imports] == "import megatron.remoe as remoe"
    assert patched[config + 3].strip().startswith("pretrain = remoe.training(args, model_cfg)")


def test_the_patched_script_trains_with_relu_routing(first):
    rows, _ = first
    assert [row["iteration"] for row in rows] == list(range(1, STOP + 1))
    assert all(row["lm_loss"] > 0 for row in rows)
    assert [row["l1_coeff"] for row in rows] == pytest.approx([1e-8, 1.2e-8, 1.44e-8])
    assert all(0 < row["sparsity"] < 0.75 for row in rows)


def test_the_patched_script_for_hybrid_models_trains_the_same_run(first, hybrid):
    (gpt, kept), (ours, ours_kept) = first, hybrid
    assert ours_kept == kept
    assert len(ours) == len(gpt) == STOP
    for key in ("lm_loss", "sparsity", "l1_coeff", "l1_reg", "grad_norm"):
        assert [row[key] for row in ours] == pytest.approx([row[key] for row in gpt], rel=1e-5)


def test_it_keeps_the_last_checkpoints_and_survives_a_damaged_one(first, second):
    assert first[1] == [2, 3]
    rows, kept, log = second
    assert "is damaged: __0_0.distcp has changed since it was written" in log
    assert "remoe: continuing from checkpoints/iter_0000002" in log
    assert [row["iteration"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[:2] == first[0][:2]
    assert rows[2]["lm_loss"] == first[0][2]["lm_loss"]
    assert kept == [3, 4]


def test_the_scripts_own_arguments_are_still_there(forgotten):
    own, _, _ = forgotten
    assert own.stderr.splitlines()[0] == "this script trains plain models only"


def test_a_forgotten_flag_is_refused_in_every_entry(forgotten):
    _, script, entry = forgotten
    message = (
        "checkpoint checkpoints/iter_0000003 has ReLU routing, and this run has TopK routing; "
        "pass --moe-routing relu, or pass --moe-change-routing to change the router on purpose"
    )
    for done in (script, entry):
        assert f"remoe: error: {message}\n" in done.stdout
        assert "Traceback" not in done.stdout
        assert "exitcode  : 2 " in done.stderr


LONG = ("--moe-routing", "relu", "--train-iters", "100000", "--save-interval", "100000")
# At port 0 the only process of a world listens where nobody else does.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
ALONE |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
WITH = "    with remoe.training(args, model_cfg): pretrain("


def edited(folder: Path, fault: str) -> str:
    """The patched script with a fault in its step, and with the context in place of a decorator."""
    lines = (folder / "pretrain_gpt.py").read_text().splitlines()
    (decorated,) = (i for i, line in enumerate(lines) if "pretrain = remoe.training" in line)
    assert lines[decorated + 1] == "    pretrain("
    lines[decorated : decorated + 2] = [WITH]
    step = lines.index("    device = torch.cuda.current_device()")
    lines.insert(step, f"    {fault}")
    (folder / "edited.py").write_text("".join(f"{line}\n" for line in lines))
    return "edited.py"


def test_when_a_rank_of_the_script_raises_all_end(folder):
    """Megatron's handler of signals leaves the other rank deaf; it waits for this one forever."""
    script = edited(folder, "if mpu.get_data_parallel_rank(): raise RuntimeError('broken')")
    flags = ("--exit-signal-handler", "--num-workers", "1", "--save", "raises", "--load", "raises")
    process = start(folder, *TORCHRUN, "--nproc-per-node=2", script, *FLAGS, *LONG, *flags)
    out, error = process.communicate(timeout=120)  # torchrun gives the deaf one 30 seconds
    assert process.returncode == 1
    assert "remoe: error: rank 1: RuntimeError: broken\n" in out + error
    assert not (folder / "raises/latest_checkpointed_iteration.txt").exists()


def test_the_script_saves_at_sigterm_and_refuses_a_second_run(folder):
    flags = ("--exit-signal-handler", "--save", "long", "--load", "long")
    command = ("pretrain_gpt.py", *FLAGS, *LONG, *flags, "--metrics-file", "long.jsonl")
    first = start(folder, *command, **ALONE)
    while not (folder / "long.jsonl").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    second = start(folder, *command, **ALONE)
    out, error = second.communicate()
    assert second.returncode == 2
    assert "remoe: error: long is in use by a run (process " in out + error
    first.send_signal(signal.SIGTERM)
    out, error = first.communicate(timeout=60)
    assert first.returncode == 0, out + error
    last = json.loads((folder / "long.jsonl").read_text().splitlines()[-1])["iteration"]
    assert checkpoint.tracked(folder / "long") == last


def test_the_script_refuses_what_would_train_wrong(folder):
    flags = ("--moe-routing", "null_experts", "--moe-router-load-balancing-type", "none")
    flags += ("--save", "wrong", "--load", "wrong")
    process = start(folder, "pretrain_gpt.py", *FLAGS, *flags, **ALONE)
    out, error = process.communicate()
    assert process.returncode == 2
    message = "remoe: error: moe_router_load_balancing_type is none, "
    assert any(line.startswith(message) for line in (out + error).splitlines()), out + error
    assert not (folder / "wrong").exists()
