"""The command line's contract: a mistake is one line that names value and remedy, exit code 2, and
nothing is written. Each value here once gave a traceback, or a run that failed or meant nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron.remoe.analysis.runs import Run
from tests.mcore import tiny

TEXTS = {
    "a key that is a number": ("1: 2\n", "the key 1 is no name of a flag; correct it"),
    "a key that is a truth value": ("true: 1\n", "the key True is no name of a flag"),
    "base as a number": ("base: 3\n", "base is 3; it must be a path, or a list of paths"),
    "base as a mapping": ("base: {a: 1}\n", "base is {'a': 1}; it must be a path, or a list of"),
    "base in a list of lists": ("base: [[x]]\n", "base is [['x']]; it must be a path, or a list"),
    "base that is a folder": ("base: .\n", "config '.' cannot be read: Is a directory; pass"),
    "nested too deeply": (
        "lr: " + "[" * 3000 + "]" * 3000,
        "it is nested too deeply, or refers to itself",
    ),
    "a value of several lines": ("lr: [1\n", "config config.yaml: line 2, column 1: "),
    "a tab": ("\tlr: 1\n", "config config.yaml: line 1, column 1: found char"),
    "twice the same key": ("lr: 1\nlr: 2\n", "line 2, column 1: found duplicate key lr"),
    "itself": ("lr: ${lr}\n", "config.yaml: "),
    "not UTF-8": (b"lr: \xe9\n", "config config.yaml is not UTF-8 text (byte 4); save it as UTF-8"),
    "run_dir as a number": ("run_dir: 3\n", "run_dir is 3; it must be the path of a folder"),
    "run_dir as a list": ("run_dir: [a]\n", "run_dir is ['a']; it must be the path of a folder"),
    "run_dir as a mapping": ("run_dir: {a: 1}\n", "run_dir is {'a': 1}; it must be the path of"),
    "nproc as a truth value": ("nproc: true\n", "nproc is True; it must be a positive number"),
    "a date": ("lr: 2020-01-01\n", "argument --lr: invalid float value: '2020-01-01'"),
    "a sweep": (
        "sweep: {}\n",
        "config key 'sweep' makes this file a sweep; run it with remoe sweep",
    ),
    "a list for one value": ("lr: [1, 2]\n", "config key 'lr' is the list [1, 2]; it takes one"),
    "a list of mappings": ("data_path: [{a: 1}]\n", "its list must consist of plain values"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_a_malformed_file_is_one_line_with_its_place(call, tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    check(call, tmp_path, ["train", "config.yaml"], message)


def check(call, folder: Path, argv: list[str], message: str) -> str:
    """Run the command, which must refuse with this message and leave the folder as it is."""
    before = sorted(folder.rglob("*"))
    code, out, error = call(tiny.remoe, folder, *argv)
    assert (code, error.count("\n")) == (2, 1), out + error
    assert error.startswith("error: ") and message in error, error
    assert sorted(folder.rglob("*")) == before
    return error


GROUPS = ["num_attention_heads=4", "group_query_attention=true", "num_query_groups=3"]
VALUES = {
    # what every rank would have raised
    "query groups": (GROUPS, "num_query_groups is 3, which does not divide the 4 attention heads"),
    "vocabulary": (["padded_vocab_size=64"], "padded_vocab_size is 64, less than the 127 tokens"),
    "seq_length": (["seq_length=-4"], "seq_length is -4; it must be at least 1"),
    "ffn_hidden_size": (["ffn_hidden_size=-64"], "ffn_hidden_size is -64; it must be at least 1"),
    "init_method_std": (["init_method_std=-1"], "init_method_std is -1.0; it must be at least 0"),
    "seed": (["seed=-5"], "seed is -5; it must be in [1, 4000000000]"),
    "hidden_size": (["hidden_size=0"], "hidden_size is 0; it must be at least 1"),
    "log_interval": (["log_interval=0"], "log_interval is 0; it must be at least 1"),
    "warm-up": (["lr_warmup_fraction=2"], "lr_warmup_fraction is 2.0; it must be in [0, 1)"),
    "layer frequency": (
        ["moe_layer_freq='[1,1,1]'"],
        "(num_layers is 2, moe_layer_freq is [1, 1, 1]; change one of them)",
    ),
    "tokenizer": (
        ["tokenizer_type=HuggingFaceTokenizer", "tokenizer_model=."],
        "tokenizer_type is HuggingFaceTokenizer with tokenizer_model . and vocab_size 127, and "
        "cannot be loaded: ",
    ),
    "channels of a head": (["kv_channels=5"], "kv_channels is 5"),
    "warm-up steps": (["lr_warmup_iters=12"], "Megatron requires lr_warmup_steps < lr_decay_steps"),
    "no initialization": (["no_initialization=true"], "no_initialization is set, but weights"),
    "an optimizer": (["optimizer=muon"], "emerging-optimizers package is required for optimizer="),
    "nccl": (["distributed_backend=nccl"], "distributed_backend is nccl, which needs GPUs"),
    "validation": (["full_validation=true"], "full_validation is set without multiple_validation"),
    "checkpoint": (["pretrained_checkpoint=x"], "pretrained_checkpoint: x is no folder of check"),
    "load": (["load=x"], "load: x is no folder of checkpoints"),
    "no checkpoint": (
        ["use_checkpoint_args=true", "load=null", "save=null"],
        "use_checkpoint_args is set, but there is no load",
    ),
    "no data": (["mock_data=false"], "no data is named; set train_data_path"),
    "a last stage without layers": (
        ["moe_router_recurrence=gru", "nproc=2", "num_layers=3", "pipeline_model_parallel_size=2",
         "pipeline_model_parallel_layout='Ettt|L'"],
        "a pipeline stage has no layers, and the state of recurrent routers needs one to pass",
    ),
    "recurrence without a router": (
        ["moe_router_recurrence=gru", "moe_layer_freq='[0,0]'"],
        "moe_layer_freq is [0, 0], with which no layer has a router for moe_router_recurrence",
    ),
    "recurrence by an unknown cell": (["moe_router_recurrence=lstm"], "invalid choice: 'lstm' (ch"),
    "recurrence of size zero": (
        ["moe_router_recurrence=gru", "moe_router_recurrent_size=0"],
        "moe_router_recurrent_size is 0; it must be a whole number that is at least 1",
    ),
    # what would have run and meant nothing
    "NaN as a limit": (["clip_grad=.nan"], "clip_grad is nan; it must be a finite number"),
    "infinity as a limit": (["clip_grad=.inf"], "clip_grad is inf; it must be a finite number"),
    "NaN as coefficient": (["moe_relu_l1_reg_coeff_init=.nan"], "coeff_init is nan; it must be a"),
    "infinite coefficient": (["moe_relu_l1_reg_coeff_init=.inf"], "coeff_init is inf; it must"),
    "NaN as multiplier": (["moe_relu_l1_reg_coeff_multiplier=.nan"], "multiplier is nan; it must"),
    "infinite multiplier": (["moe_relu_l1_reg_coeff_multiplier=.inf"], "multiplier is inf; it"),
    "eval_iters": (["eval_iters=-1"], "eval_iters is -1; it must be at least 0"),
    "beta1": (["adam_beta1=1.5"], "adam_beta1 is 1.5; it must be in [0, 1)"),
    "beta2": (["adam_beta2=-0.1"], "adam_beta2 is -0.1; it must be in [0, 1)"),
    "hidden dropout": (["hidden_dropout=1.5"], "hidden_dropout is 1.5; it must be in [0, 1)"),
    "dropout": (["attention_dropout=-0.1"], "attention_dropout is -0.1; it must be in [0, 1)"),
    "learning rate": (["lr=-1e-5"], "lr is -1e-05; it must be at least 0"),
    "another program's": (["rl_prompts_per_eval=3"], "Megatron's programs for reinforcement"),
    "metrics elsewhere": (["metrics_file=x.jsonl"], "metrics_file is x.jsonl, but progress, curv"),
    "no metrics": (["metrics_file=null"], "metrics_file is None, but progress, curves and comp"),
    "nothing logged": (["log_interval=13"], "log_interval is 13, but the run has 12 steps and"),
    # messages
    "no steps": (["train_iters=0"], "error: train_iters is 0; it must be at least 1"),
    "base as override": (["base=x.yaml"], "override 'base=x.yaml' comes after the bases are read"),
    "capitals": (["LR=1"], "unknown config key 'LR'; did you mean 'lr'?"),
    "nothing similar": (["xyzzy=1"], "unknown config key 'xyzzy'; no flag is similar; remove it"),
    "a part of a list": (["train_data_path[0]=x"], "does not name a flag: 'train_data_path"),
    "a key in a list": (["train_data_path.a=x"], "does not name a flag: 'train_data_path"),
    "mixed types": (["train_data_path=[1, {a: b}]"], "its list must consist of plain values"),
    "an end without a word": (["checkpoint_activations=true"], "checkpoint_activations is true: "),
    "an enumeration": (["attention_backend=x"], "attention_backend is x: Megatron fails with KeyE"),
    "a name of 300 characters": (["run_dir=" + 300 * "x"], "a folder (File name too long)"),
}  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), VALUES.values(), ids=VALUES)
def test_a_bad_value_is_one_line_and_leaves_nothing(call, tmp_path, overrides, message):
    tiny.write_config(tmp_path / "tiny.yaml")
    check(call, tmp_path, ["train", "tiny.yaml", *overrides], message)


@pytest.mark.parametrize("name", ["query groups", "warm-up", "NaN as a limit", "beta1", "capitals"])
def test_other_commands_refuse_the_same_values(call, tmp_path, name):
    overrides, message = VALUES[name]
    message = message.removeprefix("error: ")
    tiny.write_config(tmp_path / "tiny.yaml")
    padded, here = "padded_vocab_size=128", ["--gpus-per-node", "1"]
    check(call, tmp_path, ["describe", "tiny.yaml", padded, *here, *overrides], message)
    check(call, tmp_path, ["launch", "tiny.yaml", "--dry-run", *here, *overrides], message)
    flags = dict(yaml.safe_load(o.replace("=", ": ", 1)).popitem() for o in overrides)
    sweep = {"base": "tiny.yaml", "sweep": {"list": {"a": flags, "b": {}}}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    code, _, error = call(tiny.remoe, tmp_path, "sweep", "sweep.yaml")
    head, line = error.splitlines()
    assert code == 2 and head == "error: sweep.yaml: nothing was started"
    assert message in line and line.endswith("(in a)")
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.yaml", "tiny.yaml"}


SWEEPS = {
    "a run_dir of another type": ("run_dir: 3\nsweep: {list: {a: {}}}\n", "run_dir is 3; it must"),
    "a base of another type": ("base: 3\nsweep: {list: {a: {}}}\n", "base is 3; it must be a path"),
    "a grid that is a list": ("sweep: {grid: [1]}\n", "grid must map flags to lists of values"),
    "a name that leaves the folder": ("sweep: {list: {../a: {}}}\n", "write it without /"),
    "a malformed file": ("sweep: [\n", "sweep sweep.yaml: line 2, column 1: "),
}


@pytest.mark.parametrize(("text", "message"), SWEEPS.values(), ids=SWEEPS)
def test_a_malformed_sweep_is_one_line(call, tmp_path, text, message):
    (tmp_path / "sweep.yaml").write_text(text)
    check(call, tmp_path, ["sweep", "sweep.yaml"], message)


def file_at(path: Path) -> None:
    path.write_text("x")


def below_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_text("x")


def loop_at(path: Path) -> None:
    path.symlink_to(path.name)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def with_folder(name: str):
    return lambda path: (path / name).mkdir(parents=True)


def with_config(content: bytes):
    def put(path: Path) -> None:
        path.mkdir()
        (path / "config.yaml").write_bytes(content)

    return put


OBSTACLES = {
    "a file": (file_at, "run_dir: runs/a is a file; choose another run_dir"),
    "below a file": (below_a_file, "run_dir: runs/a cannot be a folder (Not a directory)"),
    "a loop": (loop_at, "run_dir: runs/a cannot be a folder (Too many levels of symbolic links)"),
    "a dangling link": (link_to_nothing, "run_dir: runs/a is a link to nothing; choose another"),
    "config.yaml as a folder": (
        with_folder("config.yaml"),
        "runs/a/config.yaml is a folder, where",
    ),
    ".lock as a folder": (with_folder(".lock"), "runs/a/.lock is a folder, where the run writes"),
    "log.txt as a folder": (with_folder("log.txt"), "runs/a/log.txt is a folder, where the run"),
    "a malformed config.yaml": (
        with_config(b"a: [\n"),
        "whose config.yaml is damaged (config runs",
    ),
    "a config.yaml that is a list": (with_config(b"- 1\n"), "whose config.yaml is damaged (config"),
    "a binary config.yaml": (with_config(b"\xff"), "is not UTF-8 text (byte 0); save it as UTF-8"),
}


@pytest.mark.parametrize(("put", "message"), OBSTACLES.values(), ids=OBSTACLES)
def test_what_is_in_the_way_of_the_run_directory_is_named(call, tmp_path, put, message):
    tiny.write_config(tmp_path / "tiny.yaml", run_dir="runs/a")
    (tmp_path / "runs").mkdir()
    put(tmp_path / "runs/a")
    check(call, tmp_path, ["train", "tiny.yaml"], message)
    sweep = {"base": "tiny.yaml", "run_dir": "runs", "sweep": {"list": {"a": {}}}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    code, _, error = call(tiny.remoe, tmp_path, "sweep", "sweep.yaml")
    assert code == 2 and error.splitlines()[0] == "error: sweep.yaml: nothing was started"


def test_a_folder_of_checkpoints_that_cannot_be_made_is_named(call, tmp_path):
    tiny.write_config(tmp_path / "tiny.yaml", save="tiny.yaml/x")
    check(call, tmp_path, ["train", "tiny.yaml"], "save: tiny.yaml/x cannot be a folder (Not a dir")


# Everything is imported before, since another user may not be able to read it.
# wandb, which Megatron imports, could not delete the scratch folder that it made as root.
AS_ANOTHER_USER = """
import contextlib, io, os, sys
sys.modules["wandb"] = None
from megatron.remoe.cli.app import main
with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
    main(["train", "tiny.yaml", "run_dir=tiny.yaml"])
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
main(["train", "tiny.yaml"])
"""


@pytest.mark.processes
@pytest.mark.parametrize("place", ["run_dir", "metrics.jsonl"])
def test_a_read_only_run_directory_is_named_for_another_user_than_root(tmp_path, place):
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:  # pytest makes its folders for their owner only
        if parent.name.startswith(("pytest-", "popen-")):
            parent.chmod(0o755)
    tiny.write_config(tmp_path / "tiny.yaml", run_dir="runs/a")
    run_dir = tmp_path / "runs/a"
    run_dir.mkdir(parents=True)
    if place == "metrics.jsonl":
        run_dir.chmod(0o777)
        (run_dir / place).write_text("")
        (run_dir / place).chmod(0o444)
    else:
        run_dir.chmod(0o555)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", AS_ANOTHER_USER],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    named = {"run_dir": "runs/a", "metrics.jsonl": "runs/a/metrics.jsonl"}[place]
    line = f"error: run_dir: {named} cannot be written by this user; choose another run_dir\n"
    assert (done.returncode, done.stderr) == (2, line)
    assert sorted(tmp_path.rglob("*")) == before


def write_run(path: Path, lines: list[str]) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("num_layers: 2\n")
    (path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return path


ROW = json.dumps({"iteration": 1, "lm_loss": 2.0, "tokens": 8, "tokens_per_second": 8.0})
DAMAGED = {
    "cut": (ROW[:20], "line 2: it is not JSON ("),
    "a list": ("[1]", "line 2: it is neither a step nor an evaluation"),
    "no step": ('{"lm_loss": 1.0}', "line 2: it is neither a step nor an evaluation"),
    "no loss": ('{"iteration": 2, "lm_loss": "x"}', "line 2: its lm_loss is no number"),
}


@pytest.mark.parametrize(("line", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_line_of_metrics_is_named(call, tmp_path, line, message):
    write_run(tmp_path / "run", [ROW, line, ROW])
    for command in ("compare", "plot"):
        error = check(call, tmp_path, [command, "run"], f"run/metrics.jsonl, {message}")
        assert "delete the line, or restore the file" in error


@pytest.mark.parametrize("margin", ["0", "-0.05", "nan"])
def test_a_margin_of_equivalence_that_is_no_positive_number_is_one_line(call, tmp_path, margin):
    write_run(tmp_path / "run", [ROW])
    arguments = ["compare", "run", "--out", "table", "--margin", margin]
    check(call, tmp_path, arguments, f"the margin is {margin}; it must be above 0, in nats of")
    assert not (tmp_path / "table").exists()


def test_other_damaged_files_of_a_run_are_named(call, tmp_path):
    run = write_run(tmp_path / "run", [ROW])
    (run / "evaluation.json").write_text("{")
    check(
        call, tmp_path, ["compare", "run"], "run/evaluation.json is not what remoe evaluate writes"
    )
    (run / "config.yaml").write_text("a: [\n")
    check(call, tmp_path, ["compare", "run"], "run/config.yaml is not YAML (")
    (run / "config.yaml").write_text("- a\n")
    check(call, tmp_path, ["plot", "run"], "run/config.yaml does not map flags to values; restore")


def test_the_flags_of_a_file_come_after_its_bases_and_overrides_last(tmp_path):
    from megatron.remoe.run.config import load_config

    (tmp_path / "base.yaml").write_text("lr: 1\nseed: 1\nmin_lr: 1\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\nlr: 2\nbf16: true\n")
    assert list(load_config(tmp_path / "run.yaml", ["seed=2"]).flags) == [
        "min_lr", "lr", "bf16", "seed",
    ]  # fmt: skip


def test_every_default_of_the_parser_passes_the_tables(call):
    assert call(defaults) > 700


def defaults() -> int:
    import argparse

    from megatron.remoe import ranges, unsupported
    from megatron.remoe.arguments import megatron_parser

    parser = megatron_parser()
    args = argparse.Namespace(**{a.dest: parser.get_default(a.dest) for a in parser._actions})
    ranges.check(args, parser)
    unsupported.check(args, parser)
    return len(vars(args))


def test_building_a_run_leaves_no_state_behind(call, tmp_path):
    """Neither in torch.distributed nor in Megatron, nor in the generators; and once is enough."""
    tiny.write_config(tmp_path / "tiny.yaml", hidden_size=48)
    assert call(state_around_a_check, tmp_path / "tiny.yaml")


def state_around_a_check(path: Path) -> bool:
    import torch
    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.training import global_vars

    from megatron.remoe.arguments import megatron_parser
    from megatron.remoe.run import plan, rehearsal
    from megatron.remoe.run.argv import to_argv
    from megatron.remoe.run.check import check
    from megatron.remoe.run.config import load_config

    def state() -> tuple:
        return (
            torch.distributed.get_world_size(),
            parallel_state.is_initialized(),
            num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR,
            global_vars._GLOBAL_ARGS,
            torch.get_rng_state().sum().item(),
            torch.cuda.current_device(),
        )

    argv = to_argv(plan.complete(load_config(path)).flags, megatron_parser())
    before = state()
    built = len(rehearsal._passed)
    for seed in ("1", "2"):
        check([*argv, "--seed", seed], 1)
    return state() == before and len(rehearsal._passed) == built + 1


def test_a_child_leaves_the_garbage_of_its_parent_alone(call):
    """Process groups that nobody refers to would wait for their threads, which a fork has not."""
    assert call(rehearsal_beside_garbage) == "accepted"


def rehearsal_beside_garbage() -> str:
    import gc
    from argparse import Namespace

    import torch.distributed.distributed_c10d as c10d

    from megatron.remoe.ranks import initialize_layout
    from megatron.remoe.run import rehearsal

    gc.disable()
    try:
        for _ in range(3):
            initialize_layout()
            garbage: list[object] = list(c10d._world.pg_map)
            garbage.append(garbage)
            del garbage
        initialize_layout()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rehearsal, "_build", lambda *_: gc.collect())
            patch.setattr(rehearsal, "_passed", set())
            rehearsal.rehearse(Namespace(world_size=1))
    except ValueError as error:
        return str(error)
    finally:
        gc.enable()
    return "accepted"


def test_a_child_that_dies_of_a_signal_is_replaced_by_a_new_process(call, tmp_path):
    tiny.write_config(tmp_path / "tiny.yaml", hidden_size=56)
    assert call(answer_beside_a_child_that_dies, tmp_path / "tiny.yaml") == "accepted"


def answer_beside_a_child_that_dies(path: Path) -> str:
    from megatron.remoe.arguments import megatron_parser
    from megatron.remoe.run import plan, rehearsal
    from megatron.remoe.run.argv import to_argv
    from megatron.remoe.run.check import check as check_argv
    from megatron.remoe.run.config import load_config

    argv = to_argv(plan.complete(load_config(path)).flags, megatron_parser())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "_build", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        try:
            check_argv(argv, 1)
        except ValueError as error:
            return str(error)
    return "accepted"


def test_a_run_with_dropout_is_accepted(call, tmp_path):
    tiny.write_config(tmp_path / "tiny.yaml", hidden_dropout=0.1, attention_dropout=0.1)
    assert call(state_around_a_check, tmp_path / "tiny.yaml")


def test_a_machine_with_gpus_builds_the_run_in_a_new_process(call, tmp_path):
    tiny.write_config(tmp_path / "tiny.yaml", hidden_size=40)
    good, bad = call(answers_of_a_new_process, tmp_path / "tiny.yaml")
    assert good == "" and bad.startswith("emerging-optimizers package is required for")


def answers_of_a_new_process(path: Path) -> list[str]:
    """What `rehearse` says where `cpu` does not stand in: of this config, and of an optimizer."""
    from megatron.remoe import cpu
    from megatron.remoe.arguments import megatron_parser
    from megatron.remoe.run import plan, rehearsal
    from megatron.remoe.run.argv import to_argv
    from megatron.remoe.run.check import check as check_argv
    from megatron.remoe.run.config import load_config

    answers: list[str] = []
    argv = to_argv(plan.complete(load_config(path)).flags, megatron_parser())
    args = check_argv(argv, 1)
    rehearsal._passed.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "is_enabled", lambda: False)
        for optimizer in ("adam", "muon"):
            args.optimizer = optimizer
            try:
                rehearsal.rehearse(args)
                answers.append("")
            except ValueError as error:
                answers.append(str(error))
    return answers


def test_a_run_whose_summary_cannot_be_read_has_still_ended_well(call, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("lr: 1\n")
    (tmp_path / "run/metrics.jsonl").write_text("")
    assert "has no training step yet" in call(summary_of, tmp_path / "run")
    with pytest.raises(ValueError, match="has no training step yet"):
        Run.load(tmp_path / "run")


def summary_of(run_dir: Path) -> str:
    import io

    from rich.console import Console

    from megatron.remoe.run import progress

    console = Console(file=io.StringIO(), width=500)
    progress.summarize(run_dir, console)
    return console.file.getvalue()
