"""Masked language modeling: samples in which a model has to find hidden tokens (arXiv 1810.04805).

15% of the tokens of a sequence are chosen, of which 80% become the mask token, 10% a random token
and 10% stay, and the loss is that of the chosen ones. The ends of documents are never chosen. As in
RoBERTa's FULL-SENTENCES (arXiv 1907.11692) a sequence may go on with the next document, so that no
token of it is padding, and every epoch masks other tokens.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

CHOSEN = 0.15


def mask_token(vocab_size: int, padded_vocab_size: int) -> int:
    """Return the token that hides others: the first row of the embedding after the vocabulary.

    Raises:
        ValueError: the embedding has no such row.
    """
    if vocab_size >= padded_vocab_size:
        raise ValueError(
            f"padded_vocab_size is {padded_vocab_size}, and the tokenizer has {vocab_size} tokens, "
            f"which leaves no row for the mask token of masked_lm; choose a larger one"
        )
    return vocab_size


class MaskedTokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Samples of a GPT dataset with hidden tokens; the same index has the same ones.

    Reading a sample with padding, whose loss mask has zeros, raises a ValueError.

    Args:
        dataset: Megatron's dataset, of samples with `tokens`, `loss_mask` and `position_ids`, all
            `[s]`.
        seed: of the choice.
        mask: the token that hides others.
        end_of_document: the token that is never chosen.
        vocab_size: random tokens are below it.
    """

    def __init__(
        self, dataset: Any, *, seed: int, mask: int, end_of_document: int, vocab_size: int
    ) -> None:
        self.dataset, self.seed = dataset, seed
        self.mask, self.end_of_document, self.vocab_size = mask, end_of_document, vocab_size
        # Megatron's loader looks for it.
        self.index_split = getattr(dataset, "split", None) or dataset.index_split

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.dataset[index]
        if not sample["loss_mask"].all():
            raise ValueError(
                f"sample {index} of masked_lm has padding, which would be hidden and attended to "
                f"as text is; write token files without padding (remoe data tokenize does)"
            )
        labels = sample["tokens"]
        chosen, tokens = self._hide(labels.numpy(), np.random.default_rng([self.seed, int(index)]))
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": labels,
            "loss_mask": torch.from_numpy(chosen).float(),
            "position_ids": sample["position_ids"],
        }

    def _hide(self, tokens: Any, draw: np.random.Generator) -> tuple[Any, Any]:
        """Return which tokens are chosen, bool `[s]`, and the tokens that the model sees."""
        candidates = np.flatnonzero(tokens != self.end_of_document)
        count = min(len(candidates), max(1, round(CHOSEN * len(candidates))))
        places = draw.choice(candidates, size=count, replace=False)
        chosen, seen = np.zeros(len(tokens), dtype=bool), tokens.copy()
        chosen[places] = True
        what = draw.random(count)
        seen[places[what < 0.8]] = self.mask
        random = places[what >= 0.9]
        seen[random] = draw.integers(self.vocab_size, size=len(random))
        return chosen, seen
