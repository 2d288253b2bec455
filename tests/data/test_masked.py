"""Hidden tokens of a masked language model."""

import numpy as np
import pytest
import torch

from megatron.remoe.data.masked import MaskedTokens, mask_token

LENGTH, VOCAB, EOD, MASK = 4000, 50, 0, 50


class Samples:
    """A dataset as Megatron's; every 20th token ends a document."""

    index_split = "train"

    def __len__(self):
        return 3

    def __getitem__(self, index):
        tokens = torch.from_numpy(np.random.default_rng(index).integers(1, VOCAB, LENGTH))
        tokens[::20] = EOD
        positions = torch.arange(LENGTH)
        return {"tokens": tokens, "labels": tokens.roll(-1), "position_ids": positions,
                "loss_mask": torch.ones(LENGTH), "attention_mask": torch.ones(1)}  # fmt: skip


def masked(seed=1):
    return MaskedTokens(Samples(), seed=seed, mask=MASK, end_of_document=EOD, vocab_size=VOCAB)


def test_tokens_are_hidden_as_in_bert():
    sample, given = masked()[2], Samples()[2]
    assert torch.equal(sample["labels"], given["tokens"])
    assert torch.equal(sample["position_ids"], given["position_ids"])
    assert set(sample) == {"tokens", "labels", "loss_mask", "position_ids"}
    chosen = sample["loss_mask"].bool()
    assert chosen.sum() == round(0.15 * (given["tokens"] != EOD).sum().item())
    assert not chosen[given["tokens"] == EOD].any()
    assert torch.equal(sample["tokens"][~chosen], given["tokens"][~chosen])
    seen, was = sample["tokens"][chosen], given["tokens"][chosen]
    assert (seen == MASK).float().mean() == pytest.approx(0.8, abs=0.05)
    # One of 50 random tokens is the one that was there.
    assert ((seen != MASK) & (seen != was)).float().mean() == pytest.approx(0.1, abs=0.05)
    assert (seen == was).float().mean() == pytest.approx(0.1, abs=0.05)


def test_the_choice_depends_on_index_and_seed_only():
    first = masked()[1]["tokens"]
    assert torch.equal(masked()[1]["tokens"], first)
    assert not torch.equal(masked(seed=2)[1]["loss_mask"], masked()[1]["loss_mask"])
    assert not torch.equal(masked()[0]["loss_mask"], masked()[1]["loss_mask"])


class Padded(Samples):
    """The same, with padding at the end, which Megatron makes the token 0 without loss."""

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample["tokens"][-10:], sample["loss_mask"][-11:] = 0, 0
        return sample


def test_padding_is_refused():
    samples = MaskedTokens(Padded(), seed=1, mask=MASK, end_of_document=EOD, vocab_size=VOCAB)
    with pytest.raises(ValueError, match="sample 1 of masked_lm has padding"):
        samples[1]


def test_a_sequence_of_ends_of_documents_has_no_hidden_token():
    class Ends(Samples):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample | {"tokens": torch.full_like(sample["tokens"], EOD)}

    samples = MaskedTokens(Ends(), seed=1, mask=MASK, end_of_document=EOD, vocab_size=VOCAB)
    assert not samples[0]["loss_mask"].any() and (samples[0]["tokens"] == EOD).all()


def test_the_loader_finds_the_split():
    assert masked().index_split == "train" and len(masked()) == 3


def test_the_mask_token_is_the_first_row_after_the_vocabulary():
    assert mask_token(50, 64) == 50
    with pytest.raises(
        ValueError, match="padded_vocab_size is 64, and the tokenizer has 64 tokens"
    ):
        mask_token(64, 64)
