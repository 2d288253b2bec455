"""The recurrent router: against loops, number by number, and against a recorded published run."""

import copy
import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from remoe import ReMoELayer, ReMoELayerConfig
from remoe.recurrent import CELLS, GATES, RecurrentCell, recurrent_scores
from remoe.reference import reference_l1, reference_moe, reference_recurrent_scores
from remoe.regularization import switch_loss
from remoe.routing import topk_routing
from tests.golden.rmoe import TOLERANCES, GoldenRMoE, largest_deviations

TOKENS, HIDDEN, SIZE, EXPERTS, LAYERS = 5, 4, 3, 6, 3
GOLDEN = Path(__file__).parent / "golden/rmoe_gru.npz"


def parameters(cell):
    torch.manual_seed(0)
    rows = GATES[cell] * SIZE
    shapes = [(rows, SIZE), (rows, SIZE), (rows,), (rows,)]
    shapes += [(SIZE, HIDDEN)] * LAYERS + [(EXPERTS, SIZE)] * LAYERS
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def stack(score, x, parameters):
    """Logits of all layers and the last state; every layer sees its own multiple of the input."""
    weights, rest = tuple(parameters[:4]), parameters[4:]
    state, logits = torch.zeros(TOKENS, SIZE), []
    for layer in range(LAYERS):
        ours, state = score((layer + 1) * x, state, rest[layer], rest[LAYERS + layer], weights)
        logits.append(ours)
    return torch.stack(logits), state


@pytest.mark.parametrize("cell", CELLS)
def test_layers_equal_the_loops_with_all_gradients(cell):
    leaves = parameters(cell)
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)

    def fast(x, state, projection, router, weights):
        return recurrent_scores(
            x, state, cell=cell, weights=weights, projection_pH=projection, router_Ep=router
        )

    def slow(x, state, projection, router, weights):
        return reference_recurrent_scores(x, state, projection, router, cell, weights)

    found = []
    for score in (fast, slow):
        logits, state = stack(score, x, leaves)
        generator = torch.Generator().manual_seed(1)
        direction = torch.randn(logits.shape, generator=generator)
        grads = torch.autograd.grad((logits * direction).sum() + state.sum(), [x, *leaves])
        found.append([logits, state, *grads])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


CONFIG = ReMoELayerConfig(
    hidden_size=8, ffn_hidden_size=12, num_experts=4, init_std=0.3, recurrence="gru",
    recurrent_size=SIZE, recurrent_init_std=0.3,
)  # fmt: skip


def torch_stack(config, layers=LAYERS):
    torch.manual_seed(1)
    first = ReMoELayer(config)
    stack = [first] + [ReMoELayer(config, cell=first.recurrent_cell) for _ in range(layers - 1)]
    for bias in (first.cell.bias_ih, first.cell.bias_hh):
        torch.nn.init.normal_(bias)
    return torch.nn.ModuleList(stack)


def loops(model, x, config):
    """Output and penalty of a stack of layers with residuals, by loops."""
    cell = model[0].recurrent_cell
    state, total = torch.zeros(len(x), SIZE), 0.0
    for layer in model:
        if config.recurrent_passing == "none":
            state = torch.zeros(len(x), SIZE)
        elif config.recurrent_passing == "detached":
            state = state.detach()
        projection = cell.projection if layer.projection is None else layer.projection
        logits, state = reference_recurrent_scores(
            x, state, projection, layer.router, cell.cell, cell.weights
        )
        probs = logits.clamp(min=0)
        x = x + reference_moe(x, probs, layer.gate_up, layer.down)
        total = total + reference_l1(probs, topk=1, load_balancing=True)
    return x, total


