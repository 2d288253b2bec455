"""`remoe verify gpu`: what its runner, its readings and its report do; and a rehearsal."""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron.remoe.bench.choices import swiglu_name
from megatron.remoe.bench.layer import DENSE, products_name
from megatron.remoe.verify.gpu import precision, readings, runner
from megatron.remoe.verify.gpu.report import Entry, Found, Report
from megatron.remoe.verify.gpu.stages import ON_GPU, REHEARSAL, Stage, stages
from tests.test_help import COMMANDS

GOLDEN = Path(__file__).parents[1] / "golden"


ON_CPU = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def remoe(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "megatron.remoe", "verify", "gpu", *argv]
    return subprocess.run(command, cwd=cwd, env=ON_CPU, capture_output=True, text=True)


# A rehearsal.

# Other tests run the commands of these stages, at as small a size: `test_replay`, `test_triton`,
# `test_bench` and `test_resume`.
WITHOUT = ("golden replays", "kernels", "memory", "resume")
REHEARSE = f"""
from pathlib import Path
from megatron.remoe.verify.gpu import runner
runner.prove(Path("proof").resolve(), 2400, None, rehearse=True, without={WITHOUT})
"""


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify_gpu")
    command = [sys.executable, "-W", "ignore", "-c", REHEARSE]
    done = subprocess.run(command, cwd=folder, env=ON_CPU, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "proof"


@pytest.mark.processes
def test_stages_run_on_a_cpu_at_a_small_size(rehearsed):
    report = json.loads((rehearsed / "report.json").read_text())
    assert "rehearsal" in report["what"]
    names = [s.name for s in stages(ON_GPU, None) if s.name not in WITHOUT]
    assert [stage["name"] for stage in report["stages"]] == names
    for stage in report["stages"]:
        assert stage["status"] == "passed" and stage["headline"], stage
    found = {stage["name"]: stage for stage in report["stages"]}
    quickstart = found["quickstart"]["rows"]
    assert len(quickstart) == 4
    for row in quickstart:  # both curves are those of this CPU, from the same seed
        assert row["loss, GPU"] == row["loss, CPU"] and row["sparsity, GPU"] == row["sparsity, CPU"]
    presets = found["182M preset"]["rows"]
    assert [row["preset"] for row in presets] == ["remoe"]
    assert all(row["tokens/s"] > 0 and row["TFLOP/s"] > 0 for row in presets)
    # Half of the experts are active at the start of ReLU routing.
    assert 0.3 < presets[0]["sparsity"] < 0.7
    assert {row["part"] for row in found["routers"]["rows"]} > {"router", "permutation"}
    assert any("Mixtral" in row["layer"] for row in found["layers"]["rows"])
    runs = {row["case"] for row in found["precision"]["rows"]}
    assert {"run in Megatron, fp32, 6 steps", "run in Megatron, bf16, first step"} < runs
    assert [row["step"] for row in found["182M run on text"]["rows"]] == [1, 2, 3]


@pytest.mark.processes
def test_the_report_tells_a_reader_everything(rehearsed):
    text = (rehearsed / "report.md").read_text()
    for stage in stages(REHEARSAL, GOLDEN):
        if stage.name in WITHOUT:
            assert f"## {stage.name}" not in text
            continue
        assert f"| {stage.name} | passed |" in text and f"\n## {stage.name}\n" in text
        for command in stage.commands:
            assert f"\n{command}\n" in text
    assert list(rehearsed.glob(".partial*")) == []


# What is refused.


@pytest.mark.processes
def test_a_machine_without_a_gpu_is_one_line_and_exit_code_2(tmp_path):
    done = remoe("--budget", "40m", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no GPU" in done.stderr and "--rehearse" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "report.md").write_text("an older one")
    with pytest.raises(ValueError, match="is not empty; delete it"):
        runner.prove(tmp_path, 60, None, rehearse=True)
    assert (tmp_path / "report.md").read_text() == "an older one"


def test_a_folder_without_trajectories_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no upstream_\w+.json; pass tests/golden"):
        runner.prove(tmp_path / "out", 60, tmp_path, rehearse=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("40m", 2400), ("1.5h", 5400)])
def test_budgets(text, seconds):
    assert runner.parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["40", "0m", "-5m", "m", "40 m", "4e1m", "nan"])
