from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from transformers import AutoModelForSequenceClassification

from hfcompress import bench, pipeline
from hfcompress.errors import DataError, HubError, RunFolderError
from hfcompress.evaluation.answer_book import AnswerBook, seal
from hfcompress.evaluation.report import Report
from hfcompress.recipe import Recipe, load_recipe
from tests.workshop import batches, logits, save_data, save_model

RECIPE = """
name: tiny
model: {model}
task: sst2
data: {data}
max_length: 16
evaluation: {{batch_size: 16, speed_batch_size: 2, speed_sequence_length: 8, speed_repeats: 3}}
steps:
  - name: fine_tune
    training: {{epochs: 1, learning_rate: 1e-3, batch_size: 16, precision: fp32, save_steps: 2}}
  - name: prune
    structured_pruning: {{heads: 0.4, neurons: 0.4, interval: 1}}
    distillation: {{}}
    training: {{epochs: 1, learning_rate: 1e-3, batch_size: 16, precision: fp32, save_steps: 2}}
  - low_rank: {{keep: 0.6}}
    calibration: 32
  - quantization: {{weights: nf4, embeddings: int8}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_model(folder / "model", hidden_dropout_prob=0.1)
    save_data(folder / "data")
    text = RECIPE.format(model=folder / "model", data=folder / "data")
    (folder / "tiny.yaml").write_text(text)
    return folder


def recipe(place: Path, *overrides: str) -> Recipe:
    return load_recipe(place / "tiny.yaml", overrides)


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Path, Report]:
    output = place / "whole"
    return output, pipeline.run(recipe(place), output, quiet=True)


def comparable(report: Report) -> list[tuple]:
    return [(row.name, row.metrics, row.retention, row.parameters, row.bytes) for row in report.rows]


def test_what_needs_no_data_is_done_on_disk_with_the_same_result(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of a step that only factorises weights is never in memory: it may be larger."""
    text = RECIPE.format(model=place / "model", data=place / "data")
    plain = text.split("  - name: prune")[0] + "  - low_rank: {keep: 0.6, method: svd}\n"
    reports = []
    for name in ("disk", "memory"):
        (place / f"{name}.yaml").write_text(plain)
        if name == "memory":
            monkeypatch.setattr(bench.Bench, "_on_disk", lambda *arguments: None)
        else:
            monkeypatch.setattr(bench.Bench, "_at_once", None)
        reports.append(pipeline.run(load_recipe(place / f"{name}.yaml"), place / name, quiet=True))
        monkeypatch.undo()
    assert comparable(reports[0]) == comparable(reports[1])
    assert reports[0].rows[1].findings == reports[1].rows[1].findings
    kept = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")
    assert all((place / "disk" / each).read_bytes() == (place / "memory" / each).read_bytes() for each in kept)


def test_a_run_ends_with_a_checkpoint_that_plain_transformers_loads(finished: tuple[Path, Report]) -> None:
    output, report = finished
    assert [row.name for row in report.rows] == ["fine_tune", "prune", "low_rank", "quantization"]
    assert report.rows[0].retention == 1.0 and report.rows[0].speed is None
    weights = output.parent / "whole.work" / "1-fine_tune" / "checkpoint" / "model.safetensors"
    assert report.rows[-1].bytes < report.rows[0].bytes == weights.stat().st_size
    assert report.rows[-1].speed is not None and report.rows[-1].speed.ratio > 0
    assert report == Report.from_json((output / "report.json").read_text())
    book = AnswerBook.from_json((output / "predictions.json").read_text())
    assert book.report == seal((output / "report.json").read_text())
    assert [row.name for row in book.rows] == [row.name for row in report.rows]
    assert report.rows[0].comparison is None and report.rows[0].usage is not None
    for row in report.rows[1:]:
        assert row.comparison is not None and row.usage is not None
        lost = row.metrics["accuracy"] - report.rows[0].metrics["accuracy"]
        assert row.comparison.differences["accuracy"].value == lost
    assert "quantized linear layers" in report.rows[-1].usage.parts
    assert [(each.batch_size, each.sequence_length) for each in report.grid] == [(1, 32), (8, 32)]  # it reads 32
    for row in report.rows:
        assert (row.training is not None) == (row.name in ("fine_tune", "prune"))
    trained = report.rows[1].training
    assert trained is not None and {curve.name for curve in trained.losses} == {"loss", "loss_labels", "loss_soft"}
    assert [curve.name for curve in trained.metrics] == ["accuracy"] and len(trained.metrics[0].steps) == 4
    assert (output / "report.html").is_file() and (output / "pictures" / "quality.png").is_file()
    model = AutoModelForSequenceClassification.from_pretrained(output)
    assert torch.isfinite(logits(model, batches(1)[0])).all()
    card = (output / "README.md").read_text()
    assert "structured_pruning" in card and str(output.parent) not in card
    assert str(output.parent) not in (output / "report.json").read_text()


