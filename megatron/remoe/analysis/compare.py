"""Comparison of runs: means over seeds, and paired differences between routers."""

import csv
import io
import math
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
    deviation_of,
    last_mean,
    mean_of,
    sparsity_deviation,
    steps_to_settle,
    validation_loss,
)
from megatron.remoe.analysis.runs import Run
from megatron.remoe.analysis.size import ModelSize

_OSCILLATION_MEAN = 10  # rows of a block
_DEFAULT_SEED = 1234
# Routers in the order of a table; a difference is that of a later one minus an earlier one.
ROUTERS = (
    "dense", "TopK", "TopK with warm-up", "RMoE", "RMoE with warm-up", "Soft MoE", "ReMoE",
    "recurrent ReMoE",
)  # fmt: skip
# Settings in which runs may differ and still be the same experiment.
_PLACES = {
    "run_dir", "nproc", "seed", "metrics_file", "save", "load", "save_interval", "data_cache_path",
    "tensorboard_dir", "wandb_exp_name", "wandb_save_dir", "wandb_project", "wandb_tags",
    "wandb_mode",
}  # fmt: skip
# Settings of a router; in all others, two routers must agree to be compared.
_ROUTER_SETTINGS = (
    "moe_relu_",
    "moe_soft_",
    "moe_topk_warmup_",
    "moe_router_recurren",
    "moe_router_load_balancing_type",
    "moe_router_pre_softmax",
    "moe_aux_loss_coeff",
)
# Two-sided 95% quantiles of Student's t, for 1 to 30 degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


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


def router_of(config: dict[str, Any]) -> str:
    """Return the router of a run, one of `ROUTERS`."""
    if not config.get("num_experts"):
        return "dense"
    if config.get("moe_soft_routing"):
        return "Soft MoE"
    recurrent = config.get("moe_router_recurrence") not in (None, "none")
    if config.get("moe_relu_routing"):
        return "recurrent ReMoE" if recurrent else "ReMoE"
    warm_up = " with warm-up" if config.get("moe_topk_warmup_steps") else ""
    return ("RMoE" if recurrent else "TopK") + warm_up


@dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed.

    Attributes:
        router: the router, one of `ROUTERS`.
        settings: what else distinguishes the group from others in the comparison.
        runs: the runs by seed.
    """

    router: str
    settings: tuple[tuple[str, Any], ...]
    runs: dict[int, Run]

    @property
    def name(self) -> str:
        """The router and the settings in short."""
        short = (
            f"{key.removeprefix('moe_').removeprefix('relu_')} "
            f"{'default' if value is None else value}"
            for key, value in self.settings
        )
        return ", ".join([self.router, *short])

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

        return {
            "run": self.name,
            "seeds": len(runs),
            "steps": min(run.train[-1]["iteration"] for run in runs),
            "active_params": self.size.active_params if self.size else None,
            "total_params": self.size.total_params if self.size else None,
            "valid_loss_mean": statistics.fmean(losses),
            "valid_loss_std": deviation_of(losses),
            "sparsity": last("sparsity"),
            "settled_runs": len(steps) if any(run.has_relu_routing for run in runs) else None,
            "steps_to_settle": mean_of(steps),
            "deviation": mean_of(map(sparsity_deviation, runs)),
            "oscillation": mean_of(map(partial(sparsity_deviation, rows=_OSCILLATION_MEAN), runs)),
            "coeff_peak": _geometric_mean(max(c) for c in coeffs if c),
            "coeff_last": _geometric_mean(c[-1] for c in coeffs if c),
            "dead_experts": last("dead_experts"),
            "expert_load_max": last("expert_load_max"),
            "expert_load_cv": last("expert_load_cv"),
            "tokens_per_second": last("tokens_per_second"),
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
    """

    first: str
    second: str
    seeds: int
    mean: float
    half_width: float | None


def paired_difference(first: Group, second: Group) -> Difference | None:
    """Compare two groups at the seeds that both have; None if there is no such seed."""
    a, b = first.losses, second.losses
    deltas = [a[seed] - b[seed] for seed in a if seed in b]
    if not deltas:
        return None
    deviation, half = deviation_of(deltas), None
    if deviation is not None:
        t = _T95[min(len(deltas) - 1, len(_T95)) - 1]
        half = t * deviation / math.sqrt(len(deltas))
    return Difference(first.name, second.name, len(deltas), statistics.fmean(deltas), half)


@dataclass(frozen=True)
class RunComparison:
    """Groups of runs, and the differences between routers whose other settings are equal."""

    groups: list[Group]
    differences: list[Difference]

    def to_csv(self) -> str:
        """Return the groups as CSV, unrounded."""
        rows = [group.row for group in self.groups]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        """Return tables of quality and routing, and of the differences."""
        rows = [group.row for group in self.groups]
        lines = markdown.table(rows, markdown.QUALITY)
        routed = [row for row in rows if row["sparsity"] is not None]
        if routed:
            lines += ["", *markdown.table(routed, markdown.ROUTING)]
        if self.differences:
            text = "Validation loss, first minus second, at equal seed; 95% confidence interval by"
            cells = []
            for d in self.differences:
                interval = "" if d.half_width is None else f" ± {d.half_width:.4f}"
                cells.append((d.first, d.second, d.seeds, f"{d.mean:+.4f}{interval}"))
            titles = ("first", "second", "seeds", "difference")
            lines += ["", f"{text} Student's t:", "", *markdown.lines(titles, cells)]
        return "\n".join(lines)


def compare(runs: list[Run], baseline: Path | None = None) -> RunComparison:
    """Group runs by everything but their seed, and pair the routers.

    Args:
        runs: the runs.
        baseline: one of the runs; other groups with its router are compared with its group as well.

    Raises:
        ValueError: two runs have the same settings and seed, or losses of different tasks, or the
            baseline is none of the runs.
    """
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
    differences = [paired_difference(*pair) for pair in pairs]
    return RunComparison(ordered, [d for d in differences if d is not None])


def _refuse_two_tasks(runs: list[Run]) -> None:
    """Refuse losses of hidden tokens beside losses of next tokens, which are no like quantities."""
    tasks = {bool(run.config.get("masked_lm")): run.path for run in runs}
    if len(tasks) > 1:
        raise ValueError(
            f"{tasks[True]} was trained with masked_lm and {tasks[False]} without, and losses of "
            f"hidden tokens cannot be compared with those of next tokens; compare them apart"
        )


def _order(group: Group) -> tuple[int, list[tuple[bool, float, str]]]:
    """Order groups by router, then by their settings, of which numbers are ordered by size."""

    def key(value: Any) -> tuple[bool, float, str]:
        is_number = isinstance(value, int | float)
        return not is_number, float(value) if is_number else 0.0, str(value)

    return ROUTERS.index(group.router), [key(value) for _, value in group.settings]


def _group_of(groups: list[Group], path: Path) -> Group:
    for group in groups:
        if any(run.path.resolve() == path.resolve() for run in group.runs.values()):
            return group
    raise ValueError(f"the baseline {path} is none of the runs that are compared; pass one of them")


def _settings(run: Run) -> dict[str, Any]:
    """Return the settings that distinguish runs; a granularity that is left out is 1."""
    default = {"moe_granularity": 1} if run.config.get("num_experts") else {}
    return {key: value for key, value in (default | run.config).items() if key not in _PLACES}


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
    common = [key for key in a if key in b and not key.startswith(_ROUTER_SETTINGS)]
    return all(a[key] == b[key] for key in common)
