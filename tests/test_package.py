"""The version of the package, in its one place, and the top level of the `remoe` command."""

import subprocess
import sys
from pathlib import Path

import pytest

import remoe
from megatron.remoe.cli.app import PANELS

pytestmark = pytest.mark.processes

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
