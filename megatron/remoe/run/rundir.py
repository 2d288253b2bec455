"""A run's directory: what stands in its way, whose it is, its config and its tokenizer."""

import os
import socket
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.remoe import processes
from megatron.remoe.options import PUBLISHED, router_name
from megatron.remoe.run import kept
from megatron.remoe.run.config import METRICS, RUN_CONFIG, RunConfig, read_run_config

_FILES = (RUN_CONFIG, ".lock", "log.txt", METRICS, "curves.png")
_FOLDERS = (
    "save", "data_cache_path", "tensorboard_dir", "wandb_save_dir", "moe_routing_trace_path",
)  # fmt: skip


def check(config: RunConfig) -> None:
    """Check that everything that the run writes can be written, as far as this can be seen.

    Args:
        config: A completed config.

    Raises:
        ValueError: Something is in the way.
    """
    _check_folder("run_dir", config.run_dir)
    for name in _FILES:
        path = config.run_dir / name
        if path.is_dir():
            raise ValueError(
                f"run_dir: {path} is a folder, where the run writes a file; remove it, or choose "
                f"another run_dir"
            )
        if path.exists() and not os.access(path, os.W_OK):
            raise ValueError(
                f"run_dir: {path} cannot be written by this user; choose another run_dir"
            )
    for key in _FOLDERS:
        if config.flags.get(key):
            _check_folder(key, Path(str(config.flags[key])))


def _check_folder(key: str, path: Path) -> None:
    """Raise `ValueError` unless the folder exists and is writable, or can be made."""
    for place in (path, *path.parents):
        try:
            mode = os.stat(place).st_mode
        except FileNotFoundError:
            if not place.is_symlink():
                continue
            reason = "is a link to nothing"
        except (OSError, ValueError) as error:  # It is a ValueError if the path has a NUL in it.
            reason = f"cannot be a folder ({getattr(error, 'strerror', None) or error})"
        else:
            if not stat.S_ISDIR(mode):
                reason = "is a file"
            elif not os.access(place, os.W_OK | os.X_OK):
                reason = "cannot be written by this user"
            else:
                return
        text = str(place) if len(str(place)) < 80 else f"{str(place)[:80]}..."
        raise ValueError(f"{key}: {text} {reason}; choose another {key}")


def refuse_another_run(config: RunConfig) -> None:
    """Raise `ValueError` when the run directory holds a run with other settings."""
    path = config.run_dir / RUN_CONFIG
    if not path.exists():
        return
    try:
        there = read_run_config(config.run_dir)
    except ValueError as error:
        raise ValueError(
            f"{config.run_dir} holds a run whose config.yaml is damaged ({error}); choose another "
            f"run_dir, or continue that run with these settings (--force)"
        ) from None
    there, here = _with_one_key(there), _with_one_key(config.to_dict())
    if kept.is_comparable(config.flags, config.run_dir):
        for key in kept.KEYS:  # The paths may differ, and the files may not.
            there.pop(key, None), here.pop(key, None)
    changed = [k for k in sorted({*there, *here}) if there.get(k) != here.get(k)]
    if changed:
        raise ValueError(
            f"{config.run_dir} holds a run that differs in {', '.join(changed)}; give this one its "
            f"own directory (run_dir=PATH), or continue that run with these settings (--force)"
        )
    kept.refuse_another(config.flags, config.run_dir)


def _with_one_key(flags: dict[str, Any]) -> dict[str, Any]:
    """Return a config in which one key names the router, which three may choose.

    `data_root` is left out, because the paths of the data tell whether they differ.
    """
    left_out = ("moe_routing", "data_root", *PUBLISHED)
    others = {k: v for k, v in flags.items() if k not in left_out}
    return others | ({"moe_routing": router_name(flags)} if flags.get("num_experts") else {})


def write(config: RunConfig) -> None:
    """Write `config.yaml`, and keep the tokenizer's files.

    Each appears in one step, because the machines of a run write them at the same time.
    """
    config.run_dir.mkdir(parents=True, exist_ok=True)
    kept.keep(config.flags, config.run_dir)
    temporary = config.run_dir / f".config.yaml.{socket.gethostname()}.{os.getpid()}"
    flags = kept.as_recorded(config.flags, config.run_dir)
    temporary.write_text(replace(config, flags=flags).to_yaml())
    os.replace(temporary, config.run_dir / RUN_CONFIG)


def hold(run_dir: Path) -> int:
    """Lock the run's directory; return the lock, which is held until it is closed everywhere.

    Raises:
        ValueError: Another process holds the directory.
    """
    return processes.hold_lock(run_dir / ".lock", run_dir)
