"""Logits, active experts and greedy tokens of a model, computed by Megatron or by transformers.

Shapes: T tokens, V vocabulary, E experts.
"""

import contextlib
import io
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.remoe import pattern as patterns
from megatron.remoe.convert.exported import continue_tokens, load
from megatron.remoe.convert.hf_source import HFSource
from megatron.remoe.convert.source import MegatronSource
from megatron.remoe.convert.to_megatron import Layout, flags_of
from megatron.remoe.ranks import Ranks, initialize_layout


@dataclass(frozen=True)
class Forward:
    """The outputs of a model for a text.

    Attributes:
        logits: fp32 `[T, V]`.
        active: bool `[T, E]` for every layer with experts.
        greedy: the tokens that the model generates greedily after the beginning of the text.
    """

    logits: Tensor
    active: list[Tensor]
    greedy: list[int]


def forward(
    source: MegatronSource | HFSource,
    tokens: list[int],
    *,
    dtype: torch.dtype,
    prompt: int,
    new_tokens: int,
) -> Forward:
    """Run a model of either format over a text on the CPU.

    Args:
        source: the model.
        tokens: the text, which has at most as many tokens as the model has positions.
        dtype: the dtype of weights and activations.
        prompt: the number of tokens at the beginning that are continued greedily.
        new_tokens: the number of tokens to generate.

    Raises:
        ValueError: our Megatron cannot load the checkpoint, or a weight is NaN or infinite.
    """
    request = (tokens, dtype, prompt, new_tokens)
    if isinstance(source, HFSource):
        return _transformers(source, *request)
    if not source.is_loadable:
        raise ValueError(
            f"{source.checkpoint} has an old format or other names, which this Megatron cannot "
            f"run; compare what it is converted to (remoe convert to-hf, then to-megatron)"
        )
    flags = flags_of(source.config, source.padded_vocab_size, dtype, Layout())
    if source.pattern is not None:
        flags.pop("moe_layer_freq", None)
        flags["hybrid_layer_pattern"] = patterns.letters(source.pattern)
    with Ranks(1) as ranks:  # a process of its own: Megatron has global state
        result: Forward = ranks.run(
            megatron_forward, source.checkpoint, flags, source.config["vocab_size"], *request
        )[0]
    return result


def _transformers(
    source: HFSource, tokens: list[int], dtype: torch.dtype, prompt: int, new_tokens: int
) -> Forward:
    is_moe = source.config["model_type"] == "remoe"
    model = load(source.path, dtype)
    routing = {"output_routing": True} if is_moe else {}
    with torch.no_grad():
        output = model(torch.tensor([tokens]), **routing)
        probs = output.router_probs if is_moe else ()
        beginning = torch.tensor([tokens[:prompt]])
        whole = continue_tokens(model, beginning, new_tokens, do_sample=False)
    return Forward(output.logits[0].float(), [p[0] != 0 for p in probs], whole[0, prompt:].tolist())


def megatron_forward(
    checkpoint: Path,
    flags: dict[str, Any],
    vocab_size: int,
    tokens: list[int],
    dtype: torch.dtype,
    prompt: int,
    new_tokens: int,
) -> Forward:
    """Run a Megatron checkpoint as `forward` does, on a rank that is alone in its group."""
    model = load_model(checkpoint, flags)
    logits, maps = logits_and_maps(model, tokens, vocab_size)
    greedy = list(tokens[:prompt])
    for _ in range(new_tokens):
        greedy.append(int(_logits(model, greedy, vocab_size)[-1].argmax()))
    return Forward(logits, maps, greedy[prompt:])


def logits_and_maps(
    model: torch.nn.Module, tokens: list[int], vocab_size: int
) -> tuple[Tensor, list[Tensor]]:
    """Return the logits of a Megatron model, fp32 `[T, V]`, and its routing maps, bool `[T, E]`."""
    maps: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, __, out: maps.append(out[1]))
        for name, module in model.named_modules()
        if name.endswith(".mlp.router")
    ]
    logits = _logits(model, tokens, vocab_size)
    for hook in hooks:
        hook.remove()
    return logits, maps


@torch.no_grad()
def _logits(model: torch.nn.Module, tokens: list[int], vocab_size: int) -> Tensor:
    inputs = torch.tensor([tokens])
    positions = torch.arange(len(tokens))[None]
    logits: Tensor = model(inputs, positions, None)[0, :, :vocab_size].float()
    return logits


def load_model(checkpoint: Path, flags: dict[str, Any]) -> torch.nn.Module:
    """Load a checkpoint of any layout as a model on this one rank."""
    from megatron.core import dist_checkpointing

    model: Any  # Megatron's
    model, _ = build_model(flags)
    with contextlib.redirect_stdout(io.StringIO()):
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint))
    model.load_state_dict(state["model"])
    built: torch.nn.Module = model
    return built


def build_model(flags: dict[str, Any], nproc: int = 1) -> tuple[torch.nn.Module, Namespace]:
    """Build this rank's part of a model of Megatron's modules; return it with the arguments.

    Args:
        flags: the flags of model and layout, as in a config of `remoe train`.
        nproc: the number of ranks, all of which must call this.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron.remoe.arguments import configure, megatron_parser, model_config_of
    from megatron.remoe.run.argv import to_argv
    from megatron.remoe.run.check import check

    needed = {"lr": 1.0, "train_iters": 1, "micro_batch_size": 1, "mock_data": True}
    with contextlib.redirect_stdout(io.StringIO()):
        args = check(to_argv(flags | needed, megatron_parser()), nproc)
        initialize_layout(
            tensor=args.tensor_model_parallel_size,
            pipeline=args.pipeline_model_parallel_size,
            expert=args.expert_model_parallel_size,
            expert_tensor=args.expert_tensor_parallel_size,
        )
        model_config = model_config_of(args)
        configure(model_config, args)
        (model,) = model_config.get_builder_cls()(model_config).build_distributed_models(
            ProcessGroupCollection.use_mpu_process_groups(),
            wrap_with_ddp=False,
            data_parallel_random_init=False,
        )
    return model.eval(), args
