"""Low-rank factorization of a small language model: perplexity on wikitext-2 by method and share removed.

    python -m scripts.studies.low_rank run MODEL WIKITEXT                  # without training; an hour or two
    python -m scripts.studies.low_rank run MODEL WIKITEXT --part choices   # on a part of the calibration file
    python -m scripts.studies.low_rank recover MODEL WIKITEXT              # each 15 minutes of training
    python -m scripts.studies.low_rank summary                             # table of what is there

MODEL is SmolLM2-135M (any causal language model works), WIKITEXT a folder with `wiki.valid.tokens` and
`wiki.test.raw`. Factors are fitted to sentences of the former that hold no `<unk>`. Models are trained on all of its
text, where nothing reads or predicts an `<unk>`: sentences without one are a quarter of it, so few that models see them
several times over within 15 minutes. Of both the first three quarters serve, and choices are made on the last. Every
point reads a prefix of the test file once; the share is that of the linear layers' parameters. A row of the results is
one point, and points that are there are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hfcompress import LowRankConfig
from hfcompress.methods.low_rank import low_rank
from hfcompress.methods.low_rank.method import Knowledge, float_layers, learn
from hfcompress.methods.registry import Context
from hfcompress.modeling.anatomy import base_model, modules_of
from hfcompress.modeling.checkpoint import save
from hfcompress.modeling.surgery import in_pivoted_form, in_two_factors
from scripts.studies.material import add_row, read_rows, results_file, study_root

RESULTS = results_file("low_rank.jsonl")
REMOVED = (0.1, 0.2, 0.3, 0.4)
BLOCK = 512
CALIBRATION_BLOCKS = 48
TEST_BLOCKS = 24
CHOICE_SHARE = 0.25
RECOVERY = {"seconds": 900, "batch": 2, "warmup": 20}
# Each model gets the one that serves it best on the part for choices.
RATES = (3e-5, 1e-4)

_WHITENED: dict[str, Any] = {"method": "whitened"}
_CURVED: dict[str, Any] = {"method": "whitened", "weigh_outputs": True}
_BUDGET: dict[str, Any] = {"size": "budget", "sensitivity": "curvature"}
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

# Blocks of tokens, int64 `(blocks, BLOCK)`, as a model's arguments; labels are -100 where nothing is to be predicted.
Text = dict[str, torch.Tensor]


# Text


def whole_sentences(text: str) -> str:
    """Returns the sentences of a tokenized wikitext file that hold no unknown word, paragraphs kept apart."""
    kept: list[str] = []
    for line in text.split("\n"):
        sentences = [each for each in re.split(r"(?<= \.) ", line) if "<unk>" not in each and each.strip()]
        if sentences:
            kept.append(" ".join(sentences))
    return "\n".join(kept)


def blocks_of(text: str, tokenizer: Any) -> Text:
    """Cuts a text into blocks of tokens, in which no `<unk>` is read or predicted; a rest at the end is dropped."""
    ids: list[int] = []
    known: list[bool] = []
    for number, part in enumerate(text.split("<unk>")):
        found = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        gap = [tokenizer.unk_token_id] * (number > 0)
        ids += gap + found
        known += [False] * len(gap) + [True] * len(found)
    count = len(ids) // BLOCK * BLOCK
    tokens, mask = (torch.tensor(each[:count]).view(-1, BLOCK) for each in (ids, known))
    masked = {} if mask.all() else {"attention_mask": mask.long()}
    return {"input_ids": tokens, "labels": tokens.where(mask, -100), **masked}


def rows_of(text: Text, rows: Any) -> Text:
    """Returns some of a text's blocks."""
    return {name: each[rows] for name, each in text.items()}


def without_last(text: Text, share: float) -> tuple[Text, Text]:
    """Parts a text; the share is that of the second part."""
    at = len(text["labels"]) - int(share * len(text["labels"]))
    return rows_of(text, slice(at)), rows_of(text, slice(at, None))


