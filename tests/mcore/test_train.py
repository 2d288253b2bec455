"""`remoe train` for real, on CPU ranks: what a run directory holds, and that it can go on."""

import contextlib
import io
import math
import re
import shlex
import shutil
import struct
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest

import remoe
from megatron.remoe.run.argv import to_argv
from megatron.remoe.run.config import load_config
from tests.mcore import tiny
from tests.mcore.test_metrics import COUNTED, EVERY, ROUTING

STEPS, STOP, TOKENS = 12, 6, 8 * 32
# What `data_root: tokens` stands for, but for the weights of the training data.
DATA = {
    "mock_data": ...,
    "vocab_size": ...,
    "padded_vocab_size": 384,
    "train_data_path": [1, "tokens/train/code", 1, "tokens/train/prose"],
    "valid_data_path": ["tokens/valid/code", "tokens/valid/prose"],
    "multiple_validation_sets": True,
    "full_validation": True,
    "validation_set_names": ["code", "prose"],
    "tokenizer_type": "HuggingFaceTokenizer",
    "tokenizer_model": "tokens/tokenizer",
}
RELU = {
    "nproc": 2,
    "expert_model_parallel_size": 2,
    "moe_token_dispatcher_type": "alltoall",
    "moe_granularity": 2,
    "train_iters": STEPS,
    "exit_interval": STOP,
    "eval_interval": 4,
    "tensorboard_dir": "relu/tensorboard",
    "run_dir": "relu",
}


def finish(process: subprocess.Popen) -> str:
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, out + error
    return out


@pytest.fixture(scope="module")
def home(tmp_path_factory, call) -> Path:
    """A working directory with a tokenized corpus and a config."""
    home = tmp_path_factory.mktemp("train")
    tiny.write_corpus(home / "corpus")
    flags = ["--out", "tokens", "--vocab-size", "300", "--workers", "1"]
    code, out, error = call(tiny.remoe, home, "data", "tokenize", "corpus", *flags)
    assert code == 0, out + error
    own = {"data_root": "tokens"} | dict.fromkeys(
        ("mock_data", "vocab_size", "tokenizer_type"), ...
    )
    tiny.write_config(home / "relu.yaml", **(own | RELU))
    return home


@pytest.fixture(scope="module")
def first(home):
    """The run up to its early stop: rows of metrics.jsonl, and what was printed."""
    out = finish(tiny.start("train", "relu.yaml", cwd=home))
    return tiny.rows(home / "relu"), out


@pytest.fixture(scope="module")
def both(first, home):
    """The same again from Python, which takes the run to its end."""
    said = io.StringIO()
    with contextlib.chdir(home), contextlib.redirect_stdout(said):
        run = remoe.train("relu.yaml")
    assert run.path == Path("relu")
    return tiny.rows(home / "relu"), said.getvalue()


@pytest.fixture(scope="module")
def others(home, call):
    """At the same time: TopK with a test set, a dense model that logs every second step, and ReLU
    routing on two pipeline stages of which the last, whose rank logs, has no experts."""
    changes = {"nproc": 1, "train_iters": 3, "eval_interval": 2, "eval_iters": 1}
    tiny.write_config(home / "topk.yaml", **changes, moe_relu_routing=False, split="8,1,1")
    changes |= {"num_experts": None, "log_interval": 2, "train_iters": 4, "eval_iters": 0}
    tiny.write_config(home / "dense.yaml", **changes)
    changes = {"nproc": 2, "pipeline_model_parallel_size": 2, "moe_layer_freq": "[1,0]"}
    tiny.write_config(home / "stages.yaml", **changes, train_iters=3, eval_iters=0)
    names = ("topk", "dense", "stages")
    commands = [call(prepared, home, f"{name}.yaml") for name in names]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for process in [subprocess.Popen(command, cwd=home, **pipes) for command in commands]:
        finish(process)
    return {name: tiny.rows(home / "runs" / name) for name in names}


