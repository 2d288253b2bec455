"""Comparison of two models: their tensors bit by bit, and their outputs for a text."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.remoe.convert.forward import Forward, forward
from megatron.remoe.convert.source import Source, open_source
from megatron.remoe.convert.table import PADDING, check_names

# fp32: both sides add up in another order. Logits of a trained model are of order 10, their fp32
# rounding is 1e-6, and the two paths differ by a few roundings.
# bf16 has 8 bits. Both sides round every activation, at other places, by up to 2**-9 of its size;
# over the layers this adds up to a few roundings of the largest logits, which are of order 10.
LOGIT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.25}
# Share of (token, expert) pairs that are active on one side only: in bf16, a logit near zero or
# near another one may change sides.
FLIP_TOLERANCE = {torch.float32: 0.0, torch.bfloat16: 0.02}


@dataclass(frozen=True)
class ModelComparison:
    """The differences between two models.

    Attributes:
        tensors: the number of tensors, by their names in Hugging Face.
        differing: the largest difference in every tensor that is not bit-equal.
        logit_differences: the largest absolute difference at every token.
        flipped: the share of (token, expert) pairs that are active in one model only.
        greedy: whether both models generate the same tokens greedily.
        dtype: the dtype of the forward passes.
    """

    tensors: int
    differing: dict[str, float]
    logit_differences: Tensor
    flipped: float
    greedy: bool
    dtype: torch.dtype

    @property
    def ok(self) -> bool:
        """Whether the models differ no more than the dtype allows."""
        logits = float(self.logit_differences.max()) <= LOGIT_TOLERANCE[self.dtype]
        flips = self.flipped <= FLIP_TOLERANCE[self.dtype]
        same_text = self.greedy or self.dtype != torch.float32
        return not self.differing and logits and flips and same_text


def compare(
    a: Path,
    b: Path,
    text: str | list[int],
    *,
    dtype: torch.dtype = torch.float32,
    new_tokens: int = 20,
    tokenizer: Path | None = None,
) -> ModelComparison:
    """Compare two models, each a Megatron run or checkpoint or a Hugging Face folder.

    Args:
        a, b: the models.
        text: the text to run them on; token ids for models without a tokenizer.
        dtype: the dtype of the forward passes.
        new_tokens: how many tokens to generate greedily after the first half of the text.
        tokenizer: a tokenizer to use in place of the one that a run names.

    Raises:
        ValueError: the models have different architectures, or the text cannot be tokenized.
    """
    one, other = open_source(a, tokenizer), open_source(b, tokenizer)
    if dtype not in LOGIT_TOLERANCE:
        raise ValueError("models are compared in fp32 or bf16; choose one of them")
    count, differing = _compare_tensors(one, other)
    positions = one.config["max_position_embeddings"]
    if new_tokens >= positions:
        raise ValueError(
            f"new-tokens is {new_tokens}, but the model has {positions} positions; generate fewer"
        )
    tokens = _tokenize(one, text)[:positions]
    vocab = min(source.config["vocab_size"] for source in (one, other))
    if max(tokens) >= vocab:
        raise ValueError(
            f"the text has token {max(tokens)}, the models' vocabulary has {vocab} entries; give "
            f"tokens below that"
        )
    prompt = max(1, min(len(tokens) // 2, positions - new_tokens))
    request = {"dtype": dtype, "prompt": prompt, "new_tokens": new_tokens}
    first, second = (forward(source, tokens, **request) for source in (one, other))
    return ModelComparison(
        count,
        differing,
        (first.logits - second.logits).abs().amax(dim=1),
        _flipped(first, second),
        first.greedy == second.greedy,
        dtype,
    )


def _tokenize(source: Source, text: str | list[int]) -> list[int]:
    if not isinstance(text, str):
        return text
    if source.tokenizer is None:
        raise ValueError("the model has no tokenizer; name one (--tokenizer PATH)")
    tokens = source.tokenizer.encode(text)
    if len(tokens) < 2:
        raise ValueError(f"the text {text!r} has {len(tokens)} tokens; it needs at least 2")
    return tokens


def _compare_tensors(one: Source, other: Source) -> tuple[int, dict[str, float]]:
    shared = [{name for item in s.items for name in item.hf} for s in (one, other)]
    check_names("the second model", shared[1], shared[0])
    differing, count = {}, 0
    theirs = {next(iter(item.hf)): item for item in other.items}
    for item in one.items:
        ours = one.hf_tensors(item)
        counterpart = other.hf_tensors(theirs[next(iter(item.hf))])
        for name, tensor in ours.items():
            if name.startswith(PADDING) and tensor.shape != counterpart[name].shape:
                continue  # padding of the vocabulary, of which each layout has what it needs
            count += 1
            match = counterpart[name]
            if tensor.shape != match.shape:
                raise ValueError(
                    f"{name} has shape {list(tensor.shape)} in one model and {list(match.shape)} "
                    f"in the other; only models of one architecture can be compared"
                )
            if tensor.dtype != match.dtype or not torch.equal(tensor, match):
                differing[name] = float((tensor.double() - match.double()).abs().max())
    return count, differing


def _flipped(first: Forward, second: Forward) -> float:
    pairs = list(zip(first.active, second.active, strict=True))
    if not pairs:
        return 0.0
    return float(torch.stack([(a != b).float().mean() for a, b in pairs]).mean())
