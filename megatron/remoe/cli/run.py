"""The commands about runs.

They are examples, routers, describe, train, launch, sweep, plot, compare and doctor.
"""

from pathlib import Path
from typing import Annotated

import typer

from megatron.remoe.cli.common import AtLeastOne, ConfigFile, Words, command

app = typer.Typer()

_BUDGETS = {
    "l1": "adaptive L1 penalty",
    "fixed k": "fixed k",
    "threshold": "moving threshold",
    "none": "none",
}

Throughput = Annotated[float | None, typer.Option(min=0.001)]


@command(app)
def examples(copy: Path | None = None) -> None:
    """List the example configs, which commands take where there is no file of that name.

    Example: remoe examples --copy examples

    Args:
        copy: Copy them to this folder, to be edited, with the scripts and the notebook beside them.
            By default nothing is copied.
    """
    from megatron.remoe.run import examples as installed

    if copy is not None:
        installed.copy(copy)
        typer.echo(copy)
        return
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column(no_wrap=True), "", show_header=False, box=None)
    for path, sentence in installed.summaries():
        table.add_row(path, sentence)
    Console().print(table)


@command(app)
def routers(figure: Path | None = None) -> None:
    """List the routers that moe_routing takes: where they come from, and how they keep to k.

    Example: remoe routers --figure gates.svg

    Args:
        figure: Draw how the gate of an expert depends on its logit, for every router that selects
            experts, into this file (.svg or .png). By default nothing is drawn.
    """
    from rich.console import Console
    from rich.table import Column, Table

    from remoe.config import ROUTINGS

    table = Table(Column("name", no_wrap=True), "source", "causal", "budget", "state")
    for name, routing in ROUTINGS.items():
        causal = "yes" if routing.causal else "no"
        table.add_row(
            name, routing.source, causal, _BUDGETS[routing.budget], routing.state or "none"
        )
    Console().print(table)
    if figure is not None:
        from megatron.remoe.analysis.gates import draw_gates

        draw_gates(figure)


@command(app)
def describe(
    config: ConfigFile,
    overrides: Words = None,
    nodes: AtLeastOne = 1,
    gpus_per_node: AtLeastOne = 8,
    tflops: Throughput = None,
    tokens_per_second: Throughput = None,
) -> None:
    """Print a run's parameters, FLOPs, tokens and memory per GPU, and its hours at a throughput.

    Of a sweep, every run is a row of a table, and the last row is about all of them.

    Example: remoe describe examples/llama_182m/remoe.yaml --nodes 2 --tflops 100

    Args:
        config: The YAML file of a run, or of a sweep.
        tflops: The throughput of each GPU in TFLOP/s. By default no hours are printed.
        tokens_per_second: The throughput of the whole run in tokens per second. By default no hours
            are printed.
    """
    from rich.console import Console
    from rich.table import Column, Table

    from megatron.remoe import cpu
    from megatron.remoe.run import describe as about
    from megatron.remoe.run.config import load_config
    from megatron.remoe.run.sweep import is_sweep

    cpu.prepare_megatron()
    if tflops is not None and tokens_per_second is not None:
        raise ValueError("--tflops and --tokens-per-second are both given; give one throughput")
    world, speed = nodes * gpus_per_node, {"tflops": tflops, "tokens_per_second": tokens_per_second}
    if is_sweep(config):
        if overrides:
            raise ValueError(f"{overrides[0]!r} is given with a sweep; write it into {config}")
        columns, *rows = about.sweep_table(about.describe_sweep(config, world), **speed)
        table = Table(Column(columns[0], no_wrap=True), *columns[1:])
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        typer.echo(
            f"GPUs of a run: {world}; memory is that of the fullest one with the dense warm-up, "
            f"and fits is the smallest GPU of {', '.join(map(str, about.GPUS_GB))} GB of which "
            f"{about.MARGIN:.0%} stays free"
        )
        return
    description = about.describe(load_config(config, overrides), world)
    lines = description.rows()
    hours = description.hours(**speed)
    if hours is not None:
        lines.append(("hours at this throughput", f"{hours:.2f}"))
    table = Table(show_header=False)
    for name, value in lines:
        table.add_row(name, value)
    Console().print(table)


