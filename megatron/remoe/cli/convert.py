"""The commands `remoe convert ...` and `remoe generate`."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

convert = typer.Typer(help="Checkpoints to Hugging Face and back.", no_args_is_help=True)

Tokenizer = Annotated[
    Path | None,
    typer.Option(help="Tokenizer folder or tokenizer.json.", show_default="the run's"),
]
TensorParallel = Annotated[int, typer.Option(help="Ranks that share a layer.")]
PipelineParallel = Annotated[int, typer.Option(help="Pipeline stages.")]
ExpertParallel = Annotated[int, typer.Option(help="Ranks that share the experts.")]
PaddedVocabSize = Annotated[
    int | None,
    typer.Option(
        help="Rows of the embedding.", show_default="as before, or the next multiple of 128"
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
_TEXT = """The router gives every token to the experts whose logit is positive.

def relu_routing(logits):
    probs = torch.relu(logits)
    return probs, probs > 0

#include <vector>
int main() { std::vector<int> experts(8); return experts.size(); }
"""


@convert.command("to-hf")
def to_hf(
    source: Annotated[Path, typer.Argument(help="Run directory, or a checkpoint of any layout.")],
    out: Annotated[Path, typer.Argument(help="Folder to make.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="fp32, bf16 or fp16.", show_default="the checkpoint's"),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Most bytes of a file of weights.")] = "5GB",
    tokenizer: Tokenizer = None,
    force: Force = False,
) -> None:
    """Export a model as transformers loads it: weights, tokenizer, code and model card."""
    prepare()
    from megatron.remoe.convert import export
    from megatron.remoe.formats.safetensors import parse_size

    chosen, size = export.parse_dtype(dtype), parse_size(max_shard_size)
    with progress("bytes") as report:
        config = export.to_hf(
            source,
            out,
            dtype=chosen,
            max_shard_bytes=size,
            tokenizer=tokenizer,
            force=force,
            progress=report,
        )
    typer.echo(f"{out}: {config['architectures'][0]}, {config['dtype']}")


@convert.command("to-megatron")
def to_megatron(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder, remoe or llama.")],
    out: Annotated[Path, typer.Argument(help="Folder of checkpoints to make.")],
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
    expert_parallel: ExpertParallel = 1,
    padded_vocab_size: PaddedVocabSize = None,
    force: Force = False,
) -> None:
    """Make a checkpoint that Megatron trains on, with the model's flags in model.yaml."""
    prepare()
    from megatron.remoe.convert.to_megatron import Layout
    from megatron.remoe.convert.to_megatron import to_megatron as convert_to_megatron

    layout = Layout(tensor_parallel, pipeline_parallel, expert_parallel, padded_vocab_size)
    with progress("tensors") as report:
        folder = convert_to_megatron(source, out, layout=layout, force=force, progress=report)
    typer.echo(f"{folder}; continue with a config whose base is {out / 'model.yaml'}")


@convert.command()
def verify(
    a: Annotated[Path, typer.Argument(help="Run directory, checkpoint or Hugging Face folder.")],
    b: Annotated[Path, typer.Argument(help="The other.")],
    text: Annotated[str | None, typer.Option(help="Text to run both on.")] = None,
    text_file: Annotated[Path | None, typer.Option(help="Or a file of it.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Or token ids: 5,17,3.")] = None,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16, of the forward passes.")] = "fp32",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate greedily.")] = 20,
    tokenizer: Tokenizer = None,
) -> None:
    """Compare two models: tensors bit by bit, logits, active experts, greedy text.

    Exits with 1 if they differ more than the dtype allows.
    """
    prepare()
    from megatron.remoe.convert import compare
    from megatron.remoe.convert.export import parse_dtype

    chosen = parse_dtype(dtype)
    assert chosen is not None
    result = compare.compare(
        a,
        b,
        _text_or_ids(text, text_file, tokens),
        dtype=chosen,
        new_tokens=new_tokens,
        tokenizer=tokenizer,
    )
    equal = result.tensors - len(result.differing)
    typer.echo(f"tensors: {equal} of {result.tensors} bit-equal")
    for name, largest in sorted(result.differing.items(), key=lambda pair: -pair[1])[:10]:
        typer.echo(f"  {name}: {largest:.3g}")
    differences = result.logit_differences
    typer.echo(
        f"logits ({dtype}, {len(differences)} tokens): largest difference "
        f"{float(differences.max()):.3g}, allowed {compare.LOGIT_TOLERANCE[chosen]:g}"
    )
    for position in differences.argsort(descending=True)[:3].tolist():
        typer.echo(f"  at token {position}: {float(differences[position]):.3g}")
    typer.echo(f"active experts: {result.flipped:.4%} of (token, expert) pairs differ")
    typer.echo(
        f"{new_tokens} tokens generated greedily: {'same' if result.greedy else 'DIFFERENT'}"
    )
    if not result.ok:
        typer.echo("the models DIFFER")
        raise typer.Exit(1)
    typer.echo("ok")


def generate(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder, run or checkpoint.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="Of sampling; 0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of the probability to sample from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16.", show_default="the weights'")
    ] = None,
    tokenizer: Tokenizer = None,
) -> None:
    """Continue a prompt, streamed."""
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


def _text_or_ids(text: str | None, file: Path | None, tokens: str | None) -> str | list[int]:
    if sum(value is not None for value in (text, file, tokens)) > 1:
        raise ValueError("give one of --text, --text-file and --tokens")
    if file is not None:
        if not file.is_file():
            raise ValueError(f"{file} does not exist; name a text file")
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 ({error.reason}); name a text file") from error
    if tokens is not None:
        parts = tokens.split(",")
        if len(parts) < 2 or not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"tokens is {tokens!r}; it must be two or more ids such as 5,17,3")
        return [int(part) for part in parts]
    return _TEXT if text is None else text


def prepare() -> None:
    """As for training, and without the bars that transformers shows of its own."""
    from transformers.utils import logging as transformers_logging

    from megatron.remoe import cpu

    cpu.prepare_megatron()
    logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]


@contextmanager
def progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(unit, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
