"""Models that go through Megatron-Bridge's own classes, in a process that has Megatron (`Ranks`).

Bridge imports Transformer Engine, ModelOpt and packages of models that are not ours. What of them
is not installed is replaced by empty classes, and the packages whose `__init__` imports every model
of Bridge by packages that import nothing.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import logging
import os
import sys
import types
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.mcore import convert_cases
from tests.mcore.convert_cases import FLAGS, TOKENS

VARIABLE = "REMOE_BRIDGE"  # a folder with `megatron/bridge`, where Bridge is not installed
ABSENT = ["modelopt", "transformer_engine"]
TOPK_IN_PLACE = {"moe_relu_routing": False, "moe_router_pre_softmax": True}
BARE = ("megatron.bridge", "megatron.bridge.models")


def bridge_folder() -> Path | None:
    """The folder of Bridge's package, without an import of it."""
    if VARIABLE in os.environ:
        folder = Path(os.environ[VARIABLE]) / "megatron/bridge"
        assert folder.is_dir(), f"{VARIABLE} is {os.environ[VARIABLE]}, without megatron/bridge"
        return folder
    spec = importlib.util.find_spec("megatron.bridge")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


class _Anything(type):
    """The class of classes that have every class that they are asked for."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, _Anything(name, (), {}))
        return getattr(cls, name)


class _Empty(types.ModuleType):
    """A module that has every class that it is asked for."""

    __path__: list[str] = []
    __getattr__ = _Anything.__getattr__


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages that are not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


def ours():
    """Our module, with Bridge's classes."""
    if BARE[0] not in sys.modules:
        import megatron.training.models.gpt  # noqa: F401  (Megatron itself sees no Transformer Engine)

        root = bridge_folder()
        for name in BARE:
            package = types.ModuleType(name)
            package.__path__ = [str(root.joinpath(*name.split(".")[2:]))]
            sys.modules[name] = package
            parent, _, child = name.rpartition(".")
            setattr(sys.modules[parent], child, package)
        sys.meta_path.append(_Absent())
        logging.getLogger("megatron.bridge").setLevel(logging.ERROR)
        quantization = importlib.import_module("modelopt.torch.quantization.utils")
        quantization.is_quantized = lambda model: False
        import megatron.remoe.bridge  # noqa: F401

        # What asks later finds no Transformer Engine: our checks, and Bridge's of its fusions.
        ABSENT.remove("transformer_engine")
        for name in [n for n in sys.modules if n.partition(".")[0] == "transformer_engine"]:
            del sys.modules[name]
    import megatron.remoe.bridge as bridge

    return bridge


def auto_bridge(folder: Path):
    """Bridge's `AutoBridge` for a folder of ours."""
    ours()
    from megatron.bridge.models.conversion.auto_bridge import AutoBridge

    return AutoBridge.from_hf_pretrained(str(folder), trust_remote_code=True)


def provided(bridge, *, load: bool = True, **changes: Any):
    """The provider of a bridge, and its model."""
    from megatron.remoe.ranks import initialize_layout

    initialize_layout()
    provider = bridge.to_megatron_provider(load_weights=load)
    for name, value in changes.items():
        setattr(provider, name, value)
    provider.gradient_accumulation_fusion = False
    provider.transformer_impl = "local"
    provider.finalize()
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    return provider, model.eval()


@dataclass
class Outcome:
    """What became of a model.

    Attributes:
        logits: largest difference between Bridge's Megatron model and transformers.
        to_ours: the same between Bridge's Megatron model and the one that was exported.
        different: tensors that are not bit-equal after HF -> Megatron -> HF.
        names: tensors that were compared.
        config: keys of the config that differ.
        trained: tensors that differ between Bridge's export of a trained model and ours.
        moved: whether training has changed the values of routers that are in the config.
        trained_config: keys of the config that differ between these exports.
    """

    logits: float
    to_ours: float
    different: list[str]
    names: list[str]
    config: list[str]
    trained: list[str] = field(default_factory=list)
    moved: bool = False
    trained_config: list[str] = field(default_factory=list)


