"""The commands `remoe evaluate` and `remoe data cloze`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron.remoe.cli.convert import Tokenizer, prepare, progress


def cloze(
    corpus: Annotated[Path, typer.Argument(help="Corpus, or folder of .jsonl, one per domain.")],
    out: Annotated[Path, typer.Argument(help="Folder of the tasks.")],
    items: Annotated[int, typer.Option(help="Items of a domain.")] = 200,
    context_words: Annotated[int, typer.Option(help="Words before the gap.")] = 48,
    continuation_words: Annotated[int, typer.Option(help="Words of a continuation.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the passages.")] = 0,
) -> None:
    """Make a task for `remoe evaluate` from held-out documents: which continuation is the true one.

    The three wrong ones come from other documents of the domain, so chance is 25%.
    """
    from megatron.remoe.data.cloze import GROUP, ClozeConfig, write_cloze

    config = ClozeConfig(items, context_words, continuation_words, seed)
    for domain, count in write_cloze(corpus, out, config).items():
        typer.echo(f"{GROUP}_{domain}: {count} items")
    typer.echo(f"remoe evaluate MODEL --tasks {GROUP} --include-path {out}")


def evaluate(
    model: Annotated[Path, typer.Argument(help="Run, checkpoint or Hugging Face folder.")],
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness: a,b,c; `paper` for the paper's seven."),
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of more tasks.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of a task.")] = None,
    perplexity: Annotated[
        Path | None, typer.Option(help="Token files: a folder, or one without its suffix.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="For perplexity.", show_default="the run's")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Order of documents, for perplexity.", show_default="the run's, or 1234"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 8,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    tokenizer: Tokenizer = None,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file.", show_default="evaluation.json of a run directory"),
    ] = None,
) -> None:
    """Evaluate a model on tasks, or its loss and perplexity by domain of token files."""
    if tasks is None and perplexity is None:
        raise ValueError("nothing to evaluate; give --tasks, --perplexity, or both")
    prepare()
    from megatron.remoe.convert.export import parse_dtype

    chosen = parse_dtype(dtype)
    assert chosen is not None
    found: dict[str, Any] = {}
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
        )
        found["tasks"] = harness.run(request)
        found["limit"] = limit
        typer.echo(published.table(model.name, found["tasks"]))
    is_run = (model / "config.yaml").is_file()
    file = out or (model / "evaluation.json" if is_run else None)
    if file is not None:
        _merge(file, {"model": str(model), "dtype": dtype} | found)
        typer.echo(file)


def _merge(file: Path, found: dict[str, Any]) -> None:
    """Replace what was evaluated again, and keep the rest."""
    from megatron.remoe.files import read_json_object

    before = read_json_object(file, "name another file (--out)") if file.exists() else {}
    for key in ("tasks", "perplexity"):
        if key in before and key in found:
            if not isinstance(before[key], dict):
                raise ValueError(f"{file} has no mapping as {key}; name another file (--out)")
            found[key] = before[key] | found[key]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(before | found, indent=2) + "\n")


def register(app: typer.Typer, data: typer.Typer) -> None:
    app.command()(evaluate)
    data.command()(cloze)
