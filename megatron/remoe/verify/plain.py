"""The golden run in plain torch: a small GPT, with the loops of `remoe.reference` as its experts.

This module uses no code of Megatron or of our layers. A mistake that both sides of a comparison
between layouts would make therefore shows up here.

Shapes: b sequences, s positions, T = b * s tokens, n heads, g query groups, d head, H hidden, E
experts.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, rms_norm

from megatron.remoe.testing.golden import (
    RECURRENT_SIZE,
    golden_tokens,
    golden_weight,
    padding_mask,
    parameter_shapes,
)
from remoe.config import Recurrence
from remoe.reference import reference_l1, reference_moe, reference_routing, reference_sparsity

_ROTARY_BASE, _EPS = 1_000_000, 1e-5
_MULTIPLIER = 1.2


def train(
    config: dict[str, Any],
    steps: int,
    *,
    padding: str = "none",
    per_token_loss: bool = False,
    recurrence: Recurrence = "none",
) -> list[dict[str, Any]]:
    """Train a golden run on one rank and return what every step measured, as `run_cell` does.

    Args:
        config: configuration of the golden run.
        steps: number of steps to train.
        padding: which tokens are padding, see `golden.padding_mask`.
        per_token_loss: whether to weight micro-batches by their real tokens, instead of equally.
        recurrence: of the routers.
    """
    weights = {
        name: golden_weight(name, shape, config["seed"]).requires_grad_()
        for name, shape in parameter_shapes(config, recurrence).items()
    }
    optimizer = torch.optim.AdamW(
        [
            {"params": [w for w in weights.values() if w.ndim > 1], "weight_decay": 0.01},
            {"params": [w for w in weights.values() if w.ndim == 1], "weight_decay": 0.0},
        ],
        lr=config["lr"],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    coeff, target, trajectory = config["coeff_init"], 1 - config["k"] / config["E"], []
    for batch in golden_tokens(config)[:steps]:
        masks = [padding_mask(i, tokens[:, 1:], padding) for i, tokens in enumerate(batch)]
        real_tokens = sum(int((~mask).sum()) for mask in masks)
        total, loss_sum, measured = torch.zeros(()), 0.0, []
        for tokens, mask in zip(batch, masks, strict=True):
            losses, layers = _forward(weights, config, tokens, mask, recurrence)
            share = len(losses) / real_tokens if per_token_loss else 1 / len(batch)
            if len(losses):
                total = total + share * losses.mean()
            total = total + share * coeff * sum(l1 for l1, _ in layers)
            loss_sum += losses.sum().item()
            measured.append(layers)
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        for weight in weights.values():
            if weight.grad is None:  # of a layer in which no expert was active
                weight.grad = torch.zeros_like(weight)  # so that momentum and decay go on
        grad_norm = torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        step = _measure(config, measured)
        step |= {"lm_loss": loss_sum / real_tokens, "grad_norm": grad_norm.item()}
        trajectory.append(step | {"l1_coeff_used": coeff})
        coeff = coeff * _MULTIPLIER if step["sparsity"] < target else coeff / _MULTIPLIER
    return trajectory


def _measure(config: dict[str, Any], measured: list[list[tuple[Tensor, Tensor]]]) -> dict[str, Any]:
    """Return regularizer and routing of every layer, over the micro-batches of the step."""
    step: dict[str, Any] = {"l1_reg": [], "sparsity_per_layer": [], "most_active": []}
    for layer in range(config["L"]):
        probs = torch.cat([micro_batch[layer][1] for micro_batch in measured])
        l1 = sum(micro_batch[layer][0].item() for micro_batch in measured)
        step["l1_reg"].append(l1 / len(measured))
        step["sparsity_per_layer"].append(reference_sparsity(probs))
        step["most_active"].append(max(sum(int(p > 0) for p in row) for row in probs))
    return step | {"sparsity": sum(step["sparsity_per_layer"]) / config["L"]}


def _forward(
    weights: dict[str, Tensor],
    config: dict[str, Any],
    tokens: Tensor,
    mask: Tensor,
    recurrence: Recurrence,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Return losses of the real tokens; regularizer and gates `[real tokens, E]` of every layer."""
    topk, experts = config["k"] * config["G"], config["E"] * config["G"]
    x = weights["embedding.word_embeddings.weight"][tokens[:, :-1]]  # [b, s, H]
    real, layers = ~mask.flatten(), []
    state = torch.zeros(tokens[:, 1:].numel(), RECURRENT_SIZE)
    for layer in range(config["L"]):
        prefix = f"decoder.layers.{layer}."
        norm = weights[prefix + "input_layernorm.weight"]
        x = x + _attention(weights, prefix, config, rms_norm(x, norm.shape, norm, _EPS))
        norm = weights[prefix + "pre_mlp_layernorm.weight"]
        rows = rms_norm(x, norm.shape, norm, _EPS).flatten(end_dim=1)
        routed_by = rows
        if recurrence != "none":
            projected = rows @ weights[prefix + "mlp.router.projection"].T
            routed_by = state = _next_state(weights, recurrence, projected, state)
        probs = reference_routing(routed_by, weights[prefix + "mlp.router.weight"])
        expert = f"{prefix}mlp.experts.local_experts."
        fc1, fc2 = (
            torch.stack([weights[f"{expert}{e}.linear_fc{i}.weight"] for e in range(experts)])
            for i in (1, 2)
        )
        x = x + reference_moe(rows, probs, fc1, fc2).view_as(x)
        l1 = torch.zeros(())
        if real.any():
            l1 = reference_l1(probs[real], topk=topk, load_balancing=True)
        layers.append((l1, probs[real].detach()))
    norm = weights["decoder.final_layernorm.weight"]
    logits = rms_norm(x, norm.shape, norm, _EPS) @ weights["output_layer.weight"].T
    losses = cross_entropy(logits.flatten(end_dim=1), tokens[:, 1:].flatten(), reduction="none")
    return losses[real], layers