@command(app)
def train(
    config: ConfigFile, overrides: Words = None, nproc: int | None = None, force: bool = False
) -> None:
    """Check a config, train it on this machine, show the progress and draw the curves.

    The same command continues an interrupted run from its last checkpoint.

    Example: remoe train examples/quickstart.yaml moe_granularity=4 lr=5e-4 --nproc 2

    Args:
        nproc: The number of processes on this machine, by default the config's nproc, or one per
            GPU.
        force: Continue the run in the run directory although its settings differ.
    """
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


@command(app)
def launch(
    config: ConfigFile,
    overrides: Words = None,
    nodes: AtLeastOne = 1,
    gpus_per_node: AtLeastOne = 8,
    slurm: bool = False,
    dry_run: bool = False,
    force: bool = False,
) -> None:
    """Check a config, and train it on one or many machines or submit it to Slurm.

    For several machines, run the same command on each of them, or once with --slurm. The command
    stays until the run ends. When it receives SIGTERM or SIGUSR1, the run saves a checkpoint and
    ends.

    Example: remoe launch examples/llama_978m/remoe.yaml --nodes 4 --slurm --dry-run

    Args:
        slurm: Submit the run to Slurm instead of starting it here.
        dry_run: Check the config and print the command, but do not run it. The data need not exist
            on this machine.
        force: Continue the run in the run directory although its settings differ.
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


@command(app)
def sweep(
    file: ConfigFile,
    jobs: AtLeastOne = 1,
    only: str | None = None,
    slurm: bool = False,
    nodes: AtLeastOne = 1,
    gpus_per_node: AtLeastOne = 8,
    dry_run: bool = False,
) -> None:
    """Train every run of a sweep that is not finished yet.

    Exits with 1 if a run failed. The numbers of machines and of their GPUs are used with --slurm
    only.

    Example: remoe sweep examples/ablations/routers.yaml --jobs 2 --only 'remoe-*'

    Args:
        file: The YAML file of the sweep, with the keys base and sweep.
        jobs: The number of runs that train at a time on this machine.
        only: Train only the runs whose names contain this or match it as a pattern (*, ?). By
            default all runs train.
        slurm: Submit a Slurm job for each run instead.
        dry_run: Check everything and list the runs, but train none.
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


@command(app)
def plot(run_dir: Path, out: Path | None = None) -> None:
    """Draw the loss, the sparsity and the coefficient of a run over its steps.

    Example: remoe plot runs/quickstart --out curves.png

    Args:
        run_dir: The run directory whose curves are drawn.
        out: The PNG file to write, by default curves.png in the run directory.
    """
    from megatron.remoe.analysis.plots import plot_curves
    from megatron.remoe.analysis.runs import Run

    out = out or run_dir / "curves.png"
    plot_curves(Run.load(run_dir), out)
    typer.echo(out)


@command(app)
def compare(
    runs: list[Path],
    out: Path | None = None,
    baseline: Path | None = None,
    margin: float = 0.05,
) -> None:
    """Compare runs by tables, by paired differences between routers, and by the paper's figures.

    Speed is not compared, since runs often share a machine; remoe bench measures it.

    Example: remoe compare runs/routers --out docs/results/routers

    Args:
        runs: The run directories, or folders of run directories.
        out: The folder to which table.md, table.csv and figures are written. By default the tables
            are only printed.
        baseline: The run with which runs of the same router but other settings are compared. By
            default only routers are compared with each other.
        margin: The smallest difference in validation loss that matters, in nats. Two routers are
            equivalent if they differ by less, by two one-sided tests at 5%. State it before you see
            the runs.
    """
    from megatron.remoe.analysis import compare as tables
    from megatron.remoe.analysis import figures

    loaded = tables.load_runs(runs)
    comparison = tables.compare(loaded, baseline, margin)
    table = comparison.to_markdown()
    typer.echo(table)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "table.md").write_text(table + "\n")
        (out / "table.csv").write_text(comparison.to_csv())
        for path in figures.draw_all(comparison, out):
            typer.echo(path)


@command(app)
def doctor() -> None:
    """Report what this machine has, what will be used of it, and what is disabled and why.

    Example: remoe doctor
    """
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
