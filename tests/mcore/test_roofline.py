"""The roofline of a layer: bytes by hand, and counts that are those of real tensors."""

import pytest
import torch

from megatron.remoe.analysis.gpus import GPU
from megatron.remoe.analysis.memory import RankLoad
from megatron.remoe.analysis.size import ModelSize
from megatron.remoe.bench import roofline
from megatron.remoe.bench.counting import Count, Counting
from megatron.remoe.bench.layer import Shape
from megatron.remoe.bench.roofline import FEWEST, PRODUCTS, Roofline, Work
from remoe.kernels import Permutation, combine, permute
from remoe.kernels.backend import INTERPRETER, has_triton

needs_triton = pytest.mark.skipif(not has_triton(), reason="needs Triton")
SHAPE = Shape(3, 2, 4, num_experts=5, topk=2, dtype=torch.bfloat16)  # 6 pairs

# Sums in the order of the docstrings: values of 2 bytes, logits of 4, flags of 1, indices of 8.
BY_HAND = {
    "logits": (Work(2 * 6 + 2 * 10 + 4 * 15, 60, True), Work(2 * 32 + 4 * 15, 120, True)),
    "router": (Work(15 * 4 + 15 * 2 + 15 + 5 * 4 + 8 * 8), Work(15 * 2 + 15 + 15 * 4 + 5 * 4)),
    "permutation": (Work(15 + 3 * 6 * 8 + 3 * 8), Work()),
    "gather": (
        Work(2 * 6 + 2 * 12 + 2 * 6 + 2 * 6 + 8 * 6 + 8 * 6),
        Work(2 * 12 + 2 * 6 + 2 * 6 + 2 * 15 + 8 * 6 + 8 * 6 + 8 * 3),
    ),
    # rows, weights and outputs of the products with gate and up, and with down
    PRODUCTS: (Work(2 * (12 + 80 + 48) + 2 * (24 + 40 + 12), 288), Work(2 * 432, 576)),
    "SwiGLU": (Work(2 * (48 + 24)), Work(2 * (48 + 24) + 2 * (24 + 48 + 6))),
    "weighting": (Work(2 * 6), Work(2 * 6)),
    "combine": (Work(2 * 12 + 2 * 6 + 8 * 6 + 8 * 3), Work(2 * 6 + 2 * 12 + 8 * 6)),
}


@pytest.mark.parametrize("operation", FEWEST)
def test_the_fewest_bytes_are_those_counted_by_hand(operation):
    assert FEWEST[operation](SHAPE) == BY_HAND[operation]


def test_memory_or_cores_limit_an_operation():
    gpu = GPU("slow", bandwidth=10, bf16=100, fp32=1)
    assert Work(bytes=100, flops=50).seconds(gpu) == 10
    assert Work(bytes=100, flops=2000).seconds(gpu) == 20
    assert Work(bytes=100, flops=50, fp32=True).seconds(gpu) == 50


def test_views_and_empty_tensors_launch_nothing():
    x = torch.zeros(4, 3)
    with Counting() as counting:
        torch.empty_like(x).view(-1)[2:].unsqueeze(0).detach()
        x.new_empty(5)
        x.T.reshape(2, 6)  # copies
        x.add_(1)
        x.zero_()  # reads nothing
        x.sum().item()
    assert counting.count == Count(4, 48 + 48 + 48 + 48 + 48 + 48 + 4)


def test_fake_tensors_count_as_real_ones_do():
    """Also what a permutation finds in a map, of which a fake one has no values."""
    s = Shape(8, 16, 4, num_experts=5, topk=2)
    routing_map = torch.zeros(8, 5, dtype=torch.bool)
    routing_map[:, 1:3] = True
    x, probs = torch.zeros(8, 16, requires_grad=True), torch.zeros(8, 5, requires_grad=True)
    with Counting() as permutation:
        found = Permutation.of(routing_map, s.pairs)
    with Counting() as gather:
        rows, prob = permute(x, probs, found)
    given = (torch.zeros_like(rows), torch.zeros_like(prob))
    with Counting() as gather_backward:
        torch.autograd.grad((rows, prob), (x, probs), given)
    with Counting() as combined:
        combine(rows.detach(), found)
    counted = roofline.counted_in_torch(s)
    assert counted["permutation"].forward == permutation.count
    assert counted["gather"] == (gather.count, gather_backward.count)
    assert counted["combine"].forward == combined.count


