"""Distillation of an adopted model from its teacher, on a walk to the budget of active experts.

The loss is the divergence of the teacher's next-token distribution from the student's,
`KL(p_teacher || p_student)`, the mean over tokens in nats (Hinton et al., arXiv 1503.02531). Over
the first half of the steps the budget of each layer falls from the teacher's k to its target. It is
kept by

- "threshold": the layer's `gate_threshold` is moved after every step to the quantile of the step's
  gates that leaves the budget. It takes gates away and does not shrink the others.
- "l1": the L1 penalty of pretraining and its controller (arXiv 2412.14711, Eq. 6, 7 and 9). It
  shrinks all gates until enough of them are zero.

Shapes: N sequences, S tokens of each, T = N * S, E experts, L layers with experts, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from megatron.remoe.evaluate.models import hooked
from megatron.remoe.evaluate.routing import losses_of
from remoe.controller import ControllerConfig, next_l1_coeff
from remoe.hf.budget_remoe import active_by_layer
from remoe.hf.budget_remoe import calibrate as bisect
from remoe.regularization import l1_regularization

WALKS = ("threshold", "l1")
_WALK = 0.5  # the share of the steps after which the target is reached
_WARM_UP = 0.05
_FOLLOW = 0.3  # how far a threshold moves to that of the last batch
_ROUNDS, _TOLERANCE = 12, 0.002  # of a calibration
_SEQUENCES = 8  # at a time
_L1_COEFF = 1e-4  # where the controller starts


@dataclass(frozen=True)
class Plan:
    """How a student is trained.

    Attributes:
        steps: number of optimizer steps.
        batch_size: number of sequences of a step.
        target: mean number of active experts of a token and layer at the end; None keeps what a
            router does.
        walk: one of `WALKS`.
        lr: learning rate of Adam, relative to the root mean square of each weight.
        all_weights: whether all weights are trained, or the routers alone.
    """

    steps: int
    batch_size: int
    target: float | None
    walk: str
    lr: float
    all_weights: bool


@dataclass
class Progress:
    """What has happened so far: all that the next step depends on beside the weights.

    Attributes:
        step: number of steps that are done.
        l1_coeff: coefficient of the penalty of the "l1" walk.
        losses: the divergence of every step, in nats.
        active: the mean number of active experts in every step.
        targets: the mean number of active experts that each layer is to have at the end.
    """

    step: int
    l1_coeff: float
    losses: list[float]
    active: list[float]
    targets: list[float]

    @classmethod
    def start(cls) -> "Progress":
        """Return that before the first step."""
        return cls(0, _L1_COEFF, [], [], [])


def trained(student: Any, plan: Plan) -> dict[str, Any]:
    """Return the parameters that are trained by name, and freeze all others."""
    chosen = {}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(plan.all_weights or ".mlp.router." in name)
        if parameter.requires_grad:
            chosen[name] = parameter
    return chosen


def optimizer_of(parameters: dict[str, Any], plan: Plan) -> torch.optim.Optimizer:
    """Return Adam, in which the step of each weight is relative to the weight's size."""
    groups = []
    for parameter in parameters.values():
        size = float(parameter.detach().double().square().mean().sqrt())
        groups.append({"params": [parameter], "lr": plan.lr * size, "peak": plan.lr * size})
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


