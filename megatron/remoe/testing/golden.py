"""The runs that golden trajectories are recorded from: weights and data as functions of a seed.

They are defined as the trajectories of the published implementation are (`tests/golden`): every
weight is a function of its name, so that it is the same under any parallel layout.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megatron.remoe import pattern as patterns
from remoe.config import AnyRouting, Recurrence

Host = Literal["gpt", "hybrid"]  # Megatron's class of models

PUBLISHED_COEFF_INIT = 1e-8
RECURRENT_SIZE = 16  # of the state, in runs with recurrence
SLOTS_PER_EXPERT = 2  # in runs of Soft MoE
# The router becomes sparse around step 90 of a run that starts at 1e-8. From there on a change of
# 1e-6 grows to percents, so that only earlier steps are compared value by value.
OPEN_LOOP_STEPS = 60

# In the closed-loop run of the golden files, sparsity crosses its target several times in 40 steps.
CLOSED_LOOP = {
    "seed": 424242, "E": 8, "k": 1, "G": 1, "L": 2, "H": 64, "F": 128, "heads": 4, "groups": 2,
    "seq": 64, "mbs": 4, "nmb": 2, "steps": 40, "lr": 0.002, "coeff_init": 0.01,
}  # fmt: skip


@dataclass(frozen=True)
class Golden:
    """A recorded run.

    Attributes:
        config: E, k, G, L, H, F, heads, groups, seq, mbs, nmb, steps, lr, seed, coeff_init.
        num_experts, topk: number of experts, and of active experts per token, after granularity.
        params: name and shape of every parameter.
        trajectory: what every step measured.
    """

    config: dict[str, Any]
    num_experts: int
    topk: int
    params: dict[str, list[int]]
    trajectory: list[dict[str, Any]]

    @classmethod
    def load(cls, path: Path) -> "Golden":
        """Read a golden file."""
        record = json.loads(path.read_text())
        keys = ("config", "num_experts", "topk", "params", "trajectory")
        return cls(**{key: record[key] for key in keys})

    @property
    def coeff_init(self) -> float:
        """Initial coefficient of the run."""
        coeff: float = self.config.get("coeff_init", PUBLISHED_COEFF_INIT)
        return coeff

    @property
    def comparable_steps(self) -> int:
        """Number of steps that can be compared value by value."""
        steps = len(self.trajectory)
        open_loop = self.coeff_init == PUBLISHED_COEFF_INIT
        return min(steps, OPEN_LOOP_STEPS) if open_loop else steps


def golden_weight(name: str, shape: list[int], seed: int) -> torch.Tensor:
    """Return the initial value of a parameter, fp32."""
    if "norm" in name:
        return torch.ones(shape)
    if name.endswith("router.gate_scale"):  # of a ReLU router with a norm
        return torch.ones(shape)
    if name.endswith("router.scale"):  # of Soft MoE, whose weights would be nearly equal with 1
        return torch.full(shape, 8.0)
    # In the published runs, which have no recurrence, nothing has these names. A state and its
    # logits would be tiny with the deviation of the other weights.
    std = 0.3 if "recurrent_cell" in name or "projection" in name else 0.02
    state = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF)
    return torch.from_numpy((state.standard_normal(shape) * std).astype(np.float32))


def fill_with_golden_weights(model: torch.nn.Module, seed: int) -> None:
    """Set every parameter of a whole (one-rank) model to its golden value, in place.

    A hybrid model gets the weights of the equivalent GPT model.
    """
    with torch.no_grad():
        for name, parameter in gpt_parameters(model).items():
            parameter.copy_(golden_weight(name, list(parameter.shape), seed))


def gpt_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of a whole model, by their names in the equivalent GPT model.

    The model may be wrapped, as Megatron wraps one in half precision.
    """
    from megatron.core.utils import unwrap_model

    pattern: Any = getattr(unwrap_model(model), "hybrid_layer_pattern", None)
    return {
        name if pattern is None else patterns.gpt_name(name, pattern): parameter
        for name, parameter in model.named_parameters()
    }


Extreme = Literal["all active", "silent layer", "silent rank", "one expert"]


def make_extreme(model: Any, extreme: Extreme) -> None:
    """Set the routers of a whole model to an extreme, in place.

    With "all active", every expert is active for every token: the embedding gets a large constant
    feature, and the routers read it. With "silent layer", no expert of the first layer is active.
    With "silent rank", only the first half of the experts of every layer can be active, so that one
    of two expert-parallel ranks has nothing to do. With "one expert", only the first expert can be
    active.
    """
    from megatron.remoe.train.step import counting_routers

    routers: list[Any] = counting_routers([model])
    with torch.no_grad():
        if extreme == "all active":
            model.embedding.word_embeddings.weight[:, 0] = 10.0
            for router in routers:
                router.weight.zero_()
                router.weight[:, 0] = 0.05
        elif extreme == "silent layer":
            routers[0].weight.zero_()
        else:
            for router in routers:
                first = 1 if extreme == "one expert" else router.num_experts // 2
                router.weight[first:] = 0.0


