"""What is known about a model's training, for its `config.json` and its model card."""

import argparse
import subprocess
from pathlib import Path
from typing import Any

import remoe
from megatron.remoe.analysis.runs import read_rows
from megatron.remoe.convert.table import Config
from megatron.remoe.data.pairs import prefixes_of

_STEPS_OF_SPARSITY = 20


def training_facts(
    args: argparse.Namespace, iteration: int, padded_vocab_size: int, run_dir: Path | None
) -> Config:
    """Collect facts for `config.json`, from the arguments and the metrics up to the checkpoint.

    Args:
        args: the run's arguments.
        iteration: the iteration of the checkpoint.
        padded_vocab_size: the number of rows in Megatron's embedding.
        run_dir: a folder in which `metrics.jsonl` may be, beside the path in the arguments.
    """
    known: Config | None = getattr(args, "remoe_training_facts", None)
    if known is not None:  # the checkpoint was made from an exported model
        return known
    samples = getattr(args, "consumed_train_samples", 0) or 0
    names, shares = _data(args)
    facts: Config = {
        "iteration": iteration,
        "tokens": samples * args.seq_length,
        "sequence_length": args.seq_length,
        "padded_vocab_size": padded_vocab_size,
        "data": names,
        "data_shares": shares,
        "version": remoe.__version__,
        "commit": _commit(),
    }
    rows = [row for row in _metrics(args, run_dir) if row["iteration"] <= iteration]
    steps = [row for row in rows if "split" not in row]
    values = [row.get("sparsity") for row in steps[-_STEPS_OF_SPARSITY:]]
    sparse = [value for value in values if value is not None]  # a NaN is written as null
    if sparse:
        facts["sparsity"] = sum(sparse) / len(sparse)
        facts["sparsity_steps"] = len(sparse)
    evaluations = [row for row in rows if "split" in row]
    if evaluations:
        last = evaluations[-1]["iteration"]
        facts["validation_loss"] = {
            row["split"]: row.get("lm_loss") for row in evaluations if row["iteration"] == last
        }
        facts["validation_iteration"] = last
    return facts


def _metrics(args: argparse.Namespace, run_dir: Path | None) -> list[dict[str, Any]]:
    named = getattr(args, "metrics_file", None)
    candidates = [run_dir / "metrics.jsonl"] if run_dir else []
    for path in [*candidates, *([Path(named)] if named else [])]:
        if path.is_file():
            return read_rows(path)
    return []


def _data(args: argparse.Namespace) -> tuple[list[str], list[float] | None]:
    """Return the names of the training data without their folders, and their shares of the tokens.

    The shares are None where the arguments have no weights, so that Megatron takes the sizes.
    """
    given = list(map(str, args.train_data_path or args.data_path or []))
    if not given:
        return (["mock data"] if args.mock_data else []), None
    prefixes = prefixes_of(given)
    weights = [float(entry) for entry in given if entry not in prefixes]
    names = [Path(prefix).name for prefix in prefixes]
    if len(names) == 1:
        return names, [1.0]
    if len(weights) != len(names) or sum(weights) <= 0:
        return names, None
    return names, [weight / sum(weights) for weight in weights]


def _commit() -> str | None:
    """Return the commit of this code, if it runs from its own repository.

    An installed package may lie in an environment inside of another repository.
    """
    root = Path(__file__).resolve().parents[3]
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    top, commit = done.stdout.splitlines()
    return commit if Path(top) == root else None
