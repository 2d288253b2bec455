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
from megatron.remoe.train import peak
from megatron.remoe.train.step import FinalizeStep, StepReport

_EVALUATION = "lm loss validation"
DEAD_SHARE = 8  # a dead expert has less than the balanced share of tokens divided by this


class MetricsWriter:
    """Stands in for `torch.utils.tensorboard.SummaryWriter`.

    A training row has iteration, lm_loss, grad_norm, learning_rate, tokens (so far) and
    tokens_per_second and peak_memory (bytes on the last rank since the row before: `peak`). With
    experts it also has what `routing_metrics` says.
    An evaluation row has iteration, split and lm_loss; several validation sets also give their
    mean by tokens.

    Rows of iterations that a resumed run does again are dropped from the file first.
    """

    def __init__(
        self, path: Path, args: argparse.Namespace, hook: FinalizeStep, writer: Any = None
    ) -> None:
        self.path, self.args, self.hook, self.writer = path, args, hook, writer
        self._row: dict[str, Any] = {}
        self._has_written = False
        self._seconds_of_first = 0.0
        self._evaluations: Counter[tuple[str, int]] = Counter()
        self._set_losses: dict[str, float] = {}
        self._extremes: dict[str, set[int]] = {}

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
        elif tag == "lm loss":
            self._row["lm_loss"] = value
        elif tag == "grad-norm":  # the last one that a row needs
            self._row["grad_norm"] = value
            if iteration % self.args.log_interval == 0:
                self._training(iteration)

    def _training(self, iteration: int) -> None:
        args, row = self.args, self._row
        routing = {} if self.hook.report is None else routing_metrics(self.hook.report)
        self._write(
            {
                "iteration": iteration,
                "lm_loss": float(row["lm_loss"]),
                **routing,
                "grad_norm": float(row["grad_norm"]),
                "learning_rate": float(row["learning_rate"]),
                "tokens": args.consumed_train_samples * args.seq_length,
                "tokens_per_second": self._tokens_per_second(iteration),
                "peak_memory": peak.peak_bytes(),
            }
        )
        peak.reset()
        for name, value in routing.items():
            scalar = len(value) if name.endswith("_layers") else value  # how many such layers
            self._forward(f"remoe/{name}", scalar, iteration)
        self._report_extremes(iteration, routing)

    def _report_extremes(self, iteration: int, routing: dict[str, Any]) -> None:
        """Say in the log when a layer starts or stops being silent or fully dense."""
        for name, state in (("silent_layers", "silent"), ("dense_layers", "fully dense")):
            now, before = set(routing.get(name, [])), self._extremes.get(name, set())
            for layer in sorted(now ^ before):
                verb = "is" if layer in now else "is no longer"
                print(f"remoe: iteration {iteration}: layer {layer} {verb} {state}", flush=True)
            self._extremes[name] = now

    def _tokens_per_second(self, iteration: int) -> float:
        """Speed since the last logged step, without evaluations, by Megatron's timer.

        Megatron resets the timer at every logged step but a process's first, whose time is
        therefore subtracted from the next one's.
        """
        from megatron.training import get_timers

        args, first = self.args, self.args.iteration + 1
        last = max(args.iteration, iteration - args.log_interval)
        elapsed = get_timers()("interval-time").elapsed(reset=False)
        seconds: float = elapsed - (self._seconds_of_first if last == first else 0.0)
        if iteration == first:
            self._seconds_of_first = elapsed
        tokens: int = (iteration - last) * args.global_batch_size * args.seq_length
        return round(tokens / seconds, 1)

    def _evaluation(self, tag: str, iteration: int, loss: float) -> None:
        args = self.args
        name = tag.removeprefix(_EVALUATION).removeprefix("-")
        # Megatron writes the test set under the validation set's tag, after a last validation.
        self._evaluations[tag, iteration] += 1
        in_training = (
            bool(args.eval_interval)
            and iteration % args.eval_interval == 0
            and iteration > max(args.iteration, (args.start_eval_at_iter or 0) - 1)
        )
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
        if len(self._set_losses) == len(args.eval_iters):
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
        if not self._has_written:
            _keep_rows_before(row, self.path, self.args.iteration)
            self._has_written = True
        with self.path.open("a") as file:
            file.write(json.dumps(_without_nan(row), allow_nan=False) + "\n")


