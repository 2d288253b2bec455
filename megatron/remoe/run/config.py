"""YAML configs: Megatron's flags with underscores, `base:` inheritance, `key=value` overrides.

A config is a page of flags. Four keys are ours: `base` (a path, or a list of paths, relative to
the file), `run_dir`, `nproc` (processes on this machine), and `data_root`, a variable for the other
values (`${data_root}/01`). Other paths are relative to the working directory, as for Megatron.
"""

import io
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from megatron.remoe.run.mistakes import one_line

OWN_KEYS = ("base", "run_dir", "nproc", "data_root")
_YAML_ERRORS = (OmegaConfBaseException, YAMLError, TypeError, ValueError, RecursionError)
_DEEPEST_BASES = 50
_MOST_PROCESSES = 1024
_MOST_SUSPECTS = 12  # options that are left out, one at a time, to find the one that does not fit
_NEAR = 0.75  # similarity from which another key is suggested


@dataclass(frozen=True)
class RunConfig:
    """A resolved config.

    Attributes:
        run_dir: where everything about the run is written.
        nproc: processes to start on this machine; None is one per GPU, or one.
        flags: Megatron's and our flags, with underscores.
    """

    run_dir: Path
    nproc: int | None
    flags: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"run_dir": str(self.run_dir), "nproc": self.nproc} | self.flags

    def to_yaml(self) -> str:
        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a config, its bases and the overrides, and resolve interpolations.

    `num_experts: null` makes the model dense: every key that only concerns experts is dropped.
    Without `run_dir` the run goes to `runs/<file stem>`, followed by the overrides, so that
    variations of one file do not overwrite each other. The flags of the file itself come after
    those of its bases, and those of the overrides last.

    Raises:
        ValueError: a missing or malformed file, a cycle of bases, an override without `=`.
    """
    overrides = overrides or []
    for override in overrides:
        _check_override(override)
    what = f"{path} with overrides {overrides}" if overrides else f"{path}"
    default_dir = Path("runs") / "-".join([path.stem, *(o.replace("/", "_") for o in overrides)])
    return _resolved(_load(path, ()), overrides, default_dir, what)


def load_flags(flags: dict[str, Any], what: str) -> RunConfig:
    """`load_config` of a mapping, with `run_dir` and absolute paths in `base`.

    Args:
        flags: as in a file.
        what: they are, for the messages.

    Raises:
        ValueError: as `load_config`.
    """
    _check_keys(flags, what)
    bases = [_load(Path(base), ()) for base in bases_of(flags.get("base"), what)]
    own = {key: value for key, value in flags.items() if key != "base"}
    try:
        merged = _merged(bases, OmegaConf.create(own))
    except _YAML_ERRORS as error:
        raise ValueError(f"{what}: {_yaml_problem(error)}") from None
    return _resolved(merged, [], Path("runs"), what)


def _resolved(merged: DictConfig, overrides: list[str], default_dir: Path, what: str) -> RunConfig:
    try:
        changes = OmegaConf.from_dotlist(overrides)
        everything = OmegaConf.merge(merged, changes)
        config = _plain(everything, resolve=True)
    except _YAML_ERRORS as error:
        raise ValueError(f"{what}: {_yaml_problem(error)}") from None
    own = [str(key) for key in changes]
    config = {k: v for k, v in config.items() if k not in changes} | {k: config[k] for k in own}
    if config.get("num_experts") is None:
        config = {k: v for k, v in config.items() if not _concerns_experts(k)}
    config.pop("data_root", None)
    nproc = config.pop("nproc", None)
    if nproc is not None and (type(nproc) is not int or not 1 <= nproc <= _MOST_PROCESSES):
        raise ValueError(
            f"nproc is {nproc!r}; it must be a positive number of processes, at most "
            f"{_MOST_PROCESSES}"
        )
    run_dir = config.pop("run_dir", None)
    if run_dir is not None and (not isinstance(run_dir, str) or not run_dir):
        raise ValueError(f"run_dir is {run_dir!r}; it must be the path of a folder")
    return RunConfig(Path(run_dir or default_dir), nproc, config)


def _check_override(override: str) -> None:
    key, equals, _ = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} is not of the form key=value")
    if key == "base":
        raise ValueError(
            f"override {override!r} comes after the bases are read; write base into a file"
        )
    if not key.isidentifier():
        raise ValueError(
            f"override {override!r} does not name a flag: {key!r} must consist of letters, digits "
            f"and underscores"
        )


def read_yaml(path: Path, what: str = "config") -> dict[str, Any]:
    """A YAML file that maps names to values; interpolations are left as they are.

    Args:
        path: the file.
        what: it is, for the messages.

    Raises:
        ValueError: it is missing or malformed, in one line with the place.
    """
    return _plain(_read_yaml(path, what))


def _read_yaml(path: Path, what: str) -> DictConfig:
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise ValueError(f"{what} {path} does not exist; pass the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} {path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{what} {str(path)!r} cannot be read: {reason}; pass the path of a YAML file"
        ) from None
    try:
        config = OmegaConf.load(io.StringIO(text))
    except _YAML_ERRORS as error:
        raise ValueError(f"{what} {path}: {_yaml_problem(error)}") from None
    except OSError:  # how OmegaConf says that the file is a single value
        config = None
    if not isinstance(config, DictConfig):
        raise ValueError(f"{what} {path} is not a mapping of flags to values")
    _check_keys(config, f"{what} {path}")
    return config


def _plain(config: object, *, resolve: bool = False) -> dict[str, Any]:
    """Return OmegaConf's mapping of flags, whose keys are checked (`_check_keys`), as a dict.

    Args:
        config: of OmegaConf.
        resolve: replace interpolations, and refuse missing values.
    """
    plain = OmegaConf.to_container(config, resolve=resolve, throw_on_missing=resolve)
    return cast(dict[str, Any], plain)


def _check_keys(flags: Iterable[Any], what: str) -> None:
    for key in flags:
        if not isinstance(key, str):
            raise ValueError(f"{what}: the key {key!r} is no name of a flag; correct it")


def _yaml_problem(error: Exception) -> str:
    """One line, with line and column where they are known."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or refers to itself"
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        problem = one_line(error.problem or error.context or "malformed")
        return f"line {mark.line + 1}, column {mark.column + 1}: {problem}; correct the YAML there"
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, OmegaConfBaseException):
        # The lines after the first one describe OmegaConf's own objects.
        key = error.full_key
        return one_line(lines[0]) + (f" (in {key})" if key else "") + "; correct the value"
    return one_line(" ".join(lines)) + "; correct the YAML"