def prepared(home: Path, config: str) -> list[str]:
    """The command that `remoe train` would run."""
    from megatron.remoe.run import launch, torchrun

    with contextlib.chdir(home):
        planned = launch.prepare(load_config(Path(config)))
    return torchrun.command(planned.argv, planned.config.nproc)


def training(rows):
    return [row for row in rows if "split" not in row]


def evaluations(rows):
    return [row for row in rows if "split" in row]


def test_a_run_directory_holds_everything_about_a_run(first, home):
    run = home / "relu"
    names = {path.name for path in run.iterdir()}
    assert names == {
        ".lock", "cache", "checkpoints", "config.yaml", "curves.png", "log.txt", "metrics.jsonl",
        "tensorboard", "tokenizer",
    }  # fmt: skip
    assert (run / "checkpoints/latest_checkpointed_iteration.txt").read_text() == str(STOP)
    assert (run / f"checkpoints/iter_{STOP:07d}/metadata.json").is_file()
    assert "number of nan iterations:   0" in (run / "log.txt").read_text()
    png = (run / "curves.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    assert width > 1000 and height > 1000
    resolved = load_config(run / "config.yaml")
    assert resolved.flags["train_iters"] == STEPS and resolved.flags["moe_granularity"] == 2


def test_what_is_printed_sums_the_run_up(first):
    rows, out = first
    assert out.startswith("relu: 2 processes, output in log.txt\n")
    assert f"iterations                        │ {STOP} " in out
    assert "(target 0.75)" in out
    for row in evaluations(rows)[-3:]:
        assert f"loss, {row['split']} " in out and f"│ {row['lm_loss']:.4f} " in out
    assert out.endswith("curves: relu/curves.png\n")


def test_training_rows_have_what_is_documented(first):
    rows = training(first[0])
    assert [set(row) for row in rows] == [EVERY | ROUTING] * STOP
    assert [row["iteration"] for row in rows] == list(range(1, STOP + 1))
    assert [row["tokens"] for row in rows] == [TOKENS * i for i in range(1, STOP + 1)]
    for row in rows:
        assert math.log(384) - 2 < row["lm_loss"] < math.log(384) + 0.5
        assert row["tokens_per_second"] > 0 and row["grad_norm"] > 0
        assert 0 < row["sparsity"] < 1
        assert row["sparsity"] == pytest.approx(np.mean(row["sparsity_per_layer"]))
        assert len(row["sparsity_per_layer"]) == 2
        assert row["active_experts"] == pytest.approx(8 * (1 - row["sparsity"]))
    assert rows[-1]["lm_loss"] < rows[0]["lm_loss"]


def moved(row) -> float:
    """The next coefficient by the sign rule, in fp32."""
    coeff, alpha = np.float32(row["l1_coeff"]), np.float32(1.2)
    return float(coeff * alpha if row["sparsity"] < 0.75 else coeff / alpha)


def test_the_coefficient_follows_the_rule_bit_exactly_also_over_the_stop(both):
    rows = training(both[0])
    assert rows[0]["l1_coeff"] == np.float32(1e-8)
    assert [row["l1_coeff"] for row in rows[1:]] == [moved(row) for row in rows[:-1]]
    assert rows[0]["sparsity"] < 0.75 and rows[1]["l1_coeff"] > 1.19e-8


def test_the_overall_validation_loss_is_the_mean_by_tokens(both):
    rows = evaluations(both[0])
    splits = ["valid/code", "valid/prose", "valid"]
    assert [(row["iteration"], row["split"]) for row in rows] == [
        (iteration, split) for iteration in (4, 8, 12) for split in splits
    ]
    for code, prose, overall in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        # 6 documents of code and 12 of prose, of about the same length
        low, high = sorted([code["lm_loss"], prose["lm_loss"]])
        assert low < overall["lm_loss"] < high
        share = (overall["lm_loss"] - code["lm_loss"]) / (prose["lm_loss"] - code["lm_loss"])
        assert share == pytest.approx(2 / 3, abs=0.05)


def test_the_same_command_continues_the_run(first, both):
    before, after = first[0], both[0]
    assert after[: len(before)] == before
    assert [row["iteration"] for row in training(after)] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in training(after)][-1] == TOKENS * STEPS
    assert f"iterations                         │ {STEPS} " in both[1]


