from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from hfcompress.errors import CheckpointError, DataError, RunFolderError
from hfcompress.evaluation.report import License, Report
from hfcompress.publishing.metadata import find_license, stated_license
from hfcompress.publishing.model_card import card_of_report, write_card

GOLDEN = Path(__file__).with_name("golden_card.md")
APACHE = License(id="apache-2.0")
HOSTILE = "x|<script>alert('1')</script>`\n---\n# h\n```\n[l](javascript:0)"


@pytest.fixture
def folder(checkpoint: Path, report: Report) -> Path:
    (checkpoint / "README.md").unlink()
    report.save(checkpoint / "report.json")
    return checkpoint


def header_of(text: str) -> dict:
    return ModelCard(text).data.to_dict()


def test_the_whole_card(report: Report) -> None:
    card = card_of_report(report, quant_method="hfcompress", license=APACHE)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(card, encoding="utf-8")
    assert card == GOLDEN.read_text(encoding="utf-8")


def test_the_header_is_what_the_hub_reads(report: Report) -> None:
    data = header_of(card_of_report(report, quant_method="hfcompress", license=APACHE))
    assert data["base_model"] == "google-bert/bert-base-uncased"
    assert data["base_model_relation"] == "quantized"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "text-classification"
    assert data["license"] == "apache-2.0"
    assert data["datasets"] == ["nyu-mll/glue"]
    assert data["metrics"] == ["accuracy", "f1"]
    assert data["tags"] == ["hfcompress", "pruned", "distilled", "low-rank", "quantized"]
    (model,) = data["model-index"]
    assert model["name"] == "quickstart"
    (result,) = model["results"]
    assert result["dataset"] == {
        "name": "mrpc",
        "type": "nyu-mll/glue",
        "config": "mrpc",
        "split": "validation",
    }
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == report.rows[-1].metrics


def test_without_quantization_it_is_a_finetune(report: Report) -> None:
    data = header_of(card_of_report(replace(report, rows=report.rows[:-1]), quant_method=None))
    assert data["base_model_relation"] == "finetune"
    assert "quantized" not in data["tags"]
    assert "license" not in data


def test_a_model_that_was_only_fine_tuned_is_compared_with_nothing(report: Report) -> None:
    first = replace(report.rows[0], methods=())
    text = card_of_report(replace(report, rows=(first,)), quant_method=None)
    assert "fine-tuned with hfcompress" in text and "compressed with hfcompress" not in text
    assert f"Its accuracy is **{first.metrics['accuracy']:.4f}**." in text
    assert "Against the original" not in text and "which the others are compared with" not in text


def test_a_demo_model_names_its_source(report: Report) -> None:
    demo = replace(report, base_model="demo/minilm-l6", task="demo/movie-reviews")
    card = card_of_report(demo, quant_method="hfcompress", license=find_license(demo))
    data = header_of(card)
    assert data["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert data["license"] == "apache-2.0"
    assert "datasets" not in data
    assert "the weights of sentence-transformers/all-MiniLM-L6-v2, apache-2.0" in card


def test_a_local_model_has_no_base_on_the_hub(report: Report) -> None:
    card = card_of_report(replace(report, base_model="../secret/place"), quant_method=None)
    assert "base_model" not in header_of(card)
    assert "secret" not in card
    assert "it was not known when this card was written" in card


def test_values_are_shown_not_obeyed(report: Report) -> None:
    rows = tuple(replace(row, name=HOSTILE, methods=(HOSTILE,), metrics={HOSTILE: 0.5}) for row in report.rows)
    hostile = replace(
        report,
        name=HOSTILE,
        base_model=HOSTILE,
        split=HOSTILE,
        metric=HOSTILE,
        rows=rows,
        environment={HOSTILE: HOSTILE},
        recipe={"name": HOSTILE, "push": {"repo": HOSTILE}},
    )
    card = card_of_report(hostile, quant_method=HOSTILE, license=License(id=HOSTILE))
    front, body = card.split("\n---\n", 1)
    assert yaml.safe_load(front.removeprefix("---\n"))["license"] == HOSTILE
    fences, prose = 0, []
    fence = None
    for line in body.splitlines():
        if fence is None and line.startswith("```"):
            fence = line.rstrip("abcdefghijklmnopqrstuvwxyz")
            fences += 1
        elif line == fence:
            fence = None
        elif fence is None:
            prose.append(line)
    text = "\n".join(prose)
    assert fence is None and fences == 3
    assert "<script>" not in text and "](" in text and "[l](" not in text.replace("\\[l\\](", "")
    assert [line for line in prose if line.startswith("#")][1:] == [
        "## What was done",
        "## Results",
        "## Where it is slower or worse",
        "## How to load",
        "## How to measure again",
        "## Limits and risks",
        "## Licence",
    ]
    widths = {line.replace("\\|", "").count("|") for line in prose if line.startswith("|")}
    assert widths == {8}


def test_losses_are_told(report: Report) -> None:
    text = card_of_report(report, quant_method=None)
    assert "accuracy falls from 0.9100 to 0.8750." in text
    assert "f1 falls from 0.9200 to 0.8850." in text
    assert "The step that costs most accuracy is low\\_rank: 0.0250." in text
    assert "The step quantize made it slower: 2.40x (2.35 to 2.45) before, 1.90x (1.85 to 1.95) after." in text


def test_batches_that_are_slower_are_told(report: Report) -> None:
    speed = report.rows[-1].speed
    assert speed is not None
    slow = replace(speed, batch_size=1, sequence_length=32, low=0.5, ratio=0.54, high=0.6)
    text = card_of_report(replace(report, grid=(slow, speed)), quant_method=None)
    assert "It is slower than the original at these batches: 1 x 32 tokens (0.54x)." in text
    assert "at these batches" not in card_of_report(replace(report, grid=(speed,)), quant_method=None)


@pytest.mark.parametrize(
    ("low", "ratio", "high", "said"),
    [
        (0.7, 0.8, 0.9, "It is slower than the original"),
        (0.9, 1.1, 1.3, "No speed-up can be told from no change"),
        (1.2, 1.3, 1.4, None),
    ],
)
def test_slowness_is_told(report: Report, low: float, ratio: float, high: float, said: str | None) -> None:
    last = report.rows[-1]
    assert last.speed is not None
    slow = replace(last, speed=replace(last.speed, low=low, ratio=ratio, high=high))
    text = card_of_report(replace(report, rows=(report.rows[0], slow)), quant_method=None)
    for other in ("It is slower than the original", "No speed-up can be told from no change"):
        assert (other in text) == (other == said)


def test_nothing_lost_nothing_told(report: Report) -> None:
    better = replace(report.rows[-1], metrics={"accuracy": 0.95, "f1": 0.96}, retention=1.2)
    text = card_of_report(replace(report, rows=(report.rows[1], better)), quant_method=None)
    assert "- Nothing that was measured is worse than the original." in text


def test_what_is_not_known_is_not_made_up(report: Report) -> None:
    last = replace(report.rows[-1], metrics={"accuracy": math.nan, "f1": 0.5}, retention=math.nan, speed=None)
    text = card_of_report(replace(report, rows=(replace(report.rows[0], speed=None), last)), quant_method=None)
    metrics = header_of(text)["model-index"][0]["results"][0]["metrics"]
    assert [metric["type"] for metric in metrics] == ["f1"]
    assert "accuracy is not defined on its answers." in text
    assert "Speed was not measured: do not expect a speed-up." in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("hfcompress", "`import hfcompress` (`pip install hfcompress`) is needed"),
        ("bitsandbytes", "with the bitsandbytes backend installed"),
        (None, "It is an ordinary checkpoint"),
    ],
)
def test_how_to_load(folder: Path, method: str | None, said: str) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"quantization_config": {"quant_method": method}} if method else {}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    text = write_card(folder).read_text(encoding="utf-8")
    assert said in text
    assert ("```python\nimport hfcompress\n" in text) == (method == "hfcompress")
    assert 'from_pretrained("org/tiny")' in text


