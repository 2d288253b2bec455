"""The commands `remoe convert ...`: to Hugging Face and back, and from models made elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from megatron.remoe.cli.common import (
    DTYPES,
    ExpertParallel,
    Force,
    PaddedVocabSize,
    PipelineParallel,
    TensorParallel,
    Tokenizer,
    example,
    prepare,
)
from megatron.remoe.progress import progress

app = typer.Typer(help="Convert checkpoints to Hugging Face and back.", no_args_is_help=True)

Checkpoints = Annotated[Path, typer.Argument(help="The folder of checkpoints, which is made.")]
_TEXT = """The router gives every token to the experts whose logit is positive.

def relu_routing(logits):
    probs = torch.relu(logits)
    return probs, probs > 0

#include <vector>
int main() { std::vector<int> experts(8); return experts.size(); }
"""


@app.command("to-hf", epilog=example("convert to-hf runs/quickstart model --dtype bf16"))
def to_hf(
    source: Annotated[
        Path, typer.Argument(help="The run directory, or a checkpoint of any parallel layout.")
    ],
    out: Annotated[Path, typer.Argument(help="The Hugging Face folder, which is made.")],
    dtype: Annotated[
        str | None,
        typer.Option(help=f"The type of the weights: {DTYPES}.", show_default="the checkpoint's"),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="The most bytes of one file of weights, such as 500MB or 5GB.")
    ] = "5GB",
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


@app.command(
    "to-megatron", epilog=example("convert to-megatron model checkpoints --expert-parallel 2")
)
def to_megatron(
    source: Annotated[
        Path, typer.Argument(help="The Hugging Face folder, of the model type remoe or llama.")
    ],
    out: Checkpoints,
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
    expert_parallel: ExpertParallel = 1,
    padded_vocab_size: PaddedVocabSize = None,
    force: Force = False,
) -> None:
    """Make a checkpoint that Megatron trains on, with the model's flags in model.yaml."""
    prepare()
    from megatron.remoe.convert import to_megatron as run

    layout = run.Layout(tensor_parallel, pipeline_parallel, expert_parallel, padded_vocab_size)
    with progress("tensors") as report:
        folder = run.to_megatron(source, out, layout=layout, force=force, progress=report)
    typer.echo(f"{folder}; continue with a config whose base is {out / 'model.yaml'}")


@app.command(
    "from-fork", epilog=example("convert from-fork CHECKPOINTS model --tokenizer gpt2-tokenizer")
)
def from_fork(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A checkpoint of the published implementation, or a folder of them."),
    ],
    out: Annotated[
        Path, typer.Argument(help="The folder, which is made, for the folders hf and megatron.")
    ],
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
    expert_parallel: ExpertParallel = 1,
    padded_vocab_size: PaddedVocabSize = None,
    tokenizer: Tokenizer = None,
    force: Force = False,
) -> None:
    """Take over a model of thu-ml/ReMoE with its coefficient, for transformers and for Megatron."""
    prepare()
    from megatron.remoe.convert import from_fork as run
    from megatron.remoe.convert import to_megatron

    layout = to_megatron.Layout(
        tensor_parallel, pipeline_parallel, expert_parallel, padded_vocab_size
    )
    with progress("bytes") as report:
        config = run.from_fork(
            checkpoint, out, layout=layout, tokenizer=tokenizer, force=force, progress=report
        )
    coefficient = (config.get("l1_coeff") or [None])[0]
    typer.echo(f"{out / run.HF}: {config['architectures'][0]}, coefficient {coefficient}")
    typer.echo(
        f"{out / run.MEGATRON}; continue with a config whose base is "
        f"{out / run.MEGATRON / 'model.yaml'}"
    )


@app.command(epilog=example("convert upcycle runs/dense start --num-experts 8 --granularity 2"))
def upcycle(
    dense: Annotated[
        Path, typer.Argument(help="A dense run or checkpoint, or a Hugging Face Llama.")
    ],
    out: Checkpoints,
    num_experts: Annotated[
        int, typer.Option(help="E, the number of copies of the dense MLP before granularity.")
    ],
    granularity: Annotated[
        int,
        typer.Option(help="G, the number of slices of each copy: E * G experts of width / G."),
    ] = 1,
    topk: Annotated[int, typer.Option(help="The k of the target sparsity 1 - k/E.")] = 1,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Token files without their suffix, to which the router is fitted.",
            show_default="the model's own samples",
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            min=512, help="The number of tokens. One half fits the router, the other one tests it."
        ),
    ] = 8192,
    spread: Annotated[
        float,
        typer.Option(help="The standard deviation of a gate's noise, relative to the gate's mean."),
    ] = 0.5,
    seed: Annotated[int, typer.Option(help="The seed of the noise and of the samples.")] = 0,
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
    expert_parallel: ExpertParallel = 1,
    padded_vocab_size: PaddedVocabSize = None,
    tokenizer: Tokenizer = None,
    force: Force = False,
) -> None:
    """Start a mixture with ReLU routing from a dense model, and say how far it is from it."""
    prepare()
    from megatron.remoe.convert import to_megatron
    from megatron.remoe.convert import upcycle as run

    settings = run.Settings(num_experts, topk, granularity, spread, seed)
    layout = to_megatron.Layout(
        tensor_parallel, pipeline_parallel, expert_parallel, padded_vocab_size
    )
    with progress("bytes") as report:
        made = run.upcycle(
            dense,
            out,
            settings,
            data=data,
            num_tokens=tokens,
            layout=layout,
            tokenizer=tokenizer,
            force=force,
            progress=report,
        )
    typer.echo(
        f"first forward on held-out {'data' if data else 'samples'}: loss {made.loss:.4f}, dense "
        f"{made.dense_loss:.4f}, gap {made.loss - made.dense_loss:+.4f}"
    )
    typer.echo(
        f"gates of a slice's copies sum to 1 ± {made.gate_sum_std:.3f}; active: {made.active:.1%}"
    )
    typer.echo(f"{made.folder}; train with a config whose base is {out / 'model.yaml'}")


@app.command(epilog=example("convert verify runs/quickstart model --tokens 5,17,3"))
def verify(
    a: Annotated[
        Path, typer.Argument(help="A run directory, a checkpoint or a Hugging Face folder.")
    ],
    b: Annotated[Path, typer.Argument(help="The other model, of any of these kinds.")],
    text: Annotated[
        str | None,
        typer.Option(help="The text to run both models on.", show_default="a text with code"),
    ] = None,
    text_file: Annotated[
        Path | None, typer.Option(help="A file that holds the text, instead of --text.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Token ids such as 5,17,3, instead of --text.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="The type of the forward passes: fp32 or bf16.")
    ] = "fp32",
    new_tokens: Annotated[
        int, typer.Option(min=1, help="The number of tokens to generate greedily.")
    ] = 20,
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


def _text_or_ids(text: str | None, file: Path | None, tokens: str | None) -> str | list[int]:
    """Return what both models run on: the given text or token ids, or a text with code."""
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