def _next_state(
    weights: dict[str, Tensor], recurrence: Recurrence, x: Tensor, state: Tensor
) -> Tensor:
    """Return the state after a layer, by torch's GRU or RNN, `[T, p]`."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    cell = [weights[f"decoder.recurrent_cell.{name}"] for name in names]
    function = torch.gru_cell if recurrence == "gru" else torch.rnn_tanh_cell
    after: Tensor = function(x, state, *cell)
    return after


def _attention(
    weights: dict[str, Tensor], prefix: str, config: dict[str, Any], x: Tensor
) -> Tensor:
    """Return causal attention with grouped queries.

    The rows of the query, key and value projection are ordered by group: q, k and v of each.
    """
    b, s, hidden = x.shape
    heads, groups = config["heads"], config["groups"]
    d, per_group = hidden // heads, heads // groups
    qkv = (x @ weights[prefix + "self_attention.linear_qkv.weight"].T).view(
        b, s, groups, per_group + 2, d
    )
    q, k, v = qkv.split([per_group, 1, 1], dim=3)  # type: ignore[no-untyped-call]
    q = _rotate(q.flatten(2, 3))
    k, v = (t.expand(-1, -1, -1, per_group, -1).flatten(2, 3) for t in (k, v))
    k = _rotate(k)
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / d**0.5
    future = torch.ones(s, s, dtype=torch.bool).triu(diagonal=1)
    attended = torch.softmax(scores.masked_fill(future, float("-inf")), dim=-1)
    context = torch.einsum("bnqk,bknd->bqnd", attended, v).flatten(2)
    return context @ weights[prefix + "self_attention.linear_proj.weight"].T


def _rotate(x: Tensor) -> Tensor:
    """Apply rotary positions to `[b, s, n, d]`; they rotate the two halves of a head together."""
    s, d = x.shape[1], x.shape[3]
    frequencies = _ROTARY_BASE ** (-torch.arange(0, d, 2) / d)
    angles = (torch.arange(s)[:, None] * frequencies).repeat(1, 2)[:, None]  # [s, 1, d]
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
