from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    default_data_collator,
)

from hfcompress.errors import CheckpointError, CompressionError
from hfcompress.methods.digests import model_digest
from hfcompress.methods.distillation import DistillationConfig, DistillationPart
from hfcompress.methods.teaching import filling
from hfcompress.methods.teaching.cache import META, TeacherCache
from hfcompress.methods.teaching.filling import fill
from hfcompress.methods.teaching.signals import Asked, LiveTeacher, positions, token_mask
from hfcompress.methods.training import EXAMPLE_ID, Rows, plain_model
from tests.methods.teaching.test_examples_of_other_shapes import segmenter
from tests.tiny_models import make
from tests.workshop import sentences, tiny_classifier, tiny_tokenizer

CPU = torch.device("cpu")


def rows(folder: Path, count: int = 40, collate: Any = None, **changes: Any) -> Rows:
    tokenizer = tiny_tokenizer()
    data = [{**tokenizer(row["sentence"]), "labels": row["label"]} for row in sentences(count)]
    values = {
        "dataset": data,
        "collate": collate or DataCollatorWithPadding(tokenizer),
        "batch_size": 8,
        "device": CPU,
        "autocast": nullcontext,
        "folder": folder,
    }
    return Rows(**(values | changes))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfcompress.methods.teaching.cache._SHARD_BYTES", 2048)


def test_it_answers_like_the_teacher(tmp_path: Path, small_shards: None) -> None:
    teacher, asked = tiny_classifier(1), Asked(hidden=(("", 0), ("", 2)))
    data = rows(tmp_path)
    cache = fill(teacher, asked, data, tmp_path)
    assert len(list(cache.folder.glob("*.safetensors"))) > 2
    numbers = [37, 3, 12, 0]
    batch = data.batch(numbers)
    wanted, got = LiveTeacher(teacher, asked).signals(batch, None), cache.signals(batch, None, torch.tensor(numbers))
    assert wanted.logits is not None and got.logits is not None
    torch.testing.assert_close(got.logits, wanted.logits)
    mask = batch["attention_mask"].bool()
    for place in asked.hidden:
        torch.testing.assert_close(got.hidden[place][mask], wanted.hidden[place][mask])


@pytest.mark.parametrize("top_k", [None, 5])
def test_it_keeps_outputs_of_tokens(tmp_path: Path, small_shards: None, top_k: int | None) -> None:
    teacher = make("llama", "CausalLM")
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    data = rows(tmp_path, collate=DataCollatorForLanguageModeling(tokenizer, mlm=False))
    data = Rows(**(vars(data) | {"dataset": [{"input_ids": row["input_ids"]} for row in data.dataset]}))
    cache = fill(teacher, Asked(), data, tmp_path, top_k=top_k, temperature=2.0)
    numbers = [5, 30, 11]
    batch = data.batch(numbers)
    batch["labels"][0, -3:] = -100
    counted = positions(teacher, batch)
    assert counted is not None and 0 < counted.sum() < batch["attention_mask"].sum()
    wanted, got = (
        LiveTeacher(teacher, Asked()).signals(batch, counted),
        cache.signals(batch, counted, torch.tensor(numbers)),
    )
    assert wanted.logits is not None and got.logits is not None
    if top_k is None:
        torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=1e-5)
        return
    values, indices = (wanted.logits / 2).log_softmax(-1).topk(top_k)
    torch.testing.assert_close(got.logits.float(), values, rtol=1e-2, atol=1e-2)
    assert got.indices is not None and torch.equal(got.indices, indices)


@pytest.mark.parametrize("top_k", [None, 5])
def test_blocks_without_padding_are_read_back_in_mixed_precision(tmp_path: Path, top_k: int | None) -> None:
    teacher = make("llama", "CausalLM")
    blocks = torch.randint(5, 50, (6, 12), generator=torch.Generator().manual_seed(0))
    data = rows(
        tmp_path, collate=default_data_collator, dataset=[{"input_ids": block, "labels": block} for block in blocks]
    )
    cache = fill(teacher, Asked(), data, tmp_path, top_k=top_k)
    batch = data.batch([4, 1])
    assert "attention_mask" not in batch
    counted = positions(teacher, batch)
    with torch.autocast("cpu", torch.bfloat16):
        got = cache.signals(batch, counted, torch.tensor([4, 1]))
    wanted = teacher(input_ids=batch["input_ids"]).logits.detach()[:, :-1].flatten(0, 1)
    if top_k:
        values, indices = wanted.log_softmax(-1).topk(top_k)
        assert got.indices is not None and torch.equal(got.indices, indices)
        wanted = values
    torch.testing.assert_close(got.logits, wanted, atol=2e-3, rtol=1e-3)


def test_64_probabilities_take_no_more_than_400_bytes_a_token(tmp_path: Path) -> None:
    teacher = make("llama", "CausalLM", vocab_size=500)
    data = rows(tmp_path, count=200)
    cache = fill(teacher, Asked(), data, tmp_path, top_k=64)
    size = sum(file.stat().st_size for file in cache.folder.iterdir())
    assert size / cache.layout.tokens <= 400


