"""The analysis of a model: a folder with the records of its checkpoints and what follows from them.

Data flows one way: the model writes records and the cost of interventions, and everything else is
computed from these files. An analysis that is interrupted goes on.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron.remoe.analysis import trace
from megatron.remoe.analysis.answers import FILE as ANSWERS
from megatron.remoe.analysis.answers import FOLDER as TABLES
from megatron.remoe.analysis.answers import answers, write_answers
from megatron.remoe.analysis.trace import Facts
from megatron.remoe.convert.export import Progress
from megatron.remoe.convert.exported import check_vocabulary
from megatron.remoe.convert.source import find_checkpoints
from megatron.remoe.evaluate import interventions, routing
from megatron.remoe.evaluate.models import Opened, open_model
from megatron.remoe.evaluate.perplexity import default_length
from megatron.remoe.evaluate.text import Text, domains_of, read_text
from megatron.remoe.files import output_folder, parse_json, write_whole

TRACES, INTERVENTIONS = "traces", "interventions.json"
_OWN = {TRACES, INTERVENTIONS, ANSWERS, TABLES}
SUMMARY = "routing.json"  # of all models
_OF_RUN = "analysis"


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        data: a folder of token files; None stands for the validation files of each run.
        tokens: the largest number of tokens, in whole sequences of all domains in turn.
        sequence_length: the length of the sequences; None is that of the run, or else the number of
            positions of the model.
        seed: the seed of the order of documents, and of shuffled controls.
        checkpoints: the largest number of checkpoints of a run, with the last one.
        dtype: the type of weights and activations.
        tokenizer: a tokenizer to use in place of the model's own.
    """

    data: Path | None = None
    tokens: int = 32768
    sequence_length: int | None = None
    seed: int = 1234
    checkpoints: int = 4
    dtype: torch.dtype = torch.float32
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Job:
    """The analysis of one model.

    Attributes:
        path: the model as it was named.
        folder: the folder of the analysis.
        opened: the checkpoints in their order, or the only model.
        facts: those of each record, by the name of the record.
        text: what is read.
        settings: those of all models.
    """

    path: Path
    folder: Path
    opened: list[Opened]
    facts: dict[str, Facts]
    text: Text
    settings: Settings

    @property
    def last(self) -> Path:
        """The folder of the record of the last checkpoint."""
        return self.folder / TRACES / list(self.facts)[-1]

    @property
    def is_finished(self) -> bool:
        """Whether everything is there."""
        return (self.folder / ANSWERS).is_file()


def prepare(path: Path, settings: Settings, out: Path | None, *, force: bool = False) -> Job:
    """Check everything that can be checked before a model is loaded.

    Args:
        path: a run directory, a folder of checkpoints, a checkpoint or a Hugging Face folder.
        settings: what to run.
        out: the folder in which the analysis of a model that is no run gets a folder of its own.
        force: whether another analysis in its place does not matter.

    Raises:
        ValueError: there is no model that can be analyzed, no text of several domains, or something
            else in the place of the analysis.
    """
    opened = [open_model(path, settings.tokenizer)]
    if opened[0].checkpoint is not None:
        for earlier in spread(find_checkpoints(path), settings.checkpoints)[-2::-1]:
            opened.insert(0, replace(open_model(earlier, settings.tokenizer), path=path))
    folder = _folder_of(path, out)
    data, domains = domains_of(settings.data, opened[-1].args, opened[-1].tokenizer)
    source = opened[-1].source
    config = opened[-1].config.to_dict() if source is None else source.config
    length = settings.sequence_length or default_length(config)
    text = read_text(data, domains, length=length, tokens=settings.tokens, seed=settings.seed)
    check_vocabulary(torch.cat((text.inputs, text.labels)), opened[-1].shape.config.vocab_size)
    of_last = routing.facts_of(opened[-1], text, settings.dtype)
    facts = {_name_of(one): replace(of_last, iteration=one.iteration) for one in opened}
    job = Job(path, folder, opened, facts, text, settings)
    _check_place(job, force)
    return job


