"""The corpus is what its manifest says, and equal wherever the same versions are installed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.remoe.cli.app import main
from megatron.remoe.data.cleaning import clean_text, content_key, is_worth_training_on
from megatron.remoe.data.corpus import (
    CorpusConfig,
    Document,
    build_corpus,
    select_documents,
    split_documents,
)
from megatron.remoe.data.sources import (
    DOMAINS,
    Source,
    dependency_closure,
    iter_sources,
    read_docstrings,
)
from megatron.remoe.files import sha256_file

SMALL = CorpusConfig(max_mb_per_domain=0.3, valid_fraction=0.1)
SMALL_FLAGS = ["--max-mb-per-domain", "0.3", "--valid-fraction", "0.1"]
PARAGRAPH = "Every word of this paragraph is written for people to read, and nobody generated it. "


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "out"
    _, written = build_corpus(out, SMALL)
    assert written
    return out


def read(out: Path) -> dict[str, list[dict[str, str]]]:
    return {
        f"{path.parent.name}/{path.name}": [json.loads(line) for line in path.open()]
        for path in sorted(out.glob("*/*.jsonl"))
    }


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256_file(path) for path in files}


def source(path: str, text: str, domain: str = "prose", tier: int = 0) -> Source:
    return Source(domain, path, tier, lambda: text)


def prose(seed: int, sentences: int = 10) -> str:
    words = PARAGRAPH.split()
    rng = random.Random(seed)
    return "\n".join(" ".join(rng.sample(words, len(words))) for _ in range(sentences))


def test_manifest_tells_the_truth(corpus: Path) -> None:
    manifest = json.loads((corpus / "manifest.json").read_text())
    documents = read(corpus)
    assert manifest["files"].keys() == documents.keys()
    assert {name.partition("/")[0] for name in documents} == {"train", "valid"}
    assert len({name.partition("/")[2] for name in documents}) == len(DOMAINS) >= 4
    for name, entry in manifest["files"].items():
        assert entry["documents"] == len(documents[name]) > 0
        assert entry["bytes"] == (corpus / name).stat().st_size
        assert entry["sha256"] == sha256_file(corpus / name)
    assert manifest["versions"]["python"] == sys.version.split()[0]
    assert {"torch", "megatron-core"} <= manifest["versions"].keys()
    assert sorted(path.name for path in corpus.iterdir()) == ["manifest.json", "train", "valid"]


def test_documents_are_relative_distinct_and_split_by_path(corpus: Path) -> None:
    keys = set()
    splits: dict[str, set[str]] = {}
    for name, documents in read(corpus).items():
        split, domain = name.removesuffix(".jsonl").split("/")
        for document in documents:
            assert document.keys() == {"text", "domain", "path"}
            assert document["domain"] == domain
            assert not document["path"].startswith(("/", ".")) and "/" in document["path"]
            assert "site-packages" not in document["path"]
            assert is_worth_training_on(document["text"], prose=domain == "prose")
            keys.add(content_key(document["text"]))
            splits.setdefault(document["path"], set()).add(split)
    assert len(keys) == sum(map(len, read(corpus).values()))
    assert all(len(split) == 1 for split in splits.values())


@pytest.mark.processes
def test_another_process_builds_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from megatron.remoe.cli import main; main()"]
    env = os.environ | {"PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "Asia/Tokyo"}
    subprocess.run(
        [*command, "data", "corpus", "again", *SMALL_FLAGS], cwd=tmp_path, env=env, check=True
    )
    assert contents(tmp_path / "again") == contents(corpus)


def test_rerun_keeps_and_refuses_to_replace(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(corpus)
    main_exit(["data", "corpus", str(corpus), *SMALL_FLAGS], code=0)
    assert "up to date" in capsys.readouterr().out
    main_exit(["data", "corpus", str(corpus)], code=2)
    assert "pass --force" in capsys.readouterr().err
    assert contents(corpus) == before

    damaged = corpus / "valid" / "cpp.jsonl"
    damaged.write_text(damaged.read_text() + "\n")
    main_exit(["data", "corpus", str(corpus), *SMALL_FLAGS], code=2)
    assert "differ from its manifest.json" in capsys.readouterr().err
    main_exit(["data", "corpus", str(corpus), *SMALL_FLAGS, "--force"], code=0)
    assert contents(corpus) == before


def main_exit(argv: list[str], *, code: int) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == code


def test_an_empty_split_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    config = CorpusConfig(max_mb_per_domain=0.0001)
    with pytest.raises(ValueError, match=r"has no document at 0\.0001 MB .* raise one of them"):
        build_corpus(tmp_path / "out", config)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "value"),
    [({"max_mb_per_domain": 0.0}, "=0.0 "), ({"valid_fraction": 1.0}, "=1.0 ")],
)
def test_settings_are_checked(flags: dict[str, float], value: str) -> None:
    with pytest.raises(ValueError, match=value):
        CorpusConfig(**flags)


def test_duplicates_are_taken_once_across_domains() -> None:
    text = prose(0)
    sources = [
        source("a/one", text, "python"),
        source("a/two", text.replace(" ", "  "), "prose"),
        source("a/three", prose(1), "prose"),
    ]
    assert [doc.path for doc in select_documents(sources, SMALL)] == ["a/one", "a/three"]


def test_selection_ignores_input_order_and_keeps_to_the_budget() -> None:
    sources = [source(f"a/{i}", prose(i), tier=i % 2) for i in range(100)]
    config = CorpusConfig(max_mb_per_domain=0.06)
    chosen = list(select_documents(sources, config))
    random.Random(0).shuffle(sources)
    assert list(select_documents(sources, config)) == chosen
    size = sum(len(doc.text) for doc in chosen)
    assert 0.058e6 < size <= 0.06e6
    first_tier = [doc for doc in chosen if int(doc.path.removeprefix("a/")) % 2 == 0]
    assert chosen[:50] == first_tier and 50 < len(chosen) < 100


def test_split_has_the_share_asked_for_and_holds_for_a_path_in_all_domains() -> None:
    documents = [
        Document(prose(i), domain, f"m/{i}") for domain in ("python", "prose") for i in range(200)
    ]
    documents += [Document(prose(i), "prose", f"r/{i}") for i in range(200)]
    splits = split_documents(documents, 0.1)
    assert splits == split_documents(documents[::-1], 0.1)
    for domain, paths in (("python", 200), ("prose", 400)):
        held = {doc.path for doc in documents if doc.domain == domain} & {
            path for path, split in splits.items() if split == "valid"
        }
        assert 0.08 * paths < len(held) <= 0.1 * paths


def test_no_document_makes_up_most_of_the_validation_split() -> None:
    documents = [Document(prose(i), "prose", f"m/{i}") for i in range(200)]
    documents += [Document(prose(i, sentences=120), "prose", f"large/{i}") for i in range(20)]
    splits = split_documents(documents, 0.1)
    assert "valid" in splits.values()
    assert all(splits[f"large/{i}"] == "train" for i in range(20))


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        (prose(0), True),
        ("# @generated by a tool\n" + prose(0), False),
        ("too short to learn from", False),
        (prose(0) + "x" * 2_000, False),
        ("\n".join(f"{i:08x} {i:08d} {i * 7919:010d}" for i in range(200)), False),
        (prose(0) + "\0", False),
    ],
)
def test_what_is_worth_training_on(text: str, worth: bool) -> None:
    assert is_worth_training_on(text, prose=True) == worth


def test_code_is_not_prose() -> None:
    code = "for (int index = 0; index < size; ++index) { sum[index] += term[index]; }\n" * 20
    assert is_worth_training_on(code, prose=False)
    assert not is_worth_training_on(code, prose=True)


def test_cleaning_drops_license_comments_only() -> None:
    assert clean_text("// Copyright X\n// MIT\n\n// What it does\nint a; \r\n\n") == (
        "// What it does\nint a;\n"
    )
    assert clean_text("/* Licensed under Y */\n#include <b>\n") == "#include <b>\n"
    assert clean_text("# Copyright X\n\nimport a\n") == "import a\n"
    kept = "#include <license.h>\n// What it does\n"
    assert clean_text(kept) == kept


def test_docstrings_are_read_without_importing(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        f'"""{PARAGRAPH * 3}"""\nraise SystemExit\n'
        f'class A:\n    """short"""\n    def f(self):\n        """{PARAGRAPH * 4}\n\n        End.\n'
        '        """\n'
    )
    assert read_docstrings(module) == f"{PARAGRAPH * 3}\n\n{PARAGRAPH * 4}\n\nEnd."
    module.write_text(module.read_text() + "x = 1\n" * 1_000)
    assert read_docstrings(module) == ""


def test_sources_that_are_not_installed_have_no_known_requirements():
    with pytest.raises(ValueError, match="remoe-of-nobody is imported but not installed"):
        dependency_closure("remoe-of-nobody", frozenset())


def test_sources_are_the_dependencies_alone() -> None:
    closure = dependency_closure("remoe", frozenset({"megatron"}))
    assert {"torch", "megatron-core", "tokenizers", "typing-extensions"} <= closure.keys()
    assert not {"remoe", "pytest", "ruff", "pip"} & closure.keys()
    paths = {candidate.path for candidate in iter_sources({"typer": closure["typer"]})}
    assert {"typer/main.py", "typer/README", "stdlib/json/decoder.py"} <= paths
    packages = {path.partition("/")[0] for path in paths}
    assert packages == {"stdlib", "pydoc_topics", "typer"}
