"""Turn an error that Megatron raises into one line that names the config's values behind it."""

import argparse
import ast
import linecache
import re
import traceback
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType

_MOST_VALUES = 4
_UNTOLD = (ArithmeticError, AttributeError, IndexError, KeyError, NameError, TypeError)


class Foreign(ValueError):
    """An error of Megatron or torch in one line, which perhaps names no key of the config."""


def one_line(text: object) -> str:
    """Return the text with every run of white space replaced by one space."""
    return " ".join(str(text).split())


def explain(error: BaseException, args: argparse.Namespace | None) -> ValueError:
    """Return the same mistake in one line.

    An assertion without a message is described by its condition. The arguments that the failing
    statement of Megatron names are added with their values.

    Args:
        error: The error that Megatron, torch below it, or this project has raised.
        args: Megatron's arguments, if they are known.
    """
    frame = _failing_frame(error.__traceback__)
    message = re.sub(r"( when instantiating \w+)+$", "", one_line(error))
    if isinstance(error, ValueError) and frame is not None and _is_ours(frame):
        return ValueError(message)
    statement = None if frame is None else _statement(frame)
    if isinstance(error, AssertionError) and not message:
        message = f"Megatron requires {_condition(statement)}"
    elif isinstance(error, _UNTOLD) or not message:
        message = (
            f"Megatron fails with {type(error).__name__}: {message} in {_condition(statement)}"
        )
    values = {} if args is None else _values(statement, args)
    if not values:
        return Foreign(message)
    named = ", ".join(f"{key} is {value}" for key, value in values.items())
    remedy = "it" if len(values) == 1 else "one of them"
    return Foreign(f"{message.rstrip('.')} ({named}; change {remedy})")


def names(message: str, keys: Collection[str]) -> bool:
    """Return whether a message names one of these keys of a config, perhaps as a flag."""
    words = re.findall(
        r"[a-z0-9]+(?:[_-][a-z0-9]+)+|\b(?:lr|seed|split|save|load|optimizer)\b", message
    )
    return any(word.replace("-", "_") in keys for word in words)


def _failing_frame(trace: TracebackType | None) -> traceback.FrameSummary | None:
    """Return the innermost frame in Megatron or in this package."""
    for frame in reversed(traceback.extract_tb(trace)):
        if "megatron" in Path(frame.filename).parts and frame.name != "__torch_function__":
            return frame
    return None


def _is_ours(frame: traceback.FrameSummary) -> bool:
    return Path(frame.filename).is_relative_to(Path(__file__).parents[1])


def _statement(frame: traceback.FrameSummary) -> ast.AST | None:
    first = frame.lineno or 0
    lines = [
        linecache.getline(frame.filename, n) for n in range(first, (frame.end_lineno or 0) + 1)
    ]
    text = "".join(line.strip() + "\n" for line in lines)
    for attempt in (text, f"{text}    pass", text.removeprefix("return ").rstrip(",\n")):
        try:
            body = ast.parse(attempt).body
        except SyntaxError:
            continue
        return body[0] if body else None
    return None


def _condition(statement: ast.AST | None) -> str:
    if statement is None:
        return "its own code"
    node = statement.test if isinstance(statement, ast.Assert) else statement
    return re.sub(r"\b(args|self\.config|self|config)\.", "", one_line(ast.unparse(node)))


def _values(statement: ast.AST | None, args: argparse.Namespace) -> dict[str, object]:
    """Return the config's keys that a statement names, with their values."""
    from megatron.remoe.arguments import megatron_parser

    options = {a.dest: a.option_strings[0] for a in megatron_parser()._actions if a.option_strings}
    found = {}
    for name in dict.fromkeys(_identifiers(statement)):
        if name in options and hasattr(args, name):
            key = options[name].removeprefix("--").replace("-", "_")
            found[key] = getattr(args, name)
    return dict(list(found.items())[:_MOST_VALUES])


def _identifiers(statement: ast.AST | None) -> Iterator[str]:
    for node in ast.walk(statement) if statement is not None else ():
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
