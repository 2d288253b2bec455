"""The help of every command: what it does, an example that parses, and what each option is."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

from megatron.remoe.cli.app import app

ROOT = Path(__file__).parents[1]


def commands(group: TyperGroup, prefix: str = "") -> Iterator[tuple[str, typer.core.TyperCommand]]:
    """Every command below a group, by its name with those of its groups."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_explains_it_with_an_example_that_parses(name):
    command = COMMANDS[name]
    assert command.help[0].isupper() and ":" not in command.help.split()[0]
    assert command.help.strip().endswith(".")
    program, line = command.epilog.removeprefix("Example: ").split(maxsplit=1)
    words = shlex.split(line)
    group = name.split()
    assert program == "remoe" and words[: len(group)] == group
    context = command.make_context(name, words[len(group) :])  # raises for an unknown option
    assert context.args == []
    for word in words:
        assert not word.startswith("examples/") or (ROOT / word).exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_says_what_it_is(name):
    for option in COMMANDS[name].params:
        text = option.help
        assert len(text.split()) > 3 and text[0].isupper() and text.endswith("."), option.name
        if not option.required and option.default is None and option.name != "overrides":
            assert "default" in text


def test_an_unknown_option_in_an_example_would_be_seen():
    with pytest.raises(Exception, match="No such option: --steps"):
        COMMANDS["doctor"].make_context("doctor", ["--steps", "3"])
