"""Commands about runs as experiments: describe, launch, sweep, compare. `cli` puts them in."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[Path, typer.Argument(help="YAML file of Megatron's flags.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value ...")]


def describe(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each machine.")] = 8,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Throughput per GPU, in TFLOP/s.")
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(min=0.001, help="Throughput of the whole run.")
    ] = None,
) -> None:
    """Print a run's parameters, FLOPs, tokens, memory per GPU and, at a throughput, its hours."""
    from rich.console import Console
    from rich.table import Table

    from megatron.remoe import cpu
    from megatron.remoe.run.config import load_config
    from megatron.remoe.run.describe import describe as run

    cpu.prepare_megatron()
    if tflops is not None and tokens_per_second is not None:
        raise ValueError("--tflops and --tokens-per-second are both given; give one throughput")
    description = run(load_config(config, overrides), nodes * gpus_per_node)
    rows = description.rows()
    hours = description.hours(tflops=tflops, tokens_per_second=tokens_per_second)
    if hours is not None:
        rows.append(("hours at this throughput", f"{hours:.2f}"))
    table = Table(show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)


def launch(
    config: Config,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of each machine.")] = 8,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit it to Slurm.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command; data need not exist here.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Continue a run with other settings.")
    ] = False,
) -> None:
    """Run a config on one or many machines: checks everything, then becomes torchrun or sbatch."""
    import os
    import shlex

    from megatron.remoe import cpu
    from megatron.remoe.arguments import megatron_parser
    from megatron.remoe.run import cluster
    from megatron.remoe.run import launch as local
    from megatron.remoe.run.argv import to_argv
    from megatron.remoe.run.check import check
    from megatron.remoe.run.config import load_config

    cpu.prepare_megatron()
    machines = cluster.Cluster(nodes, gpus_per_node)
    elsewhere = slurm or dry_run
    run = load_config(config, overrides)
    run = cluster.for_cluster(run, machines, gpus=elsewhere or not cpu.is_enabled())
    name = f"{run.run_dir.parent.name}-{run.run_dir.name}".lstrip("-")
    if elsewhere:
        argv = to_argv(local.complete(run).flags, megatron_parser())
        check(argv, machines.world, paths=not dry_run)
        command = cluster.sbatch(config, overrides or [], machines, name=name) if slurm else []
        if dry_run:
            text = shlex.join(command) if slurm else cluster.to_shell(argv, machines, name=name)
            typer.echo(text)
            return
    else:
        endpoint = cluster.endpoint_of_environment() if nodes > 1 else ""
        _, argv = local.prepare(run, force=force, nodes=nodes)
        command = cluster.torchrun(argv, machines, name=name, endpoint=endpoint)
        os.environ.update(cluster.environment())
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        raise ValueError(
            f"{command[0]} is not installed here; run this where Slurm is, or leave --slurm out"
        ) from None


def sweep(
    file: Annotated[Path, typer.Argument(help="YAML file with base: and sweep:.")],
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time on this machine.")] = 1,
    only: Annotated[
        str | None, typer.Option(help="Runs whose names match (*, ?) or contain this.")
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit a job for each run.")] = False,
    nodes: Annotated[int, typer.Option(min=1, help="Machines of a run, with --slurm.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Their GPUs, with --slurm.")] = 8,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and list the runs.")
    ] = False,
) -> None:
    """Train every run of a sweep; goes on where it stopped. Exits with 1 if a run failed."""
    from rich.console import Console

    from megatron.remoe import cpu
    from megatron.remoe.run import sweep_jobs
    from megatron.remoe.run.cluster import Cluster
    from megatron.remoe.run.sweep import load_sweep

    cpu.prepare_megatron()
    console = Console()
    with console.status("checking every run"):
        machines = Cluster(nodes, gpus_per_node) if slurm else None
        runs = load_sweep(file, only=only, machines=machines)
    if dry_run:
        for run in runs:
            state = "finished" if sweep_jobs.is_finished(run) else "to do"
            typer.echo(f"{run.config.run_dir}: {state}")
        return
    if machines is not None:
        outcome = sweep_jobs.submit(runs, machines, typer.echo)
    else:
        try:
            outcome = sweep_jobs.run_here(runs, jobs, console)
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command goes on from here", err=True)
            raise typer.Exit(130) from None
    typer.echo(f"{len(outcome.finished)} of {len(runs)} runs " + ("are in" if slurm else "done"))
    for name, reason in outcome.failed.items():
        typer.echo(f"failed: {name}: {reason}", err=True)
    if outcome.failed:
        raise typer.Exit(1)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or folders of them.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of table.md, table.csv and figures.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="One of the runs; compare others of its router with its settings."),
    ] = None,
) -> None:
    """Compare runs: a table, paired differences between routers, and figures as in the paper."""
    from megatron.remoe.analysis import compare as tables
    from megatron.remoe.analysis import figures

    loaded = tables.load_runs(runs)
    comparison = tables.compare(loaded, baseline)
    table = comparison.to_markdown()
    typer.echo(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text(table + "\n")
        (out / "table.csv").write_text(comparison.to_csv())
        for path in figures.draw_all(comparison, out):
            typer.echo(path)


def register(app: typer.Typer) -> None:
    for command in (describe, launch, sweep, compare):
        app.command()(command)