def test_a_second_run_does_no_step_again(
    place: Path, finished: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, report = finished
    monkeypatch.setattr(bench.Bench, "_do", lambda *a, **k: pytest.fail("a finished step was done again"))
    assert comparable(pipeline.run(recipe(place), output, quiet=True)) == comparable(report)


def test_lost_answers_are_asked_for_again(place: Path, finished: tuple[Path, Report]) -> None:
    output, report = finished
    (place / "whole.work" / "2-prune" / "answers.json").unlink()
    again = pipeline.run(recipe(place), output, quiet=True)
    assert comparable(again) == comparable(report)
    assert again.rows[1].comparison == report.rows[1].comparison


def test_a_changed_step_is_done_again_with_all_after_it(place: Path, finished: tuple[Path, Report]) -> None:
    output, _ = finished
    done: list[str] = []
    stock = bench.Bench._do

    def spy(self, step, *args, **kwargs):
        done.append(step.name)
        return stock(self, step, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.Bench, "_do", spy)
        pipeline.run(recipe(place, "steps.low_rank.keep=0.5"), output, quiet=True)
        assert done == ["low_rank", "quantization"]
        done.clear()
        pipeline.run(recipe(place), output, quiet=True)
        assert done == ["low_rank", "quantization"]


def test_a_damaged_step_is_done_again(place: Path, finished: tuple[Path, Report]) -> None:
    output, report = finished
    weights = place / "whole.work" / "2-prune" / "checkpoint" / "model.safetensors"
    wanted = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(wanted[:-1] + bytes([wanted[-1] ^ 1]))
    assert comparable(pipeline.run(recipe(place), output, quiet=True)) == comparable(report)
    assert weights.read_bytes() == wanted


# Kills its own process before or after the Nth rename: renames are where anything becomes visible.
KILLER = """
import os, signal, sys
count, after = int(sys.argv[3]), sys.argv[4] == "after"
stock, seen = (os.replace, os.rename), [0]
def deadly(rename):
    def step(*args, **kwargs):
        seen[0] += 1
        if seen[0] == count and not after: os.kill(os.getpid(), signal.SIGKILL)
        rename(*args, **kwargs)
        if seen[0] == count: os.kill(os.getpid(), signal.SIGKILL)
    return step
from pathlib import Path
from hfcompress import bench, pipeline
from hfcompress.recipe import load_recipe
recipe = load_recipe(Path(sys.argv[1]), ())
os.replace, os.rename = map(deadly, stock)
pipeline.run(recipe, Path(sys.argv[2]), quiet=True)
print("renames", seen[0])
"""


def killed_run(place: Path, output: Path, count: int, when: str) -> subprocess.CompletedProcess:
    arguments = [sys.executable, "-c", KILLER, place / "tiny.yaml", output, str(count), when]
    return subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(
    ("count", "when"),
    [
        (4, "before"),
        (12, "after"),
        *(pytest.param(n, w, marks=pytest.mark.slow) for n in range(1, 40, 2) for w in ("before", "after")),
    ],
)
def test_killed_anywhere_it_finishes_with_the_same_bytes(
    place: Path, finished: tuple[Path, Report], tmp_path: Path, count: int, when: str
) -> None:
    output, report = finished
    process = killed_run(place, tmp_path / "cut", count, when)
    if process.returncode == 0:
        assert int(process.stdout.split()[-1]) < count
        pytest.skip(f"the run has fewer than {count} renames")
    assert process.returncode == -9, process.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed = pipeline.run(recipe(place), tmp_path / "cut", quiet=True)
    finally:
        torch.set_num_threads(threads)
    assert comparable(resumed) == comparable(report)
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "cut.work"]


def test_two_runs_do_not_share_a_folder(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out.work").mkdir()
    with FileLock(tmp_path / "out.work" / ".lock"), pytest.raises(RunFolderError, match="another run"):
        pipeline.run(recipe(place), tmp_path / "out", quiet=True)


def test_a_place_under_a_file_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunFolderError, match="cannot be made"):
        pipeline.run(recipe(place), tmp_path / "file" / "out", quiet=True)


