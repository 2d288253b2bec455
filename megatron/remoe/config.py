"""YAML configs: Megatron's flags with underscores, `base:` inheritance, `key=value` overrides.

A config is a page of flags. Four keys are ours: `base` (a path, or a list of paths, relative to
the file), `run_dir`, `nproc` (processes on this machine), and `data_root`, a variable for the other
values (`${data_root}/01`). Other paths are relative to the working directory, as for Megatron.
"""

import argparse
import contextlib
import difflib
import io
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

_OWN_KEYS = ("base", "run_dir", "nproc", "data_root")


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

    def to_yaml(self) -> str:
        own = {"run_dir": str(self.run_dir), "nproc": self.nproc}
        return OmegaConf.to_yaml(OmegaConf.create(own | self.flags))


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a config, its bases and the overrides, and resolve interpolations.

    `num_experts: null` makes the model dense: every key that only concerns experts is dropped.
    Without `run_dir` the run goes to `runs/<file stem>`, followed by the overrides, so that
    variations of one file do not overwrite each other.

    Raises:
        ValueError: a missing or malformed file, a cycle of bases, an override without `=`.
    """
    overrides = overrides or []
    malformed = [override for override in overrides if "=" not in override]
    if malformed:
        raise ValueError(f"override {malformed[0]!r} is not of the form key=value")
    try:
        merged = OmegaConf.merge(_load(path, ()), OmegaConf.from_dotlist(overrides))
        config = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{path} with overrides {overrides}: {error}") from None
    if config.get("num_experts") is None:
        config = {k: v for k, v in config.items() if not _concerns_experts(k)}
    default_dir = Path("runs") / "-".join([path.stem, *(o.replace("/", "_") for o in overrides)])
    config.pop("data_root", None)
    nproc = config.pop("nproc", None)
    if nproc is not None and (not isinstance(nproc, int) or nproc < 1):
        raise ValueError(f"nproc is {nproc!r}; it must be a positive number of processes")
    return RunConfig(Path(config.pop("run_dir", None) or default_dir), nproc, config)


def _load(path: Path, below: tuple[Path, ...]) -> DictConfig:
    if path.resolve() in below:
        chain = " -> ".join(str(p) for p in (*below, path.resolve()))
        raise ValueError(f"the bases of {path} form a cycle: {chain}")
    if not path.is_file():
        raise ValueError(f"config {path} does not exist; pass the path of a YAML file")
    config = OmegaConf.load(path)
    if not isinstance(config, DictConfig):
        raise ValueError(f"config {path} is not a mapping of flags to values")
    base = config.pop("base", None) or []
    bases = base if isinstance(base, ListConfig | list) else [base]
    loaded = [_load(path.parent / b, (*below, path.resolve())) for b in bases]
    return OmegaConf.merge(*loaded, config)


def _concerns_experts(key: str) -> bool:
    return key.startswith(("moe_", "expert_")) or key == "num_experts"


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
        if option.startswith("--")
    }
    argv = []
    for key, value in flags.items():
        if key not in actions:
            near = difflib.get_close_matches(key, [*actions, *_OWN_KEYS], n=1, cutoff=0)
            raise ValueError(f"unknown config key {key!r}; did you mean {near[0]!r}?")
        option, action = actions[key]
        if isinstance(value, dict):
            raise ValueError(f"config key {key!r} is a mapping; flags take values or lists")
        is_switch = action.nargs == 0
        if isinstance(action, argparse.BooleanOptionalAction) and value is False:
            argv.append(_opposite(option))
        elif value is None or (value is False and is_switch):
            continue
        elif is_switch:
            if value is not True:
                raise ValueError(f"config key {key!r} is {value!r}; it must be true or false")
            argv.append(option)
        elif isinstance(value, list):
            argv += [option, *map(str, value)]
        else:
            argv += [option, str(value)]
    return argv


def _opposite(option: str) -> str:
    if option.startswith("--no-"):
        return f"--{option[5:]}"
    return f"--no-{option[2:]}"


def check(argv: list[str], nproc: int, *, paths: bool = True) -> argparse.Namespace:
    """Let our checks and Megatron's own run over a command line, before anything is started.

    Args:
        argv: the command line.
        nproc: processes of the whole run, on all machines.
        paths: whether data and tokenizer must exist here.

    Returns:
        The arguments as the run will have them.

    Raises:
        ValueError: arguments that the run would reject, and data or tokenizers that do not exist.
    """
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import parse_args, validate_args

    from megatron.remoe import saved
    from megatron.remoe.arguments import add_arguments
    from megatron.remoe.pretrain import refuse_unused

    complaints = io.StringIO()
    try:
        with _as_rank_zero(argv, nproc), contextlib.redirect_stderr(complaints):
            args = parse_args(extra_args_provider=add_arguments)
            if paths:
                check_paths(args)
            saved.take_arguments(args)
            validate_args(args)
            core_transformer_config_from_args(args)
            _check_what_megatron_finds_late(args)
            refuse_unused(args)
            saved.check_before_start(args)
    except SystemExit:
        raise ValueError(complaints.getvalue().strip().removeprefix("error: ")) from None
    except (AssertionError, ValueError, RuntimeError, ArithmeticError) as error:
        line = traceback.extract_tb(error.__traceback__)[-1].line
        if isinstance(error, ArithmeticError) or not str(error):
            raise ValueError(f"Megatron requires: {line}") from error
        raise ValueError(str(error)) from error
    return args


def _check_what_megatron_finds_late(args: argparse.Namespace) -> None:
    """Mistakes that Megatron rejects in every process of the run only, with a traceback each."""
    if args.lr is None:
        raise ValueError("lr is not given; set the learning rate")
    if not (args.train_iters or args.train_samples):
        raise ValueError("neither train_iters nor train_samples is given; set one of them")
    if args.multiple_validation_sets and not args.full_validation:
        raise ValueError(
            "multiple_validation_sets is set without full_validation, which Megatron does not "
            "have; set full_validation too"
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
    """Check that the data and the tokenizer of a command line exist.

    Raises:
        ValueError: naming the missing file and how to make it.
    """
    from megatron.core.datasets.utils import get_blend_from_list

    for flag in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        prefixes = (get_blend_from_list(getattr(args, flag)) or ([], None))[0]
        for prefix in prefixes:
            missing = [s for s in (".bin", ".idx") if not Path(f"{prefix}{s}").is_file()]
            if missing:
                raise ValueError(
                    f"{flag}: {prefix}{missing[0]} does not exist; tokenize the data first "
                    f"(remoe data tokenize), or correct the path"
                )
    tokenizer = args.tokenizer_model
    if args.tokenizer_type == "HuggingFaceTokenizer" and tokenizer and not Path(tokenizer).exists():
        is_hub_name = tokenizer.count("/") <= 1 and not tokenizer.startswith((".", "/"))
        if not is_hub_name:
            raise ValueError(
                f"tokenizer_model: {tokenizer} does not exist; tokenize the data first "
                f"(remoe data tokenize), or correct the path"
            )
