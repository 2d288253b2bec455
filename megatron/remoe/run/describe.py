"""Describe the size, cost and memory of a run without starting it (`remoe describe`)."""

import argparse
from dataclasses import dataclass, replace

from megatron.remoe.analysis.memory import RankLoad, Recompute, activation_bytes
from megatron.remoe.analysis.size import ModelSize
from megatron.remoe.pattern import as_gpt
from megatron.remoe.run.config import RunConfig
from megatron.remoe.run.plan import Place, plan
from remoe.config import ROUTINGS
from remoe.kernels.chunks import UNLIMITED

_GB = 1e9


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
        flops = self.size.flops_per_sequence * self.sequences
        return flops / (tflops * 1e12 * self.world) / 3600

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
            ("FLOPs of the run", f"{size.flops_per_sequence * self.sequences:.3g}"),
            (f"layout, {self.world} GPUs", self.layout),
            ("weights and optimizer per GPU", f"{self.weights_gb:.1f} GB"),
            ("activations, dense warm-up", f"{self.dense_gb:.1f} GB"),
            ("activations, stable stage", f"{self.stable_gb:.1f} GB"),
            ("activations, dense at once", f"{self.at_once_gb:.1f} GB"),
            ("memory per GPU, dense warm-up", f"{self.weights_gb + self.dense_gb:.1f} GB"),
            ("memory per GPU, stable stage", f"{self.weights_gb + self.stable_gb:.1f} GB"),
        ]


def describe(config: RunConfig, world: int) -> Description:
    """Let Megatron check the config for a number of GPUs, and describe the run.

    Data and tokenizer need not exist here.

    Raises:
        ValueError: The run would reject an argument, or its model cannot be counted.
    """
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    args = plan(config, Place(processes=world, purpose="describe")).args
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


def _count(params: int) -> str:
    return f"{params / 1e9:.2f}B" if params >= 1e9 else f"{params / 1e6:.1f}M"