def test_a_folder_that_is_named_like_a_model_of_the_hub(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(place / "model", tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"model: mine could not be had from the Hub[\s\S]*write \./mine"):
        pipeline.run(recipe(place, "model=mine"), tmp_path / "out", quiet=True)


def test_a_folder_of_somebody_else_is_left_alone(place: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="no run wrote"):
        pipeline.run(recipe(place), tmp_path / "out", quiet=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_a_model_that_is_fine_tuned_already_needs_no_fine_tuning(
    place: Path, finished: tuple[Path, Report], tmp_path: Path
) -> None:
    base = Path(shutil.copytree(place / "whole.work" / "1-fine_tune" / "checkpoint", tmp_path / "base"))
    (base / "README.md").write_text("---\nlicense: mit\n---\nof the base")
    config = json.loads((base / "config.json").read_text())
    config |= {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}}
    (base / "config.json").write_text(json.dumps(config))
    text = f"name: short\nmodel: {base}\ntask: sst2\ndata: {place / 'data'}\nmax_length: 16\n"
    text += "evaluation: {speed_repeats: 3, speed_sequence_length: 8}\nsteps:\n  - low_rank: {keep: 0.6}\n"
    (tmp_path / "short.yaml").write_text(text)
    report = pipeline.run(load_recipe(tmp_path / "short.yaml", ()), tmp_path / "out", quiet=True)
    _, whole = finished
    assert [row.name for row in report.rows] == ["original", "low_rank"]
    assert report.rows[0].metrics == whole.rows[0].metrics
    assert "license: mit\n" in (tmp_path / "out" / "README.md").read_text()
    named = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
    assert (named.id2label, named.label2id) == ({0: "negative", 1: "positive"}, {"negative": 0, "positive": 1})


def test_a_model_without_a_head_must_be_fine_tuned_first(place: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    bare = tmp_path / "bare"
    AutoModel.from_pretrained(place / "model").save_pretrained(bare)
    from tests.workshop import tiny_tokenizer

    tiny_tokenizer().save_pretrained(bare)
    text = (place / "tiny.yaml").read_text().replace(str(place / "model"), str(bare))
    head, _, _rest = text.partition("  - name: fine_tune")
    (tmp_path / "bad.yaml").write_text(head + "  - low_rank: {keep: 0.5}\n")
    with pytest.raises(DataError, match="no head"):
        pipeline.run(load_recipe(tmp_path / "bad.yaml", ()), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_the_record_of_a_step_is_plain_json(place: Path, finished: tuple[Path, Report]) -> None:
    record = json.loads((place / "whole.work" / "2-prune" / "step.json").read_text())
    assert record["findings"]["structured_pruning"]["heads"]["encoder.layer.0.attention.self"]["of"] == 4


def test_a_step_may_change_the_tokenizer(place: Path, finished: tuple[Path, Report], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = place / "whole.work" / "1-fine_tune" / "checkpoint"
    text = f"name: trim\nmodel: {base}\ntask: sst2\ndata: {place / 'data'}\nmax_length: 16\n"
    text += "evaluation: {speed_repeats: 3, speed_sequence_length: 8}\nsteps:\n  - vocabulary: {characters: false}\n"
    text += "  - low_rank: {keep: 0.6}\n    calibration: 16\n"
    (tmp_path / "trim.yaml").write_text(text)
    report = pipeline.run(load_recipe(tmp_path / "trim.yaml", ()), tmp_path / "out", quiet=True)
    original, trimmed, _ = report.rows
    assert trimmed.metrics == original.metrics
    found = trimmed.findings["vocabulary"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == found["kept"] == found["of"] - 2


def test_what_people_added_to_a_result_outlives_the_next_run(
    place: Path, finished: tuple[Path, Report], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = place / "whole.work" / "1-fine_tune" / "checkpoint"
    text = f"name: short\nmodel: {base}\ntask: sst2\ndata: {place / 'data'}\nmax_length: 16\n"
    text += "evaluation: {speed_repeats: 3, speed_sequence_length: 8}\nsteps:\n  - low_rank: {keep: 0.6}\n"
    (tmp_path / "short.yaml").write_text(text)
    out = tmp_path / "out"
    pipeline.run(load_recipe(tmp_path / "short.yaml", ()), out, quiet=True)
    added = {"LICENSE": "mine", "pictures/mine.png": "p", ".eval_results/mine.yaml": "y", "onnx/deep/model.onnx": "o"}
    for name, content in added.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content)
    (out / "model-00001-of-00002.safetensors").write_text("of an earlier run")
    pipeline.run(load_recipe(tmp_path / "short.yaml", ()), out, quiet=True)
    assert not caplog.records
    pipeline.run(load_recipe(tmp_path / "short.yaml", ("steps.low_rank.low_rank.keep=0.5",)), out, quiet=True)
    (warning,) = caplog.records
    assert "(steps differ)" in warning.getMessage()
    assert {name: (out / name).read_text() for name in added} == added
    assert not (out / "model-00001-of-00002.safetensors").exists()

    (out / "README.md").write_text("my own words")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(RunFolderError, match=r"README\.md was not written by hfcompress"):
        pipeline.run(load_recipe(tmp_path / "short.yaml", ()), out, quiet=True)
    assert (out / "README.md").read_text() == "my own words"
    assert (out / "model.safetensors").read_bytes() == before


def test_a_push_without_a_login_is_refused_before_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(HubError, match="not logged in"):
        pipeline.run(recipe(place, "push.repo=org/name"), tmp_path / "out", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_push_that_fails_says_where_the_result_is(
    place: Path, finished: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    output, report = finished
    monkeypatch.setenv("HF_TOKEN", "a token of nobody")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("hfcompress.publishing.hub.WAITS", ())
    with pytest.raises(HubError):
        pipeline.run(recipe(place, "push.repo=org/name"), output, quiet=True)
    assert any(f"the result is whole in {output}" in record.getMessage() for record in caplog.records)
    assert comparable(Report.from_json((output / "report.json").read_text())) == comparable(report)
