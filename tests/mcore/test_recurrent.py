"""Recurrent routers in Megatron: layers against loops, the columns of the state, and the cell."""

import pytest
import torch

from megatron.remoe.ranks import Ranks
from megatron.remoe.testing.cell import Cell
from megatron.remoe.testing.cells import Training, initialize
from megatron.remoe.testing.golden import (
    CLOSED_LOOP,
    fill_with_golden_weights,
    golden_tokens,
    golden_weight,
    parameter_shapes,
)
from megatron.remoe.verify import plain
from remoe.config import ReLURouting, TopKRouting
from remoe.reference import reference_moe, reference_recurrent_scores
from remoe.routing import topk_routing
from remoe.statistics import routing_metrics
from tests.mcore import moe_cases
from tests.mcore.moe_cases import EXPERTS, HIDDEN, WIDTH, Layout

SIZE, LAYERS = 5, 3
CONFIG = CLOSED_LOOP | {"L": 4, "seq": 16}


@torch.no_grad()
def hand_on(dtype, layers=8):
    """States after layers of a GRU, exact and as hidden states of a dtype carry them, `[T, p]`."""
    from megatron.remoe.moe.recurrent import join, split
    from remoe.recurrent import RecurrentCell

    torch.manual_seed(0)
    cell = RecurrentCell("gru", 16, init_std=0.5)
    projections = [torch.randn(16, 8) for _ in range(layers)]
    x, exact = torch.randn(64, 8), None
    carried = rounded = None
    for projection in projections:
        exact = cell(x, exact, projection)
        carried = split(join(x.to(dtype), cell(x, carried, projection)), 8)[1]
        rounded = cell(x, rounded, projection).to(dtype).float()
    return exact, carried, rounded


def test_hidden_states_of_half_precision_carry_a_state_in_two_columns_per_value(call):
    """One column would lose as much as bf16 does, and no column is lost in fp32."""
    exact, carried, rounded = call(hand_on, torch.float32)
    assert torch.equal(carried, exact)
    exact, carried, rounded = call(hand_on, torch.bfloat16)
    assert (rounded - exact).abs().max() > 1e-3
    assert (carried - exact).abs().max() < 2e-5
    exact, carried, rounded = call(hand_on, torch.float16)
    assert (rounded - exact).abs().max() > 1e-4
    assert (carried - exact).abs().max() < 1e-6


def routing_of(router, cell="gru", passing="full", projection="layer"):
    cls = {"relu": ReLURouting, "topk": TopKRouting}[router]
    return cls(
        recurrence=cell,
        recurrent_size=SIZE,
        recurrent_passing=passing,
        recurrent_projection=projection,
    )


def layers_and_cell(routing, **changes):
    """MoE layers of a model, in training, with weights that are large enough to matter."""
    from megatron.remoe.moe.spec import block_spec

    moe_cases.initialize(Layout())
    config = moe_cases.transformer_config(Layout(), num_layers=LAYERS, **changes)
    torch.manual_seed(3)
    layers = []
    for number, spec in enumerate(block_spec(config, routing).layer_specs, 1):
        layers.append(spec.submodules.mlp(config=config, layer_number=number).train())
        layers[-1].set_layer_number(number)
    cell = layers[0].router.cell
    with torch.no_grad():
        for weight in parameters_of(layers):
            weight.copy_(0.4 * torch.randn(weight.shape))
    return layers, cell


def parameters_of(layers):
    found = list(layers[0].router.cell.parameters())
    for layer in layers:
        found += [*layer.router.parameters()]
        found += [layer.experts.linear_fc1, layer.experts.linear_fc2]
    return found


def wide_layers(layers, x):
    """Layers with residuals, as the bias-dropout-adds of a model connect them."""
    wide = x
    for layer in layers:
        output, _ = layer(wide)
        tokens = wide[..., :HIDDEN] + output[..., :HIDDEN]
        wide = torch.cat([tokens, output[..., HIDDEN:]], dim=-1)
    return wide


