"""Encode lines of JSON as token ids, in worker processes and in order.

This module imports neither torch nor Megatron, because every worker imports it.
"""

import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np
from tokenizers import Tokenizer

from megatron.remoe import processes
from megatron.remoe.data.holdout import Side
from megatron.remoe.data.jsonl import Chunk, parse_text

_tokenizer: Tokenizer
_text_key: str
_suffix: list[int]


@dataclass(frozen=True)
class Encoded:
    """The documents of a chunk.

    Attributes:
        ids: tokens of all documents, one document after the other.
        lengths: number of tokens of each document.
        text_bytes: bytes of the text in UTF-8.
        empty: number of documents that are left out because they have no text.
        invalid: number and reason of each malformed line.
    """

    ids: np.ndarray
    lengths: list[int]
    text_bytes: int
    empty: int
    invalid: list[tuple[int, str]]


def start_workers(
    tokenizer: Tokenizer, *, workers: int, text_key: str, eod_id: int | None
) -> ProcessPoolExecutor:
    """Return a pool for `encode_chunks`; `eod_id` ends every document unless it is None.

    The processes are spawned: forking after the tokenizer's threads have started may deadlock.
    """
    return ProcessPoolExecutor(
        max_workers=workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(os.getpid(), tokenizer.to_str(), text_key, [] if eod_id is None else [eod_id]),
    )


def encode_chunks(
    pool: ProcessPoolExecutor, chunks: Iterable[Chunk], *, workers: int, side: Side | None = None
) -> Iterator[Encoded]:
    """Yield the encoded chunks in order, with at most a few per worker under way.

    `Executor.map` and `Pool.imap` would read the whole file before the workers need it. Documents
    that are not of the side are left out without being counted.

    Raises:
        ValueError: a worker was killed.
    """
    under_way: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            under_way.append(pool.submit(_encode_chunk, chunk, side))
            if len(under_way) >= 3 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            f"one of the {workers} worker processes was killed, perhaps because memory ran out; "
            f"use fewer (--workers)"
        ) from error


def _start_worker(parent: int, tokenizer_json: str, text_key: str, suffix: list[int]) -> None:
    global _tokenizer, _text_key, _suffix
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets Ctrl-C and ends this process
    processes.end_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are several processes already
    _tokenizer = Tokenizer.from_str(tokenizer_json)
    # A document may mention "<|endoftext|>", which must not end it.
    _tokenizer.encode_special_tokens = True
    _text_key, _suffix = text_key, suffix


def _encode_chunk(chunk: Chunk, side: Side | None) -> Encoded:
    texts: list[str] = []
    invalid: list[tuple[int, str]] = []
    empty = 0
    for number, line in enumerate(chunk.lines, chunk.first_line):
        try:
            text = parse_text(line, _text_key)
        except ValueError as error:
            invalid.append((number, str(error)))
            continue
        if side is not None and not side.keeps(text):
            continue
        if text:
            texts.append(text)
        else:
            empty += 1
    encodings = _tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    documents = [encoding.ids + _suffix for encoding in encodings]
    return Encoded(
        ids=np.array([token for document in documents for token in document], dtype=np.int32),
        lengths=[len(document) for document in documents],
        text_bytes=sum(len(text.encode()) for text in texts),
        empty=empty,
        invalid=invalid,
    )
