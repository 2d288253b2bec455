"""The commands that change how many experts a trained model uses: `remoe adopt` and `budget`."""

from pathlib import Path
from typing import Annotated

import typer

from megatron.remoe.cli.common import AtLeastOne, AtLeastOneOrNone, command, prepare
from megatron.remoe.progress import progress, told_progress

app = typer.Typer()


@command(app)
def adopt(
    model: Path,
    out: Path,
    data: Annotated[Path, typer.Option()],
    active_experts: float | None = None,
    keep_topk: AtLeastOneOrNone = None,
    held_out: Path | None = None,
    steps: Annotated[int, typer.Option(min=0)] = 200,
    batch_size: AtLeastOne = 8,
    lr: float = 0.005,
    all_weights: bool = False,
    router: str = "topk",
    walk: str = "threshold",
    sequence_length: AtLeastOneOrNone = None,
    seed: AtLeastOne = 1234,
    tokenizer: Path | None = None,
    force: bool = False,
) -> None:
    """Make a model whose tokens choose how many experts they use from a trained TopK mixture.

    Gates below a threshold are switched off, and the routers are distilled while the number of
    active experts falls to the target. An adoption that is interrupted goes on with the same
    command. Models are runs, checkpoints and exports with TopK, and folders of OLMoE, Mixtral and
    Qwen3-MoE.

    Example: remoe adopt OLMoE-1B-7B adopted --data tokens/train --active-experts 5.5

    Args:
        out: The Hugging Face folder to create.
        data: The folder of token files, or one of them without its suffix, from which the model
            learns.
        active_experts: The mean number of active experts of a token and layer, at most the
            teacher's k. By default --keep-topk is needed.
        keep_topk: The k of a TopK model that is distilled in place of an adaptive one, to compare
            with it. By default there is none.
        held_out: The token files on which the losses are measured, by default a part of --data that
            the model does not learn from.
        steps: The number of steps of distillation. With 0 the fitted routers are only calibrated.
        batch_size: The number of sequences of a step.
        lr: The learning rate, relative to the size of each weight.
        all_weights: Train all weights, and not the routers alone.
        router: The router of the new model, topk for that of the teacher, of which small gates are
            switched off, or relu for one with ReLU gates that is fitted to it.
        walk: What takes experts away on the way to the target, the threshold of gates, or l1 for
            the L1 penalty.
        sequence_length: The length of the sequences, by default that of the run, or else the
            positions of the model, up to 1024.
        seed: The seed that orders the documents.
    """
    prepare()
    from megatron.remoe.adopt import adopt as run

    settings = run.Settings(
        active_experts=active_experts,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        all_weights=all_weights,
        walk=walk,
        router=router,
        keep_topk=keep_topk,
        sequence_length=sequence_length,
        seed=seed,
    )
    with told_progress("steps") as shown:
        made = run.adopt(
            model,
            out,
            data,
            settings,
            held_out=held_out,
            tokenizer=tokenizer,
            force=force,
            shown=shown,
        )
    typer.echo(f"loss on {made.tokens} held-out tokens, in nats per token:")
    typer.echo(f"  the teacher                          {made.teacher:.4f}")
    typer.echo(f"  new routers, as many active experts  {made.initial:.4f}")
    typer.echo(f"  the same at the target               {made.pruned:.4f}")
    typer.echo(f"  after distillation                   {made.final:.4f}")
    typer.echo(f"{out}: {made.active:.3f} active experts per token and layer")


@command(app)
def budget(
    models: list[Path],
    data: Annotated[Path, typer.Option()],
    points: str = "0.3,0.5,0.7,0.85,1,1.25,1.5,2,3",
    tokens: AtLeastOne = 32768,
    sequence_length: AtLeastOneOrNone = None,
    seed: AtLeastOne = 1234,
    tokenizer: Path | None = None,
    out: Path | None = None,
) -> None:
    """Measure the loss of models against the number of active experts, without training.

    Models with ReLU gates get a threshold, or an offset for more experts than they activate. TopK
    models get another k, and those of ours also a threshold. The intervals are of 95%, over
    sequences. The figure has all models.

    Example: remoe budget runs/quickstart --data data/quickstart/tokens/valid

    Args:
        models: The run directories, checkpoints or Hugging Face folders.
        data: The folder of token files, or one of them without its suffix, on which the loss is
            measured.
        points: The numbers of active experts, as multiples of the number that each model was
            trained for.
        tokens: The largest number of tokens to read, taken from all files in turn.
        sequence_length: The length of the sequences, by default the shortest that a model was
            trained with.
        seed: The seed that orders the documents.
        out: The folder for budget.json, budget.csv, budget.md and budget.png, by default that of
            the model, if there is only one.
    """
    from megatron.remoe.analysis.budget import FILES, to_markdown, write
    from megatron.remoe.files import check_in_folder

    if out is None and len(models) > 1:
        raise ValueError(f"{len(models)} models share one figure; name a folder for it (--out)")
    folder = out or models[0]
    check_in_folder(folder / FILES[0])
    try:
        multiples = tuple(float(point) for point in points.split(","))
    except ValueError:
        raise ValueError(f"points is {points!r}; it must be numbers such as 0.5,1,2") from None
    prepare()
    from megatron.remoe.evaluate import curves as run

    settings = run.Settings(multiples, tokens, sequence_length, seed, tokenizer)
    with progress("models") as report:
        measured = run.measure(models, data, settings, report)
    typer.echo(to_markdown(measured))
    for file in write(measured, folder):
        typer.echo(file)
