"""What follows from a folder of token files, and which documents of a file are held out."""

import json
from pathlib import Path

import pytest

from megatron.remoe.data.holdout import Side
from megatron.remoe.data.root import with_data_root
from megatron.remoe.data.tokenizer import END_OF_DOCUMENT, save_tokenizer, train_tokenizer
from megatron.remoe.run.config import load_config

VOCAB = 280


def entry(documents: int, tokens: int) -> dict:
    names = ("input_sha256", "pair_bytes", "empty", "invalid")
    return dict.fromkeys(names) | {"documents": documents, "tokens": tokens}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("root") / "tokenizer"
    texts = (f"def f_{i}(x): return x * {i}" for i in range(60))
    save_tokenizer(train_tokenizer(texts, VOCAB), END_OF_DOCUMENT, folder)
    return folder


def root_of(folder: Path, tokenizer: Path, outputs: dict, **more) -> str:
    (folder / "tokenizer").symlink_to(tokenizer)
    manifest = {"settings": {}, "training": None, "outputs": outputs} | more
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


SPLIT = {"train/a": entry(9, 700), "train/b": entry(9, 300), "valid/a": entry(1, 70)}


def test_files_with_validation_files_are_a_blend_and_named_sets(tmp_path, tokenizer):
    root = root_of(tmp_path, tokenizer, SPLIT)
    assert with_data_root({"lr": 1}, root) == {
        "lr": 1,
        "train_data_path": [700, f"{root}/train/a", 300, f"{root}/train/b"],
        "multiple_validation_sets": True,
        "full_validation": True,
        "valid_data_path": [f"{root}/valid/a"],
        "validation_set_names": ["a"],
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": f"{root}/tokenizer",
        "padded_vocab_size": 384,
    }


def test_files_alone_are_split_so_that_each_has_a_validation_document(tmp_path, tokenizer):
    root = root_of(tmp_path, tokenizer, {"a": entry(500, 700), "b": entry(10, 300)})
    flags = with_data_root({}, root)
    assert flags["data_path"] == [700, f"{root}/a", 300, f"{root}/b"]
    train, valid, test = map(float, flags["split"].split(","))
    assert round(train * 10) == 9 and train + valid == 1 and test == 0  # as Megatron rounds


def test_what_the_config_gives_stays(tmp_path, tokenizer):
    root = root_of(tmp_path, tokenizer, SPLIT)
    given = {
        "train_data_path": [f"{root}/train/b"],
        "tokenizer_model": "elsewhere",
        "tokenizer_type": "HuggingFaceTokenizer",
    }
    assert with_data_root(given, root) == given
    given = {"multiple_validation_sets": False, "padded_vocab_size": 512, "masked_lm": True}
    flags = with_data_root(given, root)
    assert given.items() <= flags.items() and "full_validation" not in flags
    assert flags["valid_data_path"] == [70, f"{root}/valid/a"]
    assert with_data_root({"mock_data": True}, root).keys() == {
        "mock_data", "tokenizer_type", "tokenizer_model", "padded_vocab_size",
    }  # fmt: skip


MISTAKES = {
    "other data": ({"data_path": ["data/x"]}, SPLIT, "but data_path names data/x, which is not in"),
    "few rows": ({"padded_vocab_size": 256}, SPLIT, "padded_vocab_size is 256, and the tokens in"),
    "one for the mask": (
        {"padded_vocab_size": VOCAB, "masked_lm": True}, SPLIT, f"need {VOCAB + 1} rows; choose"
    ),
    "both kinds": ({}, SPLIT | {"c": entry(9, 9)}, r"\(train/a\) and files without \(c\)"),
    "one document": ({}, {"a": entry(1, 9)}, "a has 1 document, which cannot be both"),
    "no validation": ({}, {"train/a": entry(9, 9)}, "holds no files valid/"),
    "nothing": ({}, {}, "are not finished; run the same remoe data tokenize again"),
}  # fmt: skip


@pytest.mark.parametrize(("flags", "outputs", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_contradiction_is_refused_by_name(tmp_path, tokenizer, flags, outputs, message):
    root = root_of(tmp_path, tokenizer, outputs)
    with pytest.raises(ValueError, match=message):
        with_data_root(flags, root)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path, tokenizer):
    root = root_of(tmp_path, tokenizer, SPLIT)
    save_tokenizer(train_tokenizer(iter(["abab"]), 258), END_OF_DOCUMENT, tmp_path / "other")
    given = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path / "other")}
    with pytest.raises(ValueError, match="are of another vocabulary; leave the tokenizer out"):
        with_data_root(given, root)
    given["tokenizer_model"] = str(tokenizer)  # the same one by another path
    assert with_data_root(given, root)["tokenizer_model"] == str(tokenizer)


def test_a_folder_that_was_not_tokenized_is_named_with_the_remedy(tmp_path):
    with pytest.raises(ValueError, match="remoe data tokenize FILES --out"):
        with_data_root({}, str(tmp_path / "nowhere"))


def test_an_override_of_the_folder_moves_the_paths_below_it(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "data_root: a\ndata_path: [a/x, a/b]\ntokenizer_model: abc/t\ntokenizer_type: Null\n"
    )
    flags = load_config(tmp_path / "run.yaml", ["data_root=z"]).flags
    assert flags["data_path"] == ["z/x", "z/b"] and flags["tokenizer_model"] == "abc/t"


def test_a_document_is_on_one_side_by_its_text_and_in_the_share():
    train, valid = Side(0.2, False), Side(0.2, True)
    texts = [f"document {i}" for i in range(4000)]
    held_out = [text for text in texts if valid.keeps(text)]
    assert all(train.keeps(text) != valid.keeps(text) for text in texts)
    assert len(held_out) == pytest.approx(800, abs=4 * 25.3)  # of a binomial distribution
    assert all(Side(0.4, True).keeps(text) for text in held_out)