def distill(
    teacher: Any,
    student: Any,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    plan: Plan,
    progress: Progress,
    after_step: Callable[[], None],
) -> None:
    """Train a student, from where `progress` stands to the last step.

    Args:
        teacher: the teacher.
        student: the student, whose `gate_threshold`, one for each layer, is moved.
        optimizer: that of `optimizer_of`.
        inputs: ids, int64 `[N, S]`, taken in their order, from the first again after the last.
        plan: how to train.
        progress: where the training stands, which is moved.
        after_step: called after every step.

    Raises:
        ValueError: the divergence is NaN or infinite.
    """
    topk = student.config.num_experts_per_tok
    while progress.step < plan.steps:
        step = progress.step
        rows = torch.arange(step * plan.batch_size, (step + 1) * plan.batch_size) % len(inputs)
        batch = inputs[rows].to(student.device)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _share_of_lr(step, plan.steps)
        with gates_of(student) as gates:
            loss, routing = divergence(teacher, student, batch)
        active = float(torch.cat([(g != 0).sum(dim=-1).double().flatten() for g in routing]).mean())
        if plan.target is not None and plan.walk == "l1":
            loss_of_all = loss + progress.l1_coeff * _penalty(routing)
            budget = budget_of(step, plan, topk, plan.target)
            progress.l1_coeff = _next_coeff(progress.l1_coeff, active, budget, student.config)
        else:
            loss_of_all = loss
        divergence_now = float(loss.detach())
        if not math.isfinite(divergence_now):
            raise ValueError(
                f"the divergence of step {step + 1} is {divergence_now}; start anew with a lower "
                f"learning rate than {plan.lr:g} (--lr, --force)"
            )
        optimizer.zero_grad()
        loss_of_all.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if plan.target is not None and plan.walk == "threshold":
            budgets = [budget_of(step, plan, topk, target) for target in progress.targets]
            follow(student.config, gates, budgets)
        progress.step += 1
        progress.losses.append(divergence_now)
        progress.active.append(active)
        after_step()


def budget_of(step: int, plan: Plan, topk: float, target: float) -> float:
    """Return the mean number of active experts that a step walks to on the way to a target."""
    share = min(1.0, (step + 1) / max(1.0, _WALK * plan.steps))
    return topk + (target - topk) * share


