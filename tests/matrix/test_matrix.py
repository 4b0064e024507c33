"""The page is true: a part of the matrix in every run, all of it where slow tests run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.matrix.cells import CELLS, HERE, POSSIBLE, Cell
from tests.matrix.checking import check_cell
from tests.matrix.making import make_cell
from tests.matrix.page import page
from tests.matrix.running import ROOT, in_fresh_process, run_cells
from tests.matrix.uses import REASONS, USES
from tests.tiny_models import FAMILIES

# The families that the issue names: for them nothing may be impossible.
CONTRACT = ("bert", "roberta", "distilbert", "electra", "mpnet", "vit", "gpt2", "llama", "t5", "whisper")


def some_of(family: str) -> list[Cell]:
    """Returns two of a family's cells: each family another two methods, so that every method has its turn."""
    position = list(FAMILIES).index(family)
    cells = [cell for cell in POSSIBLE if cell.family == family and cell.method in HERE]
    found: list[Cell] = []
    for turn in (position, position + 5):
        wanted = HERE[turn % len(HERE)]
        these = [cell for cell in cells if cell.method == wanted] or cells
        found.append(these[position % len(these)])
    return list(dict.fromkeys(found))


def test_the_page_lists_the_cells_of_today() -> None:
    assert (ROOT / "docs" / "matrix.md").read_text(encoding="utf-8") == page()


def test_a_part_of_the_cells_in_a_fresh_process(tmp_path: Path) -> None:
    cells = [cell for family in FAMILIES for cell in some_of(family)]
    assert {cell.method for cell in cells} == set(HERE)
    assert run_cells(cells, tmp_path) == {}


@pytest.mark.skipif("torchao" not in HERE, reason="scripts/test.sh runs this with torchao beside .venv")
def test_torchao_in_a_fresh_process(tmp_path: Path) -> None:
    cells = [
        next(cell for cell in POSSIBLE if (cell.family, cell.method) == (family, "torchao")) for family in FAMILIES
    ]
    assert run_cells(cells, tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell_in_a_fresh_process(family: str, tmp_path: Path) -> None:
    assert run_cells([cell for cell in CELLS if cell.family == family and cell.method in HERE], tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_use(family: str) -> None:
    found = in_fresh_process("uses", family)
    assert {name: said for name, said in found.items() if said} == {}
    assert found.keys() == {name for name in USES if (family, name) not in REASONS}


def test_nothing_that_has_something_to_compress_is_impossible_for_the_families_of_the_contract() -> None:
    assert [cell.name for cell in CELLS if cell.reason and cell.reason.error and cell.family in CONTRACT] == []


# What the check must see: damage that leaves every shape as it was.


def edit(place: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Changes tensors of a cell's only weight file, and leaves its metadata alone."""
    file = place / "checkpoint" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in list(opened.keys())}
    change(tensors)
    save_file(tensors, file, metadata)


def exchange(tensor: torch.Tensor, width: int, dim: int) -> None:
    """Swaps the first two groups of `width` neighbours, in place."""
    whole = tensor.transpose(0, dim)
    whole[: 2 * width] = torch.cat((whole[width : 2 * width], whole[:width]))


def swap_heads(tensors: dict[str, torch.Tensor], output: str, width: int) -> None:
    name = next(name for name in sorted(tensors) if name.endswith(output) and tensors[name].shape[1] >= 2 * width)
    exchange(tensors[name], width, 1)


def swap_kept(tensors: dict[str, torch.Tensor], place: str) -> None:
    several = [name for name in sorted(tensors) if name.endswith("kept_heads") and len(tensors[name]) > 1]
    exchange(tensors[next(name for name in several if place in name)], 1, 0)


def swap_bias_rows(tensors: dict[str, torch.Tensor], place: str) -> None:
    name = next(name for name in sorted(tensors) if name.endswith("relative_attention_bias.weight") and place in name)
    exchange(tensors[name], 1, 0)


DAMAGES = {
    "bert: two heads": ("bert", "SequenceClassification", lambda t: swap_heads(t, "attention.output.dense.weight", 8)),
    "vit: two heads": ("vit", "ImageClassification", lambda t: swap_heads(t, "attention.output.dense.weight", 8)),
    "llama: two heads": ("llama", "CausalLM", lambda t: swap_heads(t, "o_proj.weight", 16)),
    "mpnet: two heads of the bias": ("mpnet", "SequenceClassification", lambda t: swap_kept(t, "encoder.layer")),
    "mpnet: two rows of the bias": ("mpnet", "SequenceClassification", lambda t: swap_bias_rows(t, "encoder")),
    "t5: two heads of the encoder's": ("t5", "ConditionalGeneration", lambda t: swap_kept(t, "encoder.block")),
    "t5: two heads of the decoder's": ("t5", "ConditionalGeneration", lambda t: swap_kept(t, "0.SelfAttention")),
    "t5: two rows of the encoder's": ("t5", "ConditionalGeneration", lambda t: swap_bias_rows(t, "encoder")),
    "t5: two rows of the decoder's": ("t5", "ConditionalGeneration", lambda t: swap_bias_rows(t, "decoder")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_turns_a_cell_red(damage: str, tmp_path: Path) -> None:
    family, head, change = DAMAGES[damage]
    make_cell(Cell(family=family, head=head, method="heads and neurons"), tmp_path)
    assert check_cell(tmp_path) == ""
    edit(tmp_path, change)
    assert check_cell(tmp_path).startswith("differs in output.0")