def through_bridge(flags: dict[str, Any], home: Path, *, train: bool = False) -> Outcome:
    """Our export -> Bridge's Megatron model -> Bridge's export."""
    from megatron.remoe.convert import forward
    from megatron.remoe.convert.export import to_hf
    from megatron.remoe.convert.hf_source import HFSource

    ours()  # before Megatron builds anything, since the process keeps what it imports
    model = convert_cases.save(flags, home / "iter_0000003")
    ours_logits, _ = forward.logits_and_maps(model, TOKENS, 100)
    with quiet():
        to_hf(home / "iter_0000003", home / "hf")
        _write_tokenizer(home / "hf")
        hf = HFSource(home / "hf")
        theirs = forward.forward(hf, TOKENS, dtype=hf.dtype, prompt=4, new_tokens=1)
        bridge = auto_bridge(home / "hf")
        grouped = flags.get("moe_grouped_gemm", False)
        _, loaded = provided(bridge, moe_grouped_gemm=grouped)
        logits, _ = forward.logits_and_maps(loaded, TOKENS, 100)
        ours().save_hf_pretrained(bridge, [loaded], home / "again")
    different, names = compare(home / "hf", home / "again")
    outcome = Outcome(
        logits=float((logits - theirs.logits).abs().max()),
        to_ours=float((logits - ours_logits).abs().max()),
        different=different,
        names=names,
        config=config_differences(home / "hf", home / "again"),
    )
    if train:
        _train(flags, home, outcome)
    return outcome


def _write_tokenizer(folder: Path) -> None:
    """A tokenizer, without which Bridge does not save."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = [*(str(number) for number in range(99)), "<|endoftext|>"]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)).save_pretrained(folder)


def _train(flags: dict[str, Any], home: Path, outcome: Outcome) -> None:
    """Train Bridge's model for three steps, and export it by Bridge and by us."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron.remoe.convert.export import to_hf
    from megatron.remoe.convert.source import MegatronSource
    from megatron.remoe.moe.counting import CountsRouting
    from megatron.remoe.train.step import counting_routers, update_routers

    with quiet():
        bridge = auto_bridge(home / "hf")
        provider, model = provided(bridge, moe_grouped_gemm=flags["moe_grouped_gemm"])
        MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # as Megatron's schedules do
        model.train()
        tokens = torch.tensor([TOKENS])
        for _ in range(3):
            loss = model(tokens, torch.arange(len(TOKENS))[None], None, labels=tokens.roll(-1, 1))
            loss.mean().backward()
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.grad is not None:  # of an expert without tokens it may be None
                        weight -= 0.1 * weight.grad
                        weight.grad = None
            routers = counting_routers([model])
            assert all(isinstance(router, CountsRouting) for router in routers)
            update_routers(routers, provider, provider.routing)
        before = json.loads((home / "hf/config.json").read_text())
        ours().save_hf_pretrained(bridge, [model], home / "by_bridge")
        given = vars(MegatronSource(home / "iter_0000003").args) | {"padded_vocab_size": 100}
        plain = {k: v for k, v in given.items() if isinstance(v, convert_cases.PLAIN)}
        args = Namespace(**plain)
        convert_cases._save(model, args, home / "trained/iter_0000003")
        to_hf(home / "trained/iter_0000003", home / "by_us")
    outcome.trained, names = compare(home / "by_us", home / "by_bridge")
    assert names == outcome.names
    outcome.trained_config = config_differences(home / "by_us", home / "by_bridge")
    after = json.loads((home / "by_bridge/config.json").read_text())
    outcome.moved = before["l1_coeff"] != after["l1_coeff"]
    changed = compare(home / "hf", home / "by_bridge")[0]
    assert "model.layers.0.mlp.router.weight" in changed and len(changed) > len(names) / 2


def compare(first: Path, second: Path) -> tuple[list[str], list[str]]:
    """Names of tensors that are not bit-equal, and all names; rows of padding are left out."""
    (one, two) = (_weights(folder) for folder in (first, second))
    assert one.keys() == two.keys(), one.keys() ^ two.keys()
    same = {n for n in one if one[n].dtype == two[n].dtype and torch.equal(one[n], two[n])}
    return sorted(one.keys() - same), sorted(one)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    files = (load_file(file) for file in folder.glob("model*.safetensors"))
    return {name: tensor for tensors in files for name, tensor in tensors.items()}


def config_differences(first: Path, second: Path) -> list[str]:
    """Keys whose values differ between two configs, but for facts, which Bridge does not know."""
    from remoe.hf.configuration_remoe import ReMoEConfig

    one, two = (ReMoEConfig.from_pretrained(folder).to_dict() for folder in (first, second))
    assert one.keys() == two.keys()
    keys = one.keys() - {"training_facts", "transformers_version", "_name_or_path"}
    return sorted(key for key in keys if one[key] != two[key])


