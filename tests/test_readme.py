"""The README's Python runs as it stands, and its recipes are some."""

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
    block, more, description = blocks("yaml")
    (tmp_path / "my-sst2.yaml").write_text(block)
    recipe = load_recipe(tmp_path / "my-sst2.yaml", ("steps.low_rank.budget=0.5",))
    assert [step.name for step in recipe.steps] == ["fine_tune", "prune", "low_rank", "quantization"]
    (tmp_path / "more.yaml").write_text(block + more)
    whole = load_recipe(tmp_path / "more.yaml")
    assert whole.all_seeds == (1, 2, 3) and whole.evaluation.metrics == ("precision", "roc_auc")
    assert whole.push is not None and whole.push.tag == "v1.0" and whole.evaluation.robustness == ("typos", "case")
    (tmp_path / "described.yaml").write_text(re.sub(r"^task:.*\n", description, block, flags=re.MULTILINE))
    assert load_recipe(tmp_path / "described.yaml").described_task.metrics == ("overall_f1",)


def test_the_table_of_kinds_is_whole() -> None:
    from hfcompress.tasks import KINDS, get_task

    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", README.read_text(), re.MULTILINE))
    for name in KINDS:
        for task in re.findall(r"`([\w/-]+)`", rows[name]):
            assert get_task(task).kind == name
