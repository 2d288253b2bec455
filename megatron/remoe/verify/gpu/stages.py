"""The table of stages of `remoe verify gpu`, in order of worth, and their two sizes."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron.remoe.verify.gpu import readings
from megatron.remoe.verify.gpu.report import Found

_TOKENS = "data/quickstart/tokens"
_DOMAINS = ("cpp", "markup", "prose", "python")
# Nothing is evaluated or saved where speed and memory are measured.
_UNSAVED = "eval_iters=0 save=null load=null"
_MOCK = "mock_data=true data_path=null tokenizer_type=NullTokenizer tokenizer_model=null"
_WHOLE, _RESUMED = "runs/whole", "runs/resumed"


@dataclass(frozen=True)
class Sizes:
    """How large the stages are.

    Attributes:
        device: Where published trajectories are replayed: cuda or cpu.
        trajectories: Their files.
        precision: Options of the program that compares precisions.
        corpus, tokenizer: Options of `remoe data`.
        quickstart: Settings of the quickstart.
        experts: Numbers of experts of the benchmarks.
        layer, router, memory: Options of `remoe bench`.
        preset: Settings of all 182M runs.
        others: The presets that are timed beside ReMoE's.
        relu_steps, topk_steps: Steps of the timed runs with a ReLU router, and of the others.
        timed_steps: Steps at the end of these that count.
        settles: Whether `relu_steps` are enough for sparsity to settle.
        small: More settings of the runs that are saved and resumed.
        text_steps: Steps of the last run.
    """

    device: str
    trajectories: tuple[str, ...]
    precision: str
    corpus: str
    tokenizer: str
    quickstart: str
    experts: tuple[int, ...]
    layer: str
    router: str
    memory: str
    preset: str
    others: tuple[str, ...]
    relu_steps: int
    topk_steps: int
    timed_steps: int
    settles: bool
    small: str
    text_steps: int


_TINY = (
    "num_layers=2 hidden_size=32 num_attention_heads=4 ffn_hidden_size=64 seq_length=32 "
    "max_position_embeddings=32 micro_batch_size=2 global_batch_size=4"
)
ON_GPU = Sizes(
    device="cuda",
    trajectories=("upstream_remoe_e8k1.json", "upstream_remoe_e8k1_closed_loop.json"),
    precision="",
    corpus="--valid-fraction 0.01",
    tokenizer="",
    quickstart="train_iters=200 eval_interval=200",
    experts=(8, 64, 128),
    layer="--tokens 16384 --hidden 768 --ffn 2048 --dtype bf16 --rounds 20",
    router="--tokens 16384 --hidden 768 --dtype bf16 --rounds 30",
    memory="--tokens 4096 --hidden 768 --ffn 2048 --experts 8 --experts 64 --experts 128",
    preset="global_batch_size=32 seed=1",
    others=("moe", "dense"),
    relu_steps=240,
    topk_steps=120,
    timed_steps=100,
    settles=True,
    small="num_layers=2",
    text_steps=4000,
)
REHEARSAL = Sizes(
    device="cpu",
    trajectories=("upstream_remoe_e8k1_closed_loop.json",),
    precision="--toy",
    corpus="--max-mb-per-domain 0.4 --valid-fraction 0.1",
    tokenizer="--vocab-size 512 --workers 1",
    # Its sequences stay long, since the whole validation set is evaluated at the end.
    quickstart="num_layers=2 hidden_size=32 num_attention_heads=4 ffn_hidden_size=64 "
    "num_query_groups=2 padded_vocab_size=512 train_iters=4 eval_interval=4",
    experts=(4,),
    layer="--tokens 64 --hidden 32 --ffn 32 --dtype bf16 --rounds 1",
    router="--tokens 64 --hidden 32 --dtype bf16 --rounds 1",
    memory="--tokens 64 --hidden 32 --ffn 32 --experts 4 --rounds 1",
    preset=f"{_TINY} padded_vocab_size=512 seed=1",
    others=(),
    relu_steps=4,
    topk_steps=4,
    timed_steps=2,
    settles=False,
    small="",
    text_steps=3,
)


@dataclass(frozen=True)
class Stage:
    """A part of the proof.

    Attributes:
        name: The name of the stage.
        commands: Its command lines, which `runner.run_command` runs.
        read: Reads what they have written in the folder of all stages.
        share: The part of the budget that the stage may take.
        missing: Why the stage cannot run here, if it cannot.
        is_open_ended: Whether the stage is to go on until its time is over.
    """

    name: str
    commands: tuple[str, ...]
    read: Callable[[Path], Found]
    share: float
    missing: str = ""
    is_open_ended: bool = False


def stages(sizes: Sizes, golden: Path | None) -> list[Stage]:
    """Return all stages at a size.

    Args:
        sizes: The size.
        golden: The folder `tests/golden` of a checkout, which has the published trajectories.
    """
    program = "python -m megatron.remoe.verify.gpu.precision"
    return [
        Stage("doctor", ("remoe doctor",), readings.doctor, 0.05),
        _golden(sizes, golden),
        Stage("kernels", ("remoe verify kernels",), readings.kernels, 0.1),
        Stage(
            "precision",
            tuple(
                " ".join(
                    f"{program} {part} results/precision_{part}.json {sizes.precision}".split()
                )
                for part in ("layers", "run")
            ),
            readings.precision,
            0.08,
        ),
        Stage("quickstart", _quickstart(sizes), readings.quickstart, 0.2),
        Stage("layers", _benchmark("layer", sizes.layer, sizes), readings.layers, 0.12),
        Stage("routers", _benchmark("router", sizes.router, sizes), readings.routers, 0.08),
        Stage("memory", _memory(sizes), readings.memory, 0.12),
        Stage(
            "182M preset",
            tuple(
                _preset(name, f"{_MOCK} {_UNSAVED} train_iters={steps}", f"182m_{name}", sizes)
                for name, steps in (
                    ("remoe", sizes.relu_steps),
                    *((other, sizes.topk_steps) for other in sizes.others),
                )
            ),
            partial(readings.preset, steps=sizes.timed_steps, settles=sizes.settles),
            0.25,
        ),
        Stage("resume", _resume(sizes), readings.resume, 0.1),
        Stage(
            "export and generate",
            (
                "remoe convert to-hf runs/quickstart model",
                "remoe convert verify runs/quickstart model",
                "remoe generate model 'def main(' --max-new-tokens 32",
            ),
            readings.export,
            0.08,
        ),
        Stage(
            "182M run on text",
            (_on_text(sizes),),
            readings.longest,
            1.0,
            is_open_ended=True,
        ),
    ]


def _golden(sizes: Sizes, folder: Path | None) -> Stage:
    """Replay published trajectories, by the program of the checkout that has them."""
    commands: tuple[str, ...] = ()
    missing = "the package has no trajectories; pass --golden with tests/golden of a checkout"
    if folder is not None:
        folder, missing = folder.resolve(), ""
        root = shlex.quote(str(folder.parents[1]))
        commands = tuple(
            f"PYTHONPATH={root} python -m tests.golden.replay {shlex.quote(str(folder / file))} "
            f"--device {sizes.device}"
            for file in sizes.trajectories
        )
    return Stage("golden replays", commands, readings.golden, 0.08, missing)


def _quickstart(sizes: Sizes) -> tuple[str, ...]:
    train = (
        f"remoe train examples/quickstart.yaml expert_model_parallel_size=1 log_interval=1 "
        f"{sizes.quickstart} --nproc 1"
    )
    return (
        f"remoe data corpus data/quickstart/corpus {sizes.corpus}",
        f"remoe data tokenize data/quickstart/corpus --out {_TOKENS} {sizes.tokenizer}".strip(),
        f"{train} run_dir=runs/quickstart",
        f"CUDA_VISIBLE_DEVICES= {train} run_dir=runs/on_cpu",
    )


def _benchmark(name: str, options: str, sizes: Sizes) -> tuple[str, ...]:
    return tuple(
        f"remoe bench {name} --experts {experts} {options} --json results/{name}_{experts}.json"
        for experts in sizes.experts
    )


def _memory(sizes: Sizes) -> tuple[str, ...]:
    """Measure one layer; and one micro-batch of the whole model, beside its estimate."""
    train = _preset("remoe", f"{_MOCK} {_UNSAVED} train_iters=3", "memory", sizes)
    describe = train.replace("remoe train", "remoe describe").replace("--nproc", "--gpus-per-node")
    return (
        f"remoe bench memory {sizes.memory} --json results/memory.json",
        describe,
        train,
    )


def _resume(sizes: Sizes) -> tuple[str, ...]:
    """Train a run with a checkpoint at its half, and continue from that one elsewhere."""
    settings = f"{_MOCK} {sizes.small} train_iters=10 eval_iters=0 moe_relu_l1_reg_coeff_init=1e-4"
    settings = " ".join(settings.split())
    goes_on = f"save=null load={_WHOLE}/checkpoints ckpt_step=5"
    return (
        _preset("remoe", f"{settings} save_interval=5", "whole", sizes),
        _preset("remoe", f"{settings} {goes_on}", "resumed", sizes),
    )


def _on_text(sizes: Sizes) -> str:
    """Train the 182M preset on the text of the quickstart."""
    files = ",".join(f"1,{_TOKENS}/train/{domain}" for domain in _DOMAINS)
    text = f"data_root={_TOKENS} 'data_path=[{files}]' split=1,0,0"
    settings = f"{text} {_UNSAVED} train_iters={sizes.text_steps}"
    return _preset("remoe", settings, "182m_text", sizes)


def _preset(name: str, settings: str, run: str, sizes: Sizes) -> str:
    mock = " vocab_size=500" if "mock_data" in settings else ""
    more = f"{sizes.preset} log_interval=1 run_dir=runs/{run}"
    return f"remoe train examples/llama_182m/{name}.yaml {settings}{mock} {more} --nproc 1"
