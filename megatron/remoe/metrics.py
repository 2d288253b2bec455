"""`metrics.jsonl`: one JSON object per logged step and per evaluation.

Megatron reports to a TensorBoard writer on the last rank. `MetricsWriter` is one: it collects what
Megatron writes, adds the routing of the step, and passes everything on to the real TensorBoard
writer and to W&B when they are enabled. Nothing parses the console.
"""

import argparse
import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from megatron.remoe import compat
from megatron.remoe.step import FinalizeStep, StepReport

_EVALUATION = "lm loss validation"


class MetricsWriter:
    """Stands in for `torch.utils.tensorboard.SummaryWriter`.

    A training row has iteration, lm_loss, grad_norm, learning_rate, tokens (so far) and
    tokens_per_second, and with ReLU routing sparsity, sparsity_per_layer, active_experts (mean per
    token), l1_coeff and l1_reg (sum over layers, before the coefficient). An evaluation row has
    iteration, split and lm_loss; several validation sets also give their mean by tokens.

    Rows of iterations that a resumed run will do again are dropped from the file first.
    """

    def __init__(
        self, path: Path, args: argparse.Namespace, hook: FinalizeStep, writer: Any = None
    ) -> None:
        self.path, self.args, self.hook, self.writer = path, args, hook, writer
        self._row: dict[str, Any] = {}
        self._first: int | None = None
        self._last: int | None = None
        self._seconds_before = 0.0
        self._evaluations: Counter[tuple[str, int]] = Counter()
        self._set_losses: dict[str, float] = {}

    @classmethod
    def install(cls, args: argparse.Namespace, hook: FinalizeStep) -> "MetricsWriter | None":
        """Put a writer where Megatron looks for one, when `--metrics-file` asks for it.

        Call it after Megatron's arguments are parsed and before `pretrain`.
        """
        if args.metrics_file is None or args.rank != args.world_size - 1:
            return None
        writer = cls(Path(args.metrics_file), args, hook, compat.tensorboard_writer())
        compat.set_tensorboard_writer(writer)
        return writer

    def __getattr__(self, name: str) -> Any:
        """add_text, flush, close, ...: the real writer's, or nothing."""
        if self.writer is not None:
            return getattr(self.writer, name)
        return lambda *args, **kwargs: None

    def add_scalar(self, tag: str, value: Any, iteration: int, *args: Any, **kwargs: Any) -> None:
        if self.writer is not None:
            self.writer.add_scalar(tag, value, iteration, *args, **kwargs)
        if tag.endswith((" vs samples", " ppl")):
            return
        if tag.startswith(_EVALUATION):
            self._evaluation(tag, iteration, float(value))
        elif tag == "learning-rate":  # the first that Megatron writes in an iteration
            self._row = {"learning_rate": value}
            self._first = iteration if self._first is None else self._first
        elif tag == "lm loss":
            self._row["lm_loss"] = value
        elif tag == "grad-norm":  # the last one that a row needs
            self._row["grad_norm"] = value
            if iteration % self.args.log_interval == 0:
                self._training(iteration)

    def _training(self, iteration: int) -> None:
        args, row = self.args, self._row
        steps = iteration - (self._first - 1 if self._last is None else self._last)
        tokens = args.global_batch_size * args.seq_length
        routing = {} if self.hook.report is None else routing_metrics(self.hook.report)
        self._write(
            {
                "iteration": iteration,
                "lm_loss": _number(row["lm_loss"]),
                **routing,
                "grad_norm": _number(row["grad_norm"]),
                "learning_rate": _number(row["learning_rate"]),
                "tokens": args.consumed_train_samples * args.seq_length,
                "tokens_per_second": round(steps * tokens / self._seconds(iteration), 1),
            }
        )
        self._last = iteration
        for name, value in routing.items():
            self._forward(f"remoe/{name}", value, iteration)

    def _seconds(self, iteration: int) -> float:
        """Time since the last row, without evaluations: Megatron's timer, reset at every row.

        Megatron logs a process's first iteration too, but does not reset its timer there.
        """
        from megatron.training import get_timers

        elapsed = get_timers()("interval-time").elapsed(reset=False)
        seconds = elapsed - self._seconds_before
        self._seconds_before = elapsed if iteration == self._first else 0.0
        return seconds

    def _evaluation(self, tag: str, iteration: int, loss: float) -> None:
        args = self.args
        name = tag.removeprefix(_EVALUATION).removeprefix("-")
        # Megatron writes the test set under the validation set's tag, after a last validation.
        self._evaluations[tag, iteration] += 1
        in_training = bool(args.eval_interval) and iteration % args.eval_interval == 0
        count = self._evaluations[tag, iteration]
        is_test = args.do_test and count > bool(args.do_valid) + (in_training and args.do_valid)
        split = "test" if is_test else "valid"
        if count > 1 and not is_test:
            return  # the last validation repeats one of the same iteration
        self._write(
            {"iteration": iteration, "split": f"{split}/{name}" if name else split, "lm_loss": loss}
        )
        if not name or is_test:
            return
        self._set_losses[name] = loss
        if len(self._set_losses) == len(args.valid_data_path):
            sizes = torch.tensor(args.eval_iters, dtype=torch.float64)
            losses = torch.tensor(list(self._set_losses.values()), dtype=torch.float64)
            mean = (losses * sizes).sum().item() / sizes.sum().item()
            self._write({"iteration": iteration, "split": split, "lm_loss": mean})
            self._set_losses = {}

    def _forward(self, tag: str, value: Any, iteration: int) -> None:
        from megatron.training import get_wandb_writer

        values = enumerate(value, start=1) if isinstance(value, list) else [(None, value)]
        for index, number in values:
            name = tag if index is None else f"{tag}/{index}"
            if self.writer is not None:
                self.writer.add_scalar(name, number, iteration)
            if wandb := get_wandb_writer():
                wandb.log({name: number}, iteration)

    def _write(self, row: dict[str, Any]) -> None:
        if self._evaluations.total() + (self._last or 0) == 0 or not self.path.exists():
            _truncate(self.path, row["iteration"])
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def routing_metrics(report: StepReport) -> dict[str, Any]:
    """The report as numbers for a row; copies to the host."""
    has_router = report.has_router.tolist()

    def per_layer(values: torch.Tensor) -> list[float]:
        return [v for v, has in zip(values.tolist(), has_router, strict=True) if has]

    num_experts = report.tokens_per_expert_LE.shape[1]
    sparsity = report.sparsity.item()
    return {
        "sparsity": sparsity,
        "sparsity_per_layer": per_layer(report.sparsity_L),
        "active_experts": num_experts * (1 - sparsity),
        "l1_coeff": report.l1_coeff.item(),
        "l1_reg": sum(per_layer(report.l1_reg_L)),
    }


def _truncate(path: Path, iteration: int) -> None:
    """Keep the rows before `iteration`; replaces the file as a whole."""
    kept = []
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _iteration(line) < iteration]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    os.replace(temporary, path)


def _iteration(line: str) -> float:
    try:
        return json.loads(line)["iteration"]
    except json.JSONDecodeError:  # cut off by a kill
        return math.inf


def _number(value: Any) -> float | None:
    """A finite float, or None: JSON has no NaN."""
    number = float(value)
    return number if math.isfinite(number) else None
