"""The tokenizer of a run, which is found by the run's arguments and copied for Hugging Face."""

import argparse
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron.remoe.data.tokenizer import (
    CONFIG,
    GPT2_FILES,
    largest_id,
    load_gpt2_tokenizer,
    load_tokenizer,
    save_tokenizer,
    special_token,
)
from megatron.remoe.files import read_json_object

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
          "vocab.json", "merges.txt", "chat_template.jinja")  # fmt: skip
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer on disk.

    Attributes:
        path: a folder, a `tokenizer.json`, or GPT-2's vocabulary.
        merges: the file of GPT-2's merges, if `path` is its vocabulary.
    """

    path: Path
    merges: Path | None = None

    @classmethod
    def find(
        cls, args: argparse.Namespace, chosen: Path | None, kept: Iterable[Path] = ()
    ) -> "TokenizerFiles | None":
        """Return the chosen tokenizer, or the one that the arguments name; None if they do not.

        Args:
            args: a run's arguments.
            chosen: a tokenizer to use in place of the run's.
            kept: folders in which the run's tokenizer may be, in the place of the path in the
                arguments.

        Raises:
            ValueError: the tokenizer does not exist here.
        """
        if chosen is None:
            kind = args.tokenizer_type
            copies = [folder for folder in kept if _is_tokenizer(folder)]
            if copies and kind in ("GPT2BPETokenizer", "HuggingFaceTokenizer"):
                return cls(copies[0])
            if kind == "GPT2BPETokenizer" and args.vocab_file and args.merge_file:
                return cls(Path(args.vocab_file), Path(args.merge_file))
            if kind != "HuggingFaceTokenizer" or not args.tokenizer_model:
                return None
            chosen = Path(args.tokenizer_model)
        return cls.chosen(chosen)

    @classmethod
    def chosen(cls, path: Path) -> "TokenizerFiles":
        """Return the tokenizer of a folder or a `tokenizer.json`.

        Raises:
            ValueError: the path does not exist here.
        """
        if not path.exists():
            raise ValueError(
                f"the tokenizer {path} does not exist here, and the run has no copy of it; go to "
                f"the directory that it was started in, or name a copy (--tokenizer PATH)"
            )
        return cls(path)

    @classmethod
    def of_folder(cls, folder: Path, chosen: Path | None) -> "TokenizerFiles | None":
        """Return the chosen tokenizer, or that of a model's folder; None if it has none.

        Raises:
            ValueError: the chosen one does not exist here.
        """
        if chosen is not None:
            return cls.chosen(chosen)
        return cls(folder) if (folder / "tokenizer.json").is_file() else None

    @cached_property
    def _loaded(self) -> tuple[Tokenizer, str]:
        if self.merges is not None:
            return load_gpt2_tokenizer(self.path, self.merges)
        return load_tokenizer(self.path)

    @property
    def vocab_size(self) -> int:
        """The number of entries, including ids that no token has."""
        return largest_id(self._loaded[0]) + 1

    def check_fits(self, vocab_size: int) -> None:
        """Refuse a tokenizer with more entries than a model's vocabulary; raises a ValueError."""
        if self.vocab_size > vocab_size:
            raise ValueError(
                f"vocabulary mismatch: the tokenizer of {self.path} has {self.vocab_size} "
                f"entries, config.json has vocab_size {vocab_size}; they must be of one model"
            )

    @property
    def kind(self) -> str:
        """What the tokenizer is: the type of its model and its number of entries."""
        return f"{type(self._loaded[0].model).__name__}, {self.vocab_size:,} entries"

    def vocabulary(self) -> dict[str, int]:
        """Return the id of every token."""
        entries: dict[str, int] = self._loaded[0].get_vocab()
        return entries

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        ids: list[int] = self._loaded[0].encode(text).ids
        return ids

    def texts(self, ids: Iterable[int]) -> dict[int, str]:
        """Return the text of each id as it is inside of a text, with the space in front of a word.

        Bytes that are no character alone are U+FFFD. An id that no token has is left out.
        """
        tokenizer, _ = self._loaded
        # Some decoders strip the space in front of the first token, so that one stands before it.
        before = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
        start = tokenizer.decode(before, skip_special_tokens=False)
        found = {}
        for number in ids:
            token = tokenizer.id_to_token(number)
            if token is not None:
                whole = tokenizer.decode([*before, number], skip_special_tokens=False)
                found[number] = whole[len(start) :] if whole.startswith(start) else token
        return found

    @property
    def ids(self) -> dict[str, int | None]:
        """The ids of the special tokens; padding may have that of the end of documents."""
        tokenizer, end = self._loaded
        path = self.path / CONFIG
        ids = {}
        for name in _IDS:
            token = special_token(path, name.removesuffix("_id")) if self._settings else None
            ids[name] = tokenizer.token_to_id(token) if token else None
        ids["eos_token_id"] = tokenizer.token_to_id(end)
        if ids["pad_token_id"] is None:
            ids["pad_token_id"] = ids["eos_token_id"]
        return ids

    @cached_property
    def _settings(self) -> dict[str, Any]:
        path = self.path / CONFIG
        return read_json_object(path, "copy it again") if path.is_file() else {}

    def write(self, folder: Path) -> None:
        """Write the tokenizer's files to a folder, set to pad on the left, for generation."""
        tokenizer, end = self._loaded
        has_files = self.path.is_dir() and (self.path / "tokenizer.json").is_file()
        if has_files and self._settings:
            for name in _FILES:
                if (self.path / name).is_file():
                    shutil.copyfile(self.path / name, folder / name)
            settings = dict(self._settings)
        else:
            scratch = folder / ".tokenizer"
            save_tokenizer(tokenizer, end, scratch)
            for file in scratch.iterdir():
                file.rename(folder / file.name)
            scratch.rmdir()
            settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.setdefault("pad_token", end)
        settings.setdefault("padding_side", "left")
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _is_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the files of a tokenizer that can be exported."""
    pairs = [("tokenizer.json",), *GPT2_FILES]
    return any(all((folder / name).is_file() for name in names) for names in pairs)
