"""Patterns of layers in Megatron's `HybridModel`, and which of them work here.

A pattern has a letter per layer: `*` is attention, `-` a dense MLP, `E` a layer of experts and `M`
Mamba. `|` is a boundary of pipeline stages. A layer of a `GPTModel` is two letters, `*-` or `*E`.
"""

import argparse
import re
from collections.abc import Mapping
from typing import Any

from megatron.remoe import cpu

# Letters of Megatron 0.19.2, and what they are.
LETTERS = {
    "*": "attention",
    "-": "a dense MLP",
    "E": "experts",
    "M": "Mamba",
    "G": "a gated delta net",
    "D": "sparse attention of DeepSeek",
    "+": "latent attention",
}
_NOT_RUN = "GD+"


def letters(pattern: str) -> str:
    """Return the pattern without the boundaries of pipeline stages."""
    return pattern.replace("|", "")


def gpt_layers(pattern: str) -> list[int] | None:
    """Return which layers of the equivalent GPT model have experts, as 0 and 1.

    None is returned for a pattern that is no sequence of `*-` and `*E`, which no GPT model equals.
    """
    whole = letters(pattern)
    pairs = [whole[i : i + 2] for i in range(0, len(whole), 2)]
    if not pairs or any(pair not in ("*-", "*E") for pair in pairs):
        return None
    return [int(pair == "*E") for pair in pairs]


def of_gpt(layers: list[int]) -> str:
    """Return the pattern of a GPT model whose layers with a 1 have experts."""
    return "".join("*E" if experts else "*-" for experts in layers)


def gpt_layer_of(pattern: str, index: int) -> int:
    """Return the layer of a GPT model that a letter stands for, both from 0.

    It is the number of letters of the same half, attention or MLP, before it.
    """
    whole = letters(pattern)
    same = "-E" if whole[index] in "-E" else "*"
    return sum(letter in same for letter in whole[:index])


def gpt_name(name: str, pattern: str) -> str:
    """Return the name in the equivalent GPT model of a parameter of a whole hybrid model."""
    name = name.replace("decoder.final_norm.", "decoder.final_layernorm.")

    def renumber(match: re.Match[str]) -> str:
        return f"decoder.layers.{gpt_layer_of(pattern, int(match[1]))}."

    return re.sub(r"decoder\.layers\.(\d+)\.", renumber, name)


