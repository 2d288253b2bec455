"""Small vision transformers on scikit-learn's digits: dense, TopK, Expert Choice and Soft MoE.

    pip install 'remoe[vision]'
    python examples/vision/digits.py --out runs/vision

An image of 8 x 8 pixels is a sequence of 16 patches. All models have the same blocks, and the last
half of them have experts in place of the MLP, as published for Soft MoE (arXiv 2308.00951). A TopK
layer gives every patch one of 16 experts, an expert of Expert Choice takes one patch of an image,
and an expert of Soft MoE has one slot. In each of them 16 rows pass through an expert's MLP, and
its width is that of the dense MLP: FLOPs are equal but for the routers, which the table shows.

This is plain torch with the layers of `remoe`. Megatron has the encoder of a vision transformer
(`megatron.core.models.vision`) but no classifier, data set or entry point for it.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from remoe import SoftMoELayer, SoftMoELayerConfig
from remoe.layer import routed_experts
from remoe.regularization import switch_loss
from remoe.routing import expert_choice_routing, topk_routing

PATCHES, PIXELS, HIDDEN, WIDTH, HEADS, BLOCKS, EXPERTS = 16, 4, 64, 256, 4, 4, 16
MIXTURES = ("dense", "topk", "expert_choice", "soft")
TITLES = {"dense": "Dense", "topk": "TopK, k = 1", "expert_choice": "Expert Choice",
          "soft": "Soft MoE"}  # fmt: skip
COLORS = {"dense": "#000000", "topk": "#0072b2", "expert_choice": "#009e73", "soft": "#d55e00"}
LEARNING_RATE = 3e-3
BALANCE = 0.01  # weight of the Switch loss, which TopK alone has


class SparseMoE(nn.Module):
    """SwiGLU experts behind a TopK or an Expert Choice router."""

    def __init__(self, mixture: str) -> None:
        super().__init__()
        self.mixture = mixture
        self.router = nn.Parameter(0.02 * torch.randn(EXPERTS, HIDDEN))
        self.gate_up = nn.Parameter(0.02 * torch.randn(EXPERTS, 2 * WIDTH, HIDDEN))
        self.down = nn.Parameter(0.02 * torch.randn(EXPERTS, HIDDEN, WIDTH))
        self.loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x, self.router)
        if self.mixture == "topk":
            probs, routing_map = topk_routing(logits.flatten(end_dim=1), topk=1)
            self.loss = switch_loss(logits.flatten(end_dim=1), routing_map)
        else:
            chosen = expert_choice_routing(logits, tokens_per_expert=PATCHES // EXPERTS)
            probs, routing_map = (one.flatten(end_dim=1) for one in chosen)
        tokens = x.flatten(end_dim=1)
        return routed_experts(tokens, probs, routing_map, self.gate_up, self.down).view_as(x)


class DenseMLP(nn.Module):
    """The MLP that the experts are copies of."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(0.02 * torch.randn(2 * WIDTH, HIDDEN))
        self.down = nn.Parameter(0.02 * torch.randn(HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down)


def mlp(mixture: str) -> nn.Module:
    """Return what stands in the place of a block's MLP."""
    if mixture == "soft":
        return SoftMoELayer(SoftMoELayerConfig(HIDDEN, WIDTH, EXPERTS))
    return DenseMLP() if mixture == "dense" else SparseMoE(mixture)


class Block(nn.Module):
    """Attention over all patches, and an MLP or experts, each behind a norm."""

    def __init__(self, mixture: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(HIDDEN) for _ in range(2)])
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, bias=False, batch_first=True)
        self.mlp = mlp(mixture)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class VisionTransformer(nn.Module):
    """Patches to the logits of 10 digits, by way of the mean of all patches."""

    def __init__(self, mixture: str) -> None:
        super().__init__()
        self.patches = nn.Linear(PIXELS, HIDDEN)
        self.positions = nn.Parameter(0.02 * torch.randn(PATCHES, HIDDEN))
        kinds = ["dense"] * (BLOCKS // 2) + [mixture] * (BLOCKS - BLOCKS // 2)
        self.blocks = nn.Sequential(*[Block(kind) for kind in kinds])
        self.norm = nn.RMSNorm(HIDDEN)
        self.classifier = nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.blocks(self.patches(x) + self.positions)).mean(dim=1))

    def balancing_loss(self) -> Tensor | float:
        layers = [block.mlp for block in self.blocks if isinstance(block.mlp, SparseMoE)]
        return sum(layer.loss for layer in layers if layer.loss is not None)


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return patches `[n, 16, 4]` and labels to train on, and those of a fifth to test on."""
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32) / 8 - 1
    patches = images.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, PATCHES, PIXELS)
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order.split([len(order) // 5, len(order) - len(order) // 5])
    return patches[train], labels[train], patches[test], labels[test]


def train(mixture: str, seed: int, epochs: int) -> list[float]:
    """Train one model, and return its accuracy on the test images after every epoch."""
    torch.set_num_threads(1)  # the products are too small to share
    x, labels, x_test, labels_test = digits(seed)
    torch.manual_seed(seed)
    model = VisionTransformer(mixture)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    batches = len(x) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * batches
    )
    accuracies = []
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(x))[: batches * 64].view(batches, 64):
            loss = F.cross_entropy(model(x[rows]), labels[rows])
            loss = loss + BALANCE * model.balancing_loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            right = model(x_test).argmax(dim=1) == labels_test
        accuracies.append(100 * right.float().mean().item())
    return accuracies


def size(mixture: str) -> tuple[int, float]:
    """Return the parameters of a model, and the millions of FLOPs of an image."""
    model = VisionTransformer(mixture).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.zeros(1, PATCHES, PIXELS))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 1e6


def interval(values: list[float]) -> str:
    """Return mean and half the width of its 95% interval by Student's t."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.2f} ± {half:.2f}"


