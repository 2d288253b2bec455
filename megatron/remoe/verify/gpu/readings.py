"""What is read out of the results of the stages of `remoe verify gpu`."""

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron.remoe.analysis.gpus import PEAK_TFLOPS
from megatron.remoe.analysis.runs import Run
from megatron.remoe.analysis.size import ModelSize
from megatron.remoe.verify.gpu.report import Found, Row

# Mean of the last losses of two runs of the quickstart that differ in their random numbers, in
# nats. Over three seeds on a CPU the deviation is 0.06, and that of a difference is 0.08.
LOSS_TOLERANCE = 0.2
LAST_STEPS = 20
# Relative difference of losses between a run and its continuation. On a CPU it is zero. On a GPU
# the backward of attention adds up in no fixed order, which bf16 rounds differently.
RESUME_TOLERANCE = 1e-2
SPARSITY_TOLERANCE = 0.05
_SWIGLU = ("SwiGLU and weighting, torch", "SwiGLU and weighting, triton")  # of `remoe bench layer`
_REPLAYED = re.compile(r"^ {2}(\w+) +(\S+) (relative|absolute) \(tolerance (\S+)\) +(\w+)$", re.M)


def doctor(folder: Path) -> Found:
    """Show what `remoe doctor` found."""
    return Found(device(folder), text=_log(folder, "doctor"))


def device(folder: Path) -> str:
    """Return the name of the device as `remoe doctor` prints it."""
    named = re.search(r"device\W+ok\W+(.+)", _log(folder, "doctor"))
    return named[1].strip(" │|") if named else "unknown device"


