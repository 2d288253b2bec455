"""Sweeps: one YAML file that describes many named runs, each with a normal run directory.

base: ../quickstart.yaml      # a config, or several, as in any config; other keys are flags too
run_dir: runs/routers         # the folder of the runs
sweep:
  list:                       # named settings, and/or
    topk: {moe_relu_routing: false}
    remoe: {}
  grid:                       # values of flags: every combination, with every name of the list
    seed: [1, 2, 3]
"""

import itertools
from argparse import Namespace
from collections.abc import Collection
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron.remoe.arguments import megatron_parser
from megatron.remoe.run import rundir
from megatron.remoe.run.argv import to_argv
from megatron.remoe.run.check import check_parser
from megatron.remoe.run.config import RunConfig, bases_of, load_flags, read_yaml
from megatron.remoe.run.plan import Place, plan, resolve

_KEYS = ("list", "grid")


def is_sweep(path: Path) -> bool:
    """Return whether a file is a sweep, and no config.

    Raises:
        ValueError: The file is missing or malformed.
    """
    return "sweep" in read_yaml(path)


@dataclass(frozen=True)
class SweepRun:
    """A run of a sweep: its name, completed config, command line, and Megatron's arguments."""

    name: str
    config: RunConfig
    argv: list[str]
    args: Namespace


def load_sweep(
    path: Path, *, only: str | None = None, place: Place | None = None
) -> list[SweepRun]:
    """Read a sweep and check every run of it.

    Args:
        path: The sweep's file.
        only: A pattern (`*`, `?`) that names must match, or a part of them.
        place: Where each run will run; None is this machine.

    Raises:
        ValueError: Runs are wrong; everything that is wrong in any of them is named, a line each.
    """
    place = place or Place()
    document = read_yaml(path, "sweep")
    settings = _settings(path, document.pop("sweep", None))
    run_dir = document.pop("run_dir", None)
    if not isinstance(run_dir, str | None):
        raise ValueError(f"{path}: run_dir is {run_dir!r}; it must be the path of a folder")
    folder = Path(run_dir or Path("runs") / path.stem)
    names = [name for name in settings if only is None or _matches(name, only)]
    if not names:
        raise ValueError(f"no run of {path} matches {only!r}; it has {', '.join(settings)}")
    problems: dict[str, list[str]] = {}
    missing = _missing_bases(path, document, [settings[name] for name in names])
    for base in missing:
        problems[f"base {base} does not exist; correct the path"] = []
    runs = []
    for name in names:
        flags = document | settings[name]
        run, found = _check_run(path, name, folder / name, flags, missing, place)
        for problem in found:
            problems.setdefault(problem, []).append(name)
        if run is not None:
            runs.append(run)
    if problems:
        lines = [f"{text}{_where(names_)}" for text, names_ in problems.items()]
        raise ValueError(f"{path}: nothing was started\n  " + "\n  ".join(lines))
    return runs


def _settings(path: Path, sweep: Any) -> dict[str, dict[str, Any]]:
    """Return the flags of every run by its name."""
    if not isinstance(sweep, dict) or not sweep or set(sweep) - set(_KEYS):
        raise ValueError(f"{path}: sweep must have the keys list or grid, or both; it is {sweep!r}")
    named, grid = sweep.get("list") or {"": {}}, sweep.get("grid") or {}
    if not isinstance(named, dict):
        raise ValueError(f"{path}: list must map names to flags; it is {named!r}")
    if not isinstance(grid, dict):
        raise ValueError(f"{path}: grid must map flags to lists of values; it is {grid!r}")
    for name, flags in named.items():
        if "/" in str(name) or name in (".", ".."):
            raise ValueError(f"{path}: {name!r} names a run and its folder; write it without /")
        if not isinstance(flags, dict | None):
            raise ValueError(f"{path}: the flags of {name!r} are {flags!r}; write a mapping")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{path}: grid must map {key} to a list of values; it is {values!r}")
    settings = {}
    for (name, flags), *pairs in itertools.product(
        named.items(), *([(key, value) for value in values] for key, values in grid.items())
    ):
        varied = [f"{key}={_short(value)}" for key, value in pairs]
        full = "-".join([*([str(name)] if name else []), *varied])
        if full in settings:
            raise ValueError(f"{path}: two runs would be named {full}; change a value or a name")
        settings[full] = (flags or {}) | dict(pairs)
    return settings


def _short(value: Any) -> str:
    return str(value).replace("/", "_").replace(" ", "")


def _matches(name: str, pattern: str) -> bool:
    return pattern in name or fnmatchcase(name, pattern)


def _missing_bases(
    path: Path, document: dict[str, Any], settings: list[dict[str, Any]]
) -> list[str]:
    named = [b for flags in (document, *settings) for b in bases_of(flags.get("base"), path)]
    return [b for b in dict.fromkeys(named) if not (path.parent / b).is_file()]


def _check_run(
    path: Path,
    name: str,
    run_dir: Path,
    flags: dict[str, Any],
    missing: Collection[str],
    place: Place,
) -> tuple[SweepRun | None, list[str]]:
    """Return the run, or None if something is wrong with it, and everything that is wrong."""
    named = bases_of(flags.get("base"), path)
    bases = [str(path.parent / base) for base in named if base not in missing]
    own = {k: v for k, v in flags.items() if k != "base"}
    try:
        config = load_flags({"base": bases} | own | {"run_dir": str(run_dir)}, f"{path}")
    except ValueError as error:
        return None, [str(error)]
    parser, problems, known = megatron_parser(), [], {}
    for key, value in config.flags.items():
        try:
            to_argv({key: value}, parser)
            known[key] = value
        except ValueError as error:
            problems.append(str(error))
    config = replace(config, flags=known)
    try:
        if len(bases) == len(named):
            planned = plan(config, place)
            if place.purpose != "describe":
                rundir.refuse_another_run(planned.config)
            if not problems:
                return SweepRun(name, planned.config, planned.argv, planned.args), []
        else:  # Without its base Megatron would miss half of the model, so we only parse the rest.
            check_parser(resolve(config, place)[1])
    except ValueError as error:
        problems.append(str(error))
    return None, problems


def _where(names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f" (in {shown})"
