"""The `remoe` command: a user's mistake is one line and exit code 2, and nothing is left behind."""

import contextlib
import io
import json
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from megatron.remoe.run import launch, torchrun
from megatron.remoe.run.config import RunConfig
from tests.mcore import tiny

pytestmark = pytest.mark.processes


def prepare(cwd, *overrides, force=False):
    """What `remoe train` does before it starts processes; the mistake, or nothing."""
    from megatron.remoe.run import launch
    from megatron.remoe.run.config import load_config

    with contextlib.chdir(cwd):
        try:
            launch.prepare(load_config(Path("tiny.yaml"), list(overrides)), force=force)
        except ValueError as error:
            return str(error)
    return None


CASES = {
    "unknown key": (
        ["num_expert=8"],
        "unknown config key 'num_expert'; did you mean 'num_experts'?",
    ),
    "k above E": (
        ["moe_router_topk=5", "moe_granularity=2"],
        "topk is 10 of 8 experts (topk 5, num_experts 4, granularity 2); choose topk between 1",
    ),
    "G does not divide": (
        ["moe_granularity=3"],
        "granularity 3 does not divide the expert width 64; choose a granularity that divides it",
    ),
    "no data": (
        ["mock_data=false", "data_path=[nowhere/corpus]"],
        "data_path: nowhere/corpus.bin does not exist; tokenize the data first (remoe data tok",
    ),
    "no validation data": (
        ["mock_data=false", "valid_data_path=[1, nowhere/a, 2, nowhere/b]"],
        "valid_data_path: nowhere/a.bin does not exist; tokenize the data first (remoe data tok",
    ),
    "no tokenizer": (
        ["tokenizer_type=HuggingFaceTokenizer", "tokenizer_model=./nowhere/tokenizer"],
        "tokenizer_model: ./nowhere/tokenizer does not exist; tokenize the data first",
    ),
    "flex": (
        ["moe_token_dispatcher_type=flex"],
        "moe_token_dispatcher_type is flex, which ReLU routing refuses: flex selects the top-k "
        "experts again; use alltoall or allgather",
    ),
    "no such value": (["lr=fast"], "argument --lr: invalid float value: 'fast'"),
    "no heads": (["num_attention_heads=0"], "num_attention_heads is 0; it must be at least 1"),
    "no learning rate": (["lr=null"], "lr is not given; set the learning rate"),
    "no length": (["train_iters=null", "save_interval=1"], "neither train_iters nor train_samples"),
    "heads": (
        ["hidden_size=33"],
        "Megatron requires hidden_size % num_attention_heads == 0 (hidden_size is 33, "
        "num_attention_heads is 2; change one of them)",
    ),
    "batch": (
        ["global_batch_size=7", "full_validation=true", "multiple_validation_sets=true"],
        "global_batch_size 7 is not a multiple of 2: micro_batch_size 2 on each of 1 data-parallel",
    ),
    "expert groups": (
        ["nproc=3", "expert_model_parallel_size=2", "global_batch_size=12"],
        "3 processes cannot be split into groups of 2 (expert_tensor_parallel_size 1 x",
    ),
    "several validation sets": (
        ["multiple_validation_sets=true"],
        "multiple_validation_sets is set without full_validation, which Megatron does not have; "
        "set full_validation too",
    ),
    "context parallelism, dense": (
        ["num_experts=null", "nproc=2", "context_parallel_size=2", "transformer_impl=local"],
        "context_parallel_size is 2, but the attention of transformer_impl local sees one rank's",
    ),
    "not an override": (["lr"], "override 'lr' is not of the form key=value"),
    "for another script": (
        ["check_for_spiky_loss=true"],
        "check_for_spiky_loss is set, but this entry point ignores it; leave it out, or use a",
    ),
    "null experts without a loss": (
        ["moe_relu_routing=false", "moe_routing=null_experts", "moe_aux_loss_coeff=0"],
        "moe_aux_loss_coeff is 0.0, but nothing but an auxiliary loss keeps a mean of k experts",
    ),
    "format of checkpoints": (
        ["ckpt_format=torch"],
        "ckpt_format is torch, but runs continue from torch_dist only",
    ),
    "processes": (["nproc=0"], "nproc is 0; it must be a positive number of processes"),
}


