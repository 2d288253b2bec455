"""What the tables of a model card say: sizes, router, training and losses of an exported model."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from megatron.remoe.convert.architecture import exported_settings, routing_of
from megatron.remoe.convert.table import CONFIG, PADDING, Config, Item
from megatron.remoe.convert.tokenizer import TokenizerFiles
from remoe.config import ROUTINGS

_SPLITS = {"valid": "validation", "test": "test"}
Rows = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: all of them, and those of the experts among them."""

    total: int
    experts: int

    @classmethod
    def of(cls, items: Iterable[Item]) -> "Sizes":
        """Add up the weights of a plan."""
        sizes = {
            name: torch.Size(shape).numel()
            for item in items
            for name, shape in item.hf.items()
            if not name.startswith((CONFIG, PADDING))
        }
        experts = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
        return cls(sum(sizes.values()), experts)

    def active(self, share: float) -> int:
        """Return the parameters that a token uses, given the share of the experts."""
        return self.total - round(self.experts * (1 - share))


def architecture(config: Config, sizes: Sizes, tokenizer: TokenizerFiles | None) -> Rows:
    """Return the shape of the model."""
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    rows = {
        "parameters": f"{sizes.total:,}",
        "type of the weights": config.get("dtype"),
        "layers": config["num_hidden_layers"],
        "hidden size": config["hidden_size"],
        "query heads, key-value heads": "{}, {}".format(*heads),
        "positions": config["max_position_embeddings"],
        "tied embeddings": "yes" if config["tie_word_embeddings"] else "no",
        "vocabulary": f"{config['vocab_size']:,}",
        "tokenizer": tokenizer.kind if tokenizer else "none in this folder",
    }
    dense = config.get("mlp_only_layers") or []
    if config["model_type"] == "llama":
        return rows | {"width of the MLP": config["intermediate_size"]}
    if dense:
        rows["layers without experts"] = ", ".join(map(str, dense))
        rows["width of the MLP there"] = config["intermediate_size"]
    return rows | {
        "experts": config["num_experts"],
        "width of an expert": config["moe_intermediate_size"],
    }


def active_experts(config: Config) -> float:
    """Return the mean number of active experts of a token: k, or what an adoption has left."""
    adopted = (config.get("training_facts") or {}).get("adoption") or {}
    is_as_adopted = config.get("gate_threshold") == adopted.get("gate_threshold")
    k: float = config["num_experts_per_tok"]
    return float(adopted["active"]) if adopted and is_as_adopted else k


def router(config: Config, facts: Rows, sizes: Sizes) -> Rows:
    """Return the router, its settings, and how many experts it activates."""
    routing = ROUTINGS[routing_of(config["router_type"])]
    active, experts = active_experts(config), config["num_experts"]
    rows: Rows = {
        "router": f"{config['router_type']}: {routing.title} ({routing.source})",
        "active experts of an average token, as set": f"{active:.3g} of {experts}",
        "parameters it uses": f"{sizes.active(active / experts):,}",
    }
    if "sparsity" in facts:
        share = 1 - facts["sparsity"]
        rows |= {
            f"sparsity, mean of the last {facts['sparsity_steps']} steps": (
                f"{facts['sparsity']:.3f} (target {config['target_sparsity']:.3f})"
            ),
            "active experts, as measured there": f"{share * experts:.2f} of {experts}",
            "parameters used, as measured there": f"{sizes.active(share):,}",
        }
    if config.get("l1_coeff"):
        mean = math.fsum(config["l1_coeff"]) / len(config["l1_coeff"])
        rows["coefficient of the L1 penalty"] = f"{mean:.3e}"
    names = [setting.name for setting in exported_settings(config["router_type"])]
    if config.get("recurrence", "none") == "none":
        names = [name for name in names if not name.startswith("recurren")]
    values = {name: config.get(name) for name in names}
    return rows | {f"`{name}`": value for name, value in values.items() if value is not None}


def training(facts: Rows) -> Rows:
    """Return what is known about the training."""
    rows: Rows = {
        "steps": facts.get("iteration"),
        "tokens": f"{facts['tokens']:,}" if facts.get("tokens") else None,
        "sequence length": facts.get("sequence_length"),
        "data": ", ".join(facts.get("data") or []) or "unknown",
        "exported by": f"remoe {facts['version']}" if facts.get("version") else None,
        "commit of remoe": facts.get("commit"),
    }
    return {name: value for name, value in rows.items() if value is not None}


def domains(facts: Rows) -> Rows:
    """Return the share of each domain, if the run had weights for them."""
    names, shares = facts.get("data") or [], facts.get("data_shares") or []
    tokens = facts.get("tokens") or 0
    return {
        name: f"{share:.1%}, about {round(share * tokens):,} tokens"
        for name, share in zip(names, shares, strict=False)
    }


def adoption(facts: Rows) -> Rows:
    """Return what `remoe adopt` has measured while it made the model; empty for other models."""
    found = facts.get("adoption")
    if not found:
        return {}
    k, of = found["k"], "all weights" if found["all_weights"] else "routers"
    losses = {
        f"teacher ({k} active experts)": found["teacher"],
        f"new routers ({k} active experts)": found["initial"],
        "before distillation, at the target": found["pruned"],
        f"adopted ({found['active']:.2f} active experts)": found["final"],
    }
    return {
        "adopted from": f"{found['router']} with {k} active experts of each token, by "
        f"{found['steps']} steps of distillation of {of}",
        **{f"held-out loss, {name}": f"{loss:.4f}" for name, loss in losses.items()},
    }


def losses(facts: Rows) -> list[tuple[str, str, float]]:
    """Return split, domain ("all domains" for all) and loss of every evaluation with a number."""
    found = []
    for named, loss in sorted((facts.get("validation_loss") or {}).items()):
        if loss is not None and math.isfinite(loss):
            split, _, domain = named.partition("/")
            found.append((_SPLITS.get(split, split), domain or "all domains", loss))
    return found


def perplexity(loss: float) -> float:
    """Return `exp(loss)`, as large as a number can be for a loss in nats that is larger."""
    return math.exp(min(loss, 700))


def table(rows: Rows, head: tuple[str, str] = ("", "")) -> str:
    """Return a table in Markdown, of which a value may have several cells."""
    columns = head[1].count("|") + 2
    lines = [f"| {head[0]} | {head[1]} |", "|" + "---|" * columns]
    return "\n".join([*lines, *(f"| {_escaped(name)} | {value} |" for name, value in rows.items())])


def _escaped(name: str) -> str:
    return name.replace("|", "\\|")
