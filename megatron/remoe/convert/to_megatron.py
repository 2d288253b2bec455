"""Conversion of a Hugging Face folder to a Megatron checkpoint, to be trained in any layout."""

from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.validation import save_integrity_manifest
from omegaconf import OmegaConf

from megatron.remoe import checkpoint
from megatron.remoe.arguments import megatron_parser
from megatron.remoe.convert.architecture import check_expressible, moe_layers, to_flags
from megatron.remoe.convert.hf_source import HFSource
from megatron.remoe.convert.output import new_folder
from megatron.remoe.convert.table import Config, Item
from megatron.remoe.formats.torch_dist import TorchDistWriter
from megatron.remoe.run.argv import to_argv

_VOCABULARY_MULTIPLE = 128  # of Megatron, per tensor-parallel rank
_MOST_PADDING = 2**20  # rows of the embedding that stand for no token


@dataclass(frozen=True)
class Layout:
    """The sizes of the parallel dimensions that a model will be trained with.

    A torch_dist checkpoint can be read in any layout. The layout decides only on the padding of the
    vocabulary and on the flags that are written beside the checkpoint.
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    padded_vocab_size: int | None = None

    def check(self, config: Config) -> None:
        """Check that every dimension of the model can be split like this.

        Raises:
            ValueError: one of them cannot, or the padding of the vocabulary does not fit.
        """
        dims = [
            ("tensor", self.tensor, "num_attention_heads"),
            ("tensor", self.tensor, "num_key_value_heads"),
            ("tensor", self.tensor, "intermediate_size"),
            ("pipeline", self.pipeline, "num_hidden_layers"),
        ]
        if config["model_type"] == "remoe":
            dims.append(("expert", self.expert, "num_experts"))
        elif self.expert > 1:
            raise ValueError(f"expert-parallel is {self.expert}, but the model has no experts")
        for what, size, name in dims:
            if size < 1 or config[name] % size:
                raise ValueError(
                    f"{what}-parallel is {size}, which does not divide the model's {name} of "
                    f"{config[name]}; choose one that does"
                )
        self.padded_vocabulary(config)

    def padded_vocabulary(self, config: Config) -> int:
        """Return the number of rows of the embedding.

        It is the given number, or that of the run which the model is from, or the smallest.

        Raises:
            ValueError: the number is too small, too large, or not divisible.
        """
        vocab, stored = config["vocab_size"], _facts(config).get("padded_vocab_size")
        multiple = _VOCABULARY_MULTIPLE * self.tensor
        padded: int = -(-vocab // multiple) * multiple
        if stored is not None and stored >= vocab and stored % self.tensor == 0:
            padded = stored
        if self.padded_vocab_size is not None:
            padded = self.padded_vocab_size
        if not vocab <= padded <= vocab + _MOST_PADDING or padded % self.tensor:
            raise ValueError(
                f"vocabulary mismatch: padded-vocab-size is {padded}; it must be at least the "
                f"model's vocab_size of {vocab}, at most {_MOST_PADDING} more, and a multiple of "
                f"{self.tensor}"
            )
        return padded


def _facts(config: Config) -> Config:
    return config.get("training_facts") or {}


def to_megatron(
    path: Path,
    out: Path,
    *,
    layout: Layout,
    name: Path | None = None,
    reads: Iterable[Path] = (),
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a folder of checkpoints that `--load` and `--pretrained-checkpoint` take.

    Beside `iter_*` and the tracker, the folder holds the tokenizer and `model.yaml`, the model's
    flags, which a config names as its `base`. Everything is checked before anything is written.

    Args:
        path: a Hugging Face folder of model type `remoe` or `llama`.
        out: the folder to make.
        layout: the layout to train in.
        name: the folder's name in `model.yaml`, if it will be moved there from `out`.
        reads: what else the model was made from, which `out` must not replace.
        force: whether to replace `out`.
        progress: called with the number of tensors that are written, and of all tensors.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: names, shapes, vocabulary or settings do not fit, or `out` is not empty.
    """
    first = HFSource(path)
    check_expressible(first.config)
    layout.check(first.config)
    source = HFSource(path, layout.padded_vocabulary(first.config))
    config = source.config
    flags = _flags(source, layout, name or out)
    args = _args(flags, source)
    iteration = _facts(config).get("iteration") or 0
    # Megatron takes no tracker of iteration 0, and calls weights that it did not train a release.
    step, tracked = (
        (f"iter_{iteration:07d}", str(iteration)) if iteration else (checkpoint.RELEASE,) * 2
    )
    with new_folder(out, reads=[path, *reads], force=force) as folder:
        (folder / step).mkdir()
        writer = TorchDistWriter(
            folder / step,
            num_layers=config["num_hidden_layers"],
            stacked=len(moe_layers(config)) in (0, config["num_hidden_layers"]),
        )
        with closing(writer):
            for done, item in enumerate(source.items):
                writer.write(item.megatron, item.to_megatron(source.hf_tensors(item)))
                progress(done + 1, len(source.items))
            for linear, experts in _linears(source.items, config):
                writer.write_extra_state(linear, experts)
            writer.finish(_common(args, iteration))
        save_integrity_manifest(str(folder / step))
        (folder / checkpoint.TRACKER).write_text(tracked)
        (folder / "model.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(flags)))
        if source.tokenizer is not None:
            (folder / "tokenizer").mkdir()
            source.tokenizer.write(folder / "tokenizer")
    return out / step


def flags_of(
    config: Config, padded_vocab_size: int, dtype: torch.dtype, layout: Layout
) -> dict[str, Any]:
    """Return the flags to build a model with, without a tokenizer."""
    flags = to_flags(config, padded_vocab_size)
    if (length := _facts(config).get("sequence_length")) is not None:
        flags["seq_length"] = length
    flags |= {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
    }
    if config["model_type"] == "remoe":
        flags |= {
            "expert_model_parallel_size": layout.expert,
            "expert_tensor_parallel_size": 1,
        }
    if dtype != torch.float32:
        flags["bf16" if dtype == torch.bfloat16 else "fp16"] = True
    return flags | {"tokenizer_type": "NullTokenizer", "vocab_size": config["vocab_size"] - 1}


def _flags(source: HFSource, layout: Layout, out: Path) -> dict[str, Any]:
    flags = flags_of(source.config, source.padded_vocab_size, source.dtype, layout)
    flags["pretrained_checkpoint"] = str(out)
    if source.tokenizer is not None:
        del flags["vocab_size"]
        flags["tokenizer_type"] = "HuggingFaceTokenizer"
        flags["tokenizer_model"] = str(out / "tokenizer")
    return flags


def _args(flags: dict[str, Any], source: HFSource) -> Namespace:
    """Return Megatron's arguments as a checkpoint carries them, which are plain values only."""
    parser = megatron_parser()
    parsed = vars(parser.parse_args(to_argv(flags, parser)))
    plain = (bool, int, float, str, list, type(None))
    args = Namespace(**{k: v for k, v in parsed.items() if isinstance(v, plain)})
    facts = _facts(source.config)
    args.consumed_train_samples = (facts.get("tokens") or 0) // args.seq_length
    args.remoe_training_facts = facts
    # The checkpoint has neither optimizer nor random state, and Megatron then asks for none.
    args.no_save_optim = args.no_save_rng = True
    return args


def _linears(items: list[Item], config: Config) -> list[tuple[str, int | None]]:
    """List the linears for which Megatron keeps an extra state, with their numbers of experts."""
    found = []
    for item in items:
        name = item.megatron.removesuffix(".weight")
        if name.rpartition(".")[2].startswith("linear_"):
            found.append((name, config["num_experts"] if ".experts." in name else None))
    return found


def _common(args: Namespace, iteration: int) -> dict[str, Any]:
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "num_floating_point_operations_so_far": 0.0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