def test_what_is_no_budget(text):
    with pytest.raises(ValueError, match="give a time such as 90s, 40m or 1.5h"):
        runner.parse_budget(text)


# The table of stages.


@pytest.mark.parametrize("sizes", [ON_GPU, REHEARSAL], ids=["GPU", "rehearsal"])
def test_every_command_of_every_stage_parses(sizes):
    for line in (line for stage in stages(sizes, GOLDEN) for line in stage.commands):
        words = shlex.split(line)
        while "=" in words[0]:
            words.pop(0)
        if words[0] == "python":
            assert words[1] == "-m" and importlib.util.find_spec(words[2]), line
            continue
        name = next(n for k in (3, 2, 1) if (n := " ".join(words[1 : k + 1])) in COMMANDS)
        context = COMMANDS[name].make_context(name, words[1 + len(name.split()) :])
        assert context.args == [], line


def planned_steps(lines: list[str]) -> list[int]:
    """Let Megatron check runs as on one GPU; their data need not exist."""
    from megatron.remoe.run import examples
    from megatron.remoe.run.config import load_config
    from megatron.remoe.run.plan import Place, plan

    steps = []
    for line in lines:
        config, *overrides = [w for w in shlex.split(line) if "=" in w or w.endswith(".yaml")]
        run = load_config(examples.FOLDER.parent / config, overrides)
        steps.append(plan(run, Place(processes=1, purpose="describe")).args.train_iters)
    return steps


def test_megatron_accepts_the_runs_at_their_full_size(call):
    commands = [line for stage in stages(ON_GPU, None) for line in stage.commands]
    runs = [line.removeprefix("CUDA_VISIBLE_DEVICES= ") for line in commands if " train " in line]
    assert call(planned_steps, runs) == [200, 200, 3, 240, 120, 120, 10, 10, 4000]


def test_without_trajectories_the_replays_are_left_out_with_the_remedy():
    golden = next(s for s in stages(ON_GPU, None) if s.name == "golden replays")
    assert golden.commands == () and "pass --golden" in golden.missing


# The runner.


def nothing(folder: Path) -> Found:
    return Found("nothing to read")


def python(code: str) -> str:
    return f"python -c {shlex.quote(code)}"


@pytest.mark.processes
def test_one_failure_ends_nothing_and_its_last_line_is_told(tmp_path):
    def unreadable(folder: Path) -> Found:
        return Found(folder.joinpath("results/none.json").read_text())

    seen = "import json; print(json.load(open('report.json'))['stages'][0]['status'])"
    table = [
        Stage("bad", (python("print('why'); exit(3)"), python("print('and on')")), nothing, 0.1),
        Stage("good", (python(seen),), nothing, 0.1),
        Stage("unread", (python("print(1)"),), unreadable, 0.1),
        Stage("wrong", (), lambda folder: Found("4", problem="it is not 5"), 0.1),
        Stage("none", (), nothing, 0.1, missing="there is none"),
    ]
    report = runner.run(table, tmp_path / "out", 60, {})
    status = [entry.status for entry in report.entries]
    assert status == ["failed", "passed", "failed", "failed", "left out"]
    assert report.entries[0].reason.endswith("exit code 3: why")
    assert "and on" in (tmp_path / "out/logs/bad.txt").read_text()
    # The report was written before the second stage began.
    assert (tmp_path / "out/logs/good.txt").read_text().endswith("\nfailed\n")
    assert "cannot be read: FileNotFoundError" in report.entries[2].reason
    assert report.entries[3].reason == "it is not 5" and report.entries[3].found.headline == "4"
    assert report.entries[4].reason == "there is none"
    written = json.loads((tmp_path / "out/report.json").read_text())
    assert [stage["status"] for stage in written["stages"]] == status


