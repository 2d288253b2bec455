"""`remoe verify resume --kills N`: a run that is killed at random moments ends as if it was not.

The run is a real one, with torchrun, two expert-parallel ranks, the distributed optimizer and
asynchronous saves. Most kills come at any moment after the start. The others come soon after a
checkpoint, while steps and saves go on. The victim is torchrun, a rank, the process of a rank that
writes a checkpoint, or all of them.
"""

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.remoe import checkpoint, processes
from megatron.remoe.run.config import RunConfig

_NOT_COMPARED = ("tokens_per_second", "peak_memory")
_SECONDS_TO_END = 60  # torchrun gives the ranks 30
_SECONDS_TO_NOTICE = 5
_FLAGS: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64,
    "seq_length": 32, "max_position_embeddings": 32, "swiglu": True, "normalization": "RMSNorm",
    "disable_bias_linear": True, "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope", "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "no_create_attention_mask_in_dataloader": True,
    "moe_relu_routing": True, "num_experts": 4, "moe_router_topk": 1,
    "moe_relu_l1_reg_coeff_init": 0.01, "expert_model_parallel_size": 2,
    "moe_token_dispatcher_type": "alltoall", "use_distributed_optimizer": True,
    "micro_batch_size": 2, "global_batch_size": 8, "train_iters": 60, "lr": 1.0e-3,
    "lr_decay_style": "cosine", "clip_grad": 1.0, "log_interval": 1, "num_workers": 0,
    "eval_iters": 1, "eval_interval": 28, "mock_data": True, "tokenizer_type": "NullTokenizer",
    "vocab_size": 127, "async_save": True, "save_interval": 3, "save_keep_last": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Kill:
    """What was killed, and when.

    Attributes:
        victim: "torchrun", "rank", "writer" or "all".
        seconds: time since the start.
        iteration: iteration of the last row of metrics at that moment, or 0 if there was none.
        in_save: whether a checkpoint was incomplete at that moment.
    """

    victim: str
    seconds: float
    iteration: int
    in_save: bool


@dataclass(frozen=True)
class KilledRun:
    """A killed run, compared with one that was not killed.

    Attributes:
        kills: the kills, in order.
        rows: number of rows of metrics that were compared.
        difference: largest difference of any number in any row.
        problem: why rows cannot be compared, because some are missing, doubled or of another kind;
            None if they can.
    """

    kills: list[Kill]
    rows: int
    difference: float
    problem: str | None

    @property
    def ok(self) -> bool:
        """Whether the runs are equal."""
        return self.problem is None and self.difference == 0


def verify(
    folder: Path, kills: int, *, seed: int, report: Callable[[str], None] = print
) -> KilledRun:
    """Train a run once without kills and once with them, and compare the two.

    Args:
        folder: an empty folder for the two runs.
        kills: number of kills.
        seed: seed of the moments and victims.
        report: called with a line about each event.

    Raises:
        RuntimeError: a run failed although nobody killed it.
    """
    rng = random.Random(seed)
    whole, killed = _prepare(folder / "whole"), _prepare(folder / "killed")
    started = time.monotonic()
    _run_to_end(folder / "whole", whole)
    duration = time.monotonic() - started
    report(f"the run without kills: {duration:.0f} s")
    done: list[Kill] = []
    while len(done) < kills:
        kill = _run_and_kill(folder / "killed", killed, rng, duration)
        if kill is None:
            _start_again(folder / "killed")
            continue
        done.append(kill)
        saving = ", in a save" if kill.in_save else ""
        when = f"after {kill.seconds:.1f} s, at iteration {kill.iteration}{saving}"
        report(f"kill {len(done)}: {kill.victim} {when}")
    _run_to_end(folder / "killed", killed)
    return compare(folder / "whole", folder / "killed", done)


