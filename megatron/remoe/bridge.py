"""The registration of our models in Megatron-Bridge, which is needed for this module only.

    from megatron.bridge import AutoBridge
    import megatron.remoe.bridge as remoe_bridge  # registers ReMoEForCausalLM

    bridge = AutoBridge.from_hf_pretrained("model", trust_remote_code=True)
    model = bridge.to_megatron_model(wrap_with_ddp=False)
    ...
    remoe_bridge.save_hf_pretrained(bridge, model, "trained")

Which tensors correspond is said by `megatron.remoe.convert.table` alone; here every rule of it gets
the class of Bridge that splits its tensor over ranks. Bridge knows tensors only. The values of a
router that are in `config.json` (the coefficients of the penalty, the odds of top-p) are read from
there, and `save_hf_pretrained` writes them there.

Shapes: E experts, H hidden, F expert width, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import HFWeightTuple, MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    FusedExpertMapping,
    FusedGatedExpertMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
    ReplicatedMapping,
)
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron.remoe import compat
from megatron.remoe.convert.architecture import (
    ROUTER_DTYPES,
    exported_settings,
    moe_layers,
    router_type_of,
    routing_of,
    to_flags,
)
from megatron.remoe.convert.hf_source import config_key, value_in_config
from megatron.remoe.convert.table import (
    CONFIG,
    PADDING,
    TABLE,
    Config,
    Rule,
    check_names,
    is_exact,
    plan,
)
from megatron.remoe.moe.hash_router import keep_token_ids
from megatron.remoe.moe.shared_cell import SharedCells
from megatron.remoe.moe.spec import block_spec
from megatron.remoe.train.step import FinalizeStep
from megatron.remoe.unsupported import has_package
from remoe.config import ROUTINGS, AnyRouting
from remoe.hf.configuration_remoe import ReMoEConfig
from remoe.selections.hashed import HashRouting

_EXPERTS = "decoder.layers.*.mlp.experts.experts."  # of the table
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_REPLICATED = (".router.", "decoder.recurrent_cell.")


def layer_spec(config: "ReMoEModelProvider", vp_stage: int | None = None) -> Any:
    """Return the layers of a pipeline stage, with our routers."""
    return block_spec(config, config.routing, vp_stage=vp_stage)


@dataclass
class ReMoEModelProvider(GPTModelProvider):
    """Bridge's configuration of a GPT model, with a router of ours.

    Bridge's own training sets `finalize_model_grads_func`. The function that stays is ours, which
    calls Megatron's and then moves the state of the routers.

    Attributes:
        moe_routing: the name of the router.
        moe_routing_settings: its settings that differ from their defaults, by their names.
    """

    transformer_layer_spec: Any = layer_spec
    moe_routing: str = "relu"
    moe_routing_settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        compat.apply()
        for hook in compat.PRE_WRAP_HOOKS:
            self.register_pre_wrap_hook(hook)
        cells = SharedCells.of(self.routing)
        if cells is not None:
            self.register_pre_wrap_hook(cells.prepare)
            self.register_post_wrap_hook(cells.widen)
        if isinstance(self.routing, HashRouting):
            self.register_pre_wrap_hook(keep_token_ids)

    @property
    def routing(self) -> AnyRouting:
        """The settings of the router."""
        return ROUTINGS[self.moe_routing](**self.moe_routing_settings)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute of the configuration."""
        if name == "finalize_model_grads_func" and value is not None:
            groups = value.keywords.get("pg_collection") if isinstance(value, partial) else None
            value = partial(FinalizeStep(SharedCells.of(self.routing)), pg_collection=groups)
        super().__setattr__(name, value)


