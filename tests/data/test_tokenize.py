"""Megatron reads from the token files the text that was tokenized, in whatever form it came."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import pytest
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from megatron.remoe.cli.app import main
from megatron.remoe.data import jsonl
from megatron.remoe.data.inputs import find_inputs
from megatron.remoe.data.jsonl import parse_text
from megatron.remoe.data.pairs import check_pair
from megatron.remoe.data.tokenize import TokenizeConfig, tokenize
from megatron.remoe.data.tokenizer import END_OF_DOCUMENT, load_tokenizer, train_tokenizer
from megatron.remoe.evaluate.perplexity import find_domains

TEXTS = [
    "The router is a ReLU: an expert is active where its score is positive.\n",
    "  leading, trailing  and\ttabs \n\n",
    f"A document may speak of {END_OF_DOCUMENT} and go on.",
    "Größe, 语言, 🙂, e\u0301\r\nand a NUL \0.",
    *(f"def f_{i}(x):\n    return x * {i} + {i * i}\n" for i in range(60)),
]
SMALL = TokenizeConfig(vocab_size=300, workers=1)


def write_jsonl(path: Path, texts: Sequence[str], **extra: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, **extra}) + "\n" for text in texts))
    return path


def documents(prefix: Path) -> list[list[int]]:
    """Read the documents as Megatron does."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    assert list(dataset.document_indices) == list(range(len(dataset) + 1))
    return [dataset[i].tolist() for i in range(len(dataset))]


def decoded(out: Path, name: str) -> list[str]:
    tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    return [tokenizer.decode(ids, skip_special_tokens=False) for ids in documents(out / name)]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(iter(TEXTS), 300).save(str(path))
    return path


@pytest.fixture
def small(tokenizer_file: Path) -> TokenizeConfig:
    return TokenizeConfig(tokenizer=tokenizer_file, workers=1)


@pytest.mark.processes
def test_corpus_round_trip(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "corpus/train/code.jsonl", TEXTS, domain="code")
    write_jsonl(tmp_path / "corpus/valid/code.jsonl", TEXTS[:3], domain="code")
    out = tmp_path / "out"
    manifest, written = tokenize([tmp_path / "corpus"], out, SMALL)
    assert written == ["train/code", "valid/code"]
    assert decoded(out, "train/code") == [text + END_OF_DOCUMENT for text in TEXTS]
    assert decoded(out, "valid/code") == [text + END_OF_DOCUMENT for text in TEXTS[:3]]

    ids = documents(out / "train/code")
    eod_id = manifest["settings"]["eod_id"]
    assert all(document.count(eod_id) == 1 == document[::-1].index(eod_id) + 1 for document in ids)
    entry = manifest["outputs"]["train/code"]
    assert entry["documents"] == len(TEXTS)
    assert entry["tokens"] == sum(map(len, ids))
    assert entry["text_bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert entry["dtype"] == "uint16"
    assert (out / "train/code.bin").stat().st_size == 2 * entry["tokens"]
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert not list(out.glob(".*"))

    # The tokenizer does not depend on the validation text.
    again = tmp_path / "again"
    tokenize([train], again, SMALL)
    name = "tokenizer/tokenizer.json"
    assert (again / name).read_bytes() == (out / name).read_bytes()


@pytest.mark.processes
def test_megatron_loads_the_tokenizer(tmp_path: Path, small: TokenizeConfig) -> None:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    file = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    manifest, _ = tokenize([file], tmp_path / "out", small)
    args = Namespace(
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(tmp_path / "out" / "tokenizer"),
        vocab_file=None,
        merge_file=None,
        chat_template=None,
        special_tokens=None,
        metadata_path=None,
        trust_remote_code=False,
        tokenizer_hf_no_use_fast=False,
        tokenizer_hf_no_include_special_tokens=False,
        pad_vocab_size=False,
    )
    tokenizer = build_tokenizer(args)
    assert tokenizer.vocab_size == manifest["settings"]["vocab_size"] == 300
    assert tokenizer.eod == manifest["settings"]["eod_id"] == 0
    assert [*tokenizer.tokenize(TEXTS[0]), 0] == documents(tmp_path / "out" / "a")[0]


@pytest.mark.processes
def test_workers_and_compression_change_no_byte(
    tmp_path: Path, small: TokenizeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        jsonl, "CHUNK_BYTES", 100
    )  # dozens of chunks, in no fixed order in two workers
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 37)
    plain = write_jsonl(tmp_path / "plain" / "00.jsonl", TEXTS)
    squeezed = tmp_path / "zst" / "00.jsonl.zst"
    squeezed.parent.mkdir()
    data = plain.read_bytes()
    # Two frames, cut inside a line, as concatenated or parallel-compressed files have them.
    squeezed.write_bytes(zstandard.compress(data[:1_000]) + zstandard.compress(data[1_000:]))

    tokenize([plain], tmp_path / "one", small)
    two = TokenizeConfig(tokenizer=small.tokenizer, workers=2)
    tokenize([squeezed], tmp_path / "two", two)
    for name in ("00.bin", "00.idx", "tokenizer/tokenizer.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.processes
def test_pile_shards_without_end_of_document(tmp_path: Path, tokenizer_file: Path) -> None:
    shards = tmp_path / "pile"
    for number, texts in enumerate((TEXTS[:30], TEXTS[30:])):
        shard = write_jsonl(shards / "raw", texts, meta={"pile_set_name": f"Set {number}"})
        (shards / f"0{number}.jsonl.zst").write_bytes(zstandard.compress(shard.read_bytes()))
    config = TokenizeConfig(tokenizer=tokenizer_file, append_eod=False, workers=1)
    _, written = tokenize([shards], tmp_path / "out", config)
    assert written == ["00", "01"]
    assert decoded(tmp_path / "out", "00") + decoded(tmp_path / "out", "01") == TEXTS


@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("gpt2-vocab.json", None)])
def test_gpt2_vocabulary(tmp_path: Path, names: tuple[str, str | None]) -> None:
    vocab_name, merges_name = names[0], names[1] or "gpt2-merges.txt"
    vocab = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["th", "Ġth", "Ġthe", END_OF_DOCUMENT]
    ids = {token: i for i, token in enumerate(vocab)}
    (tmp_path / vocab_name).write_text(json.dumps(ids))
    (tmp_path / merges_name).write_text("#version: 0.2\nt h\nĠ th\nĠth e\n")
    tokenizer, eod_token = load_tokenizer(tmp_path)
    assert eod_token == END_OF_DOCUMENT
    assert tokenizer.get_vocab_size() == len(vocab) == 260
    assert tokenizer.encode("Go the").ids == [ids["G"], ids["o"], ids["Ġthe"]]
    assert tokenizer.decode(tokenizer.encode(TEXTS[3]).ids) == TEXTS[3]
    assert tokenizer.token_to_id(END_OF_DOCUMENT) == 259

    with pytest.raises(ValueError, match=r"no token '</s>' .* --eod-token"):
        load_tokenizer(tmp_path, "</s>")
    with pytest.raises(ValueError, match=r"are not a GPT-2 vocabulary"):
        (tmp_path / merges_name).write_text("no pair here\n")
        load_tokenizer(tmp_path)


