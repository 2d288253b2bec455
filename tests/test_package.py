"""The version of the package, in its one place, and the top level of the `remoe` command."""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup

import remoe
from megatron.remoe.cli.app import PANELS, app

ROOT = Path(__file__).parents[1]


def python(code: str, *arguments: str | Path) -> list[str]:
    """Lines that the code prints in a new process, which can miss packages that this one has."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "120", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def without(module: str) -> str:
    """Code after which the module cannot be imported."""
    return f"import sys; sys.modules[{module!r}] = None\n"


REMOE = "from megatron.remoe.cli import main; main()"


def test_a_build_reads_the_version_without_torch():
    code = (
        "from setuptools.config.pyprojecttoml import read_configuration\n"
        "print(read_configuration(sys.argv[1])['project']['version'])"
    )
    assert python(without("torch") + code, ROOT / "pyproject.toml") == [remoe.__version__]


def test_the_command_prints_its_version_and_that_of_the_imported_megatron():
    ours, megatron = python(REMOE, "--version")
    assert ours == f"remoe {remoe.__version__}"
    code = "from megatron.core import package_info as p; print(p.__version__.partition('+')[0])"
    (version,) = python(code)
    assert megatron.startswith(f"megatron-core {version}, imported from ")


def test_without_megatron_the_command_prints_its_version_and_what_to_install():
    ours, megatron = python(without("megatron.core") + REMOE, "--version")
    assert ours == f"remoe {remoe.__version__}"
    assert megatron.startswith("megatron-core is not installed; run: pip install 'remoe[megatron]'")


def test_the_help_shows_every_command_in_its_panel():
    """One that is in no panel fails on import, and one that does not exist is missing here."""
    shown: dict[str, list[str]] = {}
    for line in python(REMOE, "--help"):
        if line.startswith("╭─ "):
            title = line.split()[1]
            shown[title] = []
        elif line.startswith("│ ") and line[2] != " ":
            shown[title].append(line.split()[1])
    options = shown.pop("Options")
    assert "--version" in options
    assert list(shown.items()) == [(title, list(names)) for title, names in PANELS.items()]


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
