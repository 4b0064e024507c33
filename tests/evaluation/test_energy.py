from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from hfcompress.evaluation import cost
from hfcompress.evaluation.cost import measure_speed
from hfcompress.evaluation.energy import EnergyMeter, find_meter

RANGE = 1_000_000_000


def counters(folder: Path, *starts: int) -> Path:
    """Lays down counters as Linux shows them: packages, and a part of the first."""
    for number, start in enumerate(starts):
        for name in (f"intel-rapl:{number}", f"intel-rapl:{number}:0", "intel-rapl"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "energy_uj").write_text(f"{start}\n")
            (folder / name / "max_energy_range_uj").write_text(f"{RANGE}\n")
    return folder


class Burner(nn.Module):
    """Takes a known energy: it moves the counters as the hardware would."""

    def __init__(self, folder: Path, microjoules: int) -> None:
        super().__init__()
        self.counter, self.microjoules = folder / "intel-rapl:0" / "energy_uj", microjoules

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.counter.write_text(str((int(self.counter.read_text()) + self.microjoules) % RANGE))
        return input_ids


def test_packages_are_added_up_and_their_parts_are_not(tmp_path: Path) -> None:
    meter = find_meter(counters(tmp_path, 5, 7))
    assert meter is not None and meter.read() == (5, 7)
    assert meter.joules((5, RANGE - 100), (1_000_005, 900)) == pytest.approx(1.001)


@pytest.mark.parametrize("text", ["", "no number"])
def test_a_meter_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    assert find_meter(tmp_path) is None
    (counters(tmp_path, 1) / "intel-rapl:0" / "energy_uj").write_text(text)
    assert find_meter(tmp_path) is None


def test_two_models_are_measured_by_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = counters(tmp_path, RANGE - 1_000_000)  # the counter begins anew meanwhile
    meter: EnergyMeter | None = find_meter(folder)
    monkeypatch.setattr(cost, "find_meter", lambda: meter)
    inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
    speed = measure_speed(Burner(folder, 300_000), Burner(folder, 200_000), inputs, repeats=3)
    assert speed.original_joules == pytest.approx(0.3) and speed.compressed_joules == pytest.approx(0.2)
    meter = None
    speed = measure_speed(Burner(folder, 300_000), Burner(folder, 200_000), inputs, repeats=3)
    assert speed.original_joules is None and speed.compressed_joules is None
