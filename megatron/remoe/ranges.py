"""The intervals in which the numbers of a pretraining run must be: one table, and general rules.

Megatron's parser takes any number of the right type. Some of them end every rank later, and others
train a run that means nothing (NaN as the limit of the gradient, dropout above 1).
"""

import argparse
import functools
import math
import re
from collections.abc import Iterator

from remoe.settings import Interval

# Names in Megatron's arguments, and the interval in which a value must be. The first pattern that
# fits counts. Earlier rows are checked first: the length of a run before what follows from it.
_INTERVALS: tuple[tuple[str, str], ...] = (
    (r"train_(iters|samples)", "[1, inf)"),
    (r"(micro|eval_micro|global|eval_global)_batch_size", "[1, inf)"),
    # the model
    (r"num_layers", "[1, 10000]"),
    (r"((moe_)?ffn_)?hidden_size|num_attention_heads|kv_channels|num_query_groups", "[1, inf)"),
    (r"seq_length|max_position_embeddings", "[1, inf)"),
    (r"(padded_)?vocab_size|make_vocab_size_divisible_by", "[1, inf)"),
    (r"(embedding_)?init_method_std", "[0, inf)"),
    (r"layernorm_epsilon", "(0, inf)"),
    (r"(hidden|attention)_dropout", "[0, 1)"),
    (r"rotary_percent", "(0, 1]"),
    (r"rotary_base|rotary_seq_len_interpolation_factor", "[1, inf)"),
    (r"rope_scaling_factor|rotary_scaling_factor|mup_\w+", "(0, inf)"),
    (r"recompute_num_layers", "[1, inf)"),
    # experts
    (r"num_experts|moe_router_topk|moe_shared_expert_intermediate_size", "[1, inf)"),
    (r"moe_(aux|z)_loss_coeff|moe_router_bias_update_rate", "[0, inf)"),
    (r"moe_input_jitter_eps", "[0, 1)"),
    (r"moe_router_topk_scaling_factor", "(0, inf)"),
    # the layout
    (r"\w+_parallel_size|num_distributed_optimizer_instances", "[1, inf)"),
    (r"num_layers_per_virtual_pipeline_stage|num_virtual_stages_per_pipeline_rank", "[1, inf)"),
    (r"microbatch_group_size_per_vp_stage|decoder_(first|last)_pipeline_num_layers", "[1, inf)"),
    (r"ddp_bucket_size|ddp_num_buckets", "[1, inf)"),
    (r"distributed_timeout_(minutes|seconds_after_init)", "[1, 1000000]"),
    # the optimizer and its schedule
    (r"(decoupled_)?(min_)?lr|lr_warmup_init|(start_|end_)?weight_decay|clip_grad", "[0, inf)"),
    (r"(adam|lion)_beta[12]|(sgd|muon)_momentum", "[0, 1)"),
    (r"adam_eps", "(0, inf)"),
    (r"lr_warmup_fraction", "[0, 1)"),
    (r"lr_(wsd_)?decay_(iters|samples)", "[1, inf)"),
    (r"(initial_|min_)?loss_scale", "(0, inf)"),
    (r"loss_scale_window|hysteresis", "[1, inf)"),
    (r"seed", "[1, 4000000000]"),
    # data
    (r"num_workers", "[0, 1000]"),
    (r"num_dataset_builder_threads", "[1, 1000]"),
    (r"mid_level_dataset_surplus", "[0, inf)"),
    (r"fim_\w*rate|optimizer_offload_fraction|activation_offload_fraction", "[0, 1]"),
    # when something happens; 0 is never in these three
    (r"manual_gc_interval|inference_logging_step_interval", "[0, inf)"),
    (r"check_weight_hash_across_dp_replicas_interval", "[1, inf)"),
    (r"\w+_interval", "[1, inf)"),
    (r"timing_log_level", "[0, 2]"),
    (r"exit_duration_in_mins|tensorboard_queue_size|dist_ckpt_workers", "[1, inf)"),
    (r"ckpt_step|save_keep_last", "[1, inf)"),
)  # fmt: skip
# Whole numbers that are below zero on purpose.
_SIGNED = re.compile(
    r"async_ckpt_(cpu|io)_priority|rl_default_top_k|null_tokenizer_(eod|pad)_id|logging_level"
    r"|inference_\w+|fp8_margin|local_rank"
)
_LARGEST = 2**63 - 1


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse numbers that are out of range.

    Args:
        args: the parsed arguments.
        parser: the parser that they come from.

    Raises:
        ValueError: naming the flag, its value and what it may be.
    """
    numbers = {action.dest: action for action in parser._actions if action.type in (int, float)}
    for name in sorted(numbers, key=_place):
        action = numbers[name]
        key = action.option_strings[0].removeprefix("--").replace("-", "_")
        for value in _values(args, name):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key} is {value}; it must be a finite number")
            if abs(value) > _LARGEST:
                raise ValueError(
                    f"{key} is {value}; it must be within 64 bits, choose a smaller one"
                )
            interval = _interval(name, action.type is int)
            if interval is not None and value not in interval:
                raise ValueError(f"{key} is {value}; it must be {interval}")


def _values(args: argparse.Namespace, name: str) -> Iterator[int | float]:
    value = getattr(args, name)
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, int | float):
            yield one


@functools.cache
def _place(name: str) -> int:
    fits = (i for i, (pattern, _) in enumerate(_INTERVALS) if re.fullmatch(pattern, name))
    return next(fits, len(_INTERVALS))


def _interval(name: str, is_whole: bool) -> Interval | None:
    place = _place(name)
    if place < len(_INTERVALS):
        return Interval(_INTERVALS[place][1])
    return Interval("[0, inf)") if is_whole and not _SIGNED.fullmatch(name) else None
