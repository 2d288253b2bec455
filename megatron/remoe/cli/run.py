"""The commands about runs: describe, train, launch, sweep, plot, compare and doctor."""

from pathlib import Path
from typing import Annotated

import typer

from megatron.remoe.cli.common import Config, ForceRun, GPUsPerNode, Nodes, Overrides, example

app = typer.Typer()


@app.command(epilog=example("describe examples/llama_182m/remoe.yaml --nodes 2 --tflops 100"))
def describe(
    config: Config,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: GPUsPerNode = 8,
    tflops: Annotated[
        float | None,
        typer.Option(min=0.001, help="The throughput of each GPU in TFLOP/s, to print hours."),
    ] = None,
    tokens_per_second: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="The throughput of the whole run in tokens per second, to print hours."
        ),
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


@app.command(epilog=example("train examples/quickstart.yaml moe_granularity=4 lr=5e-4 --nproc 2"))
def train(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[
        int | None,
        typer.Option(
            help="The number of processes on this machine.",
            show_default="the config's nproc, or one per GPU",
        ),
    ] = None,
    force: ForceRun = False,
) -> None:
    """Train on this machine: check everything, start torchrun, show progress, draw curves."""
    from rich.console import Console

    from megatron.remoe import cpu
    from megatron.remoe.run import launch, progress
    from megatron.remoe.run.config import load_config

    cpu.prepare_megatron()
    console = Console()
    more = [] if nproc is None else [f"nproc={nproc}"]
    resolved = load_config(config, [*(overrides or []), *more])
    with console.status("checking the configuration"):
        planned = launch.prepare(resolved, force=force)
    run = planned.config
    console.print(f"{run.run_dir}: {run.nproc} processes, output in log.txt", highlight=False)
    if code := launch.train(run, planned.argv, console):
        raise typer.Exit(code)
    progress.summarize(run.run_dir, console)


@app.command(
    epilog=example(
        "launch examples/llama_978m/remoe.yaml expert_model_parallel_size=8 --nodes 4 --dry-run"
    )
)
def launch(
    config: Config,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: GPUsPerNode = 8,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Submit the run to Slurm instead of starting it here.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Only print the command. The data need not exist on this machine."
        ),
    ] = False,
    force: ForceRun = False,
) -> None:
    """Run a config on one or many machines: check everything, then start torchrun or submit a job.

    With several machines the same command runs on each of them, or Slurm runs it there. SIGTERM or
    SIGUSR1 lets the run save a checkpoint and end.
    """
    import signal

    from megatron.remoe.run.torchrun import Stop

    stop = Stop()  # A signal that comes during the checks is not lost.
    with stop.when(signal.SIGTERM, signal.SIGUSR1):
        import shlex
        import subprocess

        from megatron.remoe import cpu
        from megatron.remoe.run import cluster
        from megatron.remoe.run import launch as local
        from megatron.remoe.run.config import load_config
        from megatron.remoe.run.plan import Place, plan

        cpu.prepare_megatron()
        run = load_config(config, overrides)
        name = f"{run.run_dir.parent.name}-{run.run_dir.name}".lstrip("-")
        if not slurm and not dry_run:
            here = Place(nodes, gpus_per_node)
            endpoint = cluster.endpoint_of_environment() if nodes > 1 else ""
            planned = local.prepare(run, here, force=force)
            raise typer.Exit(local.launch(planned, here, name=name, endpoint=endpoint, stop=stop))
    place = Place(nodes, gpus_per_node, "print" if dry_run else "submit")
    planned = plan(run, place)
    arguments = [*(overrides or []), *(["--force"] if force else [])]
    command = cluster.sbatch(config, arguments, place, name=name)
    if dry_run:
        shell = cluster.to_shell(planned.argv, place, name=name)
        typer.echo(shlex.join(command) if slurm else shell)
        return
    try:
        raise typer.Exit(subprocess.call(command))
    except FileNotFoundError:
        raise ValueError(
            f"{command[0]} is not installed here; run this where Slurm is, or leave --slurm out"
        ) from None


@app.command(epilog=example("sweep examples/ablations/routers.yaml --jobs 2 --only 'remoe-*'"))
def sweep(
    file: Annotated[
        Path, typer.Argument(help="The YAML file of the sweep, with the keys base and sweep.")
    ],
    jobs: Annotated[
        int, typer.Option(min=1, help="The number of runs that train at a time on this machine.")
    ] = 1,
    only: Annotated[
        str | None,
        typer.Option(
            help="Train only runs whose names contain this or match it as a pattern (*, ?).",
            show_default="all runs",
        ),
    ] = None,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Submit a Slurm job for each run instead.")
    ] = False,
    nodes: Nodes = 1,
    gpus_per_node: GPUsPerNode = 8,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and list the runs, but train none.")
    ] = False,
) -> None:
    """Train every run of a sweep that is not finished yet. Exits with 1 if a run failed.

    The numbers of machines and of their GPUs are only used with --slurm.
    """
    from rich.console import Console

    from megatron.remoe import cpu
    from megatron.remoe.run import sweep_jobs
    from megatron.remoe.run.plan import Place
    from megatron.remoe.run.sweep import load_sweep

    cpu.prepare_megatron()
    console = Console()
    place = Place(nodes, gpus_per_node, "submit") if slurm else Place()
    with console.status("checking every run"):
        runs = load_sweep(file, only=only, place=place)
    if dry_run:
        for run in runs:
            state = "finished" if sweep_jobs.is_finished(run) else "to do"
            typer.echo(f"{run.config.run_dir}: {state}")
        return
    if slurm:
        outcome = sweep_jobs.submit(runs, place, typer.echo)
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


@app.command(epilog=example("plot runs/quickstart --out curves.png"))
def plot(
    run_dir: Annotated[Path, typer.Argument(help="The run directory.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The PNG file to write.", show_default="curves.png in the run directory"),
    ] = None,
) -> None:
    """Draw loss, sparsity and coefficient of a run."""
    from megatron.remoe.analysis.plots import plot_curves
    from megatron.remoe.analysis.runs import Run

    out = out or run_dir / "curves.png"
    plot_curves(Run.load(run_dir), out)
    typer.echo(out)


@app.command(epilog=example("compare runs/routers --out docs/results/routers"))
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="The run directories, or folders of run directories.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The folder to which table.md, table.csv and figures are written.",
            show_default="only the table is printed",
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="The run whose router, with its settings, is compared with others of that router."
        ),
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


@app.command(epilog=example("doctor"))
def doctor() -> None:
    """Report what this machine has, what will be used of it, and what is disabled and why."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from megatron.remoe import cpu
    from megatron.remoe.run.doctor import examine

    cpu.prepare_megatron()
    colors = {"ok": "green", "disabled": "yellow", "missing": "red"}
    table = Table(show_header=False)
    for finding in examine():
        status = f"[{colors[finding.status]}]{finding.status}[/]"
        table.add_row(finding.subject, status, escape(finding.detail))
    Console().print(table)