def peak_tflops(name: str) -> float | None:
    """Return the peak of a GPU in dense bf16 products, or None if it is not in the table."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def golden(folder: Path) -> Found:
    """Read the deviations from the published trajectories."""
    rows: list[Row] = []
    for part in _log(folder, "golden replays").split("$ ")[1:]:
        file = re.search(r"(\S+): largest deviation", part)
        for quantity, deviation, kind, tolerance, verdict in _REPLAYED.findall(part):
            rows.append({
                "trajectory": file[1] if file else "", "quantity": quantity,
                "deviation": float(deviation), "": kind, "tolerance": float(tolerance),
                "verdict": verdict,
            })  # fmt: skip
    if not rows:
        raise ValueError("no quantity was replayed")
    return Found(_count(rows, "quantities agree"), rows)


def kernels(folder: Path) -> Found:
    """Read the verdicts of `remoe verify kernels`; those that are not ok are shown."""
    log = _log(folder, "kernels").splitlines()
    wrong = [line for line in log if line.startswith("FAILED")]
    return Found(log[-1], text="\n".join(wrong))


def precision(folder: Path) -> Found:
    """Read the deviations of bf16 from fp32, and of fp32 from plain torch."""
    rows = [row for part in ("layers", "run") for row in _json(folder, f"precision_{part}")]
    if not rows:
        raise ValueError("nothing was compared")
    return Found(_count(rows, "quantities agree"), rows)


def _count(rows: list[Row], claim: str) -> str:
    good = sum(row["verdict"] == "ok" for row in rows)
    return f"{good} of {len(rows)} {claim}"


def quickstart(folder: Path) -> Found:
    """Put the curves of the GPU and of the CPU side by side."""
    runs = {"GPU": Run.load(folder / "runs/quickstart"), "CPU": Run.load(folder / "runs/on_cpu")}
    rows = []
    for pair in _some(list(zip(runs["GPU"].train, runs["CPU"].train, strict=False))):
        row: Row = {"step": pair[0]["iteration"]}
        for name, step in zip(runs, pair, strict=True):
            row |= {f"loss, {name}": step["lm_loss"], f"sparsity, {name}": step["sparsity"]}
        rows.append(row)
    last = {name: fmean(run.series("lm_loss")[-LAST_STEPS:]) for name, run in runs.items()}
    speed = {name: _speed(run.train) for name, run in runs.items()}
    steps = {name: run.train[-1]["iteration"] for name, run in runs.items()}
    headline = "; ".join(
        f"{name}: {steps[name]} steps, last loss {last[name]:.3f}, {speed[name]:.0f} tokens/s"
        for name in runs
    )
    problem = ""
    if abs(last["GPU"] - last["CPU"]) > LOSS_TOLERANCE:
        problem = f"the last losses differ by more than {LOSS_TOLERANCE} nats"
    if steps["GPU"] != steps["CPU"]:
        problem = "one of the runs did not reach its end"
    return Found(headline, rows, problem)


def layers(folder: Path) -> Found:
    """Read the times of one layer by number of experts."""
    rows: list[Row] = []
    best = []
    for experts, record in _benchmarks(folder, "layer"):
        times = {row["name"]: row["ratio"] for row in record["rows"]}
        rows += [
            {"E": experts, "layer": row["name"], "ms": row["milliseconds"], "time / dense": ratio}
            for row, ratio in zip(record["rows"], times.values(), strict=True)
        ]
        ours = min(ratio for name, ratio in times.items() if name.startswith("ReMoE"))
        others = {n: r for n, r in times.items() if n.startswith("TopK")}
        fastest = min(others, key=lambda name: others[name])
        best.append(f"E={experts}: ReMoE {ours:.2f} of dense, {fastest} {others[fastest]:.2f}")
        swiglu = [times[name] for name in _SWIGLU if name in times]
        if swiglu:  # where Triton runs
            best[-1] += f", SwiGLU in Triton {swiglu[1] / swiglu[0]:.2f} of torch"
    return Found("; ".join(best), rows)


def routers(folder: Path) -> Found:
    """Read the times of the parts around the experts by number of experts."""
    rows: list[Row] = []
    sums = []
    for experts, record in _benchmarks(folder, "router"):
        for row in record["rows"]:
            rows.append({"E": experts, "part": row["name"], "ms": row["milliseconds"],
                         "time / copy": row["ratio"]} | row["facts"])  # fmt: skip
        parts = sum(row["milliseconds"] for row in record["rows"][1:])
        sums.append(f"E={experts}: {parts:.3f} ms, copy {record['rows'][0]['milliseconds']:.3f}")
    return Found("; ".join(sums), rows)


def _benchmarks(folder: Path, name: str) -> list[tuple[int, Any]]:
    """Return the numbers of experts and the results of a benchmark that is there for some."""
    paths = (folder / "results").glob(f"{name}_*.json")
    found = sorted((int(path.stem.rpartition("_")[2]), path) for path in paths)
    if not found:
        raise ValueError(f"no benchmark of a {name} has a result")
    return [(experts, json.loads(path.read_text())) for experts, path in found]


def memory(folder: Path) -> Found:
    """Compare peaks of a layer and of the 182M model in the warm-up with their estimates."""
    rows: list[Row] = [
        {"what": f"layer, E={row['experts']}, {row['routing']}",
         "measured, GB": row["peak_mb"] / 1e3, "estimate, GB": row["estimate_mb"] / 1e3}
        for row in _json(folder, "memory")["rows"]
    ]  # fmt: skip
    told = re.search(r"memory per GPU, dense warm-up\W+([\d.]+) GB", _log(folder, "memory"))
    if told is None:
        raise ValueError("remoe describe has printed no estimate")
    peak = max(row["peak_memory"] for row in Run.load(folder / "runs/memory").train) / 1e9
    rows.append({"what": "182M model", "measured, GB": peak, "estimate, GB": float(told[1])})
    for row in rows:
        row["measured / estimate"] = row["measured, GB"] / max(row["estimate, GB"], 1e-9)
    return Found(f"182M model in its dense warm-up: {peak:.1f} GB, estimate {told[1]} GB", rows)


def preset(folder: Path, *, steps: int, settles: bool) -> Found:
    """Read the speed of the last steps of the 182M presets.

    Args:
        folder: The folder of all stages.
        steps: The number of last steps that count.
        settles: Whether the run is so long that sparsity must be near its target in these.
    """
    peak = peak_tflops(device(folder))
    rows: list[Row] = []
    problem = ""
    for name in ("remoe", "moe", "dense"):
        if not (folder / f"runs/182m_{name}/metrics.jsonl").exists():
            continue
        run = Run.load(folder / f"runs/182m_{name}")
        last, size = run.train[-steps:], ModelSize.from_flags(run.config)
        speed = _speed(last)
        tflops = speed * size.flops_per_sequence / size.seq_length / 1e12
        row: Row = {"preset": name, "steps": len(run.train), "tokens/s": round(speed),
                    "TFLOP/s": tflops,
                    "MFU": f"{tflops / peak:.1%}" if peak else "unknown peak",
                    "peak, GB": max(step["peak_memory"] for step in run.train) / 1e9,
                    "loss": fmean([step["lm_loss"] for step in last])}  # fmt: skip
        if "l1_coeff" in last[0]:
            row["sparsity"] = sparsity = fmean([step["sparsity"] for step in last])
            if settles and abs(sparsity - run.target_sparsity) > SPARSITY_TOLERANCE:
                problem = f"the sparsity {sparsity:.3f} is not at its target; the run was too short"
        rows.append(row)
    speeds = ", ".join(f"{row['preset']} {row['tokens/s']:,} ({row['MFU']})" for row in rows)
    if not rows:
        raise ValueError("no preset has trained a step")
    return Found(f"tokens/s (MFU): {speeds}", rows, problem)


def resume(folder: Path) -> Found:
    """Compare the second half of a run with its continuation from a checkpoint."""
    whole, resumed = Run.load(folder / "runs/whole"), Run.load(folder / "runs/resumed")
    expected = {row["iteration"]: row for row in whole.train}
    rows, largest = [], 0.0
    for row in resumed.train:
        here, there = row["lm_loss"], expected[row["iteration"]]["lm_loss"]
        largest = max(largest, abs(here - there) / there)
        rows.append({"step": row["iteration"], "loss": f"{there:.6f}", "resumed": f"{here:.6f}"})
    problem = "" if largest <= RESUME_TOLERANCE else f"a loss differs by {largest:.1e}"
    if resumed.train[0]["iteration"] == 1:
        problem = "the run began anew"
    if resumed.train[-1]["iteration"] != whole.train[-1]["iteration"]:
        problem = "the continued run did not reach its end"
    same = "bit for bit" if largest == 0 else f"largest relative difference {largest:.1e}"
    return Found(f"{len(rows)} steps after a checkpoint: {same}", _some(rows), problem)


def export(folder: Path) -> Found:
    """Show the comparison of the exported model, and the text that it generates."""
    log = _log(folder, "export and generate").splitlines()
    compared = [line for line in log if line.startswith(("tensors:", "logits", "active experts:"))]
    if not compared:
        raise ValueError("no model was compared")
    begin = max(i for i, line in enumerate(log) if line.startswith("$ "))
    return Found("; ".join(compared), text="\n".join(log[begin + 1 :]))


def longest(folder: Path) -> Found:
    """Read the curve of the run that took the rest of the budget."""
    train = Run.load(folder / "runs/182m_text").train
    rows = [
        {"step": row["iteration"], "tokens": row["tokens"], "loss": row["lm_loss"],
         "sparsity": row["sparsity"], "tokens/s": row["tokens_per_second"]}
        for row in _some(train)
    ]  # fmt: skip
    last = train[-1]
    headline = (
        f"{last['iteration']} steps, {last['tokens'] / 1e6:.1f}M tokens: loss "
        f"{fmean([row['lm_loss'] for row in train[-LAST_STEPS:]]):.3f}, sparsity "
        f"{last['sparsity']:.3f}"
    )
    return Found(headline, rows)


def _speed(train: list[Row]) -> float:
    """Return tokens per second over some rows, without a first step of a run."""
    rows = [row for row in train if row["iteration"] > 1] or train
    return len(rows) / sum(1 / float(row["tokens_per_second"]) for row in rows)


def _some[T](items: list[T], count: int = 10) -> list[T]:
    """Return the first and the last item and some between, evenly."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _json(folder: Path, name: str) -> Any:
    return json.loads((folder / "results" / f"{name}.json").read_text())


def _log(folder: Path, stage: str) -> str:
    return (folder / "logs" / f"{stage.replace(' ', '_')}.txt").read_text(errors="replace")
