"""Somebody's own Megatron script becomes ReMoE with the diff that the README shows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "own_script"
STEPS = 3
FLAGS = f"""
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4
    --num-experts 4 --moe-router-topk 1 --moe-router-pre-softmax --seq-length 32
    --max-position-embeddings 32 --position-embedding-type rope --swiglu --normalization RMSNorm
    --disable-bias-linear --untie-embeddings-and-output-weights --micro-batch-size 2
    --global-batch-size 4 --train-iters {STEPS} --lr 1e-3 --eval-iters 0 --eval-interval 100
    --mock-data --split 90,8,2 --tokenizer-type NullTokenizer --vocab-size 127 --num-workers 0
    --log-interval 1 --moe-token-dispatcher-type alltoall --moe-relu-routing
""".split()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Metrics of the patched script, run for a few steps."""
    tmp_path = tmp_path_factory.mktemp("own_script")
    script = tmp_path / "pretrain_gpt.py"
    shutil.copy(FOLDER / "pretrain_gpt.py", script)
    patch = (FOLDER / "remoe.diff").read_text()
    done = subprocess.run(["patch", "-p1"], input=patch, cwd=tmp_path, text=True)
    assert done.returncode == 0
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    metrics = ["--metrics-file", "metrics.jsonl"]
    done = subprocess.run(
        [*torchrun, str(script), *FLAGS, *metrics],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_at_most_ten_lines_are_added():
    diff = (FOLDER / "remoe.diff").read_text().splitlines()
    added = [line for line in diff if line.startswith("+") and not line.startswith("+++")]
    assert 0 < len(added) <= 10


def test_the_script_itself_knows_nothing_of_remoe():
    code = (FOLDER / "pretrain_gpt.py").read_text().split('"""', 2)[2]
    assert "remoe" not in code


def test_the_patched_script_trains_with_relu_routing(rows):
    assert [row["iteration"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["lm_loss"] > 0 for row in rows)
    assert [row["l1_coeff"] for row in rows] == pytest.approx([1e-8, 1.2e-8, 1.44e-8])
    assert all(0 < row["sparsity"] < 0.75 for row in rows)