def as_gpt(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of the equivalent GPT model; those of a GPT model stay.

    Raises:
        ValueError: no GPT model equals the pattern.
    """
    pattern = flags.get("hybrid_layer_pattern")
    if pattern is None:
        return dict(flags)
    layers = gpt_layers(pattern)
    if layers is None:
        raise ValueError(
            f"hybrid_layer_pattern is {pattern}, and only sequences of *- and *E, the layers of a "
            f"GPT model, can be counted or converted"
        )
    ours = {"num_layers": len(layers), "moe_layer_freq": layers, "hybrid_layer_pattern": None}
    return dict(flags) | ours


def stages(pattern: str) -> list[str]:
    """Return the letters of every pipeline stage, virtual ones one by one, if `|` says so."""
    return pattern.split("|")


def check(args: argparse.Namespace) -> None:
    """Refuse patterns that are wrong, or do not work here; a run without a pattern passes.

    Raises:
        ValueError: naming the pattern, what is wrong with it and the remedy.
    """
    pattern: str | None = getattr(args, "hybrid_layer_pattern", None)
    if pattern is None:
        return
    subject = f"hybrid_layer_pattern is {pattern}"
    if "/" in pattern:
        raise ValueError(
            f"{subject}, and multi-token prediction (/) has not been run with our layers; leave "
            f"out what follows the first /"
        )
    whole = letters(pattern)
    if unknown := sorted(set(whole) - set(LETTERS)):
        known = ", ".join(f"{letter} ({what})" for letter, what in LETTERS.items())
        raise ValueError(
            f"{subject}, with the unknown letter {unknown[0]!r}; letters are {known}, and | "
            f"between pipeline stages"
        )
    if not whole:
        raise ValueError(f"{subject}, which has no layers; write one letter per layer, as in *E*E")
    for letter in _NOT_RUN:
        if letter in whole:
            raise ValueError(
                f"{subject}, and {LETTERS[letter]} ({letter}) has not been run with our layers; "
                f"use the letters * - E M"
            )
    if "M" in whole:
        _check_mamba(args, subject)
    _check_num_layers(args, subject, whole)
    _check_stages(args, subject, pattern)
    _check_experts(args, subject, whole)


def _check_mamba(args: argparse.Namespace, subject: str) -> None:
    if cpu.is_enabled() and args.distributed_backend == "gloo":
        raise ValueError(
            f"{subject}, and Mamba (M) has CUDA kernels only; use * - E on a machine without a GPU"
        )
    if args.transformer_impl == "local":
        raise ValueError(
            f"{subject}, and Mamba (M) needs Transformer Engine, but transformer_impl is local; "
            f"use transformer_impl transformer_engine, or * - E"
        )
    if getattr(args, "moe_router_recurrence", "none") != "none":
        raise ValueError(
            f"{subject}, and Mamba (M) does not hand on the state of recurrent routers; use * - E, "
            f"or leave moe_router_recurrence out"
        )


def _check_num_layers(args: argparse.Namespace, subject: str, whole: str) -> None:
    """Refuse another number of layers than the letters, or the GPT layers that they make."""
    pairs = len(gpt_layers(whole) or ())
    if args.num_layers not in (None, len(whole), pairs or len(whole)):
        remedy = f"{len(whole)}"
        if pairs:
            remedy += f", or {pairs} as a GPT model counts its layers"
        raise ValueError(
            f"{subject}, which has {len(whole)} letters, but num_layers is {args.num_layers}; "
            f"leave num_layers out, or set it to {remedy}"
        )


def _check_stages(args: argparse.Namespace, subject: str, pattern: str) -> None:
    """Refuse stages that are no multiple of the ranks of a pipeline, and letters that are none."""
    count, ranks = len(stages(pattern)), args.pipeline_model_parallel_size
    if count > 1 and ranks == 1:
        raise ValueError(
            f"{subject}, with {count} pipeline stages, but pipeline_model_parallel_size is 1; "
            f"leave | out, or set pipeline_model_parallel_size"
        )
    if count > 1 and count % ranks:
        raise ValueError(
            f"{subject}, with {count} pipeline stages, but pipeline_model_parallel_size is "
            f"{ranks}; write | so that the stages are a multiple of {ranks}"
        )
    uneven = args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers
    if count == 1 and len(pattern) % ranks and uneven == (None, None):
        raise ValueError(
            f"{subject}, with {len(pattern)} letters, which {ranks} pipeline stages cannot share "
            f"equally; write | where a stage ends"
        )


def _check_experts(args: argparse.Namespace, subject: str, whole: str) -> None:
    if args.moe_layer_freq not in (None, 1) and not args.use_checkpoint_args:
        raise ValueError(
            f"moe_layer_freq is {args.moe_layer_freq}, but hybrid_layer_pattern says which layers "
            f"have experts; leave moe_layer_freq out"
        )
    if args.num_experts is None and "E" in whole and not args.use_checkpoint_args:
        raise ValueError(
            f"{subject}, with layers of experts (E), but num_experts is not set; pass "
            f"--num-experts, or use - for dense layers"
        )
    if args.num_experts is not None and "E" not in whole:
        raise ValueError(
            f"{subject}, in which no layer has experts, but num_experts is {args.num_experts}; "
            f"use E for layers of experts, or leave num_experts and its router out"
        )
    if (
        not all(stages(args.hybrid_layer_pattern))
        and getattr(args, "moe_router_recurrence", "none") != "none"
    ):
        raise ValueError(
            f"{subject}, with a pipeline stage without layers, and the state of recurrent routers "
            f"needs one to pass; give every stage a layer, or leave moe_router_recurrence out"
        )


def first_and_last(pattern: str, *, pipelined: bool) -> tuple[int, int]:
    """Return the letters between which hidden states have the columns of recurrent routers.

    They are the first and the last layer with experts; with pipeline stages, those of the model.
    """
    whole = letters(pattern)
    if pipelined:
        return 0, len(whole) - 1
    return whole.index("E"), whole.rindex("E")
