"""The model card of an exported model: README.md, with the metadata that the hub reads.

Everything in it is derived from the files in the folder: the config with the facts about the
training, the sizes of the weights, the tokenizer, and `budget.json` if there is one.
"""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from megatron.remoe.convert import card_tables as tables
from megatron.remoe.convert.architecture import routing_of
from megatron.remoe.convert.hf_source import HFSource
from megatron.remoe.convert.source import Source
from megatron.remoe.convert.table import Config
from megatron.remoe.convert.tokenizer import TokenizerFiles
from megatron.remoe.files import read_json_object, write_whole
from remoe.config import ROUTINGS

NAME = "README.md"
# What `remoe budget` writes, and what of it an export copies.
BUDGET = "budget.json"
BUDGET_FILES = (BUDGET, "budget.png")


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


def model_card(source: Source, config: Config, folder: Path, license: str | None) -> str:
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
    sizes = tables.Sizes.of(source.items)
    is_moe = config["model_type"] == "remoe"
    kind = "Dense" if not is_moe else "ReMoE" if _is_relu(config) else "Mixture-of-experts"
    title = f"{kind} language model of {sizes.total:,} parameters"
    parts = [
        f"---\n{_metadata(config, facts, title, license).to_yaml().strip()}\n---",
        f"# {title}",
        _about(config, facts, sizes),
        f"## Use\n\n```python\n{_code(config, tokenizer)}\n```",
        "## Architecture\n\n" + tables.table(tables.architecture(config, sizes, tokenizer)),
    ]
    if is_moe:
        parts.append("## Router\n\n" + tables.table(tables.router(config, facts, sizes)))
    parts.append("## Training\n\n" + tables.table(tables.training(facts) | tables.adoption(facts)))
    if domains := tables.domains(facts):
        parts.append(tables.table(domains, head=("domain", "share of the training tokens")))
    if losses := tables.losses(facts):
        step = facts.get("validation_iteration")
        measured = f"Measured at step {step} by the training run, in nats."
        rows = {
            f"{domain}, {split}": f"{loss:.4f} | {tables.perplexity(loss):.2f}"
            for split, domain, loss in losses
        }
        head = ("text", "loss per token | perplexity")
        parts += ["## Evaluation", measured, tables.table(rows, head=head)]
    parts += _budget(folder)
    parts.append("## Limitations\n\n" + "\n".join(f"- {one}" for one in _limits(config, facts)))
    parts.append("## License\n\n" + (license or "The author of this folder claims no license yet."))
    return "\n\n".join(parts) + "\n"


def _metadata(config: Config, facts: tables.Rows, title: str, license: str | None) -> ModelCardData:
    is_moe = config["model_type"] == "remoe"
    tags = ["remoe", "mixture-of-experts", config["router_type"]] if is_moe else ["remoe", "llama"]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=domain,  # results of one type and split would become one
            dataset_name=domain,
            dataset_split=split,
            metric_type=kind,
            metric_name=title,
            metric_value=round(value, 6),
        )
        for split, domain, loss in tables.losses(facts)
        for kind, title, value in (
            ("loss", "nats per token", loss),
            ("perplexity", "perplexity per token", tables.perplexity(loss)),
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


def _is_relu(config: Config) -> bool:
    return config.get("router_type") == "relu"


def _about(config: Config, facts: tables.Rows, sizes: tables.Sizes) -> str:
    tokens = facts.get("tokens")
    trained = f", trained on {tokens:,} tokens" if tokens else ""
    if config["model_type"] == "llama":
        return f"A dense language model (LLaMA) of {sizes.total:,} parameters{trained}."
    share = tables.active_experts(config) / config["num_experts"]
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
    without = ", trust_remote_code=False" if is_moe else ""  # or transformers asks
    names = "AutoModelForCausalLM" + (", AutoTokenizer" if tokenizer else "")
    lines = [
        f"from transformers import {names}",
        "",
        'folder = "."  # this folder, or its name on the hub',
        f"model = AutoModelForCausalLM.from_pretrained(folder{remote})",
    ]
    if tokenizer:
        lines += [
            f"tokenizer = AutoTokenizer.from_pretrained(folder{without})",
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


def _budget(folder: Path) -> list[str]:
    """Return the section about the curve that `remoe budget` has measured; empty without one."""
    file = folder / BUDGET
    if not file.is_file():
        return []
    measured = read_json_object(file, "run remoe budget again")
    try:
        (curve,) = measured["curves"]
        points = sorted(curve["points"], key=lambda point: float(point["active"]))
        rows = {
            f"{point['active']:.2f}": f"{point['loss']:.4f} ± {point['half_width']:.4f}"
            for point in points
        }
        tokens = measured["sequences"] * measured["sequence_length"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is no curve of one model ({type(error).__name__}: {error}); measure this "
            f"model alone with remoe budget, or delete the file"
        ) from None
    said = (
        "The loss per token with the same weights at other mean numbers of active experts per "
        f"token and layer, by `remoe budget` on {tokens:,} tokens; ± is half of a 95% interval "
        f"over sequences. {BUDGET} has the points."
    )
    has_plot = (folder / "budget.png").is_file()
    plot = ["![Loss against active experts](budget.png)"] if has_plot else []
    return [
        "## Loss against budget",
        said,
        *plot,
        tables.table(rows, head=("active experts", "loss")),
    ]


def _limits(config: Config, facts: tables.Rows) -> list[str]:
    limits = [
        "It is a pretrained language model. It was not trained to follow instructions or to be "
        "safe, and what it says may be false, harmful or meaningless.",
        "The losses above are all that was measured here, on text of the domains that they name."
        if tables.losses(facts)
        else "Its quality was not measured.",
    ]
    if facts.get("data") == ["mock data"]:
        limits.append("It was trained on Megatron's mock data, so that it knows no language.")
    if config["model_type"] == "llama":
        return limits
    limits.append(
        "Its code is in this folder, so that transformers asks for `trust_remote_code=True`: read "
        "the Python files before."
    )
    if ROUTINGS[routing_of(config["router_type"])].budget != "fixed k":
        limits.append(
            "The number of active experts holds on average. Single tokens, and text of other kinds "
            "than the training text, may use more or fewer, and so take more or less time."
        )
    return limits