def check_work(jobs: list[Job], out: Path | None, *, force: bool) -> None:
    """Check that there is something to do, and that no two models have one folder.

    Raises:
        ValueError: everything is there already, or two models have the same folder.
    """
    for index, job in enumerate(jobs):
        if job.folder in [other.folder for other in jobs[:index]]:
            raise ValueError(
                f"two models would be analyzed in {job.folder}; analyze them one by one, with "
                f"another folder for each (--out)"
            )
    is_summarized = out is None or (out / SUMMARY).is_file()
    if all(job.is_finished for job in jobs) and is_summarized and not force:
        raise ValueError(
            f"{jobs[0].folder} is finished already; look at it (remoe report), or replace it "
            f"(--force)"
        )


def spread(checkpoints: list[Path], count: int) -> list[Path]:
    """Return at most `count` checkpoints, evenly spaced, the last one always."""
    last, count = len(checkpoints) - 1, min(count, len(checkpoints))
    return [checkpoints[last - last * i // max(1, count - 1)] for i in reversed(range(count))]


def _folder_of(path: Path, out: Path | None) -> Path:
    if (path / "config.yaml").is_file():
        return path / _OF_RUN
    if out is not None:
        return out / path.resolve().name
    raise ValueError(
        f"{path} is no run directory, in which its analysis could be; name a folder (--out)"
    )


def _name_of(opened: Opened) -> str:
    checkpoint = opened.checkpoint
    return checkpoint.name if checkpoint is not None else "model"


def _check_place(job: Job, force: bool) -> None:
    """Refuse to go on with what is not the same analysis; raises a ValueError."""
    if job.folder.exists() and not job.folder.is_dir():
        raise ValueError(f"{job.folder} is a file; name a folder (--out)")
    found = {path.name for path in job.folder.iterdir()} if job.folder.is_dir() else set()
    others = sorted(name for name in found - _OWN if not name.startswith("."))
    if others:
        raise ValueError(
            f"{job.folder} is no analysis, since it has {others[0]}; move it away, or name another "
            f"folder (--out)"
        )
    if force or TRACES not in found:
        return
    differing = set()
    for folder in sorted((job.folder / TRACES).iterdir()):
        wanted, there = job.facts.get(folder.name), trace.read_facts(folder)
        if wanted is None:
            differing.add("checkpoints")
        elif there is not None:
            differing |= trace.differing_facts(there, wanted)
    if differing:
        raise ValueError(
            f"{job.folder} holds an analysis that differs in {', '.join(sorted(differing))}; "
            f"replace it (--force)"
        )


def run(job: Job, progress: Progress = lambda done, total: None, *, force: bool = False) -> None:
    """Do what is missing of an analysis.

    Args:
        job: the analysis.
        progress: called with the number of sequences that are done, and of all sequences.
        force: whether to remove what is there and begin again.

    Raises:
        ValueError: a weight is NaN or infinite, a record is of other weights, or another process
            writes to the folder.
    """
    dtype, last = job.settings.dtype, job.opened[-1]
    part = len(interventions.part_of(job.text).inputs)
    total = len(job.opened) * len(job.text.inputs)
    total += part * interventions.passes(job.facts[_name_of(last)])
    done, model = 0, None

    def advance(sequences: int) -> None:
        nonlocal done
        done += sequences
        progress(done, total)

    with output_folder(job.folder):
        if force:
            _remove(job.folder)
        for opened, (name, facts) in zip(job.opened, job.facts.items(), strict=True):
            folder = job.folder / TRACES / name
            if trace.is_complete(folder):
                advance(len(job.text.inputs))
                continue
            model = opened.load(dtype)
            routing.record(opened, model, facts, job.text, folder, advance=advance)
        file = job.folder / INTERVENTIONS
        if not file.is_file():
            if model is None:
                model = last.load(dtype)
            rows = interventions.measure(model, trace.read(job.last), job.text, advance=advance)
            write_whole(file, json.dumps(rows, indent=1) + "\n")
        _answer(job)


def _remove(folder: Path) -> None:
    for name in _OWN:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink(missing_ok=True)


def _answer(job: Job) -> None:
    """Compute the answers from the files."""
    traces = [trace.read(job.folder / TRACES / name) for name in job.facts]
    file = job.folder / INTERVENTIONS
    try:
        rows = parse_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON ({error}); remove it") from error
    write_answers(job.folder, answers(traces, rows, job.settings.seed))
