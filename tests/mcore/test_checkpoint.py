"""Which checkpoint is whole, which one a run continues from, and which ones stay."""

import hashlib
import json
import os
import time
from argparse import Namespace
from pathlib import Path

import pytest

from megatron.remoe import checkpoint
from megatron.remoe.cli.app import main
from megatron.remoe.train import resume
from tests.mcore import tiny


def make(folder: Path, iteration: int, *, complete: bool = True, manifest: bool = True) -> Path:
    """A checkpoint as Megatron writes it, with a few bytes of data."""
    path = folder / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    files = {"__0_0.distcp": f"data of {iteration}", ".metadata": "where it is"}
    files |= {"metadata.json": "{}"} if complete else {}
    for name, text in files.items():
        (path / name).write_text(text)
    if manifest and complete:
        hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
        content = {"algorithm": "sha256", "files": hashes}
        (path / "integrity.json").write_text(json.dumps(content))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four checkpoints, of which the last is the tracker's."""
    folder = tmp_path / "checkpoints"
    for iteration in (2, 4, 6, 8):
        make(folder, iteration)
    checkpoint.write_tracker(folder, 8)
    return folder


def chosen(folder: Path, *, need_manifest: bool = True) -> tuple[int | None, list[str]]:
    warnings: list[str] = []
    found = checkpoint.choose(folder, need_manifest=need_manifest, warn=warnings.append)
    return found and found.iteration, warnings


def names(folder: Path) -> list[int]:
    return [found.iteration for found in checkpoint.find(folder)]


def test_the_trackers_checkpoint_is_chosen_when_it_is_whole(folder):
    assert chosen(folder) == (8, [])
    checkpoint.write_tracker(folder, 4)  # turned back by the user
    assert chosen(folder) == (4, [])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def test_a_damaged_one_is_named_and_the_best_other_one_chosen(folder):
    flip(folder / "iter_0000008/__0_0.distcp")
    os.truncate(folder / "iter_0000006/.metadata", 3)
    (folder / "iter_0000004/metadata.json").write_text("{ ")
    assert chosen(folder) == (
        2,
        [
            f"checkpoint {folder}/iter_0000008 is damaged: __0_0.distcp has changed since it was "
            f"written",
            f"checkpoint {folder}/iter_0000006 is damaged: .metadata has changed since it was "
            f"written",
            f"checkpoint {folder}/iter_0000004 is damaged: metadata.json has changed since it was "
            f"written",
        ],
    )


def test_a_missing_file_and_a_damaged_manifest_are_damage(folder):
    (folder / "iter_0000008/__0_0.distcp").unlink()
    (folder / "iter_0000006/integrity.json").write_text("[")
    found, warnings = chosen(folder)
    assert found == 4
    assert "__0_0.distcp cannot be read (No such file or directory)" in warnings[0]
    assert "integrity.json is not readable" in warnings[1]


@pytest.mark.parametrize("content", ["", "1\x00", "abc", None])
def test_without_a_usable_tracker_the_newest_whole_one_is_chosen(folder, content):
    if content is None:
        (folder / checkpoint.TRACKER).unlink()
    else:
        (folder / checkpoint.TRACKER).write_text(content)
    make(folder, 10, complete=False)
    make(folder, 12, manifest=False)  # killed between data and hashes
    assert chosen(folder) == (8, [])


def test_older_ones_are_preferred_to_newer_ones_of_a_run_that_was_turned_back(folder):
    checkpoint.write_tracker(folder, 4)
    flip(folder / "iter_0000004/__0_0.distcp")
    assert chosen(folder)[0] == 2


def test_none_is_whole(folder):
    for found in checkpoint.find(folder):
        flip(found.path / "__0_0.distcp")
    with pytest.raises(ValueError, match="no checkpoint in .* is whole, so the run cannot continu"):
        chosen(folder)