def by_loops(layers, x, routing):
    flat, state = x.view(-1, HIDDEN), torch.zeros(x.shape[:-1].numel(), SIZE)
    cell = layers[0].router.cell
    for layer in layers:
        if routing.recurrent_passing == "none":
            state = torch.zeros_like(state)
        elif routing.recurrent_passing == "detached":
            state = state.detach()
        own = layer.router.projection
        logits, state = reference_recurrent_scores(
            flat,
            state,
            cell.projection if own is None else own,
            layer.router.weight,
            cell.cell,
            cell.weights,
        )
        with torch.no_grad():
            expected = state.norm(dim=1).sum().double()
            assert torch.allclose(layer.router.statistics.state_norm, expected, rtol=1e-4)
        if isinstance(routing, ReLURouting):
            probs = logits.clamp(min=0)
        else:
            probs, _ = topk_routing(logits, topk=2, pre_softmax=True)
        experts = layer.experts
        fc1 = experts.linear_fc1.view(EXPERTS, 2 * WIDTH, HIDDEN)
        fc2 = experts.linear_fc2.view(EXPERTS, HIDDEN, WIDTH)
        flat = flat + reference_moe(flat, probs, fc1, fc2)
    return flat.view_as(x)


def compared_with_loops(routing, changes):
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    MoEAuxLossAutoScaler.set_loss_scale(torch.zeros(1))  # the penalty is tested elsewhere
    layers, _ = layers_and_cell(routing, moe_router_topk=2, **changes)
    found = []
    for forward in (wide_layers, lambda layers, x: by_loops(layers, x, routing)):
        x = moe_cases.inputs(0).requires_grad_()
        output = forward(layers, x)
        assert output.shape == x.shape, "the last layer with experts drops the state"
        for parameter in parameters_of(layers):
            parameter.grad = None
        (output * moe_cases.direction(0)).sum().backward()
        grads = [x.grad, *(p.grad for p in parameters_of(layers))]
        found.append([output.detach(), *grads])
    return found


@pytest.mark.parametrize("recompute", ["none", "moe"])
@pytest.mark.parametrize("passing", ["full", "detached", "none"])
@pytest.mark.parametrize(("router", "cell"), [("relu", "gru"), ("topk", "gru"), ("topk", "rnn")])
def test_layers_equal_the_loops_with_all_gradients(call, router, cell, passing, recompute):
    changes = {}
    if recompute == "moe":
        changes = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    ours, theirs = call(compared_with_loops, routing_of(router, cell, passing), changes)
    assert_close(ours, theirs)


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        a = torch.zeros_like(b) if a is None else a
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("router", ["relu", "topk"])
def test_layers_with_a_shared_projection_equal_the_loops(call, router):
    assert_close(*call(compared_with_loops, routing_of(router, projection="shared"), {}))


def norms_of_states(padding_mask):
    """Mean norms that a step reports, and those of the states that the layer hands on."""
    from megatron.remoe.train.step import update_routers

    layers, _ = layers_and_cell(routing_of("relu"))
    x = moe_cases.inputs(0)
    wide, _ = layers[0](x, padding_mask=padding_mask)
    state = wide[..., HIDDEN:].detach()
    config = layers[0].router.config
    router = layers[0].router
    report = update_routers([router], config, router.selection, has_state=True)
    return routing_metrics(report)["state_norm_per_layer"], state.norm(dim=-1)


def test_metrics_have_the_norm_of_the_states_of_real_tokens(call):
    # Megatron's layer takes the mask as [b, s].
    for mask in (None, torch.arange(moe_cases.inputs(0).shape[0]) > 2):
        padding = None if mask is None else mask.expand(moe_cases.inputs(0).shape[1], -1)
        (found,), norms = call(norms_of_states, padding)
        real = norms if mask is None else norms[~mask]
        assert found == pytest.approx(real.mean().item(), rel=1e-5)


def uninstalled():
    from megatron.remoe.moe.shared_cell import SharedCells
    from megatron.remoe.train.step import FinalizeStep

    routing = routing_of("relu")
    layers, cell = layers_and_cell(routing)
    model = torch.nn.ModuleList(layers)
    said = []
    for cells in (SharedCells.of(routing), None):
        try:
            FinalizeStep(cells)([model])
        except ValueError as error:
            said.append(str(error))
        model.recurrent_cell = cell
    return said


def test_a_cell_that_would_not_be_trained_is_refused(call):
    """A script may use our layers without `configure`, which makes the cell a module."""
    said = call(uninstalled)
    assert len(said) == 2
    assert all("the cell of recurrent routers is no module of the model, or Fin" in s for s in said)


def specs(**changes):
    from megatron.remoe.moe.spec import block_spec

    moe_cases.initialize(Layout())
    config = moe_cases.transformer_config(Layout(), num_layers=2)
    for name, value in changes.items():
        setattr(config, name, value)  # past Megatron's own validation
    try:
        block_spec(config, routing_of("topk"))
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # A checkpoint's arguments, which say so after the flags are checked.
        ({"num_moe_experts": None}, "moe_router_recurrence is gru, but the model has no experts"),
        ({"moe_layer_freq": [0, 0]}, "moe_layer_freq is [0, 0], with which no layer has a router"),
        ({"fused_residual_rmsnorm": True}, "fused_residual_rmsnorm is True, which a recurrent ro"),
        ({"moe_layer_freq": [0, 1]}, "accepted"),
    ],
)
def test_what_cannot_carry_a_state_is_refused_where_layers_are_built(call, changes, message):
    assert call(specs, **changes).startswith(message)


