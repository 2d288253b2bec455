"""Comparison of runs: means over seeds, and paired differences between routers."""

import csv
import io
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

from megatron.remoe.analysis import markdown
from megatron.remoe.analysis.measures import (
    accuracy,
    check_margin,
    deviation_of,
    half_width,
    last_mean,
    mean_of,
    mean_of_all_steps,
    sparsity_deviation,
    steps_to_settle,
    validation_loss,
    verdict,
)
from megatron.remoe.analysis.routers import (
    NAMED,
    defaults_of,
    is_router_setting,
    name_of,
    order_of,
    router_of,
)
from megatron.remoe.analysis.runs import Run
from megatron.remoe.analysis.size import ModelSize
from remoe.statistics import expert_ranks

_OSCILLATION_MEAN = 10  # rows of a block
_DEFAULT_SEED = 1234
MARGIN = 0.05  # nats of validation loss: 5% of the perplexity
# Settings in which runs may differ and still be the same experiment.
_PLACES = {
    "run_dir", "nproc", "seed", "metrics_file", "save", "load", "save_interval", "data_cache_path",
    "tensorboard_dir", "wandb_exp_name", "wandb_save_dir", "wandb_project", "wandb_tags",
    "wandb_mode",
}  # fmt: skip


def load_runs(paths: Iterable[Path]) -> list[Run]:
    """Read run directories, and the run directories in folders that are none themselves.

    Raises:
        ValueError: a path holds no run.
    """
    runs: list[Run] = []
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder; pass run directories, or folders of them")
        candidates = [path] if _is_run(path) else sorted(filter(_is_run, path.iterdir()))
        if not candidates:
            raise ValueError(f"{path} holds no run: there is no metrics.jsonl in it or below it")
        runs += map(Run.load, candidates)
    return runs


def _is_run(folder: Path) -> bool:
    return (folder / "metrics.jsonl").is_file()


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        router: the name of the router.
        settings: what else distinguishes the group from others in the comparison.
        runs: the runs by seed.
    """

    router: str
    settings: tuple[tuple[str, Any], ...]
    runs: dict[int, Run]

    @property
    def name(self) -> str:
        """The router and the settings in words."""
        return name_of(self.router, self.settings)

    @property
    def any_run(self) -> Run:
        """One of the runs."""
        return next(iter(self.runs.values()))

    @property
    def losses(self) -> dict[int, float]:
        """The validation losses by seed."""
        return {seed: validation_loss(run) for seed, run in self.runs.items()}

    @property
    def size(self) -> ModelSize | None:
        """The size of the model; None if the config does not determine it."""
        try:
            return ModelSize.from_flags(self.any_run.config)
        except ValueError:
            return None

    @cached_property
    def row(self) -> dict[str, Any]:
        """The group's line in the table, unrounded."""
        runs, losses = list(self.runs.values()), list(self.losses.values())
        steps = [step for step in map(steps_to_settle, runs) if step is not None]
        coeffs = [[row["l1_coeff"] for row in run.train if "l1_coeff" in row] for run in runs]

        def last(key: str) -> float | None:
            return mean_of(last_mean(run, key) for run in runs)

        size, busiest, step_time = self.size, last("busiest_rank_load"), None
        if size is not None and busiest is not None:
            step_time = 1 + size.expert_share * (busiest - 1)

        return {
            "run": self.name,
            "seeds": len(runs),
            "steps": min(run.train[-1]["iteration"] for run in runs),
            "active_params": size.active_params if size else None,
            "total_params": size.total_params if size else None,
            "valid_loss_mean": statistics.fmean(losses),
            "valid_loss_std": deviation_of(losses),
            "active_all_steps": mean_of(mean_of_all_steps(run, "active_experts") for run in runs),
            "sparsity": last("sparsity"),
            "settled_runs": len(steps) if any(run.has_relu_routing for run in runs) else None,
            "steps_to_settle": mean_of(steps),
            "deviation": mean_of(map(sparsity_deviation, runs)),
            "oscillation": mean_of(map(partial(sparsity_deviation, rows=_OSCILLATION_MEAN), runs)),
            "coeff_peak": _geometric_mean(max(c) for c in coeffs if c),
            "coeff_last": _geometric_mean(c[-1] for c in coeffs if c),
            "dead_experts": last("dead_experts"),
            "experts": size.num_moe_layers * size.num_experts if size else None,
            "expert_load_max": last("expert_load_max"),
            "expert_load_cv": last("expert_load_cv"),
            "expert_ranks": expert_ranks(size.num_experts) if size and size.num_experts else None,
            "busiest_rank_load": busiest,
            "step_time": step_time,
            "accuracy": mean_of(map(accuracy, runs)),
        }


def _geometric_mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.geometric_mean(known) if known and min(known) > 0 else None


@dataclass(frozen=True)
class Difference:
    """The validation loss of one group minus that of another, at equal seeds.

    Attributes:
        first, second: the names of the groups.
        seeds: the number of seeds that both groups have.
        mean: the mean of the differences, which is negative if the first group is better.
        half_width: half the width of the 95% confidence interval by Student's t; None for one seed.
        verdict: what the differences show (`measures.verdict`); None for one seed.
    """

    first: str
    second: str
    seeds: int
    mean: float
    half_width: float | None
    verdict: str | None


def paired_difference(first: Group, second: Group, margin: float = MARGIN) -> Difference | None:
    """Compare two groups at the seeds that both have; None if there is no such seed."""
    a, b = first.losses, second.losses
    deltas = [a[seed] - b[seed] for seed in a if seed in b]
    if not deltas:
        return None
    half = found = None
    if len(deltas) > 1:
        half, found = half_width(deltas), verdict(deltas, margin)
    return Difference(first.name, second.name, len(deltas), statistics.fmean(deltas), half, found)


