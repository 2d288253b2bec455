"""Read YAML configs: Megatron's flags with underscores, `base:` inheritance, `key=value` overrides.

A config is a page of flags. Four keys are this project's own: `base` (a path, or a list of paths,
relative to the file), `run_dir`, `nproc` (the number of processes on this machine), and
`data_root`, a folder of token files, from which data and tokenizer follow where the config does not
name them (`data.root`). It is also a variable for the other values (`${data_root}/01`). Other paths
are relative to the working directory, as for Megatron.
"""

import contextlib
import functools
import io
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from megatron.remoe.data.root import with_data_root
from megatron.remoe.options import PUBLISHED
from megatron.remoe.run.mistakes import one_line

OWN_KEYS = ("base", "run_dir", "nproc", "data_root")
RUN_CONFIG, METRICS = "config.yaml", "metrics.jsonl"  # in a run directory
_YAML_ERRORS = (OmegaConfBaseException, YAMLError, TypeError, ValueError, RecursionError)
_DEEPEST_BASES = 50
_MOST_PROCESSES = 1024


@dataclass(frozen=True)
class RunConfig:
    """A resolved config.

    Attributes:
        run_dir: The folder to which the run writes everything.
        nproc: Number of processes on this machine. None means one per GPU, or one without GPUs.
        flags: Megatron's flags and those of this project, with underscores.
        data_root: The folder of the token files, if the config names it. The flags have it already.
    """

    run_dir: Path
    nproc: int | None
    flags: dict[str, Any] = field(default_factory=dict)
    data_root: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the config as the mapping that its file holds."""
        root = {} if self.data_root is None else {"data_root": self.data_root}
        return {"run_dir": str(self.run_dir), "nproc": self.nproc} | root | self.flags

    def to_yaml(self) -> str:
        """Return the config as the text of its file."""
        return OmegaConf.to_yaml(OmegaConf.create(self.to_dict()))


def load_config(path: Path, overrides: list[str] | Mapping[str, Any] | None = None) -> RunConfig:
    """Read a config with its bases, apply the overrides, and resolve interpolations.

    `num_experts: null` makes the model dense: every key that only concerns experts is dropped.
    Without `run_dir` the run goes to `runs/<file stem>`, followed by the overrides, so that
    variations of one file do not overwrite each other. The flags of the file itself come after
    those of its bases, and those of the overrides last. The `config.yaml` of a run that was moved
    or copied is that of a run where it is now.

    Args:
        path: The file.
        overrides: Flags that replace those of the file, each as `key=value`, or as a mapping.

    Raises:
        ValueError: A file is missing or malformed, the bases form a cycle, or an override has no
            `=`.
    """
    overrides = overrides or []
    is_mapping = isinstance(overrides, Mapping)
    words = [f"{k}={v}" for k, v in overrides.items()] if is_mapping else list(overrides)
    for word in words:
        _check_override(word)
    what = f"{path} with overrides {words}" if words else f"{path}"
    with _yaml_in_one_line(what):
        changes = OmegaConf.create(dict(overrides)) if is_mapping else _parsed(words)
    default_dir = Path("runs") / "-".join([path.stem, *(w.replace("/", "_") for w in words)])
    config = _load(path, ())
    if path.name == RUN_CONFIG:
        with _yaml_in_one_line(what):
            config = OmegaConf.create(_as_of(path.parent, _plain(config)))
    return _resolve(config, changes, default_dir, what)


def read_run_config(run_dir: Path) -> dict[str, Any]:
    """Read the `config.yaml` of a run, with the paths as they are where the run is now.

    Raises:
        ValueError: The file is missing or malformed.
    """
    return _as_of(run_dir, read_yaml(run_dir / RUN_CONFIG))


def _as_of(folder: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """Return flags with the paths of a run in a folder, if that is a run which was moved there."""
    before = flags.get("run_dir")
    is_run = isinstance(before, str) and (folder / METRICS).is_file()
    if not is_run or flags.get("metrics_file") != str(Path(before or "") / METRICS):
        return flags
    if os.path.realpath(before or "") == os.path.realpath(folder):
        return flags
    return cast(dict[str, Any], _moved(flags, str(before), str(folder)))


def _moved(value: Any, old: str, new: str) -> Any:
    """Return a value, or all values in it, with the paths below one folder below another."""
    if isinstance(value, dict):
        return {key: _moved(one, old, new) for key, one in value.items()}
    if isinstance(value, list):
        return [_moved(one, old, new) for one in value]
    if isinstance(value, str) and (value == old or value.startswith(old.rstrip("/") + "/")):
        return new + value.removeprefix(old.rstrip("/"))
    return value


def load_flags(flags: dict[str, Any], what: str) -> RunConfig:
    """Resolve a mapping as `load_config` resolves a file.

    Args:
        flags: What the file would hold, with `run_dir`, and with absolute paths in `base`.
        what: The name of the mapping in error messages.

    Raises:
        ValueError: As for `load_config`.
    """
    _check_keys(flags, what)
    with _yaml_in_one_line(what):
        config = OmegaConf.create(flags)
    merged = _on_its_bases(config, Path(), (), what)
    return _resolve(merged, OmegaConf.create({}), Path("runs"), what)


def read_yaml(path: Path, what: str = "config") -> dict[str, Any]:
    """Read a YAML file that maps names to values; interpolations are left as they are.

    Args:
        path: The file.
        what: What the file is, for error messages.

    Raises:
        ValueError: The file is missing or malformed, in one line with the place.
    """
    return _plain(_read(path, what))


def bases_of(base: Any, what: object) -> list[str]:
    """Return the files that `base:` names.

    Args:
        base: The value of the key.
        what: Where the key stands, for the error message.

    Raises:
        ValueError: The value is neither a path nor a list of paths.
    """
    bases = [] if base is None else base if isinstance(base, list) else [base]
    if not all(isinstance(one, str) and one for one in bases):
        raise ValueError(f"{what}: base is {base!r}; it must be a path, or a list of paths")
    return bases


def _parsed(overrides: list[str]) -> DictConfig:
    return OmegaConf.from_dotlist([_quoted_pattern(override) for override in overrides])


def _resolve(merged: DictConfig, changes: DictConfig, default_dir: Path, what: str) -> RunConfig:
    with _yaml_in_one_line(what):
        before = merged.get("data_root")
        if before and isinstance(changes.get("data_root"), str):
            moved = _moved(_plain(merged), str(before), changes["data_root"])
            merged = OmegaConf.create(moved)
        config = _plain(_merged(merged, changes), resolve=True)
    last = {str(key): config[str(key)] for key in changes}
    config = {key: value for key, value in config.items() if key not in last} | last
    if config.get("num_experts") is None:
        config = {k: v for k, v in config.items() if not _concerns_experts(k)}
    data_root = config.pop("data_root", None)
    if data_root is not None and (not isinstance(data_root, str) or not data_root):
        raise ValueError(f"data_root is {data_root!r}; it must be the path of a folder")
    nproc = config.pop("nproc", None)
    if nproc is not None and (type(nproc) is not int or not 1 <= nproc <= _MOST_PROCESSES):
        raise ValueError(
            f"nproc is {nproc!r}; it must be a positive number of processes, at most "
            f"{_MOST_PROCESSES}"
        )
    run_dir = config.pop("run_dir", None)
    if run_dir is not None and (not isinstance(run_dir, str) or not run_dir):
        raise ValueError(f"run_dir is {run_dir!r}; it must be the path of a folder")
    if data_root is not None:
        config = with_data_root(config, data_root)
    return RunConfig(Path(run_dir or default_dir), nproc, config, data_root)


def _quoted_pattern(override: str) -> str:
    """Quote a value that YAML would take for an alias or a block, as `*E*E` or `|*E*E`."""
    key, _, value = override.partition("=")
    return f"{key}='{value}'" if value.startswith(("*", "|")) and "'" not in value else override


def _concerns_experts(key: str) -> bool:
    return key.startswith(("moe_", "expert_")) or key == "num_experts"


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


def _load(path: Path, below: tuple[Path, ...]) -> DictConfig:
    """Read a config on top of its bases.

    Args:
        path: The file.
        below: The files whose bases lead to this one.
    """
    real = Path(os.path.realpath(path))
    if real in below:
        chain = " -> ".join(str(p) for p in (*below, real))
        raise ValueError(f"the bases of {path} form a cycle: {chain}")
    if len(below) > _DEEPEST_BASES:
        raise ValueError(
            f"the bases of {below[0]} are more than {_DEEPEST_BASES} files deep at {path}; merge "
            f"some of them"
        )
    return _on_its_bases(_read(path, "config"), path.parent, (*below, real), f"config {path}")


def _on_its_bases(own: DictConfig, folder: Path, below: tuple[Path, ...], what: str) -> DictConfig:
    """Return a config on top of its bases (relative to `folder`), with its own keys last."""
    with _yaml_in_one_line(what):
        base = _plain(OmegaConf.create({"base": own.pop("base", None)}))["base"]
    bases = [_load(folder / name, below) for name in bases_of(base, what)]
    with _yaml_in_one_line(what):
        merged = functools.reduce(_merged, [*bases, own])
        ordered = [str(key) for key in (*(key for key in merged if key not in own), *own)]
        values = _plain(merged)
        return OmegaConf.create({key: values[key] for key in ordered})


def _merged(below: DictConfig, above: DictConfig) -> DictConfig:
    """Return a config on top of another.

    Three keys choose the router (`options.router_name`). Where the upper config chooses another
    one, or not the one below, by a key of another name, the choice below is dropped.
    """
    below = below.copy()
    published = {flag: above[flag] for flag in PUBLISHED if flag in above}
    chooses = bool(above.get("moe_routing")) or any(value is True for value in published.values())
    refused = {PUBLISHED[flag] for flag, value in published.items() if value is False}
    for key in ("moe_routing", *PUBLISHED):
        if key in below and key not in above and (chooses or below[key] in refused):
            del below[key]
    return cast(DictConfig, OmegaConf.merge(below, above))


def _read(path: Path, what: str) -> DictConfig:
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise ValueError(f"{what} {path} does not exist; pass the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{what} {path} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:  # it is a ValueError if the path has a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"{what} {str(path)!r} cannot be read: {reason}; pass the path of a YAML file"
        ) from None
    config: object = None
    # OmegaConf raises OSError for a file that is a single value.
    with _yaml_in_one_line(f"{what} {path}"), contextlib.suppress(OSError):
        config = OmegaConf.load(io.StringIO(text))
    if not isinstance(config, DictConfig):
        raise ValueError(f"{what} {path} is not a mapping of flags to values")
    _check_keys(config, f"{what} {path}")
    return config


def _plain(config: object, *, resolve: bool = False) -> dict[str, Any]:
    """Return OmegaConf's mapping of flags, whose keys are checked (`_check_keys`), as a dict.

    Args:
        config: OmegaConf's mapping.
        resolve: Whether to replace interpolations, and to refuse missing values.
    """
    plain = OmegaConf.to_container(config, resolve=resolve, throw_on_missing=resolve)
    return cast(dict[str, Any], plain)


def _check_keys(flags: Iterable[Any], what: str) -> None:
    for key in flags:
        if not isinstance(key, str):
            raise ValueError(f"{what}: the key {key!r} is no name of a flag; correct it")


@contextlib.contextmanager
def _yaml_in_one_line(what: str) -> Iterator[None]:
    """Turn the errors of YAML and OmegaConf into a `ValueError` of one line.

    Args:
        what: What is read, for the message.
    """
    try:
        yield
    except _YAML_ERRORS as error:
        raise ValueError(f"{what}: {_yaml_problem(error)}") from None


def _yaml_problem(error: Exception) -> str:
    """Return the error in one line, with line and column where they are known."""
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
