"""Turn a launch script of Megatron-LM, or of its fork thu-ml/ReMoE (2024), into a config of ours.

The script is followed and never run (`shell`). Each flag of its command keeps its name, or stands
in one of the tables below with the reason why it is renamed, left out or refused. The flags that
are in no parser any more are those of the fork's `arguments.py` that Megatron 0.19 lacks.
"""

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron.remoe.arguments import megatron_parser
from megatron.remoe.convert.shell import Script, read_script
from megatron.remoe.run.config import load_flags
from megatron.remoe.run.plan import Place, plan

_GPT2_ENTRIES = 50257
_TOKENIZER = "data/tokenizer"
_EVAL_INTERVAL = 1000  # the default of 2024; Megatron 0.19 has none

_RUN_DIR = "the run directory has it"
_CHECKPOINTS = "checkpoints are always torch_dist"
_ATTENTION = "the backend chooses its attention"
_MACHINE = "remoe train chooses it for the machine"
_STARTS = (
    "it would hold for every resume as well; to start from a checkpoint, set base to the "
    "model.yaml of remoe convert from-fork"
)
# Flags that the config does not need, and why.
_DROPPED = {
    "save": _RUN_DIR,
    "load": f"{_RUN_DIR}; a checkpoint of the fork is converted with remoe convert from-fork",
    "wandb_save_dir": _RUN_DIR,
    "data_cache_path": _RUN_DIR,
    "use_mcore_models": "Megatron has no others",
    "no_position_embedding": "Megatron's models read position_embedding_type alone",
    "use_flash_attn": _ATTENTION,
    "attention_backend": _ATTENTION,
    "no_masked_softmax_fusion": _ATTENTION,
    "transformer_impl": _MACHINE,
    "distributed_backend": _MACHINE,
    "local_rank": "torchrun sets it",
    "use_dist_ckpt": _CHECKPOINTS,
    "dist_ckpt_format": _CHECKPOINTS,
    "ckpt_format": _CHECKPOINTS,
    "auto_detect_ckpt_format": _CHECKPOINTS,
    "no_load_optim": _STARTS,
    "no_load_rng": _STARTS,
    "finetune": _STARTS,
    "exit_on_missing_checkpoint": _STARTS,
    "use_checkpoint_args": _STARTS,
    "no_async_tensor_model_parallel_allreduce": "Megatron removed it",
    "no_scatter_gather_tensors_in_pipeline": "Megatron removed it",
    "moe_use_legacy_grouped_gemm": "Megatron removed that kernel; moe_grouped_gemm has another",
    "renormalize_blend_weights": "Megatron removed it",
    "s3_cache_path": "Megatron removed it",
}
# Flags without which the model or its data would be another one.
_REFUSED = {
    "use_legacy_models": "Megatron removed the models from before megatron-core",
    "encoder_tensor_model_parallel_size": "Megatron removed layouts of encoders",
    "encoder_pipeline_model_parallel_size": "Megatron removed layouts of encoders",
    "pipeline_model_parallel_split_rank": "Megatron removed layouts of encoders",
    "standalone_embedding_stage": "Megatron removed it; use pipeline_model_parallel_layout",
    "moe_extended_tp": "Megatron removed it; set --expert-tensor-parallel-size in the script",
    "tiktoken_special_tokens": "Megatron removed it; use a HuggingFaceTokenizer",
    "hybrid_attention_ratio": "Megatron removed it; write the layers as hybrid_layer_pattern",
    "hybrid_mlp_ratio": "Megatron removed it; write the layers as hybrid_layer_pattern",
    **dict.fromkeys(
        ("retro_project_dir", "retro_add_retriever", "retro_cyclic_train_iters",
         "retro_encoder_layers", "retro_encoder_hidden_dropout", "retriever_seq_length",
         "retro_encoder_attention_dropout"),
        "Megatron removed its models with retrieval",
    ),
}  # fmt: skip


@dataclass
class Conversion:
    """A script as a config.

    Attributes:
        flags: the config, without `run_dir`.
        run_dir: where its run goes.
        notes: every flag that was renamed, left out or added, and why.
    """

    flags: dict[str, Any]
    run_dir: str
    notes: list[str] = field(default_factory=list)

    def to_yaml(self, source: str) -> str:
        """Return the text of the config's file, with the notes as comments."""
        lines = [f"# Made by remoe convert script from {source}.", "#"]
        lines += [f"# - {note}" for note in self.notes]
        values = {"run_dir": self.run_dir} | self.flags
        text = yaml.safe_dump(values, sort_keys=False, width=98, default_flow_style=None)
        return "\n".join(lines) + "\n" + text


