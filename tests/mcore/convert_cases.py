"""Tiny Megatron models with known weights, in a process that has Megatron (`Ranks`)."""

import contextlib
import io
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FLAGS = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "norm_epsilon": 1.0e-5,
    "disable_bias_linear": True,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "init_method_std": 0.01,
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "no_create_attention_mask_in_dataloader": True,
    "tokenizer_type": "NullTokenizer",
    "vocab_size": 99,  # and the end of documents; the padding is 28 rows
    "padded_vocab_size": 128,
}
RELU = {
    "num_experts": 4,
    "moe_router_topk": 1,
    "moe_relu_routing": True,
    "moe_token_dispatcher_type": "alltoall",
    "moe_grouped_gemm": True,
    "expert_tensor_parallel_size": 1,
}
TOPK = (RELU | {"moe_relu_routing": False, "moe_router_load_balancing_type": "none"}) | {
    "moe_router_topk": 2
}
UNTIED = {"untie_embeddings_and_output_weights": True}
PLAIN = (bool, int, float, str, list, type(None))
TOKENS = [7, 3, 99, 0, 41, 41, 8, 64, 12, 5, 77, 30]


@dataclass
class Outcome:
    """What became of one case.

    Attributes:
        logits: largest difference between Megatron and transformers.
        flipped: (token, expert) pairs that are active in one of them only.
        active: share of active pairs.
        round_trip: names that are not bit-equal after Megatron -> HF -> Megatron.
        returned_logits: largest difference between Megatron's forward before and after.
    """

    logits: float
    flipped: int
    active: float
    round_trip: list[str]
    returned_logits: float


def save(flags: dict[str, Any], folder: Path) -> torch.nn.Module:
    """Build a model, give every weight a value of its own, and save it as Megatron does."""
    from megatron.remoe.convert.forward import build_model

    model, args = build_model(FLAGS | flags)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() > 1 else 0.1
            noise = torch.randn(parameter.shape, generator=generator) * spread
            parameter.copy_(1 + noise if "norm" in name else noise)
        for number, (name, buffer) in enumerate(model.named_buffers()):
            part = name.rpartition(".router.")[2]
            if part == "l1_coeff":
                buffer.fill_(1e-5 * (number + 1) / 3)
            elif part in ("load", "thresholds"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator))
            elif part in ("odds", "num_updates"):
                buffer.fill_((number + 1) / 3)
    args.consumed_train_samples = 24
    _save(model, args, folder)
    return model


def write_model(flags: dict[str, Any], folder: Path) -> None:
    """`save` for another process, which has no use for the model."""
    save(flags, folder)


def _save(model, args, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    folder.mkdir(parents=True, exist_ok=True)
    state = {"model": model.sharded_state_dict(), "args": args, "iteration": 3}
    with contextlib.redirect_stdout(io.StringIO()):
        dist_checkpointing.save(state | {"checkpoint_version": 3.0}, str(folder))


def reshard(flags: dict[str, Any], nproc: int, source: Path, folder: Path) -> None:
    """Load a checkpoint under another layout and save it again; called on all ranks."""
    from megatron.core import dist_checkpointing

    from megatron.remoe.convert.forward import build_model

    model, args = build_model(FLAGS | flags, nproc)
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(source))
    model.load_state_dict(state["model"])
    args.consumed_train_samples = 24
    _save(model, args, folder)


def through_hf(flags: dict[str, Any], home: Path) -> Outcome:
    """Megatron -> HF -> Megatron, with both forward passes."""
    from megatron.remoe.convert import forward
    from megatron.remoe.convert.export import to_hf
    from megatron.remoe.convert.hf_source import HFSource
    from megatron.remoe.convert.source import MegatronSource
    from megatron.remoe.convert.to_megatron import Layout, to_megatron

    model = save(flags, home / "iter_0000003")
    ours, maps = forward.logits_and_maps(model, TOKENS, 100)
    to_hf(home / "iter_0000003", home / "hf")
    hf = HFSource(home / "hf")
    request = {"dtype": hf.dtype, "prompt": 4, "new_tokens": 1}
    theirs = forward.forward(hf, TOKENS, **request)
    assert hf.config["vocab_size"] == 100 and len(theirs.active) == len(maps)

    to_megatron(home / "hf", home / "back", layout=Layout())
    first, second = MegatronSource(home / "iter_0000003"), MegatronSource(home / "back")
    assert first.reader.meta and first.reader.meta.keys() == second.reader.meta.keys()
    returned = forward.load_model(second.checkpoint, FLAGS | flags)
    again, _ = forward.logits_and_maps(returned, TOKENS, 100)
    different = [
        name
        for name, meta in first.reader.meta.items()
        if meta.dtype != second.reader.meta[name].dtype
        or not torch.equal(first.reader.read(name), second.reader.read(name))
    ]
    pairs = [(a, b) for a, b in zip(maps, theirs.active, strict=True)]
    return Outcome(
        logits=float((ours - theirs.logits).abs().max()),
        flipped=sum(int((a != b).sum()) for a, b in pairs),
        active=float(torch.stack([a.float().mean() for a, _ in pairs]).mean()) if pairs else 1.0,
        round_trip=different,
        returned_logits=float((ours - again).abs().max()),
    )


