from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from hfcompress.evaluation.attacks import Attack, Withstood
from hfcompress.evaluation.comparison import ClassChange, Comparison, Difference
from hfcompress.evaluation.curves import Curve, Training
from hfcompress.evaluation.explanations import Explanations
from hfcompress.evaluation.groups import GroupChange
from hfcompress.evaluation.layers import LayerCost
from hfcompress.evaluation.report import Report, Row
from hfcompress.evaluation.robustness import Robustness
from hfcompress.evaluation.seeds import SeededRow, Seeds, Spread
from hfcompress.evaluation.usage import LINEAR, QUANTIZED, REST, Usage
from hfcompress.publishing import card_of_report, figures
from hfcompress.publishing.charts import lines
from hfcompress.publishing.drawing import Point, front, maps, scatter, ticks
from hfcompress.publishing.page import page_of_report, page_of_reports
from hfcompress.publishing.pictures import write_pictures

HOSTILE = "<script>alert('1')</script>\"'&<img src=x onerror=alert(1)>"
GOLDEN = Path(__file__).with_name("golden_card_of_all.md")
PDFTOTEXT = shutil.which("pdftotext")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def compared(value: float, label: str = "equivalent") -> Comparison:
    return Comparison(
        differences={"accuracy": Difference(value=value, low=value - 0.01, high=value + 0.01)},
        flips=31,
        flips_were_right=22,
        flips_are_right=9,
        classes=(
            ClassChange(label=label, examples=279, before=0.93, after=0.91),
            ClassChange(label="rare", examples=0, before=math.nan, after=math.nan),
        ),
        calibration_before=0.05,
        calibration_after=0.07,
        groups=(
            GroupChange(column="genre", group="news", examples=100, before=0.9, after=0.8),
            GroupChange(column="genre", group=label, examples=5, before=0.9, after=0.1),
        ),
    )


def trained(*terms: str) -> Training:
    steps = tuple(range(10, 210, 10))
    falling = [Curve(name=name, steps=steps, values=tuple(0.7 / (1 + i / 5) for i in range(20))) for name in terms]
    rising = Curve(name="accuracy", steps=(50, 100, 150, 200), values=(0.68, 0.75, math.nan, 0.81))
    return Training(losses=tuple(falling), metrics=(rising,), examples=256)


