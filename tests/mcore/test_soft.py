"""Soft MoE in Megatron: layers against loops on one and two ranks, whole models, and refusals."""

import itertools
from argparse import Namespace
from dataclasses import dataclass
from typing import get_args
from unittest import mock

import pytest
import torch

from megatron.remoe.ranks import Ranks
from remoe.config import ROUTINGS, Recurrence, Routing, SoftRouting
from remoe.reference import reference_expert, reference_soft_moe, reference_soft_routing
from tests.mcore import moe_cases, tiny
from tests.mcore.moe_cases import BATCH, EXPERTS, HIDDEN, SEQUENCE, Layout

SLOTS = 2
SCALE = 6.0


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as ranks:
        yield ranks


@dataclass(frozen=True)
class Outcome:
    """Parts of a rank, and gradients of whole weights, summed over ranks."""

    output: torch.Tensor
    grad_input: torch.Tensor
    grads: list[torch.Tensor]


def weights():
    generator = torch.Generator().manual_seed(5)
    router = torch.randn(EXPERTS * SLOTS, HIDDEN, generator=generator)
    return [router, torch.tensor([SCALE]), *moe_cases.weights(0.0)[1:]]


def padding(index):
    """Padding of a data-parallel rank, bool `[b, s]`: a different end of every sequence."""
    return torch.arange(SEQUENCE) >= SEQUENCE - index - torch.arange(BATCH).unsqueeze(1)


def build(layout, **changes):
    from megatron.remoe.moe.spec import block_spec

    moe_cases.initialize(layout)
    config = moe_cases.transformer_config(layout, **changes)
    routing = SoftRouting(slots_per_expert=SLOTS)
    spec = block_spec(config, routing, bidirectional=True).layer_specs[0]
    layer = spec.submodules.mlp(config=config, layer_number=1)
    layer.set_layer_number(1)
    return layer.train()


def outcome(layout, padded, **changes):
    layer = build(layout, **changes)
    router, scale, fc1, fc2 = weights()
    with torch.no_grad():
        layer.router.weight.copy_(router)
        layer.router.scale.copy_(scale)
        for index, (ours1, ours2) in moe_cases.local_experts(layer):
            ours1.copy_(fc1[index])
            ours2.copy_(fc2[index])
    index, part = divmod(torch.distributed.get_rank(), layout.tp)

    def mine(whole, dim):
        return whole.chunk(layout.tp, dim=dim)[part].contiguous()

    x = mine(moe_cases.inputs(index), 0).requires_grad_()
    mask = mine(padding(index), 1) if padded else None
    output, bias = layer(x, padding_mask=mask)
    assert bias is None
    (output * mine(moe_cases.direction(index), 0)).sum().backward()
    grads = [torch.zeros_like(w) for w in weights()]
    grads[0] += layer.router.weight.grad
    grads[1] += layer.router.scale.grad
    for number, (grad1, grad2) in moe_cases.local_experts(layer, lambda weight: weight.grad):
        assert grad1 is not None, f"expert {number} has no gradient"
        grads[2][number] += grad1
        grads[3][number] += grad2
    for grad in grads:
        torch.distributed.all_reduce(grad)
    return Outcome(output.detach(), x.grad, grads)


