"""How long `hfcompress --help` takes beside a Python that does nothing, by turns.

python scripts/benchmark_start_up.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python, nothing": [sys.executable, "-c", "pass"],
    "import typer, rich": [sys.executable, "-c", "import typer, rich"],
    "hfcompress --help": [sys.executable, "-m", "hfcompress_cli", "--help"],
}


def seconds(command: list[str]) -> float:
    """Runs a command once."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Prints medians of 15 turns, after one that is not counted."""
    times = [{name: seconds(command) for name, command in COMMANDS.items()} for _ in range(16)][1:]
    medians = {name: statistics.median(turn[name] for turn in times) for name in COMMANDS}
    for name, median in medians.items():
        print(f"{name:20} {median:6.3f} s")


if __name__ == "__main__":
    main()