def table(curves: dict[str, list[list[float]]]) -> str:
    """Return the Markdown table of the last accuracies, and of their differences to the dense."""
    lines = ["| model | parameters | MFLOPs / image | accuracy, % | minus dense, % |",
             "|---|---|---|---|---|"]  # fmt: skip
    last = {mixture: [curve[-1] for curve in runs] for mixture, runs in curves.items()}
    for mixture, values in last.items():
        params, flops = size(mixture)
        differences = [a - b for a, b in zip(values, last["dense"], strict=True)]
        minus = "" if mixture == "dense" else interval(differences)
        lines.append(
            f"| {TITLES[mixture]} | {params:,} | {flops:.2f} | {interval(values)} | {minus} |"
        )
    return "\n".join(lines) + "\n"


def plot(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Draw the mean accuracy of every model over the epochs, and the range of its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4))
    for mixture, runs in curves.items():
        epochs, columns = range(1, len(runs[0]) + 1), list(zip(*runs, strict=True))
        look = {"color": COLORS[mixture]}
        axis.plot(epochs, [statistics.fmean(c) for c in columns], label=TITLES[mixture], **look)
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axis.fill_between(epochs, low, high, alpha=0.12, linewidth=0, **look)
    axis.set(xlabel="epoch", ylabel="accuracy on test images, %", ylim=(80, 100))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    """Train all models, and write their table, plot and accuracies."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/vision"), help="The folder for table and plot.")
    add("--seeds", type=int, default=5, help="The number of seeds of every model.")
    add("--epochs", type=int, default=20, help="The number of passes over the images.")
    add("--jobs", type=int, default=2, help="The number of models that are trained at once.")
    args = parser.parse_args()
    for name in ("seeds", "epochs", "jobs"):
        if getattr(args, name) < 1:
            print(f"error: {name} is {getattr(args, name)}; choose at least 1", file=sys.stderr)
            return 2
    args.out.mkdir(parents=True, exist_ok=True)
    runs = [(mixture, seed) for seed in range(1, args.seeds + 1) for mixture in MIXTURES]
    curves: dict[str, list[list[float]]] = {mixture: [] for mixture in MIXTURES}
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        found = pool.map(partial(train, epochs=args.epochs), *zip(*runs, strict=True))
        for (mixture, seed), curve in zip(runs, found, strict=True):
            curves[mixture].append(curve)
            print(f"seed {seed}, {TITLES[mixture]}: {curve[-1]:.2f}%", flush=True)
    (args.out / "accuracies.json").write_text(json.dumps(curves) + "\n")
    (args.out / "table.md").write_text(table(curves))
    plot(curves, args.out / "accuracy.png")
    print(table(curves))
    return 0


if __name__ == "__main__":
    sys.exit(main())
