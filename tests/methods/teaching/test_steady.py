"""A student's layers without chance in them, and models that are no teachers of a student."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

from hfcompress import DistillationConfig
from hfcompress.errors import CompressionError, TrainingError
from hfcompress.methods.distillation import DistillationPart
from tests.methods.test_distillation import CPU
from tests.tiny_models import FAMILIES, inputs_for, make
from tests.workshop import batches, tiny_classifier

OF_MAPS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "dropout_rate")
OF_LAYERS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


def batch_for(family: str, head: str | None = None) -> dict[str, torch.Tensor]:
    inputs = dict(inputs_for(family, head))
    if "decoder_input_ids" in inputs:
        inputs["labels"] = inputs.pop("decoder_input_ids")
    return inputs


def began(part: DistillationPart, student: Any) -> DistillationPart:
    part.begin(student, 1, CPU)
    return part


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_maps_are_compared_whole(family: str) -> None:
    plain = make(family).config
    dropout = {name: 0.5 for name in OF_MAPS if hasattr(plain, name)}
    student, teacher, inputs = make(family, **dropout), make(family), batch_for(family)
    part = began(DistillationPart(DistillationConfig(soft=0, attention=1.0), teacher), student)
    student.train()

    def whole() -> bool:
        outputs = student(**inputs, **part.forward_arguments())
        names = [name for name in outputs if name.endswith("attentions") and "cross" not in name]
        return all(torch.allclose(maps.sum(-1), torch.ones(())) for name in names for maps in outputs[name])

    assert whole()
    part.release()
    student.set_attn_implementation("eager")
    assert not whole(), "dropout is back"


@pytest.mark.parametrize(("family", "head"), [("wav2vec2", "CTC"), ("bart", None), ("whisper", None)])
def test_no_layer_is_skipped_while_layers_are_compared(family: str, head: str | None) -> None:
    names = [name for name in OF_LAYERS if hasattr(make(family, head).config, name)]
    student = make(family, head, **dict.fromkeys(names, 0.9))
    teacher, inputs = make(family, head), batch_for(family, head)
    part = began(DistillationPart(DistillationConfig(hidden=1.0, relations=1.0), teacher), student)
    student.train()
    for _ in range(3):
        part.losses(inputs, student(**inputs, **part.forward_arguments()))
    assert [getattr(student.config, name) for name in names] == [0.9] * len(names), "checkpoints keep the config"
    part.release()
    states = [student(**inputs, output_hidden_states=True) for _ in range(3)]
    name = "hidden_states" if family == "wav2vec2" else "encoder_hidden_states"
    assert any(len(each[name]) <= 3 for each in states), "layers are skipped again"


def test_chance_comes_back_after_the_stage_that_compares_layers() -> None:
    student = tiny_classifier(0, attention_probs_dropout_prob=0.3)
    student.set_attn_implementation("sdpa")
    part = DistillationPart(DistillationConfig(attention=1.0, stage=0.5), tiny_classifier(1))
    part.begin(student, 4, CPU)
    attention = student.bert.encoder.layer[0].attention.self
    assert (attention.dropout.p, student.config._attn_implementation) == (0.0, "eager")
    part.after_step(2)
    assert (attention.dropout.p, student.config._attn_implementation) == (0.3, "sdpa")


def test_reentrant_checkpointing_of_the_model_itself_is_refused() -> None:
    student, part = tiny_classifier(0), DistillationPart(DistillationConfig(relations=1.0), tiny_classifier(1))
    student.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(TrainingError, match="reentrant activation checkpointing gives no gradients"):
        part.begin(student, 1, CPU)
    began(DistillationPart(DistillationConfig(), tiny_classifier(1)), student)  # outputs have their gradients
    student.activation_checkpointing_enable({"use_reentrant": False})
    part.begin(student, 1, CPU)


# Teachers


def test_a_teacher_that_shares_weights_with_its_student_is_refused() -> None:
    student, teacher = tiny_classifier(0), tiny_classifier(1)
    with pytest.raises(CompressionError, match=r"shares 'bert\.embeddings\.word_embeddings\.weight'"):
        DistillationPart(DistillationConfig(), student).before_training(student, None)
    teacher.classifier.bias = student.classifier.bias
    with pytest.raises(CompressionError, match=r"shares 'classifier\.bias'"):
        began(DistillationPart(DistillationConfig(), teacher), student)
    began(DistillationPart(DistillationConfig(), copy.deepcopy(student)), student)


@pytest.mark.parametrize(
    ("teacher", "says"), [("google-bert/bert-base", "not 'google-bert"), ([], "needs a teacher"), (None, "needs a")]
)
def test_what_is_no_model_is_no_teacher(teacher: Any, says: str) -> None:
    with pytest.raises(CompressionError, match=says):
        DistillationPart(DistillationConfig(), teacher)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_wrapped_models_are_unwrapped() -> None:
    def adapted(seed: int) -> Any:
        lora = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], r=2)
        return peft.get_peft_model(tiny_classifier(seed), lora).eval()

    config = DistillationConfig(hidden=1.0, attention=1.0, relations=1.0)
    batch, found = batches(1)[0], []
    for teacher in (tiny_classifier(1), adapted(1), torch.compile(tiny_classifier(1), backend="eager")):
        for student in (tiny_classifier(0), adapted(0)):
            part = began(DistillationPart(config, teacher), student)
            terms = part.losses(batch, student(**batch, **part.forward_arguments()))
            found.append(torch.stack([terms[name] for name in ("soft", "hidden", "attention", "relations")]))
            part.end(student)
    for terms in found:
        torch.testing.assert_close(terms, found[0])
    prompts = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    with pytest.raises(CompressionError, match="learnt prompts"):
        DistillationPart(config, peft.get_peft_model(tiny_classifier(1), prompts))


# In sixteen bits


def test_a_student_of_16_bits_is_projected() -> None:
    student, batch = tiny_classifier(0).bfloat16(), batches(1)[0]
    teacher = tiny_classifier(1, hidden_size=96, num_attention_heads=6)
    part = began(DistillationPart(DistillationConfig(hidden=1.0), teacher), student)
    part.losses(batch, student(**batch, **part.forward_arguments()))["hidden"].backward()
    assert all(each.grad is not None and each.dtype == torch.float32 for each in part.parameters())


@pytest.mark.parametrize("family", ["whisper", "vit"])
def test_a_teacher_of_16_bits_sees_and_hears(family: str) -> None:
    student, teacher, inputs = make(family), make(family, seed=1).bfloat16(), batch_for(family)
    part = began(DistillationPart(DistillationConfig(), teacher), student)
    assert torch.isfinite(part.losses(inputs, student(**inputs))["soft"])
