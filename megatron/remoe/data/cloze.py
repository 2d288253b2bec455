"""Make a cloze task from a corpus for lm-evaluation-harness, without any network.

Each item is a passage of a held-out document with four continuations: its own, and three of equal
length in words from other documents of the domain. The output is a folder of tasks that the harness
reads, so that its own command can run them too.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from megatron.remoe.data.jsonl import SUFFIXES, parse_text, read_chunks
from megatron.remoe.files import output_folder, scratch_folder

GROUP = "corpus_cloze"
_WRONG = 3
_WORD = re.compile(r"\s*\S+")  # with the space before it, so that words join to the text


@dataclass(frozen=True)
class ClozeConfig:
    """Number of items per domain, number of words of their parts, and the seed."""

    items: int = 200
    context_words: int = 48
    continuation_words: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("items", "context_words", "continuation_words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def write_cloze(corpus: Path, out: Path, config: ClozeConfig) -> dict[str, int]:
    """Write the tasks `corpus_cloze_<domain>` and their group; return the items of each domain.

    Args:
        corpus: output of `remoe data corpus`, or a folder of .jsonl files, one per domain.
        out: folder for the tasks; the tasks of an earlier call are replaced.
        config: numbers of items and words.

    Raises:
        ValueError: there are no documents, or too few that are long enough.
    """
    folder = corpus / "valid" if (corpus / "valid").is_dir() else corpus
    files = sorted(p for p in folder.glob("*.jsonl*") if p.name.endswith(SUFFIXES))
    if not files:
        raise ValueError(f"{folder} holds no .jsonl files; name a corpus (remoe data corpus)")
    items = {p.name.split(".")[0]: _items(p, config) for p in files}
    with output_folder(out), scratch_folder(out) as scratch:
        for domain, rows in items.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (scratch / f"{GROUP}_{domain}.jsonl").write_text(lines, encoding="utf-8")
            task = _task(domain, out.absolute() / f"{GROUP}_{domain}.jsonl")
            (scratch / f"{GROUP}_{domain}.yaml").write_text(OmegaConf.to_yaml(task))
        (scratch / f"{GROUP}.yaml").write_text(OmegaConf.to_yaml(_group(list(items))))
        for path in scratch.iterdir():
            path.replace(out / path.name)
    return {domain: len(rows) for domain, rows in items.items()}


def _items(path: Path, config: ClozeConfig) -> list[dict[str, Any]]:
    """Return the items of one domain, from its documents in turn and random passages of them."""
    need = config.context_words + config.continuation_words
    documents = [
        words
        for chunk in read_chunks(path, lambda _: None)
        for number, line in enumerate(chunk.lines, chunk.first_line)
        if line.strip() and len(words := _WORD.findall(_text(path, number, line))) >= need
    ]
    if len(documents) <= _WRONG:
        raise ValueError(
            f"{path} has {len(documents)} documents of at least {need} words, and a task needs "
            f"{_WRONG + 1}; ask for fewer words (--context-words), or name a larger corpus"
        )
    draw = random.Random(f"{config.seed} {path.name}")
    items = []
    for number in range(config.items):
        index = number % len(documents)
        words = documents[index]
        start = draw.randrange(len(words) - need + 1)
        middle, end = start + config.context_words, start + need
        others = draw.sample([i for i in range(len(documents)) if i != index], _WRONG)
        wrong = [_span(documents[i], config.continuation_words, draw) for i in others]
        label = draw.randrange(_WRONG + 1)
        choices = [*wrong[:label], "".join(words[middle:end]), *wrong[label:]]
        context = "".join(words[start:middle]).lstrip()
        items.append({"context": context, "choices": choices, "label": label})
    return items


def _text(path: Path, number: int, line: bytes) -> str:
    try:
        return parse_text(line, "text")
    except ValueError as error:
        raise ValueError(f"{path}:{number}: {error}; fix the line") from error


def _span(words: list[str], length: int, draw: random.Random) -> str:
    start = draw.randrange(1, len(words) - length + 1)  # the first word has no space before it
    return "".join(words[start : start + length])


def _metrics(**fields: Any) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean"} | fields for name in ("acc", "acc_norm")]


def _task(domain: str, data: Path) -> dict[str, Any]:
    return {
        "task": f"{GROUP}_{domain}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": _metrics(higher_is_better=True),
        "metadata": {"version": 1.0},
    }


def _group(domains: list[str]) -> dict[str, Any]:
    return {
        "group": GROUP,
        "task": [f"{GROUP}_{domain}" for domain in domains],
        "aggregate_metric_list": _metrics(weight_by_size=True),
        "metadata": {"version": 1.0},
    }
