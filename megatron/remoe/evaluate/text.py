"""Labeled text that a model reads: sequences of several domains in turn, with their next tokens."""

import hashlib
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.convert.tokenizer import TokenizerFiles
from megatron.remoe.data.pairs import check_pair, prefixes_of
from megatron.remoe.evaluate.perplexity import find_domains, sequences


@dataclass(frozen=True)
class Text:
    """Sequences of several domains; N sequences, S tokens of each.

    Attributes:
        inputs: ids, int64 `[N, S]`.
        labels: the token that follows each, int64 `[N, S]`.
        domains: the number of each sequence's domain, int64 `[N]`.
        names: the names of the domains.
        data: the token files as they were named.
        seed: the seed of the order of documents.
    """

    inputs: Tensor
    labels: Tensor
    domains: Tensor
    names: tuple[str, ...]
    data: str
    seed: int

    @property
    def length(self) -> int:
        """The number of tokens of a sequence."""
        return self.inputs.shape[1]

    def rows(self, start: int, end: int | None) -> "Text":
        """Return a slice of the sequences."""
        return replace(
            self,
            inputs=self.inputs[start:end],
            labels=self.labels[start:end],
            domains=self.domains[start:end],
        )

    def fingerprint(self) -> str:
        """Return a hash of all ids and domains."""
        return hash_of(self.inputs, self.labels, self.domains)


def hash_of(*tensors: Tensor) -> str:
    """Return the SHA-256 of the values of tensors of any type, in hexadecimal."""
    found = hashlib.sha256()
    for tensor in tensors:
        values: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found.update(values.data)
    return found.hexdigest()


def domains_of(
    data: Path | None, args: Namespace | None, own: TokenizerFiles | None
) -> tuple[str, dict[str, Path]]:
    """Return the token files as they are named, and the prefix of each domain.

    Args:
        data: a folder of token files; None stands for the validation files of a run.
        args: the arguments of a run; None for a model that is no run.
        own: the model's tokenizer; None if it has none.

    Raises:
        ValueError: there are no token files, those of one domain only, or those of another
            tokenizer.
    """
    if data is not None:
        named, domains = str(data), find_domains(data, own)
    else:
        named, domains = validation_files(args)
    if len(domains) < 2:
        raise ValueError(
            f"{named} holds text of one domain only ({next(iter(domains))}), so that nothing can "
            f"be compared; name a folder with a pair of token files for each domain (--data)"
        )
    return named, domains


def validation_files(args: Namespace | None, option: str = "--data") -> tuple[str, dict[str, Path]]:
    """Return the validation files of a run as they are named, and the prefix of each domain.

    Args:
        args: the arguments of a run; None for a model that is no run.
        option: the option of the command that names other files.

    Raises:
        ValueError: the run has none, or they are not here.
    """
    prefixes = [Path(entry) for entry in prefixes_of(getattr(args, "valid_data_path", None) or ())]
    if not prefixes:
        what = "the model is no run" if args is None else "the run has no valid_data_path"
        raise ValueError(f"{what}, so that it names no text; name token files ({option})")
    for prefix in prefixes:
        if not Path(f"{prefix}.idx").is_file():
            raise ValueError(
                f"{prefix}.idx does not exist here; go to the directory that the run was started "
                f"in, or name token files ({option})"
            )
        check_pair(prefix)
    names = getattr(args, "validation_set_names", None) or [prefix.name for prefix in prefixes]
    if len(set(names)) < len(prefixes):  # files of several folders may share their names
        names = [str(prefix) for prefix in prefixes]
    return " ".join(map(str, prefixes)), dict(zip(names, prefixes, strict=True))


def read_text(
    data: str, domains: Mapping[str, Path], *, length: int, tokens: int, seed: int
) -> Text:
    """Read whole sequences, one of each domain in turn.

    Args:
        data: the token files as they were named.
        domains: the prefix of the token files of each domain.
        length: the number of tokens of a sequence.
        tokens: the largest number of tokens.
        seed: the seed of the order of documents.

    Raises:
        ValueError: there are too few tokens for a sequence of every domain.
    """
    count = tokens // length
    if count < len(domains):
        one = f"one sequence of {length}" + (f" for each of {len(domains)} domains") * (count > 0)
        raise ValueError(
            f"tokens is {tokens}, less than {one}; ask for more (--tokens), or for shorter "
            f"sequences (--sequence-length)"
        )
    with tempfile.TemporaryDirectory() as scratch:
        sets = [sequences(prefix, length, seed, Path(scratch)) for prefix in domains.values()]
        turns = [(i, of) for of, domain in enumerate(sets) for i in range(len(domain))]
        turns = sorted(turns)[:count]
        samples = [sets[of][i] for i, of in turns]
        inputs, labels = (torch.stack([s[key] for s in samples]) for key in ("tokens", "labels"))
    numbers = torch.tensor([of for _, of in turns])
    return Text(inputs, labels, numbers, tuple(domains), data, seed)