def test_data_and_tokenizer_follow_from_the_folder_of_tokens(first, home):
    flags = load_config(home / "relu/config.yaml").flags
    named = {key: value for key, value in DATA.items() if value is not ...}
    blend = named.pop("train_data_path")
    assert named.items() <= flags.items()
    assert flags["train_data_path"][1::2] == blend[1::2]
    weights = flags["train_data_path"][::2]  # in proportion to the tokens
    sizes = [(home / f"{prefix}.bin").stat().st_size for prefix in blend[1::2]]
    assert weights[0] * sizes[1] == weights[1] * sizes[0] and weights[1] > weights[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seq_length=8192"], "train_data_path: tokens/train/code has "),
        (["seq_length=128"], "too few for a sequence of seq_length 128 on each of 2 data-parallel"),
    ],
)
def test_too_little_text_is_refused_before_the_start(home, call, overrides, message):
    more = ["max_position_embeddings=8192", "run_dir=little", "nproc=2"]
    code, _, error = call(tiny.remoe, home, "train", "relu.yaml", *overrides, *more)
    assert (code, error.count("\n")) == (2, 1) and message in error, error
    assert not (home / "little").exists()


def test_a_run_that_was_copied_needs_nothing_outside_of_it(both, home, call, tmp_path):
    """The data and the original are gone, and another run has the path of the original."""
    copy, cwd = tmp_path / "copy", tmp_path / "cwd"
    shutil.copytree(home / "relu", copy)
    (cwd / "relu/checkpoints").mkdir(parents=True)
    code, out, error = call(tiny.remoe, cwd, "convert", "to-hf", str(copy), "model")
    assert code == 0, out + error
    generate = ("generate", "--max-new-tokens", "3")
    code, out, error = call(tiny.remoe, cwd, *generate, str(copy), "the router")
    assert code == 0 and out.startswith("the router"), out + error
    assert call(tiny.remoe, cwd, *generate, "model", "the router")[1] == out
    moved = load_config(copy / "config.yaml")
    assert moved.run_dir == copy and moved.flags["load"] == str(copy / "checkpoints")
    # The run goes on there if data are given; the tokenizer is its own.
    message = call(continued, cwd, copy, "data_root=nowhere")
    assert "nowhere/train/code.bin does not exist" in message
    message = call(continued, cwd, copy, f"data_root={home / 'tokens'}")
    assert "holds a run that differs in train_data_path, valid_data_path; give" in message
    tokenizer = home / "tokens/tokenizer"
    assert call(continued, cwd, copy, f"data_root={home / 'tokens'}", force=True) == str(tokenizer)
    config = (home / "tokens/tokenizer/tokenizer_config.json").read_text()
    (copy / "tokenizer/tokenizer_config.json").write_text(config + "\n")
    message = call(continued, home, copy, f"data_root={home / 'tokens'}")
    assert "tokenizer_config.json, with which the run was started; restore it" in message


def continued(cwd: Path, run: Path, *overrides: str, force: bool = False) -> str:
    """The tokenizer with which a run would go on, or the mistake."""
    from megatron.remoe.run import launch

    with contextlib.chdir(cwd):
        try:
            planned = launch.prepare(load_config(run / "config.yaml", list(overrides)), force=force)
        except ValueError as error:
            return str(error)
    return planned.args.tokenizer_model


def test_python_reads_what_a_run_has_written(both, home, tmp_path):
    run = remoe.load_run(home / "relu")
    rows = training(both[0])
    assert run.config["moe_granularity"] == 2
    assert run.metrics["iteration"].tolist() == list(range(1, STEPS + 1))
    for name in ("lm_loss", "sparsity_per_layer", "tokens"):
        assert run.metrics[name].tolist() == [row[name] for row in rows]
    assert run.metrics["sparsity_per_layer"].shape == (STEPS, 2)
    assert run.metrics["dense_layers"].tolist() == [row["dense_layers"] for row in rows]
    assert run.evaluations.keys() == {"valid", "valid/code", "valid/prose"}
    code = [row["lm_loss"] for row in both[0] if row.get("split") == "valid/code"]
    assert run.evaluations["valid/code"]["lm_loss"].tolist() == code
    assert run.evaluations["valid"]["iteration"].tolist() == [4, 8, 12]
    assert run.plot(tmp_path / "curves.png").stat().st_size > 1000
    assert (run.export(tmp_path / "model") / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match="is not a run directory"):
        remoe.load_run(tmp_path)
    with pytest.raises(ValueError, match="the config has no run_dir"):
        remoe.train({"lr": 1.0})


