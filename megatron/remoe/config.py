"""YAML configs: Megatron's flags with underscores, `base:` inheritance, `key=value` overrides.

A config is a page of flags. Four keys are ours: `base` (a path, or a list of paths, relative to
the file), `run_dir`, `nproc` (processes on this machine), and `data_root`, a variable for the other
values (`${data_root}/01`). Other paths are relative to the working directory, as for Megatron.
"""

import argparse
import contextlib
import difflib
import functools
import io
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from megatron.remoe import checkpoint, unsupported
from megatron.remoe.data.pairs import check_pair
from megatron.remoe.mistakes import Foreign, explain, names, one_line

_OWN_KEYS = ("base", "run_dir", "nproc", "data_root")
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
        config = OmegaConf.to_container(everything, resolve=True, throw_on_missing=True)
    except _YAML_ERRORS as error:
        raise ValueError(f"{what}: {_yaml_problem(error)}") from None
    config = {k: v for k, v in config.items() if k not in changes} | {k: config[k] for k in changes}
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
    return OmegaConf.to_container(_read_yaml(path, what))


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
        base = OmegaConf.to_container(OmegaConf.create({"base": config.pop("base", None)}))["base"]
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
    ordered = [key for key in merged if key not in own] + list(own)
    values = OmegaConf.to_container(merged)
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


