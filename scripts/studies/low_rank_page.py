"""The page of both low-rank studies: tables and pictures, from the results alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t

from scripts.studies import low_rank, low_rank_encoders
from scripts.studies.language_model import BATCH, STEPS, recovered
from scripts.studies.material import ROOT, TASKS, table

PAGE = ROOT / "docs" / "low_rank.md"
LANGUAGE_MODEL, ENCODERS = PAGE.with_name("low_rank_language_model.png"), PAGE.with_name("low_rank_encoders.png")
Row = dict[str, Any]
Point = tuple[str, float]

_CURVED = "whitened, weighed by the predictions' curvature"
# What the names of the studies' arms mean, those of hfcompress's own combination last.
ARMS = {
    "plain": "plain SVD",
    "fisher": "Fisher-weighted SVD (Hsu et al. 2022)",
    "non-negative": "non-negative factors (scikit-learn)",
    "whitened": "whitened by the inputs' second moments (SVD-LLM)",
    "whitened, sequential": "whitened, layer after layer",
    "whitened, sequential, budget": "whitened, layer after layer, ranks by measured outputs",
    "whitened, budget": "whitened, ranks by measured outputs",
    "curvature": _CURVED,
    "curvature, pivoted": f"{_CURVED}, pivoted factors",
    "curvature, budget": f"{_CURVED}, ranks by it",
    "curvature, budget, pivoted": f"{_CURVED}, ranks by it, pivoted factors",
    "curvature, budget, pivoted, sequential": f"{_CURVED}, ranks by it, pivoted factors, layer after layer",
}
HIGHEST = 30.0  # of the picture: what is above tells nothing more


# The language model


def language_model() -> str:
    """Returns the part on perplexity, and draws its picture; nothing where there are no rows."""
    rows = [row for row in low_rank.read() if row.get("part", "test") == "test"]
    measured = [row for row in rows if row["study"] == "without training" and row["arm"] != "original"]
    if not measured:
        return ""
    base = next(row for row in rows if row["study"] == "without training" and row["arm"] == "original")
    shares = sorted({row["removed"] for row in measured})
    ratios = {(row["arm"], row["removed"]): row["ratio"] for row in measured}
    arms = [arm for arm in ARMS if any(each == arm for each, _ in ratios)]
    head = ["share of the linear layers' parameters removed", *(f"{share:.0%}" for share in shares)]
    lines = [[ARMS[arm], *(_number(ratios.get((arm, share))) for share in shares)] for arm in arms]
    blocks, calibration = base["test_blocks"], measured[0]["calibration_blocks"]
    text = f"""## A small language model

SmolLM2-135M-Instruct, fitted to {calibration} blocks of 512 tokens from wikitext-2's validation file, measured on the
first {blocks} blocks of its test file: perplexity over the original's, which is {base["perplexity"]:.1f}. No training.
Ranks are multiples of 8, so that a fixed share removes 1 to 2 points more than it says; a budget meets it.

{table(head, lines)}
"""
    after = [row for row in rows if row["study"] == "recovered"]
    chosen = recovered(after, "arm", "removed")
    text += _recovered(after, chosen)
    _draw_language_model(arms, ratios, shares, chosen)
    return f"{text}![Perplexity by method and share removed]({LANGUAGE_MODEL.name})\n\n"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}" if value < 1e5 else f"{value:.0e}"


def _recovered(rows: Sequence[Row], chosen: Sequence[Row]) -> str:
    if not chosen:
        return ""
    lines = []
    for arm, share in sorted({(row["arm"], row["removed"]) for row in chosen}, key=lambda each: (each[1], each[0])):
        mine = [row for row in chosen if (row["arm"], row["removed"]) == (arm, share)]
        seeds = {row["seed"] for row in mine}
        before = [
            row for row in rows if (row["arm"], row["removed"], row["rate"]) == (arm, share, 0) and row["seed"] in seeds
        ]
        rate = mine[0]["rate"]
        tried = {row["rate"] for row in rows if (row["arm"], row["removed"], row["seed"]) == (arm, share, 0)} - {0}
        lines.append(
            [
                "the original" if arm == "original" else ARMS[arm],
                f"{share:.0%}",
                str(len(mine)),
                _number(mean(row["perplexity"] for row in before)),
                _number(mean(row["perplexity"] for row in mine)),
                ", ".join(f"{each:.0e}" for each in sorted(tried)),
                f"{rate:.0e}" if rate else "none",
                "1" if arm == "original" else _spread([row["ratio"] for row in mine]),
            ]
        )
    head = ["", "removed", "seeds", "at once", "in the end", "rates tried", "chosen", "over the original's"]
    return f"""The same model fine-tuned, then factorised, then trained on: {2 * STEPS} steps of {BATCH} blocks in all,
