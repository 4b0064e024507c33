from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hfcompress.errors import CompressionError
from hfcompress.methods.pruning import importance
from hfcompress.methods.pruning.importance import kept_gradients, mask_gradients
from hfcompress.methods.pruning.units import head_units, masking, neuron_units
from tests.tiny_models import inputs_for, make
from tests.workshop import batches, tiny_classifier

FAMILIES = ["bert", "mpnet", "albert", "deberta-v2", "modernbert", "gpt2", "llama", "bart"]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_example_has_the_derivative_it_has_alone(family: str) -> None:
    model = make(family, "SequenceClassification")
    batch = dict(inputs_for(family, "SequenceClassification"), labels=torch.tensor([0, 1]))
    if family != "bart":  # reads its last separator, in every row at the same place
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    units = head_units(model) + neuron_units(model)
    together = importance.mask_gradients(model, units, [batch])
    alone = importance.mask_gradients(model, units, [{k: v[i : i + 1] for k, v in batch.items()} for i in (0, 1)])
    for each, other in zip(together, alone, strict=True):
        assert each.abs().sum() > 0
        torch.testing.assert_close(each, other, rtol=1e-3, atol=1e-6)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_derivative_is_that_of_the_loss_by_the_mask() -> None:
    model, batch = tiny_classifier().double(), batches(1, size=1)[0]
    units = head_units(model)
    (gradient,) = importance.mask_gradients(model, units[:1], [batch])
    mask = torch.ones(4, dtype=torch.float64)
    losses = []
    for step in (1e-5, -1e-5):
        mask[2] = 1 + step
        handle = units[0].entry.register_forward_pre_hook(masking(units[0], mask))
        losses.append(model(**batch).loss.item())
        handle.remove()
    assert gradient[0, 2].item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-3)


def test_one_pass_gives_derivatives_by_weights_and_by_units(tmp_path: Path) -> None:
    model, batch = tiny_classifier(), batches(1)[0]
    units = [*head_units(model), *neuron_units(model)]
    model(**batch).loss.backward()
    plain = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    with importance.unit_factors(model, units) as factors:
        model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert name not in plain or torch.equal(parameter.grad, plain[name])
    by_units = [factor.grad * len(batch["labels"]) for factor in factors if factor.grad is not None]
    for each, other in zip(by_units, mask_gradients(model, units, [batch]), strict=True):
        torch.testing.assert_close(each, other)
    file = importance.statistics_file("gradients", model, [batch], tmp_path)
    importance.store_statistics(file, units, by_units)
    assert all(map(torch.equal, kept_gradients(model, units, [batch], tmp_path), by_units))


def test_one_by_one_where_a_block_mixes_the_examples_of_a_batch() -> None:
    model, batch = tiny_classifier(), batches(1, size=4)[0]
    wanted = importance.mask_gradients(model, neuron_units(model), [batch])
    dense = model.bert.encoder.layer[1].output.dense

    def fold(module: torch.nn.Module, arguments: tuple) -> tuple:
        return (arguments[0].flatten(0, 1).unsqueeze(0),)  # all examples in one row

    rows = []
    dense.register_forward_pre_hook(fold)
    dense.register_forward_hook(lambda module, arguments, output: output.view(rows[-1], -1, 64))
    model.register_forward_pre_hook(
        lambda module, arguments, keywords: rows.append(len(keywords["input_ids"])), with_kwargs=True
    )
    found = importance.mask_gradients(model, neuron_units(model), [batch])
    assert rows == [4, 1, 1, 1, 1]
    for each, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-3, atol=1e-6)


def test_a_model_without_a_loss_is_refused() -> None:
    model = make("bert", "")
    with pytest.raises(CompressionError, match="no loss"):
        importance.mask_gradients(model, head_units(model), [inputs_for("bert", "")])


def test_gradients_are_taken_once_for_the_same_model_and_data(tmp_path: Path) -> None:
    model, data = tiny_classifier(), batches(2)
    units = [*head_units(model), *neuron_units(model)]
    first = kept_gradients(model, units, data, tmp_path)
    assert all(map(torch.equal, first, mask_gradients(model, units, data)))
    (file,) = tmp_path.iterdir()
    stored = load_file(file)
    save_file({name: value + 1 for name, value in stored.items()}, file)
    # A part of the units finds its own by name.
    again = kept_gradients(model, units[1:], data, tmp_path)
    assert all(torch.equal(now, was + 1) for now, was in zip(again, first[1:], strict=True))
    with torch.no_grad():
        model.classifier.weight.mul_(2)
    assert not torch.equal(kept_gradients(model, units, data, tmp_path)[0], first[0] + 1)
    kept_gradients(model, units, batches(2, seed=5), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_of_a_loss_of_sound_an_example_weighs_the_same_in_every_batch(reduction: str) -> None:
    model = make("wav2vec2", "CTC", ctc_loss_reduction=reduction, ctc_zero_infinity=True)
    generator = torch.Generator().manual_seed(1)
    sound, said = torch.randn(5, 400, generator=generator), torch.randint(5, 61, (5, 3), generator=generator)
    parts = [[slice(row, row + 1) for row in range(5)], [slice(0, 4), slice(4, 5)]]
    batched = [[{"input_values": sound[part], "labels": said[part]} for part in each] for each in parts]
    alone, together = (mask_gradients(model, neuron_units(model), each)[0] for each in batched)
    assert torch.allclose(alone, together, rtol=1e-3, atol=1e-7)