def test_checkpoints_that_have_gone_do_not_start_the_run_anew(tmp_path):
    checkpoint.write_tracker(tmp_path, 8)
    with pytest.raises(ValueError, match="restore one from a copy, or move .* away to start from"):
        chosen(tmp_path)


def test_a_first_save_that_was_killed_starts_the_run_anew(tmp_path):
    make(tmp_path, 2, complete=False)
    make(tmp_path, 4, manifest=False)
    assert chosen(tmp_path) == (None, [])


def test_without_a_manifest_a_checkpoint_is_used_only_when_asked_to(tmp_path):
    make(tmp_path, 2, manifest=False)
    checkpoint.write_tracker(tmp_path, 2)
    with pytest.raises(ValueError, match=r"cannot be verified; continue .*verify_integrity=false"):
        chosen(tmp_path)
    assert chosen(tmp_path, need_manifest=False) == (2, [])


def arguments(folder: Path, **changes) -> Namespace:
    """What `prepare` reads of Megatron's arguments."""
    args = Namespace(rank=0, save=str(folder), load=str(folder), ckpt_step=None, **changes)
    args.verify_integrity = True
    return args


def test_a_run_repairs_the_tracker_and_deletes_killed_saves(folder, capsys):
    flip(folder / "iter_0000008/__0_0.distcp")
    make(folder, 10, complete=False)
    assert resume.prepare(arguments(folder)) == folder / "iter_0000006"
    assert checkpoint.tracked(folder) == 6
    assert names(folder) == [2, 4, 6, 8]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"remoe: warning: checkpoint {folder}/iter_0000008 is damaged: ")
    assert lines[1] == f"remoe: continuing from {folder}/iter_0000006"
    assert lines[2] == "remoe: warning: continuing from iteration 6 instead"


def test_another_runs_checkpoints_are_left_as_they_are(folder, tmp_path):
    flip(folder / "iter_0000008/__0_0.distcp")
    make(folder, 10, complete=False)
    args = arguments(folder)
    args.save = str(tmp_path / "mine")
    with pytest.raises(ValueError, match="pass ckpt_step=6 to load the last one that is whole"):
        resume.prepare(args)
    assert checkpoint.tracked(folder) == 8 and names(folder) == [2, 4, 6, 8, 10]


def test_a_named_checkpoint_must_exist_and_be_whole(folder):
    flip(folder / "iter_0000004/__0_0.distcp")
    for step, message in ((3, r"no iteration 3 \(it has 2, 4, 6, 8\)"), (4, "is damaged: __0_0")):
        args = arguments(folder)
        args.ckpt_step, args.save = step, None
        with pytest.raises(ValueError, match=message):
            resume.prepare(args)


def test_only_rank_zero_looks(folder):
    flip(folder / "iter_0000008/__0_0.distcp")
    args = arguments(folder)
    args.rank = 1
    assert resume.prepare(args) is None
    assert checkpoint.tracked(folder) == 8


def test_the_last_ones_and_milestones_stay(folder):
    make(folder, 10)  # in progress: its tracker is not written
    kept = {"keep_last": 1, "milestone_interval": 4}
    assert [c.iteration for c in checkpoint.prune(folder, **kept, dry_run=True)] == [2, 6]
    assert names(folder) == [2, 4, 6, 8, 10]
    checkpoint.prune(folder, **kept)
    assert names(folder) == [4, 8, 10]
    checkpoint.prune(folder, keep_last=1)
    assert names(folder) == [8, 10]


def test_pruning_waits_for_a_tracker_and_counts_complete_ones(folder):
    make(folder, 7, complete=False)
    (folder / checkpoint.TRACKER).unlink()
    assert checkpoint.prune(folder, keep_last=1) == []
    checkpoint.write_tracker(folder, 8)
    checkpoint.prune(folder, keep_last=2)
    assert names(folder) == [6, 7, 8]


