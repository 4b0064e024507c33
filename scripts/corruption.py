"""Damages compressed checkpoints in every way that comes to mind, and judges what loading makes of each.

    python scripts/corruption.py [--each 110] [--seed 0] [--class NAME]

A mutation is caught when loading raises a clean error (hfcompress's, safetensors' or transformers' own), or when
`verify_files` names what is wrong. It must take less than 5 seconds and at most 1.5 times the memory of loading the
undamaged checkpoint. Each one is judged in a process of its own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.corruption.judging import measure_controls, quiet, run_class
from tests.corruption.mutations import CLASSES
from tests.corruption.originals import make_originals


def main() -> int:
    """Runs the suite and prints the table; 1 where a mutation was not caught."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=110, help="mutations a class")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--class", dest="only", choices=sorted(CLASSES), help="this class alone")
    options = parser.parse_args()
    quiet()
    classes = [options.only] if options.only else list(CLASSES)
    total: Counter[str] = Counter()
    bad: list[str] = []
    with tempfile.TemporaryDirectory() as text:
        place = Path(text)
        originals = measure_controls(make_originals(place))
        print(f"{'class':38} {'made':>5} {'error':>6} {'named':>6} {'other':>6} {'max s':>6} {'memory':>7}")
        for name in classes:
            judged = run_class(name, options.each, options.seed, originals, place)
            counts = Counter(verdict.outcome for _, verdict in judged)
            others = len(judged) - counts["error"] - counts["named"]
            slowest = max(verdict.seconds for _, verdict in judged)
            widest = max(verdict.megabytes / originals[said.split(":")[0]].megabytes for said, verdict in judged)
            print(
                f"{name:38} {len(judged):5} {counts['error']:6} {counts['named']:6} {others:6} "
                f"{slowest:6.2f} {widest:6.2f}x",
                flush=True,
            )
            total.update(counts)
            bad += [f"{name}: {said}: {verdict}" for said, verdict in judged if not verdict.caught]
    print(f"{'all':38} {sum(total.values()):5} {total['error']:6} {total['named']:6} {len(bad):6}")
    for line in bad:
        print(line)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
