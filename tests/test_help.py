"""The help of every command: what it does, an example that parses, and what each option is.

The commands of the documentation parse as well.
"""

import re
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


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def documented() -> Iterator[tuple[str, str]]:
    """Every line of shell in the documentation that starts with `remoe`, and the page it is on.

    Commands in the tables of the README are among them. A synopsis, with brackets around what may
    be left out, is no line of shell.
    """
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        if page.name == "README.md" and page.parent == ROOT:
            blocks += re.findall(r"`(remoe \S+ [^`\n]+)`", text)
        for block in blocks:
            for line in re.split(r"\n|&&", block.replace("\\\n", " ")):
                command = re.sub(r"^\s*([A-Z_]+=\S+\s+)*", "", line)
                if command.startswith("remoe ") and "[--" not in command:
                    yield page.relative_to(ROOT).as_posix(), command


def test_the_commands_of_the_documentation_parse():
    lines = list(documented())
    assert len(lines) > 100 and {"README.md", "docs/quickstart.md"} <= set(dict(lines))
    wrong = []
    for page, line in lines:
        words = shlex.split(line, comments=True)[1:]
        name = next((n for n in (" ".join(words[:2]), words[0]) if n in COMMANDS), None)
        if name is None:
            if words[0] != "--version":
                wrong.append(f"{page}: {line}: there is no such command")
            continue
        try:
            COMMANDS[name].make_context(name, words[len(name.split()) :])
        except Exception as error:
            wrong.append(f"{page}: {line}: {getattr(error, 'message', error)}")
        for word in words:
            if word.startswith("examples/") and word.isascii() and not set("{*<") & set(word):
                exists = (ROOT / word.partition("=")[0]).exists()
                wrong += [] if exists else [f"{page}: {line}: {word} does not exist"]
    assert wrong == []