def _load(path: Path, below: tuple[Path, ...]) -> DictConfig:
    real = Path(os.path.realpath(path))
    if real in below:
        chain = " -> ".join(str(p) for p in (*below, real))
        raise ValueError(f"the bases of {path} form a cycle: {chain}")
    if len(below) > _DEEPEST_BASES:
        raise ValueError(
            f"the bases of {below[0]} are more than {_DEEPEST_BASES} files deep at {path}; merge "
            f"some of them"
        )
    config = _read_yaml(path, "config")
    try:
        base = _plain(OmegaConf.create({"base": config.pop("base", None)}))["base"]
    except OmegaConfBaseException as error:
        raise ValueError(f"config {path}: {_yaml_problem(error)}") from None
    loaded = [_load(path.parent / b, (*below, real)) for b in bases_of(base, path)]
    try:
        return _merged(loaded, config)
    except _YAML_ERRORS as error:
        raise ValueError(f"config {path}: {_yaml_problem(error)}") from None


def _merged(bases: list[DictConfig], own: DictConfig) -> DictConfig:
    """A config on top of its bases, with its own keys last."""
    merged = OmegaConf.merge(*bases, own)
    ordered = [str(key) for key in (*(key for key in merged if key not in own), *own)]
    values = _plain(merged)
    return OmegaConf.create({key: values[key] for key in ordered})


def bases_of(base: Any, what: object) -> list[str]:
    """The files that `base:` names.

    Args:
        base: its value.
        what: it is in, for the message.

    Raises:
        ValueError: it is neither a path nor a list of paths.
    """
    bases = [] if base is None else base if isinstance(base, list) else [base]
    if not all(isinstance(one, str) and one for one in bases):
        raise ValueError(f"{what}: base is {base!r}; it must be a path, or a list of paths")
    return bases


def _concerns_experts(key: str) -> bool:
    return key.startswith(("moe_", "expert_")) or key == "num_experts"
