"""The commands that use a model: `remoe generate`, `evaluate`, `analyze` and `report`."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron.remoe.cli.common import AtLeastOne, AtLeastOneOrNone, command, prepare
from megatron.remoe.progress import progress

app = typer.Typer()


@command(app)
def generate(
    model: Path,
    prompt: Annotated[str | None, typer.Argument()] = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str | None = None,
    tokenizer: Path | None = None,
    active_experts: float | None = None,
    calibrate_on: Path | None = None,
) -> None:
    """Continue a prompt, and print the text while it is generated.

    Without a prompt, every line of standard input is one, until Ctrl-D; the model is loaded once.

    With --active-experts fewer experts compute every token, down to that mean number, which may be
    below 1. The budget in use is printed first.

    Example: remoe generate runs/quickstart "def main(" --temperature 0.7 --max-new-tokens 48

    Args:
        prompt: The text to continue. By default prompts are read from standard input, one a line.
        max_new_tokens: The largest number of tokens to generate.
        temperature: The temperature of sampling. With 0 every token is the likeliest one.
        top_p: Sample only from the likeliest tokens, whose probabilities sum to this number.
        seed: The seed of the random numbers of sampling.
        dtype: The type of the weights (fp32, bf16 or fp16), by default that of the files.
    """
    prepare()
    from megatron.remoe.convert.export import parse_dtype
    from megatron.remoe.convert.generate import check_sampling, generator
    from megatron.remoe.evaluate.budget import choose

    check_sampling(max_new_tokens, temperature, top_p)
    chosen = parse_dtype(dtype)
    budget = choose(model, active_experts, calibrate_on, dtype=chosen, tokenizer=tokenizer)
    if budget.said:
        typer.echo(budget.said, err=True)

    def emit(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    continue_ = generator(
        model,
        emit,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        dtype=chosen,
        tokenizer=tokenizer,
        budget=budget.fields,
    )
    if prompt is None:
        _read_prompts(continue_)
    else:
        continue_(prompt)


def _read_prompts(continue_: Callable[[str], None]) -> None:
    """Continue every line of standard input; a prompt that is refused does not end the loop.

    Raises:
        ValueError: Prompts of a pipe were refused.
    """
    is_terminal, refused = sys.stdin.isatty(), 0
    while True:
        try:
            line = input("> ") if is_terminal else next(sys.stdin)
        except (EOFError, KeyboardInterrupt, StopIteration):
            break
        if not line.strip():
            continue
        try:
            continue_(line.rstrip("\n"))
        except ValueError as error:
            refused += 1
            typer.echo(f"error: {error}", err=True)
        except KeyboardInterrupt:  # It ends this text.
            typer.echo()
    if is_terminal:
        typer.echo()
    elif refused:
        raise ValueError(f"{refused} prompts were refused, as said above; change them")


@command(app)
def evaluate(
    model: Path,
    tasks: str | None = None,
    include_path: Path | None = None,
    limit: AtLeastOneOrNone = None,
    perplexity: Path | None = None,
    sequence_length: AtLeastOneOrNone = None,
    seed: int | None = None,
    batch_size: AtLeastOne = 8,
    dtype: str = "fp32",
    tokenizer: Path | None = None,
    active_experts: float | None = None,
    calibrate_on: Path | None = None,
    out: Path | None = None,
) -> None:
    """Evaluate a model on tasks, and measure its loss and perplexity on each domain's token files.

    Example: remoe evaluate runs/quickstart --perplexity data/quickstart/tokens/valid

    Args:
        tasks: Tasks of lm-evaluation-harness, such as arc_easy,piqa, or paper for the seven tasks
            of the paper. By default none is run.
        include_path: A folder of more tasks, such as that of remoe data cloze, by default none.
        limit: The number of documents of each task to use, by default all of them.
        perplexity: The token files whose loss is measured: a folder, or one of them without its
            suffix. By default no loss is measured.
        sequence_length: The length of the sequences of --perplexity, by default the run's.
        seed: The seed that orders the documents of --perplexity, by default the run's, or 1234.
        batch_size: The number of sequences that are evaluated at a time.
        dtype: The type of the weights: fp32, bf16 or fp16.
        out: The JSON file to which the results are added. By default it is evaluation.json in a run
            directory, or evaluation_X_active.json with --active-experts X, and none for other
            models.
    """
    if tasks is None and perplexity is None:
        raise ValueError("nothing to evaluate; give --tasks, --perplexity, or both")
    prepare()
    from megatron.remoe.convert.export import parse_dtype

    chosen = parse_dtype(dtype)
    assert chosen is not None
    from megatron.remoe.evaluate.budget import choose

    is_run = (model / "config.yaml").is_file()
    name = "evaluation" if active_experts is None else f"evaluation_{active_experts:g}_active"
    file = out or (model / f"{name}.json" if is_run else None)
    before = {} if file is None else _read(file)
    budget = choose(model, active_experts, calibrate_on, dtype=chosen, tokenizer=tokenizer)
    if before and before.get("budget") != (budget.said or None):
        raise ValueError(
            f"{file} has figures with another budget ({before.get('budget')}) than this one "
            f"({budget.said or None}); name another file (--out), or delete it"
        )
    found: dict[str, Any] = {"budget": budget.said or None}
    if budget.said:
        typer.echo(budget.said)
    if perplexity is not None:
        from megatron.remoe.evaluate import perplexity as losses

        with progress("sequences") as report:
            domains = losses.perplexity(
                model,
                perplexity,
                sequence_length=sequence_length,
                seed=seed,
                dtype=chosen,
                batch_size=batch_size,
                tokenizer=tokenizer,
                budget=budget.fields,
                progress=report,
            )
        found["perplexity"] = {
            name: asdict(loss) | {"perplexity": loss.perplexity} for name, loss in domains.items()
        }
        typer.echo(f"{'domain':20} {'loss':>8} {'perplexity':>12} {'tokens':>10}")
        for name, loss in domains.items():
            typer.echo(f"{name:20} {loss.loss:8.4f} {loss.perplexity:12.2f} {loss.tokens:10}")
    if tasks is not None:
        from megatron.remoe.evaluate import harness, published

        request = harness.Request(
            model=str(model),
            tasks=[task.strip() for task in tasks.split(",") if task.strip()],
            include=None if include_path is None else str(include_path),
            limit=limit,
            batch_size=batch_size,
            dtype=str(chosen).removeprefix("torch."),
            tokenizer=None if tokenizer is None else str(tokenizer),
            budget=budget.fields,
        )
        found["tasks"] = harness.run(request)
        found["limit"] = limit
        typer.echo(published.table(model.name, found["tasks"]))
    if file is not None:
        for key in _FIGURES:  # Replace what was evaluated again, and keep the rest.
            if key in before and key in found:
                found[key] = before[key] | found[key]
        whole = before | {"model": str(model), "dtype": dtype} | found
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(whole, indent=2) + "\n")
        typer.echo(file)


_FIGURES = ("tasks", "perplexity")


def _read(file: Path) -> dict[str, Any]:
    """Return the results that a file has already, before there are more.

    Raises:
        ValueError: The file cannot be written, or has something else.
    """
    from megatron.remoe.files import check_in_folder, read_json_object

    remedy = "name another file (--out)"
    check_in_folder(file)
    before = read_json_object(file, remedy) if file.exists() else {}
    for key in _FIGURES:
        if not isinstance(before.get(key, {}), dict):
            raise ValueError(f"{file} has no mapping as {key}; {remedy}")
    return before


@command(app)
def analyze(
    models: list[Path],
    data: Path | None = None,
    tokens: AtLeastOne = 32768,
    sequence_length: AtLeastOneOrNone = None,
    seed: AtLeastOne = 1234,
    checkpoints: AtLeastOne = 4,
    dtype: str = "fp32",
    tokenizer: Path | None = None,
    out: Path | None = None,
    force: bool = False,
) -> None:
    """Record what the routers of models do with text, and answer what users ask of it.

    Models are read from any checkpoint or Hugging Face folder of ours, and from folders of OLMoE,
    Mixtral, Qwen2-MoE and Qwen3-MoE. An analysis has the records, the answers as tables, and what
    it costs to take experts away; remoe report shows it. One that is interrupted goes on. The
    balance of gates and what layers know of each other are printed, in which runs that differ in
    their seed only are one row.

    Example: remoe analyze runs/quickstart

    Args:
        models: The run directories, checkpoints or Hugging Face folders.
        data: The folder of token files that are read, with a pair of files for each domain. By
            default they are the validation files of the run.
        tokens: The largest number of tokens to read, taken from all files in turn.
        sequence_length: The length of the sequences, by default the run's.
        seed: The seed that orders the documents, and the shuffled tokens of controls.
        checkpoints: The largest number of a run's checkpoints that are read, evenly spaced and with
            the last one, between which changes of routing are counted.
        dtype: The type of the weights: fp32, bf16 or fp16.
        out: The folder for routing.md and routing.json, with the numbers that are printed, for
            results.md, with a table of each answer, and for the analysis of each model that is no
            run. That of a run is in the run's directory. By default the numbers are only printed.
    """
    from megatron.remoe.files import check_in_folder

    if out is not None:
        check_in_folder(out / "routing.md")
    prepare()
    from rich.console import Console
    from rich.table import Table

    from megatron.remoe.analysis import markdown, trace
    from megatron.remoe.analysis import routing as measures
    from megatron.remoe.analysis.answers import read_answers
    from megatron.remoe.analysis.results import read_groups, results
    from megatron.remoe.convert.export import parse_dtype
    from megatron.remoe.evaluate import analysis

    chosen = parse_dtype(dtype)
    assert chosen is not None
    settings = analysis.Settings(
        data, tokens, sequence_length, seed, checkpoints, chosen, tokenizer
    )
    jobs = [analysis.prepare(path, settings, out, force=force) for path in models]
    analysis.check_work(jobs, out, force=force)
    groups = measures.group_models(models)
    reports = []
    for job in jobs:
        if force or not job.is_finished:
            with progress(f"sequences of {job.path.name}") as shown:
                analysis.run(job, shown, force=force)
        balance = read_answers(job.folder)["balance"]
        found = measures.report(job.path, trace.read(job.last), balance)
        reports.append(found)
        rows = [*found.layers, found.summary]
        columns = markdown.texts(rows, markdown.GATES_OF_LAYERS)
        title = f"{job.path}: {found.router}, k {found.topk}, {found.tokens} tokens"
        table = Table(*columns, title=title, box=None, pad_edge=False)
        for cells in zip(*columns.values(), strict=True):
            table.add_row(*cells)
        Console().print(table)
    summary = measures.summarize(groups, reports)
    text = measures.to_markdown(summary)
    typer.echo(text)
    if out is not None:
        every = {
            "data": str(data),
            "seed": seed,
            "models": [found.to_json() for found in reports],
            "summary": summary,
        }
        out.mkdir(parents=True, exist_ok=True)
        answered = results(read_groups({job.path: job.folder for job in jobs}))
        for name, content in (
            ("routing.md", text),
            ("routing.json", json.dumps(every, indent=2)),
            ("results.md", answered),
        ):
            (out / name).write_text(content.rstrip("\n") + "\n")
            typer.echo(out / name)
    for job in jobs:
        typer.echo(job.folder)


@command(app)
def report(runs: list[Path], out: Path | None = None, wandb: bool = False) -> None:
    """Write one HTML file that shows how the experts of analyzed runs are used.

    The file opens from disk in any browser, without a network. It has figures that answer to the
    mouse, text colored by the number of active experts, and tables. Several runs stand side by
    side.

    Example: remoe report runs/quickstart

    Args:
        runs: The run directories, or folders of analyses, that remoe analyze has worked on.
        out: The HTML file to write, by default report.html in the run directory. An older report is
            replaced. Several runs need a name.
        wandb: Log the file as an artifact of the run's W&B run, as its config says: online or
            offline.
    """
    from megatron.remoe.analysis.report import page, subject
    from megatron.remoe.analysis.runs import Run
    from megatron.remoe.analysis.wandb_run import WandbRun

    if out is None and len(runs) > 1:
        raise ValueError(f"{len(runs)} runs share one report; name its file (--out)")
    if wandb and len(runs) > 1:
        raise ValueError(f"{len(runs)} runs share one report; --wandb takes that of one run")
    out = out or runs[0] / "report.html"
    page.check_output(out)
    logged = WandbRun.of(Run.load(runs[0])) if wandb else None
    page.write(subject.load(runs), out)
    typer.echo(out)
    if logged is not None:
        typer.echo(logged.log_report(out))
