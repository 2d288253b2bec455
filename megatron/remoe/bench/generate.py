"""Prefill and decoding in transformers: the exported model, its loop, and OLMoE of equal shape."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from megatron.remoe.bench.timing import Alternative
from remoe.hf import ReMoEConfig, ReMoEForCausalLM

LOOP = "ReMoE, experts in a loop"
OURS = "ReMoE"
PREFILL = 512  # tokens
STEPS = 16  # of decoding, after as many tokens of the prompt
BATCHES = (1, 8)
_VOCABULARY = 8192


@dataclass(frozen=True)
class Model:
    """Sizes of a model; `topk` is the number of active experts per token, on average."""

    layers: int
    hidden: int
    ffn: int
    experts: int
    topk: int
    heads: int = 8

    def fields(self) -> dict[str, Any]:
        """Return the fields that both config classes have."""
        return {
            "num_hidden_layers": self.layers, "hidden_size": self.hidden,
            "num_experts": self.experts, "num_experts_per_tok": self.topk,
            "num_attention_heads": self.heads, "num_key_value_heads": self.heads,
            "vocab_size": _VOCABULARY, "max_position_embeddings": 2 * PREFILL,
            "eos_token_id": None, "pad_token_id": None,
        }  # fmt: skip


def one_after_another(experts: Any, x_TH: Tensor, active_TE: Tensor, probs_TE: Tensor) -> Tensor:
    """Compute the experts in a loop, each with its own gather and sum: the former implementation.

    Its arguments and its result are those of `ReMoEExperts.forward`.
    """
    y_TH = torch.zeros_like(x_TH)
    gate_up, down = experts.gate_up_proj.unbind(0), experts.down_proj.unbind(0)
    counts = active_TE.sum(dim=0).tolist()
    tokens = torch.split(active_TE.T.nonzero()[:, 1], counts)
    for expert in [e for e, count in enumerate(counts) if count]:
        token_a = tokens[expert]
        gate, up = F.linear(x_TH[token_a], gate_up[expert]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down[expert])
        out = out * probs_TE[token_a, expert, None].to(out.dtype)
        y_TH = y_TH.index_add(0, token_a, out.to(y_TH.dtype))
    return y_TH


@contextmanager
def in_a_loop(model: ReMoEForCausalLM) -> Iterator[None]:
    """Compute the experts of a model in a loop meanwhile."""
    blocks = [layer.mlp.experts for layer in model.model.layers if not layer.is_dense]
    for experts in blocks:
        experts.forward = MethodType(one_after_another, experts)
    try:
        yield
    finally:
        for experts in blocks:
            del experts.forward


def build(model: Model, dtype: torch.dtype, device: str) -> tuple[ReMoEForCausalLM, Tensor, float]:
    """Return a random model, tokens `[8, 512]`, and the active experts per token on the first 512.

    An offset of the logits makes that number topk within 1%.
    """
    torch.manual_seed(1)
    config = ReMoEConfig(
        **model.fields(), moe_intermediate_size=model.ffn, intermediate_size=model.ffn
    )
    ours: Any = ReMoEForCausalLM(config)
    ours = ours.to(device=device, dtype=dtype).eval()
    tokens = torch.randint(_VOCABULARY, (max(BATCHES), PREFILL), device=device)
    budget = ours.set_budget(model.topk, tokens[:1], by="offset")
    assert budget is not None
    return ours, tokens, budget.active_experts


def olmoe(model: Model, dtype: torch.dtype, device: str, experts: str) -> Any:
    """Return OLMoE of equal shape, with an implementation of experts of transformers."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config: Any = OlmoeConfig(**model.fields(), intermediate_size=model.ffn)
    config._experts_implementation = experts
    other: Any = OlmoeForCausalLM(config)
    return other.to(device=device, dtype=dtype).eval()


def cases(model: Model, dtype: torch.dtype, device: str) -> dict[str, list[Alternative]]:
    """Return the alternatives of prefill, and of decoding with each size of a batch."""
    ours, tokens, active = build(model, dtype, device)
    others = {
        f"OLMoE ({name})": olmoe(model, dtype, device, name) for name in ("grouped_mm", "eager")
    }
    facts = {"active experts": f"{active:.2f}"}
    found = {}
    for batch in (None, *BATCHES):
        title = f"prefill of {PREFILL} tokens" if batch is None else f"decoding, batch {batch}"
        loop = _Work(ours, tokens, batch, loop=True)
        found[title] = [
            Alternative(LOOP, loop, facts),
            Alternative(OURS, _Work(ours, tokens, batch), facts),
            *(
                Alternative(
                    name, _Work(other, tokens, batch), {"active experts": f"{model.topk:.2f}"}
                )
                for name, other in others.items()
            ),
        ]
    return found


class _Work:
    """The prefill of one sequence, or some steps of decoding with a cache.

    Args:
        model: any causal model.
        tokens: `[8, 512]`.
        batch: the number of sequences to decode; None is a prefill.
        loop: whether the experts of our model are computed in a loop.
    """

    def __init__(
        self, model: Any, tokens: Tensor, batch: int | None, *, loop: bool = False
    ) -> None:
        self.model, self.loop, self.cache = model, loop, None
        self.tokens = tokens[: batch or 1]
        if batch is not None:
            self.cache = self._call(self.tokens[:, :STEPS]).past_key_values

    @torch.no_grad()
    def _call(self, tokens: Tensor) -> Any:
        return self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def __call__(self) -> Tensor:
        """Do it, and return the last logits."""
        if self.loop:
            with in_a_loop(self.model):
                return self._run()
        return self._run()

    def _run(self) -> Tensor:
        if self.cache is None:
            logits: Tensor = self._call(self.tokens).logits
            return logits
        for position in range(STEPS, 2 * STEPS):
            logits = self._call(self.tokens[:, position : position + 1]).logits
        self.cache.crop(-STEPS)  # forget them
        return logits
