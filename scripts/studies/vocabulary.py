"""Vocabulary trimming on fine-tuned MiniLM-L6: bytes saved, and whether predictions are the same.

    python -m scripts.studies.vocabulary [--tasks sst2]

The tokens that the training texts never use go, from model and tokenizer. On validation every example is asked of
the original and of the saved and reloaded result. Examples whose tokens all remain must be answered by the very same
logits; the others, which hold a word that train has not, are cut into other pieces and told apart. Teachers and data
are those of `scripts.studies.material`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from hfcompress import VocabularyConfig
from hfcompress.methods.registry import Context
from hfcompress.methods.vocabulary import vocabulary
from hfcompress.modeling.measure import weight_bytes
from hfcompress.modeling.saving import save
from hfcompress.tasks import get_task, load_data
from scripts.studies.material import TASKS, add_row, glue_folder, results_file, teacher_folder

RESULTS = results_file("vocabulary.jsonl")


@torch.no_grad()
def logits(model: Any, tokenizer: Any, texts: list[tuple[str, ...]]) -> torch.Tensor:
    """Returns the answers to examples one by one, so that no padding is in the way."""
    each = [tokenizer(*text, truncation=True, max_length=128, return_tensors="pt") for text in texts]
    return torch.cat([model(**inputs).logits for inputs in each])


def measure(name: str) -> dict[str, Any]:
    """Trims one task's model and compares."""
    task, teacher = get_task(name), teacher_folder("minilm-l6", name)
    splits = load_data(task, str(glue_folder()), progress=False)
    texts = {part: list(zip(*(rows[column] for column in task.columns), strict=True)) for part, rows in splits.items()}
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model: Any = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    known = [tuple(tokenizer.convert_ids_to_tokens(tokenizer(*text)["input_ids"])) for text in texts["validation"]]
    before = logits(model, tokenizer, texts["validation"])
    flat = [text for example in texts["train"] for text in example]
    found = vocabulary(model, VocabularyConfig(), Context(tokenizer=tokenizer, texts=flat))
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "trimmed"
        save(model, saved, tokenizer=tokenizer)
        smaller, size = AutoTokenizer.from_pretrained(saved), weight_bytes(saved)
        after = logits(AutoModelForSequenceClassification.from_pretrained(saved).eval(), smaller, texts["validation"])
    now = [tuple(smaller.convert_ids_to_tokens(smaller(*text)["input_ids"])) for text in texts["validation"]]
    same = torch.tensor([one == other for one, other in zip(known, now, strict=True)])
    answers = [each.argmax(1) if each.shape[1] > 1 else each[:, 0] for each in (before, after)]
    whole = weight_bytes(teacher)
    return {
        "task": name,
        "tokens": {"kept": found["kept"], "of": found["of"]},
        "bytes": {"before": whole, "after": size, "saved": round(1 - size / whole, 4)},
        "examples": len(same),
        "with_the_same_tokens": int(same.sum()),
        "same_logits_on_these": bool(torch.equal(before[same], after[same])),
        "largest_difference_on_these": float((before[same] - after[same]).abs().max()),
        "other_answers_on_the_rest": int((answers[0] != answers[1])[~same].sum()),
    }


def main() -> None:
    """Measures the tasks asked for."""
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["sst2"])
    for name in parser.parse_args().tasks:
        add_row(RESULTS, measure(name))


if __name__ == "__main__":
    main()