@dataclass(frozen=True)
class RunComparison:
    """Groups of runs, and the differences between routers whose other settings are equal.

    Attributes:
        groups: the groups, in the order of the tables.
        differences: the differences.
        margin: the margin of equivalence, in nats.
    """

    groups: list[Group]
    differences: list[Difference]
    margin: float

    def to_csv(self) -> str:
        """Return the groups as CSV, unrounded."""
        rows = [group.row for group in self.groups]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        """Return tables of quality, routing and load, and of the differences."""
        rows = [group.row for group in self.groups]
        lines = markdown.table(rows, markdown.QUALITY)
        routed = [row for row in rows if row["sparsity"] is not None]
        if routed:
            lines += ["", *markdown.table(routed, markdown.ROUTING)]
            lines += ["", *markdown.table(routed, markdown.LOAD)]
        if self.differences:
            cells = []
            for d in self.differences:
                interval = "" if d.half_width is None else f" ± {d.half_width:.4f}"
                found = d.verdict or "one seed"
                cells.append((d.first, d.second, d.seeds, f"{d.mean:+.4f}{interval}", found))
            titles = ("first", "second", "seeds", "difference", "the first is")
            lines += [
                "",
                "Validation loss, first minus second, at equal seed; 95% confidence interval by "
                f"Student's t. Equivalent: two one-sided tests at 5% and a margin of "
                f"{self.margin:g}.",
                "",
                *markdown.lines(titles, cells),
            ]
        return "\n".join(lines)


def compare(runs: list[Run], baseline: Path | None = None, margin: float = MARGIN) -> RunComparison:
    """Group runs by everything but their seed, and pair the routers.

    Args:
        runs: the runs.
        baseline: one of the runs; other groups with its router are compared with its group as well.
        margin: the smallest difference in validation loss that matters, in nats.

    Raises:
        ValueError: two runs have the same settings and seed, or losses of different tasks, or the
            baseline is none of the runs, or the margin is not above 0.
    """
    check_margin(margin)
    _refuse_two_tasks(runs)
    routers = {run.path: router_of(run.config) for run in runs}
    groups: dict[tuple[str, str], Group] = {}
    for run in runs:
        alike = [r for r in runs if routers[r.path] == routers[run.path]]
        settings = _varying(run, alike)
        key = (routers[run.path], repr(settings))
        group = groups.setdefault(key, Group(routers[run.path], settings, {}))
        seed = int(run.config.get("seed") or _DEFAULT_SEED)
        if seed in group.runs:
            raise ValueError(
                f"{group.runs[seed].path} and {run.path} have the same settings and seed {seed}; "
                f"leave one of them out"
            )
        group.runs[seed] = run
    ordered = sorted(groups.values(), key=_order)
    pairs = [
        (first, second)
        for second, first in combinations(ordered, 2)
        if first.router != second.router and _comparable(first, second)
    ]
    if baseline is not None:
        base = _group_of(ordered, baseline)
        pairs += [(g, base) for g in ordered if g.router == base.router and g is not base]
    differences = [paired_difference(*pair, margin) for pair in pairs]
    return RunComparison(ordered, [d for d in differences if d is not None], margin)


def _refuse_two_tasks(runs: list[Run]) -> None:
    """Refuse losses of hidden tokens beside losses of next tokens, which are no like quantities."""
    tasks = {bool(run.config.get("masked_lm")): run.path for run in runs}
    if len(tasks) > 1:
        raise ValueError(
            f"{tasks[True]} was trained with masked_lm and {tasks[False]} without, and losses of "
            f"hidden tokens cannot be compared with those of next tokens; compare them apart"
        )


def _order(group: Group) -> tuple[Any, list[tuple[bool, float, str]]]:
    """Order groups by router, then by their settings, of which numbers are ordered by size."""

    def key(value: Any) -> tuple[bool, float, str]:
        is_number = isinstance(value, int | float)
        return not is_number, float(value) if is_number else 0.0, str(value)

    return order_of(group.any_run.config), [key(value) for _, value in group.settings]


def _group_of(groups: list[Group], path: Path) -> Group:
    for group in groups:
        if any(run.path.resolve() == path.resolve() for run in group.runs.values()):
            return group
    raise ValueError(f"the baseline {path} is none of the runs that are compared; pass one of them")


def _settings(run: Run) -> dict[str, Any]:
    """Return the settings that distinguish runs with one router; what is left out has its default.

    Settings that the router's name tells are not among them.
    """
    settings = run.config | {
        k: v for k, v in defaults_of(run.config).items() if k not in run.config
    }
    return {key: value for key, value in settings.items() if key not in _PLACES | NAMED}


def _varying(run: Run, alike: list[Run]) -> tuple[tuple[str, Any], ...]:
    """Return the settings of a run in which runs with its router differ."""
    own, others = _settings(run), [_settings(r) for r in alike]
    keys = dict.fromkeys(key for other in others for key in other)
    return tuple(
        (key, own.get(key)) for key in keys if any(o.get(key) != own.get(key) for o in others)
    )


def _comparable(first: Group, second: Group) -> bool:
    """Return whether two routers agree in all settings that both have and that are no router's."""
    a, b = _settings(first.any_run), _settings(second.any_run)
    different = [key for key in a if key in b and a[key] != b[key]]
    return all(map(is_router_setting, different))
