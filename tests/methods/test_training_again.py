"""Trainers that are trained again, cut off, or stopped before their time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hfcompress import (
    LowRankConfig,
    PruningTrainer,
    QuantizationAwareConfig,
    StructuredPruningConfig,
    UnstructuredPruningConfig,
    compress,
)
from hfcompress.errors import CompressionError, ConfigError, TrainingError
from hfcompress.methods.quantization_aware import QuantizationAwarePart
from hfcompress.methods.registry import Context
from hfcompress.methods.structured_pruning import PruningPart
from hfcompress.methods.trainer import CompressionTrainer
from hfcompress.methods.unstructured_pruning import UnstructuredPruningPart
from hfcompress.modeling.anatomy import attention_blocks, feed_forward_blocks
from hfcompress.modeling.layers.low_rank import PivotedLinear
from tests.methods.test_trainer import make, same, weights
from tests.workshop import batches, logits, tiny_classifier


class Once(TrainerCallback):
    """Cuts off, or ends, the first training only."""

    def __init__(self, step: int, *, ends: bool = False) -> None:
        self.step, self.ends, self.done = step, ends, False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and not self.done:
            self.done = True
            if not self.ends:
                raise KeyboardInterrupt
            control.should_training_stop = True


@pytest.mark.parametrize("importance", ["taylor", "l0"])
def test_the_same_trainer_resumed_gives_what_an_uninterrupted_one_gives(importance: str, tmp_path: Path) -> None:
    pruning = StructuredPruningConfig(heads=0.4, neurons=0.4, begin=0.1, end=0.6, interval=2, importance=importance)
    whole = make(tmp_path / "whole", pruning=pruning)
    whole.train()
    cut = make(tmp_path / "cut", pruning=pruning, callbacks=[Once(6)])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    cut.train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(cut))


def test_a_model_whose_training_was_cut_off_is_what_would_be_saved(tmp_path: Path) -> None:
    trainer = make(tmp_path / "run", callbacks=[Once(9)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = type(trainer.model).from_pretrained(tmp_path / "saved")
    data = batches(1)[0]
    assert torch.equal(logits(again, data), logits(trainer.model.cpu().eval(), data))


def test_pivoted_layers_whose_training_was_cut_off_are_pivoted_again(tmp_path: Path) -> None:
    model = compress(tiny_classifier(0), [LowRankConfig(rank=8, pivoted=True, method="svd")])
    before = sum(isinstance(each, PivotedLinear) for each in model.modules())
    trainer = make(tmp_path, CompressionTrainer, model=model, callbacks=[Once(5)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert sum(isinstance(each, PivotedLinear) for each in model.modules()) == before > 0
    trainer.train(resume_from_checkpoint=True)
    assert sum(isinstance(each, PivotedLinear) for each in model.modules()) == before


def test_a_second_training_trains_what_the_first_one_has_shrunk(tmp_path: Path) -> None:
    trainer = make(tmp_path, save_strategy="no")
    trainer.train()
    heads = [block.heads for block in attention_blocks(trainer.model)]
    first = weights(trainer)
    trainer.train()
    assert sum(block.heads for block in attention_blocks(trainer.model)) < sum(heads)
    layer = "bert.encoder.layer.0.attention.output.LayerNorm.weight"
    assert not torch.equal(weights(trainer)[layer], first[layer])
    dense = feed_forward_blocks(trainer.model)[0]
    own = dense.at(dense.inputs[0].path).weight
    rows = first["bert.encoder.layer.0.intermediate.dense.weight"]
    assert not any(torch.equal(row, old) for row in own for old in rows)


def test_an_optimizer_of_weights_that_are_gone_is_refused(tmp_path: Path) -> None:
    model = tiny_classifier(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = make(tmp_path, model=model, save_strategy="no", optimizers=(optimizer, None))
    trainer.train()
    with pytest.raises(TrainingError, match="no longer has"):
        trainer.train()


@pytest.mark.parametrize("importance", ["taylor", "l0"])
def test_a_training_that_ends_early_still_meets_the_target(importance: str, tmp_path: Path) -> None:
    pruning = StructuredPruningConfig(heads=0.5, neurons=0.5, begin=0.1, end=0.9, interval=1, importance=importance)
    trainer = make(tmp_path, pruning=pruning, callbacks=[Once(4, ends=True)], save_strategy="no")
    with pytest.warns(UserWarning, match="before pruning did"):
        trainer.train()
    assert sum(block.heads for block in attention_blocks(trainer.model)) == 4
    assert all(block.at(block.spec.output).weight.any() for block in attention_blocks(trainer.model))


def test_one_step_is_enough_to_prune(tmp_path: Path) -> None:
    pruning = StructuredPruningConfig(heads=0.5, begin=0.0, end=0.01)
    trainer = make(tmp_path, pruning=pruning, max_steps=2, save_strategy="no")
    trainer.train()
    assert sum(block.heads for block in attention_blocks(trainer.model)) == 4


def test_a_gradient_that_overflowed_once_does_not_choose() -> None:
    model, batch = tiny_classifier(), batches(1)[0]
    part = PruningPart(StructuredPruningConfig(heads=0.5, begin=0.0, end=1.0, interval=1))
    part.begin(model, 4, torch.device("cpu"))
    model(**batch).loss.backward()
    part.before_optimizer_step(0)
    before = part.state()
    output = attention_blocks(model)[0].at("attention.output.dense").weight
    output.grad[0, 0] = float("inf")
    part.before_optimizer_step(1)
    assert all(torch.equal(value, before[name]) for name, value in part.state().items())
    assert any(value.any() for name, value in before.items() if name.startswith("scores"))


def test_importances_of_a_frozen_model_are_refused_in_training(tmp_path: Path) -> None:
    model = tiny_classifier(0)
    model.bert.requires_grad_(False)
    with pytest.raises(CompressionError, match="is frozen"):
        make(tmp_path, model=model, pruning=StructuredPruningConfig(heads=0.5), save_strategy="no").train()


def test_zeros_are_not_made_in_pivoted_layers_in_training() -> None:
    model = compress(tiny_classifier(0), [LowRankConfig(rank=8, pivoted=True, method="svd")])
    with pytest.raises(CompressionError, match="pivoted"):
        PruningTrainer(model, pruning=UnstructuredPruningConfig())


def test_movement_of_a_frozen_layer_is_refused() -> None:
    model = tiny_classifier(0).requires_grad_(False)
    part = UnstructuredPruningPart(UnstructuredPruningConfig(importance="movement", begin=0, end=1), Context())
    with pytest.raises(CompressionError, match="is frozen, and has no gradients"):
        part.begin(model, 4, torch.device("cpu"))


def test_zeros_are_made_before_layers_shrink(tmp_path: Path) -> None:
    shrinking = PruningPart(StructuredPruningConfig(neurons=0.5, interval=1, multiple_of=8))
    zeros = UnstructuredPruningPart(UnstructuredPruningConfig(interval=1))
    trainer = make(tmp_path, CompressionTrainer, parts=[shrinking, zeros])
    trainer.train()
    assert [block.neurons for block in feed_forward_blocks(trainer.model)] == [48, 48]
    assert trainer.findings[1]["sparsity"] == pytest.approx(0.5, abs=0.01)


def test_parts_of_which_one_ends_the_other_are_refused(tmp_path: Path) -> None:
    shrinking = [PruningPart(StructuredPruningConfig(neurons=0.5)) for _ in range(2)]
    packing = QuantizationAwarePart(QuantizationAwareConfig())
    with pytest.raises(ConfigError, match="only one part can make layers smaller"):
        make(tmp_path, CompressionTrainer, parts=shrinking)
    with pytest.raises(ConfigError, match="cannot be pruned and packed in one training"):
        make(tmp_path, CompressionTrainer, parts=[packing, shrinking[0]])
