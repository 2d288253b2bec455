"""Conversion of a checkpoint of the published implementation to both of our formats."""

from pathlib import Path

from megatron.remoe.convert.export import DEFAULT_SHARD_BYTES, Progress, export
from megatron.remoe.convert.output import new_folder
from megatron.remoe.convert.source import MegatronSource
from megatron.remoe.convert.table import Config
from megatron.remoe.convert.to_megatron import Layout, to_megatron

HF, MEGATRON = "hf", "megatron"


def from_fork(
    path: Path,
    out: Path,
    *,
    layout: Layout,
    tokenizer: Path | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Config:
    """Write `out/hf` for transformers, and `out/megatron` to train on.

    Args:
        path: a folder of checkpoints, or one of them; legacy or `torch_dist`.
        out: the folder to make.
        layout: the layout of the checkpoint to train on.
        tokenizer: a tokenizer to use in place of the one that the arguments name.
        force: whether to replace `out`.
        progress: called with the number of bytes that are written to `out/hf`, and of all bytes.

    Returns:
        The model's `config.json`.

    Raises:
        ValueError: there is no checkpoint of the fork, or `out` is not empty.
    """
    source = MegatronSource(path, tokenizer, fork=True)
    layout.check(source.config)
    reads = [path, *([tokenizer] if tokenizer else [])]
    with new_folder(out, reads=reads, force=force) as folder:
        config = export(source, folder / HF, max_shard_bytes=DEFAULT_SHARD_BYTES, progress=progress)
        to_megatron(folder / HF, folder / MEGATRON, layout=layout, name=out / MEGATRON)
    return config