@pytest.fixture
def whole(report: Report) -> Report:
    """A report with everything that one can hold."""
    heads = {f"encoder.layer.{i}.attention.self": {"kept": 12 - i, "of": 12} for i in range(12)}
    neurons = {f"encoder.layer.{i}.intermediate.dense": {"kept": 3072 - 200 * i, "of": 3072} for i in range(12)}
    paths = ("attention.self.query", "attention.self.key", "attention.output.dense", "intermediate.dense")
    ranks = {f"encoder.layer.{i}.{path}": 8 * (i + 1) for path in paths for i in range(12)}
    findings = [
        {},
        {},
        {"structured_pruning": {"heads": heads, "neurons": neurons}},
        {"low_rank": {"ranks": ranks}},
        {},
    ]
    rows = []
    for place, row in enumerate(report.rows):
        parts = {LINEAR: 0.7, REST: 0.3} if place < 4 else {QUANTIZED: 0.8, REST: 0.2}
        usage = Usage(operations=10**10 // (place + 1), memory=10**8, load_seconds=0.1, parts=parts)
        comparison = compared(-0.01 * place) if place else None
        training = {1: trained("loss"), 2: trained("loss", "loss_labels", "loss_soft")}.get(place)
        rows.append(replace(row, findings=findings[place], usage=usage, comparison=comparison, training=training))
    speed = rows[2].speed
    assert speed is not None
    grid = (replace(speed, batch_size=1, sequence_length=32), replace(speed, batch_size=64, sequence_length=0))
    layers = tuple(
        LayerCost(
            path=f"encoder.layer.{i}.{path}",
            kind=kind,
            original_shape=(3072, 768),
            shape=shape,
            original_operations=4_831_838_208,
            operations=1_207_959_552,
            original_seconds=0.004,
            seconds=0.002,
            reason=reason,
        )
        for i in range(12)
        for path, kind, shape, reason in (
            ("intermediate.dense", "rank 96", (3072, 768), "two thin factors"),
            ("attention.output.dense", "linear", (611, 768), "odd width"),
            ("attention.self.query", "linear", (768, 768), ""),
        )
    )
    changed = Robustness(change="typos", original={"accuracy": 0.44}, compressed={"accuracy": 0.33})
    last = rows[-1].speed
    assert last is not None
    rows[-1] = replace(rows[-1], speed=replace(last, original_joules=4.5, compressed_joules=2.25))
    explained = Explanations(
        library="captum",
        examples=32,
        rank_correlation=0.71,
        rank_low=0.62,
        rank_high=0.79,
        strongest_shared=0.66,
        same_strongest=0.75,
    )
    attacked = Attack(
        name="deepwordbug",
        examples=32,
        original=Withstood(accuracy=0.875, under_attack=0.3125, queries=41.5, changed=0.21),
        compressed=Withstood(accuracy=0.84375, under_attack=0.125, queries=33.25, changed=math.nan),
    )
    more = {"grid": grid, "robustness": (changed,), "layers": layers, "explanations": explained, "attack": attacked}
    return replace(report, rows=tuple(rows), seeds=seeded(tuple(rows)), **more)


def seeded(rows: tuple[Row, ...]) -> Seeds:
    """What two seeds might have come to."""
    return Seeds(
        seeds=(42, 43),
        rows=tuple(
            SeededRow(
                name=row.name,
                metrics={name: Spread.of([value, value - 0.02]) for name, value in row.metrics.items()},
                retention=Spread.of([row.retention, row.retention - 0.02]),
                differences={name: Difference(value=-0.01, low=-0.03, high=0.01) for name in row.metrics}
                if place
                else {},
            )
            for place, row in enumerate(rows)
        ),
    )


class Reader(HTMLParser):
    """Takes the page apart as a browser does."""

    VOID = ("meta", "wbr", "rect", "line", "polyline", "circle", "br")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.events: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.events += [name for name, _ in attrs if name.startswith("on")]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def test_the_page_says_what_the_report_says(whole: Report) -> None:
    read_page = read(page_of_report(whole))
    for said in (
        "quickstart",
        "8.40x",
        "96.2%",
        "0.8750",
        "1.90x",
        "31",
        "22 were right before",
        "5.00x fewer",
        "1 x 32 tokens",
        "genre: news",
        "0.3300",
        "0.8650 ± 0.0141",
        "the first that the recipe names, and not the best",
        "encoder.layer.*.intermediate.dense x 12",
        "two products of thin matrices",
    ):
        assert said in read_page.text.replace("\xa0", " "), said
    assert read_page.tags.count("svg") == 6 + 6 and "rare" in read_page.text  # six pictures, six keys
    assert "loss labels" in read_page.text and "256 rows" in read_page.text
    assert page_of_report(whole) == page_of_report(whole)


def test_nothing_is_fetched_and_nothing_runs(whole: Report) -> None:
    page = page_of_report(whole)
    found = read(page)
    assert found.links == [] and found.events == []
    assert not {"script", "link", "iframe", "img", "object", "base", "form"} & set(found.tags)
    assert not re.search(r"https?://|url\(|@import", page)
    assert "default-src 'none'" in page


def test_values_are_shown_not_obeyed(whole: Report) -> None:
    rows = tuple(
        replace(
            row,
            name=HOSTILE,
            methods=(HOSTILE,),
            metrics={HOSTILE: 0.5},
            findings={HOSTILE: {HOSTILE: {f"{HOSTILE}.0.{HOSTILE}": 3, "layer.1": 4}}},
            comparison=row.comparison and compared(-0.1, HOSTILE),
            training=row.training and trained("loss", HOSTILE),
        )
        for row in whole.rows
    )
    hostile = replace(
        whole,
        name=HOSTILE,
        base_model=HOSTILE,
        split=HOSTILE,
        metric=HOSTILE,
        environment={HOSTILE: HOSTILE},
        recipe={"name": HOSTILE},
        rows=rows,
        layers=tuple(replace(each, path=HOSTILE, kind=HOSTILE) for each in whole.layers),
        seeds=seeded(rows),
    )
    plain_tags = sorted(set(read(page_of_report(whole)).tags))
    for page in (page_of_report(hostile), page_of_reports([(HOSTILE, hostile), ("two", whole)])):
        found = read(page)
        assert set(found.tags) <= set(plain_tags) and found.events == []
        assert HOSTILE.split(">")[0] in found.text


def test_what_was_not_measured_is_left_out(report: Report) -> None:
    bare = replace(report, rows=tuple(replace(row, speed=None, findings={}, training=None) for row in report.rows))
    text = read(page_of_report(bare)).text
    assert "Speed was not measured" in text and "not measured" in text
    assert "Answer by answer" not in text and "What a pass takes" not in text and "layer by layer" not in text
    undefined = replace(report, rows=tuple(replace(row, metrics={"accuracy": math.nan}) for row in report.rows))
    assert "<svg" not in page_of_report(undefined) and "nan" not in read(page_of_report(undefined)).text.lower()


def test_results_of_other_tasks_are_compared_by_what_they_keep(report: Report) -> None:
    same = page_of_reports([("one", report), ("two", report)])
    assert "not of the same task" not in same and "different machines" not in same
    other = replace(report, task="sst2", environment={"cpu": "another"})
    text = read(page_of_reports([("one", report), ("two", other)])).text
    assert "not of the same task" in text and "different machines" in text
    # MRPC counts by accuracy and F1, SST-2 by accuracy alone.
    assert "GLUE average over 2 of its 9 tasks (sst2, mrpc): 0.8775, of the originals 0.5225." in text
    assert "GLUE average" not in same


def test_the_reasons_name_where_the_time_goes(whole: Report) -> None:
    reasons = figures.reasons(whole)
    quantized = next(reason for reason in reasons if reason.startswith("quantize has 5.00x fewer operations"))
    assert "84.2 ms in quantized linear layers" in quantized and "unpack or round" in quantized
    fast = replace(whole, rows=(whole.rows[0], replace(whole.rows[2], usage=whole.rows[0].usage)))
    assert figures.reasons(fast) == []


def test_the_card_says_the_same(whole: Report) -> None:
    card = card_of_report(whole, quant_method=None, pictures=["pictures/quality.png"])
    assert "![quality against bytes on disk and against time](pictures/quality.png)" in card
    assert "| quantize | -0.0400 (-0.0500 to -0.0300) | 31 | 22 | 9 | 0.0500 to 0.0700 |" in card
    assert "31 of 408 answers differ from the original's; the original had 22 of them right." in card
    assert "Of the classes equivalent loses most: 93.0% right before, 91.0% after (279 examples)." in card
    assert "Of the groups genre: news loses most: 90.0% right before, 80.0% after (100 examples)." in card
    assert "| genre: news | 100 | 90.0% |" in card
    assert "Its calibration error grows from 0.0500 to 0.0700." in card
    assert "quantize has 5.00x fewer operations and is 1.90x as fast." in card
    assert "pictures/" not in card_of_report(whole, quant_method=None)
    assert "| quantize | 0.8650 ± 0.0141 | 0.8750 ± 0.0141 | 95.2% ± 1.4 | -0.0100 (-0.0300 to +0.0100) |" in card
    assert "12 of 36 take 24.0 ms of a pass: a width that is no multiple of 16" in card
    assert "(such as encoder.layer.0.attention.output.dense, 3072x768 to 611x768, linear: 4.00x fewer" in card
    assert "Not measured again, but compared with what the run wrote: speed-ups and bytes of the steps before" in card


def test_the_whole_card_of_all_that_a_report_can_hold(whole: Report) -> None:
    card = card_of_report(whole, quant_method="hfcompress", pictures=["pictures/quality.png"])
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(card, encoding="utf-8")
    assert card == GOLDEN.read_text(encoding="utf-8")


def test_many_classes_are_cut_to_those_that_lost_most(whole: Report) -> None:
    many = tuple(ClassChange(label=f"c{i}", examples=5, before=0.9, after=0.9 - 0.01 * (i % 50)) for i in range(150))
    last = whole.rows[-1]
    assert last.comparison is not None
    rows = tuple(row and replace(row, comparison=replace(last.comparison, classes=many)) for row in whole.rows[1:])
    table = figures.classes(replace(whole, rows=(whole.rows[0], *rows)))
    assert table is not None and len(table.rows) == 20
    assert {"c49", "c99", "c149"} <= {row[0] for row in table.rows}


def test_the_front_is_what_nothing_beats() -> None:
    def at(x: float, y: float) -> Point:
        return Point(x=x, y=y, mark="", name="")

    small, middle, large, beaten, twin = at(1, 0.5), at(2, 0.7), at(3, 0.9), at(3, 0.7), at(2, 0.6)
    assert front([large, beaten, small, twin, middle]) == [small, middle, large]


def test_a_chart_draws_a_line_for_each_curve_that_has_points() -> None:
    one, two = trained("loss", "loss_soft").losses
    drawn = lines([one, replace(two, steps=(10,), values=(1.0,)), two], title="t", up="loss")
    assert drawn.count("<polyline") == 2 and "line1" in drawn and "line3" in drawn and "line2" not in drawn
    (metric,) = trained("loss").metrics
    assert lines([metric], title="t", up="x").count("<circle") == 3, "the one that is no number is left out"
    nothing = replace(one, values=(math.nan,) * 20)
    assert lines([nothing], title="t", up="x") == "" == lines([], title="t", up="x")
    flat = replace(one, values=(0.0,) * 20)
    assert "nan" not in lines([flat], title="t", up="x")


def test_pictures_of_the_training(whole: Report, tmp_path: Path) -> None:
    from PIL import Image

    names = [path.name for path in write_pictures(tmp_path, whole)]
    assert names == ["quality.png", "training.png"]
    with Image.open(tmp_path / "pictures" / "training.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 24) or ()) > 50
    card = card_of_report(whole, quant_method=None, pictures=["pictures/training.png"])
    assert "![loss and metrics while it was trained](pictures/training.png)" in card and "quality.png" not in card
    untrained = replace(whole, rows=tuple(replace(row, training=None) for row in whole.rows))
    assert [path.name for path in write_pictures(tmp_path, untrained)] == ["quality.png"]
    assert not (tmp_path / "pictures" / "training.png").exists(), "one of an earlier report goes"


@pytest.mark.parametrize(("low", "high"), [(0, 90.9), (0.84, 0.88), (0, 1), (0.8, 0.8000001), (-0.2, 1e9), (0, 3e-9)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 11
    assert all(low - (high - low) * 1e-3 <= value <= high + (high - low) * 1e-3 for value in found)


def test_a_picture_of_points_in_one_place() -> None:
    points = [Point(x=5, y=0.5, mark="1", name="a"), Point(x=5, y=0.5, mark="2", name="b")]
    drawn = scatter(points, title="t", across="x", up="y", label=str)
    assert drawn.count("<circle") == 2 and "nan" not in drawn
    nowhere = [Point(x=math.nan, y=0.5, mark="1", name="a")]
    assert scatter(nowhere, title="t", across="x", up="y", label=str) == ""


def test_maps_find_what_is_counted_by_layer(whole: Report) -> None:
    (pruned,) = maps(whole.rows[2])
    assert pruned.columns == ("heads", "neurons") and len(pruned.rows) == 12
    assert pruned.rows[10] == ("layer 10", (("2/12", 2 / 12), ("1072/3072", 1072 / 3072)))
    (ranks,) = maps(whole.rows[3])
    assert ranks.columns == ("attention.query", "attention.key", "attention.output", "intermediate")
    assert ranks.rows[11][1] == ((("96", 1.0)),) * 4
    two = {"model.encoder.layers.0.fc1": 4, "model.decoder.layers.0.fc1": 8, "left": 3, "other.1": "x", "flag.2": True}
    (both,) = maps(replace(whole.rows[0], findings={"m": {"ranks": two, "note": [1]}, "n": "nothing"}))
    assert [name for name, _ in both.rows] == ["model.decoder.layers 0", "model.encoder.layers 0"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
@pytest.mark.parametrize(("width", "scheme"), [(1280, 0), (1280, 1), (390, 0), (390, 1)])
def test_a_browser_shows_it_without_scrolling_sideways(whole: Report, tmp_path: Path, width: int, scheme: int) -> None:
    from PIL import Image

    page = page_of_report(whole)
    (tmp_path / "page.html").write_text(page)
    # The page itself may run nothing: a frame around it of exactly that width measures it.
    (tmp_path / "frame.html").write_text(
        f'<!DOCTYPE html><body style="margin:0"><iframe id="f" src="page.html" style="border:0;width:{width}px;'
        'height:9000px"></iframe><script>onload=()=>{const d=document.getElementById("f").contentDocument;'
        "const wide=[...d.querySelectorAll('body *')].filter(e=>!e.closest('.heat')&&!e.closest('svg')"
        "&&!e.closest('thead')&&e.getBoundingClientRect().right>" + str(width) + "+1).map(e=>e.tagName);"
        "document.title=JSON.stringify({scroll:d.documentElement.scrollWidth,wide,"
        "paper:d.defaultView.getComputedStyle(d.body).backgroundColor,sections:d.querySelectorAll('section').length})}"
        "</script>"
    )
    shared = [
        str(CHROMIUM),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={scheme}",
        f"--window-size={width},2000",
    ]
    seen = subprocess.run(
        [*shared, "--dump-dom", f"file://{tmp_path}/frame.html"], capture_output=True, text=True, timeout=120
    ).stdout
    title = re.search(r"<title>(.*?)</title>", seen)
    assert title is not None, seen[-2000:]
    assert f'"scroll":{width},"wide":[]' in title[1], title[1]
    assert f'"sections":{page.count("<section>")}' in title[1]
    assert ("rgb(20, 23, 26)" if scheme == 0 else "rgb(255, 255, 255)") in title[1]
    picture = tmp_path / "shot.png"
    command = [*shared, f"--screenshot={picture}", f"file://{tmp_path}/page.html"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        assert image.width == width and len(image.convert("RGB").getcolors(1 << 24) or ()) > 50


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None or PDFTOTEXT is None, reason="no chromium or no pdftotext on the PATH")
def test_on_paper_no_column_is_cut_off(whole: Report, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(page_of_report(whole))
    command = [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={tmp_path / 'page.pdf'}"]
    subprocess.run([*command, f"file://{tmp_path}/page.html"], check=True, capture_output=True, timeout=120)
    read = subprocess.run([str(PDFTOTEXT), "-layout", tmp_path / "page.pdf", "-"], capture_output=True, text=True)
    lines = [" ".join(line.split()) for line in read.stdout.replace("\xa0", " ").splitlines()]
    assert any(line.startswith("5 quantize quantization 0.8750") and line.endswith(" 12 s") for line in lines), lines
    assert any(line.startswith("quantize 2.00 GFLOP 5.00x") and line.endswith("20%") for line in lines), lines
