"""The report of `remoe verify gpu`, in Markdown and in JSON, written after every stage."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron.remoe.analysis.markdown import lines
from megatron.remoe.files import write_whole

Row = dict[str, Any]
Status = Literal["waiting", "passed", "failed", "left out"]


@dataclass(frozen=True)
class Found:
    """What was read out of the results of a stage.

    Attributes:
        headline: The result in a line.
        rows: The rows of a table, by the titles of their columns.
        problem: Why the result is not as it must be; empty if it is.
        text: Some output that is shown as it is.
    """

    headline: str
    rows: list[Row] = field(default_factory=list)
    problem: str = ""
    text: str = ""


@dataclass
class Entry:
    """A stage in the report.

    Attributes:
        name: The name of the stage.
        commands: Its command lines.
        status: What has become of it so far.
        seconds: How long it took.
        reason: Why it failed or was left out.
        found: What was read out of its results, if anything was.
    """

    name: str
    commands: list[str]
    status: Status = "waiting"
    seconds: float = 0.0
    reason: str = ""
    found: Found | None = None

    @property
    def summary(self) -> str:
        """The reason if there is one, or else the headline."""
        return self.reason or (self.found.headline if self.found else "")


@dataclass
class Report:
    """All stages, and where the report is written: `report.md` and `report.json` in a folder."""

    folder: Path
    facts: dict[str, str]
    entries: list[Entry]

    def write(self) -> None:
        """Write both files, each in one step, so that a reader sees the old or the new one."""
        write_whole(self.folder / "report.md", self.to_markdown())
        write_whole(self.folder / "report.json", self.to_json())

    def to_json(self) -> str:
        """Return the report as a JSON object."""
        stages = [
            {
                "name": entry.name,
                "status": entry.status,
                "seconds": round(entry.seconds, 1),
                "reason": entry.reason,
                "headline": entry.found.headline if entry.found else "",
                "rows": entry.found.rows if entry.found else [],
                "commands": entry.commands,
            }
            for entry in self.entries
        ]
        return json.dumps(self.facts | {"stages": stages}, indent=1) + "\n"

    def to_markdown(self) -> str:
        """Return the report as text: a table of all stages, and a section for each."""
        facts = [f"- {name}: {value}" for name, value in self.facts.items()]
        table = lines(
            ("stage", "result", "seconds", ""),
            (
                (e.name, e.status, f"{e.seconds:.0f}" if e.seconds else "", _cell(e.summary))
                for e in self.entries
            ),
        )
        sections = [line for entry in self.entries for line in _section(entry)]
        return "\n".join(["# `remoe verify gpu`", "", *facts, "", *table, *sections]) + "\n"


def _section(entry: Entry) -> list[str]:
    text = ["", f"## {entry.name}", ""]
    if entry.commands:
        text += ["```sh", *entry.commands, "```", ""]
    text += [f"{entry.status}{f': {entry.reason}' if entry.reason else ''}"]
    if found := entry.found:
        text += ["", found.headline]
        if found.rows:
            titles = list(dict.fromkeys(title for row in found.rows for title in row))
            cells = ([_cell(_text(row.get(title, ""))) for title in titles] for row in found.rows)
            text += ["", *lines(titles, cells)]
        if found.text:
            text += ["", "```text", found.text, "```"]
    return text


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
