"""Outputs appear whole or not at all, also with other writers and after a kill at any moment."""

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.remoe.convert.output import new_folder
from megatron.remoe.files import hold_folder, output_folder, parse_json, read_json_object


def status_of(work: Callable[[], object]) -> int:
    """Return the negative signal that ends a forked process which does the work, or 0."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def make(
    out: Path, text: str = "new", *, force: bool = False, reads: tuple[Path, ...] = ()
) -> None:
    with new_folder(out, reads=reads, force=force) as folder:
        (folder / "config.json").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.processes
def test_a_folder_that_a_kill_left_is_cleared_by_the_next_call(tmp_path):
    out = tmp_path / "out"

    def killed() -> None:
        with new_folder(out, reads=()) as folder:
            (folder / "half").write_text("x" * 1000)
            die()

    assert status_of(killed) == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".out.partial-")
    make(out)
    assert names(tmp_path) == ["out"] and names(out) == ["config.json"]


@pytest.mark.processes
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_while_a_folder_is_replaced_loses_neither(tmp_path, monkeypatch, renames):
    """Kill before the old folder moves, before the new one is there, or before the old is gone."""
    out, rename, done = tmp_path / "out", Path.rename, [0]
    make(out, "old")

    def counted(self: Path, target: Path) -> Path:
        if done[0] == renames:
            die()
        done[0] += 1
        return rename(self, target)

    def killed() -> None:
        monkeypatch.setattr(Path, "rename", counted)
        monkeypatch.setattr("shutil.rmtree", die)
        make(out, force=True)

    assert status_of(killed) == -signal.SIGKILL
    with pytest.raises(ValueError, match="is not empty"):
        make(out)
    assert (out / "config.json").read_text() == ("old" if renames < 2 else "new")
    make(out, "newer", force=True)
    assert names(tmp_path) == ["out"] and (out / "config.json").read_text() == "newer"


def test_ctrl_c_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "deep/out", reads=()) as folder:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_two_makers_of_a_folder(tmp_path):
    """The second one is refused at its start, and what has appeared meanwhile is never replaced."""
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="something has appeared there meanwhile"):  # noqa: SIM117
        with new_folder(out, reads=()) as folder:
            (folder / "config.json").write_text("mine")
            with pytest.raises(ValueError, match="is being made by another process"):
                make(out)
            out.mkdir()
            (out / "theirs").write_text("kept")
    assert names(tmp_path) == ["out"] and (out / "theirs").read_text() == "kept"


KEPT = {
    "what is read": lambda home: home / "model",
    "above what is read": lambda home: home,
    "by another path": lambda home: home / "model/../model",
    "the working directory": lambda home: Path("."),
    "above the working directory": lambda home: Path(".."),
}


@pytest.mark.parametrize("out", KEPT.values(), ids=KEPT)
def test_force_replaces_nothing_that_must_stay(tmp_path, monkeypatch, out):
    (tmp_path / "model/sub").mkdir(parents=True)
    (tmp_path / "model/config.json").write_text("kept")
    monkeypatch.chdir(tmp_path / "model/sub")
    with pytest.raises(ValueError, match="which must stay; choose another folder"):
        make(out(tmp_path), force=True, reads=(tmp_path / "model",))
    assert (tmp_path / "model/config.json").read_text() == "kept"


def test_force_replaces_only_what_a_conversion_made(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="was not made by a conversion"):
        make(tmp_path / "run", force=True)
    assert (tmp_path / "run/checkpoints").is_dir()


@pytest.mark.parametrize("name", ["file/out", "x" * 300, "x" * 250])
def test_a_name_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").write_text("kept")
    with pytest.raises((ValueError, OSError)):
        make(tmp_path / name)
    assert names(tmp_path) == ["file"]


def test_an_output_folder_has_one_writer(tmp_path):
    out = tmp_path / "deep/out"
    with (
        output_folder(out),
        pytest.raises(ValueError, match="is being written by another process"),
        output_folder(out),
    ):
        pass
    assert names(tmp_path) == []  # nothing was written
    with hold_folder(tmp_path) as held:
        assert held


def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / ".partial-abc").mkdir()
    (tmp_path / ".partial-abc/half").write_text("x")
    (tmp_path / ".partial-manifest.json").write_text("{")
    (tmp_path / "mine").write_text("kept")
    with output_folder(tmp_path):
        assert names(tmp_path) == ["mine"]


BAD_JSON = {
    "empty": (b"", "Expecting value"),
    "cut off": (b'{"a": [1, 2', "Expecting"),
    "not UTF-8": (b'{"a": "\xff"}', "can't decode byte 0xff"),
    "NUL": (b"\0" * 20, "Expecting value"),
    "NaN": (b'{"a": NaN}', "NaN is no number"),
    "infinity": (b'{"a": 1e999}', "1e999 is no number"),
    "a key twice": (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there more than once"),
    "nested": (b'{"a":' * 100_000, "nested too deeply"),
    "list": (b"[1]", "holds no JSON object, but a list"),
    "null": (b"null", "holds no JSON object, but a NoneType"),
}


@pytest.mark.parametrize(("data", "reason"), BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_is_one_line_with_its_reason(tmp_path, data, reason):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=reason) as caught:
        read_json_object(path, "copy it again")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("copy it again")


def test_good_json():
    assert parse_json('{"a": [1, 2.5, "ö", null]}'.encode()) == {"a": [1, 2.5, "ö", None]}