def test_what_was_cut_off_goes_on_and_what_is_damaged_is_made_anew(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, asked, data = tiny_classifier(1), Asked(hidden=(("", 1),)), rows(tmp_path)
    whole = fill(teacher, asked, data, tmp_path / "whole")
    made: list[int] = []
    original = filling._make_shard

    def cut(*args: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(args[4])
        return original(*args)

    monkeypatch.setattr(filling, "_make_shard", cut)
    with pytest.raises(KeyboardInterrupt):
        fill(teacher, asked, data, tmp_path / "cut")
    monkeypatch.setattr(filling, "_make_shard", lambda *args: (made.append(args[4]), original(*args))[1])
    folder = tmp_path / "cut" / whole.folder.name
    (folder / ".shard-00002.safetensors.partial").write_bytes(b"cut off")
    resumed = fill(teacher, asked, data, tmp_path / "cut")
    assert made == list(range(whole.layout.shards)), "no shard was made twice"
    file = folder / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    fill(teacher, asked, data, tmp_path / "cut")
    assert made[-1] == 1
    names = sorted(each.name for each in whole.folder.iterdir())
    assert names == sorted(each.name for each in resumed.folder.iterdir())
    for name in names:
        assert (whole.folder / name).read_bytes() == (folder / name).read_bytes()


def test_a_filled_cache_is_shared_and_another_teacher_or_other_rows_have_their_own(tmp_path: Path) -> None:
    first = fill(tiny_classifier(1), Asked(), rows(tmp_path), tmp_path)
    times = {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    assert fill(tiny_classifier(1), Asked(), rows(tmp_path), tmp_path).folder == first.folder
    assert times == {file: file.stat().st_mtime_ns for file in first.folder.iterdir()}
    changed = tiny_classifier(1)
    with torch.no_grad():
        changed.classifier.bias[0] += 1e-6
    others = [
        fill(changed, Asked(), rows(tmp_path), tmp_path),
        fill(tiny_classifier(1), Asked(), rows(tmp_path, count=39), tmp_path),
        fill(tiny_classifier(1), Asked(hidden=(("", 1),)), rows(tmp_path), tmp_path),
    ]
    assert len({each.folder for each in others} | {first.folder}) == 4
    relabelled = rows(tmp_path)
    for row in relabelled.dataset:
        row["labels"] = 0
    assert fill(tiny_classifier(1), Asked(), relabelled, tmp_path).folder == first.folder


def test_a_stale_cache_is_refused(tmp_path: Path) -> None:
    cache = fill(tiny_classifier(1), Asked(), rows(tmp_path), tmp_path)
    key = json.loads((cache.folder / META).read_text())
    with pytest.raises(CheckpointError, match=r"stale.*another teacher"):
        TeacherCache(cache.folder, key | {"teacher": "another"})
    (cache.folder / META).write_text(json.dumps(key | {"rows": "others"}))
    with pytest.raises(CheckpointError, match=r"stale.*another rows"):
        fill(tiny_classifier(1), Asked(), rows(tmp_path), tmp_path)


def test_a_disk_that_is_too_small_is_told_before_it_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(filling.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    fill(tiny_classifier(1), Asked(), rows(tmp_path), tmp_path)
    with pytest.raises(CompressionError, match=r"40 rows would take .* MB, and .* 0.0 MB free"):
        fill(tiny_classifier(1), Asked(hidden=(("", 1),)), rows(tmp_path), tmp_path)


def test_the_size_is_known_before(tmp_path: Path, small_shards: None) -> None:
    cache = fill(tiny_classifier(1), Asked(hidden=(("", 1),)), rows(tmp_path, count=200), tmp_path)
    size = sum(file.stat().st_size for file in cache.folder.glob("*.safetensors"))
    assert cache.layout.bytes == pytest.approx(size, rel=0.5)  # headers weigh in these tiny shards
    assert cache.layout.bytes < size


def test_rows_that_are_another_batch_each_time_are_refused(tmp_path: Path) -> None:
    collate = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=True, mlm_probability=0.5)
    data = rows(tmp_path, collate=collate)
    data = Rows(**(vars(data) | {"dataset": [{"input_ids": row["input_ids"]} for row in data.dataset]}))
    with pytest.raises(CompressionError, match="another each time"):
        fill(make("bert", "MaskedLM"), Asked(), data, tmp_path)


def test_rows_that_changed_under_it_are_noticed(tmp_path: Path) -> None:
    data = rows(tmp_path)
    cache = fill(tiny_classifier(1), Asked(hidden=(("", 1),)), data, tmp_path)
    batch = data.batch([0, 1])
    batch["attention_mask"][0, 0] = 0
    with pytest.raises(CheckpointError, match="tokens for rows that have"):
        cache.signals(batch, None, torch.tensor([0, 1]))


def translations(folder: Path, family: str) -> Rows:
    """Rows for a decoder, some of which have as many labels as tokens."""
    tokenizer, generator = tiny_tokenizer(), torch.Generator().manual_seed(0)

    def ids(size: int) -> list[int]:
        return torch.randint(5, 16, (size,), generator=generator).tolist()

    data: list[dict[str, Any]] = [{"labels": ids(3 + number % 4)} for number in range(12)]
    for number, row in enumerate(data):
        if family == "whisper":
            row["input_features"] = torch.randn(8, 20, generator=generator).tolist()
        else:
            row["input_ids"] = ids(4 + number % 3)
            row["attention_mask"] = [1] * len(row["input_ids"])
    if family == "whisper":
        return rows(folder, dataset=data, collate=sounds)
    return rows(folder, dataset=data, collate=DataCollatorForSeq2Seq(tokenizer))


def sounds(data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    labels = [torch.tensor(row["labels"]) for row in data]
    return {
        "input_features": torch.tensor([row["input_features"] for row in data]),
        "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
    }


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_it_keeps_hidden_states_of_encoders_and_decoders(family: str, tmp_path: Path, small_shards: None) -> None:
    teacher = make(family, "ConditionalGeneration", seed=1)
    asked = Asked(hidden=(("encoder_", 0), ("encoder_", 2), ("decoder_", 1)))
    data = translations(tmp_path, family)
    cache = fill(teacher, asked, data, tmp_path)
    assert cache.layout.shards > 2 and cache.layout.read != cache.layout.tokens
    for numbers in ([7, 0, 3, 10], [1, 6]):  # in the second both are padded to 5
        batch = data.batch(numbers)
        counted = positions(teacher, batch)
        assert counted is not None and not counted.all()
        wanted, got = (
            LiveTeacher(teacher, asked).signals(batch, counted),
            cache.signals(batch, counted, torch.tensor(numbers)),
        )
        assert wanted.logits is not None and got.logits is not None
        torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=1e-5)
        for place in asked.hidden:
            mask = token_mask(teacher, batch, wanted.hidden[place].shape[:2], place[0])
            assert got.hidden[place].shape == wanted.hidden[place].shape
            torch.testing.assert_close(got.hidden[place][mask], wanted.hidden[place][mask], rtol=1e-4, atol=1e-5)


def test_an_encoder_decoder_learns_from_its_cache_as_from_its_teacher(tmp_path: Path) -> None:
    data, teacher, student = translations(tmp_path, "t5"), make("t5", "ConditionalGeneration", seed=1), make("t5")
    batch = data.batch([4, 1, 11]) | {EXAMPLE_ID: torch.tensor([4, 1, 11])}
    found = []
    for cache in (True, False):
        part = DistillationPart(DistillationConfig(hidden=1.0, embeddings=1.0, cache=cache), teacher)
        part.before_training(student, data)
        part.begin(student, 1, CPU)
        assert (not part.teachers) is cache
        inputs = {name: value for name, value in batch.items() if name != EXAMPLE_ID}
        with torch.no_grad():
            found.append(part.losses(batch, student(**inputs, **part.forward_arguments())))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    whole = make("bart", "SequenceClassification")
    part = DistillationPart(DistillationConfig(hidden=1.0, cache=True), make("bart", "SequenceClassification", seed=1))
    with pytest.raises(CompressionError, match="whole examples"):
        part.before_training(whole, rows(tmp_path))


def test_a_filled_cache_is_read_where_nothing_can_be_written(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(tiny_classifier(1), Asked(), rows(tmp_path), tmp_path).folder
    # Tests may run as root, who can write anywhere: what cannot be a folder cannot hold a lock either.
    read_only = tmp_path / "shared"
    read_only.mkdir()
    shutil.copytree(folder, read_only / folder.name)
    (read_only / f"{folder.name}.lock").mkdir()
    assert fill(tiny_classifier(1), Asked(), rows(tmp_path), read_only).folder == read_only / folder.name


def test_what_has_no_place_for_each_row_is_not_cached(tmp_path: Path) -> None:
    blocks = rows(tmp_path, dataset=[{"input_ids": [5, 6, 7]}] * 8, collate=DataCollatorWithFlattening())
    with pytest.raises(CompressionError, match="the collator makes 1 of 8 rows"):
        fill(make("llama", "CausalLM"), Asked(), blocks, tmp_path)
    images = rows(tmp_path, dataset=[{"pixel_values": torch.randn(3, 16, 16)}] * 2, collate=default_data_collator)
    with pytest.raises(CompressionError, match="each pixel is not cached"):
        fill(segmenter(0), Asked(), images, tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_another_adapter_of_the_same_teacher_has_a_cache_of_its_own(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is an extra")
    settings = {"r": 2, "target_modules": ["query"], "init_lora_weights": False}
    teacher: Any = peft.get_peft_model(tiny_classifier(1), peft.LoraConfig(**settings)).eval()
    teacher.add_adapter("other", peft.LoraConfig(**settings))
    keys = {model_digest(tiny_classifier(1))}
    for name in ("default", "other"):
        teacher.set_adapter(name)
        keys.add(model_digest(plain_model(teacher)))
    for module in teacher.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("other", 3.0)
    assert len(keys | {model_digest(plain_model(teacher))}) == 4
