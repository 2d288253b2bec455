"""The commands that use a model: `remoe generate` and `remoe evaluate`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron.remoe.cli.common import DTYPES, Tokenizer, example, prepare
from megatron.remoe.progress import progress

app = typer.Typer()

Model = Annotated[
    Path, typer.Argument(help="A run directory, a checkpoint or a Hugging Face folder.")
]


@app.command(
    epilog=example('generate runs/quickstart "def main(" --temperature 0.7 --max-new-tokens 48')
)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens that are generated.")] = 64,
    temperature: Annotated[
        float,
        typer.Option(help="The temperature of sampling. 0 takes the likeliest token each time."),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(help="The share of the probability from which tokens are sampled (top-p)."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="The seed of the random numbers of sampling.")] = 0,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"The type of the weights: {DTYPES}.", show_default="that of the files"),
    ] = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Continue a prompt, and print the text while it is generated."""
    prepare()
    from megatron.remoe.convert.export import parse_dtype
    from megatron.remoe.convert.generate import generate as run

    def emit(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    run(
        model,
        prompt,
        emit,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        dtype=parse_dtype(dtype),
        tokenizer=tokenizer,
    )


@app.command(epilog=example("evaluate runs/quickstart --perplexity data/quickstart/tokens/valid"))
def evaluate(
    model: Model,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="The tasks of lm-evaluation-harness as a,b,c; paper means the seven of the paper."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="A folder of further tasks, such as remoe data cloze makes.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="The most documents of each task.", show_default="all of them"),
    ] = None,
    perplexity: Annotated[
        Path | None,
        typer.Option(
            help="The token files whose loss is measured: a folder, or one without its suffix."
        ),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            min=1, help="The length of sequences for --perplexity.", show_default="the run's"
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="The seed that orders the documents for --perplexity.",
            show_default="the run's, or 1234",
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="The number of sequences that are evaluated at a time.")
    ] = 8,
    dtype: Annotated[str, typer.Option(help=f"The type of the weights: {DTYPES}.")] = "fp32",
    tokenizer: Tokenizer = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The JSON file for the results, in which earlier results are kept.",
            show_default="evaluation.json in a run directory, none elsewhere",
        ),
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
