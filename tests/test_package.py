"""The version of the package, in its one place, and the top level of the `remoe` command."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import remoe
from megatron.remoe.cli import missing
from megatron.remoe.cli.app import PANELS
from megatron.remoe.data.sources import dependency_closure

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]


def start(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, which can miss packages that this one has."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "120", "CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def python(code: str, *arguments: str | Path) -> list[str]:
    """The lines that code prints in a new process that ends well."""
    done = start(code, *arguments)
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


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# What may import which extras, beside what is always there; the first that fits counts.
USERS = (
    ("remoe/hf/", ("hf",)),
    ("remoe/", ()),
    ("megatron/remoe/evaluate/harness.py", ("eval", "megatron")),
    ("megatron/remoe/analysis/wandb_run.py", ("analysis", "wandb")),
    ("megatron/remoe/analysis/", ("analysis",)),
    ("megatron/remoe/", ("megatron",)),
    ("examples/continue_training.py", ("hf",)),
    ("examples/symptoms.py", ("analysis",)),
    ("examples/vision/", ("vision",)),
    ("examples/", ("megatron",)),
)
# Modules that are used where they are there, or brought by what they are for.
OPTIONAL = {"triton", "megatron.bridge"}


def declared(extras: Iterable[str]) -> dict[str, Requirement]:
    """The requirements in pyproject.toml by name, with those of `remoe[...]` among them."""
    found: dict[str, Requirement] = {}
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    for requirement in map(Requirement, lines):
        if requirement.name == "remoe":
            found |= declared(requirement.extras)
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def foreign_imports(file: Path) -> set[str]:
    """The packages of others that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    ours = re.compile(r"(remoe|tests|megatron\.remoe)(\.|$)")
    tops = {
        ".".join(name.split(".")[:2]) if name.startswith("megatron.") else name.partition(".")[0]
        for name in found - {"megatron"}
        if not ours.match(name)
    }
    return tops - set(sys.stdlib_module_names) - OPTIONAL


@pytest.fixture(scope="module")
def owners() -> dict[str, set[str]]:
    """The distributions that have a module, by the module's name."""
    found = metadata.packages_distributions()
    owners = {top: set(map(canonicalize_name, names)) for top, names in found.items()}
    return owners | {"megatron": {"megatron-core"}}


def test_every_import_is_of_a_package_that_is_declared(owners):
    undeclared = []
    for folder in ("remoe", "megatron/remoe", "examples"):
        for file in (ROOT / folder).rglob("*.py"):
            name = str(file.relative_to(ROOT))
            extras = next(extras for start, extras in USERS if name.startswith(start))
            for module in foreign_imports(file):
                top = module.partition(".")[0]
                if not owners.get(top, {top}) & declared(extras).keys():
                    undeclared.append(f"{name} imports {module}, which is in none of {extras}")
    assert undeclared == []


# Code after which only the modules in the first argument can be imported, beside Python's and ours.
RESTRICTED = """
import sys
import sysconfig

sysconfig.get_config_vars()  # from a module of Python's own, which is in no list of its names
allowed = {*sys.argv.pop(1).split(","), *sys.stdlib_module_names, "remoe"}

class Restriction:
    @staticmethod
    def find_spec(name, path=None, target=None):
        is_ours = name == "megatron" or f"{name}.".startswith("megatron.remoe.")
        if not is_ours and name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Restriction)
"""


def test_the_extra_for_analysis_is_enough_to_draw_and_compare_runs(owners, tmp_path):
    """Runs that were trained elsewhere, in an environment without Megatron and transformers."""
    names = set()
    for name, requirement in declared(["analysis"]).items():
        names |= {name, *dependency_closure(name, frozenset({"", *requirement.extras}))}
    allowed = {module for module, of in owners.items() if of & names}
    assert "transformers" not in allowed and {"typer", "scipy"} < allowed
    for seed, run in enumerate(("a", "b")):
        (tmp_path / run).mkdir()
        (tmp_path / run / "config.yaml").write_text(f"num_layers: 1\nseed: {seed}\n")
        rows = [f'{{"iteration": {i}, "lm_loss": {9 - i}.5, "tokens": {i}}}\n' for i in (1, 2, 3)]
        rows += [f'{{"iteration": 3, "split": "valid", "lm_loss": 6.{seed}}}\n']
        (tmp_path / run / "metrics.jsonl").write_text("".join(rows))
    code = RESTRICTED + (
        "from megatron.remoe.cli import main\n"
        "for argv in (['plot', sys.argv[1]], ['compare', *sys.argv[1:]], ['generate', 'm', 'p']):\n"
        "    try: main(argv)\n"
        "    except SystemExit as end: print('exit', end.code or 0)\n"
    )
    out = python(code, ",".join(sorted(allowed)), tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a/curves.png").stat().st_size > 1000
    assert [line for line in out if line.startswith("exit")] == ["exit 0", "exit 0", "exit 2"]


def test_a_missing_package_is_named_with_the_extras_that_have_it():
    done = start(without("typer") + REMOE, "--help")
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(
        r"error: typer is not installed; run: pip install 'remoe\[megatron]'.*\n", done.stderr
    )
    assert missing.remedy("megatron.core") == (
        "megatron-core is not installed; run: pip install 'remoe[megatron]'"
    )
    assert missing.remedy("no_such_package") is None


def test_the_image_has_what_exists_and_is_installed_by_the_documented_line():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    copied = [name for line in re.findall(r"^COPY (.*)", text, re.M) for name in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    kept = re.findall(r"^!(.*)", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert kept == copied
    page = (ROOT / "docs/installation.md").read_text()
    (line,) = re.findall(r"uv pip install (--system .*?) +&&", text)
    line = line.replace("--system --no-cache ", "").replace("${TORCH_BACKEND}", "cpu")
    assert f"\nuv pip install {line}\n" in page
    # In NVIDIA's container, what the extra requires beside its torch is named package by package.
    (block,) = re.findall(r"pip install (accelerate .*?)\npython", page, re.DOTALL)
    words = block.replace("\\\n", " ").replace("'", "").split()
    named = {canonicalize_name(Requirement(word).name) for word in words}
    assert named == declared(["megatron"]).keys() - {"torch", "numpy", "megatron-core"}