def test_a_run_prunes_while_it_goes_on_and_at_its_end(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "_SECONDS_BETWEEN_PRUNES", 0.01)
    args = arguments(folder, save_keep_last=2, save_milestone_interval=None)
    with checkpoint.retention(args):
        end = time.monotonic() + 60
        while names(folder) != [6, 8] and time.monotonic() < end:
            time.sleep(0.01)
        assert names(folder) == [6, 8]
        make(folder, 10)
        checkpoint.write_tracker(folder, 10)
    assert names(folder) == [8, 10]


def run_cli(capsys, *argv: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    return end.value.code, capsys.readouterr().out


def test_the_command_lists_verifies_and_prunes(folder, capsys):
    run = folder.parent
    (run / "config.yaml").write_text("run_dir: run\n")
    make(folder, 10, complete=False)
    code, out = run_cli(capsys, "checkpoint", "list", str(run))
    assert code == 0 and "complete, the last one" in out and "incomplete" in out
    assert run_cli(capsys, "checkpoint", "verify", str(run))[0] == 0
    flip(folder / "iter_0000004/__0_0.distcp")
    code, out = run_cli(capsys, "checkpoint", "verify", str(run))
    assert code == 1
    states = [line.partition(": ")[2] for line in out.splitlines()]
    damaged = "damaged: __0_0.distcp has changed since it was written"
    assert states == ["ok", damaged, "ok", "ok", "incomplete: its save did not end, or goes on"]
    code, out = run_cli(capsys, "checkpoint", "prune", str(folder), "--keep-last", "1")
    assert code == 0 and names(folder) == [8, 10]
    assert out.splitlines()[-1] == f"2 checkpoints stay in {folder}"


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["checkpoint", "list", str(tmp_path)])
    assert end.value.code == 2
    assert "is neither a run directory" in capsys.readouterr().err


def test_without_save_a_failure_keeps_its_error(folder):
    args = arguments(folder)
    args.save = None
    with pytest.raises(RuntimeError, match="the real one"), resume.explained(args):
        raise RuntimeError("the real one")


def test_flags_of_checkpoints(call):
    def refusal(*flags: str) -> str:
        return call(tiny.parse, *flags)[1]

    assert "use_persistent_ckpt_worker is set, but on a CPU" in refusal(
        "--async-save", "--use-persistent-ckpt-worker"
    )
    assert "save_keep_last is 0; it must be at least 1" in refusal("--save-keep-last", "0")
    few = ["--save-keep-last", "2", "--save-interval", "4", "--save-retain-interval"]
    assert "save_retain_interval is 6, no multiple of save_interval 4" in refusal(*few, "6")
    for flags, message in (
        (
            ["--ckpt-format", "torch"],
            "ckpt_format is torch, but runs continue from torch_dist only",
        ),
        (["--ckpt-format", "fsdp_dtensor"], "ckpt_format is fsdp_dtensor, but runs continue from"),
        (["--ckpt-convert-format", "torch"], "ckpt_convert_format is torch, but other formats"),
        (["--auto-detect-ckpt-format"], "auto_detect_ckpt_format is set, but runs continue from"),
        (["--non-persistent-ckpt-type", "global"], "non_persistent_ckpt_type is global, but a run"),
        (["--use-megatron-fsdp"], "use_megatron_fsdp is set, but sharded parameters"),
        (["--use-torch-fsdp2"], "use_torch_fsdp2 is set, but sharded parameters"),
        (["--init-model-with-meta-device"], "init_model_with_meta_device is set, but only FSDP,"),
        (["--moe-use-upcycling"], "moe_use_upcycling is set, but Megatron then builds its dense"),
    ):
        assert refusal(*flags).startswith(f"error: {message}")
    args, _ = call(tiny.parse, *few, "8")
    assert (args["save_milestone_interval"], args["save_retain_interval"]) == (8, None)
    args, _ = call(tiny.parse, "--async-save")
    assert args["fork_async_save"] is True and args["async_strategy"] == "mcore"
    assert args["adam_implementation"] == "torch"
