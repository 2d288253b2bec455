"""Sparse upcycling: a dense model becomes the start of a mixture with ReLU routing.

Every expert is a copy of the dense MLP, or, with granularity G, of one of the G slices whose sum is
the MLP. With gates g the layer computes `sum over e of g_e * E_e(x)`, which equals the dense layer
where the gates of a slice's copies sum to 1. A ReLU of a linear function of x is not constant, so
this holds only on average: the router is the linear function nearest to 1 over the model's own
activations, divided among the copies, plus noise that sums to zero over them, so that the copies
can become different.

Shapes: T tokens, H hidden, E copies, G slices, D dense width, F = D / G.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron.remoe.convert.activations import mean_loss, mlp_inputs, tokens_for
from megatron.remoe.convert.architecture import check_expressible
from megatron.remoe.convert.export import Progress, export
from megatron.remoe.convert.exported import exported, load
from megatron.remoe.convert.hf_source import HFSource, check_finite, validated
from megatron.remoe.convert.output import check_folder
from megatron.remoe.convert.source import MegatronSource, open_source
from megatron.remoe.convert.table import CONFIG, Config, Item, plan
from megatron.remoe.convert.to_megatron import Layout, to_megatron
from remoe.config import apply_granularity
from remoe.upcycling import router_of_copies


@dataclass(frozen=True)
class Settings:
    """The settings of a mixture that is made from a dense model.

    Attributes:
        num_experts: E, the number of experts before granularity, as in training.
        topk: k of the target sparsity 1 - k/E.
        granularity: G; there are E * G experts of width D / G.
        spread: the standard deviation of the noise of a gate, relative to its mean.
        seed: the seed of the noise, and of sampled text.
    """

    num_experts: int
    topk: int = 1
    granularity: int = 1
    spread: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_experts < 2:
            raise ValueError(f"num_experts is {self.num_experts}; a mixture needs at least 2")
        if self.spread <= 0:
            raise ValueError(
                f"spread is {self.spread}; it must be positive, or the copies stay the same"
            )


@dataclass(frozen=True)
class Upcycled:
    """A mixture, and what it computes on held-out tokens.

    Attributes:
        folder: the checkpoint's folder.
        dense_loss, loss: the losses of the dense model and of the mixture, in nats per token.
        gate_sum_std: the standard deviation of the sum of a slice's gates, whose mean is 1.
        active: the share of active (token, expert) pairs.
    """

    folder: Path
    dense_loss: float
    loss: float
    gate_sum_std: float
    active: float


def upcycle(
    path: Path,
    out: Path,
    settings: Settings,
    *,
    data: list[Path] | None = None,
    num_tokens: int = 8192,
    layout: Layout | None = None,
    tokenizer: Path | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Upcycled:
    """Write a mixture as a checkpoint to train on, with its `model.yaml`.

    Args:
        path: a dense run or checkpoint of ours, or a Hugging Face Llama.
        out: the folder to make.
        settings: the settings of the mixture.
        data: prefixes of token files whose activations are used; None is text that the model
            samples itself.
        num_tokens: the number of tokens; the router is fitted to one half of them, and scaled and
            tested on the other half.
        layout: the layout of the checkpoint.
        tokenizer: a tokenizer to use in place of the one that a run names.
        force: whether to replace `out`.
        progress: called with the number of bytes that are written, and of all bytes.

    Raises:
        ValueError: the model has experts, sizes do not fit, or there is too little data.
    """
    dense = open_source(path, tokenizer)
    if dense.config["model_type"] != "llama":
        raise ValueError(f"{path} has experts already; upcycling starts from a dense model")
    check_expressible(dense.config)
    config, layout = _mixture_config(dense.config, settings), layout or Layout()
    layout.check(config)
    reads = [path, *(data or []), *([tokenizer] if tokenizer else [])]
    check_folder(out, reads=reads, force=force)
    with exported(dense) as folder, tempfile.TemporaryDirectory() as scratch:
        model = load(folder)
        tokens = tokens_for(model, data, num_tokens, settings.seed)
        half = len(tokens) // 2
        inputs = mlp_inputs(model, tokens)
        fit = [x[: half * tokens.shape[1]] for x in inputs]
        held_out = [x[half * tokens.shape[1] :] for x in inputs]
        generator = torch.Generator().manual_seed(settings.seed)
        routers = [
            router_weights(x, y, settings, generator) for x, y in zip(fit, held_out, strict=True)
        ]
        for router in routers:
            check_finite("a router that was fitted to the activations", router)
        dense_loss = mean_loss(model, tokens[half:])
        del model
        source = _Mixture(dense, config, routers, settings)
        mixture = Path(scratch) / "mixture"
        export(source, mixture, progress=progress)
        loss = mean_loss(load(mixture), tokens[half:])
        made = to_megatron(mixture, out, layout=layout, reads=reads, force=force)
    gates = [torch.relu(y @ w.T) for y, w in zip(held_out, routers, strict=True)]
    sums = torch.stack([g.view(len(g), settings.num_experts, -1).sum(dim=1) for g in gates])
    active = torch.stack([(g > 0).float().mean() for g in gates]).mean()
    return Upcycled(made, dense_loss, loss, float(sums.std()), float(active))


def router_weights(
    fit_TH: Tensor, held_out_TH: Tensor, settings: Settings, generator: torch.Generator
) -> Tensor:
    """Return the router of a layer, `[E * G, H]`: `router_of_copies` with these settings."""
    return router_of_copies(
        fit_TH,
        held_out_TH,
        num_copies=settings.num_experts,
        num_slices=settings.granularity,
        spread=settings.spread,
        generator=generator,
    )


def _mixture_config(dense: Config, settings: Settings) -> Config:
    shape = apply_granularity(
        num_experts=settings.num_experts,
        topk=settings.topk,
        ffn_hidden_size=dense["intermediate_size"],
        granularity=settings.granularity,
    )
    facts = dense.get("training_facts") or {}
    kept = ("sequence_length", "padded_vocab_size")
    return validated(
        dense
        | {
            "model_type": "remoe",
            "architectures": ["ReMoEForCausalLM"],
            "router_type": "relu",
            "router_dtype": "float32",
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.topk,
            "moe_intermediate_size": shape.ffn_hidden_size,
            "target_sparsity": 1 - shape.topk / shape.num_experts,
            "l1_coeff": [1e-8] * dense["num_hidden_layers"],
            "training_facts": {k: facts[k] for k in kept if k in facts} | {"upcycled": facts},
        }
    )


class _Mixture:
    """The mixture as a source of tensors, which are made from the dense model's on demand."""

    def __init__(
        self,
        dense: MegatronSource | HFSource,
        config: Config,
        routers: list[Tensor],
        settings: Settings,
    ) -> None:
        self.config, self.tokenizer, self.dtype = config, dense.tokenizer, dense.dtype
        self.items = plan(config, dense.padded_vocab_size)
        self._dense, self._routers, self._settings = dense, routers, settings
        self._of = {name: item for item in dense.items for name in item.hf}

    def hf_tensors(self, item: Item) -> dict[str, Tensor]:
        """Return the tensors of an item, by their names in Hugging Face."""
        return {name: self._tensor(name) for name in item.hf}

    def _tensor(self, name: str) -> Tensor:
        if name in self._of:
            return self._dense.hf_tensors(self._of[name])[name]
        if name.startswith(CONFIG):
            return torch.tensor(self.config["l1_coeff"][0])
        layer, _, part = name.partition(".mlp.")
        if part == "router.weight":
            return self._routers[int(layer.rpartition(".")[2])]
        copies, slices = self._settings.num_experts, self._settings.granularity
        if part == "experts.down_proj":  # [H, D] to [G, H, F]
            down = self._tensor(f"{layer}.mlp.down_proj.weight")
            sliced = torch.stack(down.chunk(slices, dim=1))
        else:  # [D, H] twice to [G, 2F, H]
            halves = (self._tensor(f"{layer}.mlp.{n}_proj.weight") for n in ("gate", "up"))
            sliced = torch.cat([torch.stack(half.chunk(slices)) for half in halves], dim=1)
        return sliced.repeat(copies, 1, 1)
