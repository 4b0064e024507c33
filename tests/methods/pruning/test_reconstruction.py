from __future__ import annotations

import pytest
import torch

from hfcompress import LayerDroppingConfig, LowRankConfig, compress
from hfcompress.methods.pruning.reconstruction import reconstruct
from hfcompress.methods.pruning.refitting import Moments, refit
from hfcompress.methods.pruning.units import head_units, neuron_units
from hfcompress.modeling.anatomy import base_model
from tests.tiny_models import FAMILIES, inputs_for, make, run
from tests.workshop import batches, tiny_classifier


def moments(inputs: torch.Tensor, wanted: torch.Tensor) -> Moments:
    made = Moments(inputs.shape[1], wanted.shape[1], torch.device("cpu"))
    for rows in range(0, len(inputs), 16):
        made.add(inputs[rows : rows + 16], wanted[rows : rows + 16])
    return made


@pytest.mark.parametrize("biased", [True, False])
def test_a_linear_relation_is_found_again(biased: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 7), torch.randn(5) if biased else None
    inputs = torch.randn(200, 7) + 2
    wanted = inputs @ weight.T + (0 if bias is None else bias)
    fitted, shift = refit(torch.zeros(5, 7), torch.zeros(5) if biased else None, moments(inputs, wanted), ridge=1e-9)
    torch.testing.assert_close(fitted, weight, rtol=1e-3, atol=1e-3)
    if biased:
        torch.testing.assert_close(shift, bias, rtol=1e-3, atol=1e-3)
    else:
        assert shift is None


def test_it_is_the_best_there_is() -> None:
    torch.manual_seed(0)
    inputs, wanted = torch.randn(100, 6), torch.randn(100, 3)
    fitted, shift = refit(torch.randn(3, 6), torch.zeros(3), moments(inputs, wanted), ridge=1e-9)
    best = torch.linalg.lstsq(torch.cat([inputs, torch.ones(100, 1)], 1), wanted).solution.T
    torch.testing.assert_close(torch.cat([fitted, shift[:, None]], 1), best, rtol=1e-3, atol=1e-4)


def test_the_ridge_holds_on_to_the_weights_where_data_says_nothing() -> None:
    weight = torch.randn(3, 6)
    inputs = torch.zeros(4, 6)
    inputs[:, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    fitted, _ = refit(weight, None, moments(inputs, torch.zeros(4, 3)))
    torch.testing.assert_close(fitted[:, 1:], weight[:, 1:])
    assert fitted[:, 0].abs().max() < 0.1 * weight[:, 0].abs().max()


def error(model: torch.nn.Module, whole: list[torch.Tensor], inputs: dict) -> float:
    return sum((a - b).square().sum().item() for a, b in zip(run(model, inputs), whole, strict=True))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "deberta-v2-own"])
def test_every_family_is_mended(family: str) -> None:
    inputs = inputs_for(family)
    whole = run(make(family), inputs)
    errors = []
    for mend in (False, True):
        model = make(family)
        units = head_units(model) + neuron_units(model)
        # Heads and neurons 1, 3, 5 ... stay.
        kept = [torch.arange(1, each.count, 2) for each in units]
        made = reconstruct(model, units, kept, [inputs]) if mend else None
        assert all(torch.equal(a, b) for a, b in zip(run(model, inputs), whole, strict=True)), "only looked at"
        for position, (each, index) in enumerate(zip(units, kept, strict=True)):
            each.shrink(index)
            if made is not None:
                each.assign(made.fits[position].weight, made.fits[position].bias)
        assert made is None or made.mode == ("blocks" if family == "albert" else "layers")
        errors.append(error(model, whole, inputs))
    assert errors[1] < errors[0]


@pytest.mark.parametrize(("family", "place"), [("bart", "final_layer_norm"), ("whisper", "")])
def test_a_decoder_is_mended_for_what_is_left_of_its_encoder(family: str, place: str) -> None:
    """A fitted bias leaves no mean error, of what the shrunk model computes with its own encoder's states."""
    inputs = inputs_for(family)
    model, original = make(family), make(family)
    units = head_units(model) + neuron_units(model)
    kept = [torch.arange(1, each.count, 2) for each in units]
    made = reconstruct(model, units, kept, [inputs])
    for position, (each, index) in enumerate(zip(units, kept, strict=True)):
        each.shrink(index)
        each.assign(made.fits[position].weight, made.fits[position].bias)
    last = f"{neuron_units(model)[-1].block.layer}.{place}".rstrip(".")
    off = ends_of(model, last, inputs) - ends_of(original, last, inputs)
    assert off.mean(0).abs().max() < 1e-5 < off.std(0).max()


def ends_of(model: torch.nn.Module, path: str, inputs: dict) -> torch.Tensor:
    """Returns the hidden states that a norm is given, or that a layer gives: `(positions, width)`."""
    seen: list[torch.Tensor] = []
    module = base_model(model).get_submodule(path)
    if path.endswith("norm"):
        module.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    else:
        module.register_forward_hook(lambda module, given, output: seen.append(output))
    run(model, inputs)
    states = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]
    return states.flatten(0, -2)


def test_padding_does_not_count() -> None:
    model, batch = tiny_classifier(), batches(1, size=4)[0]
    units = head_units(model) + neuron_units(model)
    kept = [torch.arange(0, each.count, 2) for each in units]
    short = reconstruct(model, units, kept, [batch])
    padded = {
        name: torch.nn.functional.pad(value, (0, 6)) if value.dim() == 2 else value for name, value in batch.items()
    }
    long = reconstruct(model, units, kept, [padded])
    for position, fit in short.fits.items():
        torch.testing.assert_close(fit.weight, long.fits[position].weight, rtol=1e-2, atol=1e-3)


def test_low_rank_layers_are_mended_in_their_first_factor() -> None:
    batch = batches(1, size=16)[0]
    whole = compress(tiny_classifier(), [LowRankConfig(keep=0.6)])
    units = neuron_units(whole)
    made = reconstruct(whole, units, [torch.arange(48) for _ in units], [batch])
    rank = whole.bert.encoder.layer[0].output.dense.rank
    assert made.fits[0].weight.shape == (rank, 48) and made.fits[0].bias is None


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_a_layer_without_units_of_its_own_is_gone_through_in_its_place(part: str) -> None:
    data = batches(2)
    model = compress(tiny_classifier(num_hidden_layers=3), [LayerDroppingConfig(drop=1, part=part)], calibration=data)
    for units in (head_units(model), neuron_units(model), head_units(model) + neuron_units(model)):
        made = reconstruct(model, units, [torch.arange(each.count // 2) for each in units], data)
        assert made.mode == "layers" and len(made.fits) == len(units)
