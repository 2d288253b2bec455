"""The commands `remoe checkpoint ...`, which need neither torch nor Megatron."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron.remoe import checkpoint
from megatron.remoe.cli.common import AtLeastOneOrNone, command

app = typer.Typer(help="List, verify and prune the checkpoints of a run.", no_args_is_help=True)


@command(app, "list")
def list_checkpoints(run: Path) -> None:
    """List a run's checkpoints with their sizes, and say which of them are complete.

    Example: remoe checkpoint list runs/quickstart

    Args:
        run: A run directory, or a folder of checkpoints.
    """
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


@command(app, "verify")
def verify_checkpoints(run: Path) -> None:
    """Compare every file of the checkpoints with the hash that was stored at the save.

    Exits with 1 if a checkpoint is damaged.

    Example: remoe checkpoint verify runs/quickstart

    Args:
        run: A run directory, or a folder of checkpoints.
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


@command(app, "prune")
def prune_checkpoints(
    run: Path,
    keep_last: Annotated[int, typer.Option(min=1)],
    milestones: AtLeastOneOrNone = None,
    dry_run: bool = False,
) -> None:
    """Delete checkpoints that are neither among the latest ones nor milestones.

    Example: remoe checkpoint prune runs/quickstart --keep-last 3 --milestones 1000 --dry-run

    Args:
        run: A run directory, or a folder of checkpoints.
        keep_last: The number of latest checkpoints that are kept.
        milestones: Keep also those whose iteration is a multiple of this number, by default none.
        dry_run: List what would be deleted, but delete nothing.
    """
    folder = checkpoint.folder_of(run)
    pruned = checkpoint.prune(
        folder, keep_last=keep_last, milestone_interval=milestones, dry_run=dry_run
    )
    for old in pruned:
        typer.echo(f"{'would delete' if dry_run else 'deleted'} {old.path}")
    kept = len(checkpoint.find(folder)) - (len(pruned) if dry_run else 0)
    typer.echo(f"{kept} checkpoints {'would stay' if dry_run else 'stay'} in {folder}")
