"""`remoe evaluate` runs the real harness on a local task, and perplexity as Megatron validates."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mcore import tiny
from tests.mcore.test_convert import fails
from tests.mcore.test_train import DATA

SEED = 7


@pytest.fixture(scope="module")
def home(call, tmp_path_factory) -> Path:
    """Make a tokenized corpus, a run that validates on it at its end, its export and a task."""
    home = tmp_path_factory.mktemp("evaluate")
    tiny.write_corpus(home / "corpus")
    flags = ["--out", "tokens", "--vocab-size", "300", "--workers", "1"]
    cloze = [
        "corpus",
        "tasks",
        "--items",
        "12",
        "--context-words",
        "8",
        "--continuation-words",
        "3",
    ]
    for argv in (["tokenize", "corpus", *flags], ["cloze", *cloze]):
        code, out, error = call(tiny.remoe, home, "data", *argv)
        assert code == 0, out + error
    steps = {"train_iters": 4, "eval_interval": 4, "lr": 1e-2, "seed": SEED}
    manifest = json.loads((home / "tokens/manifest.json").read_text())
    steps |= {"padded_vocab_size": manifest["settings"]["vocab_size"]}  # an export has no padding
    tiny.write_config(home / "run.yaml", **(DATA | steps))
    for argv in (["train", "run.yaml"], ["convert", "to-hf", "runs/run", "hf"]):
        code, out, error = call(tiny.remoe, home, *argv)
        assert code == 0, out + error
    return home


def test_perplexity_is_the_validation_loss_of_the_run(call, home):
    """The losses agree by domain and overall, for the run and for its export with the seed."""
    code, _, error = call(tiny.remoe, home, "evaluate", "runs/run", "--perplexity", "tokens/valid")
    assert code == 0, error
    argv = [
        "evaluate",
        "hf",
        "--perplexity",
        "tokens/valid",
        "--seed",
        str(SEED),
        "--out",
        "hf.json",
    ]
    code, out, error = call(tiny.remoe, home, *argv)
    assert code == 0, error
    assert "code " in out and "prose " in out
    expected = {r["split"]: r["lm_loss"] for r in tiny.rows(home / "runs/run") if "split" in r}
    for file in (home / "runs/run/evaluation.json", home / "hf.json"):
        found = json.loads(file.read_text())["perplexity"]
        assert found.keys() == {"code", "prose", "all"}
        for name, loss in found.items():
            split = "valid" if name == "all" else f"valid/{name}"
            assert loss["loss"] == pytest.approx(expected[split], abs=1e-5)
        assert found["code"]["tokens"] < found["prose"]["tokens"]


def test_the_harness_gives_its_own_number_on_the_export(call, home):
    """The run, converted on the fly, scores as the harness's own command on the exported folder."""
    argv = ["evaluate", "runs/run", "--tasks", "corpus_cloze", "--include-path", "tasks"]
    code, out, error = call(tiny.remoe, home, *argv, "--out", "run.json")
    assert code == 0, error
    assert "corpus_cloze_code" in out and "published" not in out
    ours = json.loads((home / "run.json").read_text())["tasks"]
    assert ours.keys() == {"corpus_cloze", "corpus_cloze_code", "corpus_cloze_prose"}

    model = "pretrained=hf,trust_remote_code=True,dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model]
    command += ["--tasks", "corpus_cloze", "--include_path", "tasks", "--device", "cpu"]
    command += ["--batch_size", "8", "--output_path", "own"]
    environment = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(home / "hub")}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    own = json.loads(next((home / "own").rglob("results*.json")).read_text())["results"]
    for task, metrics in ours.items():
        for name in ("acc", "acc_norm"):
            assert metrics[name] == own[task][f"{name},none"]
    assert 0 <= ours["corpus_cloze"]["acc"] <= 1


def test_items_are_passages_and_wrong_ones_are_of_other_documents(home):
    texts = {}
    for domain in ("code", "prose"):
        lines = (home / f"corpus/valid/{domain}.jsonl").read_text().splitlines()
        texts[domain] = [json.loads(line)["text"] for line in lines]
        rows = (home / f"tasks/corpus_cloze_{domain}.jsonl").read_text().splitlines()
        assert len(rows) == 12
        labels = set()
        for row in map(json.loads, rows):
            labels.add(row["label"])
            whole = row["context"] + row["choices"][row["label"]]
            assert sum(whole in text for text in texts[domain]) == 1
            assert [len(choice.split()) for choice in row["choices"]] == [3] * 4
            for choice in row["choices"]:
                assert any(choice in text for text in texts[domain])
        assert len(labels) > 1


MISTAKES = {
    "nothing asked": ([], "nothing to evaluate; give --tasks, --perplexity, or both"),
    "no token files": (["--perplexity", "corpus"], "corpus holds no .bin/.idx files"),
    "long sequences": (
        ["--perplexity", "tokens/valid", "--sequence-length", "90000"],
        "so no sequence of 90000; use shorter sequences",
    ),
    "no folder of tasks": (["--tasks", "x", "--include-path", "no"], "no is no folder of tasks"),
}


