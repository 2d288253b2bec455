"""Models with experts in the same terms: those of any format of ours, and four of transformers.

The model for transformers computes in any case, to which a checkpoint is exported. What its routers
return is read by hooks.

Shapes: T tokens, E experts, k active experts of every token, H hidden.
"""

import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.remoe.convert.architecture import moe_layers
from megatron.remoe.convert.exported import load, load_source, on_device
from megatron.remoe.convert.hf_source import HFSource
from megatron.remoe.convert.source import MegatronSource, open_source
from megatron.remoe.convert.tokenizer import TokenizerFiles
from megatron.remoe.files import read_json_object
from remoe.hf import ReMoEConfig
from remoe.hf.configuration_remoe import L1_ROUTERS
from remoe.hf.modeling_remoe import ReMoEHashRouter, ReMoERouter

# The routers of transformers by the `model_type` of a config. All return the logits `[T, E]`, the
# gates `[T, k]` and the numbers of the k experts.
FOREIGN = {
    "olmoe": "OlmoeTopKRouter",
    "mixtral": "MixtralTopKRouter",
    "qwen2_moe": "Qwen2MoeTopKRouter",
    "qwen3_moe": "Qwen3MoeTopKRouter",
}
_OURS = ("remoe", "llama")
_LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclass(frozen=True)
class Opened:
    """A model with experts that is not loaded yet.

    Attributes:
        path: the model as it was named.
        config: its config for transformers.
        iteration: the iteration of its checkpoint; None if it is not known.
        tokenizer: the model's tokenizer; None if there is none.
        source: the model to convert; None for the classes of transformers.
    """

    path: Path
    config: Any
    iteration: int | None
    tokenizer: TokenizerFiles | None
    source: MegatronSource | HFSource | None

    @cached_property
    def shape(self) -> Any:
        """The model without the values of its weights."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config)  # type: ignore[no-untyped-call]

    @property
    def args(self) -> Namespace | None:
        """The arguments of a run of Megatron, or None."""
        return self.source.args if isinstance(self.source, MegatronSource) else None

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint of a run of Megatron, or None."""
        return self.source.checkpoint if isinstance(self.source, MegatronSource) else None

    @property
    def router(self) -> str:
        """The router's type, as in the config of our own model for transformers."""
        if self.source is not None:
            return str(self.config.router_type)
        normalized = self.config.model_type == "mixtral" or self.config.norm_topk_prob
        return "topk_post_softmax" if normalized else "topk_pre_softmax"

    @property
    def num_experts(self) -> int:
        """The number of experts of a layer."""
        return int(next(iter(routers_of(self.shape).values())).num_experts)

    def load(self, dtype: torch.dtype) -> Any:
        """Load the model with its weights.

        Raises:
            ValueError: a weight is NaN or infinite.
        """
        if self.source is None:
            return on_device(load(self.path, dtype))
        return load_source(self.source, dtype)


def open_model(path: Path, tokenizer: Path | None = None) -> Opened:
    """Open a model that has experts.

    Args:
        path: a run directory, a folder of checkpoints, a checkpoint or a Hugging Face folder.
        tokenizer: a tokenizer to use in place of the model's own.

    Raises:
        ValueError: there is no model, a dense one, or one of a class whose routers are not known.
    """
    file = path / "config.json"
    if file.is_file():
        kind = read_json_object(file, "copy it again").get("model_type")
        if kind in FOREIGN:
            return _open_foreign(path, tokenizer)
        if kind not in _OURS:
            raise ValueError(
                f"{file} has model_type {kind!r}, whose routers are not known here; "
                f"{', '.join((*_OURS[:1], *FOREIGN))} can be analyzed"
            )
    source = open_source(path, tokenizer)
    if not moe_layers(source.config):
        raise _dense(path)
    config = ReMoEConfig.from_dict(dict(source.config))
    if isinstance(source, MegatronSource):
        iteration = source.reader.common.get("iteration") or None
    else:
        iteration = (source.config.get("training_facts") or {}).get("iteration")
    return Opened(path, config, iteration, source.tokenizer, source)


def _open_foreign(path: Path, tokenizer: Path | None) -> Opened:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        found = TokenizerFiles.of_folder(path, tokenizer)
        opened = Opened(path, config, None, found, None)
        is_dense = not routers_of(opened.shape)
    except Exception as error:  # transformers takes any value, and fails where it is used
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path / 'config.json'}: {reason}; copy it again") from error
    if is_dense:
        raise _dense(path)
    if not 1 <= config.num_experts_per_tok <= opened.num_experts:
        raise ValueError(
            f"{path / 'config.json'} has num_experts_per_tok {config.num_experts_per_tok} of "
            f"{opened.num_experts} experts; it must be between 1 and their number"
        )
    return opened


