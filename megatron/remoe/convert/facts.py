"""What is known about a model's training, and the model card that presents it."""

import argparse
import math
import subprocess
from pathlib import Path
from typing import Any

from megatron.remoe.analysis.runs import read_rows
from megatron.remoe.convert.table import Config
from remoe.config import ROUTINGS

_STEPS_OF_SPARSITY = 20


def training_facts(
    args: argparse.Namespace, iteration: int, padded_vocab_size: int, run_dir: Path | None
) -> Config:
    """Collect facts for `config.json`, from the arguments and the metrics up to the checkpoint.

    Args:
        args: the run's arguments.
        iteration: the iteration of the checkpoint.
        padded_vocab_size: the number of rows in Megatron's embedding.
        run_dir: a folder in which `metrics.jsonl` may be, beside the path in the arguments.
    """
    known: Config | None = getattr(args, "remoe_training_facts", None)
    if known is not None:  # the checkpoint was made from an exported model
        return known
    samples = getattr(args, "consumed_train_samples", 0) or 0
    facts: Config = {
        "iteration": iteration,
        "tokens": samples * args.seq_length,
        "sequence_length": args.seq_length,
        "padded_vocab_size": padded_vocab_size,
        "data": _data_names(args),
        "commit": _commit(),
    }
    rows = [row for row in _metrics(args, run_dir) if row["iteration"] <= iteration]
    steps = [row for row in rows if "split" not in row]
    values = [row.get("sparsity") for row in steps[-_STEPS_OF_SPARSITY:]]
    sparse = [value for value in values if value is not None]  # a NaN is written as null
    if sparse:
        facts["sparsity"] = sum(sparse) / len(sparse)
        facts["sparsity_steps"] = len(sparse)
    evaluations = [row for row in rows if "split" in row]
    if evaluations:
        last = evaluations[-1]["iteration"]
        facts["validation_loss"] = {
            row["split"]: row.get("lm_loss") for row in evaluations if row["iteration"] == last
        }
        facts["validation_iteration"] = last
    return facts


def _metrics(args: argparse.Namespace, run_dir: Path | None) -> list[dict[str, Any]]:
    named = getattr(args, "metrics_file", None)
    candidates = [run_dir / "metrics.jsonl"] if run_dir else []
    for path in [*candidates, *([Path(named)] if named else [])]:
        if path.is_file():
            return read_rows(path)
    return []


def _data_names(args: argparse.Namespace) -> list[str]:
    """Return the names of the training data without their folders."""
    given = args.train_data_path or args.data_path or []
    names = [entry for entry in map(str, given) if not _is_number(entry)]
    return [Path(name).name for name in names] or (["mock data"] if args.mock_data else [])


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _commit() -> str | None:
    """Return the commit of this code, if it runs from a repository."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def model_card(config: Config, num_params: int, num_active: int) -> str:
    """Return the text of an exported model's README.

    Args:
        config: the model's config.json.
        num_params: the number of all parameters.
        num_active: the number of parameters that an average token uses at the target sparsity.
    """
    facts = config.get("training_facts") or {}
    is_moe = config["model_type"] == "remoe"
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += ["tags:", "- remoe", "- mixture-of-experts"] if is_moe else ["tags:", "- llama"]
    lines += ["---", "", f"# {'ReMoE' if is_moe else 'Dense'} language model", ""]
    if is_moe:
        lines += [_about(config), ""]
    remote = ", trust_remote_code=True" if is_moe else ""
    without = ", trust_remote_code=False" if is_moe else ""  # or transformers asks
    lines += [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # this folder',
        f"tokenizer = AutoTokenizer.from_pretrained(folder{without})",
        f"model = AutoModelForCausalLM.from_pretrained(folder{remote})",
        'inputs = tokenizer("Once", return_tensors="pt", return_token_type_ids=False)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        "```",
        "",
        "## Architecture",
        "",
        *_table(_architecture(config, num_params, num_active)),
        "",
        "## Training",
        "",
        *_table(_training(config, facts)),
        "",
    ]
    return "\n".join(lines)


def _about(config: Config) -> str:
    if config["router_type"] == "relu":
        return (
            "Mixture-of-experts whose router is a ReLU "
            "([arXiv 2412.14711](https://arxiv.org/abs/2412.14711)): the number of active experts "
            "varies by token and layer."
        )
    if config["router_type"].startswith("topk"):
        return f"Mixture-of-experts with a top-k router ({config['router_type']})."
    routing = ROUTINGS[config["router_type"]]
    return f"Mixture-of-experts with {routing.title} ({routing.source})."


def _architecture(config: Config, num_params: int, num_active: int) -> dict[str, Any]:
    rows = {
        "parameters": f"{num_params:,}",
        "layers": config["num_hidden_layers"],
        "hidden size": config["hidden_size"],
        "query heads, key-value heads": f"{config['num_attention_heads']}, "
        f"{config['num_key_value_heads']}",
        "vocabulary": config["vocab_size"],
        "positions": config["max_position_embeddings"],
        "tied embeddings": "yes" if config["tie_word_embeddings"] else "no",
    }
    if config["model_type"] == "llama":
        return rows | {"width of the MLP": config["intermediate_size"]}
    return rows | {
        "parameters an average token uses": f"{num_active:,}",
        "router": config["router_type"],
        "experts, active on average": f"{config['num_experts']}, {config['num_experts_per_tok']}",
        "width of an expert": config["moe_intermediate_size"],
    }


def _training(config: Config, facts: Config) -> dict[str, Any]:
    rows: dict[str, Any] = {
        "steps": facts.get("iteration"),
        "tokens": f"{facts['tokens']:,}" if facts.get("tokens") else None,
        "sequence length": facts.get("sequence_length"),
        "data": ", ".join(facts.get("data") or []) or None,
    }
    if "sparsity" in facts:
        rows[f"sparsity, mean of the last {facts['sparsity_steps']} steps"] = (
            f"{facts['sparsity']:.3f} (target {config['target_sparsity']:.3f})"
        )
    for split, loss in sorted((facts.get("validation_loss") or {}).items()):
        shown = "NaN" if loss is None else f"{loss:.4f}"
        rows[f"validation loss, {split} (step {facts['validation_iteration']})"] = shown
    if adoption := facts.get("adoption"):
        k, of = adoption["k"], "all weights" if adoption["all_weights"] else "routers"
        rows |= {
            "adopted from": f"{adoption['router']} with {k} active experts of each token, by "
            f"{adoption['steps']} steps of distillation of {of}",
            f"held-out loss, teacher ({k} active experts)": f"{adoption['teacher']:.4f}",
            f"held-out loss, new routers ({k} active experts)": f"{adoption['initial']:.4f}",
            "held-out loss, before distillation, at the target": f"{adoption['pruned']:.4f}",
            f"held-out loss, adopted ({adoption['active']:.2f} active experts)": (
                f"{adoption['final']:.4f}"
            ),
        }
    elif config.get("l1_coeff"):
        rows["coefficient of the L1 penalty"] = (
            f"{math.fsum(config['l1_coeff']) / len(config['l1_coeff']):.3e}"
        )
    rows["commit of the converter"] = facts.get("commit")
    return {name: value for name, value in rows.items() if value is not None}


def _table(rows: dict[str, Any]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
