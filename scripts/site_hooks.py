"""Hooks of MkDocs: the site has all that docs/ links to, in the project and not only in docs/.

Links are written as GitHub follows them, such as `../examples/quickstart.yaml`. On the site,
README, CONTRIBUTING and CHANGELOG are pages, and every other file that a page links to becomes a
page that shows it. MkDocs itself then checks every link and every anchor (`mkdocs build --strict`).
"""

import json
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)")
LANGUAGES = {".diff": "diff", ".py": "python", ".sbatch": "bash", ".sh": "bash", ".yaml": "yaml"}

# The file that each page shows, by the page's place in the site; other pages are files of docs/.
_shown: dict[str, Path] = {}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every file outside of docs/ that a page links to."""
    _shown.clear()
    for name, page in PAGES.items():
        _add(files, config, page, ROOT / name)
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    while waiting:
        file = waiting.pop()
        for link in LINK.findall(file.content_string):
            target = (_source(file.src_uri).parent / link).resolve()
            page = _page(target)
            if page.startswith("files/") and page not in _shown and target.exists():
                waiting.append(_add(files, config, page, target))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links that leave docs/ at the pages that show their targets."""
    place = PurePosixPath(page.file.src_uri)
    source = _source(str(place))
    if place.parts[0] == "files":
        page.meta["search"] = {"boost": 0.2}
    elif place.match("results/*/*"):  # tables without a heading
        page.meta |= {"title": f"{place.parent.name}: {place.stem}", "search": {"exclude": True}}

    def moved(match: re.Match[str]) -> str:
        target = (source.parent / match[1]).resolve()
        if not target.exists() or not target.is_relative_to(ROOT):
            return match[1]  # MkDocs names it
        return _relative(_page(target), place)

    return LINK.sub(moved, markdown)


def _add(files: Files, config: MkDocsConfig, page: str, path: Path) -> File:
    content = path.read_text() if page in PAGES.values() else _show(path)
    file = File.generated(config, page, content=content)
    _shown[page] = path
    files.append(file)
    return file


def _source(page: str) -> Path:
    return _shown.get(page, DOCS / page)


def _page(target: Path) -> str:
    """Return the place in the site's sources of a file of the project."""
    if target.is_relative_to(DOCS):
        return target.relative_to(DOCS).as_posix()
    name = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else "outside"
    return PAGES.get(name, f"files/{name}.md")


def _relative(page: str, start: PurePosixPath) -> str:
    return PurePosixPath(page).relative_to(start.parent, walk_up=True).as_posix()


def _show(path: Path) -> str:
    """Return a page with a file, or with the files of a folder."""
    title = f"# {path.relative_to(ROOT)}\n\n"
    if path.suffix == ".ipynb":
        return _notebook(json.loads(path.read_text()))
    if path.is_file():
        return title + _code(path)
    inside = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    return title + "\n".join(f"## {p.name}\n\n{_code(p)}" for p in inside)


def _code(path: Path) -> str:
    return f"`````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text().rstrip()}\n`````\n"


def _notebook(notebook: dict) -> str:
    """Return the cells of a notebook, the first of which has a title, with what they printed."""
    parts = []
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![](data:image/png;base64,{data['image/png'].strip()})")
            elif lines := output.get("text") or data.get("text/plain"):
                parts.append(f"```text\n{''.join(lines).rstrip()}\n```")
    return "\n\n".join(parts)
