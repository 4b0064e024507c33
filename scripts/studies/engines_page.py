"""The page of `scripts.studies.engines`: tables, what got slower, and a picture, from the results alone.

bash scripts/environment_export.sh -m scripts.studies.engines_page
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scripts.studies.engine_forms import CASES, FORM, TIMED, Form, forms_of
from scripts.studies.engines import RESULTS, SHAPES, Results
from scripts.studies.material import ROOT, table

PAGE = ROOT / "docs" / "engines.md"
PICTURE = PAGE.with_suffix(".svg")
_TORCH = "PyTorch fp32"
_DRAWS = 2000
Rows = Mapping[str, Any]
Ratio = tuple[float, float, float]

_INTRODUCTION = """# Engines and bits, side by side

Made by `scripts/studies/engines.py`; the figures are in `studies/results/engines.json` of the cache.

MiniLM-L6 and MPNet-base, fine-tuned on MRPC and on 20,000 rows of SST-2 (`scripts/studies/material.py`), and
SmolLM2-135M. The weights of SmolLM2 lie on a grid of 4 bits already, so 4-bit results on it would flatter: it is
measured in 8 and in 2 bits. Quality is that of the whole validation split, read once; of SmolLM2 on a prefix of
wikitext-2's test file, in blocks of 128 tokens. *Tables* are embedding tables.

