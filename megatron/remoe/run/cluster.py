"""Commands of `remoe launch` for other machines: a line for their shells, and a Slurm job."""

import os
import shlex
import sys
from pathlib import Path

from megatron.remoe.run import torchrun
from megatron.remoe.run.plan import Place

BATCH_SCRIPT = Path(__file__).with_name("pretrain.sbatch")
# A printed command reads from the environment what only the machines know.
_ENDPOINT = "$MASTER_ADDR:${MASTER_PORT:-29500}"


def endpoint_of_environment() -> str:
    """Return the `host:port` where the machines of a run meet.

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


def to_shell(argv: list[str], place: Place, *, name: str) -> str:
    """Return torchrun's command for a shell, one flag per line.

    Args:
        argv: The command line of every process.
        place: The machines; several of them read MASTER_ADDR where the command runs.
        name: Name of the rendezvous.
    """
    words = torchrun.command(
        argv,
        place.processes or 1,
        nodes=place.nodes,
        name=name,
        endpoint=_ENDPOINT,
        has_parent=False,
    )
    # Between double quotes the shell still expands the variables of the endpoint.
    quoted = [f'"{word}"' if _ENDPOINT in word else shlex.quote(word) for word in words]
    variables = torchrun.launch_environment().items()
    lines = [" ".join(f"{key}={shlex.quote(value)}" for key, value in variables)]
    for word in quoted:
        if word.startswith("--") or word == "-m":
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return " \\\n  ".join(lines)


def sbatch(config: Path, arguments: list[str], place: Place, *, name: str) -> list[str]:
    """Return the command that submits a run to Slurm.

    Slurm takes account, partition and time limit from its own SBATCH_* variables.

    Args:
        config: The config's file.
        arguments: What follows the config in `remoe launch`: overrides, and perhaps `--force`.
        place: The machines.
        name: Name of the job.
    """
    return [
        "sbatch",
        f"--job-name={name}",
        f"--nodes={place.nodes}",
        f"--gpus-per-node={place.processes}",
        f"--export=ALL,REMOE_PYTHON={sys.executable}",
        str(BATCH_SCRIPT),
        str(config),
        *arguments,
    ]
