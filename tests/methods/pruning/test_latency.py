from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from hfcompress import PruningTrainer, StructuredPruningConfig, compress
from hfcompress.errors import CompressionError
from hfcompress.methods.pruning.latency import Latency, LatencyTable, latency_target, workload
from hfcompress.methods.pruning.search import knapsack
from hfcompress.methods.pruning.units import head_units, neuron_units
from hfcompress.methods.registry import Context
from hfcompress.methods.structured_pruning import structured_pruning
from hfcompress.modeling.anatomy import attention_blocks, feed_forward_blocks
from tests.tiny_models import inputs_for, make
from tests.workshop import batches, logits, tiny_classifier

GROUP = st.lists(st.tuples(st.floats(0, 10), st.integers(1, 20)), min_size=1, max_size=4)


@given(st.lists(GROUP, min_size=1, max_size=4), st.integers(1, 60))
@settings(deadline=None)
def test_the_knapsack_loses_least(groups: list[list[tuple[float, int]]], budget: int) -> None:
    losses = [np.array([loss for loss, _ in group]) for group in groups]
    prices = [np.array([float(price) for _, price in group]) for group in groups]
    # As many bins as the budget has units: rounding plays no part.
    chosen = knapsack(losses, prices, budget, bins=budget)
    fitting = [
        sum(group[pick][0] for group, pick in zip(groups, picks, strict=True))
        for picks in itertools.product(*[range(len(group)) for group in groups])
        if sum(group[pick][1] for group, pick in zip(groups, picks, strict=True)) <= budget
    ]
    if not fitting:
        assert chosen == [int(price.argmin()) for price in prices]
        return
    assert sum(price[pick] for price, pick in zip(prices, chosen, strict=True)) <= budget
    assert sum(loss[pick] for loss, pick in zip(losses, chosen, strict=True)) == pytest.approx(min(fitting))


def made_up(heads: dict[int, float], neurons: dict[int, float], share: float) -> Latency:
    model = tiny_classifier()
    groups = {"heads": head_units(model), "neurons": neuron_units(model)}
    table = LatencyTable(whole=10.0, blocks=[heads, heads, neurons, neurons])
    return Latency(groups=groups, multiples={"heads": 1, "neurons": 8}, table=table, share=share)


@pytest.mark.parametrize("scale", [1e-8, 1e-16, 1e-24])
def test_how_large_scores_are_chooses_nothing_beside_units_that_are_closed(scale: float) -> None:
    target = made_up({1: 0.5, 4: 2.0}, {8: 0.1, 48: 1.0, 96: 2.0}, 0.4)
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(each.count, generator=generator) for each in target.units]
    closed = [torch.arange(len(score)) == 0 for score in scores]
    usual, small = (
        [torch.where(gone, -1.0, score * by) for gone, score in zip(closed, scores, strict=True)] for by in (1, scale)
    )
    kept = zip(target.choose(usual), target.choose(small), strict=True)
    assert all(torch.equal(left, right) for left, right in kept)


def test_what_costs_no_time_stays() -> None:
    # Heads cost 4 of 10 seconds, neurons none: whatever their scores say, heads must go.
    target = made_up({1: 0.5, 4: 2.0}, {8: 0.1, 96: 0.1}, 0.19)
    scores = [torch.full((each.count,), 1.0 if each.are_heads else 1e-6) for each in target.units]
    kept = target.choose(scores)
    assert [len(index) for index in kept[2:]] == [96, 96]
    assert sum(len(index) for index in kept[:2]) == 4
    assert target.findings(kept)["latency_removed_by_table"] >= 0.19


def test_the_most_important_of_a_layer_stay() -> None:
    target = made_up({1: 0.5, 4: 2.0}, {8: 0.1, 96: 0.1}, 0.2)
    scores = [torch.tensor([3.0, 9.0, 1.0, 7.0]), torch.tensor([0.1, 0.2, 0.4, 0.3])]
    scores += [torch.linspace(0, 1, 96)] * 2
    kept = target.choose(scores)
    assert kept[0].tolist() == [0, 1, 2, 3] or kept[0].tolist() in ([0, 1, 3], [1, 3])
    assert kept[1].tolist()[-1] in (2, 3) and len(kept[0]) >= len(kept[1])


def test_more_than_can_be_saved_is_refused() -> None:
    with pytest.raises(CompressionError, match=r"latency: 0\.9 cannot be removed.*reachable: up to 0\.309"):
        made_up({1: 0.5, 4: 2.0}, {8: 0.05, 96: 0.1}, 0.9).require_reachable()


