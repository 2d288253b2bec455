"""The report as one HTML file, in which everything that it needs is contained.

Plotly's script, which draws the figures, and their numbers are compressed; the browser inflates
them. A policy in the page lets the browser run this script and that of the report alone, known by
their hashes, and load nothing from elsewhere.
"""

import base64
import functools
import gzip
import hashlib
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from megatron.remoe.analysis.report import experts, summary, text, tokens, training
from megatron.remoe.analysis.report.drawing import Figure, joined, rounded, template, to_csv
from megatron.remoe.analysis.report.subject import Subject
from megatron.remoe.files import write_whole

LIMIT = 5_000_000  # bytes of a report
_MARK = '<meta name="generator" content="remoe report">'


def write(subjects: Sequence[Subject], out: Path) -> None:
    """Write the report of some models; an older report is replaced.

    Raises:
        ValueError: something else is at `out`, or the report is too large.
    """
    check_output(out)
    page = render(subjects, out)
    if (size := len(page.encode())) >= LIMIT:
        raise ValueError(
            f"the report of {len(subjects)} models has {size / 1e6:.1f} MB, more than "
            f"{LIMIT / 1e6:.0f}; name fewer of them"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, page)


def check_output(out: Path) -> None:
    """Raise `ValueError` if there is something else than an older report at `out`."""
    if out.is_dir():
        raise ValueError(f"{out} is a folder; name a file (--out)")
    if out.exists():
        with out.open("rb") as file:
            if _MARK.encode() not in file.read(2000):
                raise ValueError(f"{out} exists and is no report; remove it or choose another file")


def render(subjects: Sequence[Subject], out: Path) -> str:
    """Return the page.

    Args:
        subjects: the models, side by side.
        out: where the page will be, from which its links to files lead.
    """
    chapters = _chapters(subjects)
    samples = text.samples(subjects)
    stage_rows, stage_cells = summary.stages(subjects)
    figures = [figure for _, _, group in chapters for figure in group]
    tables = {figure.name: to_csv(figure.rows) for figure in figures if figure.rows}
    words = summary.vocabulary(subjects)
    others = {"stages": stage_rows, "vocabulary": words, "balance": joined(subjects, "balance")}
    tables |= {name: to_csv(rows) for name, rows in others.items() if rows}
    plots = {
        f"{figure.name}-{place}": _compact(panel.drawn.to_plotly_json())
        for figure in figures
        for place, panel in enumerate(figure.panels)
    }
    data = {
        "plots": plots,
        "tables": tables,
        "texts": [one.to_json() for one in samples],
        "templates": {"light": template(dark=False), "dark": template(dark=True)},
    }
    script, own = get_plotlyjs(), _resource("page.js")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = summary.visible
    hashes = " ".join(f"'sha256-{_hash(one)}'" for one in (own, script))
    return environment.from_string(_resource("page.html")).render(
        mark=Markup(_MARK),
        policy=f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'",
        style=Markup(_resource("page.css")),
        script=Markup(own),
        plotly=_deflated(script),
        data=_deflated(json.dumps(data, separators=(",", ":"), allow_nan=False)),
        subjects=subjects,
        cards=[summary.cards(one) for one in subjects],
        summary=summary.summary(subjects),
        config=_configs(subjects),
        chapters=chapters,
        samples=samples,
        layers=_layers(subjects),
        stages=(summary.STAGES, stage_cells),
        loads=(summary.LOADS, summary.loads(subjects)),
        balance=(summary.BALANCE, summary.balance(subjects)),
        words=summary.words(words),
        links=_links(subjects, figures, out),
        show=_shown,
    )


def _chapters(subjects: Sequence[Subject]) -> list[tuple[str, str, list[Figure]]]:
    """Return the figures by chapter: the chapter's id, its title and its figures."""
    return [
        ("training", "Training", training.figures(subjects)),
        (
            "tokens",
            "Which tokens get many experts",
            [
                tokens.histogram(subjects),
                tokens.by_frequency(subjects),
                tokens.by_loss(subjects),
                tokens.by_word_part(subjects),
                tokens.by_domain(subjects),
                tokens.by_position(subjects),
            ],
        ),
        (
            "experts",
            "What the experts are for",
            [
                experts.by_domain(subjects),
                experts.specialization(subjects),
                experts.between_layers(subjects),
                experts.coactivation(subjects),
                experts.flips(subjects),
            ],
        ),
        (
            "cost",
            "Load, and what experts are worth",
            [
                experts.load(subjects),
                experts.load_time(subjects),
                tokens.pruning(subjects),
                tokens.budget(subjects),
            ],
        ),
    ]


def _compact(plot: dict[str, Any]) -> dict[str, Any]:
    """Return a figure with short numbers, without the template, which the browser adds."""
    layout = {key: value for key, value in plot["layout"].items() if key != "template"}
    short: dict[str, Any] = rounded({"data": plot["data"], "layout": layout})
    return short


def _layers(subjects: Sequence[Subject]) -> list[int]:
    return sorted({layer for one in subjects for layer in one.trace.layers})


def _shown(layers: Sequence[str]) -> bool:
    """Return whether something of these layers is shown before a layer is chosen."""
    return not layers or "all" in layers


def _configs(subjects: Sequence[Subject]) -> list[tuple[str, list[str], bool]]:
    """Return the flags of all runs: name, values, and whether they differ; these come first."""
    configs = [one.run.config if one.run else {} for one in subjects]
    rows = []
    for key in dict.fromkeys(key for config in configs for key in config):
        values = ["" if config.get(key) is None else _flag(config[key]) for config in configs]
        rows.append((key, values, len(set(values)) > 1))
    return sorted(rows, key=lambda row: not row[2])


def _flag(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _links(
    subjects: Sequence[Subject], figures: Sequence[Figure], out: Path
) -> dict[str, list[tuple[str, str]]]:
    """Return the files behind each figure and the folders of analyses: names and addresses."""

    def address(path: Path) -> str:
        relative = os.path.relpath(path.resolve(), out.resolve().parent)
        return jinja2.filters.do_urlencode(Path(relative).as_posix())

    links = {"": [(one.name, address(one.folder) + "/") for one in subjects]}
    for figure in figures:
        found = []
        for one in subjects:
            path = one.folder / "answers" / f"{figure.name}.csv"
            if figure.name in ("loss", "sparsity", "coefficient") and one.run:
                path = one.run.path / "metrics.jsonl"
            if path.is_file():
                found.append((one.name, address(path)))
        links[figure.name] = found
    return links


def _resource(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@functools.cache
def _deflated(content: str) -> str:
    return base64.b64encode(gzip.compress(content.encode(), 9, mtime=0)).decode()
