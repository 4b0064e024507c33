"""Exports every family and head for both engines, and writes docs/exports.md from what came out.

    bash scripts/environment_export.sh -m scripts.export_matrix [--family NAME ...]

Tiny random models, whose layers were pruned to different numbers of heads and neurons where the family allows it. Each
is exported in float; the graph's outputs are compared with the checkpoint's on batches of four shapes. What is done is
kept in a file, so that a run that was cut off goes on; `--again` begins anew. The page is written when all cells are
there. Some 15 minutes an engine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hfcompress import StructuredPruningConfig, compress
from hfcompress.deployment import ExportConfig, export
from hfcompress.errors import HFCompressError, UnsupportedModelError
from hfcompress.tasks.fetching import cache_folder
from tests.processors import processor_of
from tests.tiny_models import CELLS, FAMILIES, class_of, make

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "exports.md"
KEPT = cache_folder() / "studies" / "results" / "exports.json"
ENGINES = ("onnx", "openvino")
LIMIT = 1e-5
_INTRODUCTION = """# Exports: every family and head

Made by `scripts/export_matrix.py`. Each cell is a tiny random model, pruned to different numbers of heads and neurons
in its layers where that is possible, exported in float and run by its engine on batches of 2 x 9, 1 x 1, 3 x 24 and
1 x 40 tokens (of images and spectrograms on as many rows, of sounds on as many moments): the number is the largest
difference from the checkpoint's outputs, over the largest output. Every one of them takes any number of rows and
tokens.

"""


def outcome(family: str, head: str, engine: Any) -> dict[str, Any]:
    """Exports one cell; returns its difference, or why there is none."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        model = make(family, head)
        try:
            compress(model, [StructuredPruningConfig(heads=0.3, neurons=0.3, multiple_of=2)])
        except HFCompressError:
            model = make(family, head)
        model.save_pretrained(folder / "model")
        processor_of(family, head).save_pretrained(folder / "model")
        try:
            made = export(folder / "model", folder / "out", ExportConfig(format=engine))
        except UnsupportedModelError as error:
            return {"head": "heads that can" not in str(error), "why": str(error).splitlines()[0]}
        except HFCompressError as error:
            return {"head": True, "why": str(error).splitlines()[0]}
    return {"difference": made.difference}


def page(rows: dict[str, Any]) -> str:
    """Writes the tables."""
    parts, reasons = [_INTRODUCTION], {}
    lines = ["| family | class | ONNX Runtime | OpenVINO |", "|---|---|--:|--:|"]
    apart = []
    for family, head in CELLS:
        name = class_of(family, head).__name__
        cells = [rows.get(f"{family}|{head}|{engine}") for engine in ENGINES]
        if all(cell is not None and cell.get("head") is False for cell in cells):
            apart.append(name)
            continue
        said = [_cell(cell, reasons) for cell in cells]
        lines.append(f"| {family} | `{name}` | {' | '.join(said)} |")
    parts.append("\n".join(lines) + "\n")
    if reasons:
        listed = "\n".join(f"- **{letter}** {why}" for why, letter in reasons.items())
        parts.append(f"\nWhy there is none:\n\n{listed}\n")
    if apart:
        listed = ", ".join(f"`{name}`" for name in dict.fromkeys(apart))
        parts.append(f"\nHeads that are not exported, and are refused by name: {listed}.\n")
    return "".join(parts)


def _cell(cell: dict[str, Any] | None, reasons: dict[str, str]) -> str:
    if cell is None:
        return ""
    if "difference" in cell:
        mark = "" if cell["difference"] <= LIMIT else " (above 1e-5)"
        return f"{cell['difference']:.0e}{mark}"
    return reasons.setdefault(cell["why"], chr(ord("a") + len(reasons)))


def main() -> int:
    """Runs what is left of the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="this family alone; may be repeated")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="this engine alone")
    parser.add_argument("--again", action="store_true", help="forget what is done")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.is_file() and not options.again else {}
    for engine in options.engine or ENGINES:
        for family, head in CELLS:
            key = f"{family}|{head}|{engine}"
            if key in rows or (options.family and family not in options.family):
                continue
            start = time.perf_counter()
            rows[key] = outcome(family, head, engine)
            print(f"{key}: {rows[key]} {time.perf_counter() - start:.0f} s", flush=True)
            KEPT.parent.mkdir(parents=True, exist_ok=True)
            KEPT.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    if all(f"{family}|{head}|{engine}" in rows for engine in ENGINES for family, head in CELLS):
        PAGE.write_text(page(rows), encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0 if all(cell.get("difference", 0) <= LIMIT for cell in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
