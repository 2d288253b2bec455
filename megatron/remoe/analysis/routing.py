"""How trained models route: rows of measures by layer, by model, and by runs of several seeds.

They are computed from the records of models. The measures are those of `remoe.analysis`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from megatron.remoe.analysis import markdown
from megatron.remoe.analysis.compare import compare, load_runs
from megatron.remoe.analysis.measures import deviation_of, mean_of
from megatron.remoe.analysis.trace import LayerTrace, Trace
from remoe import analysis

Row = dict[str, Any]
FREQUENCY_CLASSES = 4


@dataclass(frozen=True)
class RoutingReport:
    """The measures of one model.

    Attributes:
        model: the model as it was named.
        router, topk: those of its `Facts`.
        tokens: the number of tokens, each of which every layer routes.
        layers: a row for each layer with experts.
        summary: the row of the whole model.
    """

    model: Path
    router: str
    topk: int
    tokens: int
    layers: list[Row]
    summary: Row

    def to_json(self) -> Row:
        """Return all of it in types that JSON has."""
        return vars(self) | {"model": str(self.model)}


def balance(trace: Trace, seed: int) -> list[Row]:
    """Measure the gates of a model: a row for each layer with experts, and one for all of them.

    A row has these numbers, which are None where they have no meaning:

    - `active_experts`, the mean per token, and `two_active`, the share of tokens with two or more;
    - `inner_balance`, the median of the largest score divided by the second largest, over the
      tokens that have two; `outer_balance` and `outer_balance_mean`, the median and the mean of the
      share that the k largest scores have;
    - `information`, the mutual information between the leading experts of this layer and of the
      next one with experts, and `expert_information`, the mean over tokens of the published
      number, both in nats; with `_shuffled`, the same after the next layer's tokens are shuffled.

    In the last row, medians and means are over the tokens of all layers, and both kinds of mutual
    information are means over pairs of layers.

    Args:
        trace: the record of what the model did.
        seed: the seed of the shuffled order.
    """
    topk, layers = trace.facts.topk, list(trace.layers.values())
    between = [_between(first, second, seed) for first, second in pairwise(layers)]
    rows = [
        {"layer": number} | _balance([layer], topk) | information
        for (number, layer), information in zip(
            trace.layers.items(), [*between, dict.fromkeys(_BETWEEN)], strict=True
        )
    ]
    return [*rows, {"layer": "all"} | _balance(layers, topk) | _mean_rows(between, _BETWEEN)]


def report(model: Path, trace: Trace, rows: list[Row]) -> RoutingReport:
    """Return the measures of a model, whose summary has two more means of active experts.

    - `active_frequency_1` to `active_frequency_4` are over the tokens of a quarter of the text,
      from the rarest ids to the most frequent ones;
    - `active_domain_<name>` is over the tokens of a domain.

    Args:
        model: the model as it was named.
        trace: the record of what it did.
        rows: its rows of `balance`.
    """
    *layers, summary = rows
    facts = trace.facts
    summary = summary | _active_by_token(trace)
    return RoutingReport(model, facts.router, facts.topk, len(trace.tokens), layers, summary)


def _balance(layers: list[LayerTrace], topk: int) -> Row:
    """Return the numbers about the tokens of some layers."""
    active_T = torch.cat([layer.counts() for layer in layers]).double()
    inner = torch.cat([analysis.inner_balance(layer.ranked()) for layer in layers])
    outer = torch.cat([analysis.outer_balance(layer.ranked(), topk) for layer in layers])
    return {
        "active_experts": active_T.mean().item(),
        "two_active": (active_T >= 2).double().mean().item(),
        "inner_balance": inner.median().item() if len(inner) else None,
        "outer_balance": outer.median().item() if len(outer) else None,
        "outer_balance_mean": outer.mean().item() if len(outer) else None,
    }


def _active_by_token(trace: Trace) -> Row:
    """Return the mean number of active experts of a layer for some tokens, or None for none."""
    active_LT = torch.stack([layer.counts() for layer in trace.layers.values()])
    active_T = active_LT.double().mean(dim=0)
    classes_T = analysis.frequency_classes(trace.tokens, FREQUENCY_CLASSES)
    kinds = {f"active_frequency_{c + 1}": classes_T == c for c in range(FREQUENCY_CLASSES)}
    for number, name in enumerate(trace.facts.domains):
        kinds[f"active_domain_{name}"] = trace.domains == number
    return {key: active_T[of].mean().item() if of.any() else None for key, of in kinds.items()}


_BETWEEN = (
    "information", "information_shuffled", "expert_information", "expert_information_shuffled"
)  # fmt: skip


def _between(first: LayerTrace, second: LayerTrace, seed: int) -> Row:
    """Return the numbers about two layers, whose keys are `_BETWEEN`."""
    choices, ranked = first.num_experts + 1, first.ranked()
    leading = analysis.leading_expert(ranked)
    row = {}
    shuffled = analysis.shuffle(second.ranked(), seed)
    for end, scores in (("", second.ranked()), ("_shuffled", shuffled)):
        counts = analysis.joint_counts(leading, analysis.leading_expert(scores), choices)
        row[f"information{end}"] = analysis.mutual_information(counts)
        within = analysis.expert_information(ranked, scores)
        row[f"expert_information{end}"] = within.mean().item()
    return row


def _mean_rows(rows: list[Row], keys: Iterable[str]) -> Row:
    """Return the mean of each key over the rows that have it; None if none has."""
    return {key: mean_of(row[key] for row in rows) for key in keys}


def models_by_seed(models: Iterable[Path]) -> dict[str, dict[int, Path]]:
    """Return the models by the name of their row: runs that differ in their seed only are one row.

    Names of runs are those of `remoe compare`. A model that is no run is a row of its own, of one
    seed, 0, and named as it is given.

    Raises:
        ValueError: two runs have the same settings and seed, or a run has a damaged file.
    """
    runs = [path for path in models if (path / "metrics.jsonl").is_file()]
    groups = compare(load_runs(runs)).groups if runs else []
    rows = {group.name: {seed: run.path for seed, run in group.runs.items()} for group in groups}
    return rows | {str(path): {0: path} for path in models if path not in runs}


def group_models(models: Iterable[Path]) -> dict[str, list[Path]]:
    """Return the models by the name of their row (`models_by_seed`), without their seeds."""
    return {name: list(found.values()) for name, found in models_by_seed(models).items()}


def summarize(groups: Mapping[str, list[Path]], reports: list[RoutingReport]) -> list[Row]:
    """Return a row for each group: means over its models, and their deviations (`_std`).

    Args:
        groups: the models by the name of their row.
        reports: the reports of all of them.
    """
    by_model = {found.model: found.summary for found in reports}
    rows = []
    for name, models in groups.items():
        summaries = [by_model[model] for model in models]
        keys = [key for key in summaries[0] if key != "layer"]
        row = {"run": name, "seeds": len(models)} | _mean_rows(summaries, keys)
        for key in keys:
            values = [s[key] for s in summaries if s[key] is not None]
            row[f"{key}_std"] = deviation_of(values)
        rows.append(row)
    return rows


def to_markdown(rows: list[Row]) -> str:
    """Return the tables of the rows of `summarize`: measures, and active experts by token."""
    by_token = markdown.active_by_token(rows, FREQUENCY_CLASSES)
    tables = (markdown.table(rows, columns) for columns in (markdown.GATES_OF_RUNS, by_token))
    return "\n\n".join("\n".join(lines) for lines in tables)