@needs_triton
def test_triton_launches_little_and_nothing_moves_less_than_the_fewest(monkeypatch):
    monkeypatch.delenv(INTERPRETER, raising=False)
    found = Roofline.of(Shape(16384, 768, 2048, num_experts=128, topk=8, dtype=torch.bfloat16))
    launches = {name: tuple(c.launches for c in found.in_triton[name]) for name in FEWEST}
    assert launches == {
        "logits": (3, 4),
        "router": (2, 1),
        "permutation": (3, 0),  # two kernels, and a running sum of torch's
        "gather": (1, 1),
        PRODUCTS: (2, 4),
        "SwiGLU": (1, 1),
        "weighting": (0, 0),  # in the SwiGLU
        "combine": (1, 1),
    }
    for name, fewest in found.fewest.items():
        tables = (found.in_torch, found.in_triton)[: 1 if name == "weighting" else 2]
        for work, *counts in zip(fewest, *(table[name] for table in tables), strict=True):
            assert all(count.bytes >= work.bytes for count in counts)
    both = zip(found.fewest["SwiGLU"], found.fewest["weighting"], strict=True)
    assert [count.bytes for count in found.in_triton["SwiGLU"]] == [
        activation.bytes + weights.bytes for activation, weights in both
    ]
    in_torch = sum(sum(c.launches for c in counts) for counts in found.in_torch.values())
    assert in_torch > sum(map(sum, launches.values()))
    # The kernels write hardly more than what they must.
    for name in ("router", "gather", "combine"):
        for work, count in zip(found.fewest[name], found.in_triton[name], strict=True):
            assert count.bytes < 1.2 * work.bytes


@needs_triton
def test_the_share_of_a_step_by_hand(monkeypatch):
    """A memory of a byte per second makes seconds of bytes, and leaves products out."""
    monkeypatch.delenv(INTERPRETER, raising=False)
    size = ModelSize(
        num_layers=3, hidden=2, query_width=2, key_width=2, ffn_width=4, vocab=8, seq_length=3,
        num_moe_layers=2, num_experts=5, topk=2, expert_width=4,
    )  # fmt: skip
    gpu = GPU("slow", bandwidth=1, bf16=float(size.flops_per_sequence), fp32=1e9)
    forward, backward = (
        sum(work[i].bytes for name, work in BY_HAND.items() if name != PRODUCTS) for i in (0, 1)
    )
    once = roofline.share(size, RankLoad(), gpu)
    assert once.products == 1 and once.fewest == 2 * (forward + backward)
    assert once.of_step(once.fewest) == pytest.approx(once.fewest / (1 + once.fewest))
    again = roofline.share(size, RankLoad(recompute="full"), gpu)
    assert again.products == pytest.approx(4 / 3)
    assert again.fewest == 2 * (2 * forward + backward)
    experts = roofline.share(size, RankLoad(recompute="moe"), gpu)
    assert experts.products == 1 + 2 * 288 / size.flops_per_sequence
    assert experts.fewest == again.fewest
    assert once.in_torch > once.in_triton > once.fewest
    assert once.to_win == (once.in_triton - once.fewest) / (1 + once.in_triton)


def test_nothing_is_recorded_where_triton_would_interpret(monkeypatch):
    monkeypatch.setenv(INTERPRETER, "1")
    if has_triton():
        with pytest.raises(
            ValueError, match="TRITON_INTERPRET is set, so that nothing is launched"
        ):
            roofline.counted_in_triton(SHAPE)
