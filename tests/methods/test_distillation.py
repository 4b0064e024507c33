from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    TrainerCallback,
    TrainingArguments,
)

from hfcompress import DistillationConfig, DistillationTrainer
from hfcompress.errors import CompressionError, ConfigError, DataError
from hfcompress.methods.distillation import DistillationPart, soft_label_loss
from hfcompress.methods.teaching.losses import attention_divergence, forward_kl, multi_label
from hfcompress.modeling.anatomy import attention_blocks
from hfcompress.modeling.surgery import remove_block
from tests.tiny_models import make
from tests.workshop import batches, logits, sentences, tiny_classifier, tiny_tokenizer

CPU = torch.device("cpu")


def test_the_soft_loss_is_the_divergence_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    wanted = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = torch.softmax(torch.tensor(t) / 3, 0), torch.softmax(torch.tensor(s) / 3, 0)
        wanted += sum(float(a) * (float(a.log()) - float(b.log())) for a, b in zip(p, q, strict=True))
    assert soft_label_loss(student, teacher, 3.0).item() == pytest.approx(9 * wanted / 5, rel=1e-5)
    assert soft_label_loss(student, student, 3.0).item() == pytest.approx(0, abs=1e-6)


def test_the_temperature_does_not_change_the_size_of_the_gradient_much() -> None:
    teacher = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)) * 0.1
    norms = []
    for temperature in (1.0, 10.0):
        student = torch.zeros(64, 4, requires_grad=True)
        soft_label_loss(student, teacher, temperature).backward()
        assert student.grad is not None
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_labels_are_matched_by_name_and_never_by_position() -> None:
    student, teacher, batch = tiny_classifier(0), tiny_classifier(1), batches(1)[0]
    with torch.no_grad():
        outputs = student(**batch)
    part = DistillationPart(DistillationConfig(), teacher)
    part.begin(student, 1, CPU)
    straight = part.losses(batch, outputs)["soft"]
    swapped = tiny_classifier(1, id2label={0: "positive", 1: "negative"}, label2id={"positive": 0, "negative": 1})
    with torch.no_grad():
        swapped.classifier.weight.copy_(teacher.classifier.weight.flip(0))
        swapped.classifier.bias.copy_(teacher.classifier.bias.flip(0))
    part = DistillationPart(DistillationConfig(), swapped)
    part.begin(student, 1, CPU)
    torch.testing.assert_close(part.losses(batch, outputs)["soft"], straight)


