"""Energy, where the machine counts it: running totals of Intel's and AMD's processors (RAPL), as Linux shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
_PACKAGES = "intel-rapl:*"  # AMD's too; a second colon is a part of a package
_MICRO = 1e-6


@dataclass(frozen=True)
class EnergyMeter:
    """The counters of all processor packages: what all that runs on them takes, and not one process alone.

    Attributes:
        counters: The file of each package.
        ranges: The microjoules at which each counter begins anew.
    """

    counters: tuple[Path, ...]
    ranges: tuple[int, ...]

    def read(self) -> tuple[int, ...]:
        """Returns the microjoules that each counter has come to."""
        return tuple(int(each.read_text()) for each in self.counters)

    def joules(self, before: Sequence[int], after: Sequence[int]) -> float:
        """Returns what was taken between two readings, less than one round of a counter apart."""
        pairs = zip(before, after, self.ranges, strict=True)
        return _MICRO * sum((end - start) % around if end < start else end - start for start, end, around in pairs)


def find_meter(folder: Path = POWERCAP) -> EnergyMeter | None:
    """Returns the machine's meter, or None where it has none, or lets none but its owner read it.

    Args:
        folder: Where Linux shows the counters.
    """
    packages = [each for each in sorted(folder.glob(_PACKAGES)) if each.name.count(":") == 1]
    try:
        ranges = tuple(int((each / "max_energy_range_uj").read_text()) for each in packages)
        meter = EnergyMeter(tuple(each / "energy_uj" for each in packages), ranges)
        meter.read()
    except (OSError, ValueError):
        return None
    return meter if packages else None
