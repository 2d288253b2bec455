"""The documentation as a site: strict about links, without a network, searchable from disk."""

import json
import logging
import re
import time
from pathlib import Path

import pytest

commands = pytest.importorskip("mkdocs.commands.build", reason="mkdocs is not installed")
from mkdocs.config import load_config  # noqa: E402
from mkdocs.exceptions import Abort  # noqa: E402

ROOT = Path(__file__).parents[1]


def build(site: Path, **changes) -> None:
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(site), **changes)
    config.plugins.run_event("startup", command="build", dirty=False)
    commands.build(config)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The whole site; a link or an anchor that does not exist fails, and a page without a menu."""
    folder = tmp_path_factory.mktemp("site")
    build(folder)
    return folder


def test_links_leave_docs_and_arrive(site):
    home = (site / "index.html").read_text()
    assert '<a href="results/index.html">' in home and 'src="docs/' not in home
    shown = (site / "files/examples/llama_182m/remoe.yaml.html").read_text()
    assert "moe_relu_routing" in shown
    assert "files/examples/llama_182m/remoe.yaml.html" in (site / "experiments.html").read_text()
    assert "data:image/png" in (site / "files/examples/remoe_layer.ipynb.html").read_text()


def test_nothing_comes_from_a_network(site):
    loads = re.compile(
        r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//[^>]*"""
        r"""|<link[^>]*rel=["']?(?:stylesheet|icon|preconnect)[^>]*//[^>]*"""
        r"""|url\(["']?(?:https?:)?//[^)]*"""
    )
    pages = [p for kind in ("html", "css") for p in site.rglob(f"*.{kind}")]
    assert len(pages) > 50
    assert {hit for page in pages for hit in loads.findall(page.read_text())} == set()
    assert loads.search('<script src="https://unpkg.com/x">')


def test_what_is_broken_is_named(tmp_path, caplog):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "one.md").write_text(
        "# One\n\n[a](two.md) [b](two.md#two) [c](three.md) [d](two.md#four) [e](../gone.yaml)\n"
    )
    (docs / "two.md").write_text("# Two\n")
    (docs / "alone.md").write_text("# Alone\n")
    nav = ["one.md", "two.md"]
    caplog.set_level(logging.WARNING, "mkdocs")
    with pytest.raises(Abort):
        build(tmp_path / "site", docs_dir=str(docs), nav=nav, hooks=[], extra_css=[])
    said = "\n".join(record.getMessage() for record in caplog.records)
    for broken in ("alone.md", "'three.md'", "'#four'", "'../gone.yaml'"):
        assert broken in said
    assert "'two.md'," not in said and "'#two'" not in said


@pytest.mark.processes
def test_the_search_works_from_disk(site, browser):
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get((site / "index.html").as_uri())
    browser.execute_script("document.querySelector('#__search').click()")
    end = time.monotonic() + 30
    found: list[str] = []
    while "How it works" not in found:
        assert time.monotonic() < end, found
        box = browser.find_element("css selector", ".md-search__input")
        if box.get_attribute("value") != "dead expert":
            browser.execute_script("arguments[0].focus()", box)
            box.send_keys("dead expert")
        time.sleep(0.1)
        hits = browser.find_elements("css selector", ".md-search-result__item h1")
        found = [hit.get_attribute("textContent") for hit in hits]
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"].endswith("BeSent")]
    assert asked and all(url.startswith(("file:", "data:", "blob:")) for url in asked), asked
