"""A checkpoint of the published implementation to both of our formats."""

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
    """Write `out/hf`, for transformers, and `out/megatron`, to train on.

    Args:
        path: a folder of checkpoints, or one of them; legacy or `torch_dist`.
        out: the folder to make.
        layout: of the checkpoint to train on.
        tokenizer: in place of the one that the arguments name.
        force: replace `out`.
        progress: told how many bytes are written to `out/hf`, and how many there are.

    Returns:
        The model's `config.json`.

    Raises:
        ValueError: no checkpoint of the fork, or something in `out`.
    """
    source = MegatronSource(path, tokenizer, fork=True)
    layout.check(source.config)
    reads = [path, *([tokenizer] if tokenizer else [])]
    with new_folder(out, reads=reads, force=force) as folder:
        config = export(source, folder / HF, max_shard_bytes=DEFAULT_SHARD_BYTES, progress=progress)
        to_megatron(folder / HF, folder / MEGATRON, layout=layout, name=out / MEGATRON)
    return config