def _dense(path: Path) -> ValueError:
    return ValueError(f"{path} is a dense model, which routes no token; leave it out")


def routers_of(model: Any) -> dict[int, Any]:
    """Return the routers of a model by the number of their layer, which begins with 1."""
    found = {}
    for name, module in model.named_modules():
        is_ours = isinstance(module, ReMoERouter | ReMoEHashRouter)
        if is_ours or type(module).__name__ in FOREIGN.values():
            match = _LAYER.search(name)
            assert match is not None
            found[int(match[1]) + 1] = module
    return found


@contextmanager
def hooked(model: Any, hook: Callable[..., Any]) -> Iterator[None]:
    """Call a hook after every router of a model.

    Args:
        model: the model.
        hook: is called with the number of the layer, the router, the arguments by position and by
            name, and the output, which what it returns replaces, if that is not None.
    """
    with ExitStack() as stack:
        for layer, router in routers_of(model).items():
            handle = router.register_forward_hook(partial(hook, layer), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def is_foreign(router: Any) -> bool:
    """Return whether a router is of one of transformers' own classes."""
    return type(router).__name__ in FOREIGN.values()


@dataclass(frozen=True)
class Routing:
    """What a router did with some tokens.

    Attributes:
        probs: gates `[T, E]`, zero for inactive experts.
        active: the map of active experts, bool `[T, E]`.
        scores: `[T, E]`, what experts are ranked by; None if these are the sizes of the gates.
    """

    probs: Tensor
    active: Tensor
    scores: Tensor | None


def routing_of(
    router: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: tuple[Any, ...]
) -> Routing:
    """Return what a router did in a call, from the arguments of a forward hook.

    Scores are the softmax over all experts before selection, of which null experts have a part, or
    the sigmoids of TopK with sigmoids and of expert threshold routing. ReLU and hash routers have
    none (see `remoe.analysis`).
    """
    if is_foreign(router):
        logits_TE, gates_Tk, chosen_Tk = output
        probs_TE = torch.zeros_like(logits_TE, dtype=gates_Tk.dtype)
        probs_TE = probs_TE.scatter(1, chosen_Tk, gates_Tk)
        active_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, chosen_Tk, True)
        return Routing(probs_TE, active_TE, torch.softmax(logits_TE.double(), dim=1))
    probs_TE, active_TE, *_ = output
    if router.router_type in (*L1_ROUTERS, "hash"):
        return Routing(probs_TE, active_TE, None)
    # What these routers return is zero for the experts that they have not selected.
    logits_TN = router.score(*inputs, **named)[0].double()
    if router.router_type in ("expert_threshold", "topk_sigmoid"):
        return Routing(probs_TE, active_TE, torch.sigmoid(logits_TN))
    scores_TN = torch.softmax(logits_TN, dim=1)
    return Routing(probs_TE, active_TE, scores_TN[:, : probs_TE.shape[1]])


def flops_per_expert(model: Any) -> float:
    """Return the operations of one expert for one token, forward: two for every weight."""
    experts = [module for name, module in model.named_modules() if name.endswith(".mlp.experts")]
    weights: int = sum(parameter.numel() for parameter in experts[0].parameters())
    num_experts: int = next(iter(routers_of(model).values())).num_experts
    return 2 * weights / num_experts


def flops_of_others(model: Any, sequence_length: int) -> float:
    """Return the operations of all but the experts for one token, forward.

    They are two for every weight that the token meets in a product, routers and shared experts
    among them, and those of attention over the whole sequence, which are not halved for the causal
    mask (as in `megatron.remoe.analysis.size`). The cell of recurrent routers is met in every layer
    with experts.
    """
    config: Any = model.config
    weights = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and not name.startswith(("model.embed_tokens.", "lm_head.")):
            cells = len(routers_of(model)) if name.startswith("model.recurrent_cell.") else 1
            weights += cells * parameter.numel()
    weights += int(config.vocab_size) * int(config.hidden_size)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width: int = config.num_attention_heads * head
    return 2.0 * (weights + 2 * int(config.num_hidden_layers) * sequence_length * width)