def between_ranks(
    flags: dict[str, Any], layout: dict[str, Any], nproc: int, home: Path
) -> tuple[dict[str, list[int]], torch.Tensor | None]:
    """Load a folder into a model of another layout and export it again; called on all ranks.

    Returns:
        The shapes of this rank's parameters, and the loss of every token, `[T]`, unless a rank has
        only some of the layers.
    """
    from megatron.remoe.convert.forward import build_model

    bridges = ours()
    model, _ = build_model(FLAGS | flags | layout, nproc)
    with quiet():
        bridge = auto_bridge(home / "hf")
        bridge.load_hf_weights([model])
        bridges.save_hf_pretrained(bridge, [model], home / "ranks")
    shapes = {name: list(weight.shape) for name, weight in model.named_parameters()}
    if "pipeline_model_parallel_size" in layout:
        return shapes, None
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        losses = model(tokens, torch.arange(len(TOKENS))[None], None, labels=tokens.roll(-1, 1))
    return shapes, losses[0]


def losses_in_transformers(folder: Path, num_logits: int) -> torch.Tensor:
    """The loss of every token, `[T]`, with further logits of zero, as Megatron has them."""
    from megatron.remoe.convert.exported import load

    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        logits = load(folder, torch.float32)(tokens[None]).logits[0]
    padded = torch.nn.functional.pad(logits, (0, num_logits - logits.shape[1]))
    return torch.nn.functional.cross_entropy(padded, tokens.roll(-1), reduction="none")


def names_of_transformer_engine(home: Path) -> list[str]:
    """Load a folder into experts that are named as those of Transformer Engine, and export it."""
    bridges = ours()
    with quiet():
        bridge = auto_bridge(home / "hf")
        _, model = provided(bridge, load=False)
        for layer in model.decoder.layers:
            stacked = layer.mlp.experts
            layer.mlp.experts = experts = torch.nn.Module()
            experts.config = stacked.config
            for name, kind in (("linear_fc1", "Column"), ("linear_fc2", "Row")):
                linear = type(f"TE{kind}ParallelGroupedLinear", (torch.nn.Module,), {})()
                linear.config = stacked.config
                for number, weight in enumerate(getattr(stacked, name)):
                    setattr(linear, f"weight{number}", torch.nn.Parameter(weight.detach().clone()))
                setattr(experts, name, linear)
        bridge.load_hf_weights([model])
        bridges.save_hf_pretrained(bridge, [model], home / "te")
    return compare(home / "hf", home / "te")[0]


def refusals(flags: dict[str, Any], home: Path) -> dict[str, str]:
    """What our bridge says of models and folders that do not fit."""
    from megatron.remoe.convert.forward import build_model

    said = {}
    bridge = auto_bridge(home / "hf")
    with quiet():
        topk, _ = build_model(FLAGS | flags | TOPK_IN_PLACE)
        said["topk"] = message(bridge.load_hf_weights, [topk])
        said["topk, saved"] = message(ours().save_hf_pretrained, bridge, [topk], home / "no")
        model, _ = build_model(FLAGS | flags)
        said["stale"] = message(bridge.save_hf_pretrained, [model], home / "no")
        said["lacks"] = message(auto_bridge(home / "lacks").load_hf_weights, [model])
        said["without l1_coeff"] = message(auto_bridge(home / "without").load_hf_weights, [model])
        said["rope"] = message(auto_bridge(home / "rope").to_megatron_provider)
    return said


def message(function, *args: Any) -> str:
    """The message of the `ValueError` that a function raises."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return ""


def config_and_hook(home: Path) -> tuple[list[str], bool, str]:
    """The config from a provider, whether Bridge's hook becomes ours, and what it calls."""
    from functools import partial

    from megatron.core.distributed import finalize_model_grads

    bridges = ours()
    bridge = auto_bridge(home / "hf")
    provider = bridge.to_megatron_provider(load_weights=False)
    config = bridges.ReMoEBridge.megatron_to_hf_config(provider)
    original = bridge.hf_pretrained.config.to_dict()
    values = {"l1_coeff", "training_facts", "format_version", "top_p_odds", "threshold_updates"}
    different = sorted(k for k in config.keys() - values if config[k] != original[k])
    type(bridge.hf_pretrained.config)(**config)  # which checks it
    assert provider.finalize_model_grads_func is None
    provider.finalize_model_grads_func = partial(finalize_model_grads, pg_collection="groups")
    hook = provider.finalize_model_grads_func
    from megatron.remoe.train.step import FinalizeStep

    return different, isinstance(hook.func, FinalizeStep), hook.keywords["pg_collection"]


def quiet():
    """Drop what Bridge prints."""
    return contextlib.redirect_stdout(io.StringIO())
