"""Runs the matrix of families, heads and methods, and writes docs/matrix.md when every cell is as it should be.

    bash scripts/beside.sh torchao scripts/matrix.py [--family NAME ...] [--without-uses]

Each family's cells are made and saved here, then loaded and compared in a process of their own. The page is written
only by a whole run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.matrix.cells import CELLS
from tests.matrix.checking import quiet
from tests.matrix.page import page
from tests.matrix.running import ROOT, in_fresh_process, run_cells
from tests.tiny_models import FAMILIES


def main() -> int:
    """Runs the matrix; 1 where a cell is not as the page says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="this family alone; may be repeated")
    parser.add_argument("--without-uses", action="store_true", help="leave out pipeline, Trainer, LoRA, compile ...")
    options = parser.parse_args()
    quiet()
    wrong: dict[str, str] = {}
    for family in options.family or FAMILIES:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as text:
            cells = [cell for cell in CELLS if cell.family == family]
            found = run_cells(cells, Path(text))
        uses = {} if options.without_uses else in_fresh_process("uses", family)
        found |= {f"{family}: {name}": said for name, said in uses.items() if said}
        wrong |= found
        seconds = time.perf_counter() - started
        print(f"{family:15} {len(cells):3} cells {len(uses)} uses {len(found):3} wrong {seconds:4.0f} s", flush=True)
        for name, said in found.items():
            print(f"  {name}: {said}", flush=True)
    if wrong or options.family or options.without_uses:
        return 1 if wrong else 0
    place = ROOT / "docs" / "matrix.md"
    place.parent.mkdir(exist_ok=True)
    place.write_text(page(), encoding="utf-8")
    print(f"wrote {place.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