@pytest.mark.parametrize(("overrides", "message"), CASES.values(), ids=CASES)
def test_a_mistake_is_one_line_and_leaves_nothing(call, tmp_path, overrides, message):
    tiny.write_config(tmp_path / "tiny.yaml")
    code, _, error = call(tiny.remoe, tmp_path, "train", "tiny.yaml", *overrides)
    assert (code, error.count("\n")) == (2, 1), error
    assert error.startswith(f"error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_the_config_of_these_cases_passes_without_the_mistake(call, tmp_path):
    tiny.write_config(tmp_path / "tiny.yaml")
    assert call(prepare, tmp_path, "run_dir=run") is None
    resolved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert {k: v for k, v in tiny.CONFIG.items() if k != "base"}.items() <= resolved.items()
    assert resolved["swiglu"] is True  # from the base
    assert resolved["metrics_file"] == "run/metrics.jsonl"
    assert resolved["save"] == resolved["load"] == "run/checkpoints"
    assert resolved["save_interval"] == tiny.CONFIG["train_iters"]


def test_a_run_by_samples_is_as_long_as_they_last(call, tmp_path):
    tiny.write_config(tmp_path / "tiny.yaml", run_dir="run", train_iters=..., train_samples=80)
    assert call(prepare, tmp_path) is None
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["save_interval"] == 10


def test_another_run_in_the_directory_is_refused_unless_forced(call, tmp_path):
    tiny.write_config(tmp_path / "tiny.yaml", run_dir="run")
    assert call(prepare, tmp_path) is None
    there = (tmp_path / "run/config.yaml").read_text()

    argv = ["train", "tiny.yaml", "lr=0.5", "seed=7"]
    code, _, error = call(tiny.remoe, tmp_path, *argv)
    assert code == 2
    assert error == (
        "error: run holds a run that differs in lr, seed; give this one its own directory "
        "(run_dir=PATH), or continue that run with these settings (--force)\n"
    )
    assert (tmp_path / "run/config.yaml").read_text() == there
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {".lock", "config.yaml"}

    assert call(prepare, tmp_path) is None  # the same settings go on
    assert call(prepare, tmp_path, "lr=0.5", "seed=7", force=True) is None
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["lr"] == 0.5


def test_a_run_that_takes_too_long_to_build_is_accepted_with_a_warning(call, tmp_path):
    tiny.write_config(tmp_path / "tiny.yaml", run_dir="run")
    mistake, said = call(prepare_slowly, tmp_path)
    assert mistake is None and (tmp_path / "run/config.yaml").is_file()
    assert said.count("\n") == 1 and said.startswith(
        "remoe: warning: the run is accepted, but its check is not complete: building the model "
        "and the optimizer took longer than 1 seconds and was stopped; if the run fails"
    )


def prepare_slowly(cwd) -> tuple[str | None, str]:
    from megatron.remoe.run import rehearsal

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(rehearsal, "_passed", set())
        patch.setattr(rehearsal, "_SECONDS", 1)
        patch.setattr(rehearsal, "_build", lambda *_: time.sleep(60))
        return prepare(cwd), said.getvalue()


def test_a_missing_config_is_named(call, tmp_path):
    code, _, error = call(tiny.remoe, tmp_path, "train", "nowhere.yaml")
    expected = "error: config nowhere.yaml does not exist; pass the path of a YAML file\n"
    assert (code, error) == (2, expected)


def test_zero_processes_are_a_mistake_as_an_option_too(call, tmp_path):
    tiny.write_config(tmp_path / "tiny.yaml")
    code, _, error = call(tiny.remoe, tmp_path, "train", "tiny.yaml", "--nproc", "0")
    assert code == 2 and error.startswith("error: nproc is 0; it must be a positive number")


def test_a_process_of_its_own_prints_that_line_only(tmp_path):
    """No traceback, and none of the warnings with which Megatron greets a machine without GPU."""
    tiny.write_config(tmp_path / "tiny.yaml")
    process = tiny.start("train", "tiny.yaml", "hidden_size=33", cwd=tmp_path)
    out, error = process.communicate()
    line = (
        "error: Megatron requires hidden_size % num_attention_heads == 0 (hidden_size is 33, "
        "num_attention_heads is 2; change one of them)\n"
    )
    assert (process.returncode, out, error) == (2, "", line)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def train_with(monkeypatch, run_dir, script):
    """`launch.train` with a script in the place of the run: exit code, and what is printed."""
    monkeypatch.setattr(torchrun, "command", lambda argv, nproc: [sys.executable, "-c", script])
    run_dir.mkdir()
    metrics = run_dir / "metrics.jsonl"
    config = RunConfig(run_dir, 1, {"train_iters": 2, "metrics_file": str(metrics)})
    console = Console(file=io.StringIO(), width=200)
    return launch.train(config, [], console), console.file.getvalue()


def test_a_run_that_fails_shows_the_end_of_its_log(monkeypatch, tmp_path):
    script = "for i in range(99): print('line', i)\nraise SystemExit(3)"
    code, out = train_with(monkeypatch, tmp_path / "run", script)
    assert code == 3
    lines = out.splitlines()
    assert lines[:25] == [f"line {i}" for i in range(74, 99)]
    assert lines[25] == f"the run failed (exit code 3); see {tmp_path / 'run/log.txt'}"


def test_progress_is_read_from_the_rows_of_this_run(monkeypatch, tmp_path):
    rows = [
        {"iteration": 1, "lm_loss": None, "tokens": 64, "tokens_per_second": 8.0},
        {"iteration": 1, "split": "valid", "lm_loss": 9.0},
        {"iteration": 2, "lm_loss": 1.5, "sparsity": 0.75, "l1_coeff": 1e-8, "tokens": 128}
        | {"tokens_per_second": 8.0},
    ]
    path = tmp_path / "run/metrics.jsonl"
    script = f"open({str(path)!r}, 'w').write({''.join(json.dumps(r) + chr(10) for r in rows)!r})"
    code, out = train_with(monkeypatch, tmp_path / "run", script)
    assert code == 0
    first, last = out.splitlines()
    assert first == "1/2  loss nan  ETA 8 s"  # 64 tokens at 8 per second
    assert last == "2/2  loss 1.500  sparsity 0.750  coefficient 1.0e-08  ETA 0 s"


def test_a_damaged_line_does_not_end_a_live_run(monkeypatch, tmp_path):
    row = {"iteration": 2, "lm_loss": 1.5, "tokens": 128, "tokens_per_second": 8.0}
    lines = ["{", "\udcff", "[1]", '{"iteration": 1}', json.dumps(row)]
    path = tmp_path / "run/metrics.jsonl"
    written = "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")
    code, out = train_with(
        monkeypatch, tmp_path / "run", f"open({str(path)!r}, 'wb').write({written})"
    )
    assert (code, out) == (0, "2/2  loss 1.500  ETA 0 s\n")
