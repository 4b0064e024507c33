"""Low-rank factorization of a small language model: perplexity on wikitext-2 by method and share removed.

    python -m scripts.studies.low_rank run MODEL WIKITEXT                  # without training; an hour or two
    python -m scripts.studies.low_rank run MODEL WIKITEXT --part choices   # on a part of the calibration file
    python -m scripts.studies.low_rank recover MODEL WIKITEXT              # fine-tuned, factorised, trained on
    python -m scripts.studies.low_rank summary                             # table of what is there

MODEL is SmolLM2-135M (any causal language model works), WIKITEXT a folder with `wiki.valid.tokens` and
`wiki.test.raw`; what is done with them says `scripts.studies.language_model`. The share is that of the linear layers'
parameters. A row of the results is one point, and points that are there are not measured again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

from hfcompress import LowRankConfig
from hfcompress.methods.low_rank import low_rank
from hfcompress.methods.low_rank.config import Method
from hfcompress.methods.low_rank.method import Knowledge, float_layers, learn
from hfcompress.methods.registry import Context
from hfcompress.modeling.anatomy import base_model, modules_of
from scripts.studies import language_model
from scripts.studies.language_model import Material, pending, perplexity, recovered, rows_of
from scripts.studies.material import add_row, read_rows, results_file

RESULTS = results_file("low_rank.jsonl")
REMOVED = (0.1, 0.2, 0.3, 0.4)

_WHITENED: dict[str, Any] = {"method": "whitened", "weigh_outputs": False}
_CURVED: dict[str, Any] = {"method": "whitened"}
_BUDGET: dict[str, Any] = {"size": "budget"}
# What is compared; `size` says whether a share is that of every layer or a budget of all.
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"method": "svd"},
    "fisher": {"method": "fisher"},
    "whitened": _WHITENED,
    "whitened, sequential": _WHITENED | {"sequential": True},
    "whitened, sequential, budget": _WHITENED | {"sequential": True, "size": "budget", "sensitivity_batches": 1},
    "curvature": _CURVED,
    "curvature, pivoted": _CURVED | {"pivoted": True},
    "curvature, budget": _CURVED | _BUDGET,
    "curvature, budget, pivoted": _CURVED | _BUDGET | {"pivoted": True},
    "curvature, budget, pivoted, sequential": _CURVED | _BUDGET | {"pivoted": True, "sequential": True},
}
RECOVERED = "curvature, budget, pivoted"


def linear_parameters(model: Any) -> int:
    """Counts the numbers of the factorised layers' matrices, whatever they are made of now."""
    base = base_model(model)
    return sum(
        each.numel() for path in modules_of(model, ("linear",)) for each in base.get_submodule(path).parameters()
    )


# Results


def read() -> list[dict[str, Any]]:
    """Returns the rows that are there."""
    return read_rows(RESULTS)


def write(row: dict[str, Any]) -> None:
    """Adds a row."""
    add_row(RESULTS, row)


# Without training


def config_of(arm: str, removed: float) -> LowRankConfig:
    """Returns the config of an arm that keeps the rest of the linear layers' parameters."""
    settings = dict(ARMS[arm])
    size = settings.pop("size", "keep")
    return LowRankConfig(targets=("linear",), **{size: round(1 - removed, 6)}, **settings)


class Statistics:
    """What is read off the original once and serves every arm."""

    def __init__(self, load: Callable[[], Any], batches: list[dict[str, torch.Tensor]]) -> None:
        self.load, self.batches = load, batches
        self._known: dict[str, Knowledge] = {}
        self._measured: dict[str, dict[str, dict[int, float]]] = {}

    def of(self, config: LowRankConfig) -> Knowledge:
        """Returns what an arm is fitted to."""
        method = config.method_with(data=True)
        weighs = config.weighs_outputs_with(method)
        asked = LowRankConfig(
            targets=config.targets, method=method, weigh_outputs=weighs, sequential=config.sequential and weighs
        )
        inputs = asked.model_copy(update={"weigh_outputs": False, "sequential": False})
        found = self._learned(asked, method)
        if asked.sequential:  # it needs inputs as well, to share out ranks
            found = replace(found, inputs=self._learned(inputs, method).inputs)
        return replace(found, measured=self._measured.get(_but_budget(config), {}))

    def measured(self, config: LowRankConfig, findings: dict[str, Any]) -> None:
        """Keeps what a budget went by for another one."""
        if config.budget is not None and config.sensitivity_with(config.method_with(data=True)) != "curvature":
            self._measured[_but_budget(config)] = findings["sensitivity"]

    def _learned(self, config: LowRankConfig, method: Method) -> Knowledge:
        name = config.model_dump_json()
        if name not in self._known:
            model = self.load()
            self._known[name] = learn(model, list(float_layers(model, config)[0]), config, method, self.batches)
        return self._known[name]


