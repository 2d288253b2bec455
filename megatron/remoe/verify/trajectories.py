"""Trajectories, which are what every step of a run measured, and how far two of them are apart."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Trajectory = list[dict[str, Any]]
QUANTITIES = (
    "lm_loss", "grad_norm", "l1_reg", "sparsity", "sparsity_per_layer", "most_active",
    "l1_coeff_used", "level",
)  # fmt: skip

# In fp32, layouts compute sums in different orders. One rounding (6e-8) of the loss and its growth
# over the steps stay below 1e-5. The gradient norm and the regularizer sum over more terms. In each
# step, one (token, expert) pair may flip in 1 of L layers, when its logit is within rounding of
# zero.
FP32 = {
    "lm_loss": 1e-5,
    "grad_norm": 1e-4,
    "l1_reg": 1e-4,
    "sparsity": 2e-4,
    "sparsity_per_layer": 4e-4,
    "most_active": 0,
    "l1_coeff_used": 1e-6,
    # p, which moves in steps as the coefficient does, or the mean of thresholds, which follows
    # logits: those are differences of sums that nearly cancel.
    "level": 1e-4,
}
# Routing is continuous at a flip, but the load is not: one more of an expert's few dozen
# assignments in a micro-batch moves its weight in the penalty by a few percent, and the regularizer
# by its share. The flip may also concern the token that activates the most experts.
FROM_A_FLIP_ON = FP32 | {"grad_norm": 1e-2, "l1_reg": 1e-2, "most_active": 1}
# In bf16, activations have 8 bits (4e-3), and layouts round partial sums at different places.
# Losses are means over 512 tokens, so their error is well below one rounding, but it feeds back
# through 8-bit weights. Logits near zero flip, and where sparsity is near its target the
# coefficient then goes down instead of up, which is a factor of 1.2 squared. Two such steps (2.07)
# are allowed, and with them the deviations of the regularizer and the norm. One rank with other
# kernels (the cell "bf16: one rank") differs as much. The regularizer depends on sparsity through
# the load and through the gates: with the same code, one processor showed 0.51 where another
# showed 0.39.
BF16 = {
    "lm_loss": 1e-2,
    "grad_norm": 5e-1,
    "l1_reg": 7e-1,
    "sparsity": 2e-2,
    "sparsity_per_layer": 4e-2,
    "most_active": 1,
    "l1_coeff_used": 1.1,
    "level": 0.5,
}


def deviations(ours: Trajectory, theirs: Trajectory) -> dict[str, float]:
    """Return the largest deviation of every quantity over all steps.

    Deviations of sparsity are absolute, and all others are relative to `theirs`.
    """
    largest = {}
    for key in QUANTITIES:
        if not theirs or key not in theirs[0]:
            continue
        a, b = (np.array([step[key] for step in steps]) for steps in (ours, theirs))
        difference = np.abs(a - b)
        if not key.startswith("sparsity"):
            difference = difference / np.maximum(np.abs(b), 1e-30)
        largest[key] = float(difference.max())
    return largest


@dataclass(frozen=True)
class TrajectoryComparison:
    """How far two trajectories are apart.

    Attributes:
        deviations: largest deviation of every quantity over all steps, see `deviations`.
        before_flip: the same over the steps before `flipped`.
        flipped: the first step in which the sparsity differs, counted from 1.
    """

    deviations: dict[str, float] = field(default_factory=dict)
    before_flip: dict[str, float] = field(default_factory=dict)
    flipped: int | None = None

    @classmethod
    def of(cls, ours: Trajectory, theirs: Trajectory) -> "TrajectoryComparison":
        """Compare two trajectories of equal length."""
        key = "sparsity_per_layer"
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            # One assignment of any run here moves the sparsity of its layer by more than 1e-9.
            if key in b and not np.allclose(a[key], b[key], rtol=0, atol=1e-9):
                return cls(deviations(ours, theirs), deviations(ours[:i], theirs[:i]), i + 1)
        whole = deviations(ours, theirs)
        return cls(whole, whole)

    @property
    def flip(self) -> str:
        """Words about the flip for a verdict, empty if there was none."""
        return "" if self.flipped is None else f"; an assignment flips at step {self.flipped}"

    def is_within(self, dtype: str) -> bool:
        """Whether all deviations are within the tolerances of a dtype."""
        if dtype == "bf16":
            return _is_within(self.deviations, BF16)
        return _is_within(self.before_flip, FP32) and _is_within(self.deviations, FROM_A_FLIP_ON)


def _is_within(found: dict[str, float], tolerances: dict[str, float]) -> bool:
    return all(deviation <= tolerances[key] for key, deviation in found.items())


@dataclass(frozen=True, kw_only=True)
class TrajectoryResult(ABC):
    """The result of one check, which compares a run with its reference.

    Attributes:
        steps: number of steps that were compared.
        compared: the comparison, empty if a run failed.
        error: why a run failed, if it did.
    """

    steps: int
    compared: TrajectoryComparison
    error: str | None = None

    @property
    def deviations(self) -> dict[str, float]:
        """Largest deviation of every quantity."""
        return self.compared.deviations

    @property
    @abstractmethod
    def agrees(self) -> bool:
        """Whether the comparison is as it must be."""

    @property
    def ok(self) -> bool:
        """Whether the check passed."""
        return self.error is None and self.agrees

    @property
    def praise(self) -> str:
        """The verdict of a check that passed."""
        return f"ok{self.compared.flip}"

    @property
    def verdict(self) -> str:
        """The result in a few words."""
        return self.error or (self.praise if self.ok else "DIFFERS")


def table(header: Iterable[str], rows: Iterable[tuple[tuple[Any, ...], TrajectoryResult]]) -> str:
    """Return a Markdown table of results, with the deviations of every quantity.

    Args:
        header: names of the leading columns.
        rows: values of the leading columns, and the result of the row.
    """
    columns = [*header, *QUANTITIES, ""]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for leading, result in rows:
        found = result.deviations
        values = [f"{found[key]:.1e}" if key in found else "" for key in QUANTITIES]
        lines.append("| " + " | ".join([*map(str, leading), *values, result.verdict]) + " |")
    return "\n".join(lines)
