"""Models and data that cannot be pruned: refused before anything is cut; and what only looks as if it could not."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

from hfcompress import PruningTrainer, StructuredPruningConfig, UnstructuredPruningConfig, compress
from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import examples_in
from hfcompress.methods.pruning.gradual import GatedPruningPart, PruningPart
from hfcompress.methods.pruning.importance import kept_gradients, mask_gradients
from hfcompress.methods.pruning.targets import rounded_down
from hfcompress.methods.pruning.units import head_units, neuron_units
from hfcompress.methods.registry import Context
from hfcompress.methods.statistics import real_rows
from hfcompress.methods.unstructured_pruning import keep_share
from hfcompress.modeling.measure import tensor_bytes
from tests.methods.test_trainer import make as trainer_of
from tests.methods.test_trainer import rows
from tests.tiny_models import inputs_for, make
from tests.workshop import batches, tiny_classifier

HEADS = StructuredPruningConfig(heads=0.5, importance="magnitude")


def shapes(model: nn.Module) -> list[torch.Size]:
    return [value.shape for value in model.state_dict().values()]


@pytest.mark.parametrize("change", ["subclass", "parametrized", "masked"])
def test_layers_that_cannot_be_cut_are_named_before_any_is(change: str) -> None:
    class Other(nn.Linear):
        pass

    model = tiny_classifier()
    last = model.bert.encoder.layer[1].attention.output.dense
    if change == "subclass":
        last.__class__ = Other
    elif change == "parametrized":
        nn.utils.parametrizations.weight_norm(last)
    else:
        l1_unstructured(last, "weight", 0.5)
    before = shapes(model)
    with pytest.raises(CompressionError, match=r"layer\.1\.attention\.output\.dense is no plain linear layer"):
        compress(model, [HEADS])
    assert shapes(model) == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_models_with_adapters_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is an extra")
    adapted = tiny_classifier()
    adapted.add_adapter(peft.LoraConfig(target_modules=["query"]))
    wrapped = peft.get_peft_model(tiny_classifier(), peft.LoraConfig(target_modules=["query"]))
    for model, says in ((adapted, "has adapters"), (wrapped, "no model of")):
        for method in (HEADS, UnstructuredPruningConfig()):
            with pytest.raises(CompressionError, match=says):
                compress(model, [method])
            with pytest.raises(CompressionError, match=says):
                trainer_of(tmp_path, PruningTrainer, model=model, pruning=method)


@pytest.mark.parametrize("importance", ["taylor", "movement"])
def test_what_is_frozen_says_nothing_of_its_units(importance: Any) -> None:
    model = tiny_classifier()
    model.bert.encoder.layer[0].requires_grad_(False)
    part = PruningPart(StructuredPruningConfig(neurons=0.5, importance=importance))
    with pytest.raises(CompressionError, match=r"layer\.0.* is frozen"):
        part.begin(model, 10, torch.device("cpu"))
    PruningPart(StructuredPruningConfig(neurons=0.5, importance="magnitude")).begin(model, 10, torch.device("cpu"))


def test_bytes_are_those_of_each_matrix() -> None:
    model = make("t5", "ConditionalGeneration")
    model = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict(), dtype=torch.float16)
    kinds = {value.dtype for value in model.parameters()}
    assert kinds == {torch.float16, torch.float32}  # T5 keeps the last matrix of its feed-forward blocks so
    neurons, heads = neuron_units(model)[0], head_units(model)[0]
    for each, beside in ((neurons, 0), (heads, 8 * (heads.count - 1))):  # which heads of the shared bias are left
        whole, (unit, _) = tensor_bytes(model), each.costs("bytes")
        each.shrink(torch.arange(each.count - 1))
        assert whole - tensor_bytes(model) == unit - beside


def test_what_is_said_to_be_reachable_is() -> None:
    assert rounded_down(0.7419) == "0.741" and rounded_down(0.5) == "0.500"
    model = tiny_classifier()
    with pytest.raises(CompressionError, match="reachable") as found:
        compress(model, [StructuredPruningConfig(flops=0.99)])
    most = float(str(found.value).rpartition("up to ")[2].split()[0].rstrip("."))
    compress(model, [StructuredPruningConfig(flops=most)])


def test_the_mask_of_what_is_read_is_not_that_of_what_is_written() -> None:
    model = make("bart", "ConditionalGeneration")
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    states = torch.arange(12.0).view(2, 3, 2)
    assert len(real_rows(model, states, {"attention_mask": mask})) == 5
    assert len(real_rows(model, states, {"attention_mask": mask, "labels": torch.zeros(2, 4)})) == 5
    for name in ("labels", "decoder_input_ids"):
        assert len(real_rows(model, states, {"attention_mask": mask, name: torch.zeros(2, 3)})) == 6
    causal = make("gpt2", "LMHeadModel")
    assert len(real_rows(causal, states, {"attention_mask": mask, "labels": torch.zeros(2, 3)})) == 5


def test_statistics_are_kept_apart_by_loss_and_precision(tmp_path: Path) -> None:
    batch = batches(1)[0]
    batch["labels"] = torch.nn.functional.one_hot(batch["labels"], 2).float()
    found = []
    for problem in ("multi_label_classification", "regression"):
        model = tiny_classifier(problem_type=problem)
        units = neuron_units(model)
        found.append(kept_gradients(model, units, [batch], tmp_path))
        fresh = mask_gradients(model, units, [batch])
        assert all(map(torch.equal, found[-1], fresh))
    with torch.autocast("cpu", torch.bfloat16):
        kept_gradients(model, units, [batch], tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_same_loss_has_the_same_statistics_whether_or_not_it_was_run(tmp_path: Path) -> None:
    model, batch = tiny_classifier(), batches(1)[0]
    kept_gradients(model, neuron_units(model), [batch], tmp_path)
    assert model.config.problem_type == "single_label_classification"  # the first pass says so
    kept_gradients(model, neuron_units(model), [batch], tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_positions_given_once_for_all_examples_are_no_example() -> None:
    batch = batches(1)[0]
    count, length = batch["input_ids"].shape
    batch = {"position_ids": torch.arange(length)[None], **batch}
    assert examples_in(batch) == count
    gradients = mask_gradients(model := tiny_classifier(), neuron_units(model), [batch])
    assert len(gradients[0]) == count


def test_one_weight_of_what_is_ranked_together_stays() -> None:
    assert keep_share(torch.rand(4, 24), 0.999, by_output=True).sum(1).tolist() == [1] * 4
    with pytest.raises(CompressionError, match="less than half a weight"):
        compress(tiny_classifier(), [UnstructuredPruningConfig(sparsity=1e-5)])


def test_nothing_is_done_where_a_later_method_cannot_work() -> None:
    model = tiny_classifier()
    before = shapes(model)
    with pytest.raises(CompressionError, match=r"structured_pruning: .* only in training"):
        compress(model, [HEADS, StructuredPruningConfig(heads=0.1, importance="movement")])
    assert shapes(model) == before


@pytest.mark.parametrize(
    ("calibration", "says"),
    [
        ({"input_ids": torch.ones(1, 3)}, "one batch where there should be several"),
        ([torch.ones(1, 3)], "batch 0 is a Tensor"),
        ([{"input_ids": [[1, 2]]}], "'input_ids' should be a tensor .* not list"),
        ([{"input_ids": torch.ones(1, 3), "labels": None}], "'labels' should be a tensor .* not NoneType"),
        ([{"input_ids": torch.ones(0, 3)}], r"not \[0, 3\]"),
        ([{"input_ids": torch.ones(3), "attention_mask": torch.ones(3)}], r"row for each example, not \[3\]"),
    ],
)
def test_calibration_data_that_are_no_batches_are_refused(calibration: Any, says: str) -> None:
    with pytest.raises(CompressionError, match=says):
        compress(tiny_classifier(), [StructuredPruningConfig(heads=0.5)], calibration=calibration)


def test_calibration_may_be_a_loader_or_made_on_the_way() -> None:
    listed = batches(2)
    config = StructuredPruningConfig(neurons=0.5, precision="fp32")
    models = [
        compress(tiny_classifier(), [config], calibration=each)
        for each in (listed, iter(listed), DataLoader(listed, batch_size=None))
    ]
    for other in models[1:]:
        assert all(map(torch.equal, models[0].state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("family", ["t5", "mpnet"])
def test_attention_with_a_shared_bias_is_pickled_and_copied(family: str) -> None:
    head = "ConditionalGeneration" if family == "t5" else "SequenceClassification"
    model, inputs = compress(make(family, head), [HEADS]), inputs_for(family, head)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        with torch.no_grad():
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        compress(again, [HEADS])  # and is cut again
        assert shapes(again) != shapes(model)


def test_choices_are_timed_with_calibration_data() -> None:
    model, inputs = make("bert", "MultipleChoice"), inputs_for("bert", "MultipleChoice")
    config = StructuredPruningConfig(latency=0.01, latency_batch=2, importance="magnitude", multiple_of=1)
    before = shapes(model)
    compress(model, [config], calibration=[inputs])
    assert shapes(model) != before


def test_times_are_kept_where_the_training_is(tmp_path: Path) -> None:
    config = StructuredPruningConfig(latency=0.02, latency_batch=2, latency_tokens=8, multiple_of=1)
    trainer = trainer_of(tmp_path, PruningTrainer, pruning=config, max_steps=3, save_strategy="no")
    trainer.train()
    assert len(list((tmp_path / "pruning").glob("*.json"))) == 1


def test_gates_that_had_no_time_to_close_are_told_of(caplog: Any) -> None:
    model, batch = tiny_classifier(), batches(1)[0]
    part = GatedPruningPart(StructuredPruningConfig(neurons=0.5, importance="l0", end=1.0), Context())
    part.begin(model, 2, torch.device("cpu"))
    model.train()
    for step in range(2):
        loss = model(**batch).loss + sum(part.losses(batch, None).values())
        loss.backward()
        part.before_optimizer_step(step)
        if step == 0:
            part.after_step(1)
    part.after_step(2)
    assert "of the 50.0% that is to go" in caplog.text


def test_the_trainer_reloads_what_a_resumed_finished_run_pruned(tmp_path: Path, recwarn: Any) -> None:
    config = UnstructuredPruningConfig(sparsity=0.5, begin=0.0, end=0.5, interval=1)
    changes: dict[str, Any] = {"pruning": config, "max_steps": 4, "save_steps": 4, "save_strategy": "steps"}
    trainer_of(tmp_path, PruningTrainer, **changes).train()
    again = trainer_of(tmp_path, PruningTrainer, **changes)
    again.train(resume_from_checkpoint=True)
    assert not [each for each in recwarn if "ended before pruning did" in str(each.message)]
    again.save_model(str(tmp_path / "saved"))
    zeros = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").bert.encoder.layer[0].output.dense
    assert float((zeros.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01) and len(rows())
