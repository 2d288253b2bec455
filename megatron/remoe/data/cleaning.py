"""Clean texts, and tell which are worth training on: not generated tables and noise."""

import hashlib
import re

MIN_CHARS = 500
MAX_LINE_CHARS = 1_000
MAX_MEAN_LINE_CHARS = 160
MAX_DIGIT_SHARE = 0.15
MIN_LETTER_SHARE = 0.45
MIN_PROSE_SHARE = 0.75

GENERATED = re.compile(r"@generated|auto(?:matically)?[- ]?generated|do not edit", re.IGNORECASE)
LEADING_COMMENT = re.compile(r"\s*(?:/\*.*?\*/|<!--.*?-->|(?:(?://|#(?!\w))[^\n]*\n)+)", re.DOTALL)
LEGAL = re.compile(r"copyright|licen[cs]e", re.IGNORECASE)
HEADER_CHARS = 2_000


def clean_text(text: str) -> str:
    """Return `text` with Unix newlines, without trailing spaces and leading license comments."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    while (comment := LEADING_COMMENT.match(text)) and LEGAL.search(comment.group()):
        text = text[comment.end() :]
    lines = [line.rstrip() for line in text.split("\n")]
    return "\n".join(lines).strip("\n") + "\n"


def is_worth_training_on(text: str, *, prose: bool) -> bool:
    """Return whether a text was written by people and is not generated, minified, tabular or tiny.

    With `prose`, it must also have the letters and spaces of running text.
    """
    if len(text) < MIN_CHARS or "\0" in text or GENERATED.search(text, 0, HEADER_CHARS):
        return False
    lines = text.split("\n")
    if max(map(len, lines)) > MAX_LINE_CHARS or len(text) > MAX_MEAN_LINE_CHARS * len(lines):
        return False
    visible = len(text) - sum(map(str.isspace, text))
    letters = sum(map(str.isalpha, text))
    digits = sum(map(str.isdigit, text))
    if digits > MAX_DIGIT_SHARE * visible or letters < MIN_LETTER_SHARE * visible:
        return False
    return not prose or letters >= MIN_PROSE_SHARE * visible


def content_key(text: str) -> bytes:
    """Return the digest of a text without its spacing; duplicates have the same digest."""
    return hashlib.sha256(" ".join(text.split()).encode()).digest()