@pytest.mark.parametrize("projection", ["layer", "shared"])
@pytest.mark.parametrize("passing", ["full", "detached", "none"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_stack_of_layers_equals_the_loops_with_all_gradients(cell, passing, projection):
    config = replace(
        CONFIG, recurrence=cell, recurrent_passing=passing, recurrent_projection=projection
    )
    model = torch_stack(config)
    x = torch.randn(TOKENS, 8, requires_grad=True)
    direction = torch.randn(TOKENS, 8)

    def fast(x):
        state = None
        for layer in model:
            y, state = layer(x, state)
            x = x + y
        return x, sum(layer.l1_reg for layer in model)

    found = []
    for forward in (fast, lambda x: loops(model, x, config)):
        output, penalty = forward(x)
        loss = (output * direction).sum() + 0.1 * penalty
        # Without the state of the layer before, the matrix of the state has no gradient.
        grads = torch.autograd.grad(loss, [x, *model.parameters()], materialize_grads=True)
        found.append([output, penalty, *grads])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_cell_is_trained_and_saved_once_and_counted_in_no_layer():
    model = torch_stack(CONFIG)
    cells = [name for name in model.state_dict() if "cell." in name]
    assert cells == [f"0.cell.{n}" for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    params = sum(p.numel() for p in model.parameters())
    cell = sum(p.numel() for p in model[0].recurrent_cell.parameters())
    assert params == LAYERS * CONFIG.num_params + cell
    assert model.bfloat16()[0].router.dtype == torch.bfloat16
    before = torch_stack(CONFIG)[0].recurrent_cell.weight_ih
    assert torch.equal(model[0].recurrent_cell.weight_ih, before), "the cell is never cast"


def test_a_shared_projection_is_part_of_the_cell():
    config = replace(CONFIG, recurrent_projection="shared")
    model = torch_stack(config)
    assert [n for n in model.state_dict() if "projection" in n] == ["0.cell.projection"]
    assert CONFIG.num_params - config.num_params == SIZE * CONFIG.hidden_size
    params = sum(p.numel() for p in model.parameters())
    cell = sum(p.numel() for p in model[0].recurrent_cell.parameters())
    assert params == LAYERS * config.num_params + cell


def test_layers_of_half_precision_hand_on_an_fp32_state_of_the_input_s_shape():
    first, second = torch_stack(CONFIG, layers=2).bfloat16()
    x = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    y, state = first(x)
    z, state = second(y, state)
    assert (z.dtype, z.shape) == (torch.bfloat16, x.shape)
    assert (state.dtype, state.shape) == (torch.float32, (2, 3, SIZE))


def test_a_cell_that_does_not_fit_is_refused():
    cell = ReMoELayer(CONFIG).recurrent_cell
    with pytest.raises(
        ValueError, match="cell has recurrent_size 3, and the layer's config has 4; give"
    ):
        ReMoELayer(replace(CONFIG, recurrent_size=4), cell=cell)
    with pytest.raises(
        ValueError, match="has recurrent_projection layer, and the layer's config has shared"
    ):
        ReMoELayer(replace(CONFIG, recurrent_projection="shared"), cell=cell)
    with pytest.raises(ValueError, match="the layer has no cell; set recurrence in its config"):
        _ = ReMoELayer(ReMoELayerConfig(hidden_size=8, ffn_hidden_size=12)).recurrent_cell


def test_a_state_of_other_tokens_or_for_a_layer_without_one_is_refused():
    """All but the last would fit after a reshape, and give tokens the state of others."""
    first, second = torch_stack(CONFIG, layers=2)
    x = torch.randn(2, 5, 8)
    _, state = first(x)
    message = r"the state has the shape .* these tokens has \(2, 5, 3\); pass what the layer before"
    for other in (state.transpose(0, 1), state.view(5, 2, 3), state.view(10, 3), state[:, :4]):
        with pytest.raises(ValueError, match=message):
            second(x, other)
    plain = ReMoELayer(ReMoELayerConfig(hidden_size=8, ffn_hidden_size=12))
    with pytest.raises(ValueError, match="a state is given to a layer without recurrence; set"):
        plain(x, state)


def test_an_empty_batch_hands_its_state_on():
    first, second = torch_stack(CONFIG, layers=2)
    x, state = first(torch.randn(2, 0, 8))
    y, state = second(x, state)
    assert (y.shape, state.shape) == ((2, 0, 8), (2, 0, 3))


def test_copies_of_a_stack_share_their_own_cell():
    model = torch_stack(CONFIG, layers=2)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for copied in (copy.deepcopy(model), torch.load(saved, weights_only=False)):
        assert copied[1].recurrent_cell is copied[0].cell
        assert copied[0].cell is not model[0].cell


def test_a_first_layer_starts_from_zero_and_half_precision_keeps_an_fp32_state():
    cell = RecurrentCell("gru", SIZE)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)
    layer = {"projection_pH": torch.randn(SIZE, HIDDEN), "router_Ep": torch.randn(EXPERTS, SIZE)}
    first = recurrent_scores(x, None, cell=cell.cell, weights=cell.weights, **layer)
    zeros = torch.zeros(TOKENS, SIZE)
    again = recurrent_scores(x, zeros, cell=cell.cell, weights=cell.weights, **layer)
    for ours, theirs in zip(first, again, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("cell", CELLS)
def test_a_new_cell_has_no_saturated_gate(cell):
    """With the published way, standard deviation and biases of 1, most gates would be."""
    torch.manual_seed(0)
    new = RecurrentCell(cell, 128)
    assert not new.bias_ih.any() and not new.bias_hh.any()
    x, state = torch.randn(64, 128), torch.zeros(64, 128)
    sums = torch.nn.functional.linear(x, new.weight_ih, new.bias_ih)
    sums = sums + torch.nn.functional.linear(state, new.weight_hh, new.bias_hh)
    assert (torch.sigmoid(sums) - 0.5).abs().max() < 0.4


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="cell is 'lstm'; choose one of gru, rnn"):
        RecurrentCell("lstm", 8)
    with pytest.raises(ValueError, match="size is 0; the state of a recurrent router needs"):
        RecurrentCell("gru", 0)


def test_topk_routing_by_hand():
    logits = torch.log(torch.tensor([[1.0, 2.0, 5.0]]))
    softmax = {"topk": 2, "pre_softmax": True}
    assert torch.allclose(topk_routing(logits, **softmax)[0], torch.tensor([[0, 0.25, 0.625]]))
    chosen = torch.tensor([[0, 2 / 7, 5 / 7]])
    assert torch.allclose(topk_routing(logits, **softmax, renormalize=True)[0], chosen)
    probs, active = topk_routing(logits, topk=2, pre_softmax=False)
    assert torch.allclose(probs, chosen)
    assert active.tolist() == [[False, True, True]]


def test_switch_loss_by_hand():
    logits = torch.log(torch.tensor([[3.0, 1.0], [1.0, 1.0]]))
    active = torch.tensor([[True, False], [True, False]])
    assert switch_loss(logits, active).item() == pytest.approx(2 * (1.0 * (0.75 + 0.5) / 2))


def test_the_published_run_replays():
    for key, deviation in largest_deviations(GoldenRMoE.load(GOLDEN)).items():
        assert deviation <= TOLERANCES[key][1], key


def test_a_cell_without_its_reset_gate_is_caught(monkeypatch):
    """The state after the first layer is the same; a few steps show the difference."""

    def without_reset(cell, x, state, weights):
        w, u, b, c = weights
        size = x.shape[1]
        _, xz, xn = torch.nn.functional.linear(x, w, b).split(size, dim=1)
        _, hz, hn = torch.nn.functional.linear(state, u, c).split(size, dim=1)
        z = torch.sigmoid(xz + hz)
        return (1 - z) * torch.tanh(xn + hn) + z * state

    monkeypatch.setattr("remoe.recurrent.next_state", without_reset)
    found = largest_deviations(GoldenRMoE.load(GOLDEN), steps=1)
    assert found["state"] > 100 * TOLERANCES["state"][1]