@pytest.mark.processes
def test_foreign_tokenizer_neither_cuts_nor_prefixes(tmp_path: Path) -> None:
    foreign = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<s>": 3, "</s>": 4}, [("a", "b")]))
    foreign.add_special_tokens(["<s>", "</s>"])
    foreign.enable_truncation(2)
    foreign.enable_padding(length=8)
    foreign.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 3)]
    )
    foreign.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    file = write_jsonl(tmp_path / "x.jsonl", ["abab" * 3, "b"])
    tokenize([file], tmp_path / "out", TokenizeConfig(tokenizer=tmp_path, workers=1))
    assert documents(tmp_path / "out" / "x") == [[2] * 6 + [4], [1, 4]]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut', "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'["text"]', "a JSON list, not an object"),
        (b'{"content": "x"}', r"no key 'text' among \['content'\] \(see --text-key\)"),
        (b'{"text": 3}', "holds a int, not a string"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\0\0\0", "not valid JSON"),
        (b'{"text": "a\0b"}', "not valid JSON"),
        (b"\xff\xfe{\0", "not UTF-8"),
        (json.dumps({f"k{i}": 1 for i in range(500)}).encode(), "'k103'.* and 492 more"),
    ],
)
def test_malformed_lines_have_a_reason(line: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_text(line, "text")


@pytest.mark.processes
def test_malformed_line_is_named_and_leaves_nothing(
    tmp_path: Path, small: TokenizeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write_jsonl(tmp_path / "bad.jsonl", TEXTS[:5])
    lines = bad.read_text().splitlines()
    bad.write_text("\n".join([*lines[:2], '{"text": "cut', *lines[2:], '{"text": ""}']))
    for flags in (["--tokenizer", str(small.tokenizer)], ["--vocab-size", "300"]):
        argv = ["data", "tokenize", str(bad), "--out", str(tmp_path / "out"), *flags]
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {bad}:3: not valid JSON")
        assert error.endswith("fix the line or pass --skip-invalid")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl"]

    config = TokenizeConfig(tokenizer=small.tokenizer, workers=1, skip_invalid=True)
    manifest, _ = tokenize([bad], tmp_path / "out", config)
    entry = manifest["outputs"]["bad"]
    assert (entry["invalid"], entry["empty"], entry["documents"]) == (1, 1, 5)
    assert decoded(tmp_path / "out", "bad") == [text + END_OF_DOCUMENT for text in TEXTS[:5]]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[: len(data) // 2], "ends early"),
        (lambda data: data[:-1], "ends early"),
        (lambda data: b"plain text, not zstd", "damaged zstd data"),
        (lambda data: data + b"garbage", "damaged zstd data"),
    ],
)
def test_damaged_zst_is_an_error(tmp_path: Path, damage, reason: str) -> None:
    file = write_jsonl(tmp_path / "00.jsonl.zst", TEXTS)
    file.write_bytes(damage(zstandard.compress(file.read_bytes())))
    with pytest.raises(ValueError, match=f"00.jsonl.zst: .*{reason}"):
        list(jsonl.read_chunks(file, lambda count: None))


@pytest.mark.processes
def test_a_file_without_text_is_an_error(tmp_path: Path, small: TokenizeConfig) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(ValueError, match=r"a\.jsonl holds no document with text"):
        tokenize([file], tmp_path / "out", small)
    assert not (tmp_path / "out").exists()


@pytest.mark.processes
def test_a_byte_order_mark_is_no_text(tmp_path: Path, small: TokenizeConfig) -> None:
    for name, mark in (("a", b""), ("b", b"\xef\xbb\xbf")):
        file = write_jsonl(tmp_path / name / "x.jsonl", TEXTS)
        file.write_bytes(mark + file.read_bytes())
        tokenize([file], tmp_path / name / "out", small)
    assert documents(tmp_path / "a/out/x") == documents(tmp_path / "b/out/x")


def word_tokenizer(folder: Path, words: dict[str, int]) -> Path:
    tokens = Tokenizer(models.WordLevel(words, unk_token="the"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.save(str(folder / "words.json"))
    return folder / "words.json"


@pytest.mark.processes
def test_a_vocabulary_with_holes_keeps_its_tokens(tmp_path: Path) -> None:
    """Three entries would fit into 16 bits, and the token 70000 would become 4464 there."""
    words = word_tokenizer(tmp_path, {"the": 0, END_OF_DOCUMENT: 1, "router": 70_000})
    file = write_jsonl(tmp_path / "a.jsonl", ["the router"])
    tokenize([file], tmp_path / "out", TokenizeConfig(tokenizer=words, workers=1))
    assert documents(tmp_path / "out/a") == [[0, 70_000, 1]]


@pytest.mark.processes
def test_a_tokenizer_for_other_text_is_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", ["the router"])
    empty = tmp_path / "empty.json"
    tokens = Tokenizer(models.BPE(vocab={END_OF_DOCUMENT: 0}, merges=[]))
    tokens.save(str(empty))
    with pytest.raises(ValueError, match=r"a\.jsonl has no text of which the tokenizer knows"):
        tokenize([file], tmp_path / "out", TokenizeConfig(tokenizer=empty, workers=1))
    content = json.loads(empty.read_text())
    content["model"]["vocab"]["the"] = 2**31
    empty.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has a token 2147483648; tokens must be below 16777216"):
        tokenize([file], tmp_path / "out", TokenizeConfig(tokenizer=empty, workers=1))
    assert not (tmp_path / "out").exists()


BAD_TOKENIZERS = {
    "empty": ("tokenizer.json", "", "is not a tokenizer.json"),
    "list": ("tokenizer.json", "[]", "is not a tokenizer.json"),
    "no model": ("tokenizer.json", "{}", "is not a tokenizer.json"),
    "config cut off": ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
    "config a list": ("tokenizer_config.json", "[]", "holds no JSON object, but a list"),
    "config, number": ("tokenizer_config.json", '{"eos_token": 5}', "has eos_token = 5; it must"),
    "config, no content": ("tokenizer_config.json", '{"eos_token": {}}', "has eos_token = {}; it"),
    "manifest, list": ("../manifest.json", "[]", "manifest.json holds no JSON object"),
    "manifest, empty": ("../manifest.json", "{}", "a manifest that is not of token files"),
    "manifest, entry": (
        "../manifest.json",
        '{"settings": {}, "training": null, "outputs": {"a": 5}}',
        "a manifest that is not of token files",
    ),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make `a.jsonl`, and its output `out`."""
    home = tmp_path_factory.mktemp("finished")
    tokenize([write_jsonl(home / "a.jsonl", TEXTS)], home / "out", SMALL)
    return home


@pytest.mark.processes
@pytest.mark.parametrize(("file", "text", "reason"), BAD_TOKENIZERS.values(), ids=BAD_TOKENIZERS)
def test_a_damaged_output_is_named(
    finished: Path, tmp_path: Path, file: str, text: str, reason: str
) -> None:
    shutil.copytree(finished / "out", tmp_path / "out")
    (tmp_path / "out/tokenizer" / file).write_text(text)
    with pytest.raises(ValueError, match=reason) as caught:
        tokenize([finished / "a.jsonl"], tmp_path / "out", SMALL)
    assert "\n" not in str(caught.value)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _put(path: Path, start: int, data: bytes) -> None:
    content = path.read_bytes()
    start %= len(content)
    path.write_bytes(content[:start] + data + content[start + len(data) :])


BAD_PAIRS = {
    "no .idx": (lambda p: Path(f"{p}.idx").unlink(), r"a\.idx does not exist"),
    "no .bin": (lambda p: Path(f"{p}.bin").unlink(), r"a\.bin does not exist"),
    "cut .idx": (lambda p: _cut(Path(f"{p}.idx")), r"a\.idx has \d+ bytes, but its header asks"),
    "cut .bin": (lambda p: _cut(Path(f"{p}.bin")), r"a\.bin has \d+ bytes, but .*a\.idx asks for"),
    "empty .idx": (lambda p: Path(f"{p}.idx").write_bytes(b""), r"a\.idx is no index"),
    "text": (lambda p: Path(f"{p}.idx").write_text("text " * 20), r"a\.idx is no index"),
    "numbers": (lambda p: _put(Path(f"{p}.idx"), 18, b"\xff" * 8), "but its header asks for"),
    "lengths": (lambda p: _put(Path(f"{p}.idx"), 34, b"\xff" * 4), "points outside of its tokens"),
    "documents": (lambda p: _put(Path(f"{p}.idx"), -8, b"\x7f" * 8), "points outside"),
}


@pytest.mark.processes
@pytest.mark.parametrize(("damage", "reason"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_a_damaged_pair_is_named(finished: Path, tmp_path: Path, damage, reason: str) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copy(finished / f"out/a{suffix}", tmp_path)
    check_pair(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(ValueError, match=reason):
        check_pair(tmp_path / "a")
    with pytest.raises(ValueError, match=reason):
        find_domains(tmp_path, None)


def test_inputs_are_checked(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for name in ("a.jsonl", "b.jsonl.gz"):
        (tmp_path / "mixed" / name).write_bytes(b"")
    os.mkfifo(tmp_path / "fifo.jsonl")
    one = write_jsonl(tmp_path / "one" / "x.jsonl", TEXTS[:1])
    two = write_jsonl(tmp_path / "two" / "x.jsonl.zst", TEXTS[:1])
    text = write_jsonl(tmp_path / "x.txt", TEXTS[:1])
    assert find_inputs([tmp_path / "one"]) == {"x": one}
    for paths, reason in (
        ([tmp_path / "nowhere"], "nowhere does not exist"),
        ([tmp_path / "empty"], "empty holds no .jsonl"),
        ([text], r"x\.txt is not a \.jsonl"),
        ([one, two], r"would both become x\.bin"),
        ([tmp_path / "mixed"], r"b\.jsonl\.gz is not a .* file; convert it"),
        ([tmp_path / "fifo.jsonl"], "is neither a file nor a folder"),
    ):
        with pytest.raises(ValueError, match=reason):
            find_inputs(paths)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"vocab_size": 100}, "--vocab-size 100 is too small"),
        ({"workers": 0}, "--workers 0"),
        ({"vocab_file": Path("v")}, "belong together"),
        ({"tokenizer": Path("t"), "vocab_file": Path("v"), "merge_file": Path("m")}, "one of them"),
        ({"eod_token": "</s>"}, "--eod-token '</s>'"),
    ],
)
def test_settings_are_checked(flags: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TokenizeConfig(**flags)


@pytest.mark.processes
def test_rerun_adds_what_is_missing_and_replaces_only_by_force(tmp_path: Path) -> None:
    a = write_jsonl(tmp_path / "a.jsonl", TEXTS[:20])
    b = write_jsonl(tmp_path / "b.jsonl", TEXTS[20:])
    out = tmp_path / "out"
    tokenize([a], out, SMALL)
    first = contents(out)
    _, written = tokenize([a], out, SMALL)
    assert written == [] and contents(out) == first

    with pytest.raises(ValueError, match=r"pass --tokenizer .*tokenizer to add to them"):
        tokenize([a, b], out, SMALL)
    reuse = TokenizeConfig(tokenizer=out / "tokenizer", workers=1)
    manifest, written = tokenize([a, b], out, reuse)
    assert written == ["b"] and manifest["outputs"].keys() == {"a", "b"}
    assert {name: contents(out)[name] for name in first if name != "manifest.json"} == {
        name: data for name, data in first.items() if name != "manifest.json"
    }

    write_jsonl(a, TEXTS[:10])
    with pytest.raises(ValueError, match=r"a\.bin exists .* pass --force"):
        tokenize([a, b], out, reuse)
    other = TokenizeConfig(tokenizer=out / "tokenizer", workers=1, append_eod=False)
    with pytest.raises(ValueError, match=r"other settings; pass --force"):
        tokenize([a, b], out, other)
    with pytest.raises(ValueError, match=r"--force would leave \(b\)"):
        tokenize([a], out, other, force=True)
    tokenize([a, b], out, other, force=True)
    assert decoded(out, "a") == TEXTS[:10] and decoded(out, "b") == TEXTS[20:]


@pytest.mark.processes
def test_bad_input_loses_no_finished_work(tmp_path: Path, small: TokenizeConfig) -> None:
    good = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    bad = tmp_path / "b.jsonl"
    bad.write_text("no JSON\n")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"b\.jsonl:1: not valid JSON"):
        tokenize([good, bad], out, small)
    finished = contents(out)
    assert {"a.bin", "a.idx", "manifest.json"} <= finished.keys()
    assert not any(name.startswith((".", "b.")) for name in finished)

    # Replacing everything by other settings is all or nothing.
    other = TokenizeConfig(tokenizer=small.tokenizer, workers=1, append_eod=False)
    with pytest.raises(ValueError, match=r"b\.jsonl:1: not valid JSON"):
        tokenize([good, bad], out, other, force=True)
    assert contents(out) == finished

    write_jsonl(bad, TEXTS[:2])
    _, written = tokenize([good, bad], out, small)
    assert written == ["b"]


@pytest.mark.processes
def test_command_line_error_has_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from megatron.remoe.cli import main; main()", "data"]
    result = subprocess.run(
        [*command, "tokenize", "missing.jsonl", "--out", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr == (
        "error: missing.jsonl does not exist; name a .jsonl or .jsonl.zst file or folder\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom megatron.remoe.cli import main\n"
        "try:\n    main(['data', 'tokenize', '--help'])\n"
        "except SystemExit as done:\n    assert done.code == 0\n"
        "assert not {'torch', 'tokenizers', 'transformers', 'megatron.core'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.processes
def test_held_out_documents_are_in_one_of_two_files(tmp_path: Path) -> None:
    """Equal documents are on one side, and the tokenizer is trained on the other side alone."""
    texts = [*TEXTS, *TEXTS[:9]]
    path, out = write_jsonl(tmp_path / "own.jsonl", texts), tmp_path / "out"
    config = TokenizeConfig(vocab_size=300, workers=1, valid_fraction=0.3)
    manifest, written = tokenize([path], out, config)
    assert written == ["train/own", "valid/own"]
    sides = [[t.removesuffix(END_OF_DOCUMENT) for t in decoded(out, name)] for name in written]
    assert sorted(sides[0] + sides[1]) == sorted(texts)
    assert set(sides[0]).isdisjoint(sides[1]) and 5 < len(sides[1]) < 35
    trained = train_tokenizer(iter(sides[0]), 300)
    assert trained.to_str() == Tokenizer.from_file(str(out / "tokenizer/tokenizer.json")).to_str()
    assert manifest["settings"]["valid_fraction"] == 0.3
    assert tokenize([path], out, config)[1] == []
    with pytest.raises(ValueError, match="tokens of a tokenizer that these inputs would not give"):
        tokenize([path], out, SMALL)
    few = write_jsonl(tmp_path / "few.jsonl", TEXTS[:1])
    with pytest.raises(ValueError, match="few.jsonl has too few documents: none is left for"):
        tokenize([few], tmp_path / "few", config)
    assert not (tmp_path / "few").exists()
    write_jsonl(tmp_path / "corpus/train/a.jsonl", TEXTS)
    write_jsonl(tmp_path / "corpus/valid/a.jsonl", TEXTS)
    with pytest.raises(ValueError, match="has its own validation files; leave --valid-fraction"):
        tokenize([tmp_path / "corpus"], tmp_path / "again", config)