which take one thread some 15 minutes, half of them before factorising, on three quarters of the validation file, where
no `<unk>` is read or predicted. Each model, the original too, is trained on at the rate that served it best on the last
quarter, of those tried with the first seed and none. A seed is an order of the blocks, a ratio is that of the same
seed, an interval is Student's at 95%.

{table(head, lines)}
"""


def _spread(ratios: Sequence[float]) -> str:
    if len(ratios) < 2:
        return f"{mean(ratios):.3f}"
    half = t.ppf(0.975, len(ratios) - 1) * stdev(ratios) / len(ratios) ** 0.5
    return f"{mean(ratios):.3f} ({mean(ratios) - half:.3f} to {mean(ratios) + half:.3f})"


def _draw_language_model(
    arms: Sequence[str], ratios: dict[Point, float], shares: Sequence[float], after: Sequence[Row]
) -> None:
    figure, (axes,) = _figure(1, 1, (7.8, 5.2))
    colours = {arm: f"C{number}" for number, arm in enumerate(arms)}
    drawn = [arm for arm in arms if min(ratios.get((arm, share), HIGHEST) for share in shares) < HIGHEST]
    for arm in drawn:
        mine = [(100 * share, ratios[arm, share]) for share in shares if (arm, share) in ratios]
        axes.plot(*zip(*mine, strict=True), color=colours[arm], marker="o", markersize=4, label=ARMS[arm])
    for arm in [arm for arm in ARMS if any(row["arm"] == arm for row in after)]:
        places = sorted({row["removed"] for row in after if row["arm"] == arm})
        means = [mean(row["ratio"] for row in after if (row["arm"], row["removed"]) == (arm, at)) for at in places]
        form: dict[str, Any] = {"marker": "s", "markersize": 4, "linestyle": "--", "color": colours[arm]}
        label = {} if arm in drawn else {"label": f"{ARMS[arm]}, trained on"}
        axes.plot([100 * at for at in places], means, **form, **label)
    axes.plot([], [], marker="s", markersize=4, linestyle="--", color="0.4", label="fine-tuned, factorised, trained on")
    axes.set(xlabel="linear parameters removed, %", ylabel="perplexity / the original's", yscale="log")
    axes.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.set(xticks=[100 * share for share in shares], ylim=(0.9, HIGHEST))
    axes.minorticks_off()
    axes.grid(axis="y", linewidth=0.3)
    axes.set_title("SmolLM2-135M; plain and Fisher-weighted SVD without training are above the picture", fontsize=10)
    figure.legend(loc="outside lower center", ncols=1, fontsize=8)
    _keep(figure, LANGUAGE_MODEL)


# The encoders


def encoders() -> str:
    """Returns the parts on fine-tuned encoders, and draws their picture; nothing where there are no rows."""
    rows = [row for row in low_rank_encoders.read() if row.get("data") == "whole"]
    return _curves([row for row in rows if row["model"] == "mpnet-base"]) + _together(rows) + _claims()


def _value(row: Row) -> float:
    return row["metrics"][row["metric"]]


def _curves(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row["arm"] in (*low_rank_encoders.CURVES, "original") and "claim" not in row]
    bases = {row["task"]: row for row in rows if row["arm"] == "original"}
    tasks = [task for task in TASKS if task in bases and any(row["task"] == task for row in rows if row["removed"])]
    if not tasks:
        return ""
    found = {(row["task"], row["arm"], row["removed"]): row for row in rows}
    arms = [arm for arm in low_rank_encoders.CURVES if any(each == arm for _, each, _ in found)]
    shares = sorted({share for _, _, share in found if share})
    head = ["points lost / time over the original's", *(f"{share:.0%}" for share in shares)]
    parts = [_CURVES.format(before=", ".join(f"{task} {100 * _value(bases[task]):.1f}" for task in tasks))]
    for task in tasks:
        lines = []
        for arm in arms:
            cells = [found.get((task, arm, share)) for share in shares]
            if not any(cells):
                continue
            lost = [round(100 * (_value(bases[task]) - _value(cell)), 1) + 0.0 if cell else None for cell in cells]
            times = [1 / cell["speed_up"][0] if cell else None for cell in cells]
            said = [f"{a:.1f} / {b:.2f}" if a is not None else "-" for a, b in zip(lost, times, strict=True)]
            lines.append([ARMS[arm], *said])
        parts.append(f"{task}:\n\n{table(head, lines)}\n")
    _draw_encoders(tasks, arms, found, bases, shares)
    return "".join(parts) + f"![Quality against bytes and time]({ENCODERS.name})\n\n"


_CURVES = """## Fine-tuned encoders