@pytest.mark.parametrize(("argv", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(call, home, argv, message):
    assert message in fails(call, home, "evaluate", "hf", *argv)


# Two commands in one process: starting the harness takes ten seconds.
EVALUATE = """
import sys
from megatron.remoe.cli import main
for task in sys.argv[1:]:
    try:
        main(["evaluate", "hf", "--tasks", task])
    except SystemExit as end:
        print(f"exit code {end.code}", file=sys.stderr)
"""


def test_an_unknown_task_and_absent_data_are_told_from_each_other(home):
    """Two commands of the harness, offline and with an empty cache."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(home / "empty")}
    messages = {
        "arc_eazy": "unknown task 'arc_eazy'; did you mean 'arc_easy'?",
        "arc_easy": "the data of task 'arc_easy' is not here and cannot be downloaded",
    }
    command = [sys.executable, "-c", EVALUATE, *messages]
    environment = dict(os.environ) | offline
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second, end = done.stderr.split("exit code 2\n")
    assert end == ""
    for said, message in zip((first, second), messages.values(), strict=True):
        assert [line for line in said.splitlines() if line.startswith("error: ")]
        assert message in said


def test_published_rows_stand_beside_the_papers_tasks():
    from megatron.remoe.evaluate.published import ROWS, TASKS, table

    text = table("mine", {task: {"acc": 0.5, "acc_norm": 0.9} for task in TASKS})
    assert "| mine | 50.00 | 50.00 | 50.00 | 50.00 | 50.00 | 50.00 | 50.00 | 50.00 |" in text
    assert "| published: ReMoE 182M | 20.22 | 46.68 |" in text and "| 40.03 |" in text
    assert all(len(row) == len(TASKS) for row in ROWS.values())
    averages = {"dense 182M": 38.20, "TopK 469M*": 43.69, "ReMoE 978M": 45.20}  # as published
    for row, average in averages.items():
        assert sum(ROWS[row]) / len(TASKS) == pytest.approx(average, abs=0.011)


def test_a_budget_is_calibrated_on_named_text_and_said(call, home):
    """By default on the validation files of the run or a sample, and never on a prompt."""
    request = ["--perplexity", "tokens/valid", "--seed", str(SEED), "--out"]
    code, _, error = call(tiny.remoe, home, "evaluate", "hf", *request, "plain.json")
    assert code == 0, error
    half = ["--active-experts", "0.5"]
    code, out, error = call(tiny.remoe, home, "evaluate", "runs/run", *request, "half.json", *half)
    assert code == 0, error
    assert re.search(
        r"budget: a gate threshold of 0\.\d+ leaves 0\.(49|50)\d of .* of \S*valid", out
    )
    plain, less = (json.loads((home / f"{name}.json").read_text()) for name in ("plain", "half"))
    assert less["perplexity"]["all"]["loss"] != plain["perplexity"]["all"]["loss"]
    assert less["budget"] in out and plain["budget"] is None
    message = f"half.json has figures with another budget ({less['budget']}) than this one (None)"
    code, _, error = call(tiny.remoe, home, "evaluate", "hf", *request, "half.json")
    assert code == 2 and message in error and json.loads((home / "half.json").read_text()) == less
    code, _, error = call(tiny.remoe, home, "evaluate", "hf", *request, "plain.json/half.json")
    assert code == 2 and "plain.json is a file; name a folder (--out)" in error
    (home / "text").write_text("import os\n\ndef main(a, b):\n    return a + b\n" * 200)
    prompt = ["def", "--max-new-tokens", "2"]
    code, _, error = call(
        tiny.remoe, home, "generate", "hf", *prompt, *half, "--calibrate-on", "text"
    )
    assert code == 0 and "tokens of text)" in error, error
    code, _, error = call(tiny.remoe, home, "generate", "hf", *prompt, *half)
    assert code == 0 and "(2048 tokens of text that the model has sampled)" in error, error
    config = json.loads((home / "hf/config.json").read_text())
    shutil.copytree(home / "hf", home / "stored")
    stored = config | {"gate_threshold": 0.25, "format_version": 2}
    (home / "stored/config.json").write_text(json.dumps(stored))
    code, _, error = call(tiny.remoe, home, "generate", "stored", *prompt)
    assert code == 0 and "budget: the model's own, gate_threshold 0.25" in error
    for end in (None, 99999):
        (home / "stored/config.json").write_text(json.dumps(config | {"eos_token_id": end}))
        code, _, error = call(tiny.remoe, home, "generate", "stored", *prompt, *half)
        assert code == 2 and f"names no text, and its eos_token_id is {end}, no token" in error


def test_a_sample_goes_on_where_documents_end(call, home):
    found, expected, end = call(sample_twice, home / "hf")
    assert found.shape == (29, 32) and found.equal(expected)
    assert (found[:, 0] == end).all() and (found[:, 1:-1] == end).any()


def sample_twice(folder: Path):
    """Sample from a model with nearly equal logits, and again without a cache."""
    import torch

    from megatron.remoe.evaluate import budget
    from remoe.hf import ReMoEForCausalLM

    model = ReMoEForCausalLM.from_pretrained(folder)
    model.config.max_position_embeddings, end = 32, model.config.eos_token_id
    with torch.no_grad():
        model.lm_head.weight *= 0.1
        found = budget.sampled(model, 900)
        torch.manual_seed(budget.DEFAULT_SEED)
        expected = torch.full((29, 1), end)
        for _ in range(31):
            weights = model(expected).logits[:, -1].softmax(dim=-1)
            expected = torch.cat((expected, torch.multinomial(weights, 1)), dim=1)
    return found, expected, end


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--calibrate-on", "tokens/valid"], "there is nothing to calibrate"),
        (["--active-experts", "0.5", "--calibrate-on", "empty"], "has no text to calibrate on"),
        (["--active-experts", "99", "--calibrate-on", "tokens/valid"], "active_experts is 99.0"),
        (["--active-experts", "99"], "active_experts is 99.0"),
        (["--active-experts", "3.9"], r"3.9, which cannot .*sampled; --calibrate-on names other"),
        (["--active-experts", "0.5", "--calibrate-on", "hf/generation_config.json"], "least 512"),
    ],
)
def test_a_budget_without_text_or_number_is_refused(call, home, argv, message):
    (home / "empty").write_text("")
    code, _, error = call(tiny.remoe, home, "generate", "hf", "def", *argv)
    assert code == 2 and re.search(message, error), error