@functools.cache
def megatron_parser() -> argparse.ArgumentParser:
    """Megatron's parser with our flags, as the entry point uses it."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron.remoe.arguments import add_arguments

    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def to_argv(flags: dict[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """The command line of a config.

    `true` passes a switch, `false` and `null` leave a flag out, lists are its several values.

    Raises:
        ValueError: an unknown key, naming the nearest valid one, or a value of the wrong kind.
    """
    actions = {
        option[2:].replace("-", "_"): (option, action)
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and not isinstance(action, argparse._HelpAction)
    }
    argv = []
    for key, value in flags.items():
        if key not in actions:
            raise ValueError(_unknown(key, [*actions, *_OWN_KEYS]))
        option, action = actions[key]
        _check_kind(key, value, action)
        is_switch = action.nargs == 0
        if isinstance(action, argparse.BooleanOptionalAction) and value is False:
            argv.append(_opposite(option))
        elif value is None or (value is False and is_switch):
            continue
        elif is_switch:
            argv.append(option)
        elif isinstance(value, list):
            argv += [option, *map(str, value)]
        elif str(value).startswith("-"):  # not a flag of its own
            argv.append(f"{option}={value}")
        else:
            argv += [option, str(value)]
    return argv


def _unknown(key: str, known: list[str]) -> str:
    if key == "sweep":
        return "config key 'sweep' makes this file a sweep; run it with remoe sweep"
    if key in _OWN_KEYS:
        return f"config key {key!r} cannot be given here; write it into the config's file"
    plain = key.lower().replace("-", "_")
    near = difflib.get_close_matches(plain, known, n=1, cutoff=_NEAR)
    hint = f"did you mean {near[0]!r}?" if near else "no flag is similar; remove it"
    return f"unknown config key {key!r}; {hint}"


def _check_kind(key: str, value: Any, action: argparse.Action) -> None:
    if isinstance(value, dict):
        raise ValueError(f"config key {key!r} is a mapping; flags take values or lists")
    if isinstance(value, list):
        if action.nargs is None or action.nargs == 0:
            raise ValueError(f"config key {key!r} is the list {value}; it takes one value")
        if not all(isinstance(one, str | int | float) for one in value):
            raise ValueError(
                f"config key {key!r} is {value}; its list must consist of plain values"
            )
    elif not isinstance(value, str | int | float | None):
        raise ValueError(
            f"config key {key!r} is {value!r}, a {type(value).__name__}; put it in quotes to pass "
            f"it as text"
        )
    if "\0" in str(value) or "\\x00" in repr(value):
        raise ValueError(f"config key {key!r} is {value!r}, with a NUL in it; remove that")
    if action.nargs == 0 and not isinstance(value, bool | None):
        raise ValueError(f"config key {key!r} is {value!r}; it must be true or false")


def _opposite(option: str) -> str:
    if option.startswith("--no-"):
        return f"--{option[5:]}"
    return f"--no-{option[2:]}"


def check(argv: list[str], nproc: int, *, paths: bool = True) -> argparse.Namespace:
    """Let our checks and Megatron's own run over a command line, before anything is started.

    The model, the optimizer and the tokenizer are built as well, see `rehearsal`.

    Args:
        argv: the command line.
        nproc: processes of the whole run, on all machines.
        paths: whether data and tokenizer must exist here.

    Returns:
        The arguments as the run will have them.

    Raises:
        ValueError: arguments that the run would reject, and data or tokenizers that do not exist.
    """
    try:
        return _validated(argv, nproc, paths=paths)
    except Foreign as error:
        message, given = str(error), _options(argv)
        if not names(message, {_key(words) for words in given}):
            message = _blamed(message, given, nproc, paths=paths)
        raise ValueError(message) from error


def _options(argv: list[str]) -> list[list[str]]:
    """A command line by its options, each with its values."""
    options: list[list[str]] = []
    for word in argv:
        if word.startswith("--"):
            options.append([word])
        else:
            options[-1].append(word)
    return options


def _key(words: list[str]) -> str:
    return words[0].removeprefix("--").partition("=")[0].replace("-", "_")


def _blamed(message: str, given: list[list[str]], nproc: int, *, paths: bool) -> str:
    """A message with the option without which everything is accepted, the last ones tried first."""
    for index in reversed(range(max(0, len(given) - _MOST_SUSPECTS), len(given))):
        others = [word for i, words in enumerate(given) if i != index for word in words]
        with contextlib.suppress(ValueError):
            _validated(others, nproc, paths=paths)
            value = given[index][0].partition("=")[2] or " ".join(given[index][1:]) or "true"
            key = _key(given[index])
            return f"{key} is {value}: {message.rstrip('.')}; change it, or leave it out"
    if "; change " in message:  # it names values that follow from the given ones
        return message
    return f"the run cannot be built from these values: {message}"


def _validated(argv: list[str], nproc: int, *, paths: bool) -> argparse.Namespace:
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    from megatron.remoe import saved
    from megatron.remoe.arguments import add_arguments
    from megatron.remoe.rehearsal import rehearse

    complaints, args = io.StringIO(), None
    try:
        with _as_rank_zero(argv, nproc), contextlib.redirect_stderr(complaints):
            args = parse_args(extra_args_provider=add_arguments)
            unsupported.check(args, megatron_parser())
            if paths:
                check_paths(args)
            saved.take_arguments(args)
            validate_args(args)
            core_transformer_config_from_args(args)
            _check_what_megatron_finds_late(args)
            unsupported.refuse_unused(args)
            saved.check_before_start(args)
            rehearse(args, tokenizer=paths)
    except SystemExit as end:
        if not complaints.getvalue().strip():  # it has printed why, or has not said
            raise Foreign(f"Megatron ends at its start with code {end.code}") from None
        raise ValueError(one_line(complaints.getvalue()).removeprefix("error: ")) from None
    except Foreign:
        raise
    except Exception as error:  # whatever Megatron raises is about a value
        raise explain(error, args) from error
    return args


def _check_what_megatron_finds_late(args: argparse.Namespace) -> None:
    """Mistakes that Megatron rejects in every process of the run only, with a traceback each."""
    if args.lr is None:
        raise ValueError("lr is not given; set the learning rate")
    if not (args.train_iters or args.train_samples):
        raise ValueError("neither train_iters nor train_samples is given; set one of them")
    if args.use_checkpoint_args and args.load is None and args.pretrained_checkpoint is None:
        raise ValueError(
            "use_checkpoint_args is set, but there is no load or pretrained_checkpoint to take "
            "them from; set one of these, or leave it out"
        )
    if args.multiple_validation_sets != args.full_validation:
        there, missing = "multiple_validation_sets", "full_validation"
        if args.full_validation:
            there, missing = missing, there
        raise ValueError(
            f"{there} is set without {missing}, which Megatron does not have; set {missing} too"
        )
    if args.validation_set_names and not args.multiple_validation_sets:
        raise ValueError(
            f"validation_set_names is {args.validation_set_names}, but there are no "
            f"multiple_validation_sets to name; set these too, or leave it out"
        )
    ranks = args.expert_tensor_parallel_size * args.expert_model_parallel_size
    ranks *= args.pipeline_model_parallel_size
    if args.world_size % ranks:
        raise ValueError(
            f"{args.world_size} processes cannot be split into groups of {ranks} "
            f"(expert_tensor_parallel_size {args.expert_tensor_parallel_size} x "
            f"expert_model_parallel_size {args.expert_model_parallel_size} x "
            f"pipeline_model_parallel_size {args.pipeline_model_parallel_size}); change nproc, or "
            f"these sizes"
        )
    if args.group_query_attention and args.num_attention_heads % args.num_query_groups:
        raise ValueError(
            f"num_query_groups is {args.num_query_groups}, which does not divide the "
            f"{args.num_attention_heads} attention heads; choose a number that does"
        )
    if args.position_embedding_type == "rope" and int(args.kv_channels * args.rotary_percent) % 2:
        raise ValueError(
            f"kv_channels is {args.kv_channels} (hidden_size / num_attention_heads when not given) "
            f"with rotary_percent {args.rotary_percent}, and rotary embeddings turn pairs of "
            f"channels; choose sizes that make the number of turned channels even"
        )
    at_once = args.micro_batch_size * args.data_parallel_size
    if args.global_batch_size % at_once and not args.decrease_batch_size_if_needed:
        raise ValueError(
            f"global_batch_size {args.global_batch_size} is not a multiple of {at_once}: "
            f"micro_batch_size {args.micro_batch_size} on each of {args.data_parallel_size} "
            f"data-parallel ranks; choose another of the three"
        )


@contextlib.contextmanager
def _as_rank_zero(argv: list[str], nproc: int) -> Iterator[None]:
    before, argv_before = dict(os.environ), sys.argv
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
    sys.argv = [argv_before[0], *argv]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.environ.clear()
        os.environ |= before
        sys.argv = argv_before


def check_paths(args: argparse.Namespace) -> None:
    """Check that the data and the tokenizer of a command line exist, and that the data is whole.

    Raises:
        ValueError: naming the missing file and how to make it.
    """
    from megatron.core.datasets.utils import get_blend_from_list

    flags = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
    elsewhere = ("data_args_path", "per_split_data_args_path")
    if not args.mock_data and not any(getattr(args, flag) for flag in (*flags, *elsewhere)):
        raise ValueError(
            "no data is named; set train_data_path (remoe data tokenize makes it), or mock_data "
            "for random tokens"
        )
    for flag in flags:
        prefixes = (get_blend_from_list(getattr(args, flag)) or ([], None))[0]
        for prefix in prefixes:
            missing = [s for s in (".bin", ".idx") if not Path(f"{prefix}{s}").is_file()]
            if missing:
                raise ValueError(
                    f"{flag}: {prefix}{missing[0]} does not exist; tokenize the data first "
                    f"(remoe data tokenize), or correct the path"
                )
            try:
                check_pair(Path(prefix), contents=False)
            except ValueError as error:
                raise ValueError(f"{flag}: {error}") from None
    is_elsewhere = args.load is not None and (
        args.save is None or os.path.abspath(args.load) != os.path.abspath(args.save)
    )
    for flag in ("pretrained_checkpoint", *(("load",) if is_elsewhere else ())):
        folder = getattr(args, flag)
        if folder is not None and checkpoint.tracked_path(Path(folder)) is None:
            raise ValueError(
                f"{flag}: {folder} is no folder of checkpoints (no {checkpoint.TRACKER}); correct "
                f"the path"
            )
    tokenizer = args.tokenizer_model
    if args.tokenizer_type == "HuggingFaceTokenizer" and tokenizer and not Path(tokenizer).exists():
        is_hub_name = tokenizer.count("/") <= 1 and not tokenizer.startswith((".", "/"))
        if not is_hub_name:
            raise ValueError(
                f"tokenizer_model: {tokenizer} does not exist; tokenize the data first "
                f"(remoe data tokenize), or correct the path"
            )
