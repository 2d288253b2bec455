"""The model card of an exported model: README.md, with the metadata that the hub reads.

Everything in it is derived from the files in the folder: the config with the facts about the
training, the sizes of the weights, the tokenizer, and `budget.json` if there is one.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from megatron.remoe.convert.architecture import exported_settings, routing_of
from megatron.remoe.convert.hf_source import HFSource
from megatron.remoe.convert.source import Source
from megatron.remoe.convert.table import CONFIG, PADDING, Config, Item
from megatron.remoe.convert.tokenizer import TokenizerFiles
from megatron.remoe.files import read_json_object, write_whole
from remoe.config import ROUTINGS

NAME = "README.md"
# What `remoe budget` writes, and what of it an export copies.
BUDGET = "budget.json"
BUDGET_FILES = (BUDGET, "budget.png")
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


def check_license(name: str | None) -> None:
    """Check the form of a license's identifier.

    Raises:
        ValueError: the hub has no identifiers of this form.
    """
    if name is not None and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name) is None:
        raise ValueError(
            f"license is {name!r}; it must be an identifier of the Hugging Face hub, such as "
            f"apache-2.0, mit, cc-by-4.0 or other"
        )


def rewrite(folder: Path, license: str | None = None) -> Path:
    """Write the card of an exported model anew, with a license or the one that it had.

    Returns:
        The card's file.

    Raises:
        ValueError: the folder is no exported model.
    """
    check_license(license)
    source = HFSource(folder)
    file = folder / NAME
    if license is None and file.is_file():
        try:
            license = ModelCard.load(file).data.license
        except Exception as error:  # of YAML, or of what is in it
            reason = " ".join(str(error).split())
            raise ValueError(f"{file} has no valid metadata ({reason}); delete it") from error
    write_whole(file, model_card(source, source.config, folder, license))
    return file


def _are_numbers(*values: Any) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)


def model_card(source: Source, config: Config, folder: Path, name: str, license: str | None) -> str:
    """Return the text of an exported model's README.

    Args:
        source: the open model.
        config: its config.json as it is in the folder.
        folder: the folder, which may have `budget.json` and `budget.png`.
        license: an identifier of the hub; None claims no license.

    Raises:
        ValueError: `budget.json` is damaged.
    """
    tokenizer = source.tokenizer
    facts = config.get("training_facts") or {}
    sizes = Sizes.of(source.items)
    is_moe = config["model_type"] == "remoe"
    kind = "Dense" if not is_moe else "ReMoE" if _is_relu(config) else "Mixture-of-experts"
    title = f"{kind} language model of {sizes.total:,} parameters"
    parts = [
        f"---\n{_metadata(config, facts, title, license).to_yaml().strip()}\n---",
        f"# {title}",
        _about(config, facts, sizes),
        f"## Use\n\n```python\n{_code(config, tokenizer)}\n```",
        "## Architecture\n\n" + _table(_architecture(config, sizes, tokenizer)),
    ]
    if is_moe:
        parts.append("## Router\n\n" + _table(_router(config, facts, sizes)))
    parts.append("## Training\n\n" + _table(_training(config, facts)))
    if domains := _domains(facts):
        parts.append(_table(domains, head=("domain", "share of the training tokens")))
    if losses := _losses(facts):
        step = facts.get("validation_iteration")
        measured = f"Measured at step {step} by the training run, in nats."
        rows = {shown: f"{loss:.4f} | {math.exp(min(loss, 700)):.2f}" for _, shown, loss in losses}
        head = ("text", "loss per token | perplexity")
        parts += ["## Evaluation", measured, _table(rows, head=head)]
    parts += _budget(folder)
    parts.append("## Limitations\n\n" + "\n".join(f"- {one}" for one in _limits(config, facts)))
    parts.append("## License\n\n" + (license or "The author of this folder claims no license yet."))
    return "\n\n".join(parts) + "\n"


def _metadata(config: Config, facts: Rows, title: str, license: str | None) -> ModelCardData:
    is_moe = config["model_type"] == "remoe"
    tags = ["remoe", "mixture-of-experts", config["router_type"]] if is_moe else ["remoe", "llama"]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=domain or "text",
            dataset_name=domain or "all domains",
            dataset_split=_SPLITS.get(split, split),
            metric_type=kind,
            metric_name=title,
            metric_value=round(value, 6),
        )
        for split, domain, loss in _by_domain(facts)
        for kind, title, value in (
            ("loss", "nats per token", loss),
            ("perplexity", "perplexity per token", math.exp(min(loss, 700))),
        )
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        tags=tags,
        model_name=title if results else None,
        eval_results=results or None,
    )


def _by_domain(facts: Rows) -> list[tuple[str, str, float]]:
    """Return split, domain ("" for all) and loss of every evaluation that has a number."""
    found = []
    for named, loss in sorted((facts.get("validation_loss") or {}).items()):
        if _are_numbers(loss):
            split, _, domain = named.partition("/")
            found.append((split, domain, loss))
    return found


def _losses(facts: Rows) -> list[tuple[str, str, float]]:
    return [
        (split, f"{domain or 'all domains'}, {_SPLITS.get(split, split)}", loss)
        for split, domain, loss in _by_domain(facts)
    ]


def _is_relu(config: Config) -> bool:
    return config.get("router_type") == "relu"


def _about(config: Config, facts: Rows, sizes: Sizes) -> str:
    tokens = facts.get("tokens")
    trained = f", trained on {tokens:,} tokens" if tokens else ""
    if config["model_type"] == "llama":
        return f"A dense language model (LLaMA) of {sizes.total:,} parameters{trained}."
    share = config["num_experts_per_tok"] / config["num_experts"]
    text = (
        f"A mixture-of-experts language model of {sizes.total:,} parameters, of which an average "
        f"token uses {sizes.active(share):,}{trained}."
    )
    if _is_relu(config):
        text += (
            " Its router is a ReLU ([arXiv 2412.14711](https://arxiv.org/abs/2412.14711)): the "
            "number of active experts varies by token and layer."
        )
    return text


def _code(config: Config, tokenizer: TokenizerFiles | None) -> str:
    is_moe = config["model_type"] == "remoe"
    remote = ", trust_remote_code=True" if is_moe else ""
    names = "AutoModelForCausalLM" + (", AutoTokenizer" if tokenizer else "")
    lines = [
        f"from transformers import {names}",
        "",
        'folder = "."  # this folder, or its name on the hub',
        f"model = AutoModelForCausalLM.from_pretrained(folder{remote})",
    ]
    if tokenizer:
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained(folder{remote})",
            'inputs = tokenizer("Once", return_tensors="pt", return_token_type_ids=False)',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        ]
    else:  # its tokens are what the training data had
        ids = "torch.tensor([[0, 1, 2]])"
        lines.insert(0, "import torch")
        lines += [
            f'inputs = {{"input_ids": {ids}, "attention_mask": torch.ones(1, 3)}}',
            "print(model.generate(**inputs, max_new_tokens=40))",
        ]
    if is_moe:
        lines += [
            "routing = model(**inputs, output_routing=True)",
            "print(routing.active_experts)  # of every layer and token",
        ]
    return "\n".join(lines)


def _architecture(config: Config, sizes: Sizes, tokenizer: TokenizerFiles | None) -> Rows:
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


def _router(config: Config, facts: Rows, sizes: Sizes) -> Rows:
    routing = ROUTINGS[routing_of(config["router_type"])]
    k, experts = config["num_experts_per_tok"], config["num_experts"]
    rows: Rows = {
        "router": f"{config['router_type']}: {routing.title} ({routing.source})",
        "active experts of an average token, as set": f"{k} of {experts}",
        "parameters it uses": f"{sizes.active(k / experts):,}",
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
    values = {s.name: config.get(s.name) for s in exported_settings(config["router_type"])}
    return rows | {f"`{name}`": value for name, value in values.items() if value is not None}


def _training(config: Config, facts: Rows) -> Rows:
    rows: Rows = {
        "steps": facts.get("iteration"),
        "tokens": f"{facts['tokens']:,}" if facts.get("tokens") else None,
        "sequence length": facts.get("sequence_length"),
        "data": ", ".join(facts.get("data") or []) or "unknown",
        "software": f"remoe {facts['version']}" if facts.get("version") else None,
        "its commit": facts.get("commit"),
    }
    return {name: value for name, value in rows.items() if value is not None}


def _domains(facts: Rows) -> Rows:
    names, shares = facts.get("data") or [], facts.get("data_shares") or []
    tokens = facts.get("tokens") or 0
    return {
        name: f"{share:.1%}, about {round(share * tokens):,} tokens"
        for name, share in zip(names, shares, strict=False)
    }


def _budget(folder: Path) -> list[str]:
    """Return the section about the curve that `remoe budget` has measured; empty without one."""
    file = folder / BUDGET
    if not file.is_file():
        return []
    points = read_json_object(file, "run remoe budget again").get("points")
    if not isinstance(points, list) or not all(
        isinstance(p, dict) and _are_numbers(p.get("active_experts"), p.get("loss")) for p in points
    ):
        raise ValueError(
            f"{file} has no points with active_experts and loss; run remoe budget again"
        )
    points = sorted(points, key=lambda point: point["active_experts"])
    rows = {f"{point['active_experts']:.2f}": f"{point['loss']:.4f}" for point in points}
    said = (
        "The loss per token with the same weights at other mean numbers of active experts per "
        f"token and layer (`remoe budget`; {BUDGET} has the points)."
    )
    has_plot = (folder / "budget.png").is_file()
    plot = ["![Loss against active experts](budget.png)"] if has_plot else []
    return ["## Loss against budget", said, *plot, _table(rows, head=("active experts", "loss"))]


def _limits(config: Config, facts: Rows) -> list[str]:
    limits = [
        "It is a pretrained language model. It was not trained to follow instructions or to be "
        "safe, and what it says may be false, harmful or meaningless.",
        "The losses above are all that was measured here, on text of the domains that they name."
        if _losses(facts)
        else "Its quality was not measured.",
    ]
    if facts.get("data") == ["mock data"]:
        limits.append("It was trained on Megatron's mock data, so that it knows no language.")
    if config["model_type"] == "llama":
        return limits
    limits.append(
        "Its code is in this folder, so that transformers asks for `trust_remote_code=True`: read "
        "the two Python files before."
    )
    if ROUTINGS[routing_of(config["router_type"])].budget != "fixed k":
        limits.append(
            "The number of active experts holds on average. Single tokens, and text of other kinds "
            "than the training text, may use more or fewer, and so take more or less time."
        )
    return limits


def _table(rows: Rows, head: tuple[str, str] = ("", "")) -> str:
    columns = head[1].count("|") + 2
    lines = [f"| {head[0]} | {head[1]} |", "|" + "---|" * columns]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())])
