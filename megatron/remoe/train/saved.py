"""What a checkpoint says of the run that wrote it, held against the run that loads it.

Megatron loads every tensor that fits and drops what it does not know: the router's weights of one
method fit every other one, so that a forgotten flag would go on with another model, silently.
"""

import argparse
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.remoe import checkpoint
from megatron.remoe.formats.torch_dist import TorchDistReader

_ROUTERS = {"relu": "ReLU routing", "topk": "TopK routing", "dense": "a dense model"}

_REQUIRED = object()  # every checkpoint with arguments has it
# What the forward pass and the penalty compute beside the weights, with the value that a checkpoint
# without such an argument was trained with.
_SETTINGS: dict[str, dict[str, Any]] = {
    "relu": {
        "moe_router_topk": _REQUIRED,
        "moe_relu_load_balancing": "aux_loss",
        "moe_relu_l1_reg_coeff_rule": "sign",
        "moe_relu_max_active_experts": None,
        "moe_relu_at_least_one_expert": False,
    },
    "topk": {
        "moe_router_topk": _REQUIRED,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_router_topk_scaling_factor": None,
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        "moe_router_enable_expert_bias": False,
    },
    "dense": {},
}
# Settings of training as the learning rate is one: they may change, and the log says so.
_MAY_CHANGE = (
    "moe_relu_l1_reg_coeff_multiplier",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_topk_warmup_steps",
    "moe_topk_warmup_topk",
)


