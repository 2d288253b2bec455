"""Measures of runs: losses, how sparsity settles and oscillates, and what a difference shows."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence

from scipy.special import stdtrit

from megatron.remoe.analysis.runs import Run

_LAST_ROWS = 20
_OSCILLATION_ROWS = 100


def validation_loss(run: Run) -> float:
    """Return the last overall validation loss; NaN if there is none, or the run diverged."""
    loss = run.last_evaluation().get("valid")
    return math.nan if loss is None else loss


def steps_to_settle(run: Run) -> int | None:
    """Return the step at which sparsity settles; None if it has not, or without ReLU routing."""
    return run.stages.sparse_from if run.has_relu_routing else None


def sparsity_deviation(run: Run, rows: int = 1) -> float | None:
    """Return the standard deviation of sparsity over blocks of `rows` rows in the last 100 rows.

    The deviation of single steps is mostly that of their batches, which longer blocks average out.
    It is None for a router without sparsity.
    """
    values = [row["sparsity"] for row in run.measured[-_OSCILLATION_ROWS:]]
    blocks = [values[i : i + rows] for i in range(0, len(values), rows)]
    return statistics.pstdev(map(statistics.fmean, blocks)) if blocks else None


def accuracy(run: Run) -> float | None:
    """Return the mean accuracy of the tasks in `evaluation.json`; None if there are none.

    A group of tasks stands for its tasks, whose names begin with the group's.

    Raises:
        ValueError: the file is damaged.
    """
    file = run.path / "evaluation.json"
    if not file.is_file():
        return None
    try:
        tasks = json.loads(file.read_bytes()).get("tasks") or {}
        known = {name: task["acc"] for name, task in tasks.items() if "acc" in task}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{file} is not what remoe evaluate writes ({error}); delete it, or evaluate again"
        ) from None
    own = [n for n in known if not any(n.startswith(f"{other}_") for other in known)]
    return statistics.fmean(known[name] for name in own) if own else None


def last_mean(run: Run, key: str) -> float | None:
    """Return the mean of a quantity over the last 20 rows; None if no row has it."""
    return mean_of(row.get(key) for row in run.train[-_LAST_ROWS:])


def mean_of_all_steps(run: Run, key: str) -> float | None:
    """Return the mean of a quantity over all rows; None if no row has it."""
    return mean_of(row.get(key) for row in run.train)


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def deviation_of(values: list[float]) -> float | None:
    """Return the standard deviation of values; None for one, and NaN if one is not finite."""
    if len(values) < 2:
        return None
    # `statistics` fails on values that are not finite.
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def half_width(differences: Sequence[float], confidence: float = 0.95) -> float:
    """Return half the width of the two-sided confidence interval of a mean, by Student's t.

    Raises:
        ValueError: there are fewer than two differences.
    """
    count = len(differences)
    if count < 2:
        raise ValueError(
            f"{count} difference{'s' * (count != 1)} between paired runs cannot be tested; train "
            f"both routers with at least 2 common seeds"
        )
    deviation = deviation_of(list(differences))
    quantile = stdtrit(count - 1, (1 + confidence) / 2)
    return float(quantile) * (math.nan if deviation is None else deviation) / math.sqrt(count)


def verdict(differences: Sequence[float], margin: float) -> str:
    """Return what paired differences show: lower, higher, equivalent within a margin, or undecided.

    Two one-sided t-tests, each at 5%, find equivalence: they reject a mean of `-margin` or less and
    one of `margin` or more. That is so exactly if the 90% confidence interval lies within the
    margin (D. J. Schuirmann, 1987, https://doi.org/10.1007/BF01068419). Otherwise the mean is lower
    or higher if the 95% interval excludes zero. Equivalence comes first: a difference that is real
    but smaller than a margin stated beforehand does not matter.

    Args:
        differences: the first router's loss minus the second's, one per seed.
        margin: the smallest difference of the means that matters, in the unit of the differences.

    Returns:
        "lower", "higher", "equivalent within M" or "undecided", as it is with a value that is not
        finite.

    Raises:
        ValueError: there are fewer than two differences, or the margin is not above 0.
    """
    check_margin(margin)
    wide, narrow = half_width(differences), half_width(differences, 0.9)
    mean = sum(differences) / len(differences)
    if abs(mean) + narrow < margin:
        return f"equivalent within {margin:g}"
    if abs(mean) > wide:
        return "lower" if mean < 0 else "higher"
    return "undecided"


def check_margin(margin: float) -> None:
    """Refuse a margin of equivalence that is no positive number.

    Raises:
        ValueError: naming the margin.
    """
    if not 0 < margin < math.inf:
        raise ValueError(
            f"the margin is {margin:g}; it must be above 0, in nats of validation loss"
        )