class VocabularyMapping(AutoMapping):
    """Rows of the vocabulary, of which Megatron may have more, which are zero.

    Args:
        vocab_size: V.
    """

    def __init__(self, megatron_param: str, hf_param: str, vocab_size: int) -> None:
        super().__init__(megatron_param, hf_param)
        self.vocab_size = vocab_size

    def hf_to_megatron(self, hf_weights: Tensor, megatron_module: Any) -> Tensor:
        """Return the rows of this rank."""
        missing = len(megatron_module.weight) * self.tp_size - len(hf_weights)
        padding = hf_weights.new_zeros(missing, hf_weights.shape[1])
        rows: Tensor = super().hf_to_megatron(torch.cat([hf_weights, padding]), megatron_module)
        return rows

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, Tensor]:
        """Return the rows of all ranks."""
        whole = super().megatron_to_hf(megatron_weights, megatron_module)
        return {name: rows[: self.vocab_size] for name, rows in whole.items()}


class StackedExpertsMapping(MegatronParamMapping):
    """The stacked weights of our grouped experts, `[E, 2F, H]` and `[E, H, F]` in both formats.

    Ranks have some of the experts, and a part of the width F of each.
    """

    def hf_to_megatron(self, hf_weights: Tensor, megatron_module: torch.nn.Module) -> Tensor:
        """Return the experts of this rank."""
        experts = hf_weights.chunk(self.ep_size)[self.ep_rank]
        parts = [part.chunk(self.tp_size, self._dim)[self.tp_rank] for part in self._parts(experts)]
        return torch.cat(parts, self._dim)

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, Tensor]:
        """Return the experts of all ranks."""
        weights = self.broadcast_from_pp_rank(megatron_weights, cache_key=str(self.hf_param))
        if weights is None:
            return {}
        shards = map(self._parts, self.gather_from_tp_ranks(weights.detach().contiguous()))
        whole = torch.cat(
            [torch.cat(same, self._dim) for same in zip(*shards, strict=True)], self._dim
        )
        if self.ep_size > 1:
            ranks = [torch.empty_like(whole) for _ in range(self.ep_size)]
            torch.distributed.all_gather(ranks, whole.contiguous(), group=self.ep_group)
            whole = torch.cat(ranks)
        return {str(self.hf_param): whole}

    @property
    def _dim(self) -> int:
        return 1 if self._is_gated else 2

    @property
    def _is_gated(self) -> bool:
        return str(self.megatron_param).endswith("linear_fc1")

    def _parts(self, weights: Tensor) -> tuple[Tensor, ...]:
        """Split gate and up, each of which has its part on every rank."""
        return weights.chunk(2, 1) if self._is_gated else (weights,)


class ConfigMapping(MegatronParamMapping):
    """A value of a router that is no weight in Hugging Face, but is in the config there.

    Args:
        name: of the value in our table, `config.KEY.LAYER`.
        config: the model's, from which it is read.
    """

    def __init__(self, megatron_param: str, name: str, config: Config) -> None:
        super().__init__(megatron_param, {})  # no weights
        self.name, self.config = name, config

    def resolve(self, captures: tuple[str, ...]) -> "ConfigMapping":
        """Return the mapping of a layer."""
        (layer,) = captures
        param, name = (n.replace("*", layer) for n in (str(self.megatron_param), self.name))
        return ConfigMapping(param, name, self.config)

    def hf_to_megatron(
        self, hf_weights: Mapping[str, Tensor], megatron_module: torch.nn.Module
    ) -> Tensor:
        """Read the value from the config."""
        return value_in_config("the model's config", self.config, self.name)

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, Tensor]:
        """Return no weight."""
        return {}

    def value(self, megatron_weights: Tensor | None) -> float:
        """Return the value, on every pipeline stage."""
        value = self.broadcast_from_pp_rank(megatron_weights, cache_key=self.name)
        return float(value)


def mappings(rule: Rule, config: Config) -> list[MegatronParamMapping]:
    """Return what Bridge calls the mappings of a rule of the table; experts have three names."""
    hf = [name for name in rule.hf if not name.startswith(PADDING)]
    name = rule.megatron
    if hf[0].startswith(CONFIG):
        return [ConfigMapping(name, hf[0], config)]
    if name.startswith(_EXPERTS):
        linear = name.removeprefix(_EXPERTS).removesuffix(".weight")
        where = _EXPERTS.removesuffix("experts.")
        one_by_one = FusedGatedExpertMapping if linear == "linear_fc1" else FusedExpertMapping
        return [
            StackedExpertsMapping(f"{where}{linear}", hf[0]),
            one_by_one(f"{where}local_experts.*.{linear}.weight", hf[0]),
            one_by_one(f"{where}{linear}.weight*", hf[0]),  # of Transformer Engine
        ]
    if name in _VOCABULARY:
        return [VocabularyMapping(name, hf[0], config["vocab_size"])]
    if len(hf) == 3:
        return [QKVMapping(name, *hf)]
    if len(hf) == 2:
        return [GatedMLPMapping(name, *hf)]
    kind = ReplicatedMapping if any(part in name for part in _REPLICATED) else AutoMapping
    return [kind(name, hf[0])]


