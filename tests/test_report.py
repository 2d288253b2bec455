"""The report of analyzed runs: what is in the file, and what a browser makes of it."""

import base64
import contextlib
import csv
import gzip
import json
import re
import shutil
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

from megatron.remoe.analysis import trace
from megatron.remoe.analysis.answers import answers, write_answers
from megatron.remoe.analysis.report import experts, page, subject, text
from megatron.remoe.analysis.report.drawing import rounded
from megatron.remoe.analysis.trace import Part, Trace
from megatron.remoe.cli.app import main
from tests.test_answers import EXPERTS, made
from tests.test_compare import SHAPE
from tests.test_runs import evaluation

RELU, TOPK = "relu <b> & co", "topk"
TEXTS = {0: " the", 1: "</script>", 2: "\n", 3: "<b>&amp;", 4: "!", 5: " x1"}
TARGET = 1 - 2 / EXPERTS
STEPS = 60
INTERVENTIONS = {
    RELU: [
        {"table": "pruning", "layer": "all", "removed": 0, "loss": 2.0, "extra_loss": 0.0},
        {"table": "pruning", "layer": "all", "removed": 1, "loss": 2.5, "extra_loss": 0.5},
        {"table": "shift", "offset": 0.0, "loss": 2.0, "active": 2.0, "extra_loss": 0.0},
        {"table": "shift", "offset": 0.1, "loss": 2.2, "active": 1.5, "extra_loss": 0.2},
    ],
    TOPK: [{"table": "lower_k", "k": 1, "loss": 3.0, "active": 1.0, "extra_loss": 0.25}],
}


def traced(name: str, iteration: int) -> Trace:
    """A record in which expert 1 of layer 3 is dead in the TopK run."""
    found = made(seed=iteration, tokens=made().tokens, texts=TEXTS)
    layers = dict(found.layers)
    probs = layers[1].probs()
    probs[found.tokens == 4] = torch.eye(EXPERTS)[0]  # expert 0 has a word of its own
    layers[1] = trace.layer_trace(probs, probs > 0, None)
    if name == TOPK:
        probs = layers[3].probs()
        probs[:, 1] = 0
        layers[3] = trace.layer_trace(probs, probs > 0, None)
    router = "relu" if name == RELU else "topk_pre_softmax"
    return replace(
        found, layers=layers, facts=replace(found.facts, iteration=iteration, router=router)
    )


