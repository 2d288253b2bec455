"""Generation of text by any model; a checkpoint of a run is converted on the way."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.remoe.convert.exported import exported_with_tokenizer, load, on_device


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Check what `generate` is asked for, before a model is loaded.

    Raises:
        ValueError: a value is out of range.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"max-new-tokens is {max_new_tokens}, temperature {temperature}, top-p {top_p}; they "
            f"must be at least 1, at least 0, and in (0, 1]"
        )


def generator(
    path: Path,
    emit: Callable[[str], None],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    tokenizer: Path | None = None,
    budget: Mapping[str, Any] | None = None,
) -> Callable[[str], None]:
    """Load a model, and return what continues a prompt of at least one token.

    The text is passed on as it is generated, with the prompt first.

    Args:
        path: a Hugging Face folder, a run directory or a checkpoint.
        emit: called with pieces of text.
        max_new_tokens: the largest number of tokens to generate.
        temperature: the temperature of sampling; 0 is greedy.
        top_p: sample from the most probable tokens that together have this probability.
        seed: the seed of sampling.
        dtype: the dtype of the model; None is that of its weights.
        tokenizer: a tokenizer to use in place of the model's own.
        budget: fields of the model's config that replace its own budget of active experts.

    Raises:
        ValueError: there is no model or no tokenizer, or a value is out of range.
    """
    check_sampling(max_new_tokens, temperature, top_p)
    from transformers import AutoTokenizer, TextStreamer

    with exported_with_tokenizer(path, tokenizer) as folder:
        tokens = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = on_device(load(folder, dtype, budget))

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            emit(text + "\n" * stream_end)

    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        torch.manual_seed(seed)

    def continue_(prompt: str) -> None:
        inputs = tokens(prompt, return_tensors="pt").to(model.device)
        room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
        if inputs["input_ids"].shape[1] == 0 or room < 1:
            raise ValueError(
                f"the prompt has {inputs['input_ids'].shape[1]} tokens; the model takes 1 to "
                f"{model.config.max_position_embeddings - 1}"
            )
        model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=min(max_new_tokens, room),
            streamer=Streamer(tokens),
            **sampling,
        )

    return continue_
