"""Writes the matrix as a page: what must pass, and in one phrase why anything does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.matrix.cells import CELLS, METHODS, Cell
from tests.matrix.checking import NO_BASE
from tests.matrix.uses import REASONS, USES
from tests.tiny_models import FAMILIES, class_of

_INTRO = """# Every family, head and method

Made by `scripts/matrix.py`, which writes this page only after every cell has come out as it says here.

A cell with ✓ is a tiny random model of that class, compressed so that its layers keep different numbers of heads,
neurons and ranks (ALBERT's layers are one and the same), and saved by plain `save_pretrained`. A fresh process loads it
by its plain Auto class (by its own where transformers has none, as for GPT-2's double heads) and must compute the same
outputs, bit by bit (`torch.equal`); with a cache it must generate the same logits. Saved again, the tensors in the
files are the same, and so are the outputs after loading those. `AutoModel` takes the base model out of the same
checkpoint, with the same weights, but for what stock `AutoModel` cannot find either: see the end.

The methods: pruning of **heads and neurons**; one of three **layers** dropped from each stack; a **student** of half
the model's sizes; **low rank** in every linear layer of the base model, by two factors, by **pivoted** ones, or with
one **shared** by layers of one input; **int8** and **nf4** by bitsandbytes; int8 by **torchao**, with inputs rounded
too in feed-forward blocks; **embeddings** in 8 and 4 bits, and split in two factors, with every output layer that is
tied to them; **ternary** weights, packed; trimming the **vocabulary** with its tokenizer; **unstructured** zeros; and a
**chain** of pruning, low rank, nf4 and 8-bit embeddings, where there are any.

Dropping layers, students, trimming and zeroing must write an ordinary checkpoint. Where int8 or nf4 alone do, it is one
of bitsandbytes, and no code of ours sees it load. On CPUs with AVX512-BF16 bitsandbytes then rounds the scales of 4-bit
weights, unless `hfcompress.modeling.layers.bitsandbytes.settle_all(model)` comes before the first forward; and
transformers cannot write it again unless `hfcompress.modeling.checkpoint.commit(model)` comes before the save. The
check calls both there, and nowhere else.
"""
_USES = """## What people do with a checkpoint

The model is pruned unevenly and factorised in every linear layer. `dtype`: loaded in bfloat16 it holds the rounded
weights and gives finite outputs. `device_map`: the same outputs. `attn_implementation`: eager and sdpa agree.
`pipeline`: it answers, and a text classifier's score is the model's. `Trainer`: a step changes the factors, and what is
saved after it loads as it was. LoRA: PEFT trains adapters on the factors, and they load onto the checkpoint as they
were. `torch.compile`: the outputs agree with eager ones.
"""


_NO_BASE = """## Checkpoints without a base model

From these `AutoModel` loads no base model, compressed or not. Stock transformers goes on with random weights; where a
checkpoint needs hfcompress, that is an error.
"""


def _letters(reasons: Iterable[str]) -> dict[str, str]:
    return {text: chr(ord("a") + index) for index, text in enumerate(dict.fromkeys(reasons))}


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|:-:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _legend(letters: dict[str, str]) -> str:
    return "".join(f"- **{letter}** {text}\n" for text, letter in letters.items())


def page() -> str:
    """Returns the page's Markdown."""
    letters = _letters(cell.reason.text for cell in CELLS if cell.reason)
    passing = sum(cell.reason is None for cell in CELLS)
    parts = [_INTRO, f"{passing} of {len(CELLS)} cells pass. A letter says why there is none:\n", _legend(letters)]
    for family, made in FAMILIES.items():
        rows = []
        for head in made.heads:
            reasons = [Cell(family=family, head=head, method=method).reason for method in METHODS]
            marks = ["✓" if reason is None else letters[reason.text] for reason in reasons]
            rows.append([f"`{class_of(family, head).__name__}`", *marks])
        parts += [f"## {family}\n", _table(["class", *METHODS], rows)]
    letters = _letters(REASONS.values())
    marks = [[family, *(letters.get(REASONS.get((family, use), ""), "✓") for use in USES)] for family in FAMILIES]
    parts += [_USES, _table(["family", *USES], marks), _legend(letters)]
    parts += [_NO_BASE, "".join(f"- `{class_of(*cell).__name__}`: {text}\n" for cell, text in NO_BASE.items())]
    return "\n".join(parts)
