"""Checkpoints as the published implementation writes them, made from a model of ours."""

import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.mcore.convert_cases import PLAIN, RELU, UNTIED, save

COEFFICIENT = 0.015625
GRANULARITY = 2
FLAGS = RELU | UNTIED | {"moe_granularity": GRANULARITY}
# norms as modules or fused, and experts: as the local backend, Transformer Engine and the grouped
# GEMM name them
VARIANTS = {
    "local": ("modules", "sequential"),
    "TE, sequential": ("fused", "sequential"),
    "TE, grouped": ("fused", "TE"),
    "grouped GEMM": ("fused", "grouped GEMM"),
}
_LATER = ("moe_relu_load_balancing", "moe_router_dtype", "moe_topk_warmup_steps", "metrics_file")


def write_fork(home: Path, **changes: Any) -> None:
    """One model: ours in `home/ours`, and as the fork's in every variant in `home/<variant>`.

    Args:
        home: a folder.
        changes: of the fork's arguments.
    """
    from megatron.remoe.convert.source import MegatronSource

    model = save(FLAGS, home / "ours/iter_0000003")
    for name, buffer in model.named_buffers():
        if name.endswith("l1_coeff"):
            buffer.fill_(COEFFICIENT)
    source = MegatronSource(home / "ours")
    tensors = {n: source.reader.read(n) for n in source.reader.meta}
    args = _fork_args(source.args, changes)
    for variant, (norms, experts) in VARIANTS.items():
        state = dict(_named(tensors, norms, experts))
        state["moe_relu_l1_reg_coeff"] = torch.tensor(COEFFICIENT)
        state["decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(b"of fp8")
        state["output_layer._extra_state"] = None
        folder = home / variant / "iter_0000003/mp_rank_00"
        folder.mkdir(parents=True)
        whole = {"model": state, "args": args, "iteration": 3, "checkpoint_version": 3.0}
        whole["rng_state"] = [{"np_rng_state": np.random.RandomState(0).get_state()}]
        torch.save(whole, folder / "model_optim_rng.pt")
    _write_torch_dist(tensors, args, home)


def _fork_args(ours: Namespace, changes: dict[str, Any]) -> Namespace:
    """Before granularity, and without what came later."""
    args = {k: v for k, v in vars(ours).items() if isinstance(v, PLAIN) and k not in _LATER}
    args["num_experts"] //= GRANULARITY
    args["moe_router_topk"] //= GRANULARITY
    args["norm_epsilon"] = args.pop("layernorm_epsilon")
    for name in ("moe_ffn_hidden_size", "kv_channels"):
        del args[name]
    return Namespace(**(args | {"params_dtype": torch.float32} | changes))


def _named(tensors: dict[str, Tensor], norms: str, experts: str):
    """Our names to the variant's; the coefficient of every router is left out."""
    for name, tensor in tensors.items():
        if name.endswith("l1_coeff"):
            continue
        if ".experts.experts." in name:
            yield from _experts(name, tensor, experts)
        elif norms == "modules":
            fused = "self_attention.linear_qkv.layer_norm_weight"
            yield name.replace(fused, "input_layernorm.weight"), tensor
        else:
            yield name, tensor


def _experts(name: str, tensor: Tensor, form: str):
    layer, _, linear = name.removesuffix(".weight").partition(".experts.experts.")
    if form == "grouped GEMM":  # [H, E * 2F] and [E * F, H], one expert after the other in memory
        transposed = tensor.transpose(1, 2).contiguous()
        rows = (tensor.shape[2], -1) if linear == "linear_fc1" else (-1, tensor.shape[1])
        yield f"{layer}.experts.weight{linear[-1]}", transposed.view(*rows)
        return
    for index, weight in enumerate(tensor):
        if form == "TE":
            yield f"{layer}.experts.{linear}.weight{index}", weight.clone()
        else:
            yield f"{layer}.experts.local_experts.{index}.{linear}.weight", weight.clone()


def _write_torch_dist(tensors: dict[str, Tensor], args: Namespace, home: Path) -> None:
    """Stacked over layers; norms before experts as the stock local spec names them."""
    from megatron.remoe.formats.torch_dist import TorchDistWriter

    folder = home / "torch_dist/iter_0000003"
    folder.mkdir(parents=True)
    writer = TorchDistWriter(folder, num_layers=args.num_layers, stacked=True)
    for name, tensor in tensors.items():
        if not name.endswith("l1_coeff"):
            fused = "mlp.linear_fc1.layer_norm_weight"
            writer.write(name.replace("pre_mlp_layernorm.weight", fused), tensor)
    coefficient = {"moe_relu_l1_reg_coeff": torch.tensor(COEFFICIENT)}
    writer.finish({"args": args, "iteration": 3, "model": coefficient})


def logits_of(folder: Path, tokens: list[list[int]]) -> list[Tensor]:
    """Of an exported folder by transformers, of a checkpoint by Megatron's own forward."""
    import yaml

    from megatron.remoe.convert import forward
    from megatron.remoe.convert.source import find_checkpoint
    from remoe.hf import ReMoEForCausalLM

    if (folder / "config.json").is_file():
        exported = ReMoEForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            return list(exported(torch.tensor(tokens)).logits)
    flags = yaml.safe_load((folder / "model.yaml").read_text())
    del flags["pretrained_checkpoint"]
    model = forward.load_model(find_checkpoint(folder), flags)
    return [forward.logits_and_maps(model, line, 256)[0] for line in tokens]
