"""The files of a run directory: `config.yaml` and `metrics.jsonl`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron.remoe.files import parse_json
from remoe.statistics import settling_index


@dataclass(frozen=True)
class Stages:
    """The boundaries between the stages of a ReMoE run (arXiv 2412.14711, section 3.5).

    Attributes:
        dense_until: last iteration of the dense warm-up, in which more than half of all (token,
            expert) pairs are active; 0 if there is none.
        sparse_from: iteration at which sparsity settles at its target (`settling_index`); None if
            it has not settled.
    """

    dense_until: int
    sparse_from: int | None


@dataclass(frozen=True)
class StageCost:
    """The time and memory that a stage took.

    Attributes:
        name: the name of the stage.
        first, last: the first and the last iteration of the stage.
        seconds: the time without evaluations and checkpoints.
        share: the share of this time in that of all stages.
        peak_memory: bytes on the last rank; None in runs that did not record it.
    """

    name: str
    first: int
    last: int
    seconds: float
    share: float
    peak_memory: int | None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a `metrics.jsonl`; a last line that is not complete is left out.

    Raises:
        ValueError: another line is damaged; the message names it.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if line.endswith(b"\n"):
            try:
                rows.append(parse_row(line))
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: {error}; delete the line, or restore the file"
                ) from None
    return rows


def parse_row(line: str | bytes) -> dict[str, Any]:
    """Parse a line of `metrics.jsonl`.

    Raises:
        ValueError: the line is neither a step nor an evaluation.
    """
    try:
        row = parse_json(line.encode() if isinstance(line, str) else line)
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"it is not JSON ({error})") from None
    is_row = isinstance(row, dict) and isinstance(row.get("iteration"), int)
    if not is_row or not isinstance(row.get("split", ""), str):
        raise ValueError("it is neither a step nor an evaluation")
    found: dict[str, Any] = {"lm_loss": "missing"} | row
    for name in ("lm_loss", "sparsity"):
        if not isinstance(found.get(name), int | float | None):
            raise ValueError(f"its {name} is no number")
    return found


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not YAML ({reason}); restore the file") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} does not map flags to values; restore the file")
    return config


@dataclass(frozen=True)
class Run:
    """The config and the metrics that a run has written.

    Attributes:
        path: the run directory.
        config: the resolved config.
        train: the rows of `metrics.jsonl` that are training steps.
        evaluations: the rows that are evaluations, with `split`.
    """

    path: Path
    config: dict[str, Any]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Read a run directory; a last line that is cut off is left out.

        Raises:
            ValueError: the folder is not a run directory, has no step yet, or has a damaged file.
        """
        for name in ("config.yaml", "metrics.jsonl"):
            if not (path / name).is_file():
                raise ValueError(f"{path} is not a run directory: it has no {name}")
        rows = read_rows(path / "metrics.jsonl")
        train = [row for row in rows if "split" not in row]
        if not train:
            raise ValueError(f"{path} has no training step yet; wait for the first, or start it")
        config = _read_config(path / "config.yaml")
        return cls(path, config, train, [row for row in rows if "split" in row])

    def series(self, key: str) -> list[Any]:
        """Return one quantity of all training rows."""
        return [row[key] for row in self.train]

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The training rows that have a sparsity: a batch of padding alone has none (null)."""
        return [row for row in self.train if row.get("sparsity") is not None]

    @property
    def has_relu_routing(self) -> bool:
        """Whether the run has routers with a ReLU."""
        return "l1_coeff" in self.train[0]

    @property
    def target_sparsity(self) -> float:
        """The target sparsity `1 - k/E`, which granularity does not change."""
        return 1 - float(self.config["moe_router_topk"]) / float(self.config["num_experts"])

    @property
    def stages(self) -> Stages:
        """The stages, in logged rows: they are exact in a run that logs every step."""
        rows, target = self.measured, self.target_sparsity
        sparsities = [row["sparsity"] for row in rows]
        settled = settling_index(sparsities, target)
        reached = next((i for i, value in enumerate(sparsities) if value >= target), len(rows))
        early = rows[: reached if settled is None else min(reached, settled)]
        dense = [row["iteration"] for row in early if row["sparsity"] < 0.5]
        return Stages(
            dense_until=int(dense[-1]) if dense else 0,
            sparse_from=None if settled is None else int(rows[settled]["iteration"]),
        )

    @property
    def stage_costs(self) -> list[StageCost]:
        """The time and memory of the stages so far (arXiv 2412.14711, appendix D)."""
        stages, last = self.stages, int(self.train[-1]["iteration"])
        sparse_from = stages.sparse_from or last + 1
        dense_until = min(stages.dense_until, sparse_from - 1)
        spans = [
            ("dense warm-up", 1, dense_until),
            ("sparsifying", dense_until + 1, sparse_from - 1),
            ("stable", sparse_from, last),
        ]
        seconds, tokens = {}, 0
        for row in self.train:
            seconds[int(row["iteration"])] = (row["tokens"] - tokens) / row["tokens_per_second"]
            tokens = row["tokens"]
        total, costs = sum(seconds.values()), []
        for name, first, end in spans:
            rows = [row for row in self.train if first <= row["iteration"] <= end]
            if rows:
                spent = sum(seconds[int(row["iteration"])] for row in rows)
                peaks = [row["peak_memory"] for row in rows if "peak_memory" in row]
                peak = max(peaks) if peaks else None
                costs.append(StageCost(name, first, end, spent, spent / total, peak))
        return costs

    @property
    def early_overhead(self) -> float | None:
        """The extra time of the run over the speed of its stable stage, as a fraction.

        It is None for a run that has not reached this stage.
        """
        costs = self.stage_costs
        if not costs or costs[-1].name != "stable":
            return None
        stable = costs[-1]
        step = stable.seconds / (stable.last - stable.first + 1)
        return sum(cost.seconds for cost in costs) / (step * stable.last) - 1

    def last_evaluation(self) -> dict[str, float]:
        """Return the loss of every split at the last iteration that was evaluated."""
        if not self.evaluations:
            return {}
        last = self.evaluations[-1]["iteration"]
        rows = [row for row in self.evaluations if row["iteration"] == last]
        return {row["split"]: row["lm_loss"] for row in rows}
