"""Compare the run that wrote a checkpoint with the run that loads it.

Megatron loads every tensor that fits and drops what it does not know. The router's weights of one
method fit every other method, so a run with a forgotten flag would silently continue with another
model.
"""

import argparse
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.remoe import checkpoint, options
from megatron.remoe.formats.torch_dist import TorchDistReader
from remoe.config import ROUTINGS, Routing, Selection
from remoe.settings import settings_of

_ROUTERS = {name: routing.title for name, routing in ROUTINGS.items()} | {"dense": "no experts"}

_RECURRENT_SHAPE = ("recurrence", "recurrent_size", "recurrent_projection")
_REQUIRED = object()  # marks an argument that every checkpoint with arguments has
# Arguments that change what a model computes from its weights, beside our settings: Megatron's, and
# former ones of ours. The value is what a checkpoint without the argument was trained with.
_OF_TOPK: dict[str, Any] = {
    "moe_router_topk": _REQUIRED,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_enable_expert_bias": False,
}
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "soft": {},
    "relu": {"moe_router_topk": _REQUIRED, "moe_relu_l1_reg_coeff_rule": "sign"},
    "topk": _OF_TOPK,
}
_OF_ANY: dict[str, Any] = {"moe_router_topk": _REQUIRED}
# Arguments of training, as the learning rate is one. They may change, and the log says so.
_MAY_CHANGE = ("moe_router_load_balancing_type", "moe_aux_loss_coeff")


def compared(router: str) -> dict[str, Any]:
    """Return the arguments in which a run must agree with its checkpoint, for one router.

    Returns:
        Names, and the values that a checkpoint without these arguments was trained with.
    """
    settings = settings_of(ROUTINGS[router])
    return _ARGUMENTS.get(router, _OF_ANY) | {
        s.dest: s.default for s in settings if s.on_resume == "refused"
    }


def to_be_loaded(args: argparse.Namespace) -> Path | None:
    """Return the checkpoint that Megatron will load: from `load`, or `pretrained_checkpoint`."""
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
    """What a checkpoint says of the run that wrote it.

    Attributes:
        path: its `iter_*` or `release` directory.
        args: arguments of that run; empty if there are none.
        router: a name in `ROUTINGS`, or "dense".
    """

    path: Path
    args: argparse.Namespace
    router: str

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument of that run."""
        return getattr(self.args, name, default)


def read(path: Path) -> Saved:
    """Read what the checkpoint in a directory says.

    Raises:
        ValueError: the checkpoint is damaged.
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
    """Return the name in `ROUTINGS` of the router that the arguments ask for, or "dense"."""
    if getattr(args, "num_experts", None) is None:
        return "dense"
    return options.router_name(vars(args))


def _router_of_checkpoint(args: argparse.Namespace, path: Path) -> str:
    """Return the router by the arguments, or by the tensors if these do not name one."""
    by_arguments = router(args)
    if getattr(args, "moe_routing", None) or by_arguments in ("relu", "soft"):
        return by_arguments
    shapes = {
        name.rpartition(".router.")[2]: meta.shape
        for name, meta in TorchDistReader(path).meta.items()
        if ".router." in name
    }
    if "scale" in shapes:
        return "soft"
    for name, routing in ROUTINGS.items():
        if issubclass(routing, Selection) and _has_tensors(shapes, routing()):
            return name
    if not vars(args) and "weight" in shapes:
        return "topk"
    return by_arguments


def _has_tensors(shapes: Mapping[str, Sequence[int]], selection: Selection) -> bool:
    """Return whether these are the tensors of the routers of a selection that has some."""
    learned = selection.parameters(2, 1)
    own = {*selection.buffers(2, 1), *learned}
    of_any = {"weight", "bias", "projection", "load"}
    return own == shapes.keys() - of_any != set() and all(
        (shapes[name][-1] == 1) == (value.shape[-1] == 1) for name, value in learned.items()
    )


def take_arguments(args: argparse.Namespace) -> None:
    """Take the model's arguments from the checkpoint, if `--use-checkpoint-args` asks for it."""
    from megatron.training.checkpointing import load_args_from_checkpoint

    if args.use_checkpoint_args and to_be_loaded(args) is not None:
        for folder in ("pretrained_checkpoint", "load"):
            load_args_from_checkpoint(args, load_arg=folder)


