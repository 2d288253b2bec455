"""Our command-line flags beside Megatron's, and what they do to a model's configuration.

The published flags keep their names, so that published launch scripts carry over. Those of the
routers are declared in `remoe.selections`.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from megatron.remoe import compat, cpu, options, ranges, unsupported
from megatron.remoe import pattern as patterns
from megatron.remoe.analysis import wandb_run
from megatron.remoe.unsupported import has_package
from remoe.config import (
    ROUTINGS,
    AnyRouting,
    ExpertShape,
    ReLURouting,
    Routing,
    Selection,
    SoftRouting,
    TopKRouting,
    apply_granularity,
    refuse_idle_recurrence,
)
from remoe.selections.expert_choice import ExpertChoiceRouting
from remoe.settings import settings_of

if TYPE_CHECKING:
    from megatron.remoe.train.step import FinalizeStep

Provider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Flags of a run, beside the settings of its router."""

    # Megatron's ArgumentGroupFactory takes the text below a field as the flag's help.

    moe_routing: str | None = None
    """The router of the experts; remoe routers lists them. By default it is topk."""

    moe_relu_routing: bool = False
    """The published name of --moe-routing relu: ReLU(x W) instead of TopK(Softmax(x W))."""

    moe_soft_routing: bool = False
    """The same as --moe-routing soft: experts work on means of tokens; needs --masked-lm."""

    masked_lm: bool = False
    """Train a bidirectional encoder to find masked tokens, instead of a model of the next token."""

    moe_granularity: int = 1
    """G: multiplies --num-experts and --moe-router-topk, and divides the width of an expert."""

    moe_change_routing: bool = False
    """Continue a checkpoint although its router, load balancing or k was another one."""

    metrics_file: str | None = None
    """Write one JSON object per logged step and evaluation to this file."""

    save_keep_last: int | None = None
    """Number of latest checkpoints to keep, beside those of --save-retain-interval."""

    wandb_tags: list[str] | None = None
    """Tags of the W&B run."""

    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """Send W&B's logs (online), only write them to --wandb-save-dir (offline), or disable W&B."""


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add our flags, and defaults that fit this machine: Megatron's `extra_args_provider`.

    The returned parser applies granularity and checks our flags as soon as it has parsed them, so
    that Megatron validates the model that will be built. Granularity is thereby applied once:
    `--use-checkpoint-args` replaces the results by the saved run's and never multiplies them again.
    """
    compat.apply()
    from megatron.training.argument_utils import ArgumentGroupFactory

    added: list[str] = []
    groups: dict[str, type] = {"remoe": Flags} | {r.title: r for r in ROUTINGS.values()}
    for title, flags in groups.items():
        ArgumentGroupFactory(flags, exclude=added).build_group(parser, title)
        added += [setting.name for setting in settings_of(flags)]
    parser.set_defaults(**_machine_defaults())
    return _Parser(
        prog=parser.prog,
        description=parser.description,
        parents=[parser],
        add_help=False,
        allow_abbrev=False,
    )


def args_provider(other: Provider | None = None) -> Provider:
    """Return `add_arguments` for a script that has an `extra_args_provider` of its own, or None."""

    def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return add_arguments(parser if other is None else other(parser))

    return provider


class _Parser(argparse.ArgumentParser):
    """Megatron's parser, which checks what it has parsed; a mistake is one line, exit code 2."""

    def parse_known_args(  # type: ignore[override]
        self, args: list[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        parsed, unknown = super().parse_known_args(args, namespace)
        try:
            ranges.check(parsed, self)
            check(parsed)
        except ValueError as error:
            self.error(str(error))
        derive(parsed)
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


@functools.cache
def megatron_parser() -> argparse.ArgumentParser:
    """Return Megatron's parser with our flags, as the entry point uses it."""
    from megatron.training.arguments import add_megatron_arguments

    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def _machine_defaults() -> dict[str, Any]:
    """Return defaults for those flags of Megatron whose own need what this machine lacks."""
    defaults: dict[str, Any] = {}
    if not has_package("transformer_engine"):
        defaults["transformer_impl"] = "local"
        defaults["apply_rope_fusion"] = False
        defaults["no_persist_layer_norm"] = True
    if not has_package("fused_weight_gradient_mlp_cuda"):
        defaults["gradient_accumulation_fusion"] = False
    if not has_package("nvidia_resiliency_ext"):
        defaults["async_strategy"] = "mcore"
    if cpu.is_enabled():
        defaults["distributed_backend"] = "gloo"
    return defaults


def check(args: argparse.Namespace) -> None:
    """Refuse flags that do not fit together, and change nothing.

    Raises:
        ValueError: naming the value, why it is wrong and the remedy.
    """
    unsupported.refuse(args)
    patterns.check(args)
    _check_intervals(args)
    _check_router(args)
    if _is_dense(args):
        _refuse_flags_of_experts(args)
        return
    if args.moe_granularity != 1 and _expert_width(args) is None:
        raise ValueError(
            f"moe_granularity is {args.moe_granularity}, but the width that it divides is not "
            f"given; pass --moe-ffn-hidden-size or --ffn-hidden-size"
        )
    _check_settings(args)
    routing = routing_from_args(args)
    limit = args.moe_relu_max_assignments
    if limit is not None and not routing.varies:
        raise ValueError(
            f"moe_relu_max_assignments is {limit}, but {routing.title} always has the same number "
            f"of assignments; leave it out"
        )
    if isinstance(routing, ReLURouting):
        _check_max_active_experts(args)
    elif isinstance(routing, TopKRouting):
        _check_topk(args)
    if args.num_experts is not None:
        shape = _experts(args)
        if isinstance(routing, Selection):
            _split(routing, args.moe_granularity).check_model(shape.num_experts, shape.topk)
        if isinstance(routing, ExpertChoiceRouting) and args.seq_length is not None:
            routing.tokens_per_expert(args.seq_length, shape.num_experts, shape.topk)
    options.check_router(args, routing)
    if isinstance(routing, SoftRouting):
        return
    _refuse_uneven_gather_on_gloo(args)
    if routing.is_recurrent:
        options.check_recurrent(args)


def derive(args: argparse.Namespace) -> None:
    """Set what follows from checked flags, in place: Megatron's arguments, and three of our own.

    Our own arguments are saved with every checkpoint, as all of Megatron's are:

    - `adam_implementation`: see `compat.adam`.
    - `fork_async_save`: whether a forked process writes the checkpoints; see `configure`.
    - `save_milestone_interval`: what the user gave as `save_retain_interval`. Megatron would delete
      all checkpoints but the last one, which is what `checkpoint.retention` does in its place.
    """
    if args.full_validation:
        # Megatron then reads one sequence per rank at a time, whatever the batch size says.
        ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
        ranks *= args.context_parallel_size
        args.eval_micro_batch_size = 1
        args.eval_global_batch_size = int(os.environ.get("WORLD_SIZE", "1")) // ranks
    args.adam_implementation = compat.adam()
    args.fork_async_save = args.async_save and cpu.is_enabled()
    args.save_milestone_interval = None
    if args.save_keep_last is not None:
        args.save_milestone_interval = args.save_retain_interval
        args.save_retain_interval = None
    # Megatron has no flags for these; W&B reads them from the environment.
    if args.wandb_mode is not None:
        os.environ["WANDB_MODE"] = args.wandb_mode
    if args.wandb_tags is not None:
        os.environ["WANDB_TAGS"] = ",".join(args.wandb_tags)
    wandb_run.continue_last(args)
    if args.masked_lm:
        args.create_attention_mask_in_dataloader = False  # it would be a causal one
    if not _is_dense(args):
        _derive_experts(args)


def _derive_experts(args: argparse.Namespace) -> None:
    if args.num_experts is not None:
        shape, has_width = _experts(args), _expert_width(args) is not None
        args.num_experts, args.moe_router_topk = shape.num_experts, shape.topk
        if has_width:
            args.moe_ffn_hidden_size = shape.ffn_hidden_size
        routing = _split(routing_from_args(args), args.moe_granularity)
        for setting in settings_of(type(routing)):
            setattr(args, setting.dest, getattr(routing, setting.name))
    if args.tensor_model_parallel_size > 1:
        # Without it Megatron refuses to train experts with tensor parallelism, at the first step.
        args.sequence_parallel = True
    args.moe_routing = options.router_name(vars(args))
    for flag, name in options.PUBLISHED.items():
        setattr(args, flag, args.moe_routing == name)
    if args.moe_routing == "topk":
        return
    # Megatron demands this of softmax routers with topk 1. Others have no softmax, or null experts,
    # whose gates are the same either way.
    args.moe_router_pre_softmax = True
    if args.moe_routing == "null_experts":
        return
    # The published scripts pass aux_loss, which their ReLU router ignores. Here it would make
    # Megatron report a loss that does not exist.
    args.moe_router_load_balancing_type = "none"
    if args.moe_routing == "soft":
        # What Megatron demands of a TopK router.
        args.moe_router_topk, args.expert_tensor_parallel_size = 1, 1
    elif args.moe_router_dtype is None:
        args.moe_router_dtype = "fp32"


def _split(routing: Any, granularity: int) -> Any:
    """Return the settings of a router after granularity has split its experts."""
    counted = (s.name for s in settings_of(type(routing)) if s.per_granularity)
    given = {name: getattr(routing, name) for name in counted}
    return replace(routing, **{n: v * granularity for n, v in given.items() if v is not None})


def _is_dense(args: argparse.Namespace) -> bool:
    return args.num_experts is None and not args.use_checkpoint_args


def _expert_width(args: argparse.Namespace) -> int | None:
    width: int | None = args.moe_ffn_hidden_size or args.ffn_hidden_size
    return width


def _experts(args: argparse.Namespace) -> ExpertShape:
    """Return the experts after granularity, with any width if none is given."""
    return apply_granularity(
        num_experts=args.num_experts,
        topk=1 if routing_class(args) is SoftRouting else args.moe_router_topk,
        ffn_hidden_size=_expert_width(args) or args.moe_granularity,
        granularity=args.moe_granularity,
    )


def _check_intervals(args: argparse.Namespace) -> None:
    """Check steps between two actions that must be multiples of others."""
    if args.metrics_file is not None and args.log_interval % args.tensorboard_log_interval:
        raise ValueError(
            f"log_interval is {args.log_interval}, no multiple of tensorboard_log_interval "
            f"{args.tensorboard_log_interval}; metrics_file is written from what Megatron reports "
            f"to TensorBoard, so choose a tensorboard_log_interval that divides log_interval"
        )
    interval = args.save_retain_interval
    if args.save_keep_last is None or interval is None:
        return
    if interval < 1 or interval % (args.save_interval or 1):
        raise ValueError(
            f"save_retain_interval is {interval}, no multiple of save_interval "
            f"{args.save_interval}; choose one that is"
        )


def _check_router(args: argparse.Namespace) -> None:
    name = options.router_name(vars(args))
    if name not in ROUTINGS:
        raise ValueError(
            f"moe_routing is {name}, which is no router; choose one of {', '.join(ROUTINGS)}"
        )
    if not ROUTINGS[name].causal and not args.masked_lm:
        raise ValueError(options.not_causal(ROUTINGS[name]))


def _refuse_flags_of_experts(args: argparse.Namespace) -> None:
    off = {f.name: f.default for f in fields(Flags) if f.name.startswith("moe_")}
    for routing in ROUTINGS.values():
        off |= {s.dest: s.default for s in settings_of(routing) if not s.may_idle}
    for flag, value in off.items():
        if getattr(args, flag) != value:
            raise ValueError(
                f"{flag} is set but num_experts is not; pass --num-experts, or leave {flag} out "
                f"for a dense model"
            )


def _check_settings(args: argparse.Namespace) -> None:
    """Check the settings of the chosen router, and that those of no other one are given."""
    own = {setting.dest: setting for setting in settings_of(routing_class(args))}
    chosen = options.router_name(vars(args))
    for router, routing in ROUTINGS.items():
        for setting in settings_of(routing):
            is_set = getattr(args, setting.dest) != setting.default
            if setting.dest not in own and is_set and not setting.may_idle:
                raise ValueError(
                    f"{setting.dest} is set, but it is a setting of {routing.title}, and the "
                    f"router is {chosen}; leave it out, or set moe_routing to {router}"
                )
    for name, setting in own.items():
        setting.check(getattr(args, name), name)
    if issubclass(routing_class(args), Routing):
        refuse_idle_recurrence(vars(args), by_flag=True)


def _check_topk(args: argparse.Namespace) -> None:
    steps, topk = args.moe_topk_warmup_steps, args.moe_topk_warmup_topk
    if not steps and topk is None:
        return
    if not steps or topk is None:
        raise ValueError(
            f"moe_topk_warmup_steps is {steps} and moe_topk_warmup_topk is {topk}; give both (the "
            f"published control: 100 steps with 6 experts), or neither"
        )
    if args.num_experts is not None and topk > args.num_experts:
        raise ValueError(
            f"moe_topk_warmup_topk is {topk} of {args.num_experts} experts; choose it between 1 "
            f"and num_experts"
        )


def _check_max_active_experts(args: argparse.Namespace) -> None:
    most = args.moe_relu_max_active_experts
    if most is not None and most < args.moe_router_topk:
        raise ValueError(
            f"moe_relu_max_active_experts is {most}, fewer than the mean of moe_router_topk "
            f"{args.moe_router_topk}; choose more, or leave it out"
        )


def _refuse_uneven_gather_on_gloo(args: argparse.Namespace) -> None:
    expert_tp = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    is_alltoall = args.moe_token_dispatcher_type == "alltoall"
    if args.distributed_backend == "gloo" and is_alltoall and expert_tp > 1:
        raise ValueError(
            f"expert_tensor_parallel_size is {expert_tp} (that of tensor parallelism when not "
            f"given) with the alltoall dispatcher, which then gathers uneven parts, and gloo "
            f"gathers even ones only; use --expert-tensor-parallel-size 1, or the allgather "
            f"dispatcher"
        )


def routing_class(args: argparse.Namespace) -> type[AnyRouting]:
    """Return the class of the settings of the router that the arguments choose."""
    return ROUTINGS[options.router_name(vars(args))]


def routing_from_args(args: argparse.Namespace) -> AnyRouting:
    """Return the settings of the chosen router."""
    routing = routing_class(args)
    return routing(**{s.name: getattr(args, s.dest) for s in settings_of(routing)})


def configure(
    model_config: Any, args: argparse.Namespace, *, hides_tokens: bool = False
) -> "FinalizeStep":
    """Put our layers and our once-per-step hook into Megatron's configuration of a model.

    It is a `GPTModelConfig`, or a `HybridModelConfig` with the `--hybrid-layer-pattern` of `args`.

    Without `--moe-routing` the model is Megatron's TopK mixture, or dense without experts, on the
    same backend.

    Args:
        model_config: of the model to train.
        args: Megatron's arguments and ours.
        hides_tokens: whether the samples are those of a masked language model.

    Returns:
        The hook, a `FinalizeStep`, for `running`.

    Raises:
        ValueError: an encoder whose samples have the next tokens as labels, another kind of model,
            layers of the script's own, or a checkpoint to load that was trained with another
            router.
    """
    from megatron.remoe.moe import hash_router, hybrid
    from megatron.remoe.moe.shared_cell import SharedCells
    from megatron.remoe.moe.spec import layer_spec
    from megatron.remoe.train import saved
    from megatron.remoe.train.step import FinalizeStep

    _check_model(model_config, args)
    unsupported.refuse(args)  # again, since --use-checkpoint-args brings some
    patterns.check(args)
    if args.masked_lm and not hides_tokens:
        raise ValueError(
            "masked_lm is set, and this script reads samples of its own, in which an encoder would "
            "see the next token that it has to predict; use remoe train"
        )
    saved.check_before_start(args)
    routing = routing_from_args(args)
    pattern = args.hybrid_layer_pattern
    if pattern is None:
        model_config.transformer_layer_spec = layer_spec(routing, bidirectional=args.masked_lm)
    else:
        model_config.hybrid_stack_spec = hybrid.stack_spec(
            pattern, routing, bidirectional=args.masked_lm
        )
    cells = SharedCells.of(routing)
    hook = FinalizeStep(cells)
    model_config.finalize_model_grads_func = hook
    model_config.pre_wrap_hooks += compat.PRE_WRAP_HOOKS
    hash_router.install(model_config, routing)
    if cells is not None:
        cells.install(model_config)
    if args.fork_async_save:
        # Megatron's validation has switched it off, because the persistent worker is missing. On a
        # CPU that worker must not be used.
        args.async_save, args.async_strategy = True, "mcore"
    return hook


def model_config_of(args: argparse.Namespace) -> Any:
    """Return Megatron's configuration of the model of validated arguments, for `configure`."""
    from megatron.training import argument_utils

    if args.hybrid_layer_pattern is None:
        return argument_utils.gpt_config_from_args(args)
    return argument_utils.hybrid_config_from_args(args)


def _check_model(model_config: Any, args: argparse.Namespace) -> None:
    from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
    from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

    kind: Any = type(model_config).__name__
    expected: Any = (GPTModelConfig, GPTModelBuilder, "transformer_layer_spec")
    if isinstance(model_config, HybridModelConfig):
        expected = (HybridModelConfig, HybridModelBuilder, "hybrid_stack_spec")
    config, builder, field = expected
    if not isinstance(model_config, config) or model_config.get_builder_cls() is not builder:
        raise ValueError(
            f"the model's config is a {kind}, whose layers cannot be exchanged for ours; use the "
            f"GPTModelConfig of gpt_config_from_args, or the HybridModelConfig of "
            f"hybrid_config_from_args"
        )
    if getattr(model_config, field) is not None:
        raise ValueError(
            f"{field} of the {kind} is set already, and our layers take its place; leave it None"
        )
    given, asked = getattr(model_config, "hybrid_layer_pattern", None), args.hybrid_layer_pattern
    if given != asked:
        raise ValueError(
            f"the model's config is a {kind} with the hybrid_layer_pattern {given}, and that of "
            f"the arguments is {asked}; make it with hybrid_config_from_args if there is a "
            f"pattern, and with gpt_config_from_args if there is none"
        )
