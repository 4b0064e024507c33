"""What pruning reads off calibration data is the same however the data are padded and cut into batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hfcompress import LayerDroppingConfig, StructuredPruningConfig, WidthPruningConfig
from hfcompress.methods.layer_dropping import layer_dropping
from hfcompress.methods.pruning.importance import output_energies
from hfcompress.methods.pruning.reconstruction import reconstruct
from hfcompress.methods.pruning.units import head_units, neuron_units
from hfcompress.methods.registry import Context
from hfcompress.methods.statistics import input_fisher
from hfcompress.methods.structured_pruning import structured_pruning
from hfcompress.methods.width_pruning import width_pruning
from tests.tiny_models import VOCABULARY, inputs_for, make
from tests.workshop import batches, tiny_classifier

Batch = dict[str, torch.Tensor]


def padded(ids: torch.Tensor, **others: torch.Tensor) -> tuple[Batch, Batch]:
    """Returns a batch as it is, and with twenty positions of padding."""
    mask = torch.ones_like(ids)
    padding = torch.ones(*ids.shape[:-1], 20, dtype=torch.long)
    longer = {"input_ids": torch.cat((ids, padding), -1), "attention_mask": torch.cat((mask, 0 * padding), -1)}
    return {"input_ids": ids, "attention_mask": mask, **others}, longer | others


def words(*shape: int) -> torch.Tensor:
    return torch.randint(5, VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


def ragged(labels: bool) -> tuple[list[Batch], list[Batch]]:
    """Returns nine examples as one batch, and as one of eight and one alone."""
    (whole,) = batches(1, 9, labels=labels)
    return [whole], [{name: value[rows] for name, value in whole.items()} for rows in (slice(8), slice(8, 9))]


READERS = {
    "an encoder and a decoder": ("t5", "ConditionalGeneration", (4, 6), {"decoder_input_ids": words(4, 5)}),
    "choices": ("bert", "MultipleChoice", (2, 3, 6), {}),
}


@pytest.mark.parametrize("kind", READERS)
def test_padding_moves_neither_importance_nor_what_is_mended(kind: str) -> None:
    family, head, shape, others = READERS[kind]
    model = make(family, head)
    units = neuron_units(model)
    kept = [torch.arange(12) for _ in units]
    short, long = padded(words(*shape), **others)
    for one, other in zip(output_energies(model, units, [short]), output_energies(model, units, [long]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    fits = [reconstruct(model, units, kept, [batch]).fits for batch in (short, long)]
    for position, fit in fits[0].items():
        torch.testing.assert_close(fit.weight, fits[1][position].weight, rtol=1e-2, atol=1e-2)


def test_padding_of_sound_moves_neither_importance_nor_what_is_mended() -> None:
    model = make("wav2vec2", "SequenceClassification", feat_extract_norm="layer")
    short = {"input_values": inputs_for("wav2vec2", "SequenceClassification")["input_values"]}
    short["attention_mask"] = torch.ones_like(short["input_values"], dtype=torch.long)
    long = {name: torch.nn.functional.pad(value, (0, 400)) for name, value in short.items()}
    units = neuron_units(model)
    for one, other in zip(output_energies(model, units, [short]), output_energies(model, units, [long]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    fits = [reconstruct(model, units, [torch.arange(12) for _ in units], [batch]).fits for batch in (short, long)]
    for position, fit in fits[0].items():
        torch.testing.assert_close(fit.weight, fits[1][position].weight, rtol=1e-2, atol=1e-2)


def test_every_position_counts_alike_in_whatever_batch_it_is() -> None:
    model = tiny_classifier()
    units = head_units(model) + neuron_units(model)
    whole, parts = (output_energies(model, units, data) for data in ragged(labels=False))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other)


def costs_of(model: Any, data: list[Batch]) -> list[float]:
    (costs,) = layer_dropping(copy.deepcopy(model), LayerDroppingConfig(), Context(calibration=data))["costs"]
    return list(costs.values())


@pytest.mark.parametrize("head", ["TokenClassification", ""])
def test_padding_has_no_say_in_which_layer_goes(head: str) -> None:
    model = make("bert", head)
    one, other = (costs_of(model, [batch]) for batch in padded(words(4, 6)))
    assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("labels", [True, False])
def test_every_example_counts_alike_in_which_layer_goes(labels: bool) -> None:
    # Layers that change little cost less than float32 can tell.
    model = tiny_classifier(num_hidden_layers=3, initializer_range=0.3)
    one, other = (costs_of(model, data) for data in ragged(labels))
    assert one == pytest.approx(other, rel=1e-4)


def test_where_answers_start_is_a_label() -> None:
    model, places = make("bert", "QuestionAnswering"), torch.tensor([1, 2])
    batch = {**inputs_for("bert", "QuestionAnswering"), "start_positions": places, "end_positions": places + 1}
    context = Context(calibration=[batch])
    found = structured_pruning(copy.deepcopy(model), StructuredPruningConfig(heads=0.5), context)
    assert found["importance"] == "fisher"
    assert layer_dropping(copy.deepcopy(model), LayerDroppingConfig(), context)["measure"] == "loss"
    (fisher,) = input_fisher(model, ["encoder.layer.0.output.dense"], [batch]).values()
    assert fisher.sum() > 0
    assert width_pruning(model, WidthPruningConfig(), context)["importance"] == "taylor"
