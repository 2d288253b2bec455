"""Describe size, cost and memory of a run, or of a sweep's runs, without starting it."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.remoe.analysis.memory import RankLoad, Recompute, activation_bytes
from megatron.remoe.analysis.size import ModelSize
from megatron.remoe.pattern import as_gpt
from megatron.remoe.run.config import RunConfig
from megatron.remoe.run.plan import Place, plan
from megatron.remoe.run.sweep import load_sweep
from remoe.config import ROUTINGS
from remoe.kernels.chunks import UNLIMITED

_GB = 1e9
GPUS_GB = (40, 80, 141)  # A100; A100 and H100; H200
# The part of a GPU that is left free for what the estimate does not count: the CUDA context,
# buffers of communication, and fragmentation.
MARGIN = 0.1


@dataclass(frozen=True)
class Description:
    """What a run is and what it costs. Memory is that of the fullest GPU.

    Attributes:
        size: The model.
        world: Number of GPUs.
        sequences: Number of sequences of the whole run.
        tokens: Number of tokens of the whole run.
        weights_gb: Weights, gradients and optimizer in GB, by Megatron's estimate.
        dense_gb: Activations in GB while every expert may be active for every token (ReLU routing),
            or during the warm-up (TopK).
        stable_gb: Activations in GB at k active experts per token.
        at_once_gb: `dense_gb` if layers did not run chunk by chunk.
        layout: How the run is split, in words.
        load: How it is split.
    """

    size: ModelSize
    world: int
    sequences: int
    tokens: int
    weights_gb: float
    dense_gb: float
    stable_gb: float
    at_once_gb: float
    layout: str
    load: RankLoad

    def hours(
        self, *, tflops: float | None = None, tokens_per_second: float | None = None
    ) -> float | None:
        """Return the hours of the whole run at a throughput, or None if no throughput is given.

        Args:
            tflops: Throughput of each GPU in TFLOP/s.
            tokens_per_second: Throughput of the whole run.
        """
        if tokens_per_second is not None:
            return self.tokens / tokens_per_second / 3600
        if tflops is None:
            return None
        return self.flops / (tflops * 1e12 * self.world) / 3600

    @property
    def flops(self) -> float:
        """The operations of the whole run."""
        return self.size.flops_per_sequence * self.sequences

    @property
    def peak_gb(self) -> float:
        """Memory of the fullest GPU in GB, the dense warm-up included."""
        return self.weights_gb + max(self.dense_gb, self.stable_gb)

    def fits(self, gpu_gb: float) -> bool:
        """Return whether the run fits GPUs of a size with the margin."""
        return self.peak_gb <= gpu_gb * (1 - MARGIN)

    def _fit(self, gpu_gb: float) -> str:
        usable = gpu_gb * (1 - MARGIN)
        word = "yes" if self.fits(gpu_gb) else "no"
        return f"{word}: {self.peak_gb:.1f} of {usable:.1f} GB, {MARGIN:.0%} is left free"

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the report, each with a name and a value."""
        size = self.size
        experts = "none"
        if size.num_experts:
            active = f"{size.topk} of {size.num_experts} active"
            if size.slots:
                active = f"{size.num_experts}, which share {size.slots} slots of a sequence"
            experts = f"{active}, width {size.expert_width}"
        return [
            ("active parameters", _count(size.active_params)),
            ("total parameters", _count(size.total_params)),
            ("routers, beside these", _count(size.router_params)),
            ("experts", experts),
            ("GFLOPs per sequence", f"{size.flops_per_sequence / 1e9:.1f}"),
            ("sequences", f"{self.sequences:,} of {size.seq_length} tokens"),
            ("tokens", f"{self.tokens / 1e9:.2f}B"),
            ("FLOPs of the run", f"{self.flops:.3g}"),
            (f"layout, {self.world} GPUs", self.layout),
            ("weights and optimizer per GPU", f"{self.weights_gb:.1f} GB"),
            ("activations, dense warm-up", f"{self.dense_gb:.1f} GB"),
            ("activations, stable stage", f"{self.stable_gb:.1f} GB"),
            ("activations, dense at once", f"{self.at_once_gb:.1f} GB"),
            ("memory per GPU, dense warm-up", f"{self.weights_gb + self.dense_gb:.1f} GB"),
            ("memory per GPU, stable stage", f"{self.weights_gb + self.stable_gb:.1f} GB"),
            *((f"fits GPUs of {size} GB", self._fit(size)) for size in GPUS_GB),
        ]


def describe(config: RunConfig, world: int) -> Description:
    """Let Megatron check the config for a number of GPUs, and describe the run.

    Data and tokenizer need not exist here.

    Raises:
        ValueError: The run would reject an argument, or its model cannot be counted.
    """
    args = plan(config, Place(processes=world, purpose="describe")).args
    return describe_args(args, world)


