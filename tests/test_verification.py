from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from hfcompress import pipeline, verification
from hfcompress.errors import HFCompressError
from hfcompress.evaluation.answer_book import AnswerBook, seal
from hfcompress.evaluation.attacks import Attempt, Attempts, withstood
from hfcompress.evaluation.cost import Speed
from hfcompress.evaluation.curves import Curve, Training
from hfcompress.evaluation.explanations import Explained, agreement
from hfcompress.evaluation.report import Report
from hfcompress.publishing import write_documents
from hfcompress.recipe import load_recipe
from hfcompress.verification import Measured, holds, judge, judging, speeds_agree
from hfcompress.verification.documents import documents
from tests.test_commands import invoke
from tests.workshop import save_data, save_model

pytestmark = pytest.mark.filterwarnings("ignore")

RECIPE = """
name: tiny
model: {model}
task: sst2
data: {data}
max_length: 16
seeds: [42, 7]
evaluation:
  {{metrics: [f1_macro], batch_size: 16, speed_batch_size: 2, speed_sequence_length: 8, speed_repeats: 5,
   groups: [sentence], robustness: [typos]}}
steps:
  - low_rank: {{keep: 0.6}}
    calibration: 32
  - quantization: {{weights: nf4, embeddings: int8}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    save_model(folder / "model", initializer_range=0.3)
    save_data(folder / "data")
    (folder / "tiny.yaml").write_text(RECIPE.format(model=folder / "model", data=folder / "data"))
    pipeline.run(load_recipe(folder / "tiny.yaml", ()), folder / "result", quiet=True)
    return folder


@pytest.fixture(scope="module")
def measured(place: Path) -> Measured:
    found = verification.measure_again(
        place / "result", original=str(place / "model"), data=str(place / "data"), progress=False
    )
    assert found.speed is not None and found.speed.ratio > 0
    # Tiny models take microseconds, which a busy machine may double: here their speed holds, so that it is never
    # what makes another test's alteration fail.
    report = Report.from_json((place / "result" / "report.json").read_text())
    assert len(found.grid) == len(report.grid) > 0
    return replace(found, speed=report.rows[-1].speed, grid=report.grid)


@pytest.fixture
def result(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "result", tmp_path / "result"))


EXPLAINED = Explained(
    original=[[0.5, -0.25, 0.125, 0.75], [0.5, 0.25, -1.5], [2.0, 1.0, 0.5]],
    compressed=[[0.5, -0.125, 0.25, 0.625], [-0.5, 0.25, -1.25], [0.5, 1.0, 2.0]],
)
ATTEMPTS = Attempts(
    original=[
        Attempt(outcome="withstood", queries=30, changed=0.0),
        Attempt(outcome="fooled", queries=12, changed=0.25),
        Attempt(outcome="wrong", queries=0, changed=0.0),
    ],
    compressed=[
        Attempt(outcome="fooled", queries=21, changed=0.5),
        Attempt(outcome="fooled", queries=9, changed=0.125),
        Attempt(outcome="wrong", queries=0, changed=0.0),
    ],
)


@pytest.fixture
def tried(result: Path) -> Path:
    """The result as if its recipe had asked for training, explanations and an attack, whose libraries are not here."""
    report = Report.from_json((result / "report.json").read_text())
    curve = Curve(name="loss", steps=(1, 2), values=(0.75, 0.5))
    rows = (
        *report.rows[:-1],
        replace(report.rows[-1], training=Training(losses=(curve,), metrics=(curve,), examples=48)),
    )
    asked = report.recipe["evaluation"] | {"explanations": "shap", "attack": "pruthi"}
    report = replace(
        report,
        rows=rows,
        recipe=report.recipe | {"evaluation": asked},
        explanations=agreement("shap", EXPLAINED),
        attack=withstood("pruthi", ATTEMPTS),
    )
    report.save(result / "report.json")
    book = AnswerBook.from_json((result / "predictions.json").read_text())
    book = replace(book, report=seal(report.to_json()), explanations=EXPLAINED, attack=ATTEMPTS)
    (result / "predictions.json").write_text(book.to_json())
    write_documents(result)
    return result


@pytest.fixture
def measured_with_trials(measured: Measured) -> Measured:
    return replace(measured, explained=(EXPLAINED.compressed, ""), attacked=(ATTEMPTS.compressed, ""))


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores the same answers once, however often they are judged."""
    for name in ("score_task", "compare", "over_seeds"):
        known: dict[str, Any] = {}
        monkeypatch.setattr(judging, name, partial(remembered, known, getattr(judging, name)))


