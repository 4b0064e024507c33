from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorWithPadding, TrainingArguments

from hfcompress import (
    DistillationConfig,
    LowRankConfig,
    PruningTrainer,
    QuantizationConfig,
    StructuredPruningConfig,
    compress,
)
from hfcompress.errors import CompressionError, ConfigError
from hfcompress.methods.pruning.search import cubic_share, select
from hfcompress.methods.pruning.units import head_units, neuron_units, total_cost
from hfcompress.methods.registry import Context
from hfcompress.methods.structured_pruning import GatedPruningPart, PruningPart, structured_pruning
from hfcompress.modeling.anatomy import attention_blocks, feed_forward_blocks
from hfcompress.modeling.measure import tensor_bytes, weight_bytes
from tests.tiny_models import inputs_for, make
from tests.workshop import batches, logits, sentences, tiny_classifier, tiny_tokenizer


@given(st.floats(0.01, 0.99), st.integers(0, 50), st.integers(51, 200))
def test_the_cubic_schedule_rises_from_nothing_to_the_target(target: float, begin: int, end: int) -> None:
    shares = [cubic_share(target, step, begin, end) for step in range(end + 10)]
    assert shares[begin] == 0.0 and shares[end] == target
    assert all(early <= late for early, late in pairwise(shares))


@given(
    st.lists(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40), min_size=1, max_size=5),
    st.floats(0, 0.99),
    st.integers(1, 8),
)
def test_selection_keeps_the_share_in_whole_blocks(layers: list[list[float]], removed: float, multiple: int) -> None:
    scores = [torch.tensor(layer) for layer in layers]
    kept = select(scores, removed, multiple)
    total = sum(map(len, layers))
    least = sum(min(multiple, len(layer)) for layer in layers)
    count = sum(map(len, kept))
    assert abs(count - max(round(total * (1 - removed)), least)) <= multiple
    for index, layer in zip(kept, scores, strict=True):
        assert len(index) and index.tolist() == sorted(set(index.tolist()))
        assert len(index) % multiple == 0 or len(index) == len(layer)
        dropped = torch.ones(len(layer), dtype=torch.bool).index_fill(0, index, False)
        assert not dropped.any() or layer[index].min() >= layer[dropped].max()