def describe_sweep(path: Path, world: int) -> dict[str, Description]:
    """Describe every run of a sweep by its name, each on the same number of GPUs.

    Raises:
        ValueError: Runs are wrong; everything that is wrong in any of them is named, a line each.
    """
    place = Place(processes=world, purpose="describe")
    return {run.name: describe_args(run.args, world) for run in load_sweep(path, place=place)}


def describe_args(args: argparse.Namespace, world: int) -> Description:
    """Describe the run of arguments that Megatron has checked.

    Raises:
        ValueError: The model cannot be counted.
    """
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    if args.padded_vocab_size is None:
        raise ValueError("padded_vocab_size is not given; the model's size depends on it")
    args = argparse.Namespace(**as_gpt(vars(args)))
    size = ModelSize.from_flags(vars(args) | {"moe_granularity": 1})  # `args` has it applied.
    sequences = args.train_samples or args.train_iters * args.global_batch_size
    layout = _rank_load(args)
    stable = size.rows_per_token
    starts_dense = bool(size.num_experts) and ROUTINGS[args.moe_routing].starts_dense
    most = args.moe_topk_warmup_topk or (size.num_experts if starts_dense else stable)
    return Description(
        size=size,
        world=world,
        sequences=sequences,
        tokens=sequences * size.seq_length,
        weights_gb=compute_weight_and_optimizer_memory(args) / _GB,
        dense_gb=activation_bytes(size, layout, most) / _GB,
        stable_gb=activation_bytes(size, layout, stable) / _GB,
        at_once_gb=activation_bytes(size, replace(layout, max_assignments=UNLIMITED), most) / _GB,
        layout=_in_words(args, layout),
        load=layout,
    )


def _rank_load(args: argparse.Namespace) -> RankLoad:
    recompute: Recompute = "none"
    if args.recompute_granularity == "full":
        recompute = "full"
    elif "moe" in (args.recompute_modules or ()):
        recompute = "moe"
    return RankLoad(
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        cp=args.context_parallel_size,
        expert_tp=args.expert_tensor_parallel_size,
        sequence_parallel=args.sequence_parallel,
        micro_batch=args.micro_batch_size,
        num_micro_batches=args.global_batch_size
        // (args.micro_batch_size * args.data_parallel_size),
        recompute=recompute,
        bytes_per_value=2 if args.bf16 or args.fp16 else 4,
        max_assignments=args.moe_relu_max_assignments,
    )


def _in_words(args: argparse.Namespace, layout: RankLoad) -> str:
    sizes = {
        "TP": layout.tp,
        "EP": args.expert_model_parallel_size,
        "expert TP": layout.expert_tp,
        "PP": layout.pp,
        "CP": layout.cp,
        "DP": args.data_parallel_size,
    }
    split = " x ".join(f"{name} {n}" for name, n in sizes.items() if n > 1) or "one GPU"
    return (
        f"{split}; micro-batches {layout.num_micro_batches} of {layout.micro_batch}; "
        f"recompute {layout.recompute}"
    )


def sweep_table(
    runs: dict[str, Description],
    *,
    tflops: float | None = None,
    tokens_per_second: float | None = None,
) -> list[list[str]]:
    """Return the rows of a table: the columns' names, the runs of a sweep, and all of them.

    Args:
        runs: The runs by their names.
        tflops, tokens_per_second: A throughput, as `Description.hours` takes it.
    """
    rows = [["run", "active", "total", "tokens", "FLOPs", "memory", "fits", "hours"]]
    hours = [run.hours(tflops=tflops, tokens_per_second=tokens_per_second) for run in runs.values()]
    known = [one for one in hours if one is not None]
    for (name, run), one in zip(runs.items(), hours, strict=True):
        sizes = [_count(run.size.active_params), _count(run.size.total_params)]
        rows.append([name, *sizes, *_costs([run]), "" if one is None else f"{one:.2f}"])
    every = list(runs.values())
    rows.append([f"{len(runs)} runs", "", "", *_costs(every), f"{sum(known):.2f}" if known else ""])
    return rows if known else [row[:-1] for row in rows]


def _costs(runs: list[Description]) -> list[str]:
    """Return the tokens and FLOPs of runs, the largest memory, and the smallest GPU they fit."""
    fits = [f"{size} GB" for size in GPUS_GB if all(run.fits(size) for run in runs)]
    return [
        _count(sum(run.tokens for run in runs)),
        f"{sum(run.flops for run in runs):.3g}",
        f"{max(run.peak_gb for run in runs):.1f} GB",
        fits[0] if fits else "none",
    ]


def _count(params: int) -> str:
    return f"{params / 1e9:.2f}B" if params >= 1e9 else f"{params / 1e6:.1f}M"