def test_the_teacher_is_frozen_and_in_evaluation_mode() -> None:
    teacher = tiny_classifier(1).train()
    DistillationPart(DistillationConfig(), teacher)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}, "labels"),
        ({"vocab_size": 40}, "vocabulary"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_training(changes: dict, says: str) -> None:
    part = DistillationPart(DistillationConfig(), tiny_classifier(1, **changes))
    with pytest.raises(CompressionError, match=says):
        part.begin(tiny_classifier(), 1, CPU)


def test_rows_that_one_tokenizer_never_uses_are_cut() -> None:
    teacher, batch = tiny_classifier(1), batches(1)[0]
    used = teacher.config.vocab_size
    teacher.resize_token_embeddings(used + 8)
    part = DistillationPart(DistillationConfig(), teacher)
    with pytest.raises(CompressionError, match=r"cut the rows it never uses: teacher\.resize_token_embeddings"):
        part.begin(tiny_classifier(), 1, CPU)
    wanted = logits(teacher, batch)
    teacher.resize_token_embeddings(used)
    assert torch.equal(logits(teacher, batch), wanted)
    part.begin(tiny_classifier(), 1, CPU)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"temperature": 0}, "temperature"),
        ({"soft": 0, "hard": 0}, "nothing to learn from"),
        ({"soft": -1}, "soft"),
        ({"alpha": 0.5}, "alpha"),
        ({"stage": 0.5}, "nothing to learn first"),
        ({"stage": 0.5, "hidden": 1, "soft": 0, "hard": 0}, "nothing to learn after"),
        ({"cache": True, "relations": 1}, "not cached"),
        ({"cache_top_k": 5}, "cache_top_k needs"),
        ({"cache": True, "cache_top_k": 5, "soft_loss": "mse"}, "cache_top_k needs"),
        ({"teacher_weights": (0.0, 0.0)}, "teacher_weights"),
        ({"layers": "middle"}, "layers"),
        ({"soft_loss": "kl"}, "soft_loss"),
    ],
)
def test_bad_fields_are_refused(values: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DistillationConfig(**values)


# In training

WIDE = {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 4}
BETWEEN = {"hidden": 1.0, "embeddings": 0.5, "relations": 1.0, "relation_heads": 2}


def rows(count: int = 64) -> list[dict[str, Any]]:
    tokenizer = tiny_tokenizer()
    return [{**tokenizer(row["sentence"]), "labels": row["label"]} for row in sentences(count)]


def train(folder: Path, student: Any = None, *, resume: bool = False, **changes: Any) -> DistillationTrainer:
    own = {
        "teacher": tiny_classifier(9),
        "distillation": DistillationConfig(),
        "train_dataset": rows(),
        "data_collator": DataCollatorWithPadding(tiny_tokenizer()),
        "callbacks": None,
        "cache_dir": None,
    }
    own |= {name: changes.pop(name) for name in list(changes) if name in own}
    values: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
    }
    student = student or tiny_classifier(0, hidden_dropout_prob=0.1)
    trainer = DistillationTrainer(student, TrainingArguments(str(folder), **(values | changes)), **own)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer: DistillationTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class Cut(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "values",
    [BETWEEN, BETWEEN | {"stage": 0.5}, {"hidden": 1.0, "cache": True}],
    ids=["projections", "stages", "cache"],
)
def test_cut_off_and_resumed_is_uninterrupted(tmp_path: Path, values: dict) -> None:
    own = {"distillation": DistillationConfig(**values)}
    whole = train(tmp_path / "whole", teacher=tiny_classifier(9, **WIDE), **own)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", teacher=tiny_classifier(9, **WIDE), callbacks=[Cut()], **own)
    resumed = train(tmp_path / "cut", teacher=tiny_classifier(9, **WIDE), resume=True, **own)
    assert same(weights(whole), weights(resumed))
    assert whole.model.state_dict().keys() == tiny_classifier().state_dict().keys(), "projections are not saved"
    for one, other in zip(whole.parts[0].parameters(), resumed.parts[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_projections_are_trained_with_the_student(tmp_path: Path) -> None:
    config = DistillationConfig(hidden=1.0, embeddings=1.0)
    one, five = (
        train(tmp_path / str(n), teacher=tiny_classifier(9, **WIDE), distillation=config, max_steps=n) for n in (1, 5)
    )
    before, after = (list(each.parts[0].parameters()) for each in (one, five))
    assert len(before) == 2 * 3 and not any(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert five.findings[0]["distillation"]["layers"] == {"hidden": [[1, 2], [2, 4], [0, 0]]}
    losses = [entry["loss_hidden"] for entry in five.state.log_history if "loss_hidden" in entry]
    assert losses[-1] < losses[0]


def test_all_terms_are_learnt_together_or_in_stages(tmp_path: Path) -> None:
    teacher = {"num_hidden_layers": 4}
    config = DistillationConfig(**BETWEEN, attention=1.0, layers="last")
    together = train(tmp_path / "1", teacher=tiny_classifier(9, **teacher), distillation=config)
    terms = {"labels", "soft", "hidden", "embeddings", "attention", "relations"}
    assert terms <= {name.removeprefix("loss_") for name in together.state.log_history[0]}
    assert together.model.config._attn_implementation == tiny_classifier().config._attn_implementation
    config = DistillationConfig(**BETWEEN, attention=1.0, stage=0.5)
    staged = train(tmp_path / "2", teacher=tiny_classifier(9, **teacher), distillation=config)
    logs = [entry for entry in staged.state.log_history if "loss" in entry]
    for number, entry in enumerate(logs):
        assert ("loss_hidden" in entry and entry["loss_labels"] == 0) == (number < 3)
        assert ("loss_soft" in entry and entry["loss_labels"] > 0) == (number >= 3)


def token_rows(count: int = 16) -> list[dict[str, Any]]:
    made = rows(count)
    for number, row in enumerate(made):
        row["labels"] = [-100 if place % 3 == number % 3 else place % 2 for place, _ in enumerate(row["input_ids"])]
    return made


def tagger(seed: int, **changes: Any) -> Any:
    return make(
        "bert", "TokenClassification", seed=seed, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changes
    )


def language_model(seed: int, **changes: Any) -> Any:
    return make("llama", "CausalLM", seed=seed, **changes)


def translator(seed: int, **changes: Any) -> Any:
    return make("bart", "ConditionalGeneration", seed=seed, dropout=0.0, **changes)


def text_rows(count: int = 16) -> list[dict[str, Any]]:
    made = rows(count)
    return [row | {"labels": row["input_ids"][: 2 + number % 5]} for number, row in enumerate(made)]


KINDS = {
    "examples": (lambda seed: tiny_classifier(seed), rows, DataCollatorWithPadding),
    "tokens": (tagger, token_rows, DataCollatorForTokenClassification),
    "causal": (language_model, token_rows, DataCollatorForTokenClassification),
    "seq2seq": (translator, text_rows, DataCollatorForSeq2Seq),
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["examples", "causal", "seq2seq"])
def test_activation_checkpointing_changes_nothing(tmp_path: Path, kind: str) -> None:
    build, data, collator = KINDS[kind]
    results = []
    for checkpointing in (False, True):
        trainer = train(
            tmp_path / str(checkpointing),
            build(0),
            teacher=build(9),
            distillation=DistillationConfig(hidden=1.0, embeddings=1.0, attention=1.0, relations=1.0, relation_heads=2),
            train_dataset=data(16),
            data_collator=collator(tiny_tokenizer()),
            max_steps=2,
            save_strategy="no",
            activation_checkpointing=checkpointing,
        )
        assert trainer.model.is_gradient_checkpointing is checkpointing
        results.append((trainer.state.log_history, weights(trainer)))
    (plain_log, plain), (log, found) = results
    assert [entry["loss"] for entry in log[:2]] == [entry["loss"] for entry in plain_log[:2]]
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, found[name])


@pytest.mark.parametrize("kind", KINDS)
def test_accumulating_four_times_four_is_one_batch_of_sixteen(tmp_path: Path, kind: str) -> None:
    build, data, collator = KINDS[kind]
    results = []
    for size, steps in ((16, 1), (4, 4)):
        trainer = train(
            tmp_path / str(size),
            build(0),
            teacher=build(9),
            distillation=DistillationConfig(hidden=1.0, embeddings=1.0, attention=1.0),
            train_dataset=data(16),
            data_collator=collator(tiny_tokenizer()),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=3,
            save_strategy="no",
            train_sampling_strategy="sequential",
            optim="sgd",
            max_grad_norm=0.0,
        )
        results.append((trainer.state.log_history, weights(trainer)))
    (one_log, one), (four_log, four) = results
    assert [entry["loss"] for entry in one_log[:3]] == pytest.approx([e["loss"] for e in four_log[:3]], rel=1e-4)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, four[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_teacher_teaches_the_same(tmp_path: Path, kind: str) -> None:
    build, data, collator = KINDS[kind]
    between = {} if kind == "seq2seq" else {"hidden": 1.0, "hidden_loss": "cosine"}
    results = [
        train(
            tmp_path / str(cache),
            build(0),
            teacher=build(9),
            distillation=DistillationConfig(cache=cache, **between),
            train_dataset=data(32),
            data_collator=collator(tiny_tokenizer()),
            save_strategy="no",
            optim="sgd",
        )
        for cache in (False, True)
    ]
    (live, cached) = (weights(each) for each in results)
    for name, tensor in live.items():
        torch.testing.assert_close(tensor, cached[name], rtol=1e-5, atol=1e-6)
    untaught = train(
        tmp_path / "alone",
        build(0),
        teacher=build(9),
        distillation=DistillationConfig(soft=0),
        train_dataset=data(32),
        data_collator=collator(tiny_tokenizer()),
        save_strategy="no",
        optim="sgd",
    )
    assert not all(torch.allclose(tensor, cached[name], atol=1e-5) for name, tensor in weights(untaught).items())


def test_with_a_cache_no_teacher_is_in_memory(tmp_path: Path) -> None:
    teacher = tiny_classifier(9)
    gone = weakref.ref(teacher)
    seen: list[bool] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gc.collect()
            seen.append(gone() is None)

    config = DistillationConfig(cache=True)
    part = DistillationPart(config, teacher, tmp_path / "cache")
    del teacher
    from hfcompress.methods.trainer import CompressionTrainer

    trainer = CompressionTrainer(
        tiny_classifier(0),
        TrainingArguments(str(tmp_path / "run"), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True),
        parts=[part],
        train_dataset=rows(),
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
        callbacks=[Look()],
    )
    trainer.train()
    assert seen == [True, True]


def test_a_data_set_of_datasets_is_numbered_too(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list(rows())
    own = {"distillation": DistillationConfig(cache=True), "cache_dir": tmp_path / "cache"}
    listed = train(tmp_path / "1", **own)
    stored = train(tmp_path / "2", train_dataset=data, train_sampling_strategy="group_by_length", **own)
    assert len(list((tmp_path / "cache").glob("*/teacher_cache.json"))) == 1, "the same rows share a cache"
    assert listed.state.global_step == stored.state.global_step


def test_several_teachers_count_as_they_are_weighed() -> None:
    student, batch = tiny_classifier(0), batches(1)[0]
    with torch.no_grad():
        outputs = student(**batch)

    def loss(teacher: Any, **values: Any) -> float:
        part = DistillationPart(DistillationConfig(soft=1.0, **values), teacher)
        part.begin(student, 1, CPU)
        return part.losses(batch, outputs)["soft"].item()

    one, other = loss(tiny_classifier(1)), loss(tiny_classifier(2))
    both = (tiny_classifier(1), tiny_classifier(2))
    assert loss(both) == pytest.approx((one + other) / 2)
    assert loss(both, teacher_weights=(3.0, 1.0)) == pytest.approx(0.75 * one + 0.25 * other)
    with pytest.raises(CompressionError, match="3 entries for 2 teachers"):
        loss(both, teacher_weights=(1.0, 1.0, 1.0))


def test_a_quantized_teacher_teaches() -> None:
    from hfcompress import QuantizationConfig, compress

    student, teacher, batch = tiny_classifier(0), tiny_classifier(1), batches(1)[0]
    with torch.no_grad():
        outputs = student(**batch)
    compress(teacher, [QuantizationConfig(weights="int8", embeddings="int8")])
    part = DistillationPart(DistillationConfig(soft=1.0, hidden=1.0), teacher)
    part.begin(student, 1, CPU)
    with torch.no_grad():
        outputs = student(**batch, output_hidden_states=True)
        wanted = forward_kl(outputs.logits, teacher(**batch).logits, 2.0).mean()
    torch.testing.assert_close(part.losses(batch, outputs)["soft"], wanted)


def test_regression_and_several_labels_have_losses_of_their_own() -> None:
    batch = batches(1)[0]
    kinds: list[tuple[dict[str, Any], torch.Tensor]] = [
        ({"id2label": {0: "score"}, "label2id": {"score": 0}}, torch.rand(8)),
        ({"problem_type": "multi_label_classification"}, torch.rand(8, 2).round()),
    ]
    for changes, labels in kinds:
        student, teacher = tiny_classifier(0, **changes), tiny_classifier(1, **changes)
        part = DistillationPart(DistillationConfig(soft=1.0), teacher)
        part.begin(student, 1, CPU)
        with torch.no_grad():
            outputs, theirs = student(**batch | {"labels": labels}), teacher(**batch | {"labels": labels}).logits
        loss = part.losses(batch | {"labels": labels}, outputs)["soft"]
        regression = labels.dim() == 1
        wanted = (
            (outputs.logits - theirs).square().mean() if regression else multi_label(outputs.logits, theirs, 2.0).mean()
        )
        torch.testing.assert_close(loss, wanted)


def test_rows_without_labels_are_learnt_from_the_teacher(tmp_path: Path) -> None:
    bare = [{name: value for name, value in row.items() if name != "labels"} for row in rows(32)]
    alone = train(tmp_path / "1", distillation=DistillationConfig(hard=0), train_dataset=bare, save_strategy="no")
    some = rows(32)
    for row in some[4:]:
        row["labels"] = -100
    mixed = train(tmp_path / "2", train_dataset=some, train_sampling_strategy="sequential", save_strategy="no")
    for trainer in (alone, mixed):
        assert all(entry["loss_soft"] > 0 for entry in trainer.state.log_history if "loss" in entry)
        assert not same(weights(trainer), tiny_classifier(0).state_dict())
    with pytest.raises(DataError, match="labels"):
        train(tmp_path / "3", train_dataset=bare)


@pytest.mark.parametrize(
    ("values", "teacher", "says"),
    [
        ({"attention": 1.0}, WIDE, "heads"),
        ({"relations": 1.0, "relation_heads": 5}, {}, "divides all"),
        ({"relations": 1.0, "relation_layers": (3, 1)}, {}, "layers 1 to 2"),
        ({"hidden": 1.0, "layers": ((1, 9),)}, {}, "no pair"),
        ({"hidden": 1.0}, {"num_hidden_layers": 1}, "cannot pair"),
    ],
)
def test_layers_that_cannot_be_compared_are_refused_before_training(values: dict, teacher: dict, says: str) -> None:
    part = DistillationPart(DistillationConfig(**values), tiny_classifier(1, **teacher))
    with pytest.raises(CompressionError, match=says):
        part.before_training(tiny_classifier(), None)


@pytest.mark.parametrize(
    ("family", "head"), [("gpt2", "LMHeadModel"), ("modernbert", None), ("vit", None), ("t5", None)]
)
def test_families_are_compared_layer_by_layer(family: str, head: str | None) -> None:
    from tests.tiny_models import FAMILIES, inputs_for

    head = head or ("ConditionalGeneration" if family == "t5" else FAMILIES[family].heads[1])
    inputs = inputs_for(family, head)
    config = DistillationConfig(hidden=1.0, embeddings=1.0, attention=1.0, relations=1.0)
    part = DistillationPart(config, make(family, head, seed=1))
    if family == "t5":
        inputs |= {"labels": inputs.pop("decoder_input_ids")}
    for seed in (0, 1):
        student = make(family, head, seed=seed, attention="sdpa" if family != "t5" else "eager")
        part.begin(student, 1, CPU)
        with torch.no_grad():
            outputs = student(**inputs, **part.forward_arguments())
        terms = part.losses(inputs, outputs)
        part.end(student)
        assert terms.keys() == {"soft", "hidden", "embeddings", "attention", "relations"}
        for name, value in terms.items():
            assert (value > 1e-4) if seed == 0 else (abs(value) < 1e-4), name


@pytest.mark.parametrize("family", ["bert", "mpnet", "distilbert", "vit"])
def test_layers_that_lost_their_attention_have_no_maps_and_no_relations(family: str) -> None:
    from tests.tiny_models import FAMILIES, inputs_for

    head = FAMILIES[family].heads[1]
    inputs, size = inputs_for(family, head), {"n_layers" if family == "distilbert" else "num_hidden_layers": 4}
    student, teacher = make(family, head, **size), make(family, head, seed=1, **size)
    for model, numbers in ((student, (2, 4)), (teacher, (3,))):
        for block in [attention_blocks(model)[number - 1] for number in numbers]:
            remove_block(block)
    part = DistillationPart(DistillationConfig(attention=1.0, relations=1.0), teacher)
    part.begin(student, 1, CPU)
    with torch.no_grad():
        outputs = student(**inputs, **part.forward_arguments())
        said = teacher(**inputs, output_attentions=True).attentions
    found = part.losses(inputs, outputs)
    assert part.end(student)["distillation"]["layers"] == {"attention": [[1, 1]], "relations": [[3, 4]]}
    tokens = outputs.attentions[0].shape[2]
    mask = inputs.get("attention_mask", torch.ones(len(said[0]), tokens)).bool()
    torch.testing.assert_close(found["attention"], attention_divergence(outputs.attentions[0], said[0], mask).mean())
    pair = DistillationPart(DistillationConfig(attention=1.0, layers=((3, 4),)), teacher)
    pair.begin(student, 1, CPU)
    maps, others = ([each for each in maps if each is not None] for maps in (outputs.attentions, said))
    assert len(maps) == 2 and len(others) == 3
    torch.testing.assert_close(
        pair.losses(inputs, outputs)["attention"], attention_divergence(maps[1], others[2], mask).mean()
    )
    for values, says in (
        ({"attention": 1.0, "layers": ((1, 1), (1, 3))}, "layer of the teacher has lost"),
        ({"attention": 1.0, "layers": "last", "hidden": 1.0}, None),
        ({"attention": 1.0, "layers": ((0, 0),)}, "no layer of the student"),
        ({"relations": 1.0, "relation_layers": (2, 4)}, "Layers with attention: 1, 3"),
    ):
        with pytest.raises(CompressionError, match=says) if says else nullcontext():
            DistillationPart(DistillationConfig(**values), teacher).before_training(student, None)


def question_answerer(seed: int) -> Any:
    torch.manual_seed(seed)
    return make("bert", "QuestionAnswering")


def test_starts_and_ends_of_answers_are_learnt_over_the_real_tokens(tmp_path: Path) -> None:
    student, teacher = question_answerer(0), question_answerer(1)
    batch = {
        "input_ids": torch.randint(5, 20, (2, 7), generator=torch.Generator().manual_seed(0)),
        "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "start_positions": torch.tensor([1, 2]),
        "end_positions": torch.tensor([3, 2]),
    }
    with torch.no_grad():
        outputs, said = (model(**batch) for model in (student, teacher))
    wanted = []
    for name in ("start_logits", "end_logits"):
        for row, tokens in enumerate((7, 4)):
            own, other = (getattr(each, name)[row, :tokens] / 2 for each in (outputs, said))
            wanted.append(torch.nn.functional.kl_div(own.log_softmax(-1), other.softmax(-1), reduction="sum"))
    part = DistillationPart(DistillationConfig(soft=1, hard=0), teacher)
    part.begin(student, 1, CPU)
    torch.testing.assert_close(part.losses(batch, outputs)["soft"], 4 * torch.stack(wanted).mean())
    with pytest.raises(CompressionError, match="cache: false"):
        DistillationPart(DistillationConfig(cache=True), teacher).before_training(student, None)