class Material:
    """The model and its texts."""

    def __init__(self, model: Path, wikitext: Path) -> None:
        self.model = model
        tokenizer = AutoTokenizer.from_pretrained(model)
        text = (wikitext / "wiki.valid.tokens").read_text()
        self.fitted_to, self.choices = without_last(blocks_of(whole_sentences(text), tokenizer), CHOICE_SHARE)
        self.training = without_last(blocks_of(text, tokenizer), CHOICE_SHARE)[0]
        self.test = blocks_of((wikitext / "wiki.test.raw").read_text(), tokenizer)

    def calibration(self, count: int) -> list[Text]:
        """Draws blocks to fit to, as batches of two."""
        order = torch.randperm(len(self.fitted_to["labels"]), generator=torch.Generator().manual_seed(0))
        return [rows_of(self.fitted_to, part) for part in order[:count].split(2)]

    def load(self) -> Any:
        """Loads the original, in the precision that its file has."""
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto").eval()
        model.config.use_cache = False
        return model


@torch.no_grad()
def perplexity(model: Any, text: Text) -> float:
    """Returns the perplexity of all tokens but each block's first."""
    total = count = 0.0
    for part in torch.arange(len(text["labels"])).split(4):
        batch = rows_of(text, part)
        labels = batch.pop("labels")
        for wanted, logits in zip(labels[:, 1:], model.eval()(**batch).logits, strict=True):
            total += functional.cross_entropy(logits[:-1].float(), wanted, reduction="sum").item()
            count += wanted.ne(-100).sum().item()
    return math.exp(total / count)


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


def pending(rows: Sequence[dict[str, Any]], point: dict[str, Any]) -> bool:
    """Tells whether no row is of this point."""
    return not any(all(row.get(key) == value for key, value in point.items()) for row in rows)


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
        self._known: dict[str, Any] = {}

    def of(self, config: LowRankConfig) -> Knowledge:
        """Returns what an arm is fitted to."""
        method = config.method_with(data=True)
        if method == "fisher":
            return self._learned("fisher", LowRankConfig(targets=config.targets, method="fisher"))
        inputs = outputs = curvature = {}
        if method == "whitened":
            learned = self._learned("inputs", LowRankConfig(targets=config.targets, method="whitened"))
            inputs, outputs = learned.inputs, learned.outputs
        if config.weigh_outputs:
            wanted = LowRankConfig(targets=config.targets, method="whitened", weigh_outputs=True, sequential=True)
            curvature = self._learned("curvature", wanted).curvature
        return Knowledge(method=method, inputs=inputs, outputs=outputs, curvature=curvature)

    def _learned(self, name: str, config: LowRankConfig) -> Knowledge:
        if name not in self._known:
            model = self.load()
            paths = list(float_layers(model, config)[0])
            self._known[name] = learn(model, paths, config, config.method_with(data=True), self.batches)
        return self._known[name]


def factorized(material: Material, config: LowRankConfig, statistics: Statistics) -> Any:
    """Returns the model with factors."""
    model = material.load()
    low_rank(model, config, Context(calibration=statistics.batches), knowledge=statistics.of(config))
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