def to_be_loaded(args: argparse.Namespace) -> Path | None:
    """The checkpoint that Megatron will load: of `load`, or else of `pretrained_checkpoint`."""
    for folder in (args.load, args.pretrained_checkpoint):
        if not folder:
            continue
        path = checkpoint.tracked_path(Path(folder))
        if args.ckpt_step and (path is not None or folder == args.load):
            path = Path(folder) / f"iter_{args.ckpt_step:07d}"
        if path is not None and path.is_dir():
            return path
    return None


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says.

    Attributes:
        path: its `iter_*` or `release` directory.
        args: of the run that wrote it; empty if there are none.
        router: "relu", "topk" or "dense".
    """

    path: Path
    args: argparse.Namespace
    router: str

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self.args, name, default)


def read(path: Path) -> Saved:
    """What the checkpoint in a directory says.

    Raises:
        ValueError: it is damaged.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    damage = (CheckpointingException, CheckpointException, pickle.UnpicklingError)
    try:
        state = dist_checkpointing.load_common_state_dict(str(path))
    except (*damage, EOFError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from error
    args = state.get("args") or argparse.Namespace()
    return Saved(path, args, _router_of_checkpoint(args, path))


def router(args: argparse.Namespace) -> str:
    """Which router the arguments ask for: "relu", "topk" or "dense"."""
    if getattr(args, "num_experts", None) is None:
        return "dense"
    return "relu" if getattr(args, "moe_relu_routing", False) else "topk"


def _router_of_checkpoint(args: argparse.Namespace, path: Path) -> str:
    """By its arguments, and by its tensors where they do not say that it is ReLU routing."""
    by_arguments = router(args)
    if by_arguments == "relu":
        return by_arguments
    names = TorchDistReader(path).meta
    if any(name.endswith(".router.l1_coeff") for name in names):
        return "relu"
    if not vars(args) and any(name.endswith(".router.weight") for name in names):
        return "topk"
    return by_arguments


def take_arguments(args: argparse.Namespace) -> None:
    """With `--use-checkpoint-args`, take the model's from the checkpoint as Megatron will do."""
    from megatron.training.checkpointing import load_args_from_checkpoint

    if args.use_checkpoint_args and to_be_loaded(args) is not None:
        for folder in ("pretrained_checkpoint", "load"):
            load_args_from_checkpoint(args, load_arg=folder)


def check_before_start(args: argparse.Namespace) -> None:
    """`check` on the checkpoint that Megatron would load now.

    One that is damaged passes: `resume.prepare` names the damage, and looks for another.
    """
    path = to_be_loaded(args)
    if path is None:
        return
    try:
        saved = read(path)
    except ValueError:
        return
    check(args, saved)


def check(args: argparse.Namespace, saved: Saved) -> None:
    """Refuse to continue a checkpoint as something else than it was trained as.

    Args:
        args: Megatron's and ours, as the model is built from them.
        saved: the checkpoint.

    Raises:
        ValueError: another router, another setting of it, or another implementation of Adam; names
            both values and the remedy.
    """
    now = router(args)
    if saved.get("moe_relu_start_sparse"):
        raise ValueError(
            f"checkpoint {saved.path} was trained with moe_relu_start_sparse, which no longer "
            f"exists: its routers have a bias that would be dropped; continue it with the version "
            f"of remoe that wrote it, or start a new run"
        )
    if saved.router != now:
        _refuse_other_router(args, saved, now)
    elif now != "dense":
        _refuse_other_shape(args, saved)
        _refuse_other_settings(args, saved)
    _refuse_other_adam(args, saved)
    if args.rank == 0:
        _say_what_changes(args, saved)


def _refuse_other_router(args: argparse.Namespace, saved: Saved, now: str) -> None:
    before = saved.router
    subject = f"checkpoint {saved.path} is of {_ROUTERS[before]}, and this run of {_ROUTERS[now]}"
    if before == "dense":
        raise ValueError(
            f"{subject}; leave num_experts out, or make a mixture to start from with remoe "
            f"convert upcycle"
        )
    if now == "dense":
        flag = " --moe-relu-routing" if before == "relu" else ""
        raise ValueError(
            f"{subject}; pass{flag} --num-experts and the other flags that it was trained with"
        )
    if not args.moe_change_routing:
        remedy = "leave --moe-relu-routing out" if now == "relu" else "pass --moe-relu-routing"
        raise ValueError(
            f"{subject}; {remedy}, or pass --moe-change-routing to change the router on purpose"
        )
    if now == "relu":
        # The checkpoint has no coefficients, which then begin at their initial value. Megatron
        # names in the log what it does not find.
        args.dist_ckpt_strictness = "log_unexpected"


def _refuse_other_shape(args: argparse.Namespace, saved: Saved) -> None:
    granularity = getattr(args, "moe_granularity", 1)
    for name, before, now in (
        ("num_experts", saved.get("num_experts"), args.num_experts),
        ("moe_ffn_hidden_size", _width(saved.args), _width(args)),
    ):
        if None not in (before, now) and before != now:
            raise ValueError(
                f"checkpoint {saved.path} has {name} {before} (with moe_granularity "
                f"{saved.get('moe_granularity', 1)}), and this run {now} (with moe_granularity "
                f"{granularity}); pass the flags that it was trained with"
            )


def _width(args: argparse.Namespace) -> int | None:
    return getattr(args, "moe_ffn_hidden_size", None) or getattr(args, "ffn_hidden_size", None)


def _refuse_other_settings(args: argparse.Namespace, saved: Saved) -> None:
    if args.moe_change_routing or not vars(saved.args):
        return
    for name, default in _SETTINGS[saved.router].items():
        now = getattr(args, name, default)
        before = saved.get(name, now if default is _REQUIRED else default)
        if before != now:
            raise ValueError(
                f"checkpoint {saved.path} was trained with {name} {before}, and this run has "
                f"{now}; {_remedy(name, before)}, or pass --moe-change-routing to change it on "
                f"purpose"
            )


def _remedy(name: str, before: Any) -> str:
    if name == "moe_relu_l1_reg_coeff_rule":
        return "continue it with the version of remoe that wrote it"
    return f"set {name} to what it was trained with"


def _refuse_other_adam(args: argparse.Namespace, saved: Saved) -> None:
    """Refuse the optimizer state of another implementation of Adam (see `compat.adam`)."""
    if args.no_load_optim or args.finetune:
        return
    before = saved.get("adam_implementation", args.adam_implementation)
    if before != args.adam_implementation:
        raise ValueError(
            f"checkpoint {saved.path} holds the state of Adam of {before}, and this environment "
            f"has that of {args.adam_implementation}; they count steps in different places, so "
            f"the bias correction would silently start anew. Continue where {before} is "
            f"installed, or start with new moments (no_load_optim=true)"
        )


def _say_what_changes(args: argparse.Namespace, saved: Saved) -> None:
    names = (*_SETTINGS["relu"], *_SETTINGS["topk"], *_MAY_CHANGE)
    for name in ("moe_relu_routing", *dict.fromkeys(names)):
        if hasattr(saved.args, name) and hasattr(args, name):
            before, now = _plain(saved.get(name)), _plain(getattr(args, name))
            if before != now:
                print(
                    f"remoe: warning: {name} was {before} in {saved.path}, and is now {now}",
                    flush=True,
                )


def _plain(value: Any) -> Any:
    """Without the list around a single value, which Megatron makes of some flags."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