@MegatronModelBridge.register_bridge(
    source="ReMoEForCausalLM",
    target=GPTModel,
    provider=ReMoEModelProvider,
    model_type=ReMoEConfig.model_type,
)
class ReMoEBridge(MegatronModelBridge):
    """Bridge's converter of `ReMoEForCausalLM`, with every router that can be exported.

    Every weight of either side must be in the table, and on the other side. `ValueError`s name
    those that are not; Bridge itself would leave them out with a warning.
    """

    def hf_config_to_provider_kwargs(self, hf_config: Any) -> dict[str, Any]:
        """Return the fields of the provider.

        Raises:
            ValueError: a setting that Megatron cannot express.
        """
        config = hf_config.to_dict()
        flags = to_flags(config, config["vocab_size"])
        known = {f.name for f in fields(ReMoEModelProvider)}
        with_experts = moe_layers(config)
        router = routing_of(config["router_type"])
        if router not in ("topk", "null_experts"):  # whose load Megatron balances
            flags["moe_router_load_balancing_type"] = "none"
        return {
            **super().hf_config_to_provider_kwargs(hf_config),
            **{name: value for name, value in flags.items() if name in known},
            "moe_layer_freq": [int(i in with_experts) for i in range(config["num_hidden_layers"])],
            "moe_routing": router,
            "moe_routing_settings": {
                s.name: config.get(s.name, s.default) for s in exported_settings(router)
            },
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "transformer_impl": (
                "transformer_engine" if has_package("transformer_engine") else "local"
            ),
        }

    @classmethod
    def megatron_to_hf_config(cls, provider: ReMoEModelProvider) -> Config:
        """Return the config of a model without the values of its routers."""
        known = ReMoEConfig().to_dict()
        config = super().megatron_to_hf_config(provider)
        frequency = provider.moe_layer_freq
        dense = [i for i, x in enumerate(frequency) if not x] if isinstance(frequency, list) else []
        settings = {
            s.name: provider.moe_routing_settings.get(s.name, s.default)
            for s in exported_settings(provider.moe_routing)
        }
        ours: Config = {
            "dtype": config["torch_dtype"],
            "rope_parameters": {"rope_type": "default", "rope_theta": float(provider.rotary_base)},
            "router_type": router_type_of(provider.moe_routing, vars(provider)),
            "router_dtype": ROUTER_DTYPES[provider.moe_router_dtype],
            "mlp_only_layers": dense or None,
            "target_sparsity": 1 - provider.moe_router_topk / provider.num_moe_experts,
        }
        return {k: v for k, v in config.items() if k in known} | ours | settings

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return Bridge's form of our table."""
        config = self.hf_config.to_dict()
        return MegatronMappingRegistry(*(m for rule in TABLE for m in mappings(rule, config)))

    def build_conversion_tasks(
        self, hf_pretrained: Any, megatron_model: list[Any], weight_dtype: torch.dtype | None = None
    ) -> list[Any]:
        """Return a task for every weight.

        Raises:
            ValueError: a weight has no counterpart.
        """
        tasks = super().build_conversion_tasks(hf_pretrained, megatron_model, weight_dtype)
        tasks = [task for task in tasks if task is not None]
        config = self.hf_config.to_dict()
        names = [n for item in plan(config, config["vocab_size"]) for n in item.hf]
        expected = {name for name in names if not name.startswith(PADDING)}
        if hasattr(hf_pretrained, "state"):
            keys = hf_pretrained.state.source.get_all_keys()
            stored = {name for name in keys if not name.startswith(PADDING)}
            if config["tie_word_embeddings"]:  # some savers write the shared tensor twice
                stored.discard("lm_head.weight")
            weights = {name for name in expected if not name.startswith(CONFIG)}
            check_names(str(hf_pretrained.model_name_or_path), stored, weights)
        registry = self.mapping_registry()
        unknown = [
            name
            for chunk in unwrap_model(megatron_model)
            for name in chunk.state_dict()
            if "_extra_state" not in name and registry.megatron_to_hf_lookup(name) is None
        ]
        found = {name for task in tasks for name in _names(task.mapping)}
        check_names("the Megatron model", [*found, *unknown], expected)
        return [
            replace(task, weight_dtype=None) if is_exact(next(_names(task.mapping))) else task
            for task in tasks
        ]

    def stream_weights_megatron_to_hf(
        self, megatron_model: Any, hf_pretrained: Any, *args: Any, **kwargs: Any
    ) -> Iterable[HFWeightTuple]:
        """Yield all weights, and rows beyond the vocabulary as they were.

        Raises:
            ValueError: the values of routers in the config are not those of the model.
        """
        found = self.router_values(megatron_model, hf_pretrained)
        given = self.hf_config.to_dict()
        for key, values in found.items():
            if given.get(key) != values:
                raise ValueError(
                    f"the model's config has {key} {given.get(key)}, and the Megatron model has "
                    f"{values}; call megatron.remoe.bridge.update_config first, or save the model "
                    f"with megatron.remoe.bridge.save_hf_pretrained"
                )
        yield from super().stream_weights_megatron_to_hf(
            megatron_model, hf_pretrained, *args, **kwargs
        )
        if hasattr(hf_pretrained, "state"):
            for name in hf_pretrained.state.source.get_all_keys():
                if name.startswith(PADDING):
                    yield HFWeightTuple(name, hf_pretrained.state[name])

    def router_values(self, megatron_model: Any, hf_pretrained: Any) -> dict[str, list[float]]:
        """Return what the config has of the routers of a model, by name; all ranks call this."""
        models = megatron_model if isinstance(megatron_model, list) else [megatron_model]
        found: dict[str, list[float]] = defaultdict(list)
        for task in self.build_conversion_tasks(hf_pretrained, unwrap_model(models)):
            if isinstance(task.mapping, ConfigMapping):
                value = task.mapping.value(task.param_weight)
                found[config_key(task.mapping.name)].append(value)
        return dict(found)


