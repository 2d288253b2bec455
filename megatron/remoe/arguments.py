"""Our command-line flags beside Megatron's, and what they do to a model's configuration.

The published flags keep their names, so that published launch scripts carry over.
"""

import argparse
import importlib.util
import os
import sys
from typing import Any, NoReturn, get_args

from megatron.remoe import compat, cpu, options, ranges
from remoe.config import L1CoeffRule, LoadBalancing, apply_granularity


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Megatron's `extra_args_provider`: adds our flags, and defaults that fit this machine.

    The returned parser applies granularity and checks our flags as soon as it has parsed them, so
    that Megatron validates the model that will be built. Granularity is thereby applied once:
    `--use-checkpoint-args` replaces the results by the saved run's and never multiplies them again.
    """
    compat.apply()
    group = parser.add_argument_group(title="remoe")
    group.add_argument(
        "--moe-relu-routing",
        action="store_true",
        help="Route with ReLU(x W) instead of TopK(Softmax(x W)).",
    )
    group.add_argument(
        "--moe-relu-l1-reg-coeff-init",
        type=float,
        default=1e-8,
        help="Initial coefficient of the L1 penalty on router outputs.",
    )
    group.add_argument(
        "--moe-relu-l1-reg-coeff-multiplier",
        type=float,
        default=1.2,
        help="Factor by which a step multiplies or divides the coefficient.",
    )
    group.add_argument(
        "--moe-relu-l1-reg-coeff-rule",
        choices=get_args(L1CoeffRule),
        default="sign",
        help="How the coefficient moves: by the multiplier as published, or proportional-integral.",
    )
    group.add_argument(
        "--moe-relu-load-balancing",
        choices=get_args(LoadBalancing),
        default="aux_loss",
        help="Weight the L1 penalty by the load of each expert, or not.",
    )
    group.add_argument(
        "--moe-relu-max-assignments",
        type=int,
        default=None,
        help="Assignments per layer and rank (mean over layers) that are computed at once; what is "
        "above runs chunk by chunk, and again in backward. Default: topk per token.",
    )
    group.add_argument(
        "--moe-relu-max-active-experts",
        type=int,
        default=None,
        help="Shortcut: keep a token's largest gates only, so many before granularity.",
    )
    group.add_argument(
        "--moe-relu-at-least-one-expert",
        action="store_true",
        help="Shortcut: a token without experts gets that of its largest logit.",
    )
    group.add_argument(
        "--moe-relu-start-sparse",
        action="store_true",
        help="Shortcut: a router bias, trained, at which the first step activates topk experts.",
    )
    group.add_argument(
        "--moe-granularity",
        type=int,
        default=1,
        help="G: multiplies --num-experts and --moe-router-topk, divides the expert width.",
    )
    group.add_argument(
        "--moe-topk-warmup-steps",
        type=int,
        default=0,
        help="TopK routing: activate --moe-topk-warmup-topk experts in the first training steps.",
    )
    group.add_argument(
        "--moe-topk-warmup-topk",
        type=int,
        default=None,
        help="TopK routing: k of the near-dense warm-up, before granularity.",
    )
    group.add_argument(
        "--metrics-file",
        default=None,
        help="Write one JSON object per logged step and evaluation to this file.",
    )
    group.add_argument(
        "--save-keep-last",
        type=int,
        default=None,
        help="Keep that many of the last checkpoints, and those of --save-retain-interval.",
    )
    group.add_argument("--wandb-tags", nargs="+", default=None, help="Tags of the W&B run.")
    group.add_argument(
        "--wandb-mode",
        choices=("online", "offline", "disabled"),
        default=None,
        help="Whether W&B sends what it logs, or writes it to --wandb-save-dir only.",
    )
    parser.set_defaults(**_machine_defaults())
    return _Parser(
        prog=parser.prog,
        description=parser.description,
        parents=[parser],
        add_help=False,
        allow_abbrev=False,
    )


class _Parser(argparse.ArgumentParser):
    """Megatron's parser, finishing its work with `finish`; a mistake is one line, exit code 2."""

    def parse_known_args(  # type: ignore[override]
        self, args: list[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        namespace, unknown = super().parse_known_args(args, namespace)
        try:
            ranges.check(namespace, self)
            finish(namespace)
        except ValueError as error:
            self.error(str(error))
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _machine_defaults() -> dict[str, Any]:
    """Defaults of Megatron's flags where theirs need what this machine lacks."""
    defaults: dict[str, Any] = {}
    if not _has_transformer_engine():
        defaults["transformer_impl"] = "local"
        defaults["apply_rope_fusion"] = False
        defaults["no_persist_layer_norm"] = True
    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is None:
        defaults["gradient_accumulation_fusion"] = False
    if importlib.util.find_spec("nvidia_resiliency_ext") is None:
        defaults["async_strategy"] = "mcore"
    if cpu.is_enabled():
        defaults["distributed_backend"] = "gloo"
    return defaults


def finish(args: argparse.Namespace) -> None:
    """Check our flags and apply what they imply to Megatron's, in place.

    Raises:
        ValueError: flags that do not fit together, naming the value and the remedy.
    """
    if args.full_validation:
        # Megatron then reads one sequence per rank at a time, whatever the batch size says.
        ranks = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
        ranks *= args.context_parallel_size
        args.eval_micro_batch_size = 1
        args.eval_global_batch_size = int(os.environ.get("WORLD_SIZE", "1")) // ranks
    _check_backend(args)
    _finish_checkpoints(args)
    _finish_wandb(args)
    if args.metrics_file is not None and args.log_interval % args.tensorboard_log_interval:
        raise ValueError(
            f"log_interval is {args.log_interval}, no multiple of tensorboard_log_interval "
            f"{args.tensorboard_log_interval}; metrics_file is written from what Megatron reports "
            f"to TensorBoard, so choose a tensorboard_log_interval that divides log_interval"
        )
    if args.num_experts is None and not args.use_checkpoint_args:
        _refuse_moe_flags_of_a_dense_model(args)
        return
    if args.moe_granularity != 1 and (args.moe_ffn_hidden_size or args.ffn_hidden_size) is None:
        raise ValueError(
            f"moe_granularity is {args.moe_granularity}, but the width that it divides is not "
            f"given; pass --moe-ffn-hidden-size or --ffn-hidden-size"
        )
    _check_topk_warmup(args)
    _check_max_assignments(args)
    _check_shortcuts(args)
    if args.num_experts is not None:
        width = args.moe_ffn_hidden_size or args.ffn_hidden_size
        shape = apply_granularity(
            num_experts=args.num_experts,
            topk=args.moe_router_topk,
            ffn_hidden_size=width or args.moe_granularity,
            granularity=args.moe_granularity,
        )
        args.num_experts, args.moe_router_topk = shape.num_experts, shape.topk
        for most in ("moe_topk_warmup_topk", "moe_relu_max_active_experts"):
            if getattr(args, most) is not None:
                setattr(args, most, getattr(args, most) * args.moe_granularity)
        if width is not None:
            args.moe_ffn_hidden_size = shape.ffn_hidden_size
    _refuse_uneven_gather_on_gloo(args)
    if args.tensor_model_parallel_size > 1:
        # Without it Megatron refuses to train experts with tensor parallelism, at the first step.
        args.sequence_parallel = True
    if args.moe_relu_routing:
        _finish_relu_routing(args)


def _finish_checkpoints(args: argparse.Namespace) -> None:
    args.adam_implementation = compat.adam()  # saved with every checkpoint
    if args.use_persistent_ckpt_worker and cpu.is_enabled():
        raise ValueError(
            "use_persistent_ckpt_worker is set, but on a CPU that worker shares the memory of the "
            "weights and writes values of later steps; leave it out (async_save forks a writer)"
        )
    args.fork_async_save = args.async_save and cpu.is_enabled()
    if args.async_save and not args.fork_async_save and not args.use_persistent_ckpt_worker:
        raise ValueError(
            "async_save is set without use_persistent_ckpt_worker, and Megatron then saves "
            "synchronously; set both, or neither"
        )
    args.save_milestone_interval = None
    if args.save_keep_last is None:
        return
    if args.save_keep_last < 1:
        raise ValueError(
            f"save_keep_last is {args.save_keep_last}; keep at least 1, or leave it out to keep all"
        )
    interval = args.save_retain_interval
    if interval is not None and (interval < 1 or interval % (args.save_interval or 1)):
        raise ValueError(
            f"save_retain_interval is {interval}, no multiple of save_interval "
            f"{args.save_interval}; choose one that is"
        )
    # Megatron would delete all but the last itself.
    args.save_milestone_interval, args.save_retain_interval = interval, None


def _check_backend(args: argparse.Namespace) -> None:
    if args.transformer_impl == "transformer_engine" and not _has_transformer_engine():
        raise ValueError(
            "transformer_impl is transformer_engine, which is not installed; install it (pip "
            "install 'remoe[te]', needs CUDA), or use transformer_impl local"
        )
    if args.context_parallel_size > 1 and args.transformer_impl == "local":
        raise ValueError(
            f"context_parallel_size is {args.context_parallel_size}, but the attention of "
            f"transformer_impl local sees one rank's part of the sequence only; use "
            f"context_parallel_size 1, or transformer_impl transformer_engine"
        )


def _has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def _finish_wandb(args: argparse.Namespace) -> None:
    """Check W&B, and hand it what Megatron has no flag for, through its environment variables."""
    if args.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"wandb_project is {args.wandb_project}, but wandb is not installed; run: pip install "
            f"'remoe[wandb]', or leave wandb_project out"
        )
    if args.wandb_mode is not None:
        os.environ["WANDB_MODE"] = args.wandb_mode
    if args.wandb_tags is not None:
        os.environ["WANDB_TAGS"] = ",".join(args.wandb_tags)


def _refuse_moe_flags_of_a_dense_model(args: argparse.Namespace) -> None:
    for flag, off in (
        ("moe_relu_routing", False),
        ("moe_granularity", 1),
        ("moe_topk_warmup_steps", 0),
        ("moe_relu_max_assignments", None),
        *_SHORTCUTS.items(),
    ):
        if getattr(args, flag) != off:
            raise ValueError(
                f"{flag} is set but num_experts is not; pass --num-experts, or leave {flag} out "
                f"for a dense model"
            )


def _check_topk_warmup(args: argparse.Namespace) -> None:
    steps, topk = args.moe_topk_warmup_steps, args.moe_topk_warmup_topk
    if steps < 0:
        raise ValueError(f"moe_topk_warmup_steps is {steps}; it must be 0 (no warm-up) or more")
    if steps == 0 and topk is None:
        return
    if steps == 0 or topk is None:
        raise ValueError(
            f"moe_topk_warmup_steps is {steps} and moe_topk_warmup_topk is {topk}; give both (the "
            f"published control: 100 steps with 6 experts), or neither"
        )
    if args.moe_relu_routing:
        raise ValueError(
            "moe_topk_warmup_steps is set with moe_relu_routing, which has a dense stage of its "
            "own; leave one of them out"
        )
    if args.num_experts is not None and not 1 <= topk <= args.num_experts:
        raise ValueError(
            f"moe_topk_warmup_topk is {topk} of {args.num_experts} experts; choose it between 1 "
            f"and num_experts"
        )
    options.check(args, names=options.NEEDS_KNOWN_COUNT, by="TopK with near-dense warm-up")


def _check_max_assignments(args: argparse.Namespace) -> None:
    limit = args.moe_relu_max_assignments
    if limit is None:
        return
    if limit < 1:
        raise ValueError(
            f"moe_relu_max_assignments is {limit}; it must be at least 1 (a number above tokens x "
            f"experts never chunks), or leave it out for topk per token"
        )
    if not args.moe_relu_routing and not args.moe_topk_warmup_steps:
        raise ValueError(
            f"moe_relu_max_assignments is {limit}, but TopK without warm-up always has topk "
            f"assignments per token; leave it out, or set moe_relu_routing"
        )


_SHORTCUTS: dict[str, Any] = {
    "moe_relu_max_active_experts": None,
    "moe_relu_at_least_one_expert": False,
    "moe_relu_start_sparse": False,
}


def _check_shortcuts(args: argparse.Namespace) -> None:
    for name, off in _SHORTCUTS.items():
        if getattr(args, name) != off and not args.moe_relu_routing:
            raise ValueError(
                f"{name} is set without moe_relu_routing, of whose router it is a shortcut; set "
                f"both, or leave it out"
            )
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


def _finish_relu_routing(args: argparse.Namespace) -> None:
    options.check(args)
    if args.moe_router_dtype is None:
        args.moe_router_dtype = "fp32"
    # Megatron demands this of softmax routers with topk 1; a ReLU router has no softmax.
    args.moe_router_pre_softmax = True
    # The published scripts pass aux_loss, which their ReLU router ignores. Here it would make
    # Megatron report a loss that does not exist.
    args.moe_router_load_balancing_type = "none"
    if args.num_experts is not None:
        routing_from_args(args).controller_for(args.num_experts, args.moe_router_topk)


def routing_from_args(args: argparse.Namespace):
    """The settings of ReLU routing, or of TopK routing."""
    from megatron.remoe.router import ReLURouting
    from megatron.remoe.warmup import TopKRouting

    if args.moe_relu_routing:
        return ReLURouting(
            l1_reg_coeff_init=args.moe_relu_l1_reg_coeff_init,
            l1_reg_coeff_multiplier=args.moe_relu_l1_reg_coeff_multiplier,
            l1_reg_coeff_rule=args.moe_relu_l1_reg_coeff_rule,
            load_balancing=args.moe_relu_load_balancing,
            max_active_experts=args.moe_relu_max_active_experts,
            at_least_one_expert=args.moe_relu_at_least_one_expert,
            start_sparse=args.moe_relu_start_sparse,
            max_assignments=args.moe_relu_max_assignments,
        )
    if args.moe_topk_warmup_steps:
        return TopKRouting(
            args.moe_topk_warmup_steps, args.moe_topk_warmup_topk, args.moe_relu_max_assignments
        )
    return TopKRouting()


def configure(model_config, args: argparse.Namespace):
    """Put our layers and our once-per-step hook into Megatron's `GPTModelConfig`.

    Without `--moe-relu-routing` the model is Megatron's TopK mixture, or dense without experts, on
    the same backend.

    Returns:
        The hook, a `FinalizeStep`, whose `report` a `MetricsWriter` logs.
    """
    from megatron.remoe.spec import layer_spec
    from megatron.remoe.step import FinalizeStep

    model_config.transformer_layer_spec = layer_spec(routing_from_args(args))
    hook = FinalizeStep()
    model_config.finalize_model_grads_func = hook
    model_config.pre_wrap_hooks.append(compat.mark_experts)
    if args.fork_async_save:
        # Megatron switches it off without the persistent worker, which a CPU must not use.
        args.async_save, args.async_strategy = True, "mcore"
    return hook
