"""Replay a run of a published implementation: ReMoE through our Megatron modules, RMoE or Soft MoE.

    python -m tests.golden.replay tests/golden/upstream_remoe_e8k1.json [--device cuda]
    python -m tests.golden.replay tests/golden/upstream_remoe_e8k1.json --host hybrid
    python -m tests.golden.replay tests/golden/rmoe_gru.npz
    python -m tests.golden.replay tests/golden/soft_moe.npz

The kind of run is seen by the file's ending and, in an .npz file, by its arrays. One rank, fp32, on
the CPU or on a GPU. Exits with 1 unless every quantity agrees within its tolerance over the steps
that are comparable, and prints the largest deviation of each. The file's format and the definition
of its runs are those of the published trajectories' README.
"""

import argparse
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

from megatron.remoe.testing.golden import (
    Golden,
    Host,
    fill_with_golden_weights,
    golden_tokens,
    gpt_parameters,
    model_config_of,
    transformer_config,
)
from megatron.remoe.verify.trajectories import deviations
from tests.golden import rmoe, soft

TOLERANCES = {
    "lm_loss": ("relative", 1e-4),
    "l1_reg": ("relative", 1e-3),
    "grad_norm": ("relative", 1e-3),
    "sparsity": ("absolute", 1e-3),
    "l1_coeff_used": ("relative", 1e-5),
}


def build_model(golden: Golden, host: Host = "gpt"):
    """Our model with the golden weights, one rank, fp32.

    Raises:
        ValueError: the golden run's parameters have other names or shapes than ours.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from remoe.config import ReLURouting

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
    routing = ReLURouting(l1_coeff_init=golden.coeff_init)
    transformer = transformer_config(golden.config, host=host)
    model_config = model_config_of(transformer, golden.config, routing, host=host)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = model_config.get_builder_cls()(model_config).build_model(groups)
    shapes = {name: list(p.shape) for name, p in gpt_parameters(model).items()}
    if shapes != golden.params:
        raise ValueError("the model's parameters differ in name or shape from the golden run's")
    fill_with_golden_weights(model, golden.config["seed"])
    return model.to(torch.cuda.current_device()).train()


def replay(golden: Golden, steps: int, host: Host = "gpt") -> list[dict]:
    """Train for `steps` steps and record what the golden file records."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron.remoe.train.step import counting_routers, update_routers

    config, model = golden.config, build_model(golden, host)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=config["lr"],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1 / config["nmb"]))
    device = model.output_layer.weight.device
    positions = torch.arange(config["seq"], device=device).expand(config["mbs"], -1)
    trajectory = []
    for batch in golden_tokens(config)[:steps].to(device):
        losses = []
        for tokens in batch:
            loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
            (loss / config["nmb"]).backward()
            losses.append(loss.item())
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        routers = counting_routers([model])
        report = update_routers(routers, model.config, routers[0].selection)
        trajectory.append(
            {
                "lm_loss": sum(losses) / len(losses),
                "l1_reg": report.l1_reg_L[report.has_router].tolist(),
                "sparsity": report.sparsity.item(),
                "l1_coeff_used": report.l1_coeff.item(),
                "grad_norm": grad_norm.item(),
            }
        )
    return trajectory


def load(path: Path) -> Golden | rmoe.GoldenRMoE | soft.GoldenSoftMoE:
    """Read a recorded run of any kind.

    Raises:
        ValueError, KeyError, OSError: it is not one.
    """
    if path.suffix != ".npz":
        return Golden.load(path)
    with np.load(path) as file:
        names = set(file.files)
    return soft.GoldenSoftMoE.load(path) if "mu" in names else rmoe.GoldenRMoE.load(path)


def init_one_rank(device: str = "cpu") -> None:
    """Make a process group of one rank, once per process."""
    from megatron.remoe import cpu

    if device == "cpu":
        cpu.enable()
    if not torch.distributed.is_initialized():
        backend = "gloo" if device == "cpu" else "nccl"
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a golden trajectory")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--host", choices=("gpt", "hybrid"), default="gpt", help="Megatron's class of models"
    )
    args = parser.parse_args()
    path = args.path
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        print("error: device is cuda, but this machine has no GPU; use cpu", file=sys.stderr)
        return 2
    try:
        golden = load(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        print(f"error: {path} is not a golden trajectory: {error!r}", file=sys.stderr)
        return 2
    if args.host == "hybrid" and not isinstance(golden, Golden):
        print(f"error: host is hybrid, but {path} has no Megatron model; use gpt", file=sys.stderr)
        return 2
    if isinstance(golden, rmoe.GoldenRMoE):
        over, tolerances = f"{len(golden.arrays['tokens'])} comparable steps", rmoe.TOLERANCES
        largest = rmoe.largest_deviations(golden, device=args.device)
    elif isinstance(golden, soft.GoldenSoftMoE):
        over, tolerances = "one forward and backward", soft.TOLERANCES
        largest = soft.largest_deviations(golden, device=args.device)
    else:
        init_one_rank(args.device)
        steps, tolerances = golden.comparable_steps, TOLERANCES
        over = f"{steps} comparable steps"
        largest = deviations(replay(golden, steps, args.host), golden.trajectory[:steps])
    print(f"{path.name}: largest deviation over {over}, {args.device}")
    for key, (kind, tolerance) in tolerances.items():
        verdict = "ok" if largest[key] <= tolerance else "DIFFERS"
        print(f"  {key:14} {largest[key]:9.2e} {kind} (tolerance {tolerance:.0e})  {verdict}")
    return int(not all(largest[key] <= tolerance for key, (_, tolerance) in tolerances.items()))


if __name__ == "__main__":
    sys.exit(main())
