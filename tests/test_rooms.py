"""The rooms of the code: who may import whom.

A room is a folder below `megatron/remoe`, a module there, or `remoe`, which knows the methods and
no framework but torch. Imports inside functions count as well.
"""

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up. A room imports from lower floors only, never from its neighbors.
FLOORS = (
    ("remoe",),
    # what other rooms share: the machine, files, processes, and the tables of flags
    ("cpu", "files", "options", "processes", "progress", "checkpoint"),
    ("compat", "pattern", "ranges", "ranks", "unsupported", "formats", "data"),
    ("moe", "analysis"),  # the layer; what can be seen in a run
    ("train",),  # a step, and what surrounds a run in its ranks
    ("arguments",),
    ("session",),
    ("pretrain",),
    ("run", "testing"),  # the parent process; runs of the golden files
    ("convert",),
    ("bench", "bridge", "evaluate", "verify"),
    ("adopt",),
    ("cli",),
    ("__main__", "agent", "api"),
)


def modules() -> dict[str, Path]:
    files = [*(ROOT / "remoe").rglob("*.py"), *(ROOT / "megatron/remoe").rglob("*.py")]
    dotted = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}
    return {name.removesuffix(".__init__"): file for name, file in dotted.items()}


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            whole = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in known else node.module for name in whole}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & set(known)


def room(module: str) -> str:
    parts = module.split(".")
    return "remoe" if parts[0] == "remoe" else parts[2] if len(parts) > 2 else ""


def test_every_room_has_its_floor():
    rooms = {room(name) for name in modules()} - {""}
    assert rooms == {name for floor in FLOORS for name in floor}


def test_imports_go_down():
    known = modules()
    floor_of = {name: floor for floor, names in enumerate(FLOORS) for name in names}
    upward = [
        f"{name} imports {other}"
        for name, file in known.items()
        for other in imports(file, known)
        if room(name) and room(other) and room(name) != room(other)
        if floor_of[room(other)] >= floor_of[room(name)]
    ]
    assert upward == []


def test_no_module_imports_itself_by_way_of_others():
    known = modules()
    graph = {name: imports(file, known) - {name} for name, file in known.items()}
    graph["megatron.remoe"] = set()  # it imports on first use
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


def test_an_upward_import_would_be_seen(tmp_path):
    known = modules()
    file = tmp_path / "lower.py"
    file.write_text("def f():\n    from megatron.remoe.train import step\n")
    assert imports(file, known) == {"megatron.remoe.train.step"}
    file.write_text("import megatron.remoe.moe.router as router\n")
    assert imports(file, known) == {"megatron.remoe.moe.router"}