def routing_metrics(report: StepReport) -> dict[str, Any]:
    """The report as numbers for a row; copies to the host.

    sparsity, sparsity_per_layer; active_experts and active_experts_max, mean and most per token;
    silent_layers (no token activates an expert) and dense_layers (all tokens activate all);
    expert_load_min, expert_load_max and expert_load_cv: tokens of an expert relative to the mean
    expert of its layer, least and most of all, and the coefficient of variation, mean over layers;
    dead_experts: how many, of all layers, have less than an eighth of a balanced share, which is
    k/E of the tokens (1/64 of the tokens for k = 1 of E = 8, the published threshold). With ReLU
    routing l1_coeff, and l1_reg (sum over layers, before the coefficient).
    """
    has_router = report.has_router.tolist()

    def per_layer(values: torch.Tensor) -> list[float]:
        return [v for v, has in zip(values.tolist(), has_router, strict=True) if has]

    def layers_at(sparsity: float) -> list[int]:
        at = (report.sparsity_L == sparsity).tolist()
        return [i + 1 for i, has in enumerate(has_router) if has and at[i]]

    num_experts = report.tokens_per_expert_LE.shape[1]
    sparsity = report.sparsity.item()
    row = {
        "sparsity": sparsity,
        "sparsity_per_layer": per_layer(report.sparsity_L),
        "active_experts": num_experts * (1 - sparsity),
        "active_experts_max": int(max(per_layer(report.most_active_L))),
        **_load_metrics(report),
        "silent_layers": layers_at(1.0),
        "dense_layers": layers_at(0.0),
    }
    if report.l1_coeff is not None and report.l1_reg_L is not None:
        row["l1_coeff"] = report.l1_coeff.item()
        row["l1_reg"] = sum(per_layer(report.l1_reg_L))
    return row


def _load_metrics(report: StepReport) -> dict[str, float]:
    counts_LE = report.tokens_per_expert_LE[report.has_router].double()
    tokens_L = report.tokens_L[report.has_router].double()
    num_experts = counts_LE.shape[1]
    # A silent layer has no load: every expert counts as balanced there, and as dead.
    mean_L1 = counts_LE.mean(dim=1, keepdim=True)
    load_LE = torch.where(mean_L1 > 0, counts_LE / mean_L1, 1.0)
    balanced_L1 = (tokens_L * report.topk / num_experts).unsqueeze(1)
    return {
        "expert_load_min": load_LE.min().item(),
        "expert_load_max": load_LE.max().item(),
        "expert_load_cv": load_LE.std(dim=1, correction=0).mean().item(),
        "dead_experts": int((counts_LE < balanced_L1 / DEAD_SHARE).sum().item()),
    }


def _keep_rows_before(row: dict[str, Any], path: Path, checkpoint: int) -> None:
    """Drop an earlier run's rows from this one on, and all after the iteration of the checkpoint.

    Replaces the file as a whole.
    """
    kept = []
    if path.exists():
        kept = [
            line
            for line in path.read_text().splitlines()
            if _position(line) < _order(row) and _position(line)[0] <= checkpoint
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept))
    os.replace(temporary, path)


def _order(row: dict[str, Any]) -> tuple[float, bool]:
    """Rows are in order of iterations, and evaluations come after the step."""
    return row["iteration"], "split" in row


def _position(line: str) -> tuple[float, bool]:
    try:
        return _order(json.loads(line))
    except json.JSONDecodeError:  # cut off by a kill
        return math.inf, True


def _without_nan(value: Any) -> Any:
    """None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
