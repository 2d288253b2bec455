"""Train a small model with ReMoE layers on several processes, wrapped by DDP or by FSDP2.

    torchrun --nproc_per_node 2 examples/own_model_ddp.py
    torchrun --nproc_per_node 2 examples/own_model_ddp.py --fsdp

Two lines are those of ReMoE: `l1_penalty` is added to the loss of each process, and
`update_l1_coeff` adds up the counts of all processes, so that their coefficients stay equal.
"""

import argparse

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from remoe import ReMoELayer, ReMoELayerConfig, l1_penalty, update_l1_coeff

HIDDEN, TOKENS = 64, 128


class Model(nn.Module):
    """Two residual layers of experts."""

    def __init__(self) -> None:
        super().__init__()
        config = ReMoELayerConfig(HIDDEN, 128, num_experts=8, topk=2, l1_coeff_init=1e-5)
        self.layers = nn.ModuleList(ReMoELayer(config) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Return `[T, H]` of `[T, H]`."""
        for layer in self.layers:
            x = x + layer(x)
        return x


def train(steps: int, *, fsdp: bool = False) -> list[tuple[float, float, float]]:
    """Train on this process's tokens; return loss, sparsity and coefficient of every step."""
    torch.manual_seed(0)  # All processes start from the same weights,
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    model: nn.Module = Model().to(device)
    layers = list(model.children())[0]
    words = torch.randn(32, HIDDEN, device=device) + 1
    if fsdp:
        mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(1 + dist.get_rank())  # and see different tokens.
    rows = []
    for _ in range(steps):
        x = words[torch.randint(32, (TOKENS,), device=device)]
        x = x + 0.1 * torch.randn_like(x)
        loss = (model(x) - x.flip(-1)).square().mean()
        (loss + l1_penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsity = update_l1_coeff(model)  # Every process calls it, once per step.
        rows.append((loss.item(), sparsity.mean().item(), layers[0].l1_coeff.item()))
    return rows


def main() -> None:
    """Start the process group, train, and print what the first process sees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="The number of training steps.")
    parser.add_argument("--fsdp", action="store_true", help="Shard the weights with FSDP2.")
    options = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    rows = train(options.steps, fsdp=options.fsdp)
    if dist.get_rank() == 0:
        for step in sorted({1, *range(50, options.steps + 1, 50)}):
            loss, sparsity, coefficient = rows[step - 1]
            print(f"step {step}: loss {loss:.3f}, sparsity {sparsity:.3f}, "
                  f"coefficient {coefficient:.2e}")  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
