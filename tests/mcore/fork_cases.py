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


def write_ranks(whole: Path, folder: Path, stages: list[list[int]], tp: int = 1, ep: int = 1,
                virtual: int = 1, **changes: Any) -> None:  # fmt: skip
    """Split a one-rank checkpoint over ranks, as Megatron's modules define their parts.

    Args:
        whole: a folder of a step, with the file of one rank.
        folder: the folder of a step to write.
        stages: the layers of each pipeline stage; with virtual stages, of those of every stage.
        tp, ep: numbers of tensor- and expert-parallel ranks.
        virtual: number of virtual stages of each stage.
        changes: of the arguments.
    """
    state = torch.load(whole / "mp_rank_00/model_optim_rng.pt", weights_only=False)
    pp = len(stages) // virtual
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    sizes |= {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": tp}
    for t in range(tp):
        for p in range(pp):
            for e in range(ep):
                args = Namespace(**(vars(state["args"]) | sizes | {"rank": t} | changes))
                models = []
                for v in range(virtual):
                    part = stages[v * pp + p]
                    is_first, is_last = v + p == 0, v * pp + p == len(stages) - 1
                    ends = [["embedding."] * is_first, ["decoder.final", "output_layer."] * is_last]
                    models.append(_of_rank(state["model"], part, sum(ends, []), (t, tp), (e, ep)))
                name = f"mp_rank_{t:02d}" + f"_{p:03d}" * (pp > 1) + f"_{e:03d}" * (ep > 1)
                keys = ["model"] if virtual == 1 else [f"model{v}" for v in range(virtual)]
                file = folder / name / "model_optim_rng.pt"
                file.parent.mkdir(parents=True)
                torch.save(state | {"args": args} | dict(zip(keys, models, strict=True)), file)
                if virtual > 1:
                    saved = torch.load(file, weights_only=False)
                    torch.save({k: v for k, v in saved.items() if k != "model"}, file)


def _of_rank(model, layers, ends, tensor, expert):
    """The tensors of a stage's rank; layers and experts are numbered from zero."""
    part = {}
    for name, value in model.items():
        words = name.split(".")
        if name.startswith("decoder.layers."):
            if int(words[2]) not in layers:
                continue
            words[2] = str(layers.index(int(words[2])))
        elif name != "moe_relu_l1_reg_coeff" and not name.startswith(tuple(ends)):
            continue
        if isinstance(value, Tensor):
            found = _slice(words, value, tensor, expert)
            if found is None:
                continue
            value = found.clone()
        part[".".join(words)] = value
    return part


def _slice(words, value, tensor, expert):
    """A rank's part of a tensor, None if it has none; numbers a single expert in `words`."""
    (t, tp), (e, ep) = tensor, expert
    here = slice(e * 8 // ep, (e + 1) * 8 // ep)
    if words[-3:-1] == ["experts", "linear_fc1"] or words[-3:-1] == ["experts", "linear_fc2"]:
        number = int(words[-1].removeprefix("weight"))
        if not here.start <= number < here.stop:
            return None
        words[-1] = f"weight{number - here.start}"
    if "local_experts" in words:
        at = words.index("local_experts") + 1
        if not here.start <= int(words[at]) < here.stop:
            return None
        words[at] = str(int(words[at]) - here.start)
    if words[-2:] == ["experts", "weight1"]:  # the memory is that of [E, H, 2, F]
        parts = value.view(8, 32, 2, 24)[here]
        return parts[..., t * 24 // tp : (t + 1) * 24 // tp].reshape(32, -1)
    if words[-2:] == ["experts", "weight2"]:  # [E, F, H]
        return value.view(8, 24, 32)[here, t * 24 // tp : (t + 1) * 24 // tp].reshape(-1, 32)
    if "linear_fc1" in words and "weight" in words[-1] and "norm" not in words[-1]:
        width = value.shape[0] // 2
        rows = [*range(t * width // tp, (t + 1) * width // tp)]
        return value[rows + [width + row for row in rows]]
    if "word_embeddings" in words or words[0] == "output_layer" or words[-2:-1] == ["linear_qkv"]:
        rows = value.shape[0] // tp
        return value if words[-1] == "layer_norm_weight" else value[t * rows : (t + 1) * rows]
    if "linear_proj" in words or "linear_fc2" in words:
        columns = value.shape[1] // tp
        return value[:, t * columns : (t + 1) * columns]
    return value


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
