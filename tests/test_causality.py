"""Which layers let a token see those after it: Soft MoE does, and no router for causal models.

A layer gets a sequence twice, with another last token the second time. In a causal layer no other
token's output changes. The table has every router that this project offers for causal models.
"""

import itertools
from typing import get_args

import pytest
import torch

from remoe import ReMoELayer, ReMoELayerConfig, SoftMoELayer, SoftMoELayerConfig
from remoe.config import ROUTINGS, Recurrence, Routing
from remoe.layer import routed_experts
from remoe.recurrent import RecurrentCell, recurrent_scores

HIDDEN, WIDTH, EXPERTS, TOKENS = 8, 12, 4, 9


class Selected(torch.nn.Module):
    """A layer on one device of any selection, with the experts of `ReMoELayer`."""

    def __init__(self, name, recurrence):
        super().__init__()
        config = ReMoELayerConfig(HIDDEN, WIDTH, EXPERTS, recurrence=recurrence, init_std=0.5)
        self.like, self.selection = ReMoELayer(config), ROUTINGS[name]()
        width = self.like.router.shape[1]
        self.router = torch.randn(self.selection.num_logits(EXPERTS), width)
        self.tensors = self.selection.buffers(EXPERTS, 2) | self.selection.parameters(EXPERTS, 2)

    def forward(self, x):
        tokens, layer = x.flatten(end_dim=-2), self.like
        y = routed_experts(tokens, *self.route(tokens), layer.gate_up, layer.down)
        return y.view_as(x)

    def route(self, tokens):
        layer, selection = self.like, self.selection
        if selection.reads == "ids":  # as if equal tokens, and no others, had the same id
            ids = (tokens[:, 0] * 1e4).long()
            return selection.select_by_id(ids, num_experts=EXPERTS, topk=2, layer_number=1)
        if layer.config.is_recurrent:
            cell: RecurrentCell = layer.recurrent_cell
            logits, _ = recurrent_scores(
                tokens, None, cell=cell.cell, weights=cell.weights,
                projection_pH=layer.projection, router_Ep=self.router,
            )  # fmt: skip
        else:
            logits = tokens @ self.router.T
        return selection.select(logits, self.tensors, topk=2)


class ReLU(ReMoELayer):
    """A ReMoE layer whose state is left out."""

    def __init__(self, recurrence):
        super().__init__(
            ReMoELayerConfig(HIDDEN, WIDTH, EXPERTS, topk=2, recurrence=recurrence, init_std=0.5)
        )

    def forward(self, x):
        y = super().forward(x)
        return y[0] if self.config.is_recurrent else y


CASES = [
    (name, recurrence)
    for name, recurrence in itertools.product(ROUTINGS, get_args(Recurrence))
    if ROUTINGS[name].causal and (issubclass(ROUTINGS[name], Routing) or recurrence == "none")
]


def changes(layer):
    """Largest change of every token's output when the last token of a sequence is another one."""
    torch.manual_seed(1)
    x = torch.randn(2, TOKENS, HIDDEN)
    other = x.clone()
    other[:, -1] = torch.randn(2, HIDDEN)
    return (layer(other) - layer(x)).abs().amax(dim=(0, 2))


@pytest.mark.parametrize(("router", "recurrence"), CASES, ids=[f"{a}-{b}" for a, b in CASES])
def test_no_token_sees_a_later_one(router, recurrence):
    torch.manual_seed(0)
    change = changes(ReLU(recurrence) if router == "relu" else Selected(router, recurrence))
    assert change[-1] > 1e-2
    # Products of other sizes may be rounded differently.
    assert change[:-1].max() < 1e-6


def test_expert_choice_would_show_a_token_the_later_ones():
    torch.manual_seed(0)
    assert changes(Selected("expert_choice", "none"))[:-1].max() > 1e-2


def test_a_soft_mixture_shows_every_token_the_last_one():
    torch.manual_seed(0)
    layer = SoftMoELayer(SoftMoELayerConfig(HIDDEN, WIDTH, EXPERTS, init_std=0.5))
    assert changes(layer).min() > 1e-4
