"""Exports that run in their engines; `scripts/environment_export.sh` makes an environment that has them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForTokenClassification
from transformers import pipeline as stock_pipeline

import hfcompress_runtime
from hfcompress import LowRankConfig, QuantizationConfig, StructuredPruningConfig, compress
from hfcompress.deployment import ExportConfig, Pipeline, export
from hfcompress.deployment.export import fewest
from hfcompress.errors import CompressionError, ConfigError, MissingBackendError, RunFolderError, UnsupportedModelError
from tests.workshop import batches, save_model, sentences, tiny_classifier, tiny_tokenizer

ENGINES = {
    "onnx": pytest.mark.skipif(
        not (find_spec("onnx") and find_spec("onnxscript") and find_spec("onnxruntime")),
        reason="the extra 'onnx' is not installed",
    ),
    "openvino": pytest.mark.skipif(
        not (find_spec("openvino") and find_spec("nncf")), reason="the extra 'openvino' is not installed"
    ),
}
EVERY_ENGINE = pytest.mark.parametrize("engine", [pytest.param(name, marks=mark) for name, mark in ENGINES.items()])
TEXTS = [row["sentence"] for row in sentences(12, seed=5)]
LABELS = ("O", "B-FILM", "I-FILM")
# As many classes as no table has rows.
THREE: dict[str, Any] = {"id2label": dict(enumerate("abc")), "label2id": {"a": 0, "b": 1, "c": 2}}
STEPS = {
    "dense": [],
    "pruned": [StructuredPruningConfig(heads=0.4, neurons=0.3)],
    "low_rank": [LowRankConfig(keep=0.5)],
    "all_at_once": [
        StructuredPruningConfig(heads=0.4, neurons=0.3),
        LowRankConfig(keep=0.6),
        QuantizationConfig(weights="nf4", embeddings="int4"),
    ],
}
# The engines' own code warns of its own future.
pytestmark = pytest.mark.filterwarnings("ignore:::(onnx|onnxscript|onnxruntime|openvino|nncf|torch|copyreg)")


def compressed(folder: Path, steps: str) -> Path:
    # Larger weights than at random start, so that logits are of a size that matters.
    model = tiny_classifier(initializer_range=0.2)
    if STEPS[steps]:
        compress(model, STEPS[steps], calibration=batches())
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tagger(folder: Path) -> Path:
    torch.manual_seed(0)
    small = tiny_classifier(initializer_range=0.5).config.to_dict()
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    BertForTokenClassification(BertConfig(**(small | names))).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def stock_logits(folder: Path) -> np.ndarray:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    inputs = tiny_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def close(found: list[Any], wanted: list[Any]) -> bool:
    """Compares lists (of lists) of dicts; numbers within 1e-5."""
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(close(*pair) for pair in zip(found, wanted, strict=True))
    same = all(found[key] == value for key, value in wanted.items() if key != "score")
    return found.keys() == wanted.keys() and same and abs(found["score"] - wanted["score"]) < 1e-5


@EVERY_ENGINE
@pytest.mark.parametrize("steps", STEPS)
def test_a_float_export_computes_the_same(engine: str, steps: str, tmp_path: Path) -> None:
    source = compressed(tmp_path / "source", steps)
    made = export(source, tmp_path / "out", ExportConfig(format=engine))  # type: ignore[arg-type]
    assert made.difference < 1e-5
    wanted = stock_logits(source)
    found = Pipeline.from_pretrained(tmp_path / "out").logits(TEXTS)
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out", "source"]


@EVERY_ENGINE
def test_texts_are_classified_as_by_transformers(engine: str, tmp_path: Path) -> None:
    source = compressed(tmp_path / "source", "pruned")
    export(source, tmp_path / "out", ExportConfig(format=engine))  # type: ignore[arg-type]
    ours = Pipeline.from_pretrained(tmp_path / "out", threads=1)
    stock = stock_pipeline("text-classification", str(source))
    pair = {"text": "good film", "text_pair": "bad plot"}
    assert close(ours(TEXTS, batch_size=5), stock(TEXTS))
    assert close(ours(TEXTS[0]), stock(TEXTS[0]))
    assert close(ours(TEXTS, top_k=None), stock(TEXTS, top_k=None))
    assert close(ours(TEXTS[0], top_k=2), stock(TEXTS[0], top_k=2))
    assert close(ours([pair]), stock([pair]))
    assert ours("good " * 100) == ours("good " * 30)  # cut at 32 tokens, two of them special
    assert ours([]) == []


@EVERY_ENGINE
def test_tokens_are_classified_as_by_transformers(engine: str, tmp_path: Path) -> None:
    source = tagger(tmp_path / "source")
    export(source, tmp_path / "out", ExportConfig(format=engine))  # type: ignore[arg-type]
    ours = Pipeline.from_pretrained(tmp_path / "out")
    stock = stock_pipeline("token-classification", str(source))
    assert close(ours(TEXTS), stock(TEXTS))
    assert close(ours(TEXTS[0]), stock(TEXTS[0]))
    assert any(ours(TEXTS)) and {each["entity"] for row in ours(TEXTS) for each in row} == {"B-FILM", "I-FILM"}
    assert close(
        ours(TEXTS, aggregation_strategy="simple"),
        stock_pipeline("token-classification", str(source), aggregation_strategy="simple")(TEXTS),
    )


@EVERY_ENGINE
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_8_bit_is_small_and_near(engine: str, mode: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", initializer_range=0.2, hidden_size=128, intermediate_size=512)
    config = ExportConfig(format=engine, int8=mode)  # type: ignore[arg-type]
    made = export(source, tmp_path / "out", config, calibration=batches(4))
    assert (made.quantized, made.in_float) == (13, ("classifier",))
    assert made.graph_bytes < 0.5 * made.source_bytes  # the graph's text is a large part of so small a model
    wanted = stock_logits(source)
    found = Pipeline.from_pretrained(tmp_path / "out").logits(TEXTS)
    assert 1e-5 < np.abs(found - wanted).max() < 0.15 * np.abs(wanted).max()


@ENGINES["onnx"]
def test_8_bit_weights_tables_and_head_are_what_the_onnx_file_holds(tmp_path: Path) -> None:
    import onnx

    source = save_model(tmp_path / "source", **THREE)
    export(source, tmp_path / "out", ExportConfig(int8="dynamic"))
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    kinds = {tuple(each.dims): each.data_type for each in graph.initializer}
    int8, real = onnx.TensorProto.INT8, onnx.TensorProto.FLOAT
    assert kinds[17, 64] == kinds[32, 64] == int8  # words and positions, whose tables have a scale a row
    assert kinds[64, 96] == kinds[96, 64] == int8
    assert real in {kinds.get((64, 3)), kinds.get((3, 64))}


@ENGINES["openvino"]
@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_8_bit_weights_tables_and_head_are_what_the_openvino_file_holds(mode: str, tmp_path: Path) -> None:
    import openvino

    source = save_model(tmp_path / "source", **THREE)
    config = ExportConfig(format="openvino", int8=mode)  # type: ignore[arg-type]
    export(source, tmp_path / "out", config, calibration=batches(2))
    model = openvino.Core().read_model(tmp_path / "out" / "openvino_model.xml")
    kinds = {
        tuple(each.shape): each.get_element_type().get_type_name()
        for each in model.get_ops()
        if each.get_type_name() == "Constant"
    }
    assert kinds[17, 64] == kinds[32, 64] == kinds[96, 64] == kinds[64, 96] == "i8"
    assert kinds[17, 1] == kinds[3, 64] == "f32"  # scales of the table, and the head


@ENGINES["onnx"]
def test_the_file_tells_nothing_about_this_machine(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    export(source, tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        text = file.read_bytes()
        assert str(Path(torch.__file__).parent.parent).encode() not in text, file
        assert str(tmp_path).encode() not in text, file


@ENGINES["onnx"]
def test_4_bit_tables_stay_4_bit(tmp_path: Path) -> None:
    import onnx

    source = compressed(tmp_path / "source", "all_at_once")
    export(source, tmp_path / "out", ExportConfig(int8="dynamic"))
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert onnx.TensorProto.UINT8 in {each.data_type for each in graph.initializer if tuple(each.dims) == (17, 32)}


@ENGINES["onnx"]
@pytest.mark.parametrize("family", ["roberta", "electra", "mpnet", "distilbert", "albert", "modernbert"])
def test_families(family: str, tmp_path: Path) -> None:
    small = {
        "vocab_size": 17,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
        "initializer_range": 0.2,
    }
    names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
    names["intermediate_size"] = "hidden_dim"
    if family == "distilbert":
        small = {names.get(name, name): value for name, value in small.items()}
    if family == "modernbert":
        small |= {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **small))
    model.save_pretrained(tmp_path / "source")
    tiny_tokenizer().save_pretrained(tmp_path / "source")
    assert export(tmp_path / "source", tmp_path / "out").difference < 1e-5


@ENGINES["onnx"]
def test_a_floor_leaves_the_fewest_layers_in_float(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", initializer_range=0.2)
    texts = TEXTS * 3
    exact: list[np.ndarray] = []

    def score(pipeline: Pipeline) -> float:
        found = pipeline.logits(texts)
        exact.append(found)
        return 1 - float(np.abs(found - exact[0]).max() / np.abs(exact[0]).max())

    plain = export(source, tmp_path / "all", ExportConfig(int8="dynamic"))
    config = ExportConfig(int8="dynamic", floor=0.5)
    free = export(source, tmp_path / "free", config, calibration=batches(), score=score)
    assert free.in_float == plain.in_float and free.score is not None and free.score < 1
    exact.clear()
    config = ExportConfig(int8="dynamic", floor=1 - 0.7 * (1 - free.score))
    made = export(source, tmp_path / "some", config, calibration=batches(), score=score)
    assert made.score is not None and made.float_score == 1.0
    assert free.score < config.floor <= made.score  # type: ignore[operator]
    assert 0 < made.quantized < free.quantized and "classifier" in made.in_float
    note = json.loads((tmp_path / "some" / "hfcompress_export.json").read_text())["made"]
    assert note["score"] == made.score and note["in_float"] == list(made.in_float)


def test_fewest_finds_the_smallest_count_and_builds_it_last() -> None:
    for total in (1, 2, 5, 38):
        for needed in range(total):
            built: list[int] = []

            def build(count: int, needed: int = needed, built: list[int] = built) -> float:
                built.append(count)
                return 1.0 if count >= needed else 0.5

            assert fewest(total, build, 0.9) == (needed, 1.0)
            assert built[-1] == needed and len(built) <= 9


def test_a_floor_out_of_reach_says_the_best() -> None:
    with pytest.raises(CompressionError, match=r"asks for a score of 0\.9500; the best that 8 bit reaches is 0\.9000"):
        fewest(10, lambda count: 0.8 + count / 90, 0.95)


@ENGINES["onnx"]
def test_nothing_partial_is_left(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    config = ExportConfig(int8="dynamic", floor=1.0)
    scores = iter((1.0, *[0.5] * 99))
    with pytest.raises(CompressionError, match="floor"):
        export(source, tmp_path / "out", config, calibration=batches(), score=lambda pipeline: next(scores))
    assert [each.name for each in tmp_path.iterdir()] == ["source"]


def test_a_full_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="is not empty"):
        export(tmp_path / "source", tmp_path)
    assert (tmp_path / "note.txt").read_text() == "mine"


@pytest.mark.parametrize("engine", ["onnx", "openvino"])
def test_a_missing_engine_names_its_extra(engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "onnxruntime" if engine == "onnx" else "openvino"
    monkeypatch.setitem(sys.modules, name, None)
    if engine == "onnx":
        monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingBackendError, match=re.escape(f"pip install 'hfcompress[{engine}]'")):
        export(tmp_path / "source", tmp_path / "out", ExportConfig(format=engine))  # type: ignore[arg-type]


@ENGINES["onnx"]
def test_what_cannot_be_traced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertForSequenceClassification

    stock = BertForSequenceClassification.forward

    def fickle(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        if int(input_ids.sum()) % 2:
            attention_mask = attention_mask * 1
        return stock(self, input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(BertForSequenceClassification, "forward", fickle)
    with pytest.raises(UnsupportedModelError, match="cannot be traced"):
        export(save_model(tmp_path / "source"), tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == ["source"]


@ENGINES["onnx"]
def test_calibration_data_is_asked_for(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    with pytest.raises(CompressionError, match="static int8 needs calibration data"):
        export(source, tmp_path / "out", ExportConfig(int8="static"))
    with pytest.raises(CompressionError, match="a floor needs a score"):
        export(source, tmp_path / "out", ExportConfig(int8="dynamic", floor=0.9), calibration=batches())
    wrong = [{"input_ids": torch.ones(2, 3, dtype=torch.long)}]
    with pytest.raises(CompressionError, match="lacks attention_mask"):
        export(source, tmp_path / "out", ExportConfig(int8="static"), calibration=wrong)


@pytest.mark.parametrize(
    "values", [{"floor": 0.9}, {"int8": "dynamic", "floor": 1.5}, {"format": "tflite"}, {"int8": "int8"}]
)
def test_a_wrong_config_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ExportConfig(**values)


@EVERY_ENGINE
def test_a_damaged_graph_is_refused(engine: str, tmp_path: Path) -> None:
    export(save_model(tmp_path / "source"), tmp_path / "out", ExportConfig(format=engine))  # type: ignore[arg-type]
    file = tmp_path / "out" / ("model.onnx" if engine == "onnx" else "openvino_model.xml")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(hfcompress_runtime.RuntimeFolderError, match="is damaged"):
        Pipeline.from_pretrained(tmp_path / "out")


@pytest.mark.slow
@EVERY_ENGINE
def test_it_runs_where_torch_is_not_installed(engine: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    export(source, tmp_path / "out", ExportConfig(format=engine, int8="dynamic"))  # type: ignore[arg-type]
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = Path(hfcompress_runtime.__file__).parent / "scripts" / "constraints.txt"
    name = {"onnx": "onnxruntime", "openvino": "openvino"}[engine]
    install = [python, "-m", "pip", "install", "-q", "-c", constraints, "numpy", "tokenizers", name]
    subprocess.run(install, check=True)
    (tmp_path / "hfcompress_runtime.py").write_bytes(Path(hfcompress_runtime.__file__).read_bytes())
    code = (
        "import importlib.util, json, sys\n"
        "from hfcompress_runtime import Pipeline\n"
        "assert not any(importlib.util.find_spec(name) for name in ('torch', 'transformers', 'hfcompress'))\n"
        "print(json.dumps(Pipeline.from_pretrained('out')(json.loads(sys.argv[1]))))\n"
    )
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", code, json.dumps(TEXTS)], capture_output=True, text=True, cwd=tmp_path, env=clean
    )
    assert done.returncode == 0, done.stderr
    assert close(json.loads(done.stdout), Pipeline.from_pretrained(tmp_path / "out")(TEXTS))
