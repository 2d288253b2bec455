"""The table of how parameters correspond in Megatron and Hugging Face, for both directions.

A rule maps one tensor of Megatron to one or several of Hugging Face. Its two functions are inverse
to each other, so that a round trip is bit-equal. `plan` applies the table to a model and lists
every tensor of both sides; a converter then consumes and produces each of them exactly once.

There are three kinds of targets, which differ in the prefix of their name: `config.` is a value in
the model's config, `padding.` is a tensor for a file beside the weights (rows of the vocabulary
that only Megatron has), and everything else is a weight.

Dimensions: V vocabulary, P padded rows beyond V, H hidden, Q query heads x head, K query groups x
head, Z values of a head, E experts, N logits of a router, A scales of its gates, F expert width,
G = 2F, D dense width, R what a router reads (the state of a recurrent router, else H), S rows of
the gates of its cell.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remoe.config import ROUTINGS

Dims = dict[str, int]
Config = dict[str, Any]
Shape = tuple[int, ...]

CONFIG, PADDING = "config.", "padding."
CELL = "model.recurrent_cell."  # its weights are fp32 in models of every dtype
_STATE = (".router.thresholds", ".router.load")  # and so is the state of routers


def _same(tensor: Tensor, dims: Dims) -> list[Tensor]:
    return [tensor]


def _only(tensors: Sequence[Tensor], dims: Dims) -> Tensor:
    return tensors[0]


def _split_vocab(tensor: Tensor, dims: Dims) -> list[Tensor]:
    return [tensor[: dims["V"]], tensor[dims["V"] :]]


def _split_half(tensor: Tensor, dims: Dims) -> list[Tensor]:
    return list(tensor.chunk(2))


def _concatenate(tensors: Sequence[Tensor], dims: Dims) -> Tensor:
    return torch.cat(list(tensors))


def _split_qkv(tensor: Tensor, dims: Dims) -> list[Tensor]:
    """Split Megatron's matrix, whose rows are ordered by group: query heads, key head, value head.

    With q query heads in a group its shape is `[groups * (q + 1 + 1) * head, H]`.
    """
    per_group = dims["Q"] // dims["groups"]
    head = dims["K"] // dims["groups"]
    grouped = tensor.view(dims["groups"], per_group + 2 * head, -1)
    parts = torch.split(grouped, [per_group, head, head], dim=1)
    return [part.reshape(-1, tensor.shape[-1]) for part in parts]


def _join_qkv(tensors: Sequence[Tensor], dims: Dims) -> Tensor:
    hidden = tensors[0].shape[-1]
    grouped = [t.reshape(dims["groups"], -1, hidden) for t in tensors]
    return torch.cat(grouped, dim=1).reshape(-1, hidden)


@dataclass(frozen=True)
class Rule:
    """One tensor of Megatron, and the tensors that hold its values in Hugging Face.

    Attributes:
        megatron: the name in a Megatron checkpoint; `*` is the index of the layer.
        hf: the names on the other side, each with its dimensions, one letter per dimension.
        to_hf, to_megatron: split the tensor into its parts, in the order of `hf`, and join them.
        when: which models or layers have the tensor: "always", "untied" (models with a separate
            output layer), "recurrent", "shared projection" (models with recurrent routers), or the
            kind of layer: "dense", "moe", or moe with a router that has "logits", the budget "l1",
            a "scale" of its gates, a "load" by which it is balanced, a "projection" of its own,
            or, by its name, "top_p" or "expert_threshold"; or "norm of each head" or "norm of each
            projection", by the queries and keys of attention.
    """

    megatron: str
    hf: dict[str, str]
    to_hf: Callable[[Tensor, Dims], list[Tensor]] = _same
    to_megatron: Callable[[Sequence[Tensor], Dims], Tensor] = _only
    when: str = "always"


_M, _H = "decoder.layers.*.", "model.layers.*."

TABLE: tuple[Rule, ...] = (
    Rule(
        "embedding.word_embeddings.weight",
        {"model.embed_tokens.weight": "VH", "padding.embed_tokens.weight": "PH"},
        _split_vocab,
        _concatenate,
    ),
    # attention; norms have the names of Transformer Engine, which fuses them into the next linear
    Rule(_M + "self_attention.linear_qkv.layer_norm_weight", {_H + "input_layernorm.weight": "H"}),
    Rule(
        _M + "self_attention.linear_qkv.weight",
        {
            _H + "self_attn.q_proj.weight": "QH",
            _H + "self_attn.k_proj.weight": "KH",
            _H + "self_attn.v_proj.weight": "KH",
        },
        _split_qkv,
        _join_qkv,
    ),
    Rule(_M + "self_attention.linear_proj.weight", {_H + "self_attn.o_proj.weight": "HQ"}),
    # norms of queries and keys; Megatron has only those of each head
    *(
        Rule(
            _M + f"self_attention.{one}_layernorm.weight",
            {_H + f"self_attn.{one}_norm.weight": letters},
            when=f"norm of each {of}",
        )
        for of, shapes in (("head", "ZZ"), ("projection", "QK"))
        for one, letters in zip("qk", shapes, strict=True)
    ),
    # experts
    Rule(
        _M + "pre_mlp_layernorm.weight",
        {_H + "post_attention_layernorm.weight": "H"},
        when="moe",
    ),
    Rule(_M + "mlp.router.weight", {_H + "mlp.router.weight": "NR"}, when="logits"),
    Rule(_M + "mlp.router.projection", {_H + "mlp.router.projection": "RH"}, when="projection"),
    Rule(_M + "mlp.router.gate_scale", {_H + "mlp.router.gate_scale": "A"}, when="scale"),
    Rule(_M + "mlp.router.l1_coeff", {"config.l1_coeff.*": ""}, when="l1"),
    Rule(_M + "mlp.router.load", {_H + "mlp.router.load": "E"}, when="load"),
    Rule(_M + "mlp.router.odds", {"config.top_p_odds.*": ""}, when="top_p"),
    Rule(
        _M + "mlp.router.thresholds", {_H + "mlp.router.thresholds": "E"}, when="expert_threshold"
    ),
    Rule(
        _M + "mlp.router.num_updates", {"config.threshold_updates.*": ""}, when="expert_threshold"
    ),
    Rule(
        _M + "mlp.experts.experts.linear_fc1.weight",
        {_H + "mlp.experts.gate_up_proj": "EGH"},
        when="moe",
    ),
    Rule(
        _M + "mlp.experts.experts.linear_fc2.weight",
        {_H + "mlp.experts.down_proj": "EHF"},
        when="moe",
    ),
    # dense layers
    Rule(
        _M + "mlp.linear_fc1.layer_norm_weight",
        {_H + "post_attention_layernorm.weight": "H"},
        when="dense",
    ),
    Rule(
        _M + "mlp.linear_fc1.weight",
        {_H + "mlp.gate_proj.weight": "DH", _H + "mlp.up_proj.weight": "DH"},
        _split_half,
        _concatenate,
        when="dense",
    ),
    Rule(_M + "mlp.linear_fc2.weight", {_H + "mlp.down_proj.weight": "HD"}, when="dense"),
    # the cell of recurrent routers
    *(
        Rule(f"decoder.recurrent_cell.{name}", {f"{CELL}{name}": letters}, when="recurrent")
        for name, letters in (
            ("weight_ih", "SR"),
            ("weight_hh", "SR"),
            ("bias_ih", "S"),
            ("bias_hh", "S"),
        )
    ),
    Rule(
        "decoder.recurrent_cell.projection", {f"{CELL}projection": "RH"}, when="shared projection"
    ),
    Rule("decoder.final_layernorm.weight", {"model.norm.weight": "H"}),
    Rule(
        "output_layer.weight",
        {"lm_head.weight": "VH", "padding.lm_head.weight": "PH"},
        _split_vocab,
        _concatenate,
        when="untied",
    ),
)


@dataclass(frozen=True)
class Item:
    """A rule applied to one layer, or to the whole model: names and shapes on both sides."""

    rule: Rule
    dims: Dims
    megatron: str
    megatron_shape: Shape
    hf: dict[str, Shape]

    def to_hf(self, tensor: Tensor) -> dict[str, Tensor]:
        """Split Megatron's tensor into those of Hugging Face, by name.

        Raises:
            ValueError: a tensor has another shape.
        """
        check_shape(self.megatron, tuple(tensor.shape), self.megatron_shape)
        parts = self.rule.to_hf(tensor, self.dims)
        named = dict(zip(self.hf, parts, strict=True))
        for name, part in named.items():
            check_shape(name, tuple(part.shape), self.hf[name])
        return named

    def to_megatron(self, tensors: dict[str, Tensor]) -> Tensor:
        """Join tensors of Hugging Face, by name, to that of Megatron.

        Raises:
            ValueError: a tensor has another shape.
        """
        for name, shape in self.hf.items():
            check_shape(name, tuple(tensors[name].shape), shape)
        tensor = self.rule.to_megatron([tensors[name] for name in self.hf], self.dims)
        check_shape(self.megatron, tuple(tensor.shape), self.megatron_shape)
        return tensor


def dims_of(config: Config, padded_vocab_size: int) -> Dims:
    """Return the dimensions of a model, from its Hugging Face config.

    Raises:
        ValueError: the padded vocabulary is smaller than the vocabulary.
    """
    vocab = config["vocab_size"]
    if padded_vocab_size < vocab:
        raise ValueError(
            f"the padded vocabulary has {padded_vocab_size} entries, fewer than the model's "
            f"vocab_size of {vocab}; pad to at least {vocab}"
        )
    expert, experts = config.get("moe_intermediate_size", 0), config.get("num_experts", 0)
    router, logits = config.get("router_type"), experts
    if router == "null_experts":
        logits += config.get("num_null_experts") or experts
    recurrence = config.get("recurrence", "none")
    size = config["hidden_size"] if recurrence == "none" else config["recurrent_size"]
    return {
        "R": size,
        "S": {"gru": 3, "rnn": 1, "none": 0}[recurrence] * size,
        "V": vocab,
        "P": padded_vocab_size - vocab,
        "H": config["hidden_size"],
        "Q": config["num_attention_heads"] * config["head_dim"],
        "K": config["num_key_value_heads"] * config["head_dim"],
        "Z": config["head_dim"],
        "E": experts,
        "N": logits,
        "A": experts if router == "relu_rms" else 1,
        "F": expert,
        "G": 2 * expert,
        "D": config["intermediate_size"],
        "groups": config["num_key_value_heads"],
    }


def plan(config: Config, padded_vocab_size: int) -> list[Item]:
    """List every tensor of a model, in the order of its layers.

    Args:
        config: a Hugging Face config of model type `remoe` or `llama`.
        padded_vocab_size: the number of rows in Megatron's embedding.

    Raises:
        ValueError: two rules claim the same name.
    """
    dims = dims_of(config, padded_vocab_size)
    # The embedding, which is the first rule, comes before the layers; all others come after them.
    embedding, *rest = TABLE
    items = [_item(embedding, dims, None)]
    for layer in range(config["num_hidden_layers"]):
        kinds = _kinds(config, layer)
        items += [_item(r, dims, layer) for r in rest if "*" in r.megatron and r.when in kinds]
    kinds = {"always"} if config["tie_word_embeddings"] else {"always", "untied"}
    if (projection := _projection(config)) is not None:
        kinds |= {"recurrent", f"{projection} projection"}
    items += [_item(r, dims, None) for r in rest if "*" not in r.megatron and r.when in kinds]
    for side in ([i.megatron for i in items], [name for i in items for name in i.hf]):
        repeated = sorted(name for name, count in Counter(side).items() if count > 1)
        if repeated:
            raise ValueError(f"the conversion table names {', '.join(repeated)} more than once")
    return items


def _kinds(config: Config, layer: int) -> set[str]:
    common = {"always", f"norm of each {config.get('qk_norm')}"}
    if config["model_type"] != "remoe" or layer in (config.get("mlp_only_layers") or ()):
        return common | {"dense"}
    router = config["router_type"]
    kinds = common | {"moe", router} | ({"logits"} if router != "hash" else set())
    if router in ROUTINGS and ROUTINGS[router].budget == "l1":
        kinds |= {"l1"} | ({"load"} if config.get("load_balancing") == "global_batch" else set())
        kinds |= {"scale"} if router != "relu" else set()
    return kinds | ({"projection"} if _projection(config) == "layer" else set())


def _projection(config: Config) -> str | None:
    """Return which projection recurrent routers have, "layer" or "shared"; None for others."""
    if config.get("recurrence", "none") == "none":
        return None
    return str(config.get("recurrent_projection", "layer"))


def _item(rule: Rule, dims: Dims, layer: int | None) -> Item:
    def named(pattern: str) -> str:
        return pattern.replace("*", str(layer))

    shapes = {name: tuple(dims[letter] for letter in letters) for name, letters in rule.hf.items()}
    parts = [torch.empty(shape, device="meta") for shape in shapes.values()]
    whole = rule.to_megatron(parts, dims)
    hf = {named(name): shape for name, shape in shapes.items()}
    return Item(rule, dims, named(rule.megatron), tuple(whole.shape), hf)


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a weight of Hugging Face, in a model of a dtype."""
    return torch.float32 if is_exact(name) else dtype


def is_exact(name: str) -> bool:
    """Return whether a tensor of Hugging Face is fp32 in models of every dtype."""
    return name.startswith((CELL, CONFIG)) or name.endswith(_STATE)


def check_shape(name: str, found: Shape, expected: Shape) -> None:
    """Check the shape of a tensor.

    Raises:
        ValueError: the tensor has another shape.
    """
    if found != expected:
        raise ValueError(
            f"{name} has shape {list(found)}, but the model's configuration asks for "
            f"{list(expected)}"
        )


def check_names(where: str, found: Iterable[str], expected: Iterable[str]) -> None:
    """Check that the names that were found are those that are expected.

    Raises:
        ValueError: names are missing, or are not expected; the message lists them.
    """
    there, wanted = set(found), set(expected)
    problems = [
        f"{what} {', '.join(sorted(names)[:8])}"
        + (f" and {len(names) - 8} more" * (len(names) > 8))
        for what, names in (("lacks", wanted - there), ("has the unknown", there - wanted))
        if names
    ]
    if problems:
        raise ValueError(
            f"{where} {' and '.join(problems)}; weights and configuration must be of one model"
        )
