"""The flags that follow from a folder of token files (`data_root`), by its manifest.

The manifest of `remoe data tokenize` names the files, the size of each, and the tokenizer. What a
config gives itself stays as it is, and what contradicts the folder is refused.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

from megatron.remoe.data.manifest import UNFINISHED, read_token_manifest
from megatron.remoe.data.pairs import prefixes_of

PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
_ELSEWHERE = ("data_args_path", "per_split_data_args_path", "mock_data")
_TOKENIZER = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file")
_PADDING = 128  # the embedding gets a multiple of so many rows, in every layout
_VALID_SHARE = 0.02  # of the documents, where the folder holds none out


def with_data_root(flags: dict[str, Any], root: str) -> dict[str, Any]:
    """Return the flags of a config with those that follow from its `data_root`.

    Data, tokenizer and the size of the embedding are each added unless the config gives them. A
    config that gives data and tokenizer needs no manifest, if its data are in the folder.

    Args:
        flags: The config's flags.
        root: The folder of the token files.

    Raises:
        ValueError: The folder has no whole token files, or a flag contradicts it.
    """
    named = [key for key in PATHS if flags.get(key)]
    _refuse_other_data(flags, named, root)
    has_data = bool(named) or any(flags.get(key) for key in _ELSEWHERE)
    has_tokenizer = any(flags.get(key) for key in _TOKENIZER)
    if has_data and has_tokenizer:
        return flags
    manifest = _read(root)
    added: dict[str, Any] = {}
    if not has_data:
        added |= _data(root, manifest["outputs"], flags)
    added |= _tokenizer(root, flags, has_tokenizer)
    return {key: value for key, value in flags.items() if key not in added} | added


def _read(root: str) -> dict[str, Any]:
    manifest = read_token_manifest(Path(root)) if Path(root).is_dir() else None
    if manifest is None:
        raise ValueError(
            f"data_root: {root} holds no token files with a manifest.json; make them (remoe data "
            f"tokenize FILES --out {root}), or correct the path"
        )
    if manifest.get(UNFINISHED) or not manifest["outputs"]:
        raise ValueError(
            f"data_root: the token files in {root} are not finished; run the same remoe data "
            f"tokenize again"
        )
    return manifest


def _refuse_other_data(flags: dict[str, Any], named: list[str], root: str) -> None:
    """Refuse data outside of the folder, with which `data_root` would have no effect."""
    for key in named:
        values = flags[key] if isinstance(flags[key], list) else [flags[key]]
        for prefix in prefixes_of(values):
            if not os.path.abspath(prefix).startswith(os.path.abspath(root) + os.sep):
                raise ValueError(
                    f"data_root is {root}, but {key} names {prefix}, which is not in it; leave one "
                    f"of them out ({key}=null; examples/own_corpus.yaml needs data_root alone)"
                )


def _data(root: str, outputs: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags that name the data: each file in proportion to its tokens."""
    sides = {side: [n for n in outputs if n.startswith(f"{side}/")] for side in ("train", "valid")}
    flat = [name for name in outputs if not name.startswith(("train/", "valid/"))]
    blend = partial(_blend, root, outputs)
    if flat and any(sides.values()):
        raise ValueError(
            f"data_root: {root} holds files with validation files of their own "
            f"({(sides['train'] + sides['valid'])[0]}) and files without ({flat[0]}); tokenize "
            f"them into two folders, or name train_data_path and valid_data_path"
        )
    if flat:
        return {"data_path": blend(flat)} | ({} if flags.get("split") else _split(outputs))
    for side, names in sides.items():
        if not names:
            raise ValueError(f"data_root: {root} holds no files {side}/*; tokenize them as well")
    added: dict[str, Any] = {"train_data_path": blend(sides["train"])}
    several = {"multiple_validation_sets": True, "full_validation": True}
    if any(flags.get(key) is False for key in several):  # a sample of all sets together
        return added | {"valid_data_path": blend(sides["valid"])}
    names = [name.removeprefix("valid/") for name in sides["valid"]]
    added |= several | {"valid_data_path": [_prefix(root, name) for name in sides["valid"]]}
    return added | ({} if flags.get("validation_set_names") else {"validation_set_names": names})


def _prefix(root: str, name: str) -> str:
    return os.path.join(root, name)  # `Path` would make the number 01 of ./01


def _blend(root: str, outputs: dict[str, Any], names: list[str]) -> list[Any]:
    # Megatron reads files without weights once, and then has no more samples.
    return [part for name in names for part in (outputs[name]["tokens"], _prefix(root, name))]


def _split(outputs: dict[str, Any]) -> dict[str, Any]:
    """Return Megatron's split by documents, with one for validation in the smallest file."""
    name, fewest = min(((n, e["documents"]) for n, e in outputs.items()), key=lambda pair: pair[1])
    if fewest < 2:
        raise ValueError(
            f"data_root: {name} has {fewest} document, which cannot be both for training and for "
            f"validation; split it into documents of a line each, or give split=1,0,0 eval_iters=0"
        )
    valid = max(_VALID_SHARE, 1 / fewest)
    return {"split": f"{1 - valid:.6f},{valid:.6f},0"}


def _tokenizer(root: str, flags: dict[str, Any], is_given: bool) -> dict[str, Any]:
    """Return the flags of the tokenizer and of the embedding's size."""
    from megatron.remoe.data.tokenizer import largest_id, load_gpt2_tokenizer, load_tokenizer

    folder = os.path.join(root, "tokenizer")
    own, _ = load_tokenizer(Path(folder))
    kind, model = flags.get("tokenizer_type"), flags.get("tokenizer_model")
    other = None
    if kind == "GPT2BPETokenizer" and flags.get("vocab_file") and flags.get("merge_file"):
        other, _ = load_gpt2_tokenizer(Path(flags["vocab_file"]), Path(flags["merge_file"]))
    elif kind == "HuggingFaceTokenizer" and isinstance(model, str) and Path(model).exists():
        other, _ = load_tokenizer(Path(model))
    if other is not None and other.get_vocab() != own.get_vocab():
        raise ValueError(
            f"tokenizer_model is {model or flags['vocab_file']}, and the tokens in data_root "
            f"{root} are of another vocabulary; leave the tokenizer out, or tokenize the data with "
            f"it (remoe data tokenize --tokenizer)"
        )
    # A masked language model has one more token, which hides others.
    rows = largest_id(own) + 1 + bool(flags.get("masked_lm"))
    given = flags.get("padded_vocab_size")
    if isinstance(given, int) and given < rows:
        raise ValueError(
            f"padded_vocab_size is {given}, and the tokens in data_root {root} need {rows} rows; "
            f"choose at least {rows}, or leave it out"
        )
    added: dict[str, Any] = {}
    if not is_given:
        added = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": folder}
    return added | ({} if given else {"padded_vocab_size": -(-rows // _PADDING) * _PADDING})