def test_tensorboard_has_the_same_numbers(both, home):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(home / "relu/tensorboard"))
    events.Reload()

    def scalars(tag):
        return {event.step: event.value for event in events.Scalars(tag)}

    tags = {"lm_loss": "lm loss", "grad_norm": "grad-norm", "learning_rate": "learning-rate"}
    tags |= {key: f"remoe/{key}" for key in ROUTING - {"sparsity_per_layer"}}
    for key, tag in tags.items():
        values = {row["iteration"]: row[key] for row in training(both[0])}
        if key.endswith("_layers"):
            values = {iteration: len(layers) for iteration, layers in values.items()}
        assert scalars(tag) == pytest.approx(values, rel=1e-6), tag
    for layer in (1, 2):
        values = {
            row["iteration"]: row["sparsity_per_layer"][layer - 1] for row in training(both[0])
        }
        assert scalars(f"remoe/sparsity_per_layer/{layer}") == pytest.approx(values, rel=1e-6)
    code = {row["iteration"]: row["lm_loss"] for row in both[0] if row.get("split") == "valid/code"}
    assert scalars("lm loss validation-code") == pytest.approx(code, rel=1e-6)


def test_arguments_from_the_checkpoint_are_not_multiplied_again(both, home, call):
    saved, built = call(shapes_from_checkpoint, home)
    assert saved == built == (8, 2, 32)


def shapes_from_checkpoint(home: Path) -> list[tuple[int, int, int]]:
    from megatron.remoe.arguments import megatron_parser

    changes = {"load": str(home / "relu/checkpoints"), "use_checkpoint_args": True}
    path = tiny.write_config(home / "again.yaml", moe_granularity=2, **changes)
    argv = to_argv(load_config(path).flags, megatron_parser())
    return tiny.shapes(*argv, from_checkpoint=True)


@pytest.mark.parametrize(
    "overrides",
    [["load=relu/checkpoints"], ["load=null", "pretrained_checkpoint=relu/checkpoints"]],
    ids=["load", "pretrained_checkpoint"],
)
@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_a_forgotten_flag_is_refused_before_anything_is_written(
    both, home, call, overrides, from_checkpoint
):
    overrides = [*overrides, "moe_relu_routing=false", "run_dir=forgotten"]
    if from_checkpoint:
        overrides.append("use_checkpoint_args=true")
    code, _, error = call(tiny.remoe, home, "train", "relu.yaml", *overrides)
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith(
        "error: checkpoint relu/checkpoints/iter_0000012 has ReLU routing, and this run has TopK "
        "routing; pass --moe-routing relu, or pass --moe-change-routing"
    )
    assert not (home / "forgotten").exists()


def test_topk_rows_count_and_dense_rows_have_no_routing(others):
    topk, dense = training(others["topk"]), training(others["dense"])
    assert [row["iteration"] for row in topk] == [1, 2, 3]
    assert [row["iteration"] for row in dense] == [2, 4]
    assert all(set(row) == EVERY | COUNTED for row in topk)
    assert all(set(row) == EVERY for row in dense)
    for row in topk:
        assert (row["active_experts"], row["active_experts_max"]) == (1, 1)
        assert row["sparsity"] == 0.75
    for row in topk + dense:
        assert math.log(128) - 2 < row["lm_loss"] < math.log(128) + 0.5
        assert row["tokens_per_second"] > 0


