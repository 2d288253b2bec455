"""What is published: the wheel works beside an installed megatron-core, away from this checkout."""

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[1]
SITE = Path(find_spec("megatron.core").origin).parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, without this checkout on its path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    if not (ROOT / ".git").exists():
        pytest.skip("git, which knows the files of the project, does not know this folder")
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "checkout"
    for name in run("git", "ls-files", "-z", cwd=ROOT).split("\0")[:-1]:
        if os.path.lexists(ROOT / name):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name, follow_symlinks=False)
    # What a checkout has after it was used must not be published.
    for name in ("data/corpus.jsonl", "runs/quickstart/metrics.jsonl", "tests/__pycache__/x.pyc",
                 "examples/own_script/__pycache__/x.pyc"):  # fmt: skip
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=copy)
    return folder / "dist"


def test_the_sdist_has_what_it_needs_and_no_more(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "remoe/routing.py"} <= names
    assert {"megatron/remoe/cli/app.py", "megatron/remoe/examples/quickstart.yaml"} <= names
    assert "megatron/__init__.py" not in names
    unwanted = ("data/", "runs/", ".venv", "shared")
    assert [n for n in names if n.startswith(unwanted) or "__pycache__" in n] == []


def test_the_wheel_adds_to_the_namespace_and_does_not_own_it(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    modules = {str(p.relative_to(ROOT)) for p in ROOT.glob("megatron/remoe/**/*.py")}
    modules |= {str(p.relative_to(ROOT)) for p in ROOT.glob("remoe/**/*.py")}
    modules.add("megatron/remoe/run/pretrain.sbatch")
    modules |= {f"megatron/remoe/analysis/report/page.{kind}" for kind in ("css", "html", "js")}
    tracked = set(run("git", "ls-files", cwd=ROOT).splitlines())
    examples = {f"megatron/remoe/{name}" for name in tracked if name.startswith("examples/")}
    assert "megatron/remoe/examples/bases/llama.yaml" in examples
    assert {name for name in names if ".dist-info/" not in name} == (modules & tracked) | examples
    assert "megatron/__init__.py" not in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """An environment with the wheel: megatron-core lies beside it, the rest is on its path."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv/bin/python"
    site = Path(
        run(python, "-c", "import sysconfig as s; print(s.get_path('purelib'))", cwd=folder).strip()
    )
    (site / "megatron").mkdir()
    for name in ("core", "training"):
        (site / "megatron" / name).symlink_to(SITE / "megatron" / name)
    # A plain line: the .pth files of that folder, such as an editable install's, stay unread.
    (site / "dependencies.pth").write_text(f"{SITE}\n")
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", python, "--quiet", "install", "--no-deps"]
    run(*pip, "--no-index", "--ignore-installed", wheel, cwd=folder)
    return folder / "venv"


def test_modules_come_from_the_wheel_and_megatron_from_megatron_core(installed, tmp_path):
    modules = [
        "remoe",
        "megatron.remoe",
        "megatron.remoe.cli",
        "megatron.core",
        "megatron.training",
    ]
    code = f"import importlib\nfor m in {modules}: print(importlib.import_module(m).__file__)"
    out = run(installed / "bin/python", "-W", "ignore", "-c", code, cwd=tmp_path).splitlines()
    (site,) = installed.glob("lib/python*/site-packages")
    rooms = ["megatron/remoe", "megatron/remoe/cli"]
    folders = ["remoe", *rooms, "megatron/core", "megatron/training"]
    assert [str(Path(path).parent) for path in out] == [str(site / name) for name in folders]
    # This checkout is nowhere on the path, so that the above can fail.
    code = "import sys; print(*sys.path, *map(repr, sys.meta_path), sep='\\n')"
    out = run(installed / "bin/python", "-c", code, cwd=tmp_path)
    assert str(ROOT) not in out.splitlines() and "__editable__" not in out


def test_the_command_is_installed(installed, tmp_path):
    out = run(installed / "bin/remoe", "--help", cwd=tmp_path)
    assert "ReMoE: mixture-of-experts with ReLU routing" in out
    for command in ("train", "data", "plot"):
        assert f" {command} " in out
    code = "import importlib.metadata as m; print(m.version('remoe'))"
    version = run(installed / "bin/python", "-c", code, cwd=tmp_path).strip()
    assert run(installed / "bin/remoe", "--version", cwd=tmp_path).startswith(f"remoe {version}\n")


def test_a_job_is_submitted_with_an_example_and_the_batch_script_of_the_wheel(installed, tmp_path):
    name = "examples/llama_182m/remoe.yaml"  # with two bases, and not in this folder
    line = ["launch", name, "--nodes", "2", "--slurm", "--dry-run"]
    words = shlex.split(run(installed / "bin/remoe", *line, cwd=tmp_path))
    (site,) = installed.glob("lib/python*/site-packages")
    config = site / "megatron/remoe" / name
    script = site / "megatron/remoe/run/pretrain.sbatch"
    assert words[0] == "sbatch" and words[-2:] == [str(script), str(config)]
    assert f"--export=ALL,REMOE_PYTHON={installed / 'bin/python'}" in words
    assert script.read_text() == (ROOT / "megatron/remoe/run/pretrain.sbatch").read_text()
    # The documented path of a checkout is the same script, which sbatch reads with its options.
    assert (ROOT / "scripts/pretrain.sbatch").read_text() == script.read_text()
