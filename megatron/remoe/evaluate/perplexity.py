"""Compute the loss of a model on token files by domain, as Megatron's validation does.

Megatron's own dataset cuts the documents into sequences, in the order that its seed gives, so that
every token is predicted from the same context as in a validation of the run.
"""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812

from megatron.remoe.convert.export import Progress
from megatron.remoe.convert.exported import check_vocabulary, load_source
from megatron.remoe.convert.source import MegatronSource, open_source
from megatron.remoe.convert.table import Config
from megatron.remoe.convert.tokenizer import TokenizerFiles
from megatron.remoe.data.pairs import check_pair

DEFAULT_SEED = 1234  # Megatron's


@dataclass(frozen=True)
class Loss:
    """The loss on one domain, or on all domains.

    Attributes:
        loss: mean over tokens, in nats.
        tokens: number of tokens that were predicted.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return math.exp(min(self.loss, 700.0))


def find_domains(data: Path, own: TokenizerFiles | None) -> dict[str, Path]:
    """Return the prefixes of token files by domain: all of a folder, or one prefix.

    Args:
        data: a folder of token files, or one of them without its suffix.
        own: the tokenizer of the model that reads them; None if it has none.

    Raises:
        ValueError: there are no token files, some are damaged, or they are of another tokenizer.
    """
    if data.is_dir():
        files = [path for path in data.iterdir() if path.suffix in (".bin", ".idx")]
        prefixes = sorted({path.with_suffix("") for path in files})
    else:
        prefixes = [data] if Path(f"{data}.idx").is_file() else []
    complete = {prefix.name: prefix for prefix in prefixes}
    if not complete:
        raise ValueError(
            f"{data} holds no .bin/.idx files; name a folder of them or one without its suffix "
            f"(remoe data tokenize makes them)"
        )
    for prefix in prefixes:
        check_pair(prefix)
    _check_tokenizer(data, own)
    return complete


def _check_tokenizer(data: Path, own: TokenizerFiles | None) -> None:
    """Compare the model's tokenizer with the one beside the data, or one folder above."""
    if own is None:
        return
    place = data.absolute()
    for folder in (place, *place.parents[:2]):
        if (folder / "tokenizer/tokenizer.json").is_file():
            theirs = TokenizerFiles(folder / "tokenizer")
            if theirs.vocabulary() != own.vocabulary():
                raise ValueError(
                    f"{data} was made with the tokenizer {theirs.path}, which has other entries "
                    f"than that of the model, {own.path}; tokenize with the model's tokenizer"
                )
            return


def perplexity(
    path: Path,
    data: Path,
    *,
    sequence_length: int | None = None,
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 8,
    tokenizer: Path | None = None,
    budget: Mapping[str, Any] | None = None,
    progress: Progress = lambda done, total: None,
) -> dict[str, Loss]:
    """Return the loss of every domain, and that of all tokens as `all`.

    Args:
        path: Hugging Face folder, run or checkpoint.
        data: folder of token files, or one of them without its suffix.
        sequence_length: length of the sequences; None is that of the run, or else the number of
            positions of the model.
        seed: seed of the order of documents; None is that of the run, or else 1234.
        dtype: dtype of the model.
        batch_size: number of sequences at a time.
        tokenizer: tokenizer to use in place of the model's own.
        budget: fields of the model's config that replace its own budget of active experts.
        progress: called with the number of sequences that are done, and of all sequences.

    Raises:
        ValueError: there is no model or no data, or the data has another vocabulary.
    """
    source = open_source(path, tokenizer)
    domains = find_domains(data, source.tokenizer)
    config = source.config
    if seed is None:
        seed = getattr(source.args, "seed", None) if isinstance(source, MegatronSource) else None
    length = sequence_length or default_length(config)
    model = load_source(source, dtype, budget)
    with tempfile.TemporaryDirectory() as scratch:
        sets = {
            name: sequences(prefix, length, seed or DEFAULT_SEED, Path(scratch))
            for name, prefix in domains.items()
        }
        done, total = 0, sum(map(len, sets.values()))
        losses = {}
        for name, dataset in sets.items():
            losses[name] = _loss(
                model, dataset, batch_size, lambda n, done=done: progress(done + n, total)
            )
            done += len(dataset)
    tokens = sum(loss.tokens for loss in losses.values())
    mean = math.fsum(loss.loss * loss.tokens for loss in losses.values()) / tokens
    return losses | {"all": Loss(mean, tokens)}


def default_length(config: Config) -> int:
    """Return the length of a run's sequences, or else the number of positions of the model."""
    facts = config.get("training_facts") or {}
    return int(facts.get("sequence_length") or config["max_position_embeddings"])


def sequences(prefix: Path, length: int, seed: int, cache: Path) -> Any:
    """Return Megatron's dataset over all documents, once.

    Args:
        prefix: a token file without its suffix.
        length: the number of tokens of a sequence.
        seed: the seed of the order of documents.
        cache: a folder for the dataset's own files.

    Raises:
        ValueError: the file has too few tokens for one sequence.
    """
    import numpy as np
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    # The dataset needs no more of a tokenizer than this; no token is padding.
    tokenizer = SimpleNamespace(
        vocab_size=None, pad=-1, eod=-1, unique_identifiers={"class": "none"}
    )
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=length,
        blend_per_split=[None, ([str(prefix)], None), None],
        path_to_cache=str(cache),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    documents = IndexedDataset(str(prefix))
    indices = np.arange(documents.sequence_lengths.shape[0], dtype=np.int32)
    dataset = GPTDataset(documents, str(prefix), indices, None, Split.valid, config)
    if len(dataset) == 0:
        raise ValueError(
            f"{prefix} has fewer than {length + 1} tokens, so no sequence of {length}; use shorter "
            f"sequences (--sequence-length)"
        )
    return dataset


@torch.no_grad()
def _loss(model: Any, dataset: Any, batch_size: int, progress: Any) -> Loss:
    total, tokens = 0.0, 0
    for start in range(0, len(dataset), batch_size):
        samples = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        inputs, labels = (torch.stack([s[key] for s in samples]) for key in ("tokens", "labels"))
        check_vocabulary(torch.cat((inputs, labels)), model.config.vocab_size)
        logits = model(inputs.to(model.device), use_cache=False).logits.float().flatten(0, 1)
        loss = F.cross_entropy(logits, labels.to(model.device).flatten(), reduction="sum")
        total, tokens = total + float(loss), tokens + labels.numel()
        progress(start + len(samples))
    return Loss(total / tokens, tokens)