A speed-up is the median time of PyTorch fp32 over the form's, on the same batch, in the same process, the forms taking
turns in a new order each turn; in brackets its 95% interval, by bootstrap over the turns. MB is that of the weight
files (of bf16 half of the float file), opening ends after a first small batch, peak memory is that of a process with
this form alone after a batch of 8 x 128, libraries included. By hand means the engine's own quantizer on the same float
graph, with the settings that its guide gives and no others.
"""


def write(rows: Rows) -> None:
    """Writes page and picture."""
    ratios = {case: speed_ups(rows, case) for case in TIMED}
    parts = [_INTRODUCTION, _conditions(rows)]
    if any(ratios.values()):
        draw(ratios, PICTURE)
        parts.append(f"![Speed-up of every form and batch over PyTorch fp32]({PICTURE.name})\n")
    for case in CASES:
        if any(key.startswith(f"{case}|") for key in rows):
            parts += [f"## {case}\n", _table(rows, case), _speeds(ratios.get(case, {}))]
    parts += ["## Against the same engine by hand\n", _by_hand(rows)]
    parts += ["## What quantization makes slower here\n", _slower(rows)]
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text("\n".join(part for part in parts if part), encoding="utf-8")


def _conditions(rows: Rows) -> str:
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    turns = [len(value[_TORCH]) for key, value in rows.items() if key.endswith("|seconds")]
    said = f" {min(turns)} to {max(turns)} turns a batch." if turns else ""
    return f"Two threads, `OMP_WAIT_POLICY=PASSIVE`, {model}.{said}\n"


def _lines(file: str) -> list[str]:
    try:
        return Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def ratio(base: list[float], own: list[float]) -> Ratio:
    """Returns the ratio of medians with its 95% interval; turns are drawn together, as they were timed together."""
    times = np.array([base, own])
    generator = np.random.default_rng(0)
    draws = generator.integers(0, times.shape[1], (_DRAWS, times.shape[1]))
    medians = np.median(times[:, draws], axis=-1)
    low, high = np.percentile(medians[0] / medians[1], (2.5, 97.5))
    middle = np.median(times[0]) / np.median(times[1])
    return float(middle), float(low), float(high)


def speed_ups(rows: Rows, case: str) -> dict[str, dict[tuple[int, int], Ratio]]:
    """Returns the speed-up over PyTorch fp32 by form and batch."""
    found: dict[str, dict[tuple[int, int], Ratio]] = {}
    for shape in SHAPES:
        times = rows.get(f"{case}|{shape[0]}x{shape[1]}|seconds", {})
        for name in (form.name for form in forms_of(case) if form.name in times):
            found.setdefault(name, {})[shape] = ratio(times[_TORCH], times[name])
    return found


def _table(rows: Rows, case: str) -> str:
    alone = any(f"{case}|{form.name}|alone" in rows for form in forms_of(case))
    metrics = list(rows.get(f"{case}|{_TORCH}|quality", {}))
    head = ["form", "MB", *(metric.replace("_", " ") for metric in metrics)]
    head += ["opens in s", "peak MB"] if alone else []
    lines = []
    for form in forms_of(case):
        quality = rows.get(f"{case}|{form.name}|quality", {})
        if f"{case}|{form.name}|bytes" not in rows:
            continue
        cells = [form.name, f"{rows[f'{case}|{form.name}|bytes'] / 1e6:.1f}"]
        cells += [_shown(metric, quality[metric]) if quality else "" for metric in metrics]
        own = rows.get(f"{case}|{form.name}|alone", {})
        cells += [f"{own['load_seconds']:.2f}", f"{own['peak_bytes'] / 1e6:.0f}"] if own else [""] * 2 * alone
        lines.append(cells)
    return table(head, lines)


def _shown(metric: str, value: float) -> str:
    if metric == "perplexity":
        return f"{value:,.2f}"
    return f"{value:.4f}" if metric == "bits_per_byte" else f"{100 * value:.1f}"


def _speeds(found: Mapping[str, Mapping[tuple[int, int], Ratio]]) -> str:
    if not found:
        return ""
    shapes = list(found[_TORCH])
    head = ["speed-up", *(f"{rows} x {tokens}" for rows, tokens in shapes)]
    lines = [[name, *(_ratio(by_shape[shape]) for shape in shapes)] for name, by_shape in found.items()]
    return table(head, lines)


def _ratio(value: Ratio) -> str:
    middle, low, high = value
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _pairs(rows: Rows, base: Mapping[str, str]) -> list[tuple[str, str, str, tuple[int, int], Ratio]]:
    """Returns how much faster forms are than others: case, form, the other, batch, ratio."""
    found = []
    for case in TIMED:
        for shape in SHAPES:
            times = rows.get(f"{case}|{shape[0]}x{shape[1]}|seconds", {})
            for name, other in base.items():
                if name in times and other in times:
                    found.append((case, name, other, shape, ratio(times[other], times[name])))
    return found


def _by_hand(rows: Rows) -> str:
    pairs = _pairs(rows, {form.name: form.by_hand for form in FORM.values() if form.by_hand})
    if not pairs:
        return "Not timed yet.\n"
    head = ["model", "form", *(f"{a} x {b}" for a, b in SHAPES), "bytes", "quality lost: ours, by hand"]
    lines = []
    for case in TIMED:
        for name in dict.fromkeys(name for one, name, *_ in pairs if one == case):
            by_shape = {shape: value for one, form, _, shape, value in pairs if (one, form) == (case, name)}
            speeds = [_ratio(by_shape[shape]) if shape in by_shape else "" for shape in SHAPES]
            lines.append([case, name, *speeds, _bytes(rows, case, name), _lost(rows, case, FORM[name])])
    slower = [each for each in pairs if each[-1][2] < 1]
    said = "Time by hand over ours: above 1 ours is faster. Bytes: ours over by hand.\n\n" + table(head, lines, texts=2)
    names = [f"{name} of {case} at {a} x {b} ({_ratio(value)})" for case, name, _, (a, b), value in slower]
    return said + (f"\nSlower than by hand, the whole interval below 1: {'; '.join(names)}.\n" if names else "")


def _bytes(rows: Rows, case: str, name: str) -> str:
    own, other = (rows.get(f"{case}|{each}|bytes") for each in (name, FORM[name].by_hand))
    return f"{own / other:.2f}" if own and other else ""


def _lost(rows: Rows, case: str, form: Form) -> str:
    """Says how much of the first metric is lost by us and by hand, in points; of perplexities how much is added."""
    names = (form.floats, form.name, form.by_hand)
    found = [rows.get(f"{case}|{name}|quality") for name in names]
    if None in found:
        return ""
    metric = "perplexity" if "perplexity" in found[0] else next(iter(found[0]))
    base, ours, others = (each[metric] for each in found)
    if metric == "perplexity":
        return f"{ours - base:+.2f}, {others - base:+.2f}"
    return f"{100 * (base - ours):.1f}, {100 * (base - others):.1f}"


def _slower(rows: Rows) -> str:
    """Names every batch on which a quantized form is slower than float, in PyTorch and in its own engine."""
    quantized = [form for form in FORM.values() if form.name != form.floats and "bf16" not in form.name]
    lines = []
    for base, said in (
        ({form.name: _TORCH for form in quantized}, "than PyTorch fp32"),
        ({form.name: form.floats for form in quantized if form.floats != _TORCH}, "than the same engine in float"),
    ):
        pairs = [each for each in _pairs(rows, base) if each[-1][2] < 1]
        for case, name in dict.fromkeys((case, name) for case, name, *_ in pairs):
            where = [
                f"{a} x {b} ({value[0]:.2f})" for one, form, _, (a, b), value in pairs if (one, form) == (case, name)
            ]
            lines.append(f"- {case}, {name}: slower {said} at {', '.join(where)}")
    if not any(key.endswith("|seconds") for key in rows):
        return "Not timed yet.\n"
    told = "Those whose whole interval is below 1; in brackets the speed-up.\n\n"
    return told + ("\n".join(lines) if lines else "None.") + "\n"


def draw(ratios: Mapping[str, Mapping[str, Mapping[tuple[int, int], Ratio]]], place: Path) -> None:
    """Draws a panel a model: forms downwards, batches across, in each cell the speed-up."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import TwoSlopeNorm

    shown = [case for case in ratios if ratios[case]]
    counts = [len(ratios[case]) for case in shown]
    matplotlib.rcParams["svg.hashsalt"] = "engines"  # the same picture from the same figures
    figure, panels = pyplot.subplots(
        len(shown), 1, figsize=(9, 0.32 * sum(counts) + 1.1 * len(shown)), height_ratios=counts, squeeze=False
    )
    for case, panel in zip(shown, panels[:, 0], strict=True):
        names = list(ratios[case])
        shapes = list(ratios[case][_TORCH])
        values = np.array([[ratios[case][name][shape][0] for shape in shapes] for name in names])
        norm = TwoSlopeNorm(vcenter=0, vmin=-2, vmax=3)
        panel.imshow(np.log2(values), cmap="RdBu", norm=norm, aspect="auto")
        panel.set_yticks(range(len(names)), names, fontsize=8)
        panel.set_xticks(range(len(shapes)), [f"{a} x {b}" for a, b in shapes], fontsize=8)
        panel.set_title(f"{case}: speed-up over PyTorch fp32, rows x tokens", fontsize=9)
        for (row, column), value in np.ndenumerate(values):
            dark = not -1.2 < np.log2(value) < 2
            panel.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="w" if dark else "k")
    figure.tight_layout()
    figure.savefig(place, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    write(Results(RESULTS).rows)
