"""Runs side by side: means over seeds, paired differences between routers, and how they settled."""

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron.remoe.analysis.runs import Run
from megatron.remoe.analysis.size import ModelSize

_LAST_ROWS = 20
_OSCILLATION_ROWS, _OSCILLATION_MEAN = 100, 10
_DEFAULT_SEED = 1234
# In the order of a table, and of a difference: later minus earlier.
ROUTERS = ("dense", "TopK", "TopK with warm-up", "ReMoE")
# Settings in which runs differ without being other experiments.
_PLACES = {
    "run_dir", "nproc", "seed", "metrics_file", "save", "load", "save_interval", "data_cache_path",
    "tensorboard_dir", "wandb_exp_name", "wandb_save_dir", "wandb_project", "wandb_tags",
    "wandb_mode",
}  # fmt: skip
# Settings that make the router, beyond which two routers must agree to be compared.
_ROUTER_SETTINGS = (
    "moe_relu_",
    "moe_topk_warmup_",
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
    """Read run directories, and every run directory directly in a folder that is none itself.

    Raises:
        ValueError: a path without a run.
    """
    runs = []
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder; pass run directories, or folders of them")
        inside = sorted(p for p in path.iterdir() if (p / "metrics.jsonl").is_file())
        if (path / "metrics.jsonl").is_file():
            runs.append(Run.load(path))
        elif inside:
            runs += [Run.load(p) for p in inside]
        else:
            raise ValueError(f"{path} holds no run: there is no metrics.jsonl in it or below it")
    return runs


def router_of(config: dict[str, Any]) -> str:
    """The router of a run, one of `ROUTERS`."""
    if not config.get("num_experts"):
        return "dense"
    if config.get("moe_relu_routing"):
        return "ReMoE"
    return "TopK with warm-up" if config.get("moe_topk_warmup_steps") else "TopK"


def validation_loss(run: Run) -> float:
    """The last overall validation loss; NaN without one, or where it diverged."""
    loss = run.last_evaluation().get("valid")
    return math.nan if loss is None else loss


def steps_to_settle(run: Run) -> int | None:
    """Return the step at which sparsity settles; None if it has not, or without ReLU routing."""
    return run.stages.sparse_from if run.has_relu_routing else None


def oscillation(run: Run) -> float | None:
    """Standard deviation of the sparsity over the last 100 rows, in means of 10.

    A single step's is mostly that of its batch. None for a router without sparsity.
    """
    return _deviation(run, _OSCILLATION_MEAN)


def deviation(run: Run) -> float | None:
    """Standard deviation of the sparsity over the last 100 rows, step by step."""
    return _deviation(run, 1)


def _deviation(run: Run, rows: int) -> float | None:
    """In means of so many rows."""
    values = [row["sparsity"] for row in run.measured[-_OSCILLATION_ROWS:]]
    parts = [values[i : i + rows] for i in range(0, len(values), rows)]
    return statistics.pstdev(map(statistics.fmean, parts)) if parts else None


def accuracy(run: Run) -> float | None:
    """Mean accuracy of the tasks in `evaluation.json`; None without that file or tasks in it.

    A group stands for its tasks, whose names begin with the group's.

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


def _last_mean(run: Run, key: str) -> float | None:
    values = [row[key] for row in run.train[-_LAST_ROWS:] if row.get(key) is not None]
    return statistics.fmean(values) if values else None


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Attributes:
        router: see `router_of`.
        settings: what else distinguishes the group from others of the comparison.
        runs: by seed.
    """

    router: str
    settings: tuple[tuple[str, Any], ...]
    runs: dict[int, Run]

    @property
    def name(self) -> str:
        short = (
            f"{key.removeprefix('moe_').removeprefix('relu_')} "
            f"{'default' if value is None else value}"
            for key, value in self.settings
        )
        return ", ".join([self.router, *short])

    @property
    def any_run(self) -> Run:
        return next(iter(self.runs.values()))

    @property
    def losses(self) -> dict[int, float]:
        return {seed: validation_loss(run) for seed, run in self.runs.items()}

    @property
    def size(self) -> ModelSize | None:
        """Of the model; None where the config does not determine it."""
        try:
            return ModelSize.from_flags(self.any_run.config)
        except ValueError:
            return None

    @cached_property
    def row(self) -> dict[str, Any]:
        """The line of the table, unrounded."""
        runs, losses = list(self.runs.values()), list(self.losses.values())
        settled = [steps_to_settle(run) for run in runs]
        steps = [step for step in settled if step is not None]
        coeffs = [[row["l1_coeff"] for row in run.train if "l1_coeff" in row] for run in runs]
        return {
            "run": self.name,
            "seeds": len(runs),
            "steps": min(run.train[-1]["iteration"] for run in runs),
            "active_params": self.size.active_params if self.size else None,
            "total_params": self.size.total_params if self.size else None,
            "valid_loss_mean": statistics.fmean(losses),
            "valid_loss_std": _stdev(losses),
            "sparsity": _mean(_last_mean(run, "sparsity") for run in runs),
            "settled_runs": len(steps) if self.router == "ReMoE" else None,
            "steps_to_settle": _mean(steps),
            "deviation": _mean(deviation(run) for run in runs),
            "oscillation": _mean(oscillation(run) for run in runs),
            "coeff_peak": _geometric_mean(max(c) for c in coeffs if c),
            "coeff_last": _geometric_mean(c[-1] for c in coeffs if c),
            "dead_experts": _mean(_last_mean(run, "dead_experts") for run in runs),
            "expert_load_max": _mean(_last_mean(run, "expert_load_max") for run in runs),
            "expert_load_cv": _mean(_last_mean(run, "expert_load_cv") for run in runs),
            "tokens_per_second": _mean(_last_mean(run, "tokens_per_second") for run in runs),
            "accuracy": _mean(accuracy(run) for run in runs),
        }


def _stdev(values: list[float]) -> float | None:
    """None of one value; NaN where a value is not finite, on which `statistics` fails."""
    if len(values) < 2:
        return None
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _geometric_mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.geometric_mean(known) if known and min(known) > 0 else None


@dataclass(frozen=True)
class Difference:
    """Validation loss of one group minus another's, at equal seeds.

    Attributes:
        first, second: names of the groups.
        seeds: how many seeds both have.
        mean: of the differences; negative where the first is better.
        half_width: of the 95% confidence interval by Student's t; None with one seed.
    """

    first: str
    second: str
    seeds: int
    mean: float
    half_width: float | None


def paired_difference(first: Group, second: Group) -> Difference | None:
    """None where the groups share no seed."""
    a, b = first.losses, second.losses
    deltas = [a[seed] - b[seed] for seed in a if seed in b]
    if not deltas:
        return None
    deviation, half = _stdev(deltas), None
    if deviation is not None:
        t = _T95[min(len(deltas) - 1, len(_T95)) - 1]
        half = t * deviation / math.sqrt(len(deltas))
    return Difference(first.name, second.name, len(deltas), statistics.fmean(deltas), half)


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, and the differences between routers that are otherwise set alike."""

    groups: list[Group]
    differences: list[Difference]

    def to_csv(self) -> str:
        rows = [group.row for group in self.groups]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        rows = [group.row for group in self.groups]
        lines = _table(rows, _QUALITY)
        routed = [row for row in rows if row["sparsity"] is not None]
        if routed:
            lines += ["", *_table(routed, _ROUTING)]
        if self.differences:
            text = "Validation loss, first minus second, at equal seed; 95% confidence interval by"
            lines += ["", f"{text} Student's t:", ""]
            lines += [_line(("first", "second", "seeds", "difference")), _line(["---"] * 4)]
            for d in self.differences:
                interval = "" if d.half_width is None else f" ± {d.half_width:.4f}"
                lines.append(_line((d.first, d.second, d.seeds, f"{d.mean:+.4f}{interval}")))
        return "\n".join(lines)


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _table(rows: list[dict[str, Any]], columns: dict[str, Callable[..., str]]) -> list[str]:
    """The lines of a table, without columns in which no row has anything."""
    cells = {title: [text(row) for row in rows] for title, text in columns.items()}
    shown = {title: texts for title, texts in cells.items() if any(texts)}
    body = [_line(line) for line in zip(*shown.values(), strict=True)]
    return [_line(shown), _line(["---"] * len(shown)), *body]


def _number(key: str, form: str, scale: float = 1) -> Callable[[dict[str, Any]], str]:
    return lambda row: "" if row[key] is None else format(row[key] * scale, form)


def _loss_text(row: dict[str, Any]) -> str:
    deviation = row["valid_loss_std"]
    text = f"{row['valid_loss_mean']:.4f}"
    return text if deviation is None else f"{text} ± {deviation:.4f}"


def _settled_text(row: dict[str, Any]) -> str:
    text = _number("steps_to_settle", ".0f")(row)
    if row["settled_runs"] is None or row["settled_runs"] == row["seeds"]:
        return text
    return f"{text or '-'} ({row['settled_runs']} of {row['seeds']})"


def _params_text(row: dict[str, Any]) -> str:
    if row["total_params"] is None:
        return ""
    return f"{row['active_params'] / 1e6:.2f}M / {row['total_params'] / 1e6:.2f}M"


_QUALITY = {
    "run": lambda row: row["run"],
    "seeds": _number("seeds", "d"),
    "steps": _number("steps", "d"),
    "active / total parameters": _params_text,
    "validation loss": _loss_text,
    "accuracy, %": _number("accuracy", ".2f", scale=100),
    "tokens/s": _number("tokens_per_second", ".0f"),
}
_ROUTING = {
    "run": lambda row: row["run"],
    "sparsity": _number("sparsity", ".4f"),
    "settles at step": _settled_text,
    "deviation of a step": _number("deviation", ".4f"),
    "of means of 10": _number("oscillation", ".4f"),
    "coefficient, highest": _number("coeff_peak", ".1e"),
    "coefficient, last": _number("coeff_last", ".1e"),
    "dead experts": _number("dead_experts", ".1f"),
    "most loaded / mean": _number("expert_load_max", ".2f"),
    "variation of load": _number("expert_load_cv", ".3f"),
}


def compare(runs: list[Run], baseline: Path | None = None) -> Comparison:
    """Group runs by everything but their seed, and pair the routers.

    Args:
        baseline: one of the runs, with whose group others of its router are compared as well.

    Raises:
        ValueError: two runs with the same settings and seed, or a baseline that is none of them.
    """
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
    differences = []
    for index, second in enumerate(ordered):
        for first in ordered[index + 1 :]:
            if first.router != second.router and _comparable(first, second):
                differences.append(paired_difference(first, second))
    if baseline is not None:
        base = _group_of(ordered, baseline)
        others = (g for g in ordered if g.router == base.router and g is not base)
        differences += [paired_difference(group, base) for group in others]
    return Comparison(ordered, [d for d in differences if d is not None])


def _order(group: Group) -> tuple[int, list[tuple[bool, float, str]]]:
    """Routers in their order, then settings, numbers by size."""

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
    """What tells runs apart; a granularity that is left out is 1."""
    default = {"moe_granularity": 1} if run.config.get("num_experts") else {}
    return {key: value for key, value in (default | run.config).items() if key not in _PLACES}


def _varying(run: Run, alike: list[Run]) -> tuple[tuple[str, Any], ...]:
    """The settings of a run in which runs of its router differ."""
    own, others = _settings(run), [_settings(r) for r in alike]
    keys = dict.fromkeys(key for other in others for key in other)
    return tuple(
        (key, own.get(key)) for key in keys if any(o.get(key) != own.get(key) for o in others)
    )


def _comparable(first: Group, second: Group) -> bool:
    """Whether two routers are set alike in all that both have and that is not the router's."""
    a, b = _settings(first.any_run), _settings(second.any_run)
    common = [key for key in a if key in b and not key.startswith(_ROUTER_SETTINGS)]
    return all(a[key] == b[key] for key in common)
