"""Run lm-evaluation-harness on an exported model, in a process of its own.

    python -m megatron.remoe.evaluate.harness REQUEST.json RESULTS.json

The harness asks torch for a GPU, and would take Megatron's CPU stand-in for one in this process.
`run` starts the process, and raises a user's mistake as `ValueError`.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.remoe.evaluate.published import TASKS

_OF_A_GROUP = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
PAPER = "paper"  # stands for all tasks of the paper


@dataclass(frozen=True)
class Request:
    """What to evaluate.

    Attributes:
        model: Hugging Face folder, run or checkpoint.
        tasks: names of tasks, as the harness knows them, or `paper`.
        include: folder of more tasks.
        limit: largest number of documents of each task; None is all.
        batch_size: number of sequences at a time.
        dtype: dtype of the model, as torch names it.
        tokenizer: tokenizer to use instead of the one that a run names.
        budget: fields of the model's config that replace its own budget of active experts.
    """

    model: str
    tasks: list[str]
    include: str | None = None
    limit: int | None = None
    batch_size: int = 8
    dtype: str = "float32"
    tokenizer: str | None = None
    budget: dict[str, Any] | None = None


def run(request: Request) -> dict[str, dict[str, float]]:
    """Evaluate in a new process.

    Returns:
        The metrics of every task, such as `acc`, `acc_norm` and `perplexity`, and their `_stderr`.

    Raises:
        ValueError: a task is unknown, its data cannot be loaded, or there is no such model.
    """
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer = Path(scratch) / "request.json", Path(scratch) / "results.json"
        asked.write_text(json.dumps(asdict(request)))
        command = [sys.executable, "-m", __name__, str(asked), str(answer)]
        # Without this, the harness would try to join a process group of this process.
        alone = {k: v for k, v in os.environ.items() if k not in _OF_A_GROUP}
        done = subprocess.run(command, env=alone)
        if done.returncode or not answer.is_file():
            raise RuntimeError(f"the harness failed with exit code {done.returncode}; see above")
        result = json.loads(answer.read_text())
    if "error" in result:
        raise ValueError(result["error"])
    metrics: dict[str, dict[str, float]] = result["metrics"]
    return metrics


def evaluate(request: Request) -> dict[str, dict[str, float]]:
    """Evaluate in this process; see `run`."""
    try:
        import lm_eval
    except ImportError:
        raise ValueError(
            "lm-evaluation-harness is not installed; run: pip install 'remoe[eval]'"
        ) from None
    import torch

    tasks = [name for task in request.tasks for name in (TASKS if task == PAPER else (task,))]
    manager = _manager(tasks, request.include)
    _fetch(manager, tasks)
    from megatron.remoe.convert.exported import exported_with_tokenizer, with_budget

    tokenizer = Path(request.tokenizer) if request.tokenizer else None
    with (
        exported_with_tokenizer(Path(request.model), tokenizer, check=True) as plain,
        with_budget(plain, request.budget) as folder,
    ):
        results: Any = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(folder), "dtype": request.dtype},
            tasks=tasks,
            task_manager=manager,
            batch_size=request.batch_size,
            device="cuda" if torch.cuda.is_available() else "cpu",
            limit=request.limit,
            log_samples=False,
            bootstrap_iters=1000,
        )
    return {task: _plain(values) for task, values in results["results"].items()}


def _manager(tasks: list[str], include: str | None) -> Any:
    """Return the harness's index of tasks.

    The thousands of its own tasks are read only if `include` does not have all tasks.

    Raises:
        ValueError: a task is unknown.
    """
    import difflib

    from lm_eval.tasks import TaskManager

    if include is not None:
        if not Path(include).is_dir():
            raise ValueError(f"{include} is no folder of tasks; make one with remoe data cloze")
        manager = TaskManager(include_path=include, include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=include)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, [PAPER, *TASKS, *manager.all_tasks], n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"unknown task {task!r}; {hint}The paper's tasks are {', '.join(TASKS)}; "
                f"remoe data cloze makes a local one (--include-path)"
            )
    return manager


def _fetch(manager: Any, tasks: list[str]) -> None:
    """Load the data of all tasks before the model.

    Raises:
        ValueError: the data of a task is not on this machine and cannot be downloaded.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # an error of its client

    for task in tasks:
        try:
            manager.load([task])
        except (OSError, HTTPError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"the data of task {task!r} is not here and cannot be downloaded ({reason}); run "
                f"this once where there is a network and copy its cache (HF_HOME), or evaluate on "
                f"a local task (remoe data cloze)"
            ) from error


def _plain(values: dict[str, Any]) -> dict[str, float]:
    """Turn `{"acc,none": 0.5}` into `{"acc": 0.5}`; leave out what is not a metric."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if key.endswith(",none") and isinstance(value, int | float)
    }


def main(asked: str, answer: str) -> int:
    """Evaluate the request in one JSON file, and write metrics or an error to another."""
    logging.disable(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    request = Request(**json.loads(Path(asked).read_text()))
    try:
        result: dict[str, Any] = {"metrics": evaluate(request)}
    except ValueError as error:
        result = {"error": str(error)}
    Path(answer).write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