def _names(mapping: MegatronParamMapping) -> Iterator[str]:
    """Yield the names in Hugging Face of what a mapping makes."""
    if isinstance(mapping, ConfigMapping):
        yield mapping.name
    elif isinstance(mapping.hf_param, str):
        yield mapping.hf_param
    else:
        yield from mapping.hf_param.values()


def update_config(bridge: Any, model: Any) -> None:
    """Give the config of a bridge the values of the routers of a Megatron model.

    Its facts about the training are removed, because Bridge does not know how it went on. All ranks
    call this.

    Args:
        bridge: an `AutoBridge` for `ReMoEForCausalLM`.
        model: the Megatron model, or its chunks.

    Raises:
        ValueError: the model is another one than the config says.
    """
    values = ReMoEBridge().router_values(model, bridge.hf_pretrained)
    config = getattr(bridge.hf_pretrained, "config", bridge.hf_pretrained)
    for key, value in values.items():
        setattr(config, key, value)
    config.training_facts = None


def save_hf_pretrained(bridge: Any, model: Any, path: str | Path, **options: Any) -> None:
    """Save a Megatron model as transformers loads it: `update_config`, and Bridge's own saving.

    Args:
        bridge: an `AutoBridge` for `ReMoEForCausalLM`.
        model: the Megatron model, or its chunks.
        path: the folder to write.
        options: of `AutoBridge.save_hf_pretrained`.

    Raises:
        ValueError: the model is another one than the config says.
    """
    update_config(bridge, model)
    bridge.save_hf_pretrained(model, path, **options)
