"""Sound, whose frames are not its samples; several choices a row; outputs that are no labels."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DataCollatorForMultipleChoice,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    YolosConfig,
    YolosForObjectDetection,
    default_data_collator,
)

from hfcompress import DistillationConfig, DistillationTrainer
from hfcompress.errors import CompressionError, ConfigError, DataError, UnsupportedModelError
from hfcompress.methods.distillation import DistillationPart
from hfcompress.methods.teaching.checks import check_rows, label_order
from hfcompress.methods.training import EXAMPLE_ID, Rows
from tests.methods.test_distillation import CPU
from tests.methods.test_trainer import arguments
from tests.tiny_models import inputs_for, make
from tests.workshop import tiny_tokenizer

ALL = {"hidden": 1.0, "embeddings": 1.0, "relations": 1.0, "attention": 1.0}


def terms(student: Any, teacher: Any, batch: dict[str, Any], **values: Any) -> tuple[dict[str, torch.Tensor], float]:
    part = DistillationPart(DistillationConfig(**values), teacher)
    part.begin(student, 1, CPU)
    with torch.no_grad():
        found = dict(part.losses(batch, student(**batch, **part.forward_arguments())))
    part.release()
    items = part.items(batch)
    assert items is not None
    return found, float(items)


def rows_of(dataset: Any, collate: Any, folder: Path = Path("unused")) -> Rows:
    return Rows(dataset=dataset, collate=collate, batch_size=4, device=CPU, autocast=nullcontext, folder=folder)


def padded(batch: dict[str, torch.Tensor], more: int) -> dict[str, torch.Tensor]:
    return {
        name: torch.nn.functional.pad(value, (0, more)) if name != "labels" and value.dim() > 1 else value
        for name, value in batch.items()
    }


# Sound

SOUND = {"feat_extract_norm": "layer"}  # those that are given a mask


def heard(data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    samples = [torch.tensor(row["input_values"]) for row in data]
    made = {name: torch.tensor([row[name] for row in data]) for name in ("labels", EXAMPLE_ID) if name in data[0]}
    mask = pad_sequence([torch.ones(len(each), dtype=torch.long) for each in samples], batch_first=True)
    return {"input_values": pad_sequence(samples, batch_first=True), "attention_mask": mask, **made}


@pytest.mark.parametrize("head", ["CTC", "SequenceClassification", "AudioFrameClassification"])
def test_padding_does_not_count_in_sound(head: str) -> None:
    student, teacher = make("wav2vec2", head, **SOUND), make("wav2vec2", head, seed=1, **SOUND)
    inputs = inputs_for("wav2vec2", head)
    inputs["attention_mask"] = torch.ones_like(inputs["input_values"], dtype=torch.long)
    wanted, items = terms(student, teacher, inputs, **ALL)
    found, again = terms(student, teacher, padded(inputs, 400), **ALL)
    assert items == again == (2 if head == "SequenceClassification" else 2 * 18)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("head", ["CTC", "SequenceClassification"])
def test_sound_of_any_length_is_cached(head: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes, labels = range(300, 500, 40), [3, 4] if head == "CTC" else 0
    data = [{"input_values": torch.randn(n, generator=generator).tolist(), "labels": labels} for n in sizes]
    if head != "CTC":
        data[0]["labels"] = 1
    rows, found = rows_of(data, heard, tmp_path), []
    student, teacher = make("wav2vec2", head, **SOUND), make("wav2vec2", head, seed=1, **SOUND)
    for cache in (False, True):
        part = DistillationPart(DistillationConfig(hidden=1.0, cache=cache), copy.deepcopy(teacher))
        part.before_training(student, rows)
        part.begin(student, 1, CPU)
        inputs = rows.batch([3, 0, 4])
        with torch.no_grad():
            outputs = student(**inputs, **part.forward_arguments())
            found.append(part.losses(inputs | {EXAMPLE_ID: torch.tensor([3, 0, 4])}, outputs))
    assert found[0].keys() == found[1].keys() == {"soft", "hidden"}
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


def test_the_encoder_alone_of_an_encoder_decoder_is_compared() -> None:
    student, teacher = make("whisper", "AudioClassification"), make("whisper", "AudioClassification", seed=1)
    found, _ = terms(student, teacher, inputs_for("whisper", "AudioClassification"), **ALL)
    assert found.keys() >= ALL.keys() and all(value > 0 for value in found.values())


# Several choices a row


def test_choices_are_compared_as_the_examples_they_are() -> None:
    student, teacher = make("bert", "MultipleChoice"), make("bert", "MultipleChoice", seed=1)
    inputs = inputs_for("bert", "MultipleChoice") | {"labels": torch.tensor([0, 2])}
    wanted, items = terms(student, teacher, inputs, **ALL)
    found, _ = terms(student, teacher, padded(inputs, 5), **ALL)
    assert items == 2 and wanted.keys() >= ALL.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_choices_are_cached(tmp_path: Path) -> None:
    student, teacher = make("bert", "MultipleChoice"), make("bert", "MultipleChoice", seed=1)
    data = [{"input_ids": [[5 + n] * 4, [6] * 4, [7] * 4], "labels": n % 3} for n in range(6)]
    rows, found = rows_of(data, default_data_collator, tmp_path), []
    for cache in (False, True):
        part = DistillationPart(DistillationConfig(hidden=1.0, cache=cache), copy.deepcopy(teacher))
        part.before_training(student, rows)
        part.begin(student, 1, CPU)
        inputs = rows.batch([4, 1])
        with torch.no_grad():
            outputs = student(**inputs, **part.forward_arguments())
            found.append(part.losses(inputs | {EXAMPLE_ID: torch.tensor([4, 1])}, outputs))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


def test_the_collator_of_choices_goes_with_a_cache(tmp_path: Path) -> None:
    data = [{"input_ids": [[5 + n] * 4, [6] * (2 + n), [7], [8]], "labels": n % 4} for n in range(8)]
    losses = []
    for cache in (False, True):
        trainer = DistillationTrainer(
            make("bert", "MultipleChoice", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
            arguments(tmp_path / str(cache), max_steps=2, save_strategy="no"),
            teacher=make("bert", "MultipleChoice", seed=1),
            distillation=DistillationConfig(hidden=1.0, cache=cache),
            train_dataset=data,
            data_collator=DataCollatorForMultipleChoice(tiny_tokenizer()),
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss_soft" in log])
    assert losses[0] and losses[0] == pytest.approx(losses[1], rel=1e-5)


# Outputs that are no labels


@pytest.mark.parametrize(
    ("family", "head"),
    [("bert", "MultipleChoice"), ("bert", "QuestionAnswering"), ("wav2vec2", "CTC"), ("wav2vec2", "XVector")],
)
@pytest.mark.parametrize("names", [("LABEL_1", "LABEL_0"), ("no", "yes")])
def test_names_of_labels_say_nothing_about_other_outputs(family: str, head: str, names: tuple[str, str]) -> None:
    student = make(family, head)
    teacher = make(family, head, id2label=dict(enumerate(names)), label2id={name: n for n, name in enumerate(names)})
    teacher.load_state_dict(student.state_dict())
    assert label_order(student, teacher) is None
    found, _ = terms(student, teacher, inputs_for(family, head))
    assert float(found["soft"]) == pytest.approx(0, abs=1e-5)
    with pytest.raises(CompressionError, match="kind of head"):
        label_order(student, make(family, "SequenceClassification"))


def test_one_output_a_choice_is_compared_among_the_choices() -> None:
    student, teacher = make("bert", "MultipleChoice", num_labels=1), make("bert", "MultipleChoice", seed=1)
    inputs = inputs_for("bert", "MultipleChoice")
    one, _ = terms(student, make("bert", "MultipleChoice", seed=1, num_labels=1), inputs)
    student.config.num_labels = 2
    two, _ = terms(student, teacher, inputs)
    torch.testing.assert_close(one["soft"], two["soft"])


def test_squared_errors_of_answers_do_not_depend_on_padding() -> None:
    student, teacher = make("bert", "QuestionAnswering"), make("bert", "QuestionAnswering", seed=1)
    inputs = inputs_for("bert", "QuestionAnswering")
    short, _ = terms(student, teacher, inputs, soft_loss="mse")
    long, _ = terms(student, teacher, padded(inputs, 6), soft_loss="mse")
    torch.testing.assert_close(short["soft"], long["soft"])
    with torch.no_grad():
        (ours, theirs), real = (each(**inputs) for each in (student, teacher)), inputs["attention_mask"].bool()
    squares = [
        (ours[name] - theirs[name]).square()[row][real[row]].mean()
        for name in ("start_logits", "end_logits")
        for row in range(2)
    ]
    torch.testing.assert_close(short["soft"], 0.5 * torch.stack(squares).mean())


# What is refused before training, and what is taken


def test_rows_with_more_choices_than_labels_are_taken() -> None:
    data = [{"input_ids": [[5]] * 4, "labels": n} for n in range(4)]
    check_rows(rows_of(data, default_data_collator), make("bert", "MultipleChoice"), needs_labels=True)


def test_a_decoder_without_labels_is_refused() -> None:
    rows = rows_of([{"input_ids": [5, 6, 2]}], default_data_collator)
    with pytest.raises(DataError, match="a decoder reads"):
        check_rows(rows, make("t5"), needs_labels=False)
    rows = rows_of([{"input_ids": [5, 6, 2], "decoder_input_ids": [0, 5]}], default_data_collator)
    check_rows(rows, make("t5"), needs_labels=False)


def test_outputs_at_labelled_tokens_alone_are_refused() -> None:
    student, teacher = make("modernbert", "MaskedLM", sparse_prediction=True), make("modernbert", "MaskedLM", seed=1)
    with pytest.raises(CompressionError, match="sparse_prediction"):
        DistillationPart(DistillationConfig(), teacher).begin(student, 1, CPU)
    DistillationPart(DistillationConfig(soft=0, hidden=1.0), teacher).begin(student, 1, CPU)


def test_positions_in_attention_are_no_relations() -> None:
    student, teacher = make("deberta-v2"), make("deberta-v2", seed=1)
    found, _ = terms(student, teacher, inputs_for("deberta-v2"), relations=1.0)
    assert found["relations"] > 0
    same, _ = terms(student, copy.deepcopy(student), inputs_for("deberta-v2"), relations=1.0)
    assert float(same["relations"]) == pytest.approx(0, abs=1e-5)


def test_pairs_of_layers_are_lists_as_well_as_tuples() -> None:
    config = DistillationConfig(hidden=1.0, relations=1.0, layers=[[1, 2], [2, 4]], relation_layers=[1, 2])
    assert (config.layers, config.relation_layers) == (((1, 2), (2, 4)), (1, 2))
    for bad in ([[1, "2"]], [[1, 2, 3]], [[True, 2]]):
        with pytest.raises(ConfigError, match="layers"):
            DistillationConfig(hidden=1.0, layers=bad)
    with pytest.raises(ConfigError, match="no pair is given"):
        DistillationConfig(hidden=1.0, soft=0, hard=0, layers=())


# Images, prompts, single numbers


def segmenter(seed: int) -> Any:
    sizes: dict[str, Any] = {name: [1, 1] for name in ("depths", "num_attention_heads", "sr_ratios", "mlp_ratios")}
    sizes |= {"num_encoder_blocks": 2, "hidden_sizes": [8, 16], "patch_sizes": [3, 3], "strides": [2, 2]}
    torch.manual_seed(seed)
    config = SegformerConfig(**sizes, decoder_hidden_size=8, num_labels=3, initializer_range=0.5)
    return SegformerForSemanticSegmentation(config).eval()


def test_labels_of_pixels_are_compared_pixel_by_pixel() -> None:
    student, teacher = segmenter(0), segmenter(1)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.randint(0, 3, (2, 16, 16))}
    found, _ = terms(student, teacher, batch, temperature=1.0, soft=1.0)
    with torch.no_grad():
        ours, theirs = (each(batch["pixel_values"]).logits.log_softmax(1) for each in (student, teacher))
    torch.testing.assert_close(found["soft"], (theirs.exp() * (theirs - ours)).sum(1).mean())
    with pytest.raises(UnsupportedModelError, match="one stack"):
        DistillationPart(DistillationConfig(hidden=1.0), teacher).begin(student, 1, CPU)


def test_objects_that_are_found_are_not_laid_side_by_side() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    models = [YolosForObjectDetection(YolosConfig(**sizes, image_size=[16, 16], patch_size=8)) for _ in range(2)]
    with pytest.raises(CompressionError, match="has no order"):
        label_order(*models)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_outputs_at_learnt_prompts_are_refused() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is an extra")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    student: Any = peft.get_peft_model(make("llama", "CausalLM"), prompts)
    inputs = inputs_for("llama", "CausalLM")
    with pytest.raises(CompressionError, match="outputs at 10 tokens of a text of 7"):
        terms(student, make("llama", "CausalLM", seed=1), inputs | {"labels": inputs["input_ids"]})


def test_one_number_may_be_called_anything() -> None:
    names = [{"num_labels": 1, "id2label": {0: name}, "label2id": {name: 0}} for name in ("score", "LABEL_0")]
    assert label_order(*(make("bert", "SequenceClassification", **each) for each in names)) == [0]


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_losses_of_sound_accumulate_to_one_batch(reduction: str, tmp_path: Path) -> None:
    of = ("attention", "hidden", "feat_proj", "final", "activation")
    chance = {f"{name}_dropout": 0.0 for name in of}
    generator = torch.Generator().manual_seed(0)
    data = [
        {"input_values": torch.randn(400, generator=generator), "labels": torch.tensor([5] * n + [-100] * (6 - n))}
        for n in (1, 1, 6, 6, 2, 3, 4, 5)
    ]
    losses = []
    for size, steps in ((8, 1), (2, 4)):
        student = make("wav2vec2", "CTC", ctc_loss_reduction=reduction, apply_spec_augment=False, layerdrop=0, **chance)
        changes = {"max_steps": 1, "per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = DistillationTrainer(
            student,
            arguments(tmp_path, save_strategy="no", **changes),
            teacher=make("wav2vec2", "CTC", seed=1),
            train_dataset=data,
            data_collator=default_data_collator,
        )
        trainer.train()
        losses.append([trainer.state.log_history[0][name] for name in ("loss_labels", "loss_soft")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