def refusal(router: str) -> str:
    """What an export says of a model with another router."""
    from megatron.remoe.arguments import megatron_parser
    from megatron.remoe.convert.architecture import to_config
    from megatron.remoe.run.argv import to_argv

    parser = megatron_parser()
    args = parser.parse_args(to_argv(FLAGS | TOPK | {"kv_channels": 8}, parser))
    args.moe_routing = router
    try:
        to_config(args)
    except ValueError as error:
        return str(error)
    return ""


def save_legacy(flags: dict[str, Any], home: Path) -> None:
    """One model as a torch_dist checkpoint and as the old one-file kind."""
    from megatron.remoe.convert.source import MegatronSource

    model = save(flags, home / "new/iter_0000003")
    args = MegatronSource(home / "new").args
    args = Namespace(**{k: v for k, v in vars(args).items() if isinstance(v, PLAIN)})
    old = home / "old/iter_0000003/mp_rank_00"
    old.mkdir(parents=True)
    state = {"model": model.state_dict(), "args": args, "iteration": 3, "checkpoint_version": 3.0}
    torch.save(state, old / "model_optim_rng.pt")


def through_hf_with(corruption: str, flags: dict[str, Any], home: Path) -> Outcome:
    """`through_hf` with a mistake in the table."""
    from dataclasses import replace

    from megatron.remoe.convert import table as conversion

    table = conversion.TABLE
    conversion.TABLE = tuple(_corrupted(corruption, rule, replace) for rule in table)
    try:
        return through_hf(flags, home)
    finally:
        conversion.TABLE = table


def _corrupted(corruption: str, rule, replace):
    """QKV without its groups, the halves of a matrix exchanged, norms exchanged."""
    from megatron.remoe.convert import table as conversion

    if corruption == "qkv" and rule.megatron.endswith("linear_qkv.weight"):

        def split(tensor, dims):
            return list(tensor.split([dims["Q"], dims["K"], dims["K"]]))

        return replace(rule, to_hf=split, to_megatron=conversion._concatenate)
    if corruption == "gate and up" and rule.megatron.endswith("experts.linear_fc1.weight"):
        return replace(
            rule,
            to_hf=lambda tensor, dims: [tensor.roll(dims["F"], 1)],
            to_megatron=lambda tensors, dims: tensors[0].roll(dims["F"], 1),
        )
    names = {"input_layernorm": "post_attention_layernorm"}
    names |= {new: old for old, new in names.items()}
    if corruption == "norms":
        hf = {}
        for name, dims in rule.hf.items():
            part = name.split(".")[-2] if "layernorm" in name else ""
            hf[name.replace(part, names[part]) if part in names else name] = dims
        return replace(rule, hf=hf)
    return rule


def write_synthetic(folder: Path, *, layers: int, hidden: int, width: int) -> int:
    """A larger checkpoint, written tensor by tensor; its bytes.

    Run by hand for gigabytes:
    `python -m tests.mcore.convert_cases FOLDER LAYERS HIDDEN WIDTH`.
    """
    from megatron.remoe.arguments import megatron_parser
    from megatron.remoe.convert.architecture import to_config
    from megatron.remoe.convert.table import plan
    from megatron.remoe.formats.torch_dist import TorchDistWriter
    from megatron.remoe.run.argv import to_argv

    sizes = {"num_layers": layers, "hidden_size": hidden, "moe_ffn_hidden_size": width}
    flags = FLAGS | RELU | UNTIED | sizes | {"num_experts": 8, "kv_channels": hidden // 4}
    parser = megatron_parser()
    args = parser.parse_args(to_argv(flags, parser))
    args = Namespace(**{k: v for k, v in vars(args).items() if isinstance(v, PLAIN)})
    folder.mkdir(parents=True)
    writer = TorchDistWriter(folder, num_layers=layers, stacked=True)
    total = 0
    for item in plan(to_config(args) | {"vocab_size": 100}, 128):
        tensor = torch.full(item.megatron_shape, 0.5)
        total += tensor.numel() * tensor.element_size()
        writer.write(item.megatron, tensor)
    writer.finish({"args": args, "iteration": 1})
    return total


if __name__ == "__main__":
    print(
        write_synthetic(
            Path(sys.argv[1]),
            **dict(zip(("layers", "hidden", "width"), map(int, sys.argv[2:]), strict=True)),
        )
    )