@pytest.mark.processes
def test_a_stage_that_takes_too_long_is_killed_with_its_children(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LEAST_SECONDS", 0.0)
    child = "import time; time.sleep(1.5); open('results/late', 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    table = [
        Stage("slow", (python(code), python("open('results/next', 'w')")), nothing, 0.01),
        Stage("endless", (python("import time; time.sleep(60)"),), nothing, 0.01,
              is_open_ended=True),
        Stage("late", (python("print(1)"),), nothing, 0.1),
    ]  # fmt: skip
    started = time.monotonic()
    report = runner.run(table[:2], tmp_path / "out", 50, {})
    assert time.monotonic() - started < 50
    slow, endless = report.entries
    assert slow.status == "failed" and "stopped after 0 s" in slow.reason
    assert endless.status == "passed"
    time.sleep(2)
    assert list((tmp_path / "out/results").iterdir()) == []
    spent = runner.run(table[2:], tmp_path / "other", 1e-9, {}).entries[0]
    assert (spent.status, spent.reason) == ("left out", "the budget is spent")


@pytest.mark.processes
def test_commands_get_their_variables_and_see_no_gpu_in_a_rehearsal(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    code = "import os; print(os.environ['A'], os.environ['CUDA_VISIBLE_DEVICES'], os.getcwd())"
    for on_cpu, device in ((False, "3"), (True, "")):
        log = tmp_path / f"{on_cpu}.txt"
        assert runner.run_command(f"A=b {python(code)}", tmp_path, log, 60, on_cpu=on_cpu) == 0
        assert log.read_text().splitlines()[-1] == f"b {device} {tmp_path}"


# The report and the readings.


def test_cells_of_the_report_do_not_break_its_tables(tmp_path):
    found = Found("a|b", rows=[{"x": 1.23456, "y": "p|q"}, {"z": 2}])
    Report(
        tmp_path, {"what": "a test"}, [Entry("one", ["remoe x"], "passed", 3, "", found)]
    ).write()
    text = (tmp_path / "report.md").read_text()
    assert "| one | passed | 3 | a\\|b |" in text
    assert "| x | y | z |" in text and "| 1.235 | p\\|q |  |" in text and "|  |  | 2 |" in text


def write_run(folder: Path, rows: list[dict], **flags) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(flags))
    lines = (json.dumps({"iteration": i} | row) + "\n" for i, row in enumerate(rows, start=1))
    (folder / "metrics.jsonl").write_text("".join(lines))


def write_log(folder: Path, stage: str, text: str) -> None:
    (folder / "logs").mkdir(exist_ok=True)
    (folder / f"logs/{stage.replace(' ', '_')}.txt").write_text(text)


def test_the_device_is_read_and_its_peak_known(tmp_path):
    line = "│ triton │ ok │ 3.6 │\n│ device        │ ok       │ 1 x NVIDIA H100 80GB HBM3      │\n"
    write_log(tmp_path, "doctor", line)
    assert readings.device(tmp_path) == "1 x NVIDIA H100 80GB HBM3"
    assert readings.peak_tflops("1 x NVIDIA H100 80GB HBM3") == 989
    assert readings.peak_tflops("1 x NVIDIA H100 PCIe") == 756
    assert readings.peak_tflops("CPU, 2 threads") is None


SIZES = {
    "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128,
    "seq_length": 32, "padded_vocab_size": 512, "swiglu": True, "num_experts": 8,
    "disable_bias_linear": True,
    "moe_router_topk": 1, "moe_relu_routing": True, "untie_embeddings_and_output_weights": True,
}  # fmt: skip