def test_a_last_stage_without_experts_knows_the_routing_of_the_others(others):
    rows = training(others["stages"])
    assert len(rows) == 3 and all(set(row) == EVERY | ROUTING for row in rows)
    for before, after in zip(rows, rows[1:], strict=False):
        assert after["l1_coeff"] == pytest.approx(moved(before), rel=1e-6)
    for row in rows:
        assert row["sparsity_per_layer"] == [row["sparsity"]]
        assert 0.4 < row["sparsity"] < 0.6


def test_validation_and_test_set_are_told_apart(others):
    splits = [(row["iteration"], row["split"]) for row in evaluations(others["topk"])]
    assert splits == [(2, "valid"), (3, "valid"), (3, "test")]
    assert evaluations(others["dense"]) == []


def test_a_run_without_experts_drops_their_keys(others, home):
    dense = load_config(home / "runs/dense/config.yaml").flags
    topk = load_config(home / "runs/topk/config.yaml").flags
    assert not [key for key in dense if key.startswith(("moe_", "num_experts"))]
    assert topk["num_experts"] == 4 and topk["moe_relu_routing"] is False


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# What is added to a command of the README, so that it takes a moment. The run is the one above.
TOY = {
    "remoe data corpus": "--max-mb-per-domain 0.5 --valid-fraction 0.2",
    "remoe data tokenize": "--vocab-size 300 --workers 1",
    "remoe train": "--dry-run --gpus-per-node 2",
    "remoe generate": "--max-new-tokens 4",
    "remoe analyze": "--tokens 512",
    "remoe report": "",
    "remoe sweep": "--dry-run --only 'top*[k8]-seed=1'",
    "remoe convert to-hf": "",
    "remoe convert verify": None,  # test_convert.py runs it, in ten seconds
}


def commands_of(readme: str) -> list[str]:
    """The commands of its blocks of shell, tables and text, in their order."""
    pattern = r"^```sh\n(.*?)^```|`((?:make |(?:remoe|python) \S+ )[^`\n]+)`"
    found = []
    for block, inline in re.findall(pattern, readme, re.DOTALL | re.MULTILINE):
        lines = (shlex.join(shlex.split(line, comments=True)) for line in block.splitlines())
        found += [inline] if inline else list(filter(None, lines))
    return list(dict.fromkeys(found))  # the text names some of them again


def recipe(target: str) -> list[str]:
    """The commands that `make TARGET` runs after the set-up; it fails without such a target."""
    make = ["make", "--dry-run", "--old-file=setup", "BIN=.", target]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_readme_does_what_it_says(both, home, call):
    """Each of its commands, in its order, on a small corpus and with the run of this module."""
    (home / "examples").symlink_to(ROOT / "examples")
    (home / "runs").mkdir(exist_ok=True)
    waiting, ran = commands_of(README), []
    while waiting:
        command = waiting.pop(0)
        kind = next((known for known in TOY if command.startswith(f"{known} ")), None)
        program, *words = shlex.split(command)
        if program == "make":
            done = [line.removeprefix("./") for line in recipe(*words)]
            waiting[:0] = [line for line in done if line.startswith("remoe ")]
        elif kind is not None and TOY[kind] is not None:
            toy = command.replace("remoe train", "remoe launch", 1).replace(
                " --valid-fraction 0.01", ""
            )
            code, out, error = call(tiny.remoe, home, *shlex.split(f"{toy} {TOY[kind]}")[1:])
            assert code == 0, command + out + error
            if kind == "remoe train":
                (home / "runs/quickstart").symlink_to(home / "relu")
        elif program == "pip":
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            extras = re.search(r"\[(.*)\]", words[-1])[1].split(",")
            assert set(extras) <= set(project["optional-dependencies"])
        elif words[:2] == ["-m", "tests.golden.replay"]:  # which test_replay.py runs
            assert (ROOT / words[2]).is_file()
        elif kind is None:
            assert words[0] == "clone" and words[-2:] == ["cd", "remoe"], command
        ran.append(kind or program)
    assert set(ran) == {*TOY, "git", "make", "pip", "python"}
    assert (home / "runs/quickstart/report.html").is_file() and (home / "model").is_dir()