def convert(path: Path, given: list[str], *, name: str | None = None) -> Conversion:
    """Convert a script, and check the config as `remoe train` checks it, without its paths.

    Args:
        path: the script.
        given: values of its variables and arguments, each as NAME=VALUE or NUMBER=VALUE.
        name: of the run; by default the script's.

    Raises:
        ValueError: the script cannot be followed, or its run would be refused.
    """
    try:
        script = read_script(_text(path), _given(given))
        found = _Flags.of(script, name or path.stem)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    nodes, processes = _place(script, found.flags)
    try:
        plan(load_flags(found.config(), str(path)), Place(nodes, processes, "print"))
    except ValueError as error:
        raise ValueError(f"{path} makes a config that remoe train refuses: {error}") from error
    return Conversion(found.flags, found.run_dir, found.notes)


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise ValueError(f"it cannot be read ({reason}); name a launch script") from error


def _given(pairs: list[str]) -> dict[str, str]:
    given = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"\w+", name):
            raise ValueError(f"--set {pair!r} is not of the form NAME=VALUE, such as 1=8")
        given[name] = value
    return given


def _place(script: Script, flags: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many machines, and processes on each, the script starts.

    What it does not say is the smallest number that its layout needs.
    """
    words = " ".join(script.launch.launcher).replace("=", " ")
    numbers = dict(re.findall(r"--(nnodes|nproc[-_]per[-_]node) (\d+)", words))
    processes = next((int(n) for key, n in numbers.items() if key != "nnodes"), 0)
    dense, experts = 1, 1
    for key in ("tensor", "pipeline", "context"):
        size = flags.get(f"{key}_model_parallel_size", flags.get(f"{key}_parallel_size", 1))
        dense *= size if isinstance(size, int) else 1
    expert_size = flags.get("expert_model_parallel_size", 1)
    if isinstance(expert_size, int):
        pipeline = flags.get("pipeline_model_parallel_size", 1)
        experts = expert_size * (pipeline if isinstance(pipeline, int) else 1)
    needed = math.lcm(max(1, dense), max(1, experts))
    nodes = int(numbers.get("nnodes", 1)) or 1
    # The scripts default to one process, and are called with more.
    return (nodes, processes) if processes * nodes > 1 else (1, needed)


@dataclass
class _Flags:
    """The flags of a script while they are translated."""

    flags: dict[str, Any]
    run_dir: str
    notes: list[str]

    @classmethod
    def of(cls, script: Script, name: str) -> "_Flags":
        if script.launch.program != "pretrain_gpt.py":
            raise ValueError(
                f"line {script.launch.line}: {script.launch.program} is another program; only "
                f"launches of pretrain_gpt.py can be converted"
            )
        found = cls({}, f"runs/{name}", list(script.notes))
        found._launcher(script)
        found._read(script)
        for rule in (_tokenizer, _logs, _recompute, _dispatcher, _attention_mask,
                     _sequence_parallel, _defaults):  # fmt: skip
            rule(found)
        return found

    def config(self) -> dict[str, Any]:
        """Return the config as the mapping that its file holds."""
        return {"run_dir": self.run_dir} | self.flags

    def _launcher(self, script: Script) -> None:
        words = script.launch.launcher
        if options := [word for word in words if word.startswith("-")]:
            self.notes.append(
                f"{' '.join(options)}: of {words[0]}; remoe train starts a process per GPU (or "
                f"nproc=N), and remoe launch starts several machines"
            )

    def drop(self, key: str, why: str) -> None:
        """Leave a flag out, if it is given."""
        if taken := self._taken(key):
            self.notes.append(f"{taken} is left out: {why}")

    def replace(self, key: str, flags: dict[str, Any], why: str = "") -> None:
        """Put other flags in the place of one, if it is given."""
        if taken := self._taken(key):
            others = ", ".join(f"{name}: {_said(other)}" for name, other in flags.items())
            self.notes.append(f"{taken} becomes {others}{why}")
            self.flags |= flags

    def _taken(self, key: str) -> str | None:
        """Remove a flag, and return it as the script has it; None if it is not given."""
        if key not in self.flags:
            return None
        value = self.flags.pop(key)
        return f"--{key.replace('_', '-')}" + ("" if value is True else f" {_said(value)}")

    def add(self, key: str, value: Any, why: str) -> None:
        """Add a flag of which the script says nothing."""
        self.flags[key] = value
        self.notes.append(f"{key}: {_said(value)} is added: {why}")

    def _read(self, script: Script) -> None:
        """Read the options of the command; those that are left out may have unknown values."""
        actions = {
            option: action
            for action in megatron_parser()._actions
            for option in action.option_strings
        }
        options: list[tuple[str, list[str]]] = []
        for word in script.launch.flags:
            if word.startswith("--"):
                option, equals, value = word.partition("=")
                options.append((option, [value] if equals else []))
            elif options:
                options[-1][1].append(word)
            else:
                raise ValueError(
                    f"line {script.launch.line}: {script.known(word)!r} after the program is no "
                    f"flag; write it behind its flag"
                )
        unwanted: dict[str, list[str]] = {}
        for option, words in options:
            key = script.known(option)[2:].replace("-", "_")
            if key in _REFUSED:
                raise ValueError(f"{option} has no counterpart: {_REFUSED[key]}")
            if key in _DROPPED:
                unwanted[key] = words
                continue
            if option not in actions:
                raise ValueError(
                    f"{option} is a flag of neither Megatron nor the fork; correct it, or remove it"
                )
            value = _value(actions[option], option, [script.known(word) for word in words])
            if key in self.flags and self.flags[key] != value:
                self.notes.append(f"{option} is given twice; the last one, {_said(value)}, counts")
            self.flags[key] = value
        for key, words in unwanted.items():
            value = " ".join(w if script.is_known(w) else "..." for w in words)
            self.flags[key] = value or True
            self.drop(key, _DROPPED[key])


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _value(action: argparse.Action, option: str, words: list[str]) -> Any:
    """Return the value of a flag as a config has it."""
    if action.nargs == 0:
        if words:
            raise ValueError(f"{option} takes no value, and has {' '.join(words)!r}; remove that")
        return True
    values = [_number(action.type, word) for word in words]
    if action.nargs is not None and len(values) != 1:
        return values
    if len(values) != 1:
        raise ValueError(f"{option} has {len(values)} values, {words}; it takes one")
    return values[0]


def _number(kind: Any, word: str) -> Any:
    """Return a number where the flag, or a list of paths and weights, takes one."""
    is_whole = re.fullmatch(r"-?(0|[1-9]\d*)", word)
    if kind is int and is_whole:
        return int(word)
    number = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
    if kind in (float, None) and re.fullmatch(number, word) and (kind is float or "." in word):
        return float(word)
    return word


def _tokenizer(found: _Flags) -> None:
    """Replace GPT-2's two files by a folder, with rows padded as the fork pads them."""
    flags = found.flags
    kind = flags.get("tokenizer_type", "GPT2BPETokenizer" if "vocab_file" in flags else None)
    if kind != "GPT2BPETokenizer":
        return
    rows = flags.get("make_vocab_size_divisible_by", 128)
    rows *= flags.get("tensor_model_parallel_size", 1)
    padded = math.ceil(_GPT2_ENTRIES / rows) * rows
    why = " (remoe data tokenize makes this folder of both files)"
    flags.setdefault("tokenizer_type", kind)
    found.drop("merge_file", "it is part of the tokenizer's folder")
    found.drop("vocab_file", "it is part of the tokenizer's folder")
    folder = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": _TOKENIZER}
    found.replace("tokenizer_type", folder, why)
    found.drop("make_vocab_size_divisible_by", "padded_vocab_size says it for every layout")
    why = f"GPT-2's {_GPT2_ENTRIES:,} entries, up to a multiple of {rows}"
    found.add("padded_vocab_size", padded, why)


def _logs(found: _Flags) -> None:
    found.replace("tensorboard_dir", {"tensorboard_dir": f"{found.run_dir}/tensorboard"})


def _recompute(found: _Flags) -> None:
    """Replace `--moe-layer-recompute`, with which Megatron 0.19 recomputes attention as well."""
    granularity = found.flags.get("recompute_granularity")
    if granularity == "full":
        found.drop("moe_layer_recompute", "recompute_granularity full recomputes it too")
        return
    modules = found.flags.get("recompute_modules", [])
    modules = modules if isinstance(modules, list) else [modules]
    if granularity == "selective" and not modules:
        modules = ["core_attn"]  # Megatron's default
    flags = {"recompute_granularity": "selective", "recompute_modules": [*modules, "moe"]}
    found.replace("moe_layer_recompute", flags)


def _dispatcher(found: _Flags) -> None:
    if found.flags.get("moe_token_dispatcher_type") == "alltoall_seq":
        why = ": Megatron removed alltoall_seq"
        found.replace("moe_token_dispatcher_type", {"moe_token_dispatcher_type": "alltoall"}, why)


def _attention_mask(found: _Flags) -> None:
    key = "no_create_attention_mask_in_dataloader"
    if key not in found.flags and "reset_attention_mask" not in found.flags:
        found.add(key, True, "attention is causal without a mask in memory")


def _sequence_parallel(found: _Flags) -> None:
    if found.flags.get("tensor_model_parallel_size", 1) == 1:
        found.drop("sequence_parallel", "it has no effect without tensor parallelism")


def _defaults(found: _Flags) -> None:
    if "eval_interval" not in found.flags:
        found.add("eval_interval", _EVAL_INTERVAL, "the default of 2024")
    if "data_path" in found.flags or "train_data_path" in found.flags:
        found.notes.append(
            "data paths stay as they are: Megatron's .bin and .idx files of 2024 can still be "
            "read; correct the paths if the run starts in another folder"
        )