def test_the_results_stand_beside_the_card(folder: Path, report: Report) -> None:
    write_card(folder)
    (entry,) = parse_eval_result_entries(
        yaml.safe_load((folder / ".eval_results/mrpc.yaml").read_text(encoding="utf-8"))
    )
    assert (entry.dataset_id, entry.task_id) == ("nyu-mll/glue", "mrpc")
    assert entry.value == report.rows[-1].metrics["accuracy"]
    assert entry.notes == "accuracy on validation, 408 rows"


def test_data_that_are_not_on_the_hub_have_no_results_there(folder: Path, report: Report) -> None:
    write_card(folder, replace(report, task="demo/movie-reviews"))
    assert not (folder / ".eval_results").exists()


def test_ours_is_written_again_and_nothing_is_left_over(folder: Path, report: Report) -> None:
    before = set(folder.iterdir())
    card = write_card(folder)
    first = card.read_bytes()
    write_card(folder, replace(report, name="again"))
    assert card.read_bytes() != first
    assert write_card(folder).read_bytes() == first
    assert set(folder.iterdir()) - before == {card, folder / ".eval_results"}
    assert card.stat().st_mode & 0o777 == (folder / "report.json").stat().st_mode & 0o777


@pytest.mark.parametrize("name", ["README.md", ".eval_results/mrpc.yaml"])
def test_what_others_wrote_stays(folder: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(RunFolderError, match="was not written by hfcompress") as caught:
        write_card(folder)
    assert path.name in str(caught.value) and caught.value.hint
    assert path.read_text(encoding="utf-8") == "mine"
    assert (folder / "README.md").exists() == (name == "README.md")
    write_card(folder, overwrite=True)
    assert "generated by hfcompress" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["config.json", "report.json"])
@pytest.mark.parametrize("text", [None, "{", "[]", b"\xff"])
def test_a_folder_that_is_not_whole(folder: Path, name: str, text: str | bytes | None) -> None:
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError):
        write_card(folder)
    assert not (folder / "README.md").exists()


def test_an_unknown_task(report: Report) -> None:
    with pytest.raises(DataError, match="nowhere"):
        card_of_report(replace(report, task="nowhere"), quant_method=None)


def test_the_licence_that_a_card_states(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    assert stated_license(readme) is None
    readme.write_text("---\nlicense: other\nlicense_name: gemma\nlicense_link: LICENSE\n---\n", encoding="utf-8")
    assert stated_license(readme) == License(id="other", name="gemma", link="LICENSE")
    for broken in ("---\nlicense: [\n---\n", "---\nlicense: [mit]\n---\n", "no header"):
        readme.write_text(broken, encoding="utf-8")
        assert stated_license(readme) is None
    readme.write_bytes(b"\xff\xfe")
    assert stated_license(readme) is None


def test_where_the_licence_of_a_base_is_found(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    # A folder that happens to be called like the base of a run elsewhere says nothing of it.
    assert find_license(replace(report, base_model="./base")) is None
    assert find_license(replace(report, base_model="./base", license=APACHE)) == APACHE
    assert find_license(replace(report, base_model="no-such-org/no-such-model")) is None
    assert find_license(replace(report, base_model="demo/other")) is None