def compare(whole: Path, killed: Path, kills: list[Kill]) -> KilledRun:
    """Compare the metrics of two run directories, row by row."""
    ours, theirs = ([*map(json.loads, _lines(run))] for run in (killed, whole))
    try:
        difference, problem = _largest_difference(ours, theirs), None
    except ValueError as error:
        difference, problem = math.nan, str(error)
    return KilledRun(kills, len(theirs), difference, problem)


def _largest_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    positions = [[(row["iteration"], row.get("split")) for row in rows] for rows in (ours, theirs)]
    if positions[0] != positions[1]:
        raise ValueError("rows are missing or doubled")
    largest = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.keys() != b.keys():
            raise ValueError(f"row {a} has other keys than {b}")
        for key in a.keys() - {"split", *_NOT_COMPARED}:
            a_values, b_values = (v if isinstance(v, list) else [v] for v in (a[key], b[key]))
            if len(a_values) != len(b_values):
                raise ValueError(f"{key} differs in length")
            largest = max([largest, *(abs(x - y) for x, y in zip(a_values, b_values, strict=True))])
    return largest


def _lines(run: Path) -> list[str]:
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def _prepare(run: Path) -> list[str]:
    from megatron.remoe.run import launch, torchrun

    planned = launch.prepare(RunConfig(run, 2, dict(_FLAGS)))
    return torchrun.command(planned.argv, planned.config.nproc or 1)


def _start(run: Path, command: list[str]) -> subprocess.Popen[bytes]:
    environment = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment[processes.PARENT] = str(os.getpid())
    with (run / "log.txt").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _run_to_end(run: Path, command: list[str]) -> None:
    if code := _start(run, command).wait():
        raise _failure(run, code)


def _failure(run: Path, code: int) -> RuntimeError:
    lines = (run / "log.txt").read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("remoe: error")][-3:]
    what = errors or lines[-25:]
    return RuntimeError(f"the run failed although nobody killed it (exit code {code}): {what}")


def _run_and_kill(
    run: Path, command: list[str], rng: random.Random, duration: float
) -> Kill | None:
    """Start a run and kill it at a random moment; return None if it ended before that moment."""
    folder = run / "checkpoints"
    before = checkpoint.tracked(folder)
    process = _start(run, command)
    started = time.monotonic()
    if rng.random() < 0.7:
        moment = rng.uniform(0, duration)
    else:
        while process.poll() is None and checkpoint.tracked(folder) == before:
            time.sleep(0.05)
        moment = time.monotonic() - started + rng.uniform(0, duration / 8)
    while process.poll() is None and time.monotonic() - started < moment:
        time.sleep(0.01)
    if process.poll() is not None:
        if process.returncode != 0:
            raise _failure(run, process.returncode)
        return None
    kill = _kill(run, process, rng, time.monotonic() - started)
    process.wait(_SECONDS_TO_END)
    return kill


def _kill(run: Path, process: subprocess.Popen[bytes], rng: random.Random, seconds: float) -> Kill:
    ranks = processes.children(process.pid)
    writers = [pid for rank in ranks for pid in processes.children(rank)]
    victims = {"torchrun": [process.pid], "all": [process.pid, *ranks, *writers]}
    if ranks:
        victims["rank"] = [rng.choice(ranks)]
    rows = [json.loads(line) for line in _lines(run) if line.endswith("}")]
    folder = run / "checkpoints"
    latest = checkpoint.tracked(folder) or 0
    in_save = any(found.iteration > latest for found in checkpoint.find(folder))
    if writers and in_save:
        victims["writer"] = [rng.choice(writers)]
    name = rng.choice(sorted(victims))
    for pid in victims[name]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if name == "writer":  # the run notices or goes on, and is ended too
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_NOTICE)
        process.kill()
    return Kill(name, seconds, max((row["iteration"] for row in rows), default=0), in_save)


def _start_again(run: Path) -> None:
    """Turn a finished run back to its first checkpoint, so that it can be killed again."""
    found = [c for c in checkpoint.find(run / "checkpoints") if c.is_complete]
    checkpoint.write_tracker(run / "checkpoints", found[0].iteration)
