from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from hfcompress import DistillationConfig, DistillationTrainer
from hfcompress.errors import CompressionError
from hfcompress.methods.distillation import DistillationPart, OtherTokens
from hfcompress.methods.teaching.other_tokens import Span, align
from hfcompress.methods.training import EXAMPLE_ID, Rows
from tests.tiny_models import make
from tests.workshop import SPECIAL, sentences, tiny_classifier, tiny_tokenizer

CPU = torch.device("cpu")
TEXTS = [row["sentence"] for row in sentences(24)]


def letters_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """Cuts texts into letters, two special tokens before them and one after."""
    vocabulary = {each: index for index, each in enumerate([*SPECIAL, *"abcdefghijklmnopqrstuvwxyz"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] [MASK] $A [SEP]",
        pair="[CLS] [MASK] $A [SEP] $B [SEP]",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[MASK]", "[SEP]")],
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names, **changes)


def teacher_of_letters(cls: type = BertForSequenceClassification) -> Any:
    torch.manual_seed(3)
    labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    return cls(BertConfig(vocab_size=40, max_position_embeddings=128, **sizes, **labels)).eval()


def rows(texts: list[Any], folder: Path, **columns: list[Any]) -> Rows:
    tokenizer = tiny_tokenizer()
    words = isinstance(texts[0], list)
    data = [dict(tokenizer(each, is_split_into_words=words)) for each in texts]
    for name, values in (columns or {"labels": [row["label"] for row in sentences(len(texts))]}).items():
        data = [{**row, name: value} for row, value in zip(data, values, strict=True)]
    collate = DataCollatorWithPadding(tokenizer)
    return Rows(dataset=data, collate=collate, batch_size=8, device=CPU, autocast=nullcontext, folder=folder)


def ready(part: DistillationPart, student: Any, data: Rows) -> DistillationPart:
    part.before_training(student, data)
    part.begin(student, 1, CPU)
    return part


# Which token stands for which


@given(st.lists(st.integers(1, 4), max_size=12), st.lists(st.integers(1, 4), max_size=12))
@settings(deadline=None)
def test_a_token_is_where_the_last_character_is(ours: list[int], theirs: list[int]) -> None:
    def cut(lengths: list[int]) -> list[Span]:
        ends = [sum(lengths[: place + 1]) for place in range(len(lengths))]
        return [Span(0, None, end - length, end) for end, length in zip(ends, lengths, strict=True)]

    found = align(cut(ours), cut(theirs))
    for span, number in zip(cut(ours), found, strict=True):
        holding = [place for place, other in enumerate(cut(theirs)) if other.start < span.end <= other.end]
        assert holding == ([number] if number >= 0 else [])


def test_special_tokens_and_other_texts_of_a_pair_stand_for_nothing() -> None:
    ours = [
        Span(None, None, 0, 0),
        Span(0, None, 0, 4),
        Span(None, None, 0, 0),
        Span(1, None, 0, 4),
        Span(1, None, 2, 2),
    ]
    assert align(ours, [Span(None, None, 0, 9), Span(0, None, 0, 4)]) == [-1, 1, -1, -1, -1]
    assert align([Span(0, 1, 0, 3)], [Span(0, 0, 0, 3), Span(0, 1, 0, 2), Span(0, 1, 2, 3)]) == [2]


def test_words_take_their_last_letter() -> None:
    tokens = OtherTokens(["a film", "the plot was bad"], tiny_tokenizer(), letters_tokenizer())
    encoded = [tiny_tokenizer()(tokens.texts, padding=True), letters_tokenizer()(tokens.texts, padding=True)]
    ours, theirs = (torch.tensor(each["attention_mask"]).bool() for each in encoded)
    # [CLS] [MASK] a f i l m [SEP]; [CLS] [MASK] t h e p l o t w a s b a d [SEP]
    wanted = [[-1, 2, 6, -1, -1, -1], [-1, 4, 8, 11, 14, -1]]
    assert tokens.alignment([0, 1], ours, theirs).tolist() == wanted


# What is compared


@pytest.mark.parametrize("cache", [False, True])
def test_outputs_about_examples_are_those_of_the_teachers_own_reading(cache: bool, tmp_path: Path) -> None:
    student, teacher, data = tiny_classifier(0), teacher_of_letters(), rows(TEXTS, tmp_path)
    tokens = OtherTokens(TEXTS, tiny_tokenizer(), letters_tokenizer())
    part = ready(DistillationPart(DistillationConfig(cache=cache), teacher, tokens=tokens), student, data)
    assert part.numbered
    numbers = [7, 0, 19]
    batch = data.batch(numbers)
    with torch.no_grad():
        outputs = student(**batch)
        read = letters_tokenizer()([TEXTS[number] for number in numbers], padding=True, return_tensors="pt")
        said = teacher(**read).logits
    soft = part.losses({**batch, EXAMPLE_ID: torch.tensor(numbers)}, outputs)["soft"]
    divergence = torch.nn.functional.kl_div(
        (outputs.logits / 2).log_softmax(-1), (said / 2).softmax(-1), reduction="batchmean"
    )
    torch.testing.assert_close(soft, 0.5 * 4 * divergence)


@pytest.mark.parametrize("cache", [False, True])
def test_hidden_states_are_compared_word_by_word(cache: bool, tmp_path: Path) -> None:
    student, teacher, data = tiny_classifier(0), teacher_of_letters(), rows(TEXTS, tmp_path)
    tokens = OtherTokens(TEXTS, tiny_tokenizer(), letters_tokenizer())
    config = DistillationConfig(soft=0, hard=0, hidden=1, layers=((2, 1),), cache=cache)
    part = ready(DistillationPart(config, teacher, tokens=tokens), student, data)
    numbers = [5, 11]
    batch = data.batch(numbers)
    with torch.no_grad():
        outputs = student(**batch, output_hidden_states=True)
        per_example = []
        for row, number in enumerate(numbers):
            text = TEXTS[number]
            theirs = teacher(**letters_tokenizer()(text, return_tensors="pt"), output_hidden_states=True)
            ends = torch.tensor([len(word) for word in text.split()]).cumsum(0) + 1  # after [CLS] and [MASK]
            ours = outputs.hidden_states[2][row, 1 : len(ends) + 1]
            per_example.append((ours - theirs.hidden_states[1][0, ends]).square().mean())
    losses = part.losses({**batch, EXAMPLE_ID: torch.tensor(numbers)}, outputs)
    torch.testing.assert_close(losses["hidden"], torch.stack(per_example).mean())


def test_relations_are_compared_over_the_words(tmp_path: Path) -> None:
    student, data = tiny_classifier(0), rows(TEXTS, tmp_path)
    config = DistillationConfig(soft=0, hard=0, relations=1)
    # A teacher whose embedding of a word's last letter depends on that alone would need no letters: here the
    # student itself teaches, and reads the same words, so that nothing is left to learn.
    tokens = OtherTokens(TEXTS, tiny_tokenizer(), tiny_tokenizer())
    part = ready(DistillationPart(config, tiny_classifier(0), tokens=tokens), student, data)
    batch = data.batch([2, 3])
    student(**batch)
    losses = part.losses({**batch, EXAMPLE_ID: torch.tensor([2, 3])}, student(**batch))
    assert losses["relations"].item() == pytest.approx(0, abs=1e-6)
    other = ready(DistillationPart(config, teacher_of_letters(), tokens=letters(TEXTS)), student, data)
    assert other.losses({**batch, EXAMPLE_ID: torch.tensor([2, 3])}, student(**batch))["relations"] > 0


def letters(texts: list[Any]) -> OtherTokens:
    return OtherTokens(texts, tiny_tokenizer(), letters_tokenizer())


@pytest.mark.parametrize("cache", [False, True])
def test_outputs_about_words_are_matched_by_word(cache: bool, tmp_path: Path) -> None:
    words = [text.split() for text in TEXTS]
    labels = [[-100, *(len(word) % 2 for word in each), -100] for each in words]
    torch.manual_seed(0)
    form = {"vocab_size": 19, "max_position_embeddings": 32, "hidden_size": 32, "num_attention_heads": 2}
    names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    student = BertForTokenClassification(BertConfig(**form, **names, num_hidden_layers=1, intermediate_size=32)).eval()
    teacher = teacher_of_letters(BertForTokenClassification)
    data = rows(words, tmp_path, labels=labels)
    part = DistillationPart(DistillationConfig(cache=cache), teacher, tokens=letters(words))
    ready(part, student, data)
    batch = data.batch([4]) | {EXAMPLE_ID: torch.tensor([4])}
    with torch.no_grad():
        outputs = student(**{name: value for name, value in batch.items() if name != EXAMPLE_ID})
        read = letters_tokenizer()(words[4], is_split_into_words=True, return_tensors="pt")
        ends = torch.tensor([len(word) for word in words[4]]).cumsum(0) + 1
        said, own = teacher(**read).logits[0, ends], outputs.logits[0, 1:-1]
    divergence = torch.nn.functional.kl_div((own / 2).log_softmax(-1), (said / 2).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(part.losses(batch, outputs)["soft"], 0.5 * 4 * divergence)


def test_a_student_learns_from_a_teacher_of_letters(tmp_path: Path) -> None:
    student, teacher, data = tiny_classifier(0), teacher_of_letters(), rows(TEXTS, tmp_path)
    with torch.no_grad():
        teacher.classifier.weight.mul_(200)  # random teachers say next to nothing

    def agreement() -> float:
        with torch.no_grad():
            own = student.eval()(**data.batch(range(24))).logits
            said = teacher(**letters_tokenizer()(TEXTS, padding=True, return_tensors="pt")).logits
        return torch.nn.functional.cross_entropy(own, said.softmax(-1)).item()

    before = agreement()
    config = DistillationConfig(soft=1, hard=0, temperature=1, hidden=0.1)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=30, learning_rate=3e-3, per_device_train_batch_size=8, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    told = {"teacher": teacher, "teacher_tokens": letters(TEXTS), "distillation": config}
    DistillationTrainer(student, arguments, train_dataset=data.dataset, data_collator=data.collate, **told).train()
    assert agreement() < before - 0.02


# What is refused


def test_what_tokens_cannot_say_is_refused(tmp_path: Path) -> None:
    student, data = tiny_classifier(0), rows(TEXTS, tmp_path)
    attentive = DistillationPart(DistillationConfig(attention=1), teacher_of_letters(), tokens=letters(TEXTS))
    with pytest.raises(CompressionError, match="Use relations"):
        attentive.before_training(student, data)
    speaker = DistillationPart(DistillationConfig(), make("bert", "MaskedLM"), tokens=letters(TEXTS))
    with pytest.raises(CompressionError, match="vocabularies"):
        speaker.before_training(make("bert", "MaskedLM"), data)
    decoder = DistillationPart(DistillationConfig(), make("t5", "SequenceClassification"), tokens=letters(TEXTS))
    with pytest.raises(CompressionError, match="decoder"):
        decoder.before_training(make("t5", "SequenceClassification"), data)
    few = DistillationPart(DistillationConfig(), teacher_of_letters(), tokens=letters(TEXTS[:3]))
    with pytest.raises(CompressionError, match="3 texts for 24"):
        ready(few, student, data)
    without = DistillationPart(DistillationConfig(), teacher_of_letters())
    with pytest.raises(CompressionError, match="OtherTokens"):
        without.before_training(student, data)


def test_texts_that_are_not_the_rows_are_found_out(tmp_path: Path) -> None:
    student, data = tiny_classifier(0), rows(TEXTS, tmp_path)
    config = DistillationConfig(hidden=1)
    part = ready(DistillationPart(config, teacher_of_letters(), tokens=letters(TEXTS[::-1])), student, data)
    batch = data.batch([0, 1, 2, 3])
    outputs = student(**batch, output_hidden_states=True)
    with pytest.raises(CompressionError, match="its text gives"):
        part.losses({**batch, EXAMPLE_ID: torch.arange(4)}, outputs)


def test_texts_that_are_too_long_for_a_teacher_are_refused(tmp_path: Path) -> None:
    texts = ["good film", "very " * 40]
    tokens = OtherTokens(texts, tiny_tokenizer(), letters_tokenizer())
    teacher = make("roberta", "SequenceClassification", max_position_embeddings=100)
    tokens.require_room(teacher_of_letters())  # 128 positions for at most 128 tokens
    with pytest.raises(CompressionError, match=r"a text has 128 .* has 98 positions"):
        tokens.require_room(teacher)  # its first two positions are never used
    tokens.require_room(make("llama", "SequenceClassification", max_position_embeddings=16))
    OtherTokens(texts[:1], tiny_tokenizer(), letters_tokenizer()).require_room(teacher)


def test_a_tokenizer_that_cannot_pad_is_refused() -> None:
    unpadded = letters_tokenizer()
    unpadded.pad_token = None
    with pytest.raises(CompressionError, match="no token to pad"):
        OtherTokens(TEXTS, tiny_tokenizer(), unpadded)
