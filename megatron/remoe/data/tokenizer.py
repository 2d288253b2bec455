"""Train byte-pair tokenizers, load them from any of their files, and save them for Megatron.

Megatron reads the saved folder with
`--tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER`.
"""

import json
import reprlib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer, Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron.remoe.files import read_json_object

END_OF_DOCUMENT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # every byte, and the end-of-document token
_MOST_TOKENS = 2**24  # saving takes time for every hole of a vocabulary
CONFIG = "tokenizer_config.json"
GPT2_FILES = (("vocab.json", "merges.txt"), ("gpt2-vocab.json", "gpt2-merges.txt"))


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's pre-tokenization and `<|endoftext|>` as token 0.

    The result depends only on the texts. It has fewer than `vocab_size` entries if the texts do not
    hold enough different pairs.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: Path, eod_token: str | None = None) -> tuple[Tokenizer, str]:
    """Load a `tokenizer.json`, or a folder with one or with GPT-2's vocabulary and merges.

    Returns:
        The tokenizer and its end-of-document token. This is `eod_token`, or else the `eos_token` of
        a `tokenizer_config.json` in the same folder, or else `<|endoftext|>`.

    Raises:
        ValueError: there is no readable tokenizer, or the token is not in its vocabulary.
    """
    if path.is_dir():
        for vocab, merges in GPT2_FILES:
            if (path / vocab).is_file() and (path / merges).is_file():
                return load_gpt2_tokenizer(path / vocab, path / merges, eod_token)
        if not (path / "tokenizer.json").is_file():
            raise ValueError(
                f"{path} holds neither tokenizer.json nor vocab.json with merges.txt; "
                "name a folder or file that does"
            )
        path = path / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"tokenizer {path} does not exist; check --tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is not a tokenizer.json ({reason}); copy it again") from error
    return _with_end_of_document(tokenizer, eod_token or _configured_eod(path.parent), path)


def load_gpt2_tokenizer(
    vocab_file: Path, merge_file: Path, eod_token: str | None = None
) -> tuple[Tokenizer, str]:
    """Load GPT-2's `vocab.json` and `merges.txt`; see `load_tokenizer`."""
    for option, file in (("--vocab-file", vocab_file), ("--merge-file", merge_file)):
        if not file.is_file():
            raise ValueError(f"{file} does not exist; check {option}")
    try:
        gpt2 = ByteLevelBPETokenizer.from_file(str(vocab_file), str(merge_file))
        tokenizer = Tokenizer.from_str(gpt2.to_str())
    except Exception as error:  # tokenizers raises bare Exception
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{vocab_file} and {merge_file} are not a GPT-2 vocabulary ({reason}); copy them again"
        ) from error
    return _with_end_of_document(tokenizer, eod_token, vocab_file)


def save_tokenizer(tokenizer: Tokenizer, eod_token: str, folder: Path) -> None:
    """Write `tokenizer.json`, and the `tokenizer_config.json` that transformers needs."""
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eod_token,
        "clean_up_tokenization_spaces": False,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def largest_id(tokenizer: Tokenizer) -> int:
    """Return the largest token, which exceeds the size of a vocabulary with holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)


def _configured_eod(folder: Path) -> str | None:
    if not (folder / CONFIG).is_file():
        return None
    return special_token(folder / CONFIG, "eos_token")


def special_token(path: Path, name: str) -> str | None:
    """Return a special token that a `tokenizer_config.json` names, or None.

    Raises:
        ValueError: the file is damaged, or the value is not a token.
    """
    given = read_json_object(path, "copy it again").get(name)
    token = given.get("content") if isinstance(given, dict) else given
    if not isinstance(token, str | None) or (given is not None and token is None):
        raise ValueError(
            f"{path} has {name} = {reprlib.repr(given)}; it must be a token of the vocabulary"
        )
    return token


def _with_end_of_document(
    tokenizer: Tokenizer, eod_token: str | None, path: Path
) -> tuple[Tokenizer, str]:
    if (most := largest_id(tokenizer)) >= _MOST_TOKENS:
        raise ValueError(f"{path} has a token {most}; tokens must be below {_MOST_TOKENS}")
    eod_token = eod_token or END_OF_DOCUMENT
    if tokenizer.token_to_id(eod_token) is None:
        raise ValueError(
            f"{path} has no token {eod_token!r} to end documents with; name one with --eod-token"
        )
    tokenizer.add_special_tokens([eod_token])
    # A tokenizer.json may have the truncation and padding of the model that it was made for.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, eod_token
