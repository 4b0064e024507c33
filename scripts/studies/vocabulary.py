"""Vocabulary trimming on fine-tuned MiniLM-L6: bytes saved, and whether predictions are the same.

    python -m scripts.studies.vocabulary run [--tasks sst2 mrpc]
    python -m scripts.studies.vocabulary page                         # docs/vocabulary.md

The tokens that the training texts never use go, from model and tokenizer. Every example of train and validation is
asked of the original and of the saved and reloaded result. Examples whose tokens all remain must be answered by the
very same logits; the others, which hold a word that train has not, are cut into other pieces and told apart. Models
and data are those of `scripts.studies.material`. Tasks that are there are not measured again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from hfcompress import VocabularyConfig
from hfcompress.methods.registry import Context
from hfcompress.methods.vocabulary import vocabulary
from hfcompress.modeling.measure import weight_bytes
from hfcompress.modeling.saving import save
from hfcompress.tasks import get_task, load_data
from scripts.studies.material import (
    ROOT,
    TASKS,
    add_row,
    glue_folder,
    make_teacher,
    read_rows,
    results_file,
    table,
)

RESULTS = results_file("vocabulary.jsonl")
PAGE = ROOT / "docs" / "vocabulary.md"
MODEL = "minilm-l6"
Texts = Sequence[tuple[str, ...]]

_INTRODUCTION = """# A vocabulary as large as its task

Made by `scripts/studies/vocabulary.py`: fine-tuned MiniLM-L6 (22.7M parameters, float32) without the tokens that the
task's training texts never use; model and tokenizer are saved together and loaded again. Nothing is trained after.

Every text of train and validation is answered by the original and by the result, one by one. Texts whose tokens all
remain give the same tokens, and *the same logits* says for how many of them every bit of the answer is the same. The
other texts hold a word that no training text has, are cut into smaller pieces, and may be answered otherwise. Accuracy
is that on validation, all its texts counted.

"""


def cut(tokenizer: Any, texts: Texts) -> list[tuple[str, ...]]:
    """Returns each example's tokens by their names, which trimming does not change."""
    return [tuple(tokenizer.convert_ids_to_tokens(each)) for each in _encoded(tokenizer, texts)["input_ids"]]


def _encoded(tokenizer: Any, texts: Texts) -> Any:
    return tokenizer(*map(list, zip(*texts, strict=True)), truncation=True, max_length=128)


@torch.no_grad()
def logits(model: Any, tokenizer: Any, texts: Texts) -> torch.Tensor:
    """Returns the answers to examples one by one, so that no padding is in the way."""
    encoded = _encoded(tokenizer, texts)
    each = ({name: torch.tensor([values[i]]) for name, values in encoded.items()} for i in range(len(texts)))
    return torch.cat([model(**inputs).logits for inputs in tqdm(each, total=len(texts), desc="texts", leave=False)])


def measure(name: str) -> dict[str, Any]:
    """Trims one task's model and compares."""
    task, original = get_task(name), make_teacher(MODEL, name)
    splits = load_data(task, str(glue_folder()), progress=False)
    texts = {part: list(zip(*(rows[column] for column in task.columns), strict=True)) for part, rows in splits.items()}
    tokenizer = AutoTokenizer.from_pretrained(original)
    model: Any = AutoModelForSequenceClassification.from_pretrained(original).eval()
    before = {part: (cut(tokenizer, each), logits(model, tokenizer, each)) for part, each in texts.items()}
    flat = [text for example in texts["train"] for text in example]
    found = vocabulary(model, VocabularyConfig(), Context(tokenizer=tokenizer, texts=flat))
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "trimmed"
        save(model, saved, tokenizer=tokenizer)
        smaller, size = AutoTokenizer.from_pretrained(saved), weight_bytes(saved)
        again = AutoModelForSequenceClassification.from_pretrained(saved).eval()
        after = {part: (cut(smaller, each), logits(again, smaller, each)) for part, each in texts.items()}
    return {
        "task": name,
        "tokens": {"kept": found["kept"], "of": found["of"]},
        "bytes": {"before": weight_bytes(original), "after": size},
        **{part: _compared(before[part], after[part], splits[part]["label"]) for part in texts},
    }


def _compared(before: tuple[Any, torch.Tensor], after: tuple[Any, torch.Tensor], labels: Any) -> dict[str, Any]:
    same = torch.tensor([one == other for one, other in zip(before[0], after[0], strict=True)])
    alike = (before[1] == after[1]).all(1)
    answers = [each.argmax(1) for each in (before[1], after[1])]
    right = [float((each == torch.tensor(labels)).float().mean()) for each in answers]
    return {
        "examples": len(same),
        "with_the_same_tokens": int(same.sum()),
        "of_these_the_same_logits": int(alike[same].sum()),
        "other_answers_on_the_rest": int((answers[0] != answers[1])[~same].sum()),
        "accuracy": {"before": right[0], "after": right[1]},
    }


def run(asked: argparse.Namespace) -> None:
    """Measures the tasks that are not there yet."""
    logging.disable_progress_bar()
    done = {row["task"] for row in read_rows(RESULTS)}
    for name in asked.tasks:
        if name not in done:
            add_row(RESULTS, measure(name))


def page(_asked: argparse.Namespace) -> None:
    """Writes docs/vocabulary.md, of what is measured."""
    rows = read_rows(RESULTS)
    sizes = [
        [
            row["task"],
            f"{row['tokens']['kept']:,} of {row['tokens']['of']:,}",
            *(f"{row['bytes'][when] / 1e6:.1f} MB" for when in ("before", "after")),
            f"{1 - row['bytes']['after'] / row['bytes']['before']:.1%}",
            *(f"{100 * row['validation']['accuracy'][when]:.2f}" for when in ("before", "after")),
        ]
        for row in rows
    ]
    answers = [
        [
            row["task"],
            part,
            *(f"{row[part][name]:,}" for name in ("examples", "with_the_same_tokens", "of_these_the_same_logits")),
            f"{row[part]['examples'] - row[part]['with_the_same_tokens']:,}",
            f"{row[part]['other_answers_on_the_rest']:,}",
        ]
        for row in rows
        for part in ("train", "validation")
    ]
    heads = (
        ["task", "tokens kept", "before", "after", "saved", "accuracy before", "after"],
        ["task", "part", "texts", "same tokens", "the same logits", "other tokens", "answered otherwise"],
    )
    PAGE.write_text(_INTRODUCTION + table(heads[0], sizes) + "\n" + table(heads[1], answers, texts=2), encoding="utf-8")


def main() -> None:
    """Does what was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for work in (run, page):
        command = commands.add_parser(work.__name__, help=work.__doc__)
        command.set_defaults(work=work)
    # Not STS-B, whose answers are numbers.
    of_labels = [task for task in TASKS if get_task(task).kind == "classification"]
    commands.choices["run"].add_argument("--tasks", nargs="+", choices=of_labels, default=["sst2", "mrpc"])
    asked = parser.parse_args()
    asked.work(asked)


if __name__ == "__main__":
    main()
