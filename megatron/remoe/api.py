"""Train from Python, and read what a run has written: `remoe.train` and `remoe.load_run`.

    run = remoe.train("examples/quickstart.yaml", moe_granularity=4, lr=5e-4)
    run.metrics["lm_loss"], run.evaluations["valid"]["lm_loss"]
    run.export("model")

A run trains in processes of its own, by the same command as in a shell. Neither Megatron nor a
stand-in for `torch.cuda` comes into the caller's process, so that a notebook goes on as before.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron.remoe import processes
from megatron.remoe.analysis import runs
from megatron.remoe.run.config import load_config, load_flags

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """A run directory.

    Attributes:
        path: The run directory.
    """

    path: Path

    @cached_property
    def _read(self) -> runs.Run:
        return runs.Run.load(self.path)

    @property
    def config(self) -> dict[str, Any]:
        """The flags of the run as its `config.yaml` has them, with those that were added."""
        return dict(self._read.config)

    @cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """The logged training steps: arrays by name, whose first axis is that of `iteration`.

        Values by layer (`*_per_layer`) are `[steps, layers]`, and lists of layers (`dense_layers`,
        `silent_layers`) stay lists. What a row lacks, or was not finite, is NaN.
        """
        return _arrays(self._read.train)

    @cached_property
    def evaluations(self) -> dict[str, dict[str, np.ndarray]]:
        """The evaluations by split, such as "valid" or "valid/code", each as in `metrics`."""
        by_split: dict[str, Rows] = {}
        for row in self._read.evaluations:
            of_split = by_split.setdefault(row["split"], [])
            of_split.append({key: value for key, value in row.items() if key != "split"})
        return {split: _arrays(rows) for split, rows in by_split.items()}

    def export(self, out: Path | str, *, force: bool = False, **options: Any) -> Path:
        """Write the last checkpoint to a folder for transformers, and return the folder.

        Args:
            out: The folder to make.
            force: Whether to replace the folder.
            options: Those of `megatron.remoe.convert.export.to_hf`, such as `dtype`.

        Raises:
            ValueError: There is no checkpoint, the model cannot be exported, or `out` is not empty.
        """
        from megatron.remoe.convert.export import to_hf

        to_hf(self.path, Path(out), force=force, **options)
        return Path(out)

    def plot(self, out: Path | str | None = None) -> Path:
        """Draw loss, sparsity and coefficient over the steps, and return the PNG file.

        Args:
            out: The file to write; None is `curves.png` in the run directory.
        """
        from megatron.remoe.analysis.plots import plot_curves

        path = self.path / "curves.png" if out is None else Path(out)
        plot_curves(self._read, path)
        return path


def load_run(path: Path | str) -> Run:
    """Return the run of a run directory, which may still be training.

    What is read stays as it is; load the run again to see later steps.

    Raises:
        ValueError: The folder is not a run directory, has no step yet, or has a damaged file.
    """
    run = Run(Path(path))
    assert run._read
    return run


def train(config: Path | str | Mapping[str, Any], *, force: bool = False, **overrides: Any) -> Run:
    """Check a config, train it on this machine to its end, and return the run.

    The same call continues an interrupted run from its last checkpoint. Progress is printed. An
    interrupt (Ctrl-C, or the stop button of a notebook) lets the run save a checkpoint first.

    Args:
        config: A YAML file of Megatron's flags, or the mapping that it would hold. A mapping needs
            `run_dir`, the folder of the run, and `base` in it is relative to the working directory.
        force: Continue the run in the run directory although its settings differ.
        overrides: Flags that replace those of the config; None leaves a flag out.

    Raises:
        ValueError: The run would reject the config; the message is one line.
        RuntimeError: The run failed after its start; the message has the end of its log.
    """
    resolved = _resolved(config, overrides)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "config.yaml"
        path.write_text(resolved.to_yaml())
        _run(["train", str(path), *(["--force"] if force else [])])
    return load_run(resolved.run_dir)


def _resolved(config: Path | str | Mapping[str, Any], overrides: dict[str, Any]) -> Any:
    if isinstance(config, Mapping):
        flags = dict(config) | overrides
        if not flags.get("run_dir"):
            raise ValueError("the config has no run_dir; name the folder of the run")
        return load_flags(flags, "the config")
    return load_config(Path(config), overrides)


def _run(words: list[str]) -> None:
    """Run the `remoe` command, and print what it prints.

    Raises:
        ValueError: The command ends with a user's mistake.
        RuntimeError: It ends with another error.
    """
    command = [sys.executable, "-W", "ignore", "-m", "megatron.remoe.api", *words]
    environment = os.environ | {processes.PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches it through this process alone
    )
    lines: list[str] = []
    try:
        _print(process, lines)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)  # at which the run saves and ends
        _print(process, lines)
        raise
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if process.returncode == 2 and errors:
        raise ValueError(errors[-1])
    if process.returncode:
        raise RuntimeError("\n".join(lines[-25:]))


def _print(process: subprocess.Popen[str], lines: list[str]) -> None:
    """Print what a command prints until it ends, but for its error, and append it to `lines`."""
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if not line.startswith("error: "):
            print(line, end="", flush=True)
    process.wait()


def _arrays(rows: Rows) -> dict[str, np.ndarray]:
    """Return the values of rows by name; whole numbers stay so where every row has one."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: _array(name, [row.get(name) for row in rows]) for name in names}


def _array(name: str, values: list[Any]) -> np.ndarray:
    if name.endswith("_per_layer"):
        width = max(len(value or ()) for value in values)
        return np.array([[np.nan] * width if v is None else v for v in values], dtype=float)
    if any(isinstance(value, list) for value in values):
        lists = np.empty(len(values), dtype=object)
        for index, value in enumerate(values):
            lists[index] = value
        return lists
    found = np.array([np.nan if value is None else value for value in values])
    return found if found.dtype.kind in "if" else found.astype(float)


if __name__ == "__main__":  # the process that `train` starts: it ends with the caller's
    processes.end_with_parent()
    del os.environ[processes.PARENT]
    from megatron.remoe.cli import main

    main()
