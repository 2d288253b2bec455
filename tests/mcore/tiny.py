"""A run that takes seconds: its config, its data, and the command line as a user sees it."""

import contextlib
import functools
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = {
    "base": str(EXAMPLES / "bases/llama.yaml"),
    "nproc": 1,
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "ffn_hidden_size": 64,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "moe_relu_routing": True,
    "num_experts": 4,
    "moe_router_topk": 1,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "train_iters": 12,
    "lr": 1.0e-3,
    "log_interval": 1,
    "mock_data": True,
    "tokenizer_type": "NullTokenizer",
    "vocab_size": 127,
}
WORDS = ("the", "router", "is", "a", "relu", "an", "expert", "def", "return", "x", "y", "in", "of")


def write_config(path: Path, **changes: Any) -> Path:
    """Write the config with changes; a key that becomes `...` is left out."""
    flags = {k: v for k, v in (CONFIG | changes).items() if v is not ...}
    path.write_text(yaml.safe_dump(flags))
    return path


def write_corpus(folder: Path) -> None:
    """Two domains with training and validation documents of 40 words."""
    for seed, (split, domain, documents) in enumerate(
        (s, d, n) for s, n in (("train", 60), ("valid", 6)) for d in ("code", "prose")
    ):
        words = random.Random(seed)
        # Validation sets of different size, so that means by set and by token differ.
        count = documents * 2 if domain == "prose" else documents
        texts = (" ".join(words.choices(WORDS, k=40)) for _ in range(count))
        path = folder / split / f"{domain}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def start(*argv: str, cwd: Path) -> subprocess.Popen:
    """The `remoe` command in a process of its own, without GPUs."""
    environment = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONWARNINGS", None)  # what a user sees who has not set it
    command = [sys.executable, "-c", "from megatron.remoe.cli import main; main()", *argv]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# What follows runs in a process that has Megatron, on `Ranks`.


def remoe(cwd: Path, *argv: str) -> tuple[int, str, str]:
    """The `remoe` command: exit code, standard output and error."""
    from megatron.remoe.cli.app import main

    out, error = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            main(list(argv))
        except SystemExit as end:
            return int(end.code or 0), out.getvalue(), error.getvalue()
    raise AssertionError("main returned without an exit code")


def parse(*argv: str) -> tuple[dict[str, Any], str]:
    """Megatron's parser with our flags: what it parsed, or nothing and the message of exit 2."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        try:
            args = vars(_parser().parse_args(list(argv)))
        except SystemExit as end:
            assert end.code == 2
            return {}, error.getvalue()
    # Megatron's own types would make the test's process import Megatron.
    plain = (bool, int, float, str, list, type(None))
    return {k: v for k, v in args.items() if isinstance(v, plain)}, ""


@functools.cache
def _parser():
    from megatron.remoe.arguments import megatron_parser

    return megatron_parser()


def shapes(*argv: str, from_checkpoint: bool = False) -> list[tuple[int, int, int]]:
    """Experts, k and expert width: in the arguments that a checkpoint saves, and in the model."""
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.checkpointing import load_args_from_checkpoint

    from megatron.remoe.arguments import add_arguments

    sys.argv = ["pretrain.py", *argv]
    with contextlib.redirect_stdout(io.StringIO()):
        args = parse_args(extra_args_provider=add_arguments)
        if from_checkpoint:  # as `parse_and_validate_args` does
            load_args_from_checkpoint(args)
        validate_args(args)
        config = core_transformer_config_from_args(args)
    return [
        (args.num_experts, args.moe_router_topk, args.moe_ffn_hidden_size),
        (config.num_moe_experts, config.moe_router_topk, config.moe_ffn_hidden_size),
    ]
