"""`metrics.jsonl`: one JSON object per logged step and per evaluation.

Megatron reports to a TensorBoard writer on the last rank. `MetricsWriter` stands in for it: it
collects what Megatron writes, adds the routing of the step, and passes everything on to the real
TensorBoard writer and to W&B when they are enabled. The console is not parsed.

The tags that Megatron writes, their order, and what its timer holds are those of `compat`'s
`TESTED_VERSION`.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from megatron.remoe import compat
from megatron.remoe.train import peak
from megatron.remoe.train.jsonl import JSONLWriter
from megatron.remoe.train.step import FinalizeStep
from remoe.statistics import StepReport, expert_loads, routing_metrics

_EVALUATION = "lm loss validation"


class MetricsWriter:
    """Stands in for `torch.utils.tensorboard.SummaryWriter`.

    A training row has iteration, lm_loss, grad_norm, learning_rate, tokens (so far),
    tokens_per_second and peak_memory (bytes on the last rank since the row before; see `peak`).
    With experts it also has what `routing_metrics` returns.
    An evaluation row has iteration, split and lm_loss. Several validation sets also have a row with
    their mean, weighted by tokens.
    """

    def __init__(
        self, path: Path, args: argparse.Namespace, hook: FinalizeStep, writer: Any = None
    ) -> None:
        self.args, self.hook, self.writer = args, hook, writer
        self._file = JSONLWriter(path)
        self._row: dict[str, Any] = {}
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
        """Return another method (add_text, flush, close, ...) of the real writer, or a no-op."""
        if self.writer is not None:
            return getattr(self.writer, name)
        return lambda *args, **kwargs: None

    def add_scalar(self, tag: str, value: Any, iteration: int, *args: Any, **kwargs: Any) -> None:
        """Take a number from Megatron, and write a row when a step or an evaluation is complete."""
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
        elif tag == "grad-norm":  # the last that a row needs
            self._row["grad_norm"] = value
            if iteration % self.args.log_interval == 0:
                self._training(iteration)

    def _write(self, row: dict[str, Any]) -> None:
        # Megatron sets the iteration of the checkpoint when it has loaded it.
        self._file.write(row, checkpoint=self.args.iteration)

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
            scalar = len(value) if name.endswith("_layers") else value  # the number of such layers
            self._forward(f"remoe/{name}", scalar, iteration)
        if self.hook.report is not None:
            self._forward_histograms("remoe/expert_load", self.hook.report, iteration)
        self._report_extremes(iteration, routing)

    def _report_extremes(self, iteration: int, routing: dict[str, Any]) -> None:
        """Print a line when a layer starts or stops being silent or fully dense."""
        for name, state in (("silent_layers", "silent"), ("dense_layers", "fully dense")):
            now, before = set(routing.get(name, [])), self._extremes.get(name, set())
            for layer in sorted(now ^ before):
                verb = "is" if layer in now else "is no longer"
                print(f"remoe: iteration {iteration}: layer {layer} {verb} {state}", flush=True)
            self._extremes[name] = now

    def _tokens_per_second(self, iteration: int) -> float:
        """Return the speed since the last logged step by Megatron's timer, without evaluations.

        Megatron resets the timer at every logged step but the first one of a process. The time of
        that step is therefore subtracted from that of the next one.
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
        named = f"{split}/{name}" if name else split
        self._write({"iteration": iteration, "split": named, "lm_loss": loss})
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

    def _forward_histograms(self, tag: str, report: StepReport, iteration: int) -> None:
        """Draw the loads of each layer's experts where there is a TensorBoard or W&B."""
        from megatron.training import get_wandb_writer

        wandb = get_wandb_writer()
        if self.writer is None and not wandb:
            return
        for layer, loads_E in enumerate(expert_loads(report).cpu(), start=1):
            if self.writer is not None:
                self.writer.add_histogram(f"{tag}/{layer}", loads_E, iteration)
            if wandb:
                wandb.log({f"{tag}/{layer}": wandb.Histogram(loads_E.tolist())}, iteration)
