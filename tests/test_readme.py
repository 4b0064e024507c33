"""The README's Python runs as it stands, and its recipe is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hfcompress.recipe import load_recipe

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.filterwarnings("default")
def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from hfcompress.modeling.anatomy import attention_blocks

    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    batch = names["batch"]
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(**batch).logits, names["again"](**batch).logits)
    assert sum(block.heads for block in attention_blocks(names["student"])) == 4
    assert (tmp_path / "pruned" / "model.safetensors").is_file()


def test_the_recipe_is_valid(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    (tmp_path / "my-sst2.yaml").write_text(block)
    recipe = load_recipe(tmp_path / "my-sst2.yaml", ("steps.low_rank.keep=0.6",))
    assert [step.name for step in recipe.steps] == ["fine_tune", "prune", "low_rank", "quantization"]