def train(folder: Path, *, relu: bool) -> None:
    """Write the config and the metrics of a run that is sparse from step 21 on."""
    folder.mkdir()
    routing = {"num_experts": EXPERTS, "moe_router_topk": 2, "moe_relu_routing": relu}
    config = SHAPE | routing | {"run_dir": folder.name}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = []
    for step in range(1, STEPS + 1):
        sparsity = TARGET if not relu or step > 20 else 0.4
        row = {
            "iteration": step, "lm_loss": 9.0 / step, "sparsity": sparsity,
            "sparsity_per_layer": [sparsity - 0.01, sparsity + 0.01], "dead_experts": 0,
            "tokens": 8 * step, "tokens_per_second": 4.0 if step > 20 else 2.0,
            "peak_memory": 2_000_000_000,
        }  # fmt: skip
        rows.append(row | ({"l1_coeff": 1e-8 * 1.1**step, "l1_reg": 3 / step} if relu else {}))
    rows += [evaluation(STEPS, split, loss) for split, loss in (("valid", 0.5), ("valid/a", 0.6))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def analyze(folder: Path, name: str, iterations: list[int]) -> None:
    """Write an analysis as `remoe analyze` does."""
    traces = [traced(name, iteration) for iteration in iterations]
    for one in traces:
        record = folder / f"traces/iter_{one.facts.iteration:07d}"
        trace.begin(record, one.facts, one.layers, "weights")
        trace.write_part(record, 0, Part(one.tokens, one.losses, one.domains, one.layers))
        trace.finish(record, 1, one.texts)
    write_answers(folder, answers(traces, INTERVENTIONS[name], seed=1))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Two analyzed runs, and the report of both in `both.html`."""
    home = tmp_path_factory.mktemp("report")
    for name, iterations in ((RELU, [20, 40, 60]), (TOPK, [60])):
        train(home / name, relu=name == RELU)
        analyze(home / name / "analysis", name, iterations)
    main_in(home, "report", str(home / RELU), str(home / TOPK), "--out", str(home / "both.html"))
    return home


def main_in(home: Path, *argv: str) -> None:
    try:
        main(list(argv))
    except SystemExit as end:
        assert not end.code, argv


def tables_of(home: Path, name: str) -> dict[str, list[dict]]:
    return subject.load([home / name])[0].tables


class Elements(HTMLParser):
    """The tags with their attributes, and the content of scripts by their id."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self._script: str | None = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._script = dict(attrs).get("id") if tag == "script" else ""

    def handle_data(self, data):
        if self._script != "":
            self.scripts[self._script] = self.scripts.get(self._script, "") + data

    def handle_endtag(self, tag):
        self._script = ""


@pytest.fixture(scope="module")
def elements(home) -> Elements:
    return Elements((home / "both.html").read_text())


def inflated(elements: Elements, name: str) -> str:
    return gzip.decompress(base64.b64decode(elements.scripts[name])).decode()


def test_the_file_is_small_and_needs_nothing_else(home, elements):
    content = (home / "both.html").read_text()
    assert len(content.encode()) < 5_000_000
    for tag, attributes in elements.tags:
        assert tag not in ("iframe", "object", "embed", "img", "base")
        assert "src" not in attributes
        address = attributes.get("href") or ""
        assert not re.match(r"[a-z]+:", address) or address == "data:,", address
        if tag == "a" and "#" not in address and address:
            assert (home / address.replace("%20", " ").replace("%3Cb%3E", "<b>")
                    .replace("%26", "&")).exists(), address  # fmt: skip
    assert "default-src 'none'" in next(
        a["content"] for _, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert str(home) not in content and str(home) not in inflated(elements, "data")


def test_every_figure_explains_itself_and_has_its_numbers(elements):
    data = json.loads(inflated(elements, "data"))
    ids = [a["id"] for _, a in elements.tags if "id" in a]
    assert len(ids) == len(set(ids))
    figures = [a["id"] for tag, a in elements.tags if tag == "figure"]
    links = {a["data-table"] for _, a in elements.tags if a.get("class") == "csv"}
    assert len(figures) == 18 and set(figures) <= links
    assert links == set(data["tables"])
    plots = [a for _, a in elements.tags if a.get("class") == "plot"]
    assert {a["id"] for a in plots} == set(data["plots"])
    for attributes in plots:
        assert attributes["role"] == "img" and len(attributes["aria-label"]) > 60


def test_figures_and_csv_have_the_numbers_of_the_answers(home, elements):
    data = json.loads(inflated(elements, "data"))
    tables = {name: tables_of(home, name) for name in (RELU, TOPK)}
    for name in ("by_frequency", "by_loss", "by_domain", "by_position", "by_word_part"):
        for panel, layer in enumerate(("all", 1, 3)):
            drawn = data["plots"][f"{name}-{panel}"]["data"]
            for curve, run in zip(drawn, (RELU, TOPK), strict=True):
                rows = [row for row in tables[run][name] if row["layer"] == layer]
                assert curve["y"] == [rounded(row["mean"]) for row in rows] and rows
    found = list(csv.DictReader(data["tables"]["load"].splitlines()))
    expected = [(run, row) for run in tables for row in tables[run]["load"]]
    assert len(found) == len(expected)
    for cells, (run, row) in zip(found, expected, strict=True):
        assert cells["run"] == run and int(cells["expert"]) == row["expert"]
        assert float(cells["share"]) == pytest.approx(row["share"], rel=1e-5)
    (curve,) = data["plots"]["flips-0"]["data"][:1]
    assert curve["x"] == [40, 60]
    share = data["plots"]["experts_by_domain-0"]["data"][0]["z"]
    first = [row["per_token"] for row in tables[RELU]["experts_by_domain"] if row["layer"] == 1]
    assert share[0] == [rounded(value) for value in first[:EXPERTS]]
    both = [trace["y"] for trace in data["plots"]["shift-0"]["data"]]
    assert both == [[0.2, 0], [0.25]]


def test_the_text_is_colored_by_the_experts_of_each_layer():
    probs = torch.zeros(6, 4)
    for token, count in enumerate((0, 1, 2, 3, 4, 1)):
        probs[token, :count] = 1.0
    layers = {
        2: trace.layer_trace(probs, probs > 0, None),
        5: trace.layer_trace(probs, probs > 2, None),
    }
    found = made()
    found = replace(
        found,
        tokens=torch.tensor([0, 1, 2, 3, 99, 5]),
        losses=torch.arange(6.0),
        domains=torch.tensor([1, 1, 1, 0, 0, 0]),
        layers=layers,
        texts=TEXTS,
    )
    one = subject.Subject("a", Path("a"), None, found, {})
    (sample,) = text.samples([one], tokens=6)  # two of each domain, of which one has none
    assert [p.domain for p in sample.passages] == ["code", "prose"]
    assert [p.texts for p in sample.passages] == [["<b>&amp;", "[99]"], [" the", "</script>"]]
    assert sample.counts == {"2": [3, 4, 0, 1], "5": [0, 0, 0, 0]}
    assert sample.selections["2"] == ("6802", [(0, "0"), (2, "1"), (6, "3"), (8, "4")])
    assert sample.selections["5"] == ("0000", [(0, "0")])
    assert sample.selections["all"] == ("3401", [(0, "0"), (1, "0.5"), (3, "1.5"), (4, "2")])
    assert sample.losses == [3.0, 4.0, 0.0, 1.0]


def test_a_few_experts_of_a_token_never_look_like_none():
    levels, scale = text._levels(torch.tensor([0.0, 0.01, 8.0]), 8.0)
    assert levels == "018" and scale[1] == (1, "0.01")


def test_experts_that_never_meet_have_no_map(home):
    probs = torch.eye(EXPERTS).repeat(12, 1)
    layers = {1: trace.layer_trace(probs, probs > 0, None)}
    alone = replace(made(), layers=layers)
    one = subject.Subject("a", Path("a"), None, alone, answers([alone], [], seed=1))
    assert experts.coactivation([one]).panels == []
    both = subject.load([home / RELU])
    assert len(experts.coactivation(both).panels) == 2


def fails(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(["report", *argv])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_what_was_not_analyzed_is_refused(home, tmp_path, capsys):
    train(tmp_path / "run", relu=True)
    run = str(tmp_path / "run")
    assert "was not analyzed yet; remoe analyze" in fails(capsys, run)
    (tmp_path / "run/analysis").mkdir()
    assert "was not analyzed yet" in fails(capsys, run)
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    del config["num_experts"]
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    assert "is a dense model" in fails(capsys, run)
    assert "is neither a run directory nor" in fails(capsys, str(tmp_path))
    assert "is not a folder" in fails(capsys, str(tmp_path / "nowhere"))
    one = str(home / RELU)
    assert "share one report" in fails(capsys, one, str(home / TOPK))
    out = ["--out", str(tmp_path / "x.html")]
    assert "is named more than once" in fails(capsys, one, one, *out)
    assert "--wandb takes that of one" in fails(capsys, one, str(home / TOPK), *out, "--wandb")
    assert "so that W&B has no run of it; leave" in fails(capsys, one, *out, "--wandb")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert "report.html" not in [path.name for path in (tmp_path / "run").iterdir()]


def test_another_file_is_never_replaced_but_a_report_is(home, tmp_path, capsys, monkeypatch):
    out = tmp_path / "notes.html"
    out.write_text("<!doctype html><title>notes</title>")
    argv = [str(home / TOPK), "--out", str(out)]
    assert "exists and is no report" in fails(capsys, *argv)
    assert out.read_text().endswith("</title>")
    assert "is a folder" in fails(capsys, str(home / TOPK), "--out", str(tmp_path))
    out.unlink()
    main_in(home, "report", *argv)
    out.write_text(out.read_text().replace("topk", "antique"))
    main_in(home, "report", *argv)
    assert "antique" not in out.read_text()
    before = out.read_bytes()
    monkeypatch.setattr(page, "LIMIT", 1000)
    assert "name fewer of them" in fails(capsys, *argv)
    assert out.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_damage_is_named(home, tmp_path, capsys):
    shutil.copytree(home / TOPK, tmp_path / "run")
    answers_file = tmp_path / "run/analysis/answers.json"
    whole = answers_file.read_text()
    answers_file.write_text(whole[:-40])
    assert "answers.json is not valid JSON" in fails(capsys, str(tmp_path / "run"))
    answers_file.write_text(whole)
    (part,) = (tmp_path / "run/analysis/traces").rglob("part-*.npz")
    part.unlink()
    assert f"{part} is missing" in fails(capsys, str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "run/analysis/traces")
    assert "has answers but no trace" in fails(capsys, str(tmp_path / "run"))


def test_models_are_named_by_what_tells_them_apart(tmp_path):
    paths = [tmp_path / "a/run", tmp_path / "b/run/analysis", tmp_path / "b/other"]
    assert list(subject._names(paths)) == ["a/run", "b/run", "other"]


def test_an_analysis_without_its_run_has_no_curves(home, tmp_path):
    shutil.copytree(home / TOPK / "analysis", tmp_path / "model")
    main_in(tmp_path, "report", str(tmp_path / "model"), "--out", str(tmp_path / "out/a.html"))
    found = Elements((tmp_path / "out/a.html").read_text())
    figures = [a["id"] for tag, a in found.tags if tag == "figure"]
    assert b"vocabulary" in (tmp_path / "out/a.html").read_bytes()
    assert "by_loss" in figures and "loss" not in figures and len(figures) == 15


def wait(condition, seconds: float = 30.0):
    """The first value of the condition that is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the browser did not get there"
        time.sleep(0.05)
    return value


def open_report(browser, path: Path, height: int = 900) -> None:
    """Open a report, all of which is on the screen if this is high enough."""
    browser.set_window_size(1280, height)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(path.as_uri())
    wait(lambda: browser.execute_script("return window.Plotly !== undefined"))


HIGH = 20000
# Returns the figures that are shown but not drawn completely.
UNDRAWN = """
const shown = [...document.querySelectorAll(".plot")].filter((p) => !p.closest("[hidden]"));
return shown.filter((plot) => {
  const wanted = (plot.data ?? []).filter((one) => (one.z ?? one.y).length > 0).length;
  const found = plot.querySelectorAll(".scatterlayer .trace, .barlayer .trace, .heatmaplayer .hm");
  const sizes = [...found].every((one) => one.getBoundingClientRect().width > 0);
  return !plot.data || found.length < wanted || !sizes;
}).map((plot) => plot.id);
"""


@contextlib.contextmanager
def emulated(browser, **media):
    features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    yield
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def choose(browser, layer: str) -> None:
    browser.execute_script(
        "const s = document.getElementById('layer'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('change'))",
        layer,
    )


@pytest.mark.processes
def test_a_browser_draws_every_figure_without_a_message_or_a_network(home, browser):
    open_report(browser, home / "both.html", HIGH)
    for layer in ("all", "1", "3"):
        choose(browser, layer)
        wait(lambda: browser.execute_script(UNDRAWN) == [])
    figures = browser.execute_script(
        "return [...document.querySelectorAll('figure')]"
        ".map((f) => f.querySelectorAll('.main-svg').length)"
    )
    assert len(figures) == 18 and all(figures)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"].endswith("BeSent")]
    assert asked and all(url.startswith(("file:", "data:", "blob:")) for url in asked), asked


@pytest.mark.processes
def test_the_mouse_reads_values_and_tokens(home, browser):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    open_report(browser, home / "both.html")
    browser.execute_script("document.getElementById('by_domain').scrollIntoView()")
    points = wait(lambda: browser.find_elements(By.CSS_SELECTOR, "#by_domain-0 .point"))
    ActionChains(browser).move_to_element(points[0]).perform()
    told = wait(lambda: browser.find_elements(By.CSS_SELECTOR, "#by_domain .hovertext"))[0].text
    row = next(r for r in tables_of(home, RELU)["by_domain"] if r["layer"] == "all")
    assert RELU in told and f"{row['tokens']} tokens: {row['mean']:.3g}" in told

    sample = text.samples(subject.load([home / RELU, home / TOPK]))[0]
    browser.execute_script("document.getElementById('text').scrollIntoView()")
    tokens = browser.find_elements(By.CSS_SELECTOR, "[data-sample='0'] .tokens span")
    ActionChains(browser).move_to_element(tokens[4]).perform()
    told = browser.find_element(By.CSS_SELECTOR, "[data-sample='0'] .told").text
    assert f"layer 1: {sample.counts['1'][4]}, layer 3: {sample.counts['3'][4]}" in told
    assert told.endswith(f"next token {sample.losses[4]:g}")


@pytest.mark.processes
def test_the_switch_colors_the_text_and_chooses_figures(home, browser):
    open_report(browser, home / "both.html")
    sample = text.samples(subject.load([home / RELU, home / TOPK]))[1]
    written = [token for passage in sample.passages for token in passage.texts]
    read = (
        "return [...document.querySelectorAll(\"[data-sample='1'] .tokens span\")]"
        ".map((s) => [s.textContent, s.className, getComputedStyle(s).backgroundColor])"
    )
    colors = {}
    for layer in ("all", "3", "1"):
        choose(browser, layer)
        found = browser.execute_script(read)
        levels = sample.selections[layer][0]
        assert [one[1] for one in found] == [f"c{level}" for level in levels]
        assert [one[0].replace("↵", "") for one in found] == written
        colors |= {level: color for level, (_, _, color) in zip(levels, found, strict=True)}
    assert len(set(colors.values())) == len(colors) > 3
    shown = "return [...document.querySelectorAll('#load .panel')].map((p) => !p.hidden)"
    assert browser.execute_script(shown) == [False, False, True, False]


@pytest.mark.processes
def test_tables_sort_and_csv_is_saved(home, browser):
    open_report(browser, home / "both.html")
    browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
    click = (
        "const t = [...document.querySelectorAll('.sortable')].at(-2);"
        "t.querySelectorAll('th button')[arguments[0]].click();"
        "return [...t.tBodies[0].rows].map((r) => r.cells[arguments[0]].dataset.key)"
    )
    expected = [
        row["share"] * EXPERTS for name in (RELU, TOPK) for row in tables_of(home, name)["load"]
    ]
    for order in (sorted(expected), sorted(expected, reverse=True)):
        assert [float(key) for key in browser.execute_script(click, 3)] == pytest.approx(order)
    names = browser.execute_script(click, 0)
    assert names == sorted(names) and set(names) == {RELU, TOPK}
    data = json.loads(inflated(Elements((home / "both.html").read_text()), "data"))
    browser.execute_script("document.querySelector(\"[data-table='vocabulary']\").click()")
    saved = browser.downloads / "vocabulary.csv"
    wait(saved.exists)
    assert saved.read_bytes().decode() == data["tables"]["vocabulary"]


@pytest.mark.processes
def test_it_is_readable_on_a_phone_in_the_dark_and_on_paper(home, browser):
    metrics = {"width": 390, "height": HIGH, "deviceScaleFactor": 1, "mobile": True}
    color = "return getComputedStyle(document.querySelector('.main-svg text')).fill"
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        open_report(browser, home / "both.html")
        wait(lambda: browser.execute_script(UNDRAWN) == [])
        for layer in ("all", "3"):
            choose(browser, layer)
            size = "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
            assert browser.execute_script(size) == [390, 390]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    light = browser.execute_script(color)
    with emulated(browser, prefers_color_scheme="dark"):
        wait(lambda: browser.execute_script(color) != light)
    open_report(browser, home / "both.html")
    undrawn = "[...document.querySelectorAll('.plot:not([hidden] *)')].filter((p) => !p.data)"
    assert browser.execute_script(f"return {undrawn}.length") > 0
    paper = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    assert base64.b64decode(paper).startswith(b"%PDF") and len(paper) > 100_000
    assert browser.execute_script(f"return {undrawn}.length") == 0
    assert browser.get_log("browser") == []


@pytest.mark.processes
def test_other_scripts_are_refused_and_an_old_browser_is_told(home, browser):
    open_report(browser, home / "both.html")
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.foreign = 1';"
        "document.body.append(s)"
    )
    assert browser.execute_script("return window.foreign === undefined")
    assert "Content Security Policy" in browser.get_log("browser")[0]["message"]
    old = {"source": "delete globalThis.DecompressionStream"}
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", old)
    try:
        browser.get((home / "both.html").as_uri())
        notice = "return document.getElementById('notice').innerText"
        assert "cannot inflate the figures" in browser.execute_script(notice)
        assert browser.get_log("browser") == []
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
