"""After a kill of `remoe data`, nothing is half written, nobody is left, and a call continues."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.remoe import files
from megatron.remoe.data.corpus import CorpusConfig, build_corpus
from megatron.remoe.data.tokenize import TokenizeConfig, tokenize
from megatron.remoe.processes import children
from tests.data.test_files import die, status_of
from tests.data.test_tokenize import SMALL, TEXTS, contents, write_jsonl

pytestmark = pytest.mark.processes

INPUTS = ("a.jsonl", "b.jsonl")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make two files, and the undisturbed output of both, `whole`."""
    home = tmp_path_factory.mktemp("kills")
    for name in INPUTS:
        write_jsonl(home / name, TEXTS)
    tokenize([home / name for name in INPUTS], home / "whole", SMALL)
    return home


def die_at_rename(monkeypatch, number: int) -> None:
    """Kill this process before its `number`th rename."""
    rename, done = Path.replace, [0]

    def counted(self: Path, target: Path) -> Path:
        done[0] += 1
        if done[0] == number:
            die()
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", counted)


# These are the renames for each pair: the manifest without it, its two files, at first also the
# files of the tokenizer, and the manifest with it.
@pytest.mark.parametrize("rename", [1, 2, 3, 4, 6, 7, 9])
def test_a_kill_while_pairs_move_into_place(home, tmp_path, monkeypatch, rename):
    out, inputs = tmp_path / "out", [home / name for name in INPUTS]

    def killed() -> None:
        die_at_rename(monkeypatch, rename)
        tokenize(inputs, out, SMALL)

    assert status_of(killed) == -signal.SIGKILL
    tokenize(inputs, out, SMALL)
    assert contents(out) == contents(home / "whole")


def test_a_foreign_file_is_not_taken_for_an_interrupted_one(home, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a.bin").write_text("mine")
    with pytest.raises(ValueError, match=r"a\.bin exists but is not, or not whole"):
        tokenize([home / "a.jsonl"], out, SMALL)
    assert contents(out) == {"a.bin": b"mine"}


@pytest.mark.parametrize("rename", [1, 2, 5, 10])
def test_a_kill_while_a_corpus_moves_into_place(tmp_path, monkeypatch, rename):
    config = CorpusConfig(max_mb_per_domain=0.1, valid_fraction=0.2)
    documents = [(f"{domain}/{i}", domain) for domain in ("python", "cpp", "prose", "markup")
                 for i in range(40)]  # fmt: skip

    def sources(_):
        from megatron.remoe.data.sources import Source

        for path, domain in documents:
            text = "".join(f"{path} the router is a relu, line {i} of it\n" for i in range(40))
            yield Source(domain, path, 0, lambda text=text: text)

    monkeypatch.setattr("megatron.remoe.data.corpus.iter_sources", sources)
    out, whole = tmp_path / "out", tmp_path / "whole"
    build_corpus(whole, config)

    def killed() -> None:
        die_at_rename(monkeypatch, rename)
        build_corpus(out, config)

    assert status_of(killed) == -signal.SIGKILL
    build_corpus(out, config)
    assert contents(out) == contents(whole)


def test_a_corpus_does_not_replace_what_it_does_not_know(tmp_path):
    file = tmp_path / "train/python.jsonl"
    file.parent.mkdir()
    file.write_text("mine")
    with pytest.raises(ValueError, match=r"is there already, and no manifest\.json"):
        build_corpus(tmp_path, CorpusConfig(max_mb_per_domain=0.1))
    assert contents(tmp_path) == {"train/python.jsonl": b"mine"}


def test_two_writers_of_one_output(home, tmp_path):
    """The second writer is refused; it would drop the pairs of the first from the manifest."""
    with (
        files.output_folder(tmp_path / "out"),
        pytest.raises(ValueError, match="is being written by another process"),
    ):
        tokenize([home / "a.jsonl"], tmp_path / "out", SMALL)


def test_a_worker_that_is_killed_is_named(home, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron.remoe.data.encode._start_worker", die)
    with pytest.raises(ValueError, match="one of the 1 worker processes was killed"):
        tokenize([home / "a.jsonl"], tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


# The second file stops in the middle, while its workers are alive, until a signal comes.
TOKENIZE = """
import sys, time
from megatron.remoe.data import tokenize
from megatron.remoe.cli.app import main

def stop_after(chunks):
    for number, chunk in enumerate(chunks):
        yield chunk
        if stop_after.calls == 2:
            time.sleep(0.5)  # until the worker has it
            print("stopped", flush=True)
            time.sleep(600)

def encode_chunks(pool, chunks, *, encode=tokenize.encode_chunks, **options):
    stop_after.calls += 1
    return encode(pool, stop_after(chunks), **options)

stop_after.calls = 0
tokenize.encode_chunks = encode_chunks
if __name__ == "__main__":
    main(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_tokenization_ends_with_its_workers_and_goes_on(home, tmp_path, number):
    script, out = tmp_path / "slow.py", tmp_path / "out"
    script.write_text(TOKENIZE)
    inputs = [str(home / name) for name in INPUTS]
    argv = ["data", "tokenize", *inputs, "--out", str(out), "--vocab-size", "300", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, script, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout and process.stdout.readline() == "stopped\n"
    workers = children(process.pid)
    assert workers
    os.killpg(process.pid, number) if number == signal.SIGINT else process.kill()
    _, error = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in error
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    left = contents(out)
    assert {"a.bin", "a.idx"} <= left.keys() and not {"b.bin", "b.idx"} & left.keys()
    assert list(json.loads(left["manifest.json"])["outputs"]) == ["a"]
    assert number == signal.SIGKILL or not any(name.startswith(".") for name in left)
    config = TokenizeConfig(vocab_size=300, workers=2)
    _, written = tokenize([Path(path) for path in inputs], out, config)
    assert written == ["b"] and contents(out) == contents(home / "whole")
