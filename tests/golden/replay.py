"""Replay a trajectory of the published implementation through our Megatron modules.

    python -m tests.golden.replay tests/golden/upstream_remoe_e8k1.json

One rank, fp32, CPU. Exits with 1 unless every quantity agrees within its tolerance over the steps
that are comparable, and prints the largest deviation of each. The file's format and the definition
of its runs are those of the published trajectories' README.
"""

import argparse
import json
import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# The router turns sparse around step 90 of a run that starts at 1e-8; from there on a perturbation
# of 1e-6 grows to percents, so only the steps before it are compared value by value.
OPEN_LOOP_STEPS = 60
PUBLISHED_COEFF_INIT = 1e-8
TOLERANCES = {
    "lm_loss": ("relative", 1e-4),
    "l1_reg": ("relative", 1e-3),
    "grad_norm": ("relative", 1e-3),
    "sparsity": ("absolute", 1e-3),
    "l1_coeff_used": ("relative", 1e-5),
}


@dataclass(frozen=True)
class Golden:
    """A recorded run: its configuration (after granularity where marked) and trajectory."""

    config: dict
    num_experts: int
    topk: int
    params: dict[str, list[int]]
    trajectory: list[dict]

    @classmethod
    def load(cls, path: Path) -> "Golden":
        record = json.loads(path.read_text())
        keys = ("config", "num_experts", "topk", "params", "trajectory")
        return cls(**{key: record[key] for key in keys})

    @property
    def coeff_init(self) -> float:
        return self.config.get("coeff_init", PUBLISHED_COEFF_INIT)

    @property
    def comparable_steps(self) -> int:
        steps = len(self.trajectory)
        open_loop = self.coeff_init == PUBLISHED_COEFF_INIT
        return min(steps, OPEN_LOOP_STEPS) if open_loop else steps


def golden_weight(name: str, shape: list[int], seed: int) -> torch.Tensor:
    """A parameter's initial value, a function of its name."""
    if "norm" in name:
        return torch.ones(shape)
    state = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF)
    return torch.from_numpy((state.standard_normal(shape) * 0.02).astype(np.float32))


def golden_tokens(config: dict) -> torch.Tensor:
    """The run's data, int64 `[steps, nmb, mbs, seq + 1]`."""
    shape = (config["steps"], config["nmb"], config["mbs"], config["seq"] + 1)
    need = int(np.prod(shape))
    r = np.random.RandomState(config["seed"])
    words = [r.randint(0, 256, size=r.randint(3, 8)) for _ in range(64)]
    p = 1 / np.arange(1, 65)
    chosen = r.choice(64, size=need // 3 + 8, p=p / p.sum())
    tokens = np.concatenate([words[i] for i in chosen])[:need]
    return torch.from_numpy(tokens.reshape(shape).astype(np.int64))


def build_model(golden: Golden):
    """Our GPT model with the golden weights, one rank, fp32."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron.remoe.router import ReLURouting
    from megatron.remoe.spec import block_spec

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(0)
    config = golden.config
    transformer = TransformerConfig(
        num_layers=config["L"],
        hidden_size=config["H"],
        ffn_hidden_size=config["F"],
        num_attention_heads=config["heads"],
        num_query_groups=config["groups"],
        num_moe_experts=golden.num_experts,
        moe_router_topk=golden.topk,
        moe_ffn_hidden_size=config["F"] // config["G"],
        moe_router_load_balancing_type="none",
        moe_router_pre_softmax=True,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        transformer_impl="local",
    )
    model = GPTModel(
        config=transformer,
        transformer_layer_spec=block_spec(
            transformer, ReLURouting(l1_reg_coeff_init=golden.coeff_init)
        ),
        vocab_size=256,
        max_sequence_length=config["seq"],
        position_embedding_type="rope",
        rotary_base=1_000_000,
        share_embeddings_and_output_weights=False,
    )
    parameters = dict(model.named_parameters())
    if {k: list(v.shape) for k, v in parameters.items()} != golden.params:
        raise ValueError("the model's parameters differ in name or shape from the golden run's")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(golden_weight(name, golden.params[name], config["seed"]))
    return model.train()


def replay(golden: Golden, steps: int) -> list[dict]:
    """Train for `steps` steps and record what the golden file records."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron.remoe.step import relu_routers, update_routers

    config, model = golden.config, build_model(golden)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=config["lr"],
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1 / config["nmb"]))
    positions = torch.arange(config["seq"]).expand(config["mbs"], -1)
    trajectory = []
    for batch in golden_tokens(config)[:steps]:
        losses = []
        for tokens in batch:
            loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean()
            (loss / config["nmb"]).backward()
            losses.append(loss.item())
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        report = update_routers(relu_routers([model]), config["L"])
        trajectory.append(
            {
                "lm_loss": sum(losses) / len(losses),
                "l1_reg": report.l1_reg_L.tolist(),
                "sparsity": report.sparsity.item(),
                "l1_coeff_used": report.l1_coeff.item(),
                "grad_norm": grad_norm.item(),
            }
        )
    return trajectory


def largest_deviations(ours: list[dict], theirs: list[dict]) -> dict[str, float]:
    """Largest deviation of each quantity, relative or absolute as its tolerance says."""
    deviations = {}
    for key, (kind, _) in TOLERANCES.items():
        a = np.array([step[key] for step in ours])
        b = np.array([step[key] for step in theirs[: len(ours)]])
        difference = np.abs(a - b) / (np.abs(b) if kind == "relative" else 1.0)
        deviations[key] = float(difference.max())
    return deviations


def init_one_rank() -> None:
    """A process group of one rank on the CPU, once per process."""
    from megatron.remoe import cpu

    cpu.enable()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a golden trajectory")
    path = parser.parse_args().path
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the comparison is of fp32 on the CPU
    try:
        golden = Golden.load(path)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {path} is not a golden trajectory: {error!r}", file=sys.stderr)
        return 2
    init_one_rank()
    steps = golden.comparable_steps
    deviations = largest_deviations(replay(golden, steps), golden.trajectory)
    print(f"{path.name}: largest deviation over {steps} comparable steps")
    for key, (kind, tolerance) in TOLERANCES.items():
        verdict = "ok" if deviations[key] <= tolerance else "DIFFERS"
        print(f"  {key:14} {deviations[key]:9.2e} {kind} (tolerance {tolerance:.0e})  {verdict}")
    return int(any(deviations[key] > tolerance for key, (_, tolerance) in TOLERANCES.items()))


if __name__ == "__main__":
    sys.exit(main())
