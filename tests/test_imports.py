"""The floors of the house: imports go down only, methods do not know one another, the entry is light."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hfcompress"
FLOORS = (
    {"errors", "configuration", "machine"},
    {"modeling", "tasks"},
    {"methods", "evaluation", "deployment"},
    {"recipe"},
    {"publishing"},
    {"run_folder"},
    {"costing", "material"},
    {"bench"},
    {"pipeline"},
    {"verification"},
    {"terminal"},
    {"commands"},
)
FLOOR_OF = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# Rooms of one floor stand side by side; `configuration` builds on `errors`.
SIDEWAYS = {("configuration", "errors")}
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "evaluate",
    "accelerate",
    "bitsandbytes",
    "sklearn",
    "scipy",
    "peft",
}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names of all that a module imports; with `top_level_only` what importing it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    nodes = list(_run_on_import(tree)) if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            # `from hfcompress import commands` names a module in the second half.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _run_on_import(tree: ast.Module):
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting += node.orelse
            continue
        yield node
        waiting += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def rooms_imported(path: Path) -> set[str]:
    names = (name.split(".") for name in imported(path))
    return {parts[1] for parts in names if parts[0] == "hfcompress" and len(parts) > 1}


def wrong_directions(path: Path) -> list[str]:
    here = room_of(path)
    wrong = []
    for there in sorted(rooms_imported(path) & FLOOR_OF.keys()):
        if here == there or (here, there) in SIDEWAYS:
            continue
        if FLOOR_OF[there] >= FLOOR_OF[here]:
            wrong.append(f"{here} ({path.name}) imports {there}")
    return wrong


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in SOURCES} - {"__init__"}
    assert rooms <= FLOOR_OF.keys()
    assert len(rooms) >= 8, "the package was not found"


@pytest.mark.parametrize(
    "path",
    [path for path in SOURCES if room_of(path) != "__init__"],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_imports_go_down_only(path: Path) -> None:
    assert wrong_directions(path) == []


def test_publishing_reads_reports_and_does_not_run_anything() -> None:
    reached = set().union(*(rooms_imported(path) for path in (PACKAGE / "publishing").rglob("*.py")))
    assert not reached & {"pipeline", "verification", "commands"}


def registers_a_method(path: Path) -> bool:
    calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
    return any(isinstance(call.func, ast.Name) and call.func.id == "register" for call in calls)


def unit_of(path: Path) -> str:
    """A method is a file of `methods/`, or a folder of it."""
    return path.relative_to(PACKAGE / "methods").with_suffix("").parts[0]


IN_METHODS = [path for path in sorted((PACKAGE / "methods").rglob("*.py")) if unit_of(path) != "__init__"]
METHODS = {unit_of(path) for path in IN_METHODS if registers_a_method(path)}


def test_the_methods_are_found() -> None:
    assert {"distillation", "structured_pruning", "low_rank", "quantization"} <= METHODS
    assert not METHODS & {"registry", "training"}


@pytest.mark.parametrize("path", IN_METHODS, ids=lambda path: str(path.relative_to(PACKAGE / "methods")))
def test_nothing_beside_a_method_imports_it(path: Path) -> None:
    names = (name.split(".") for name in imported(path))
    reached = {parts[2] for parts in names if parts[:2] == ["hfcompress", "methods"] and len(parts) > 2}
    assert not (reached - {unit_of(path)}) & METHODS


@pytest.mark.parametrize("path", [ROOT / "hfcompress_cli.py", PACKAGE / "commands.py"], ids=lambda path: path.stem)
def test_the_command_line_is_light(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path, top_level_only=True)} & HEAVY


def test_the_entry_module_imports_the_package_in_bodies_only() -> None:
    reached = imported(ROOT / "hfcompress_cli.py", top_level_only=True)
    assert not [name for name in reached if name.split(".")[0] == "hfcompress"]


def test_a_wrong_direction_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = tmp_path / "hfcompress"
    (house / "tasks").mkdir(parents=True)
    (house / "tasks" / "odd.py").write_text("def f():\n    from hfcompress import pipeline\n    return pipeline\n")
    monkeypatch.setitem(globals(), "PACKAGE", house)
    assert wrong_directions(house / "tasks" / "odd.py") == ["tasks (odd.py) imports pipeline"]
