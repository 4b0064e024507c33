"""Makes cells here, and has them checked in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.matrix.cells import Cell
from tests.matrix.making import Broken, make_cell

ROOT = Path(__file__).resolve().parents[2]


def make_all(cells: Iterable[Cell], place: Path) -> dict[str, str]:
    """Makes and saves cells; returns what went wrong, by name."""
    wrong: dict[str, str] = {}
    for cell in cells:
        (place / cell.name).mkdir(parents=True)
        try:
            make_cell(cell, place / cell.name)
        except Broken as error:
            wrong[cell.name] = str(error)
    return wrong


def in_fresh_process(module: str, *arguments: str) -> dict[str, str]:
    """Runs `checking` or `uses` in a process of its own; returns what is wrong, by name, empty where nothing is."""
    command = [sys.executable, "-m", f"tests.matrix.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {f"{module} {' '.join(arguments)}": done.stderr.strip().splitlines()[-1]}
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_cells(cells: list[Cell], place: Path) -> dict[str, str]:
    """Makes cells and checks them; returns what is wrong, by name."""
    wrong = make_all(cells, place)
    checked = in_fresh_process("checking", str(place))
    wrong |= {name: said for name, said in checked.items() if said}
    unseen = {cell.name for cell in cells if cell.reason is None} - checked.keys() - wrong.keys()
    return wrong | dict.fromkeys(unseen, "was not checked")
