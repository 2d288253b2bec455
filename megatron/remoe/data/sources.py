"""The sources of the corpus: the standard library and the dependencies of this project.

Of the environment, only the packages that `remoe[megatron]` requires, directly or not, are read, so
that an unrelated package changes nothing. System headers (/usr/include and Python's own) and the
parts of the standard library that distributions package separately are left out, because two
machines with equal versions may or may not have them.

Nothing is imported or executed; docstrings are read with `ast`.
"""

import ast
import csv
import json
import posixpath
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DOMAIN_SUFFIXES = {
    "python": {".py"},
    "cpp": {".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp"},
    "prose": {".md", ".rst"},
    "markup": {
        *(".css", ".dtd", ".html", ".jinja", ".js", ".svg", ".tmpl", ".xml", ".xsl"),
        *(".cfg", ".cmake", ".ini", ".json", ".mplstyle", ".tab", ".toml", ".yaml", ".yml", ".zi"),
    },
}
DOMAINS = tuple(DOMAIN_SUFFIXES)

MAX_FILE_BYTES = 256_000
SKIPPED_FOLDERS = {"__pycache__", "test", "testing", "tests"}  # tests hold fixtures of other origin
SKIPPED_FOLDERS |= {"_vendor", "extern", "third_party", "vendor"}  # copies of other packages
# These are separate packages in some distributions, or character tables (`encodings`).
SKIPPED_STDLIB = {"encodings", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"}
SKIPPED_NAMES = re.compile(r"licen[cs]e|copying|notice|\.min\.|_pb2\.py", re.IGNORECASE)

MIN_DOCSTRING_CHARS = 200
MIN_DOCSTRING_SHARE = 0.25
TRIPLE_QUOTED = re.compile(rb'"""(.*?)"""', re.DOTALL)


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One candidate document, which has not been read yet.

    Attributes:
        domain: the domain that it belongs to.
        path: `<package or collection>/<relative path>`. A module and its docstrings share a path,
            so that both are in the same split.
        tier: lower tiers are taken first.
        load: reads the text.
    """

    domain: str
    path: str
    tier: int
    load: Callable[[], str]


def dependency_closure(root: str, extras: frozenset[str]) -> dict[str, metadata.Distribution]:
    """Return the installed distributions that `root[extras]` requires, by name, `root` left out.

    Requirements that are not installed, for example those of another platform, are left out too.

    Raises:
        ValueError: `root` itself is not installed.
    """
    root = canonicalize_name(root)
    try:
        found = {root: metadata.distribution(root)}
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"{root} is imported but not installed, so that the packages that it requires, whose "
            f"files the corpus is made of, are not known; run: pip install -e '.[megatron]'"
        ) from None
    seen_extras: dict[str, frozenset[str]] = {}
    todo = [(root, extras)]
    while todo:
        name, wanted = todo.pop()
        if wanted <= seen_extras.get(name, frozenset()):
            continue
        seen_extras[name] = wanted = wanted | seen_extras.get(name, frozenset())
        for line in found[name].requires or []:
            requirement = Requirement(line)
            marker = requirement.marker
            if marker and not any(marker.evaluate({"extra": extra}) for extra in wanted):
                continue
            child = canonicalize_name(requirement.name)
            try:
                found.setdefault(child, metadata.distribution(child))
            except metadata.PackageNotFoundError:
                continue
            # The empty extra stands for the package without extras.
            todo.append((child, frozenset(requirement.extras) | {""}))
    del found[root]
    return dict(sorted(found.items()))


def iter_sources(distributions: dict[str, metadata.Distribution]) -> Iterator[Source]:
    """Yield every candidate document of the standard library and of `distributions`."""
    yield from _topics()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for top in sorted(stdlib.iterdir()):
        name = top.name.removesuffix(".py")
        if name in sys.stdlib_module_names and name not in SKIPPED_STDLIB:
            for file in [top] if top.is_file() else sorted(top.rglob("*")):
                relative = file.relative_to(stdlib).as_posix()
                yield from _file_sources(file, f"stdlib/{relative}", tier=0)
    for name, distribution in distributions.items():
        headers = distribution.metadata.json
        yield Source("prose", f"{name}/README", 0, partial(str, headers.pop("description", "")))
        headers.pop("license", None)
        yield Source("markup", f"{name}/METADATA", 1, partial(json.dumps, headers, indent=2))
        for path in _installed_files(distribution):
            yield from _file_sources(Path(str(distribution.locate_file(path))), path, tier=1)


def _installed_files(distribution: metadata.Distribution) -> Iterator[str]:
    """Yield the files inside the packages of a wheel, relative to `site-packages`.

    They are read from RECORD, because `Distribution.files` takes seconds for 30,000 files. Files
    outside of any package are left out, because wheels may overwrite those of each other.
    """
    for row in csv.reader((distribution.read_text("RECORD") or "").splitlines()):
        top, slash, _ = row[0].partition("/")
        if slash and top != ".." and not top.endswith((".dist-info", ".data")):
            yield row[0]


def _topics() -> Iterator[Source]:
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield Source("prose", f"pydoc_topics/{name}", 0, partial(str, text))


def _file_sources(file: Path, path: str, *, tier: int) -> Iterator[Source]:
    *folders, name = path.split("/")
    if SKIPPED_NAMES.search(name) or not SKIPPED_FOLDERS.isdisjoint(folders):
        return
    suffix = posixpath.splitext(name)[1]
    for domain, suffixes in DOMAIN_SUFFIXES.items():
        if suffix in suffixes:
            yield Source(domain, path, tier, partial(read_text, file))
    if suffix == ".py":
        yield Source("prose", path, tier, partial(read_docstrings, file))


def read_text(file: Path) -> str:
    """Return the text of a file, or an empty string if it is missing, too large or not UTF-8."""
    if not file.is_file() or file.stat().st_size > MAX_FILE_BYTES:
        return ""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return ""


def read_docstrings(file: Path) -> str:
    """Return the longer docstrings of a module in source order, separated by blank lines.

    A module with little documentation gives an empty string; a fast search recognizes it before the
    slow parser runs.
    """
    source = read_text(file).encode()
    if sum(map(len, TRIPLE_QUOTED.findall(source))) < MIN_DOCSTRING_SHARE * len(source):
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in the source
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return ""
    docstrings = (doc for doc in _docstrings(tree) if len(doc) >= MIN_DOCSTRING_CHARS)
    return "\n\n".join(docstrings)


def _docstrings(node: Documented) -> Iterator[str]:
    """Yield the docstrings of a module, of its classes and of their functions."""
    if docstring := ast.get_docstring(node):
        yield docstring
    for child in node.body:
        if isinstance(child, Documented):
            yield from _docstrings(child)
