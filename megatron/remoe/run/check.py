"""Check everything about a command line before its run is started."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron.remoe import checkpoint, compat, unsupported
from megatron.remoe.arguments import megatron_parser
from megatron.remoe.data.pairs import check_pair, count_tokens, prefixes_of
from megatron.remoe.run.mistakes import Foreign, explain, names, one_line

# Number of options that are left out, one at a time, to find the one that does not fit.
_MOST_SUSPECTS = 12


def check(argv: list[str], nproc: int, *, paths: bool = True) -> argparse.Namespace:
    """Run the checks of this project and Megatron's own over a command line.

    The model, the optimizer and the tokenizer are built as well, see `rehearsal`.

    Args:
        argv: The command line.
        nproc: Number of processes of the whole run, on all machines.
        paths: Whether data and tokenizer must exist here.

    Returns:
        The arguments as the run will have them.

    Raises:
        ValueError: The run would reject an argument, or data or a tokenizer does not exist.
    """
    try:
        return _validated(argv, nproc, paths=paths)
    except Foreign as error:
        message, given = str(error), _options(argv)
        if not names(message, {_key(words) for words in given}):
            message = _blamed(message, given, nproc, paths=paths)
        raise ValueError(message) from error


def _options(argv: list[str]) -> list[list[str]]:
    """Split a command line into its options, each with its values."""
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
    """Return the message with the option without which everything would be accepted.

    The last options are tried first.
    """
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

    from megatron.remoe.arguments import add_arguments
    from megatron.remoe.run.rehearsal import rehearse
    from megatron.remoe.train import saved

    args: argparse.Namespace | None = None
    try:
        with _exit_is_a_mistake(argv, nproc):
            args = parse_args(extra_args_provider=add_arguments)
            unsupported.check(args, megatron_parser())
            if paths:
                check_paths(args)
            saved.take_arguments(args)
            validate_args(args)
            core_transformer_config_from_args(args)
            _check_what_megatron_finds_late(args)
            if paths and args.full_validation:
                _check_full_validation(args)
            unsupported.refuse_unused(args)
            saved.check_before_start(args)
            warning = rehearse(args, tokenizer=paths)
    except Foreign:
        raise
    except Exception as error:  # Whatever Megatron raises is about a value.
        raise explain(error, args) from error
    if warning:
        print(f"remoe: warning: {warning}", file=sys.stderr)
    return args


@contextlib.contextmanager
def _exit_is_a_mistake(argv: list[str], nproc: int) -> Iterator[None]:
    """Give a command line to Megatron, and raise `ValueError` where it would end the process."""
    with compat.command_line(argv, nproc) as said:
        try:
            yield
        except SystemExit as end:
            if not said.getvalue().strip():  # Megatron has printed why, or has not said.
                raise Foreign(f"Megatron ends at its start with code {end.code}") from None
            raise ValueError(one_line(said.getvalue()).removeprefix("error: ")) from None


def check_parser(argv: list[str]) -> None:
    """Check a command line by the parser alone, where the rest of it is not known.

    Raises:
        ValueError: The parser would end the process.
    """
    with _exit_is_a_mistake(argv, 1):
        megatron_parser().parse_args(argv)


def _check_what_megatron_finds_late(args: argparse.Namespace) -> None:
    """Refuse what Megatron would only reject in every process of the run, with a traceback each."""
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


def _check_full_validation(args: argparse.Namespace) -> None:
    """Refuse validation sets of which a rank would get nothing, at which Megatron ends the run."""
    for prefix in prefixes_of(args.valid_data_path or ()):
        tokens = count_tokens(Path(prefix))
        if (tokens - 1) // args.seq_length < args.data_parallel_size:
            raise ValueError(
                f"valid_data_path: {prefix} has {tokens} tokens, too few for a sequence of "
                f"seq_length {args.seq_length} on each of {args.data_parallel_size} data-parallel "
                f"ranks; add text, choose a shorter seq_length, or validate on a sample "
                f"(full_validation=false multiple_validation_sets=false)"
            )


def check_paths(args: argparse.Namespace) -> None:
    """Check that the data and the tokenizer of a command line exist, and that the data is whole.

    Raises:
        ValueError: A file is missing, with its name and how to make it.
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
        prefixes: list[str] = (get_blend_from_list(getattr(args, flag)) or ([], None))[0]
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
            # Without one whole sequence Megatron validates on nothing.
            tokens = count_tokens(Path(prefix))
            if args.seq_length is not None and tokens <= args.seq_length:
                raise ValueError(
                    f"{flag}: {prefix} has {tokens} tokens, and one sequence of seq_length "
                    f"{args.seq_length} needs {args.seq_length + 1}; add text, or choose a shorter "
                    f"seq_length"
                )
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