def test_pruning_is_zeroing_what_the_units_pass_on() -> None:
    whole, data = tiny_classifier(), batches(3)
    config = StructuredPruningConfig(heads=0.4, neurons=0.3, importance="taylor", reconstruct=False)
    pruned = compress(tiny_classifier(), [config], calibration=data)
    uneven = {block.heads for block in attention_blocks(pruned)}
    assert sum(block.heads for block in attention_blocks(pruned)) == 5 and len(uneven) == 2
    with torch.no_grad():
        for now, was in zip(attention_blocks(pruned), attention_blocks(whole), strict=True):
            rows = was.at("attention.self.value").weight.view(4, 16, 64)
            left = now.at("attention.self.value").weight.view(-1, 16, 64)
            gone = [i for i in range(4) if not any(torch.equal(rows[i], head) for head in left)]
            assert len(gone) == 4 - now.heads
            for head in gone:
                was.at("attention.output.dense").weight[:, head * 16 : (head + 1) * 16] = 0
        for now, was in zip(feed_forward_blocks(pruned), feed_forward_blocks(whole), strict=True):
            left_rows = now.at("intermediate.dense").weight
            for neuron, row in enumerate(was.at("intermediate.dense").weight):
                if not (left_rows == row).all(1).any():
                    was.at("output.dense").weight[:, neuron] = 0
    torch.testing.assert_close(logits(pruned, data[0]), logits(whole, data[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("importance", ["fisher", "taylor", "activation", "magnitude"])
def test_a_unit_that_does_nothing_goes_first(importance: str) -> None:
    model = tiny_classifier()
    with torch.no_grad():
        block = attention_blocks(model)[1]
        block.at("attention.output.dense").weight[:, 16:32] = 0  # head 1 is not listened to
    kept_rows = block.at("attention.self.value").weight.detach().clone().view(4, 16, 64)
    config = StructuredPruningConfig(heads=1 / 8, importance=importance, reconstruct=False)
    compress(model, [config], calibration=batches(2))
    left = block.at("attention.self.value").weight
    torch.testing.assert_close(left, kept_rows[[0, 2, 3]].flatten(0, 1))


def test_every_layer_keeps_a_head_and_a_block_of_neurons() -> None:
    model = compress(tiny_classifier(), [StructuredPruningConfig(heads=0.75, neurons=0.91)])
    assert [block.heads for block in attention_blocks(model)] == [1, 1]
    assert [block.neurons for block in feed_forward_blocks(model)] == [8, 8]


def test_a_low_rank_layer_is_pruned_like_a_whole_one() -> None:
    data = batches(2)
    model = compress(
        tiny_classifier(),
        [LowRankConfig(keep=0.6), StructuredPruningConfig(heads=0.5, neurons=0.5)],
        calibration=data,
    )
    assert sum(block.heads for block in attention_blocks(model)) == 4
    assert torch.isfinite(logits(model, data[0])).all()


def test_masks_only_ever_close_and_survive_a_resume() -> None:
    model, batch = tiny_classifier(), batches(1)[0]
    part = PruningPart(StructuredPruningConfig(heads=0.5, neurons=0.5, begin=0.0, end=0.8, interval=1))
    part.begin(model, 10, torch.device("cpu"))
    open_before = sum(int(mask.sum()) for mask in part._masks["neurons"])
    for step in range(1, 9):
        model.zero_grad()
        model(**batch).loss.backward()
        part.before_optimizer_step(step - 1)
        part.after_step(step)
        open_now = sum(int(mask.sum()) for mask in part._masks["neurons"])
        assert open_now <= open_before
        open_before = open_now
        assert part.settled(step) == (step >= 8)
    assert open_before == 96
    other = PruningPart(part.config)
    other.begin(tiny_classifier(), 10, torch.device("cpu"))
    other.load_state(part.state())
    assert all(torch.equal(value, other.state()[name]) for name, value in part.state().items())
    masked = logits(model, batch)
    part.end(model)
    torch.testing.assert_close(logits(model, batch), masked, rtol=1e-5, atol=1e-6)


def test_taylor_without_labels_says_what_is_missing() -> None:
    with pytest.raises(CompressionError, match="labels"):
        compress(
            tiny_classifier(),
            [StructuredPruningConfig(heads=0.5, importance="taylor")],
            calibration=batches(1, labels=False),
        )


def test_a_quantized_model_is_refused_and_left_alone() -> None:
    model = compress(tiny_classifier(), [QuantizationConfig()])
    before = logits(model, batches(1)[0])
    with pytest.raises(CompressionError, match="quantiz"):
        compress(model, [StructuredPruningConfig(heads=0.5)])
    assert torch.equal(logits(model, batches(1)[0]), before)


@pytest.mark.parametrize("role", ["ffn_input", "query", "ffn_output"])
def test_one_quantized_projection_is_enough_to_refuse(role: str) -> None:
    model = compress(tiny_classifier(), [QuantizationConfig(weights=None, roles={role: "packed-8"}, embeddings=None)])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CompressionError, match="is quantized"):
        compress(model, [StructuredPruningConfig(heads=0.5, neurons=0.5)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_weight_that_two_layers_share_is_not_cut_on_one_side() -> None:
    model = tiny_classifier()
    first, second = model.bert.encoder.layer
    second.intermediate.dense.weight = first.intermediate.dense.weight
    with pytest.raises(CompressionError, match=r"layer\.0\.intermediate.*layer\.1\.intermediate"):
        compress(model, [StructuredPruningConfig(neurons=0.5)])
    assert first.intermediate.dense.weight is second.intermediate.dense.weight
    compress(model, [StructuredPruningConfig(heads=0.5)])  # what is cut is nobody else's


@pytest.mark.parametrize(("values", "over"), [({"heads": 0.05}, "0.0625"), ({"neurons": 0.02}, "0.0208")])
def test_a_share_that_removes_nothing_is_refused(values: dict, over: str) -> None:
    with pytest.raises(CompressionError, match=f"a share over {over}"):
        compress(tiny_classifier(), [StructuredPruningConfig(**values)])


def test_padding_has_no_say_in_what_activations_rank() -> None:
    config = StructuredPruningConfig(neurons=0.5, importance="activation", reconstruct=False, precision="fp32")
    model, data = tiny_classifier(), batches(2, labels=False)
    padded = [{name: torch.nn.functional.pad(value, (0, 20)) for name, value in batch.items()} for batch in data]
    kept = []
    for each in (data, padded):
        pruned = compress(copy.deepcopy(model), [config], calibration=each)
        kept.append(pruned.bert.encoder.layer[0].intermediate.dense.weight)
    assert torch.equal(*kept)


def test_data_of_padding_only_is_refused() -> None:
    data = [dict(batch, attention_mask=torch.zeros_like(batch["input_ids"])) for batch in batches(1)]
    model = tiny_classifier()
    with pytest.raises(CompressionError, match="padding only"):
        compress(model, [StructuredPruningConfig(heads=0.5, importance="magnitude")], calibration=data)
    assert [block.heads for block in attention_blocks(model)] == [4, 4]


def test_statistics_are_kept_for_another_target(tmp_path: Path) -> None:
    data = batches(1, labels=False)
    for share in (0.25, 0.5):
        compress(tiny_classifier(), [StructuredPruningConfig(heads=share)], calibration=data, cache_dir=tmp_path)
    (file,) = (tmp_path / "pruning").iterdir()
    assert file.name.startswith("energies-")


def test_examples_of_several_choices_are_scored() -> None:
    model = make("bert", "MultipleChoice")
    inputs = inputs_for("bert", "MultipleChoice")
    batch = {**inputs, "labels": torch.zeros(len(inputs["input_ids"]), dtype=torch.long)}
    before = sum(block.heads for block in attention_blocks(model))
    config = StructuredPruningConfig(heads=0.5, importance="fisher")
    compress(model, [config], calibration=[batch])
    assert sum(block.heads for block in attention_blocks(model)) == before / 2


@pytest.mark.parametrize(
    "values",
    [
        {"flops": 0.5, "parameters": 0.5},
        {"flops": 0.5, "heads": 0.1},
        {"flops": 1.0},
        {"heads": 0.5, "reconstruct": "yes"},
        {},
        {"heads": 1.0},
        {"heads": -0.1},
        {"heads": 0.5, "begin": 0.7},
        {"neurons": "0.5"},
        {"heads": True},
    ],
)
def test_bad_fields_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError):
        StructuredPruningConfig(**values)


def cost(model: torch.nn.Module, measure: str) -> float:
    return total_cost(head_units(model) + neuron_units(model), measure)


@pytest.mark.parametrize("measure", ["flops", "parameters"])
def test_a_share_of_the_cost_is_removed_and_hardly_more(measure: str) -> None:
    whole, data = tiny_classifier(), batches(2)
    model = compress(tiny_classifier(), [StructuredPruningConfig(**{measure: 0.4})], calibration=data)
    assert 0.55 < cost(model, measure) / cost(whole, measure) <= 0.6
    parameters = [p.numel() for block in feed_forward_blocks(model) for p in block.at("output.dense").parameters()]
    assert all(count % 8 * 64 == 0 for count in parameters)


def test_the_cost_of_parameters_is_their_number() -> None:
    for model in (tiny_classifier(), compress(tiny_classifier(), [LowRankConfig(keep=0.6)])):
        layers = model.bert.encoder.layer
        norms = 2 * 2 * 2 * 64  # two layers with two norms of weight and bias
        counted = sum(p.numel() for p in layers.parameters()) - norms
        # Sentinels are buffers, so nothing else is left.
        assert cost(model, "parameters") == counted


def test_training_prunes_towards_a_share_of_flops_by_movement() -> None:
    model, batch = tiny_classifier(), batches(1)[0]
    config = StructuredPruningConfig(flops=0.4, importance="movement", begin=0.0, end=0.8, interval=1)
    part, before = PruningPart(config), cost(model, "flops")
    part.begin(model, 10, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(1, 9):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        part.before_optimizer_step(step - 1)
        optimizer.step()
        part.after_step(step)
    masked = logits(model, batch)
    findings = part.end(model)
    torch.testing.assert_close(logits(model, batch), masked, rtol=1e-5, atol=1e-6)
    assert 0.5 < cost(model, "flops") / before <= 0.6  # a head is a tenth of this model
    assert findings["flops_removed"] == pytest.approx(1 - cost(model, "flops") / before, abs=1e-4)


def test_movement_is_how_far_weights_leave_zero() -> None:
    model, batch = tiny_classifier().double(), batches(1)[0]
    part = PruningPart(StructuredPruningConfig(neurons=0.5, importance="movement"))
    part.begin(model, 10, torch.device("cpu"))
    model(**batch).loss.backward()
    part.before_optimizer_step(0)
    weight = feed_forward_blocks(model)[0].at("output.dense").weight
    step = 1e-4
    grown = (weight - step * weight.grad).square().sum(0) - weight.square().sum(0)
    torch.testing.assert_close(part._scores["neurons"][0], grown.float() / (2 * step), rtol=1e-2, atol=1e-6)


def train_by_hand(model, part: PruningPart, batch: dict[str, torch.Tensor], steps: int, first: int = 1) -> None:
    """Does the steps `first` to `steps` of a training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for step in range(first, steps + 1):
        optimizer.zero_grad()
        outputs = model(**batch)
        torch.stack([outputs.loss, *part.losses(batch, outputs).values()]).sum().backward()
        part.before_optimizer_step(step - 1)
        optimizer.step()
        part.after_step(step)
    model.eval()


def test_gates_learn_what_to_close_and_meet_the_target() -> None:
    model, batch = tiny_classifier(), batches(1)[0]
    neurons = feed_forward_blocks(model)[0].at("output.dense")
    with torch.no_grad():
        neurons.weight[:, :48] = 0.0  # half of a layer's neurons do nothing
    config = StructuredPruningConfig(flops=0.3, importance="l0", begin=0.0, end=0.9)
    part, before = GatedPruningPart(config), cost(model, "flops")
    torch.manual_seed(0)
    part.begin(model, 200, torch.device("cpu"))
    train_by_hand(model, part, batch, 180)
    assert part.settled(180) and not part.settled(179)
    masked = logits(model, batch)
    findings = part.end(model)
    torch.testing.assert_close(logits(model, batch), masked, rtol=1e-4, atol=1e-5)
    assert 0.6 < cost(model, "flops") / before <= 0.7
    assert findings["expected_removed"][0] == pytest.approx(0.3, abs=0.06)
    assert findings["neurons"]["encoder.layer.0.intermediate.dense"]["kept"] < 96


def test_gates_survive_a_resume() -> None:
    batch = batches(1)[0]
    config = StructuredPruningConfig(heads=0.5, neurons=0.5, importance="l0", begin=0.0, end=0.8)
    ends = []
    for cut in (20, None):
        model, part = tiny_classifier(), GatedPruningPart(config)
        part.begin(model, 50, torch.device("cpu"))
        torch.manual_seed(0)
        train_by_hand(model, part, batch, cut or 40)
        if cut:
            noise = torch.get_rng_state()
            again, other = tiny_classifier(), GatedPruningPart(config)
            again.load_state_dict(model.state_dict())
            other.begin(again, 50, torch.device("cpu"))
            other.load_state(part.state())
            torch.set_rng_state(noise)  # as a Trainer's checkpoint does
            train_by_hand(again, other, batch, 40, first=cut + 1)
            model, part = again, other
        part.end(model)
        ends.append(logits(model, batch))
    assert torch.equal(*ends)


@pytest.mark.parametrize("importance", ["movement", "l0"])
def test_what_exists_only_in_training_is_refused_at_once(importance: str) -> None:
    with pytest.raises(CompressionError, match="only in training"):
        compress(tiny_classifier(), [StructuredPruningConfig(heads=0.5, importance=importance)])


def test_one_run_closes_gates_and_distils_and_reloads(tmp_path: Path) -> None:
    trainer = PruningTrainer(
        tiny_classifier(),
        TrainingArguments(
            str(tmp_path / "run"),
            max_steps=30,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
        ),
        pruning=StructuredPruningConfig(parameters=0.4, importance="l0", begin=0.0, end=0.7),
        teacher=tiny_classifier(9),
        distillation=DistillationConfig(),
        train_dataset=[{**tiny_tokenizer()(row["sentence"]), "labels": row["label"]} for row in sentences(32)],
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
    )
    before = cost(trainer.model, "parameters")
    trainer.train()
    assert {"loss_labels", "loss_soft", "loss_gates"} <= {name for log in trainer.state.log_history for name in log}
    assert cost(trainer.model, "parameters") <= 0.6 * before
    trainer.save_model(str(tmp_path / "saved"))
    again = type(trainer.model).from_pretrained(tmp_path / "saved")
    batch = batches(1)[0]
    assert torch.equal(logits(again, batch), logits(trainer.model.eval(), batch))


def test_gates_cannot_count_time() -> None:
    with pytest.raises(CompressionError, match="cannot work towards a latency target"):
        GatedPruningPart(StructuredPruningConfig(latency=0.01, latency_tokens=16, importance="l0")).begin(
            tiny_classifier(), 10, torch.device("cpu")
        )


def test_a_share_of_the_bytes_counts_the_embeddings_too(tmp_path: Path) -> None:
    model, data = tiny_classifier(), batches(2)
    before = tensor_bytes(model)
    model.save_pretrained(tmp_path / "whole")
    config = StructuredPruningConfig(bytes=0.3)
    findings = structured_pruning(model, config, Context(calibration=data))
    model.save_pretrained(tmp_path / "pruned")
    after = tensor_bytes(model)
    assert findings["bytes_removed"] == pytest.approx(1 - after / before, abs=2e-3)
    assert 0.3 <= findings["bytes_removed"] < 0.36
    # What is counted is what is on disk, but for the headers.
    assert after == pytest.approx(weight_bytes(tmp_path / "pruned"), rel=0.1)
    with pytest.raises(CompressionError, match=r"nothing else of the model goes; reachable: up to 0\.\d+"):
        structured_pruning(tiny_classifier(vocab_size=40000), config, Context())


@pytest.mark.parametrize("importance", ["activation", "fisher"])
def test_what_exists_only_at_once_is_refused_in_training(importance: str) -> None:
    with pytest.raises(CompressionError, match="only without training"):
        PruningPart(StructuredPruningConfig(heads=0.5, importance=importance))


@pytest.mark.parametrize(
    ("values", "reachable"), [({"heads": 0.9}, "0.750"), ({"neurons": 0.95}, "0.916"), ({"flops": 0.9}, "0.795")]
)
def test_what_cannot_be_reached_is_refused_with_what_can(values: dict, reachable: str) -> None:
    model = tiny_classifier()
    before = logits(model, batches(1)[0])
    with pytest.raises(CompressionError, match=f"reachable: up to {reachable}"):
        compress(model, [StructuredPruningConfig(**values)], calibration=batches(1))
    assert torch.equal(logits(model, batches(1)[0]), before)


def test_equal_scores_are_refused() -> None:
    model = tiny_classifier()
    with torch.no_grad():
        for block in attention_blocks(model):
            block.at("attention.output.dense").weight.zero_()
    with pytest.raises(CompressionError, match="equally important"):
        compress(model, [StructuredPruningConfig(heads=0.5, importance="magnitude")])


def test_weights_that_are_not_finite_are_refused_before_anything_is_removed() -> None:
    model = tiny_classifier()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(CompressionError, match=r"encoder\.layer\.0.*not finite"):
        compress(model, [StructuredPruningConfig(heads=0.5)], calibration=batches(1))
    assert [block.heads for block in attention_blocks(model)] == [4, 4]


def test_reconstruction_without_data_says_what_is_missing() -> None:
    with pytest.raises(CompressionError, match="calibration"):
        compress(tiny_classifier(), [StructuredPruningConfig(heads=0.5, reconstruct=True)])


def test_reconstruction_brings_the_outputs_nearer_on_other_data() -> None:
    whole, data, other = tiny_classifier(), batches(6), batches(2, seed=9)
    errors = {}
    for mend in (False, True):
        config = StructuredPruningConfig(flops=0.5, reconstruct=mend)
        model = compress(tiny_classifier(), [config], calibration=data)
        errors[mend] = sum((logits(model, each) - logits(whole, each)).square().sum().item() for each in other)
    assert errors[True] < 0.3 * errors[False]
