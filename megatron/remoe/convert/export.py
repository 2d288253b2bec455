"""Export of a model, such as a Megatron checkpoint, to a Hugging Face folder."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import remoe.hf
from megatron.remoe.convert import card
from megatron.remoe.convert.hf_source import DTYPES, PADDING_FILE, check_finite, validated
from megatron.remoe.convert.output import new_folder
from megatron.remoe.convert.source import MegatronSource, Source
from megatron.remoe.convert.table import CONFIG, PADDING, Config, dtype_of
from megatron.remoe.formats.safetensors import ShardWriter, Spec

DEFAULT_SHARD_BYTES = 5 * 10**9
_SOURCES = tuple(f"{name}_remoe.py" for name in ("configuration", "modeling", "budget", "experts"))
Progress = Callable[[int, int], None]


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of a short name; None stays None.

    Raises:
        ValueError: the name is another one.
    """
    if name is not None and name not in DTYPES:
        raise ValueError(f"dtype is {name!r}; it must be one of {', '.join(DTYPES)}")
    return None if name is None else DTYPES[name]


def to_hf(
    path: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    tokenizer: Path | None = None,
    license: str | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Config:
    """Write a checkpoint as transformers loads it, with one tensor at a time in memory.

    Args:
        path: a run directory, a folder of checkpoints, or a checkpoint of any parallel layout.
        out: the folder to make.
        dtype: the dtype of the weights; None is that of the checkpoint.
        max_shard_bytes: the largest size of a file of weights.
        tokenizer: a tokenizer to use in place of the one that the run names.
        license: an identifier of the hub for the model card; None claims no license.
        force: whether to replace `out`.
        progress: called with the number of bytes that are written, and of all bytes.

    Returns:
        The model's `config.json`.

    Raises:
        ValueError: there is no checkpoint, the model cannot be converted, or `out` is not empty.
    """
    source = MegatronSource(path, tokenizer)
    return export(
        source,
        out,
        reads=[path, *([tokenizer] if tokenizer else [])],
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        license=license,
        budget=source.folder,
        force=force,
        progress=progress,
    )


def export(
    source: Source,
    out: Path,
    *,
    reads: Iterable[Path] = (),
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    license: str | None = None,
    budget: Path | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
    files: Mapping[str, str] | None = None,
) -> Config:
    """Write an open model as `to_hf` does; `out` must not replace anything in `reads`.

    The other `files`, texts by their names, are written beside the model.
    If the folder `budget` has a curve of `remoe budget`, the model gets a copy.
    """
    card.check_license(license)
    dtype = dtype or source.dtype
    config = source.config | {"dtype": str(dtype).removeprefix("torch.")}
    validated(config)
    with new_folder(out, reads=reads, force=force) as folder:
        _write_weights(source, folder, dtype, max_shard_bytes, progress)
        _write_config(config, folder)
        if source.tokenizer is not None:
            source.tokenizer.write(folder)
        for file in (budget / name for name in card.BUDGET_FILES) if budget else ():
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        for name, text in (files or {}).items():
            (folder / name).write_text(text)
        (folder / card.NAME).write_text(card.model_card(source, config, folder, license))
    return config


def _write_weights(
    source: Source, folder: Path, dtype: torch.dtype, shard_bytes: int, progress: Progress
) -> None:
    shapes = [(name, shape) for item in source.items for name, shape in item.hf.items()]
    stored = [(n, s) for n, s in shapes if not n.startswith(CONFIG) and 0 not in s]
    weights: Spec = {n: (dtype_of(n, dtype), s) for n, s in stored if not n.startswith(PADDING)}
    padding: Spec = {n: (dtype, s) for n, s in stored if n.startswith(PADDING)}
    with ExitStack() as stack:
        model = stack.enter_context(ShardWriter(folder, weights, shard_bytes))
        if padding:
            rows = stack.enter_context(ShardWriter(folder, padding, 2**63, name=PADDING_FILE))
        done = 0
        for item in source.items:
            for name, tensor in source.hf_tensors(item).items():
                if name in weights:
                    cast = _cast(name, tensor, dtype_of(name, dtype))
                    model.write(name, cast)
                    done += cast.nbytes
                elif name in padding:
                    rows.write(name, _cast(name, tensor, dtype))
            progress(done, model.total)


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast a tensor; refuse a dtype whose narrower range makes infinities."""
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    check_finite(f"{name} as {str(dtype).removeprefix('torch.')}", cast)
    return cast


def _write_config(config: Config, folder: Path) -> None:
    whole = dict(config)
    if config["model_type"] == "remoe":
        whole["auto_map"] = {
            "AutoConfig": "configuration_remoe.ReMoEConfig",
            "AutoModel": "modeling_remoe.ReMoEModel",
            "AutoModelForCausalLM": "modeling_remoe.ReMoEForCausalLM",
        }
        whole["format_version"] = validated(config)["format_version"]
        for name in _SOURCES:
            shutil.copyfile(Path(remoe.hf.__file__).with_name(name), folder / name)
    _write_json(folder / "config.json", whole)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: config[name] for name in names if config[name] is not None}
    _write_json(folder / "generation_config.json", ids)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
