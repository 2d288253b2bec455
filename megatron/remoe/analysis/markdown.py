"""Tables of runs and of their comparison, in Markdown."""

from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]
Columns = dict[str, Callable[[Row], str]]


def table(rows: list[Row], columns: Columns) -> list[str]:
    """Return the lines of a table, without the columns in which no row has a text."""
    shown = texts(rows, columns)
    return lines(shown, zip(*shown.values(), strict=True))


def texts(rows: list[Row], columns: Columns) -> dict[str, list[str]]:
    """Return the texts of each column by its title, without the columns in which no row has one."""
    cells = {title: [text(row) for row in rows] for title, text in columns.items()}
    return {title: column for title, column in cells.items() if any(column)}


def lines(titles: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return the lines of a table with these titles and rows of cells."""
    titles = list(titles)
    return [
        "| " + " | ".join(map(str, cells)) + " |"
        for cells in (titles, ["---"] * len(titles), *rows)
    ]


def _number(key: str, form: str, scale: float = 1) -> Callable[[Row], str]:
    return lambda row: "" if row[key] is None else format(row[key] * scale, form)


def _loss(row: Row) -> str:
    deviation = row["valid_loss_std"]
    text = f"{row['valid_loss_mean']:.4f}"
    return text if deviation is None else f"{text} ± {deviation:.4f}"


def _mean(key: str) -> Callable[[Row], str]:
    """Return the text of a mean over seeds, with the deviation if there is one."""

    def text(row: Row) -> str:
        if row[key] is None:
            return ""
        deviation = row.get(f"{key}_std")
        return f"{row[key]:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")

    return text


def _settled(row: Row) -> str:
    text = _number("steps_to_settle", ".0f")(row)
    if row["settled_runs"] is None or row["settled_runs"] == row["seeds"]:
        return text
    return f"{text or '-'} ({row['settled_runs']} of {row['seeds']})"


def _params(row: Row) -> str:
    if row["total_params"] is None:
        return ""
    return f"{row['active_params'] / 1e6:.2f}M / {row['total_params'] / 1e6:.2f}M"


def _dead(row: Row) -> str:
    text = _number("dead_experts", ".1f")(row)
    return f"{text} of {row['experts']}" if text and row["experts"] else text


def _ranks(row: Row) -> str:
    return "" if row["busiest_rank_load"] is None else _number("expert_ranks", "d")(row)


def _run(row: Row) -> str:
    return str(row["run"])


QUALITY = {
    "run": _run,
    "seeds": _number("seeds", "d"),
    "steps": _number("steps", "d"),
    "active / total parameters": _params,
    "validation loss": _loss,
    "accuracy, %": _number("accuracy", ".2f", scale=100),
}
ROUTING = {
    "run": _run,
    "active experts, all steps": _number("active_all_steps", ".3f"),
    "sparsity": _number("sparsity", ".4f"),
    "settles at step": _settled,
    "deviation of a step": _number("deviation", ".4f"),
    "of means of 10": _number("oscillation", ".4f"),
    "coefficient, highest": _number("coeff_peak", ".1e"),
    "coefficient, last": _number("coeff_last", ".1e"),
}
LOAD = {
    "run": _run,
    "dead experts": _dead,
    "busiest expert / mean": _number("expert_load_max", ".2f"),
    "variation of load": _number("expert_load_cv", ".3f"),
    "EP": _ranks,
    "busiest rank / mean": _number("busiest_rank_load", ".2f"),
    "step time / even": _number("step_time", ".3f"),
}
GATES: Columns = {
    "active": _mean("active_experts"),
    "two or more": _mean("two_active"),
    "top1 / top2": _mean("inner_balance"),
    "top-k mass": _mean("outer_balance"),
    "mean mass": _mean("outer_balance_mean"),
    "MI": _mean("information"),
    "MI control": _mean("information_shuffled"),
    "token MI": _mean("expert_information"),
    "token MI control": _mean("expert_information_shuffled"),
}
GATES_OF_LAYERS: Columns = {"layer": lambda row: str(row["layer"])} | GATES
GATES_OF_RUNS: Columns = {"run": _run, "seeds": _number("seeds", "d")} | GATES


def active_by_token(rows: list[Row], num_classes: int) -> Columns:
    """Return the columns of active experts by frequency class and by domain."""
    names = ["rarest quarter", *map(str, range(2, num_classes)), "most frequent quarter"]
    columns: Columns = {"active experts": _run}
    for number, name in enumerate(names, start=1):
        columns[name] = _mean(f"active_frequency_{number}")
    prefix = "active_domain_"
    keys = (key for key in rows[0] if key.startswith(prefix) and f"{key}_std" in rows[0])
    return columns | {key.removeprefix(prefix): _mean(key) for key in keys}
