"""What an interrupted adoption needs to go on: a folder beside its output."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from megatron.remoe.files import hold_folder, read_json_object, write_whole

_SETTINGS, _STATE = "settings.json", "state.pt"


class Saved:
    """The folder `.OUT.adopting` of an adoption that is running, or was interrupted.

    Args:
        folder: the folder, which this process holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> dict[str, Any] | None:
        """Return the last state; None if there is none."""
        file = self.folder / _STATE
        if not file.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds of errors for a damaged file
            raise ValueError(
                f"{file} cannot be read ({type(error).__name__}); delete {self.folder}, which "
                f"starts anew"
            ) from error
        return state

    def write(self, state: dict[str, Any]) -> None:
        """Replace the state in one step."""
        partial = self.folder / f"{_STATE}.partial"
        torch.save(state, partial)
        partial.replace(self.folder / _STATE)

    def remove(self) -> None:
        """Remove the folder, once the output is in its place; its state first."""
        (self.folder / _STATE).unlink(missing_ok=True)
        shutil.rmtree(self.folder)


def discard_finished(out: Path, record: Path) -> None:
    """Remove the state of an adoption that was stopped after its output was in its place.

    Args:
        out: the folder that was made.
        record: a file of it, which is older than the state of an adoption that replaces it.
    """
    folder = _beside(out)
    state = folder / _STATE
    if not (record.is_file() and folder.is_dir()):
        return
    if state.is_file() and state.stat().st_mtime_ns > record.stat().st_mtime_ns:
        return
    with suppress(BlockingIOError), hold_folder(folder):
        Saved(folder).remove()


@contextmanager
def saved_beside(out: Path, settings: dict[str, Any], *, force: bool) -> Iterator[Saved]:
    """Yield the folder of an adoption, which stays after an error that comes after a first state.

    Args:
        out: the folder to make.
        settings: all that decides about the result, as JSON.
        force: whether to start anew if the settings are others.

    Raises:
        ValueError: another process adopts there, or an adoption with other settings was
            interrupted there.
    """
    folder = _beside(out)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    is_ours = False
    try:
        with hold_folder(folder):
            is_ours = True
            _check(folder, settings, out, force)
            yield Saved(folder)
    except BlockingIOError:
        raise ValueError(
            f"{out} is being made by another process; wait for it, or choose another folder"
        ) from None
    finally:
        if is_ours and folder.is_dir() and not (folder / _STATE).is_file():
            shutil.rmtree(folder)
            for path in created[1:]:
                if not any(path.iterdir()):
                    path.rmdir()


def _beside(out: Path) -> Path:
    target = Path(os.path.abspath(out))
    return target.with_name(f".{target.name}.adopting")


def _check(folder: Path, settings: dict[str, Any], out: Path, force: bool) -> None:
    """Compare the settings with those of an interrupted adoption, or write them."""
    file = folder / _SETTINGS
    text = json.dumps(settings, indent=2, sort_keys=True)
    if not (folder / _STATE).is_file():
        write_whole(file, text)
        return
    before, now = read_json_object(file, f"delete {folder} to start anew"), json.loads(text)
    different = [name for name in now if before.get(name) != now[name]]
    if different and force:
        (folder / _STATE).unlink()
        write_whole(file, text)
    elif different:
        name = different[0]
        raise ValueError(
            f"an adoption to {out} with {name} {before.get(name)!r} was interrupted, and now "
            f"{name} is {now[name]!r}; repeat the former command to go on, or start anew (--force)"
        )