def _share_of_lr(step: int, steps: int) -> float:
    """Return the learning rate relative to its peak: a linear warm-up, and a cosine to zero."""
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def divergence(teacher: Any, student: Any, batch: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return `KL(p_teacher || p_student)`, 0-d, and the student's gates of every layer.

    Args:
        teacher: the teacher.
        student: the student.
        batch: ids, int64 `[N, S]`.
    """
    with torch.no_grad():
        wanted = log_probs(teacher(batch, use_cache=False).logits)
    output = student(batch, use_cache=False, output_routing=True)
    return divergence_of(wanted, log_probs(output.logits)), output.router_probs


def log_probs(logits: Tensor) -> Tensor:
    """Return the logarithms of a model's next-token distributions, fp32 `[T, V]`.

    Args:
        logits: `[N, S, V]`.
    """
    return logits.float().flatten(0, 1).log_softmax(dim=-1)


def divergence_of(wanted: Tensor, found: Tensor) -> Tensor:
    """Return `KL(p_wanted || p_found)`, the mean over tokens in nats, 0-d.

    Args:
        wanted, found: `log_probs` of both, `[T, V]`.
    """
    return F.kl_div(found, wanted, log_target=True, reduction="batchmean")


def _penalty(routing: tuple[Tensor, ...]) -> Tensor:
    flat = [gates.flatten(0, 1) for gates in routing]
    return torch.stack([l1_regularization(g, num_tokens=len(g)) for g in flat]).sum()


def _next_coeff(coeff: float, active: float, budget: float, config: Any) -> float:
    controller = ControllerConfig(
        target_sparsity=1 - budget / config.num_experts, l1_coeff_init=_L1_COEFF
    )
    sparsity = torch.tensor(1 - active / config.num_experts)
    return float(next_l1_coeff(torch.tensor(coeff), sparsity, controller))


@contextmanager
def gates_of(model: Any) -> Iterator[list[Tensor]]:
    """Collect the gates of all routers before a threshold, fp32 `[T, E]` for each layer and call.

    They are those of all experts for routers with ReLU gates, zero where inactive.
    """
    found: list[Tensor] = []

    def read(layer: int, router: Any, given: Any, named: Any, output: Any) -> None:
        with torch.no_grad():
            found.append(router.select(router.score(*given, **named)[0])[0])

    with hooked(model, read):
        yield found


def threshold_for(gates: list[Tensor], budget: float) -> float:
    """Return the threshold that leaves a mean number of active experts in given gates.

    It is 0 if there are no more gates than that.

    Args:
        gates: those of each layer, `[T, E]`.
        budget: the mean number of active experts of a token and layer.
    """
    sizes = torch.cat([g.abs().flatten() for g in gates]).cpu()
    tokens = sum(len(g) for g in gates)
    count = round(budget * tokens)
    above = sizes[sizes > 0]
    if count >= len(above):
        return 0.0
    return float(above.kthvalue(len(above) - count + 1).values) if count else float(above.max()) * 2


def kept_by(threshold: float, gates: Tensor) -> float:
    """Return the mean number of active experts of a token that a threshold leaves.

    Args:
        threshold: gates of a smaller size are switched off, and those that are zero.
        gates: those of a layer, `[T, E]`.
    """
    return float((gates.abs() >= max(threshold, 1e-30)).sum()) / len(gates)


def follow(config: Any, gates: list[Tensor], budgets: list[float]) -> None:
    """Move the threshold of each layer toward the one that the gates of a batch ask for."""
    wanted = [threshold_for([own], budget) for own, budget in zip(gates, budgets, strict=True)]
    now = config.gate_threshold
    config.gate_threshold = [a + _FOLLOW * (b - a) for a, b in zip(now, wanted, strict=True)]


@torch.no_grad()
def calibrate(model: Any, inputs: Tensor, targets: list[float]) -> float:
    """Set the threshold of each layer so that it has a mean number of active experts, or fewer.

    The experts of a layer change what later layers see, so that thresholds are set again until they
    agree with what they leave. If they go around in circles, all of them are moved by one factor
    that leaves the mean over layers.

    Args:
        model: the model, whose `gate_threshold` has a value for each layer.
        inputs: ids, int64 `[N, S]`.
        targets: the number of each layer.

    Returns:
        The mean number of active experts over layers that was reached.
    """
    config, layers = model.config, len(targets)
    target = sum(targets) / layers
    for _ in range(_ROUNDS):
        with gates_of(model) as found:
            for batch in torch.split(inputs, _SEQUENCES):
                model.model(batch.to(model.device), use_cache=False)
        gates = [torch.cat(found[layer::layers]) for layer in range(layers)]
        kept, wrong = [], []
        for own, threshold, wanted in zip(gates, config.gate_threshold, targets, strict=True):
            kept.append(kept_by(threshold, own))
            has_no_more = kept[-1] < wanted and not threshold
            wrong.append(0.0 if has_no_more else abs(kept[-1] - wanted))
        if sum(wrong) / layers <= _TOLERANCE * target:
            return sum(kept) / layers
        config.gate_threshold = [
            threshold_for([own], wanted) for own, wanted in zip(gates, targets, strict=True)
        ]
    thresholds = config.gate_threshold

    def move(change: float) -> None:
        config.gate_threshold = [threshold * (1 + change) for threshold in thresholds]

    def measure(change: float) -> float:
        move(change)
        return float(active_by_layer(model, inputs, torch.ones_like(inputs)).mean())

    nearest = bisect(measure, target, least=-1.0)
    move(nearest.value)
    return nearest.reached


@torch.no_grad()
def mean_loss(model: Any, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean loss in nats per token, and the mean number of active experts."""
    losses, counts = [], []

    def read(layer: int, router: Any, given: Any, named: Any, output: Any) -> None:
        counts.append(output[1].sum(dim=1).cpu())

    with hooked(model, read):
        for some, targets in zip(
            torch.split(inputs, _SEQUENCES), torch.split(labels, _SEQUENCES), strict=True
        ):
            losses.append(losses_of(model, some, targets))
    return float(torch.cat(losses).double().mean()), float(torch.cat(counts).double().mean())