def test_speed_and_mfu_are_those_of_the_last_steps(tmp_path):
    from megatron.remoe.analysis.size import ModelSize

    write_log(tmp_path, "doctor", "device │ ok │ 1 x NVIDIA A100-SXM4-80GB │")
    step = {"lm_loss": 5.0, "l1_coeff": 0.1, "peak_memory": 2e9}
    early = [step | {"sparsity": 0.5, "tokens_per_second": 10.0}] * 3
    late = [step | {"sparsity": 0.87, "tokens_per_second": v} for v in (1e6, 3e6)]
    write_run(tmp_path / "runs/182m_remoe", early + late, **SIZES)
    found = readings.preset(tmp_path, steps=2, settles=True)
    (row,) = found.rows
    assert row["tokens/s"] == 1_500_000  # as many tokens at each speed
    flops = ModelSize.from_flags(SIZES).flops_per_sequence / 32
    assert row["TFLOP/s"] == pytest.approx(flops * 1.5e6 / 1e12)
    assert row["MFU"] == f"{flops * 1.5e6 / 312e12:.1%}" and row["peak, GB"] == 2
    assert found.problem == ""
    assert "too short" in readings.preset(tmp_path, steps=5, settles=True).problem
    assert readings.preset(tmp_path, steps=5, settles=False).problem == ""


def test_layers_are_compared_with_others_and_kernels_with_torch(tmp_path):
    ratios = {DENSE: 1.0, "ReMoE, E=8": 3.0, products_name(8): 0.9, "TopK, eager": 4.0, "TopK": 3.5}
    timed = {swiglu_name("torch"): 0.8, swiglu_name("triton"): 0.2}
    (tmp_path / "results").mkdir()
    for experts, found in ((8, ratios | timed), (64, ratios)):
        rows = [{"name": n, "ratio": ratio, "milliseconds": ratio} for n, ratio in found.items()]
        (tmp_path / f"results/layer_{experts}.json").write_text(json.dumps({"rows": rows}))
    found = readings.layers(tmp_path)
    line = "ReMoE 3.00 of dense, TopK 3.50"
    assert found.headline == f"E=8: {line}, SwiGLU in Triton 0.25 of torch; E=64: {line}"
    assert len(found.rows) == 12


def test_curves_that_differ_are_a_problem(tmp_path):
    def run(folder, losses):
        rows = [{"lm_loss": v, "sparsity": 0.5, "tokens_per_second": 9.0} for v in losses]
        write_run(folder / "runs/quickstart", rows)
        write_run(folder / "runs/on_cpu", [row | {"lm_loss": 6.0} for row in rows[:30]])
        return readings.quickstart(folder)

    same = run(tmp_path / "same", [6.1] * 30)
    assert same.problem == "" and len(same.rows) == 10 and same.rows[-1]["step"] == 30
    assert "more than 0.2 nats" in run(tmp_path / "other", [6.3] * 30).problem
    assert "did not reach its end" in run(tmp_path / "short", [6.0] * 31).problem


def test_a_run_that_did_not_continue_is_a_problem(tmp_path):
    write_run(tmp_path / "runs/whole", [{"lm_loss": 6.0 - i / 10} for i in range(4)])
    write_run(tmp_path / "runs/resumed", [{"lm_loss": 6.0 - i / 10} for i in range(4)])
    assert readings.resume(tmp_path).problem == "the run began anew"
    path = tmp_path / "runs/resumed/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[2:]))
    assert readings.resume(tmp_path).problem == ""
    path.write_text(lines[2])
    assert "did not reach its end" in readings.resume(tmp_path).problem
    path.write_text(lines[2] + lines[3].replace("5.7", "5.5"))
    assert "a loss differs by 3.5e-02" in readings.resume(tmp_path).problem


def test_a_wrong_product_in_bf16_is_caught(monkeypatch):
    case = precision.TOYS[0]
    rows = precision.compare(case, "cpu")
    assert {"output", "regularizer", "grad tokens", "grad router", "grad gate_up", "grad down"} < {
        row["quantity"] for row in rows
    }
    assert all(row["verdict"] == "ok" for row in rows)
    quantities = precision._quantities

    def wrong(case, device, dtype):
        if dtype.itemsize == 2:
            case = replace(case, topk=2)
        return quantities(case, device, dtype)

    monkeypatch.setattr(precision, "_quantities", wrong)
    verdicts = {row["quantity"]: row["verdict"] for row in precision.compare(case, "cpu")}
    assert verdicts["output"] == verdicts["tokens of experts"] == "DIFFERS"
    assert precision.row("", "", float("nan"), 1.0)["verdict"] == "DIFFERS"