def check_before_start(args: argparse.Namespace) -> None:
    """Run `check` on the checkpoint that Megatron would load now.

    A damaged checkpoint passes: `resume.prepare` names the damage, and looks for another.
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
    """Refuse to continue a checkpoint with a model or optimizer other than its own.

    Args:
        args: Megatron's arguments and ours, from which the model is built.
        saved: what the checkpoint says.

    Raises:
        ValueError: the router, a setting of it, or the implementation of Adam differs. The message
            names both values and the remedy.
    """
    now = router(args)
    if saved.get("moe_relu_start_sparse"):
        raise ValueError(
            f"checkpoint {saved.path} was trained with moe_relu_start_sparse, which no longer "
            f"exists: its routers have a bias that would be dropped; continue it with the version "
            f"of remoe that wrote it, or start a new run"
        )
    _refuse_other_task(args, saved)
    if all(
        name in ROUTINGS and issubclass(ROUTINGS[name], Selection) for name in (saved.router, now)
    ):
        _refuse_other_recurrence(args, saved)
    if saved.router != now:
        _refuse_other_router(args, saved, now)
    elif now != "dense":
        _refuse_other_shape(args, saved)
        _refuse_other_settings(args, saved)
    _let_state_begin(args, saved, now)
    _refuse_other_adam(args, saved)
    if args.rank == 0:
        _say_what_changes(args, saved)


def _refuse_other_router(args: argparse.Namespace, saved: Saved, now: str) -> None:
    before = saved.router
    subject = f"checkpoint {saved.path} has {_ROUTERS[before]}, and this run has {_ROUTERS[now]}"
    if before == "dense":
        raise ValueError(
            f"{subject}; leave num_experts out, or make a mixture to start from with remoe "
            f"convert upcycle"
        )
    if now == "dense":
        flag = "" if before == "topk" else f" --moe-routing {before}"
        raise ValueError(
            f"{subject}; pass{flag} --num-experts and the other flags that it was trained with"
        )
    if _have_other_weights(before, now):
        raise ValueError(
            f"{subject}, whose routers have other weights; pass the flags that it was trained "
            f"with, or start a new run"
        )
    if not args.moe_change_routing:
        raise ValueError(
            f"{subject}; pass --moe-routing {before}, or pass --moe-change-routing to change the "
            f"router on purpose"
        )
    more = sorted(_learned(before).keys() ^ _learned(now).keys())
    if more and not (args.no_load_optim or args.finetune):
        raise ValueError(
            f"{subject}, of which only one learns {', '.join(more)}, so that the state of the "
            f"optimizer does not fit; start with new moments (no_load_optim=true)"
        )


def _have_other_weights(before: str, now: str) -> bool:
    """Return whether routers have numbers of logits, or learned tensors, that do not fit."""
    kinds = [ROUTINGS[router] for router in (before, now)]
    logits = {kind().num_logits(1) if issubclass(kind, Selection) else None for kind in kinds}
    a, b = _learned(before), _learned(now)
    return len(logits) > 1 or any(a[name] != b[name] for name in a.keys() & b.keys())


def _learned(router: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes, for 2 experts, of what a router learns beside its weight."""
    routing = ROUTINGS[router]
    learned = routing().parameters(2, 1) if issubclass(routing, Selection) else {}
    return {name: tuple(value.shape) for name, value in learned.items()}


def _let_state_begin(args: argparse.Namespace, saved: Saved, now: str) -> None:
    """Let state that the checkpoint lacks begin at its initial value; Megatron's log names it."""
    routing = ROUTINGS.get(now)
    if not args.moe_change_routing or routing is None or not issubclass(routing, Selection):
        return
    settings = settings_of(routing)
    selection = routing(**{s.name: getattr(args, s.dest, s.default) for s in settings})
    needed = {*selection.buffers(2, 1), *selection.parameters(2, 1)}
    if needed - {name.rpartition(".router.")[2] for name in TorchDistReader(saved.path).meta}:
        args.dist_ckpt_strictness = "log_unexpected"