def norm_without_the_state():
    from megatron.remoe.moe.spec import block_spec

    moe_cases.initialize(Layout())
    config = moe_cases.transformer_config(Layout(), num_layers=2)
    spec = block_spec(config, routing_of("relu")).layer_specs[1].submodules
    norm = spec.input_layernorm(config=config, hidden_size=HIDDEN, eps=1e-5)
    assert norm(torch.randn(2, 1, HIDDEN + SIZE)).shape == (2, 1, HIDDEN)
    for columns in (0, 2 * SIZE):
        try:
            norm(torch.randn(2, 1, HIDDEN + columns))
        except AssertionError as error:
            assert str(error) == f"{HIDDEN + columns} columns, not {HIDDEN + SIZE}"
        else:
            return "accepted"
    return "refused"


def test_hidden_states_that_have_lost_the_state_do_not_start_from_zero(call):
    assert call(norm_without_the_state) == "refused"


def gradients_of_a_model(cell):
    """Gradients of a whole model, by Megatron and by plain torch with loops over experts."""
    initialize(cell)
    training = Training(cell, CONFIG, None)
    (chunk,) = training.chunks
    fill_with_golden_weights(chunk.module, CONFIG["seed"])
    training.optimizer.step = lambda: (True, 0.0, 0)
    batch = golden_tokens(CONFIG)[0]
    training.step(batch)
    ours = {name: p.main_grad for name, p in chunk.module.named_parameters()}

    weights = {
        name: golden_weight(name, shape, CONFIG["seed"]).requires_grad_()
        for name, shape in parameter_shapes(CONFIG, cell.recurrence).items()
    }
    for tokens in batch:
        mask = torch.zeros(tokens[:, 1:].shape, dtype=torch.bool)
        losses, layers = plain._forward(weights, CONFIG, tokens, mask, cell.recurrence)
        loss = losses.mean() + CONFIG["coeff_init"] * sum(l1 for l1, _ in layers)
        (loss / len(batch)).backward()
    return ours, {name: weight.grad for name, weight in weights.items()}


@pytest.mark.parametrize("recompute", ["none", "full", "moe"])
def test_a_model_has_the_gradients_of_plain_torch(call, recompute):
    cell = Cell("one rank", experts="sequential", recurrence="gru", recompute=recompute)
    ours, theirs = call(gradients_of_a_model, cell)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        assert torch.allclose(ours[name], gradient, rtol=1e-3, atol=1e-4 * scale), name


STAGES = Cell("PP2, 2 virtual stages", 2, pp=2, vp=2, recurrence="gru")


def trained_and_saved(cell, folder):
    """Train a step from random weights, save, and return the cells of this rank."""
    from megatron.core import dist_checkpointing
    from megatron.core.utils import unwrap_model

    initialize(cell)
    torch.manual_seed(1 + torch.distributed.get_rank())
    training = Training(cell, CONFIG, None)
    training.step(golden_tokens(CONFIG)[0])
    models = unwrap_model(training.chunks)
    states = {str(i): model.sharded_state_dict() for i, model in enumerate(models)}
    folder.mkdir(exist_ok=True)
    dist_checkpointing.save(states, str(folder))
    return [weights_of_the_cell(model) for model in models]


def weights_of_the_cell(model):
    return [p.detach().clone() for p in model.decoder.recurrent_cell.parameters()]


def loaded(cell, folder):
    initialize(cell)
    (model,) = Training(cell, CONFIG, folder).chunks
    return weights_of_the_cell(model.module)


@pytest.mark.processes
def test_the_copies_of_stages_start_and_stay_equal_and_are_saved_once(call, tmp_path):
    """The random numbers of the stages differ, as Megatron's do."""
    with Ranks(2) as ranks:
        copies = [weights for rank in ranks.run(trained_and_saved, STAGES, tmp_path / "saved")
                  for weights in rank]  # fmt: skip
    copies.append(call(loaded, Cell("one rank", recurrence="gru"), tmp_path / "saved"))
    assert len(copies) == 5
    for copy in copies[1:]:
        for ours, theirs in zip(copy, copies[0], strict=True):
            assert torch.equal(ours, theirs)
            assert ours.any() or ours.ndim == 1
