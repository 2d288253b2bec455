"""Turn the flags of a config into a command line."""

import argparse
import difflib
from typing import Any

from megatron.remoe.run.config import OWN_KEYS

_NEAR = 0.75  # the similarity from which another key is suggested


def to_argv(flags: dict[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """Return the command line of a config.

    `true` passes a switch, `false` and `null` leave a flag out, and a list gives it several values.

    Raises:
        ValueError: A key is unknown, with the nearest valid one, or a value is of the wrong kind.
    """
    actions = {
        option[2:].replace("-", "_"): (option, action)
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and not isinstance(action, argparse._HelpAction)
    }
    argv = []
    for key, value in flags.items():
        if key not in actions:
            raise ValueError(_unknown(key, [*actions, *OWN_KEYS]))
        option, action = actions[key]
        _check_kind(key, value, action)
        is_switch = action.nargs == 0
        if isinstance(action, argparse.BooleanOptionalAction) and value is False:
            argv.append(_opposite(option))
        elif value is None or (value is False and is_switch):
            continue
        elif is_switch:
            argv.append(option)
        elif isinstance(value, list):
            argv += [option, *map(str, value)]
        elif str(value).startswith("-"):  # argparse would take it for a flag
            argv.append(f"{option}={value}")
        else:
            argv += [option, str(value)]
    return argv


def _unknown(key: str, known: list[str]) -> str:
    if key == "sweep":
        return "config key 'sweep' makes this file a sweep; run it with remoe sweep"
    if key in OWN_KEYS:
        return f"config key {key!r} cannot be given here; write it into the config's file"
    plain = key.lower().replace("-", "_")
    near = difflib.get_close_matches(plain, known, n=1, cutoff=_NEAR)
    hint = f"did you mean {near[0]!r}?" if near else "no flag is similar; remove it"
    return f"unknown config key {key!r}; {hint}"


def _check_kind(key: str, value: Any, action: argparse.Action) -> None:
    if isinstance(value, dict):
        raise ValueError(f"config key {key!r} is a mapping; flags take values or lists")
    if isinstance(value, list):
        if action.nargs is None or action.nargs == 0:
            raise ValueError(f"config key {key!r} is the list {value}; it takes one value")
        if not all(isinstance(one, str | int | float) for one in value):
            raise ValueError(
                f"config key {key!r} is {value}; its list must consist of plain values"
            )
    elif not isinstance(value, str | int | float | None):
        raise ValueError(
            f"config key {key!r} is {value!r}, a {type(value).__name__}; put it in quotes to pass "
            f"it as text"
        )
    if "\0" in str(value) or "\\x00" in repr(value):
        raise ValueError(f"config key {key!r} is {value!r}, with a NUL in it; remove that")
    if action.nargs == 0 and not isinstance(value, bool | None):
        raise ValueError(f"config key {key!r} is {value!r}; it must be true or false")


def _opposite(option: str) -> str:
    if option.startswith("--no-"):
        return f"--{option[5:]}"
    return f"--no-{option[2:]}"