def _refuse_other_task(args: argparse.Namespace, saved: Saved) -> None:
    """Refuse to go on with a causal model as an encoder, or the other way round."""
    before, now = bool(saved.get("masked_lm", False)), bool(getattr(args, "masked_lm", False))
    if vars(saved.args) and before != now:
        raise ValueError(
            f"checkpoint {saved.path} was trained with masked_lm {before}, and this run has {now}: "
            f"one sees all tokens and the other those before; set masked_lm to {before}, or start "
            f"a new run"
        )


def _refuse_other_recurrence(args: argparse.Namespace, saved: Saved) -> None:
    """Refuse another cell, size of the state or projection, whose weights have other shapes."""
    if not vars(saved.args):
        _refuse_other_recurrence_by_tensors(args, saved)
        return
    sizes = {s.dest: s.default for s in settings_of(Routing) if s.name in _RECURRENT_SHAPE}
    for name, default in sizes.items():
        before, now = saved.get(name, default), getattr(args, name, default)
        if before != now:
            raise ValueError(
                f"checkpoint {saved.path} was trained with {name} {before}, and this run has "
                f"{now}, with which its routers have other weights; set {name} to "
                f"{before}, or start a new run"
            )


def _refuse_other_recurrence_by_tensors(args: argparse.Namespace, saved: Saved) -> None:
    """Refuse a checkpoint without arguments by whether it has a cell, which would be dropped."""
    has_cell = any(".recurrent_cell." in name for name in TorchDistReader(saved.path).meta)
    now = getattr(args, "moe_router_recurrence", "none")
    if has_cell != (now != "none"):
        raise ValueError(
            f"checkpoint {saved.path} has {'the' if has_cell else 'no'} cell of recurrent routers, "
            f"and this run has moe_router_recurrence {now}; "
            + ("choose gru or rnn" if has_cell else "leave it out, or start a new run")
        )


def _refuse_other_shape(args: argparse.Namespace, saved: Saved) -> None:
    granularity = getattr(args, "moe_granularity", 1)
    for name, before, now in (
        ("num_experts", saved.get("num_experts"), args.num_experts),
        ("moe_ffn_hidden_size", _width(saved.args), _width(args)),
        *_slots(args, saved),
    ):
        if None not in (before, now) and before != now:
            raise ValueError(
                f"checkpoint {saved.path} has {name} {before} (with moe_granularity "
                f"{saved.get('moe_granularity', 1)}), and this run {now} (with moe_granularity "
                f"{granularity}); pass the flags that it was trained with"
            )


def _slots(args: argparse.Namespace, saved: Saved) -> list[tuple[str, int | None, int | None]]:
    """Return the slots per expert of both, of which routers of Soft MoE have a row each."""
    if saved.router != "soft":
        return []
    name = "moe_soft_slots_per_expert"
    return [(name, saved.get(name), getattr(args, name, None))]


def _width(args: argparse.Namespace) -> int | None:
    return getattr(args, "moe_ffn_hidden_size", None) or getattr(args, "ffn_hidden_size", None)


def _refuse_other_settings(args: argparse.Namespace, saved: Saved) -> None:
    if args.moe_change_routing or not vars(saved.args):
        return
    for name, default in compared(saved.router).items():
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
    settings = (s for routing in ROUTINGS.values() for s in settings_of(routing))
    ours = (s.dest for s in settings if s.on_resume != "free")
    theirs = (*_ARGUMENTS["relu"], *_ARGUMENTS["topk"], *_MAY_CHANGE)
    if saved.router != (now := router(args)) and "dense" not in (saved.router, now):
        print(
            f"remoe: warning: moe_routing was {saved.router} in {saved.path}, and is now {now}",
            flush=True,
        )
    for name in dict.fromkeys((*ours, *theirs)):
        if hasattr(saved.args, name) and hasattr(args, name):
            before, now = _plain(saved.get(name)), _plain(getattr(args, name))
            if before != now:
                print(
                    f"remoe: warning: {name} was {before} in {saved.path}, and is now {now}",
                    flush=True,
                )


def _plain(value: Any) -> Any:
    """Return the value without the list that Megatron makes of the single value of some flags."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