def remembered(known: dict[str, Any], function: Any, *arguments: Any) -> Any:
    key = repr(arguments)
    if key not in known:
        known[key] = function(*arguments)
    return known[key]


def fails(directory: Path, measured: Measured) -> bool:
    try:
        return not holds(judge(directory, measured))
    except HFCompressError:
        return True


def figures(value: Any, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from figures(item, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path


def altered(text: str, path: tuple) -> str:
    whole = json.loads(text)
    holder = whole
    for key in path[:-1]:
        holder = holder[key]
    value = holder[path[-1]]
    holder[path[-1]] = value + 1 if isinstance(value, int) else value * 1.3 + 0.001
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def test_what_a_run_wrote_holds(place: Path, result: Path, measured: Measured) -> None:
    checks = judge(result, measured)
    assert [check for check in checks if check.state != "holds"] == []
    assert {"quantization: accuracy", "quantization: bytes", "original: parameters", "README.md"} <= {
        check.figure for check in checks
    }


@pytest.mark.usefixtures("remembering")
def test_every_figure_of_the_report_altered_fails(tried: Path, measured_with_trials: Measured) -> None:
    result, measured = tried, measured_with_trials
    assert [check for check in judge(result, measured) if check.state != "holds"] == []
    text = (result / "report.json").read_text()
    paths = list(figures(json.loads(text)))
    assert len(paths) > 100
    unseen = []
    for path in paths:
        (result / "report.json").write_text(altered(text, path))
        if not fails(result, measured):
            unseen.append(path)
    assert unseen == []


# What only the run itself could know, and is not in the folder any more.
UNKNOWABLE = re.compile(
    r"format|grid\..*|robustness\.\d\.original\..*|environment\..*|recipe\..*|rows\.\d\.(seconds|findings\..*)|rows\.\d\.usage\.(memory|load_seconds|parts\..*)"
    r"|layers\.\d+\.(original_)?seconds|rows\.\d\.training\..*"
    r"|rows\.0\.bytes|rows\.1\.(bytes|parameters|usage\.operations)|rows\.\d\.speed\..*"
)


@pytest.mark.usefixtures("remembering")
def test_a_forged_report_with_card_page_and_seal_to_match_still_fails_where_it_can_be_measured(
    tried: Path, measured_with_trials: Measured
) -> None:
    result, measured = tried, measured_with_trials
    text = (result / "report.json").read_text()
    book = AnswerBook.from_json((result / "predictions.json").read_text())
    unseen = []
    for path in figures(json.loads(text)):
        if path[0] in ("format", "recipe"):
            continue
        forged = Report.from_json(altered(text, path))
        forged.save(result / "report.json")
        (result / "predictions.json").write_text(replace(book, report=seal(forged.to_json())).to_json())
        write_documents_without_pictures(result)
        if not fails(result, measured):
            unseen.append(".".join(map(str, path)))
    assert [path for path in unseen if not UNKNOWABLE.fullmatch(path)] == []


def write_documents_without_pictures(directory: Path) -> None:
    from hfcompress.publishing import write_card, write_page

    shutil.rmtree(directory / "pictures", ignore_errors=True)
    write_card(directory)
    write_page(directory, Report.from_json((directory / "report.json").read_text()))


@pytest.mark.parametrize(
    ("name", "every"),
    [
        ("README.md", 1),
        (".eval_results/sst2.yaml", 1),
        ("report.html", 9),
        pytest.param("report.html", 1, marks=pytest.mark.slow),
    ],
)
def test_every_figure_of_a_document_altered_fails(
    name: str, every: int, tried: Path, measured_with_trials: Measured
) -> None:
    result, measured = tried, measured_with_trials
    file = result / name
    text = file.read_text()
    begin = max(text.find("<main>"), 0)
    found = [match for match in re.finditer(r"\d+(\.\d+)?", text) if match.start() >= begin]
    assert len(found) > (0 if name.endswith(".yaml") else 60)
    report = Report.from_json((result / "report.json").read_text())
    for match in found[::every]:
        other = "7" if match[0] != "7" else "8"
        file.write_text(text[: match.start()] + other + text[match.end() :])
        assert not holds(documents(result, report)), match
    assert not holds(judge(result, measured))
    file.write_text(text)
    assert holds(judge(result, measured))


def test_an_altered_answer_fails(result: Path, measured: Measured) -> None:
    text = (result / "predictions.json").read_text()
    for path in (("references", 0), ("rows", 0, "predictions", 3), ("rows", 2, "predictions", 3)):
        whole = json.loads(text)
        holder = whole
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = 1 - holder[path[-1]]
        (result / "predictions.json").write_text(json.dumps(whole))
        assert fails(result, measured), path


def test_other_reasons_and_other_rows_that_withstand_fail(tried: Path, measured_with_trials: Measured) -> None:
    def failed(now: Measured) -> list[str]:
        return [check.figure for check in judge(tried, now) if check.state == "fails"]

    others = [[0.5, -0.125, 0.25, 0.5], *EXPLAINED.compressed[1:]]
    assert failed(replace(measured_with_trials, explained=(others, ""))) == ["quantization: what words count for"]
    assert failed(replace(measured_with_trials, explained=(others[:2], ""))) == ["quantization: what words count for"]
    now = replace(measured_with_trials, attacked=(ATTEMPTS.original, ""))
    assert failed(now) == ["quantization: rows that withstood the attack"]
    without = replace(measured_with_trials, explained=(None, "shap is absent"), attacked=(None, "textattack is absent"))
    states = {check.figure: (check.state, check.said) for check in judge(tried, without) if check.state != "holds"}
    assert states == {
        "quantization: what words count for": ("not checked", "shap is absent"),
        "quantization: rows that withstood the attack": ("not checked", "textattack is absent"),
    }
    kept = json.loads((tried / "predictions.json").read_text())
    for alter in (
        lambda book: book["explanations"]["original"][0].reverse(),
        lambda book: book["attack"]["original"].pop(),
        lambda book: book["attack"]["original"][0].update(queries=31),
        lambda book: book.pop("explanations"),
    ):
        book = json.loads(json.dumps(kept))
        alter(book)
        (tried / "predictions.json").write_text(json.dumps(book))
        assert failed(measured_with_trials), book["attack"]


@pytest.mark.parametrize("name", ["README.md", "predictions.json", ".eval_results/sst2.yaml"])
def test_a_missing_document_fails(name: str, result: Path, measured: Measured) -> None:
    (result / name).unlink()
    assert fails(result, measured)


def test_a_picture_of_another_report_fails(result: Path, measured: Measured) -> None:
    picture = result / "pictures" / "quality.png"
    report = Report.from_json((result / "report.json").read_text())
    from hfcompress.publishing.pictures import write_pictures

    write_pictures(result, replace(report, name="other"))
    assert picture.is_file() and fails(result, measured)


def test_other_weights_fail(place: Path, result: Path) -> None:
    shutil.copy(place / "result.work" / "1-low_rank" / "checkpoint" / "model.safetensors", result)
    shutil.copy(place / "result.work" / "1-low_rank" / "checkpoint" / "config.json", result)
    checks = verification.verify(result, data=str(place / "data"), progress=False)
    failed = {check.figure for check in checks if check.state == "fails"}
    assert {"quantization: bytes"} <= failed
    assert {check.figure for check in checks if check.state == "not checked"} == {
        "original: parameters",
        "quantization: speed-up",
        "quantization: speed-up of 1 x 32 tokens",
        "quantization: speed-up of 8 x 32 tokens",
    }


def speed(low: float, ratio: float, high: float) -> Speed:
    return Speed(
        ratio=ratio,
        low=low,
        high=high,
        original_seconds=ratio,
        compressed_seconds=1.0,
        batch_size=8,
        sequence_length=128,
        threads=1,
        repeats=20,
    )


@pytest.mark.parametrize(
    ("other", "agree"),
    [
        (speed(1.9, 2, 2.1), True),
        (speed(1.75, 1.8, 1.85), True),
        (speed(1.4, 1.5, 1.6), False),
        (speed(3, 3, 3), False),
    ],
)
def test_speeds_agree_where_their_intervals_nearly_meet(other: Speed, agree: bool) -> None:
    stated = speed(1.95, 2.0, 2.05)
    assert speeds_agree(stated, other) == speeds_agree(other, stated) == agree


def test_a_speed_up_that_is_not_there_fails(result: Path, measured: Measured) -> None:
    stated = Report.from_json((result / "report.json").read_text()).rows[-1].speed
    assert stated is not None and measured.speed is not None
    faster = replace(measured.speed, low=stated.high * 2, ratio=stated.high * 2, high=stated.high * 2)
    assert fails(result, replace(measured, speed=faster))
    elsewhere = judge(result, replace(measured, speed=faster, environment={**measured.environment, "cpu": "another"}))
    assert holds(elsewhere)
    assert next(c for c in elsewhere if c.figure == "quantization: speed-up").state == "not checked"


def test_a_report_of_an_earlier_version_holds_as_it_was_written(result: Path, measured: Measured) -> None:
    """One without the fields that came later, sealed and drawn from as it was."""
    whole = json.loads((result / "report.json").read_text())
    for name in ("layers", "seeds"):
        del whole[name]
    for name in ("seeds", "seed"):
        whole["recipe"].pop(name, None)
    text = json.dumps(whole, indent=2) + "\n"
    (result / "report.json").write_text(text)
    book = AnswerBook.from_json((result / "predictions.json").read_text())
    kept = json.loads(replace(book, report=seal(text)).to_json())
    del kept["seeds"]
    (result / "predictions.json").write_text(json.dumps(kept))
    write_documents(result)
    assert [check for check in judge(result, measured) if check.state == "fails"] == []
    assert (result / "pictures" / "quality.png").is_file()


def test_the_command_says_what_holds_and_exits_1_if_anything_does_not(
    place: Path, result: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "measure_again", lambda *a, **k: replace(measured, speed=None, without="absent"))
    done = invoke("verify", result, "--quiet")
    assert done.exit_code == 0, done.output
    assert " 0 fails, 1 not checked" in done.stdout
    report = result / "report.json"
    report.write_text(report.read_text().replace('"examples": 48', '"examples": 49'))
    done = invoke("verify", result, "--quiet", "--json")
    assert done.exit_code == 1
    said = json.loads(done.stdout)
    assert not said["holds"]
    assert {"figure": "examples", "state": "fails", "said": "49 in the report, 48 found"} in said["checks"]
    report.unlink()
    assert invoke("verify", result, "--quiet").exit_code == 2


def test_writing_the_documents_again_changes_nothing(result: Path, measured: Measured) -> None:
    before = {path: path.read_bytes() for path in result.rglob("*") if path.suffix in (".md", ".html", ".yaml")}
    write_documents(result)
    assert {path: path.read_bytes() for path in before} == before


def test_compare_writes_one_page(place: Path, result: Path, tmp_path: Path) -> None:
    page = tmp_path / "both.html"
    done = invoke("compare", place / "result", result, "--output", page)
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "2 results" in text and text.count("<svg") == 2
    assert str(place / "result") in text, "two folders of one name are told apart"
    assert invoke("compare", tmp_path, "--output", page).exit_code == 2
    assert invoke("compare", result, "--output", tmp_path / "no" / "page.html").exit_code == 2
