"""Pruning a small language model: a quarter of its FFN neurons, or of its groups of heads; perplexity on wikitext-2.

    python -m scripts.studies.pruning_smollm2 run MODEL WIKITEXT      # without training; some twenty minutes
    python -m scripts.studies.pruning_smollm2 recover MODEL WIKITEXT  # fine-tuned, pruned, trained on
    python -m scripts.studies.pruning_smollm2 recover MODEL WIKITEXT --as-it-comes  # pruned, trained on
    python -m scripts.studies.pruning_smollm2 page                    # docs/pruning_language_model.md

MODEL, WIKITEXT, the text calibrated and trained on, perplexity and recovery are those of
`scripts.studies.language_model`. Points that are there are not measured again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from hfcompress import StructuredPruningConfig
from hfcompress.methods.registry import Context
from hfcompress.methods.structured_pruning import structured_pruning
from hfcompress.modeling.measure import count_parameters
from scripts.studies import language_model
from scripts.studies.language_model import (
    BATCH,
    RECOVERED,
    RECOVERED_AS_IT_COMES,
    STEPS,
    Material,
    pending,
    perplexity,
    recovered,
    rows_of,
)
from scripts.studies.material import ROOT, add_row, read_rows, results_file, table

RESULTS = results_file("pruning_smollm2.jsonl")
PAGE = ROOT / "docs" / "pruning_language_model.md"
SHARE = 0.25
ARMS: dict[str, dict[str, Any]] = {
    "original": {},
    "neurons": {"neurons": SHARE},
    "neurons, by activation": {"neurons": SHARE, "importance": "activation"},
    "neurons, not reconstructed": {"neurons": SHARE, "reconstruct": False},
    "neurons, by magnitude": {"neurons": SHARE, "importance": "magnitude", "reconstruct": False},
    "groups of heads": {"heads": SHARE},
    "groups of heads, not reconstructed": {"heads": SHARE, "reconstruct": False},
    "groups of heads, by magnitude": {"heads": SHARE, "importance": "magnitude", "reconstruct": False},
}
TRAINED = ("original", "neurons", "groups of heads")

_INTRODUCTION = """# A quarter of a small language model's neurons, or of its groups of heads

Made by `scripts/studies/pruning_smollm2.py`: SmolLM2 (134.5M parameters, unpacked from 4 bits) loses a quarter of its
FFN neurons, or of its key-value heads with the queries that read them. Units are ranked by the empirical Fisher
information, and what reads them is mended by least squares, on 48 blocks of 512 tokens of wikitext-2's
`wiki.valid.tokens`, unless the arm says otherwise. Perplexity is that of the first 24 blocks of `wiki.test.raw`.

## Without training

"""
_RECOVERED = f"""
## After training

{2 * STEPS} steps of {BATCH} blocks take one thread some 15 minutes, on three quarters of `wiki.valid.tokens`, where no
`<unk>` is read or predicted. Each model has the learning rate that served it best on the last quarter; the ratio is to
the original with the same training. The third column is the model right after pruning. One seed.

"""
_STUDIES = {
    RECOVERED_AS_IT_COMES: "Pruned as it comes, then trained",
    RECOVERED: "Fine-tuned for half of the steps, pruned, then trained for the other half",
}


def pruned(material: Material, arm: str, calibration: int) -> tuple[Any, dict[str, Any]]:
    """Returns the model as an arm makes it, and what was found."""
    model, started = material.load(), time.perf_counter()
    before = count_parameters(model)
    if ARMS[arm]:
        context = Context(calibration=material.calibration(calibration))
        structured_pruning(model, StructuredPruningConfig(**ARMS[arm]), context)
    found = {"parameters_removed": round(1 - count_parameters(model) / before, 4)}
    return model, found | {"seconds": round(time.perf_counter() - started, 1)}


def run(asked: argparse.Namespace) -> None:
    """Measures every arm that is not there yet, without training."""
    material = Material(asked.model, asked.wikitext)
    text = rows_of(material.test, slice(asked.blocks or None))
    for arm in ARMS:
        point = {"study": "without training", "arm": arm, "test_blocks": len(text["labels"])}
        point |= {"calibration_blocks": asked.calibration}
        if pending(read_rows(RESULTS), point):
            model, found = pruned(material, arm, asked.calibration)
            add_row(RESULTS, point | {"perplexity": perplexity(model, text)} | found)


def recover(asked: argparse.Namespace) -> None:
    """Fine-tunes the model if it is to be, prunes it and trains it on; the original beside it."""
    torch.set_num_threads(1)
    material = Material(asked.model, asked.wikitext)
    before = 0 if asked.as_it_comes else STEPS
    for seed in asked.seeds:
        begun = material.fine_tuned(seed) if before else material
        for arm in TRAINED:
            made, point = partial(pruned, begun, arm, asked.calibration), {"arm": arm, "seed": seed}
            language_model.recover(RESULTS, point, begun, made, asked.rates, asked.blocks, before=before)


def page(asked: argparse.Namespace) -> None:
    """Writes docs/pruning_language_model.md, of what is measured."""
    rows = read_rows(RESULTS)
    first = [row for row in rows if row["study"] == "without training"]
    base = {each["test_blocks"]: each["perplexity"] for each in first if each["arm"] == "original"}
    text = _INTRODUCTION + _table([row | {"ratio": row["perplexity"] / base[row["test_blocks"]]} for row in first])
    trained = [_trained(rows, study) for study in _STUDIES]
    if any(trained):
        text += _RECOVERED + "\n".join(filter(None, trained))
    PAGE.write_text(text, encoding="utf-8")


def _trained(rows: Sequence[dict[str, Any]], study: str) -> str:
    """Returns the table of a study's models that were trained, with what they were before; none: no text."""
    mine = [row for row in rows if row["study"] == study]
    lines = []
    for row in recovered(mine, "arm", study=study):
        same = {name: row[name] for name in ("arm", "seed", "test_blocks")} | {"rate": 0.0}
        before = next(each for each in mine if each | same == each)
        figures = (before["perplexity"], row["perplexity"], row["ratio"])
        lines.append([row["arm"], f"{row['parameters_removed']:.1%}", *map(_figure, figures)])
    head = ["arm", "fewer parameters", "as it is pruned", "perplexity", "times the original's"]
    rates = " or ".join(
        f"{rate:.0e}".replace("e-0", "e-") for rate in sorted({row["rate"] for row in mine if row["rate"]})
    )
    return f"{_STUDIES[study]}, at {rates}:\n\n{table(head, lines)}" if lines else ""


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [row["arm"], f"{row['parameters_removed']:.1%}", _figure(row["perplexity"]), _figure(row["ratio"])]
        for row in rows
    ]
    return table(["arm", "fewer parameters", "perplexity", "times the original's"], lines)


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def main() -> None:
    """Does what was asked."""
    language_model.prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for work in (run, recover, page):
        command = commands.add_parser(work.__name__, help=work.__doc__)
        command.set_defaults(work=work)
        if work is not page:
            language_model.add_arguments(command, trains=work is recover)
        if work is recover:
            command.add_argument("--as-it-comes", action="store_true", help="not fine-tuned: all steps after pruning")
    asked = parser.parse_args()
    asked.work(asked)


if __name__ == "__main__":
    main()
