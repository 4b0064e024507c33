"""A recipe whose steps learn from another model, which reads texts in another way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from hfcompress import pipeline
from hfcompress.errors import DataError, RecipeError
from hfcompress.recipe import load_recipe
from hfcompress.tasks import get_task, kind_of
from tests.methods.teaching.test_other_tokens import letters_tokenizer
from tests.workshop import SPECIAL, WORDS, save_data, save_model, tiny_tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
LABELS = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
RECIPE = """
name: taught
model: {place}/student
teacher: {place}/teacher
task: sst2
data: {place}/data
max_length: 32
evaluation: {{speed_batch_size: 2, speed_sequence_length: 8, speed_repeats: 3, grid_batch_sizes: [], curve_points: 0}}
steps:
  - name: learn
    distillation: {{soft: 1.0, hard: 0.0, hidden: 0.1, cache: true}}
    training: {{epochs: 1, learning_rate: 1e-3, batch_size: 16, precision: fp32}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student without a head, and a teacher of letters with one."""
    folder = tmp_path_factory.mktemp("taught")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(SPECIAL + WORDS) + 2, **SIZES)).save_pretrained(folder / "student")
    tiny_tokenizer().save_pretrained(folder / "student")
    teacher = BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=64, **SIZES, **LABELS))
    teacher.save_pretrained(folder / "teacher")
    letters_tokenizer().save_pretrained(folder / "teacher")
    save_data(folder / "data", train=32, validation=16)
    (folder / "taught.yaml").write_text(RECIPE.format(place=folder))
    return folder


def test_a_student_without_a_head_learns_and_is_compared_with_its_teacher(place: Path) -> None:
    report = pipeline.run(load_recipe(place / "taught.yaml"), place / "run", quiet=True)
    assert [row.name for row in report.rows] == ["teacher", "learn"]
    teacher = BertForSequenceClassification.from_pretrained(place / "teacher")
    assert report.rows[0].parameters == teacher.num_parameters()
    assert report.recipe["teacher"] == "./teacher" and report.base_model == "./student"
    said = report.rows[1].findings["distillation"]["distillation"]
    assert said["teacher"] == "BertForSequenceClassification" and said["layers"]["hidden"]
    assert report.rows[1].comparison is not None
    card = (place / "run" / "README.md").read_text()
    assert "the teacher, which the others are compared with" in card and str(place) not in card
    assert (place / "hfcompress_cache").is_dir()  # its states were kept, and it was not in memory


def test_a_teacher_must_know_the_task(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"teacher: .* has no head"):
        pipeline.run(load_recipe(place / "taught.yaml", [f"teacher={place}/student"]), tmp_path / "run", quiet=True)
    with pytest.raises(RecipeError, match="teacher: the folder /nowhere is not there"):
        load_recipe(place / "taught.yaml", ["teacher=/nowhere"])


def test_a_teacher_with_the_students_tokenizer_reads_the_same_rows(place: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "alike")
    recipe = load_recipe(place / "taught.yaml", [f"teacher={tmp_path}/alike", "steps.learn.distillation.hidden=0"])
    assert [row.name for row in pipeline.run(recipe, tmp_path / "run", quiet=True).rows] == ["teacher", "learn"]


def test_a_step_may_change_what_the_student_reads_after_its_teacher_was_made(place: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "student")
    earlier = """steps:
  - name: fine_tune
    training: {epochs: 1, learning_rate: 1e-3, batch_size: 16, precision: fp32}
  - vocabulary: {}"""
    text = RECIPE.format(place=place).replace(f"model: {place}/student", f"model: {tmp_path}/student")
    text = text.replace(f"teacher: {place}/teacher\n", "").replace(", hidden: 0.1", "")
    (tmp_path / "trimmed.yaml").write_text(text.replace("steps:", earlier))
    report = pipeline.run(load_recipe(tmp_path / "trimmed.yaml"), tmp_path / "run", quiet=True)
    assert [row.name for row in report.rows] == ["fine_tune", "vocabulary", "learn"]
    assert report.rows[2].parameters < report.rows[0].parameters


def test_a_teacher_that_is_told_which_text_is_which_reads_its_own_rows() -> None:
    kind = kind_of(get_task("mrpc"))
    one, other = tiny_tokenizer(), tiny_tokenizer()
    other.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # BERT has them, DistilBERT not
    assert one.get_vocab() == other.get_vocab()
    assert kind.processor_key(one) != kind.processor_key(other)
