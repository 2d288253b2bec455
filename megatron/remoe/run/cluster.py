"""`remoe launch`: the torchrun or Slurm command of a run on one or many machines."""

import os
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.remoe.run.config import RunConfig

# Stands in a printed command for what only the machines know.
_ENDPOINT = "$MASTER_ADDR:${MASTER_PORT:-29500}"
# A run that receives this signal saves a checkpoint and exits with 0. Not SIGTERM, on which the
# torchrun agent ends its workers itself, after 30 seconds, and returns 1.
_STOP = {"exit_signal_handler": True, "exit_signal": "SIGUSR1"}


@dataclass(frozen=True)
class Cluster:
    """Machines and their GPUs."""

    nodes: int
    gpus_per_node: int

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node


def for_cluster(config: RunConfig, cluster: Cluster, *, gpus: bool) -> RunConfig:
    """The config as it runs on a cluster.

    Args:
        config: a run.
        cluster: where it will run.
        gpus: whether it will run on GPUs, whatever this machine has.
    """
    defaults = dict(_STOP)
    if gpus:
        defaults["distributed_backend"] = "nccl"
    return replace(config, nproc=cluster.gpus_per_node, flags=defaults | config.flags)


def environment() -> dict[str, str]:
    """Environment variables that Megatron needs, unless they are set already."""
    needed = {
        # one queue per device, so that communication starts in the order in which it is launched
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        # torchrun's own default, which it announces with a warning
        "OMP_NUM_THREADS": "1",
    }
    return {name: os.environ.get(name, value) for name, value in needed.items()}


def torchrun(argv: list[str], cluster: Cluster, *, name: str, endpoint: str) -> list[str]:
    """The command that every machine runs; ranks find each other at `endpoint`.

    Args:
        argv: the run's command line.
        cluster: machines and GPUs.
        name: of the rendezvous, the same on all machines of a run and on no other's.
        endpoint: host:port of one of the machines; unused on a single one.
    """
    meeting = ["--standalone"]
    if cluster.nodes > 1:
        meeting = [
            f"--nnodes={cluster.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-id={name}",
            f"--rdzv-endpoint={endpoint}",
        ]
    run = ["-m", "torch.distributed.run", *meeting, f"--nproc-per-node={cluster.gpus_per_node}"]
    return [sys.executable, "-W", "ignore", *run, "-m", "megatron.remoe.pretrain", *argv]


def endpoint_of_environment() -> str:
    """Where the machines of a run meet.

    Raises:
        ValueError: MASTER_ADDR is not set.
    """
    address = os.environ.get("MASTER_ADDR")
    if not address:
        raise ValueError(
            "MASTER_ADDR is not set, which several machines need to find each other; set it to the "
            "first machine's name on all of them (scripts/pretrain.sbatch does), or use --slurm"
        )
    return f"{address}:{os.environ.get('MASTER_PORT', '29500')}"


def to_shell(argv: list[str], cluster: Cluster, *, name: str) -> str:
    """The command as a line for a shell, a flag per line; reads MASTER_ADDR where it runs."""
    words = torchrun(argv, cluster, name=name, endpoint=_ENDPOINT)
    # Between double quotes the shell still expands the variables of the endpoint.
    quoted = [f'"{word}"' if _ENDPOINT in word else shlex.quote(word) for word in words]
    lines = [" ".join(f"{key}={shlex.quote(value)}" for key, value in environment().items())]
    for word in quoted:
        if word.startswith("--") or word == "-m":
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return " \\\n  ".join(lines)


def scripts_folder() -> Path:
    """Where the shell launchers are: $REMOE_SCRIPTS, or beside this checkout's packages.

    Raises:
        ValueError: they are in neither place.
    """
    folder = Path(os.environ.get("REMOE_SCRIPTS", Path(__file__).parents[3] / "scripts"))
    if not (folder / "pretrain.sbatch").is_file():
        raise ValueError(
            f"{folder / 'pretrain.sbatch'} does not exist; the installed package has no scripts, "
            f"so set REMOE_SCRIPTS to the scripts/ folder of a checkout"
        )
    return folder.resolve()


def sbatch(config: Path, overrides: list[str], cluster: Cluster, *, name: str) -> list[str]:
    """The command that submits a run; account, partition and time come from SBATCH_* variables."""
    scripts = scripts_folder()
    return [
        "sbatch",
        f"--job-name={name}",
        f"--nodes={cluster.nodes}",
        f"--gpus-per-node={cluster.gpus_per_node}",
        f"--export=ALL,REMOE_SCRIPTS={scripts}",
        str(scripts / "pretrain.sbatch"),
        str(config),
        *overrides,
    ]
