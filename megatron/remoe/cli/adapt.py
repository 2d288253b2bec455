"""The commands that change how many experts a trained model uses: `remoe adopt` and `budget`."""

from pathlib import Path
from typing import Annotated

import typer

from megatron.remoe.cli.common import AtLeastOne, AtLeastOneOrNone, command, prepare
from megatron.remoe.progress import told_progress

app = typer.Typer()


@command(app)
def adopt(
    model: Path,
    out: Path,
    data: Annotated[Path, typer.Option()],
    active_experts: float | None = None,
    keep_topk: AtLeastOneOrNone = None,
    steps: Annotated[int, typer.Option(min=0)] = 200,
    batch_size: AtLeastOne = 8,
    lr: float = 0.02,
    all_weights: bool = False,
    router: str = "relu",
    walk: str = "threshold",
    sequence_length: AtLeastOneOrNone = None,
    seed: AtLeastOne = 1234,
    tokenizer: Path | None = None,
    force: bool = False,
) -> None:
    """Make a model whose tokens choose how many experts they use from a trained TopK mixture.

    Its routers are fitted to the teacher's, and then distilled while the number of active experts
    falls to the target. An adoption that is interrupted goes on with the same command. Models are
    runs, checkpoints and exports with TopK, and folders of OLMoE, Mixtral and Qwen3-MoE.

    Example: remoe adopt OLMoE-1B-7B adopted --data tokens/train --active-experts 5.5

    Args:
        out: The Hugging Face folder to create.
        data: The folder of token files, or one of them without its suffix, from which the model
            learns. A part is held out, on which the losses are measured.
        active_experts: The mean number of active experts of a token and layer, at most the
            teacher's k. By default --keep-topk is needed.
        keep_topk: The k of a TopK model that is distilled in place of an adaptive one, to compare
            with it. By default there is none.
        steps: The number of steps of distillation. With 0 the fitted routers are only calibrated.
        batch_size: The number of sequences of a step.
        lr: The learning rate, relative to the size of each weight.
        all_weights: Train all weights, and not the routers alone.
        router: The router of the new model, relu, or topk for that of the teacher, whose small gates
            are switched off.
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
        made = run.adopt(model, out, data, settings, tokenizer=tokenizer, force=force, shown=shown)
    typer.echo(f"loss on {made.tokens} held-out tokens, in nats per token:")
    typer.echo(f"  the teacher                          {made.teacher:.4f}")
    typer.echo(f"  new routers, as many active experts  {made.initial:.4f}")
    typer.echo(f"  the same at the target               {made.pruned:.4f}")
    typer.echo(f"  after distillation                   {made.final:.4f}")
    typer.echo(f"{out}: {made.active:.3f} active experts per token and layer")