MPNet-base, fitted to 512 sentences of train, measured on the whole validation split, once. Accuracy, of STS-B Pearson's
correlation; before: {before}. Time is that of a batch of 8 rows of 128 tokens on one
thread, in 32 bit, beside the original in the same run, with other work on the machine. No training; one draw of
sentences.

Factors weighed by curvature are at the top in bytes, the farther the more goes: at 60%, pivoted, they lose 0.2 and 2.2
points of SST-2 and MRPC, where whitening alone loses 6.5 and 13.7. At 10 and 20% of SST-2 the two are level. The
exception is STS-B up to 40%: what is weighed by curvature stays as good as the original was, and gains from 40% on;
whitening alone gains 1.6 to 1.9 points from the start. In time those without pivots are at the top: pivoted layers need
fewer numbers and put their outputs in order, which takes time.

"""


def _draw_encoders(
    tasks: Sequence[str],
    arms: Sequence[str],
    found: dict[tuple[str, str, float], Row],
    bases: dict[str, Row],
    shares: Sequence[float],
) -> None:
    figure, axes = _figure(2, len(tasks), (4 * len(tasks), 6.4))
    for column, task in enumerate(tasks):
        base = bases[task]
        for arm in arms:
            mine = [found[task, arm, share] for share in shares if (task, arm, share) in found]
            kept = [_value(row) / _value(base) for row in mine]
            sizes, times = [row["bytes"] / base["bytes"] for row in mine], [1 / row["speed_up"][0] for row in mine]
            name = ARMS[arm] if column == 0 else None
            axes[column].plot([1, *sizes], [1, *kept], marker="o", markersize=3, label=name)
            axes[len(tasks) + column].plot([1, *times], [1, *kept], marker="o", markersize=3)
        axes[column].set(title=task, xlabel="bytes / the original's", ylabel="quality / the original's")
        axes[len(tasks) + column].set(xlabel="time / the original's", ylabel="quality / the original's")
    figure.legend(loc="outside lower center", fontsize=8, ncols=2)
    _keep(figure, ENCODERS)


def _together(rows: Sequence[Row]) -> str:
    mine = [row for row in rows if row["arm"] in low_rank_encoders.TOGETHER]
    if not mine:
        return ""
    bases = {(row["model"], row["task"]): row for row in rows if row["arm"] == "original"}
    lines = []
    for row in sorted(mine, key=lambda each: (each["model"], each["task"], -each["bytes"])):
        base = bases[row["model"], row["task"]]
        size, lost = f"{row['bytes'] / 1e6:.1f} MB", f"{100 * (_value(base) - _value(row)):.1f}"
        share = f"{row['removed']:.0%}" if row["removed"] else "-"
        lines.append([f"{row['model']}, {row['task']}", row["arm"], share, size, lost, f"{row['speed_up'][0]:.2f}"])
    head = ["model", "steps", "layers' parameters removed", "on disk", "points lost", "speed-up"]
    return f"""## Together with pruning and 4 bits

The same model by each step and by several, by bytes; rows near each other in bytes are to be compared. Where low rank
and pruning meet, each removes its half of the share. Factors are two plain ones, but where it says pivoted: in that
form the rounding of one output to 4 bits is passed on to all that are made of it.

{table(head, lines)}
"""


def _claims() -> str:
    found = [row for row in low_rank_encoders.read() if "claim" in row]
    rows = list({(row["claim"], row["arm"], row.get("task")): row for row in found}.values())  # the last of each
    if not rows:
        return ""
    seconds = [row for row in rows if row["claim"].startswith("seconds")]
    points = [row for row in rows if not row["claim"].startswith("seconds")]
    lines = [[row["claim"], row["arm"], f"{row['seconds']:.2f} s"] for row in seconds]
    for row in points:
        lines.append([f"{row['claim']}, {row['model']} on {row['task']}", row["arm"], f"{row['points']:.1f} points"])
    return f"""## Non-negative factors

They are said to be quicker than singular values, and to take 9% off a model for 4 to 10 points without training.

{table(["what", "how", "measured"], lines)}
"""


# Drawing


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _keep(figure: Any, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_figure(file, dpi=120, metadata={"Software": None})


def write() -> None:
    """Writes page and pictures."""
    parts = ["# Low rank\n\nMade by `scripts/studies/low_rank_page.py` from the rows of both low-rank studies.\n\n"]
    PAGE.write_text("".join([*parts, language_model(), encoders()]).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