def test_the_table_is_measured_on_the_model_and_kept(tmp_path: Path) -> None:
    model, data = tiny_classifier(), batches(1)
    before, hooks = logits(model, data[0]), [len(module._forward_pre_hooks) for module in model.modules()]
    target = latency_target(model, 0.05, 8, workload(model, 2, 16, ()), tmp_path)
    table = target.table
    assert torch.equal(logits(model, data[0]), before)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert 0 < table.rest < table.whole
    assert set(table.blocks[0]) == {1, 2, 3, 4} and {8, 96} <= set(table.blocks[2])
    assert all(seconds > 0 for block in table.blocks for seconds in block.values())
    (file,) = tmp_path.iterdir()
    said = json.loads(file.read_text())
    said["whole"] = 1234.5
    file.write_text(json.dumps(said))
    assert latency_target(model, 0.05, 8, workload(model, 2, 16, ()), tmp_path).table.whole == 1234.5
    assert latency_target(model, 0.05, 8, workload(model, 3, 16, ()), tmp_path).table.whole != 1234.5


def test_pruning_by_time_removes_what_the_table_says(tmp_path: Path) -> None:
    model = tiny_classifier(hidden_size=128, intermediate_size=1024)
    config = StructuredPruningConfig(latency=0.01, latency_batch=4, latency_tokens=32)
    found = structured_pruning(model, config, Context(calibration=batches(2), cache_dir=tmp_path))
    assert found["latency_removed_by_table"] >= 0.01
    sizes = [block.heads for block in attention_blocks(model)] + [b.neurons for b in feed_forward_blocks(model)]
    assert sizes != [4, 4, 1024, 1024] and all(count % 8 == 0 for count in sizes[2:])
    assert {path.suffix for path in (tmp_path / "pruning").iterdir()} == {".json", ".safetensors"}


def test_a_decoder_and_its_encoder_are_timed() -> None:
    model = make("t5")
    blocks = len(head_units(model)) + len(neuron_units(model))
    assert len(latency_target(model, 0.01, 8, workload(model, 1, 8, ())).table.blocks) == blocks


def test_a_decoder_of_speech_is_timed_with_its_labels() -> None:
    model, batch = make("whisper"), dict(inputs_for("whisper"))
    batch["labels"] = batch.pop("decoder_input_ids")
    blocks = len(head_units(model)) + len(neuron_units(model))
    assert len(latency_target(model, 0.01, 1, workload(model, 1, 8, [batch])).table.blocks) == blocks


def test_what_reads_no_text_is_timed_with_its_own_data() -> None:
    model = make("vit")
    with pytest.raises(CompressionError, match="reads pixel_values is measured with calibration data"):
        compress(model, [StructuredPruningConfig(latency=0.1, importance="magnitude")])


def test_a_table_is_of_the_whole_model_and_not_of_its_blocks_alone(tmp_path: Path) -> None:
    for vocabulary in (60, 3000):
        model = tiny_classifier(vocab_size=vocabulary)
        latency_target(model, 0.01, 8, workload(model, 2, 8, ()), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_length_that_the_model_cannot_read_is_refused() -> None:
    model = tiny_classifier(max_position_embeddings=32)
    with pytest.raises(CompressionError, match=r"cannot be run on input_ids \[8, 128\]") as caught:
        compress(model, [StructuredPruningConfig(latency=0.2)])
    assert "latency_tokens" in str(caught.value.hint)


def test_a_classifier_that_reads_its_last_end_of_text_is_timed() -> None:
    model = make("bart", "SequenceClassification")
    latency_target(model, 0.01, 8, workload(model, 2, 8, ()))


def test_time_is_measured_in_training_with_what_is_trained_on(tmp_path: Path) -> None:
    model = make("vit", "ImageClassification", intermediate_size=8192)  # most of the time can be saved
    inputs = inputs_for("vit", "ImageClassification")
    rows = [{**{name: value[0] for name, value in inputs.items() if name != "labels"}, "labels": torch.tensor(0)}] * 4
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no"
    )
    pruning = StructuredPruningConfig(latency=0.02, latency_batch=2, begin=0.0, end=0.5, interval=1)
    trainer = PruningTrainer(model, arguments, pruning=pruning, train_dataset=rows)
    trainer.train()
    assert "latency_removed_by_table" in trainer.findings[0]
