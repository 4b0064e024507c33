"""What the studies of a small language model share: wikitext-2 in blocks, its perplexity, and training.

Factors and masks are fitted to sentences of `wiki.valid.tokens` that hold no `<unk>`. Models are trained on all of its
text, where nothing reads or predicts an `<unk>`: sentences without one are a quarter of it, so few that models see them
several times over. Of both the first three quarters serve, and choices are made on the last. A prefix of
`wiki.test.raw` is read once for every point.

What is compressed is a fine-tuned model, as in use. Its training and that after compression are as many steps together
as one thread does in 15 minutes, and the original gets the same: fine-tuned, then trained on at the same rates. Or it
is the model as it comes, and all these steps are after compression.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from hfcompress.modeling.checkpoint import save
from hfcompress.modeling.surgery import in_pivoted_form, in_two_factors
from scripts.studies.material import add_row, read_rows, study_root

BLOCK = 512
CALIBRATION_BLOCKS = 48
TEST_BLOCKS = 24
CHOICE_SHARE = 0.25
BATCH = 2  # blocks a step
WARM_UP = 20  # steps
# Steps of the fine-tuning, and as many after compression: of one thread 3.6 to 4 s each, so that both are 15 minutes.
STEPS = 110
FINE_TUNED_AT = 1e-4
RATES = (3e-5, 1e-4)  # after compression: each model has the one that serves it best on the part for choices, or none

# What the rows of trained models are called: of models that were fine-tuned before they were compressed, and not.
RECOVERED, RECOVERED_AS_IT_COMES = "recovered", "recovered as it comes"

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
        """Loads the model, in the precision that its file has."""
        model = AutoModelForCausalLM.from_pretrained(self.model, dtype="auto").eval()
        model.config.use_cache = False
        return model

    def fine_tuned(self, seed: int) -> Material:
        """Returns the same with the model fine-tuned, which is done once for a seed: an order of the blocks."""
        folder = study_root() / "language_models" / f"{self.model.name}-{STEPS}-{seed}"
        if not folder.exists():
            model = self.load()
            train(model, self.training, STEPS, seed, FINE_TUNED_AT)
            save(model.to(torch.bfloat16), folder)
        made = copy.copy(self)
        made.model = folder
        return made


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


# Training


def train(model: Any, text: Text, steps: int, seed: int, rate: float, first: int = 0) -> None:
    """Trains a model on blocks of a text in 32 bit with bfloat16 products, the rate falling to nothing.

    Pivoted layers are trained as hfcompress's Trainer does it: as two factors, which are pivoted in the end.

    Args:
        model: The model.
        text: The blocks.
        steps: How many.
        seed: Order of the blocks; all have their turn before one has its second.
        rate: The highest learning rate.
        first: Steps of the same order that were done before.
    """
    model = model.float().train()
    pivoted = in_two_factors(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    count, generator = len(text["labels"]), torch.Generator().manual_seed(seed)
    rounds = math.ceil((first + steps) * BATCH / count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)]).split(BATCH)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**rows_of(text, order[first + step])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    in_pivoted_form(model, pivoted)


def recover(
    file: Path,
    point: dict[str, Any],
    material: Material,
    make: Callable[[], tuple[Any, dict[str, Any]]],
    rates: Sequence[float],
    blocks: int,
    *,
    before: int = STEPS,
) -> None:
    """Measures a compressed model, and what it is after more steps at each rate.

    Args:
        file: Where the rows are.
        point: What names the model in them, with its `seed`. All but seed 0 have the rate that this has chosen, once
            it has.
        material: The texts.
        make: Compresses the model, and says what was found.
        rates: Learning rates.
        blocks: Of the test file; 0 for all of it.
        before: Steps of the fine-tuning that it had. With those after compression they are always as many.
    """
    text = rows_of(material.test, slice(blocks or None))
    point = point | {"study": RECOVERED if before else RECOVERED_AS_IT_COMES, "test_blocks": len(text["labels"])}
    found = [row for row in read_rows(file) if row | point | {"seed": 0} == row]
    if point["seed"] and {row["rate"] for row in found} >= {0.0, *rates}:
        rates = [chosen_rate(found)]
    after = 2 * STEPS - before
    points = [point | {"steps": after if rate else 0, "rate": rate} for rate in dict.fromkeys((0.0, *rates))]
    points = [each for each in points if pending(read_rows(file), each)]
    if not points:
        return
    made, said = make()
    for each in points:
        model = copy.deepcopy(made)
        if each["steps"]:
            train(model, material.training, each["steps"], each["seed"], each["rate"], first=before)
            model = model.to(torch.bfloat16)
        measured = {"perplexity": perplexity(model, text)}
        if not each["seed"]:
            measured["choices"] = perplexity(model, material.choices)
        add_row(file, each | measured | said)


def pending(rows: Sequence[dict[str, Any]], point: dict[str, Any]) -> bool:
    """Tells whether no row is of this point."""
    return not any(row | point == row for row in rows)


def chosen_rate(rows: Sequence[dict[str, Any]]) -> float:
    """Returns the rate after compression, 0 for no training, that serves a model best where choices are made."""
    return min((row for row in rows if row["seed"] == 0), key=lambda row: row["choices"])["rate"]


def recovered(rows: Sequence[dict[str, Any]], *names: str, study: str = RECOVERED) -> list[dict[str, Any]]:
    """Returns the rows after compression and training.

    Args:
        rows: A study's rows.
        names: Of the fields that tell its models from each other, `arm` first.
        study: Of models that were fine-tuned before, or as they come.

    Returns:
        Each model's at the rate that the first seed has chosen for it, with a `ratio` to the original's of the same
        seed; none of a model that the first seed has not trained yet.
    """
    models: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["study"] == study:
            models.setdefault(tuple(row[name] for name in names), []).append(row)
    begun = [model for model in models.values() if any(row["seed"] == 0 and row["rate"] for row in model)]
    chosen = [row for model in begun for row in model if row["rate"] == chosen_rate(model)]
    originals = {row["seed"]: row["perplexity"] for row in chosen if row["arm"] == "original"}
    return [row | {"ratio": row["perplexity"] / originals[row["seed"]]} for row in chosen if row["seed"] in originals]


# Command lines


def add_arguments(command: argparse.ArgumentParser, *, trains: bool) -> None:
    """Adds what every study of a language model can be told."""
    command.add_argument("model", type=Path)
    command.add_argument("wikitext", type=Path)
    command.add_argument("--blocks", type=int, default=TEST_BLOCKS, help="of the test file; 0 for all of it")
    command.add_argument("--calibration", type=int, default=CALIBRATION_BLOCKS, help="blocks to fit to")
    if trains:
        command.add_argument("--seeds", nargs="+", type=int, default=[0])
        command.add_argument("--rates", nargs="+", type=float, default=RATES)


def prepare() -> None:
    """Sets what every study of a language model needs set."""
    logging.disable_progress_bar()
    # Activations of a bf16 model are bf16 numbers: products of them are exact in this mode, and three times as fast.
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