def golden_tokens(config: dict[str, Any]) -> torch.Tensor:
    """Return the data of a run, Zipf-distributed words of 3 to 7 tokens.

    The tokens are int64 `[steps, nmb, mbs, seq + 1]`.
    """
    shape = (config["steps"], config["nmb"], config["mbs"], config["seq"] + 1)
    need = int(np.prod(shape))
    r = np.random.RandomState(config["seed"])
    words = [r.randint(0, 256, size=r.randint(3, 8)) for _ in range(64)]
    p = 1 / np.arange(1, 65)
    chosen = r.choice(64, size=need // 3 + 8, p=p / p.sum())
    tokens = np.concatenate([words[i] for i in chosen])[:need]
    return torch.from_numpy(tokens.reshape(shape).astype(np.int64))


Padding = Literal["none", "ends", "micro-batch"]


def padding_mask(micro_batch: int, tokens: torch.Tensor, padding: str) -> torch.Tensor:
    """Return which tokens of a micro-batch are padding, a bool for every token, on their device.

    Args:
        micro_batch: number of the micro-batch in its step.
        tokens: tokens of the micro-batch, `[sequences, length]`.
        padding: "none"; "ends" for the last tokens of every sequence, of which later sequences have
            more; "micro-batch" for all tokens of the first micro-batch of the step and no others.
    """
    (sequences, length), device = tokens.shape, tokens.device
    if padding == "ends":
        real = length - length * (1 + torch.arange(sequences, device=device)) // (2 * sequences)
        return torch.arange(length, device=device) >= real.unsqueeze(1)
    all_of_it = padding == "micro-batch" and micro_batch == 0
    return torch.full((sequences, length), all_of_it, device=device)


def parameter_shapes(
    config: dict[str, Any], recurrence: Recurrence = "none"
) -> dict[str, list[int]]:
    """Return name and shape of every parameter of a golden run, as the golden files name them."""
    h, f = config["H"], config["F"] // config["G"]
    qkv = h + 2 * h * config["groups"] // config["heads"]
    shapes = {"embedding.word_embeddings.weight": [256, h]}
    for layer in range(config["L"]):
        prefix = f"decoder.layers.{layer}."
        shapes[prefix + "input_layernorm.weight"] = [h]
        shapes[prefix + "self_attention.linear_proj.weight"] = [h, h]
        shapes[prefix + "self_attention.linear_qkv.weight"] = [qkv, h]
        shapes[prefix + "pre_mlp_layernorm.weight"] = [h]
        width = h if recurrence == "none" else RECURRENT_SIZE
        shapes[prefix + "mlp.router.weight"] = [config["E"] * config["G"], width]
        if recurrence != "none":
            shapes[prefix + "mlp.router.projection"] = [width, h]
        for expert in range(config["E"] * config["G"]):
            name = f"{prefix}mlp.experts.local_experts.{expert}."
            shapes[name + "linear_fc1.weight"] = [2 * f, h]
            shapes[name + "linear_fc2.weight"] = [h, f]
    if recurrence != "none":
        rows = RECURRENT_SIZE * {"gru": 3, "rnn": 1}[recurrence]
        cell = "decoder.recurrent_cell."
        shapes |= {f"{cell}weight_{of}": [rows, RECURRENT_SIZE] for of in ("ih", "hh")}
        shapes |= {f"{cell}bias_{of}": [rows] for of in ("ih", "hh")}
    return shapes | {"decoder.final_layernorm.weight": [h], "output_layer.weight": [256, h]}


def transformer_config(config: dict[str, Any], *, host: Host = "gpt", **changes: Any) -> Any:
    """Return Megatron's TransformerConfig of a golden run; `changes` are fields of it."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = {
        "num_layers": config["L"] * (2 if host == "hybrid" else 1),
        "is_hybrid_model": host == "hybrid",
        "hidden_size": config["H"],
        "ffn_hidden_size": config["F"],
        "num_attention_heads": config["heads"],
        "num_query_groups": config["groups"],
        "num_moe_experts": config["E"] * config["G"],
        "moe_router_topk": config["k"] * config["G"],
        "moe_ffn_hidden_size": config["F"] // config["G"],
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "gradient_accumulation_fusion": False,
        "transformer_impl": "local",
    }
    return TransformerConfig(**(fields | changes))


def model_config_of(
    transformer: Any, config: dict[str, Any], routing: AnyRouting | None, *, host: Host = "gpt"
) -> Any:
    """Return Megatron's configuration of the model of a golden run, with our layers."""
    from megatron.training.models.gpt import GPTModelConfig
    from megatron.training.models.hybrid import HybridModelConfig

    from megatron.remoe import compat
    from megatron.remoe.moe import hash_router
    from megatron.remoe.moe.hybrid import stack_spec
    from megatron.remoe.moe.shared_cell import SharedCells
    from megatron.remoe.moe.spec import layer_spec

    bidirectional = routing is not None and not routing.causal
    kind: Any
    layers: dict[str, Any]
    if host == "hybrid":
        pattern = _pattern(transformer, config)
        spec = stack_spec(pattern, routing, bidirectional=bidirectional)
        kind, layers = HybridModelConfig, {"hybrid_layer_pattern": pattern}
        layers["hybrid_stack_spec"] = spec
    else:
        kind = GPTModelConfig
        layers = {"transformer_layer_spec": layer_spec(routing, bidirectional=bidirectional)}
    model_config = kind(
        transformer=transformer,
        **layers,
        vocab_size=256,
        seq_length=config["seq"],
        position_embedding_type="rope",
        rotary_base=1_000_000,
        share_embeddings_and_output_weights=False,
        pre_wrap_hooks=list(compat.PRE_WRAP_HOOKS),
    )
    hash_router.install(model_config, routing)
    if cells := SharedCells.of(routing):
        cells.install(model_config)
    return model_config


def _pattern(transformer: Any, config: dict[str, Any]) -> str:
    """Return the pattern of the equivalent of a GPT model, in stages of equally many letters."""
    has_experts = transformer.num_moe_experts is not None
    frequency = config.get("moe_layer_freq", [1] * config["L"])
    whole = patterns.of_gpt([int(has_experts and on) for on in frequency])
    stages = transformer.pipeline_model_parallel_size
    stages *= transformer.virtual_pipeline_model_parallel_size or 1
    size = len(whole) // stages
    return "|".join(whole[i : i + size] for i in range(0, len(whole), size))
