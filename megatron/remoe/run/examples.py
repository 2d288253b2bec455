"""The example configs, which an installed package has as well as a checkout.

`megatron/remoe/examples` is a folder in a wheel. In a checkout it links to the folder in the root.
"""

import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path

from megatron.remoe.files import scratch_folder

FOLDER = Path(__file__).parents[1] / "examples"
_ignored = shutil.ignore_patterns("__pycache__")


def config_file(path: Path) -> Path:
    """Return the path of a config, or that of an installed example where there is no such file.

    An installed example is named `examples/...`. A line on standard error says that it is read.
    """
    installed = FOLDER.joinpath(*path.parts[1:])
    if path.parts[:1] != ("examples",) or path.exists() or not installed.is_file():
        return path
    print(
        f"{path} does not exist here; reading the example of remoe {version('remoe')}",
        file=sys.stderr,
    )
    return installed


def summaries() -> Iterator[tuple[str, str]]:
    """Yield the path of every example config, as commands take it, and its first sentence."""
    files = [file for file in FOLDER.rglob("*.yaml") if file.parent.name != "bases"]
    for file in sorted(files, key=lambda file: (file.parent != FOLDER, file)):
        lines = takewhile(lambda line: line.startswith("# "), file.read_text().splitlines())
        sentence, _, _ = " ".join(line.removeprefix("# ") for line in lines).partition(". ")
        yield f"examples/{file.relative_to(FOLDER)}", f"{sentence.removesuffix('.')}."


def copy(out: Path) -> None:
    """Copy the whole folder of examples to `out`.

    Raises:
        ValueError: `out` is a file, or a folder with something in it.
    """
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise ValueError(f"{out} is not empty; name a folder that does not exist yet (--copy)")
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(out.absolute().parent) as scratch:
        shutil.copytree(FOLDER, scratch / "examples", ignore=_ignored).rename(out)
