"""How much faster a pruned model is, beside the operations it is spared, and what widths that kernels like give.

    python -m scripts.studies.pruned_speed run      # ten minutes, with both cores free
    python -m scripts.studies.pruned_speed page     # docs/pruned_speed.md and its picture, from what was measured

A fine-tuned MPNet-base loses shares of its layers' multiply-adds at once, without training: what stays is chosen as
everywhere, from one pass over calibration texts, so that its uneven widths are real ones. Each result is timed by turns
with the original (8 texts of 128 tokens, 32 bit), and its speed-up stands beside the ratio of their operations.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hfcompress import LayerDroppingConfig, StructuredPruningConfig, compress
from hfcompress.evaluation.cost import measure_speed, speed_inputs
from hfcompress.evaluation.layers import measure_layers
from hfcompress.evaluation.usage import count_operations
from hfcompress.methods.registry import Context
from hfcompress.methods.structured_pruning import structured_pruning
from hfcompress.modeling.anatomy import attention_blocks
from scripts.studies.low_rank_encoders import Bench
from scripts.studies.material import ROOT, add_row, read_rows, results_file, table

RESULTS = results_file("pruned_speed.jsonl")
PAGE = ROOT / "docs" / "pruned_speed.md"
PICTURE = PAGE.with_suffix(".png")
TASK = "mrpc"
EXAMPLES = 256
# Shares of the layers' multiply-adds that go: 1.25, 1.5, 2, 2.5 and 20 times fewer.
SHARES = (0.2, 1 / 3, 0.5, 0.6, 0.95)
MULTIPLES = (1, 8, 16, 32)
FEWER_LAYERS = (6, 4, 3)  # tried where most goes
ASKED = 0.85  # of the ratio of operations, up to 2.5 times fewer
ASKED_AT_LAST = 7.0


# What is measured


def run(asked: argparse.Namespace) -> None:
    """Measures every result that is not there yet."""
    bench, threads = Bench("mpnet-base", TASK, "whole", EXAMPLES), torch.get_num_threads()
    whole = bench.original
    depth = len(attention_blocks(whole))
    points = [(share, multiple, depth) for share in SHARES for multiple in MULTIPLES]
    points += [(SHARES[-1], 8, layers) for layers in FEWER_LAYERS]
    with tempfile.TemporaryDirectory() as folder:
        context = Context(calibration=bench.calibration(), cache_dir=Path(folder))
        for share, multiple, layers in points:
            point = {"removed": share, "multiple": multiple, "layers": layers, "threads": threads}
            if any(point.items() <= row.items() for row in read_rows(RESULTS)):
                continue
            model = bench.load()
            if layers < depth:
                model = compress(model, [LayerDroppingConfig(drop=depth - layers, which="spread")])
            rest = 1 - (1 - share) * depth / layers
            # Nothing is mended: that takes longest, and changes no width.
            config = StructuredPruningConfig(flops=rest, multiple_of=multiple, reconstruct=False)
            structured_pruning(model, config, context)
            row = point | compared(whole, model, asked.repeats)
            add_row(RESULTS, row)


def compared(whole: Any, model: Any, repeats: int) -> dict[str, Any]:
    """Returns what is found out about a result."""
    inputs = speed_inputs(whole.config.vocab_size, 8, 128)
    found = measure_speed(whole, model, inputs, repeats=repeats)
    layers = measure_layers(whole, model, inputs)
    return {
        "operations": count_operations(whole, inputs) / count_operations(model, inputs),
        "speed_up": [found.ratio, found.low, found.high],
        "slow": Counter(f"{layer.path.rpartition('.')[2]}: {layer.reason}" for layer in layers if layer.reason),
    }


# What came of it


def page(asked: argparse.Namespace) -> None:
    """Writes page and picture."""
    threads = max(row["threads"] for row in read_rows(RESULTS))
    rows = [row for row in read_rows(RESULTS) if row["threads"] == threads]
    head = ["layers' multiply-adds removed, neurons kept in multiples of", "layers", "operations", "speed-up"]
    head += ["part of the promise", "layers that fall short, most frequent first"]
    lines = []
    for row in rows:
        ratio, low, high = row["speed_up"]
        slow = ", ".join(f"{count} {name}" for name, count in Counter(row["slow"]).most_common(2))
        name = f"{row['removed']:.0%}, {row['multiple']}"
        cells = [str(row["layers"]), f"1 / {row['operations']:.2f}", f"{ratio:.2f} ({low:.2f} to {high:.2f})"]
        lines.append([name, *cells, f"{ratio / row['operations']:.2f}", slow])
    draw(rows)
    text = f"""# What pruning gains in time

Made by `scripts/studies/pruned_speed.py`. MPNet-base, fine-tuned for {TASK.upper()}, without a share of its layers'
multiply-adds; heads and neurons were chosen by empirical Fisher over {EXAMPLES} sentences, so that layers are uneven.
PyTorch in 32 bit, 8 texts of 128 tokens, {threads} threads, by turns with the original; 95% intervals.
Operations are those of the whole model. With fewer than 12 layers, the others went first, in even places. A layer falls
short where it is slower than its own operations promise, which `hfcompress run` tells of every layer of a result.

{table(head, lines)}
![Speed-up against operations]({PICTURE.name})
"""
    PAGE.write_text(text, encoding="utf-8")


def draw(rows: list[dict[str, Any]]) -> None:
    """Draws speed-up against operations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    ends = [1, max(row["operations"] for row in rows) * 1.1]
    axes.plot(ends, ends, color="#999999", linewidth=1, label="as many times faster as fewer operations")
    axes.plot([1, 2.5], [ASKED, 2.5 * ASKED], color="#c44e52", linewidth=1, label=f"{ASKED} of that, up to 2.5")
    axes.plot([ends[1]], [ASKED_AT_LAST], "_", color="#c44e52", markersize=14)
    depth = max(row["layers"] for row in rows)
    for multiple in MULTIPLES:
        mine = [row for row in rows if row["multiple"] == multiple and row["layers"] == depth]
        points = [(row["operations"], row["speed_up"][0]) for row in mine]
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=f"neurons in multiples of {multiple}")
    fewer = [row for row in rows if row["layers"] < depth]
    axes.plot([row["operations"] for row in fewer], [row["speed_up"][0] for row in fewer], "k^", label="fewer layers")
    for row in fewer:
        axes.annotate(f"{row['layers']}", (row["operations"], row["speed_up"][0]), (6, -3), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="operations, times fewer", ylabel="measured speed-up")
    ticks = [1, 1.5, 2, 3, 5, 10, 20]
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_yticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.legend(fontsize=8)
    FigureCanvasAgg(figure).print_figure(PICTURE, dpi=120, metadata={"Software": None})


def main() -> None:
    """Does what was asked."""
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for work in (run, page):
        commands.add_parser(work.__name__, help=work.__doc__).set_defaults(work=work)
    commands.choices["run"].add_argument("--repeats", type=int, default=15)
    asked = parser.parse_args()
    asked.work(asked)


if __name__ == "__main__":
    main()
