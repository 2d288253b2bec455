"""The commands `remoe convert from-fork` and `remoe convert upcycle`: models made elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from megatron.remoe.cli.convert import (
    ExpertParallel,
    Force,
    PaddedVocabSize,
    PipelineParallel,
    TensorParallel,
    Tokenizer,
    prepare,
    progress,
)


def from_fork(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint of the published implementation, or their folder.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to make, with hf/ and megatron/ in it.")],
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
    expert_parallel: ExpertParallel = 1,
    padded_vocab_size: PaddedVocabSize = None,
    tokenizer: Tokenizer = None,
    force: Force = False,
) -> None:
    """Take over a model of thu-ml/ReMoE with its coefficient, for transformers and to train on."""
    prepare()
    from megatron.remoe.convert import from_fork as run
    from megatron.remoe.convert.to_megatron import Layout

    layout = Layout(tensor_parallel, pipeline_parallel, expert_parallel, padded_vocab_size)
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


def upcycle(
    dense: Annotated[Path, typer.Argument(help="Dense run or checkpoint, or Hugging Face Llama.")],
    out: Annotated[Path, typer.Argument(help="Folder of checkpoints to make.")],
    num_experts: Annotated[int, typer.Option(help="E, copies of the dense MLP.")],
    granularity: Annotated[
        int, typer.Option(help="G, slices of a copy: E * G experts of width / G.")
    ] = 1,
    topk: Annotated[int, typer.Option(help="k of the target sparsity 1 - k/E.")] = 1,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Token files without suffix, for the router.", show_default="the model's samples"
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=512, help="How many tokens of them.")] = 8192,
    spread: Annotated[float, typer.Option(help="Noise of a gate, relative to its mean.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of noise and samples.")] = 0,
    tensor_parallel: TensorParallel = 1,
    pipeline_parallel: PipelineParallel = 1,
    expert_parallel: ExpertParallel = 1,
    padded_vocab_size: PaddedVocabSize = None,
    tokenizer: Tokenizer = None,
    force: Force = False,
) -> None:
    """Start a mixture with ReLU routing from a dense model, and say how far it is from it."""
    prepare()
    from megatron.remoe.convert import upcycle as run
    from megatron.remoe.convert.to_megatron import Layout

    settings = run.Settings(num_experts, topk, granularity, spread, seed)
    with progress("bytes") as report:
        made = run.upcycle(
            dense,
            out,
            settings,
            data=data,
            num_tokens=tokens,
            layout=Layout(tensor_parallel, pipeline_parallel, expert_parallel, padded_vocab_size),
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


def register(convert: typer.Typer) -> None:
    convert.command("upcycle")(upcycle)
    convert.command("from-fork")(from_fork)