def expected(layout, world, padded):
    """The same by loops, of every rank."""
    parameters = [w.requires_grad_() for w in weights()]
    router, scale, fc1, fc2 = parameters
    experts = [reference_expert(*pair) for pair in zip(fc1, fc2, strict=True)]
    found, total, inputs = [], 0.0, []
    for index in range(world // layout.tp):
        x = moe_cases.inputs(index).requires_grad_()
        sequences = []
        for b in range(BATCH):
            mask = padding(index)[b] if padded else None
            dispatch, combine = reference_soft_routing(x[:, b], router, scale, mask)
            sequences.append(reference_soft_moe(x[:, b], dispatch, combine, experts))
        y = torch.stack(sequences, dim=1)
        total = total + (y * moe_cases.direction(index)).sum()
        inputs.append(x)
        found.append(y.detach())
    grads = torch.autograd.grad(total, [*inputs, *parameters])
    count = len(inputs)
    return [
        Outcome(y_part, grad_part, list(grads[count:]))
        for y, grad in zip(found, grads[:count], strict=True)
        for y_part, grad_part in zip(y.chunk(layout.tp), grad.chunk(layout.tp), strict=True)
    ]


def assert_equal(ours, theirs):
    pairs = [(ours.output, theirs.output), (ours.grad_input, theirs.grad_input)]
    for a, b in [*pairs, *zip(ours.grads, theirs.grads, strict=True)]:
        assert b.abs().max() > 0
        assert torch.allclose(a, b, rtol=1e-4, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_layer_equals_the_loops_with_all_gradients(call, padded, grouped, recompute):
    layout, changes = Layout(grouped=grouped), {}
    if recompute:
        changes = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    (theirs,) = expected(layout, 1, padded)
    assert_equal(call(outcome, layout, padded, **changes), theirs)


def of_other_shapes():
    layer = build(Layout())
    found = []
    for shape in ((BATCH, 1), (1, SEQUENCE), (BATCH, SEQUENCE - 1)):
        with pytest.raises(ValueError) as error:
            layer(moe_cases.inputs(0), padding_mask=torch.zeros(shape, dtype=torch.bool))
        found.append(str(error.value))
    return found


def test_a_mask_of_another_shape_is_refused(call):
    """Torch would repeat the first two without a word."""
    must = f"it must be [{BATCH}, {SEQUENCE}], the sequences and their tokens"
    assert call(of_other_shapes) == [
        f"padding_mask is {shape}; {must}"
        for shape in ([BATCH, 1], [1, SEQUENCE], [BATCH, SEQUENCE - 1])
    ]


LAYOUTS = {
    "DP2": Layout(),
    "EP2": Layout(ep=2),
    "TP2": Layout(tp=2),
    "TP2 x EP2": Layout(tp=2, ep=2),
    "EP2, sequential experts": Layout(ep=2, grouped=False),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layers_of_two_ranks_equal_the_loops_with_all_gradients(ranks, name, padded):
    layout = LAYOUTS[name]
    for ours, theirs in zip(
        ranks.run(outcome, layout, padded), expected(layout, 2, padded), strict=True
    ):
        assert_equal(ours, theirs)


def new_router(layout):
    router = build(layout).router
    return router.weight.detach(), router.scale.detach()


@pytest.mark.parametrize("name", ["TP2", "EP2"])
def test_ranks_start_with_the_same_slots_of_unit_length(ranks, name):
    (weight, scale), (other, _) = ranks.run(new_router, LAYOUTS[name])
    assert torch.equal(weight, other)
    assert torch.allclose(weight.norm(dim=1), torch.ones(EXPERTS * SLOTS)) and scale.item() == 1


def exchanges(num_experts, tp, ep):
    """Experts of the rows that every rank of a group gets, planned as if on many ranks."""
    from megatron.remoe.moe.soft import Exchange

    found = []
    for first in range(0, max(tp, ep), ep):  # groups of experts, side by side
        parts = [(first + rank) % tp for rank in range(ep)]
        plans = [
            Exchange.of(num_experts, num_parts=tp, part_of=parts, rank=rank, group=None)
            for rank in range(ep)
        ]
        share, local = num_experts // tp, num_experts // ep
        for rank, plan in enumerate(plans):
            arriving = []
            for source, part in enumerate(parts):
                experts = range(part * share, (part + 1) * share)
                sent = plans[source].sent
                start = sum(sent[:rank])
                arriving += list(experts)[start : start + sent[rank]]
                assert sent[rank] == plan.received[source]
            ordered = [arriving[i] for i in plan.order]
            assert ordered == sorted(ordered)
            mine = range(rank * local, (rank + 1) * local)
            assert [ordered.count(expert) for expert in mine] == plan.counts
            assert sum(plan.counts) == len(ordered)
            found += ordered
    return found


@pytest.mark.parametrize(("tp", "ep"), [(1, 4), (2, 2), (2, 4), (4, 2), (4, 4), (2, 8)])
def test_every_rank_gets_the_rows_of_its_experts_in_order(call, tp, ep):
    """For layouts of more ranks than these tests start."""
    experts = call(exchanges, 8, tp, ep)
    copies = max(tp, ep) // tp  # sequences that the ranks of the group have
    assert sorted(experts) == sorted(list(range(8)) * copies)


def bidirectional_and_causal(router, recurrence):
    """How much another last token changes the logits of every token, in a whole model."""
    from megatron.remoe.testing.cell import Cell
    from megatron.remoe.testing.cells import Training, initialize
    from megatron.remoe.testing.golden import CLOSED_LOOP, fill_with_golden_weights

    cell = Cell("one rank", router=router, recurrence=recurrence)
    initialize(cell)
    (chunk,) = Training(cell, CLOSED_LOOP | {"k": 2}, None).chunks
    fill_with_golden_weights(chunk.module, 1)
    model = chunk.module.eval()
    torch.manual_seed(0)
    tokens = torch.randint(256, (1, 16))
    other = tokens.clone()
    other[0, -1] = (tokens[0, -1] + 1) % 256
    positions = torch.arange(16).unsqueeze(0)
    with torch.no_grad():
        logits = [model(given, positions, None) for given in (tokens, other)]
    return (logits[0] - logits[1]).abs().amax(dim=-1)[0]


CASES = [
    (name, recurrence)
    for name, recurrence in itertools.product(ROUTINGS, get_args(Recurrence))
    if ROUTINGS[name].causal and (issubclass(ROUTINGS[name], Routing) or recurrence == "none")
]


@pytest.mark.parametrize(("router", "recurrence"), [*CASES, ("dense", "none")])
def test_in_a_causal_model_no_token_sees_a_later_one(call, router, recurrence):
    change = call(bidirectional_and_causal, router, recurrence)
    assert change[-1] > 1e-3
    assert change[:-1].max() < 1e-6


def test_in_an_encoder_with_soft_experts_every_token_sees_the_last_one(call):
    change = call(bidirectional_and_causal, "soft", "none")
    assert change.min() > 1e-6 and change[0] > 1e-6


def dense_encoder():
    """Logits of a dense encoder: without a mask, with one that hides nothing, and with padding.

    The last token of the second sequence is another one, and padding in the last case.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron.remoe.moe.spec import layer_spec
    from megatron.remoe.testing.golden import (
        CLOSED_LOOP,
        fill_with_golden_weights,
        model_config_of,
        transformer_config,
    )

    moe_cases.initialize(Layout())
    dense = {"num_moe_experts": None, "moe_ffn_hidden_size": None}
    config = model_config_of(transformer_config(CLOSED_LOOP, **dense), CLOSED_LOOP, None)
    config.transformer_layer_spec = layer_spec(None, bidirectional=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = GPTModelBuilder(config).build_model(groups).eval()
    fill_with_golden_weights(model, 1)
    torch.manual_seed(0)
    tokens = torch.randint(256, (1, 16)).repeat(2, 1)
    tokens[1, -1] = (tokens[0, -1] + 1) % 256
    positions = torch.arange(16).expand(2, -1)
    nothing = torch.zeros(2, 1, 16, 16, dtype=torch.bool)
    last = nothing.clone()
    last[..., -1] = True
    with torch.no_grad():
        return [model(tokens, positions, mask) for mask in (None, nothing, last)]


def test_attention_of_an_encoder_sees_all_tokens_but_padding(call):
    without, nothing, padded = call(dense_encoder)
    assert torch.allclose(without, nothing, atol=1e-6)
    assert (without[0] - without[1]).abs().amax(dim=-1).min() > 1e-6
    assert (padded[0] - padded[1])[:-1].abs().max() < 1e-7


def refusals():
    from megatron.remoe.moe.spec import block_spec

    found = []
    for layout, changes, bidirectional in (
        (Layout(), {}, False),
        (Layout(), {"context_parallel_size": 2}, True),
        (Layout(), {"num_moe_experts": 3, "tensor_model_parallel_size": 2}, True),
        (Layout(), {"moe_expert_capacity_factor": 1.0}, True),
    ):
        config = moe_cases.transformer_config(layout)
        for name, value in changes.items():
            setattr(config, name, value)  # past Megatron's own validation
        with pytest.raises(ValueError) as error:
            block_spec(config, SoftRouting(), bidirectional=bidirectional)
        found.append(str(error.value))
    return found


def test_what_cannot_be_right_is_refused(call):
    causal, context, shared, capacity = call(refusals)
    assert "the model is causal" in causal and "use moe_routing relu, which is causal" in causal
    assert context.startswith("context_parallel_size is 2, which Soft MoE refuses: a slot is")
    assert shared.startswith("tensor_model_parallel_size is 2, and 3 experts cannot be shared")
    assert capacity.startswith("moe_expert_capacity_factor is 1.0, which Soft MoE refuses")


def in_a_script_of_one_s_own():
    from megatron.remoe.arguments import configure, megatron_parser
    from megatron.remoe.testing.golden import CLOSED_LOOP, model_config_of, transformer_config

    config = model_config_of(transformer_config(CLOSED_LOOP), CLOSED_LOOP, None)
    config.transformer_layer_spec = None
    args = megatron_parser().parse_args(["--masked-lm"])
    with pytest.raises(ValueError) as error:
        configure(config, args)
    return str(error.value)


def test_a_script_with_samples_of_its_own_trains_no_encoder(call):
    """It would see its labels, and the loss would be excellent."""
    message = call(in_a_script_of_one_s_own)
    assert message.startswith("masked_lm is set, and this script reads samples of its own")


def attention_of_a_run(*flags):
    """Mask types of the layers that `remoe train` builds with these flags."""
    from megatron.remoe.arguments import configure, megatron_parser
    from megatron.remoe.testing.golden import CLOSED_LOOP, model_config_of, transformer_config

    moe_cases.initialize(Layout())
    config = model_config_of(transformer_config(CLOSED_LOOP), CLOSED_LOOP, None)
    config.transformer_layer_spec = None
    args = megatron_parser().parse_args(list(flags))
    args.rank = 0
    configure(config, args, hides_tokens=args.masked_lm)
    layers = config.transformer_layer_spec(config).layer_specs
    return {layer.submodules.self_attention.params["attn_mask_type"].name for layer in layers}


@pytest.mark.parametrize("router", ["--moe-soft-routing", "--moe-relu-routing", None])
def test_every_layer_of_an_encoder_sees_the_whole_sequence(call, router):
    flags = ["--num-experts", "8", *filter(None, [router])]
    assert call(attention_of_a_run, "--masked-lm", *flags) == {"padding"}
    if router != "--moe-soft-routing":
        assert call(attention_of_a_run, *flags) == {"causal"}


def splits_of_an_encoder():
    """Loss masks and splits of the datasets that `remoe train` makes of Megatron's."""
    from megatron.core.datasets.utils import Split

    from megatron.remoe import pretrain

    class Samples:
        def __init__(self, split):
            self.index_split = split

        def __getitem__(self, index):
            return {"tokens": torch.arange(1, 41), "loss_mask": torch.ones(40),
                    "position_ids": torch.arange(40)}  # fmt: skip

    given = [Samples(Split.train), [Samples(Split.valid), Samples(Split.valid), None], None]
    args = Namespace(masked_lm=True, mock_data=False, seed=1, padded_vocab_size=64)
    module = "megatron.core.datasets.blended_megatron_dataset_builder"
    builder = "BlendedMegatronDatasetBuilder"
    with (
        mock.patch(f"{module}.{builder}", lambda *_: Namespace(build=lambda: given)),
        mock.patch("megatron.training.get_args", lambda: args),
        mock.patch("megatron.training.get_tokenizer", lambda: Namespace(vocab_size=50, eod=0)),
        mock.patch("megatron.remoe.pretrain.dataset_config"),
    ):
        train, valid, test = pretrain.datasets_provider([8, 8, 8])
    assert test is None and valid[2] is None
    return [(one.index_split.name, one[3]["loss_mask"].sum().item(), (one[3]["tokens"] == 50).sum())
            for one in (train, *valid[:2])]  # fmt: skip


def test_tokens_are_hidden_in_every_split(call):
    """Tokens that are not hidden would be found in every layer, and the loss would be excellent."""
    for split, (name, chosen, hidden) in zip(
        ("train", "valid", "valid"), call(splits_of_an_encoder), strict=True
    ):
        assert name == split and chosen == 6 and 3 <= hidden <= 6


ENCODER = {
    "masked_lm": True,
    "padded_vocab_size": 256,
    "moe_relu_routing": False,
    "moe_soft_routing": True,
    "moe_soft_slots_per_expert": 8,
    "moe_layer_freq": "[0,1]",
    "train_iters": 6,
    "exit_interval": 4,
    "eval_interval": 4,
    "eval_iters": 1,
    "save_interval": 2,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A run of an encoder with Soft MoE on two ranks, which stopped after 4 of 6 steps."""
    home = tmp_path_factory.mktemp("encoder")
    changes = {"nproc": 2, "expert_model_parallel_size": 2, "run_dir": "soft"}
    tiny.write_config(home / "soft.yaml", **(ENCODER | changes))
    out, error = (process := tiny.start("train", "soft.yaml", cwd=home)).communicate(timeout=600)
    assert process.returncode == 0, out + error
    return home


@pytest.mark.processes
def test_a_run_trains_and_continues(home):
    rows = [row for row in tiny.rows(home / "soft") if "grad_norm" in row]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert "sparsity" not in rows[0] and "l1_coeff" not in rows[0]
    process = tiny.start("train", "soft.yaml", cwd=home)
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, out + error
    rows = [row for row in tiny.rows(home / "soft") if "grad_norm" in row]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(0 < row["lm_loss"] < 10 for row in rows)


@pytest.mark.processes
def test_what_would_be_wrong_afterwards_is_refused(home, call):
    code, _, error = call(tiny.remoe, home, "convert", "to-hf", "soft", "exported")
    assert code == 2 and "masked_lm=True" in error and not (home / "exported").exists()
    for override, message in (
        ("masked_lm=false", "the model is causal"),
        ("vocab_size=256", "which leaves no row for the mask token"),
    ):
        code, _, error = call(tiny.remoe, home, "train", "soft.yaml", override, "run_dir=new")
        assert code == 2 and message in error, error
        assert not (home / "new").exists()
    dense = ["moe_soft_routing=false", "moe_soft_slots_per_expert=1", "masked_lm=false"]
    code, _, error = call(tiny.remoe, home, "train", "soft.yaml", *dense)
    assert code == 2 and "was trained with masked_lm True" in error, error
    code, _, error = call(tiny.remoe, home, "train", "soft.yaml", *dense[:2])
    assert code == 2 and "has Soft MoE, and this run has TopK routing" in error, error
