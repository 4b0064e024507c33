"""Pivoted layers are trained as two plain factors, and are pivoted again at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hfcompress import LowRankConfig, PruningTrainer, StructuredPruningConfig, compress
from hfcompress.methods.trainer import CompressionTrainer
from hfcompress.modeling.layers.low_rank import LowRankLinear, PivotedLinear, balanced
from hfcompress.modeling.surgery import in_pivoted_form, in_two_factors
from tests.methods.test_trainer import make as trainer_of
from tests.methods.test_trainer import same, weights
from tests.tiny_models import inputs_for, make, run
from tests.workshop import tiny_classifier

PIVOTED = LowRankConfig(targets=("linear",), keep=0.7, method="svd", pivoted=True, multiple_of=2)


def kinds(model: Any) -> list[type]:
    return [type(each) for each in model.modules() if isinstance(each, LowRankLinear)]


def test_balanced_factors_are_the_same_product_and_share_its_singular_values() -> None:
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(12, 5, generator=generator).double() * 100
    down = torch.randn(5, 9, generator=generator).double()
    left, right = balanced(up, down)
    torch.testing.assert_close(left @ right, up @ down)
    values = torch.linalg.svdvals(up @ down)[:5]
    torch.testing.assert_close(left.T @ left, values.diag(), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(right @ right.T, values.diag(), atol=1e-9, rtol=1e-9)
    zero = balanced(torch.zeros(6, 2), torch.zeros(2, 4))
    assert all(torch.isfinite(each).all() for each in zero)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "whisper"])
def test_there_and_back_is_the_same_function(family: str) -> None:
    model = compress(make(family), [PIVOTED])
    wanted, before = run(model, inputs_for(family)), kinds(model)
    paths = in_two_factors(model)
    assert set(kinds(model)) == {LowRankLinear} and len(paths) == len(before)
    for got, value in zip(run(model, inputs_for(family)), wanted, strict=True):
        torch.testing.assert_close(got, value, atol=1e-4, rtol=1e-4)
    in_pivoted_form(model, paths)
    assert kinds(model) == before
    for got, value in zip(run(model, inputs_for(family)), wanted, strict=True):
        torch.testing.assert_close(got, value, atol=1e-4, rtol=1e-4)


def test_what_is_frozen_stays_pivoted() -> None:
    model = compress(make("bert"), [PIVOTED])
    layers = [each for each in model.modules() if isinstance(each, PivotedLinear)]
    layers[0].down.weight.requires_grad_(False)
    assert len(in_two_factors(model)) == len(layers) - 1
    assert kinds(model).count(PivotedLinear) == 1


class Seen(TrainerCallback):
    def __init__(self) -> None:
        self.kinds: set[type] = set()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.kinds |= set(kinds(model))


def pivoted_classifier() -> Any:
    return compress(tiny_classifier(0), [PIVOTED])


def test_a_training_learns_two_factors_and_leaves_pivoted_ones(tmp_path: Path) -> None:
    seen, model = Seen(), pivoted_classifier()
    before = kinds(model)
    parameters = sum(each.numel() for each in model.parameters())
    trainer = trainer_of(tmp_path / "run", CompressionTrainer, model=model, callbacks=[seen])
    trainer.train()
    assert seen.kinds == {LowRankLinear}
    assert kinds(trainer.model) == before and set(before) == {PivotedLinear}
    assert sum(each.numel() for each in trainer.model.parameters()) == parameters
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert same(weights(trainer), again.state_dict())
    learnt = weights(trainer)
    assert not same(learnt, pivoted_classifier().state_dict())
    trainer.train()  # once more: the factors of the first training are gone
    assert kinds(trainer.model) == before and not same(learnt, weights(trainer))


def test_a_training_that_was_cut_off_goes_on_with_two_factors(tmp_path: Path) -> None:
    class Cut(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                raise KeyboardInterrupt

    whole = trainer_of(tmp_path / "whole", CompressionTrainer, model=pivoted_classifier())
    whole.train()
    cut = trainer_of(tmp_path / "cut", CompressionTrainer, model=pivoted_classifier(), callbacks=[Cut()])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = trainer_of(tmp_path / "cut", CompressionTrainer, model=pivoted_classifier())
    resumed.train(resume_from_checkpoint=True)
    assert set(kinds(resumed.model)) == {PivotedLinear}
    assert same(weights(whole), weights(resumed))


def test_pruning_in_training_takes_from_what_is_pivoted_again(tmp_path: Path) -> None:
    pruning = StructuredPruningConfig(heads=0.25, neurons=0.4, interval=1)
    trainer = trainer_of(tmp_path / "run", PruningTrainer, model=pivoted_classifier(), pruning=pruning)
    trainer.train()
    assert PivotedLinear in kinds(trainer.model)
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert same(weights(trainer), again.state_dict())