def train(model: Any, text: Text, seconds: float, seed: int, rate: float) -> int:
    """Trains a model on blocks of a text for a time; returns the number of steps. The same for every model.

    Pivoted layers are trained as hfcompress's Trainer does it: as two factors, which are pivoted in the end.
    """
    model = model.float().train()
    pivoted = in_two_factors(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    generator, step, started = torch.Generator().manual_seed(seed), 0, time.thread_time()
    while (spent := time.thread_time() - started) < seconds:
        left = 1 - spent / seconds  # the rate falls with the time that is used up
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / RECOVERY["warmup"]) * left
        drawn = torch.randint(len(text["labels"]), (int(RECOVERY["batch"]),), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**rows_of(text, drawn)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    in_pivoted_form(model, pivoted)
    return step


def factorized_once(material: Material, arm: str, removed: float, statistics: Statistics) -> Any:
    """Returns the model with an arm's factors, which are made once and serve every seed."""
    folder = study_root() / "low_rank" / f"{arm.replace(', ', '-')}-{removed}-{len(statistics.batches)}"
    if not folder.exists():
        save(factorized(material, config_of(arm, removed), statistics), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.config.use_cache = False
    return model


def recover(asked: argparse.Namespace) -> None:
    """Trains the original and factorised models alike, and measures them.

    Time is that of the one thread that trains, so that what else the machine does takes nothing off it.
    """
    torch.set_num_threads(1)
    material = Material(asked.model, asked.wikitext)
    text = rows_of(material.test, slice(asked.blocks or None))
    statistics = Statistics(material.load, material.calibration(asked.calibration))
    points = [("original", 0.0), *((arm, removed) for arm in asked.arms for removed in asked.removed)]
    for seed, rate, (arm, removed) in product(asked.seeds, asked.rates, points):
        point = {"study": "recovered", "part": "test", "test_blocks": len(text["labels"]), "arm": arm}
        point |= {"removed": removed, "seconds": asked.seconds, "seed": seed, "rate": rate}
        if not pending(read(), point):
            continue
        model = material.load() if arm == "original" else factorized_once(material, arm, removed, statistics)
        steps = train(model, material.training, asked.seconds, seed, rate)
        model = model.to(torch.bfloat16)
        found = {"choices": perplexity(model, material.choices), "perplexity": perplexity(model, text)}
        write(point | {"steps": steps} | found)


# What came of it


def recovered(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows after training, each arm's at the rate that served it best on the part for choices.

    They have a `ratio` to the original with the same seed, at the rate that is best for that.
    """
    rows = [row for row in rows if row["study"] == "recovered"]
    best: dict[tuple[str, float], dict[str, Any]] = {}
    for row in rows:
        if row["seed"] == 0:
            key = row["arm"], row["removed"]
            best[key] = min(best.get(key, row), row, key=lambda each: each["choices"])
    chosen = [row for row in rows if row["rate"] == best[row["arm"], row["removed"]]["rate"]]
    originals = {row["seed"]: row["perplexity"] for row in chosen if row["arm"] == "original"}
    return [row | {"ratio": row["perplexity"] / originals[row["seed"]]} for row in chosen if row["seed"] in originals]


def summary(asked: argparse.Namespace) -> None:
    """Prints what is there; `scripts.studies.low_rank_page` writes it with a picture."""
    rows = read()
    for row in [row for row in rows if row["study"] == "without training" and row["part"] == asked.part]:
        print(f"{row['arm']:45} {row['removed']:4.0%} {row['perplexity']:12.2f} {row.get('ratio', 1.0):10.3f}")
    for row in recovered(rows):
        name = f"{row['arm']}, recovered at {row['rate']:.0e}, seed {row['seed']}"
        print(f"{name:70} {row['removed']:4.0%} {row['perplexity']:8.2f} {row['ratio']:8.3f}")


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for work in (run, recover, summary):
        command = commands.add_parser(work.__name__, help=work.__doc__)
        command.set_defaults(work=work)
        command.add_argument("--part", choices=("test", "choices"), default="test")
        if work is summary:
            continue
        command.add_argument("model", type=Path)
        command.add_argument("wikitext", type=Path)
        arms = list(ARMS) if work is run else [RECOVERED]
        command.add_argument("--arms", nargs="+", choices=list(ARMS), default=arms)
        command.add_argument("--removed", nargs="+", type=float, default=REMOVED if work is run else REMOVED[:2])
        command.add_argument("--blocks", type=int, default=TEST_BLOCKS, help="of the test file; 0 for all of it")
        command.add_argument("--calibration", type=int, default=CALIBRATION_BLOCKS, help="blocks to fit to")
    command = commands.choices["recover"]
    command.add_argument("--seeds", nargs="+", type=int, default=[0])
    command.add_argument("--rates", nargs="+", type=float, default=RATES)
    command.add_argument("--seconds", type=float, default=RECOVERY["seconds"])
    return parser.parse_args()


def main() -> None:
    """Does what was asked."""
    logging.disable_progress_bar()
    # Activations of a bf16 model are bf16 numbers: products of them are exact in this mode, and three times as fast.
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    asked = arguments()
    asked.work(copy.copy(asked))


if __name__ == "__main__":
    main()