def _but_budget(config: LowRankConfig) -> str:
    return config.model_dump_json(exclude={"budget"})


def factorized(material: Material, config: LowRankConfig, statistics: Statistics) -> Any:
    """Returns the model with factors."""
    model = material.load()
    found = low_rank(model, config, Context(calibration=statistics.batches), knowledge=statistics.of(config))
    statistics.measured(config, found)
    return model


def run(asked: argparse.Namespace) -> None:
    """Measures every point that is not there yet."""
    material = Material(asked.model, asked.wikitext)
    text = rows_of(material.choices if asked.part == "choices" else material.test, slice(asked.blocks or None))
    common = {"study": "without training", "part": asked.part, "test_blocks": len(text["labels"])}
    statistics = Statistics(material.load, material.calibration(asked.calibration))
    if pending(read(), common | {"arm": "original"}):
        write(common | {"arm": "original", "removed": 0.0, "perplexity": perplexity(material.load(), text)})
    base = next(row for row in read() if not pending([row], common | {"arm": "original"}))["perplexity"]
    for arm in asked.arms:
        for removed in asked.removed:
            point = common | {"arm": arm, "removed": removed, "calibration_blocks": asked.calibration}
            if not pending(read(), point):
                continue
            started = time.perf_counter()
            model = factorized(material, config_of(arm, removed), statistics)
            seconds = time.perf_counter() - started
            found = perplexity(model, text)
            kept = linear_parameters(model) / linear_parameters(material.load())
            row = {"kept": round(kept, 4), "perplexity": found, "ratio": round(found / base, 4)}
            write(point | row | {"seconds": round(seconds, 1)})


# After training


def make(material: Material, statistics: Statistics, arm: str, removed: float) -> tuple[Any, dict[str, Any]]:
    """Returns an arm's model, and nothing more to be said of it."""
    made = material.load() if arm == "original" else factorized(material, config_of(arm, removed), statistics)
    return made, {}


def recover(asked: argparse.Namespace) -> None:
    """Fine-tunes the model, factorises it and trains it on; the original beside it."""
    torch.set_num_threads(1)
    material = Material(asked.model, asked.wikitext)
    for seed in asked.seeds:
        tuned = material.fine_tuned(seed)
        statistics = Statistics(tuned.load, tuned.calibration(asked.calibration))
        for arm, removed in [*product(asked.arms, asked.removed), ("original", 0.0)]:
            point = {"arm": arm, "removed": removed, "seed": seed}
            made = partial(make, tuned, statistics, arm, removed)
            language_model.recover(RESULTS, point, tuned, made, asked.rates, asked.blocks)


# What came of it


def summary(asked: argparse.Namespace) -> None:
    """Prints what is there; `scripts.studies.low_rank_page` writes it with a picture."""
    rows = read()
    for row in [row for row in rows if row["study"] == "without training" and row["part"] == asked.part]:
        print(f"{row['arm']:45} {row['removed']:4.0%} {row['perplexity']:12.2f} {row.get('ratio', 1.0):10.3f}")
    for row in recovered(rows, "arm", "removed"):
        name = f"{row['arm']}, trained on at {row['rate']:.0e}, seed {row['seed']}"
        print(f"{name:70} {row['removed']:4.0%} {row['perplexity']:8.2f} {row['ratio']:8.3f}")


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for work in (run, recover, summary):
        command = commands.add_parser(work.__name__, help=work.__doc__)
        command.set_defaults(work=work)
        if work is not recover:
            command.add_argument("--part", choices=("test", "choices"), default="test")
        if work is not summary:
            language_model.add_arguments(command, trains=work is recover)
            command.add_argument(
                "--arms", nargs="+", choices=list(ARMS), default=list(ARMS) if work is run else [RECOVERED]
            )
            command.add_argument("--removed", nargs="+", type=float, default=REMOVED)
    return parser.parse_args()


def main() -> None:
    """Does what was asked."""
    language_model.prepare()
    asked = arguments()
    asked.work(asked)


if __name__ == "__main__":
    main()
