"""The commands `remoe checkpoint ...`, which need neither torch nor Megatron."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron.remoe import checkpoint
from megatron.remoe.cli.common import example

app = typer.Typer(help="List, verify and prune the checkpoints of a run.", no_args_is_help=True)
Folder = Annotated[Path, typer.Argument(help="A run directory, or a folder of checkpoints.")]


@app.command("list", epilog=example("checkpoint list runs/quickstart"))
def list_checkpoints(run: Folder) -> None:
    """List a run's checkpoints with their sizes, and say which of them are complete."""
    folder = checkpoint.folder_of(run)
    latest, table = checkpoint.tracked(folder), Table(title=str(folder))
    for name in ("iteration", "MB", "state"):
        table.add_column(name, justify="right" if name != "state" else "left")
    for found in checkpoint.find(folder):
        state = "complete" if found.is_complete else "incomplete"
        if found.is_complete and not found.has_manifest:
            state += ", cannot be verified (no manifest)"
        if found.iteration == latest:
            state += ", the last one"
        table.add_row(str(found.iteration), f"{found.size / 1e6:.1f}", state)
    Console().print(table)


@app.command("verify", epilog=example("checkpoint verify runs/quickstart"))
def verify_checkpoints(run: Folder) -> None:
    """Compare every file with the hash that was taken when it was written.

    Exits with 1 if a checkpoint is damaged.
    """
    folder, damaged = checkpoint.folder_of(run), 0
    for found in checkpoint.find(folder):
        if not found.is_complete:
            state = "incomplete: its save did not end, or goes on"
        elif not found.has_manifest:
            state = "cannot be verified: it was written without verify_integrity"
        else:
            state = f"damaged: {'; '.join(found.damage)}" if found.damage else "ok"
        damaged += bool(found.damage)
        typer.echo(f"{found.path}: {state}")
    if damaged:
        raise typer.Exit(1)


@app.command(
    "prune",
    epilog=example("checkpoint prune runs/quickstart --keep-last 3 --milestones 1000 --dry-run"),
)
def prune_checkpoints(
    run: Folder,
    keep_last: Annotated[
        int, typer.Option(min=1, help="The number of latest checkpoints that are kept.")
    ],
    milestones: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Also keep checkpoints whose iteration is a multiple of this number.",
            show_default="none",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be deleted, but delete nothing.")
    ] = False,
) -> None:
    """Delete the checkpoints that are neither among the latest nor milestones."""
    folder = checkpoint.folder_of(run)
    pruned = checkpoint.prune(
        folder, keep_last=keep_last, milestone_interval=milestones, dry_run=dry_run
    )
    for old in pruned:
        typer.echo(f"{'would delete' if dry_run else 'deleted'} {old.path}")
    kept = len(checkpoint.find(folder)) - (len(pruned) if dry_run else 0)
    typer.echo(f"{kept} checkpoints {'would stay' if dry_run else 'stay'} in {folder}")
