"""Exports that run in their engines; `scripts/environment_export.sh` makes an environment that has them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig, BertForTokenClassification
from transformers import pipeline as stock_pipeline

import hfcompress_runtime
from hfcompress import LayerDroppingConfig, LowRankConfig, QuantizationConfig, StructuredPruningConfig, compress
from hfcompress.deployment import ExportConfig, Pipeline, export, to_onnx
from hfcompress.deployment.export import fewest
from hfcompress.deployment.preparing import prepare
from hfcompress.deployment.tracing import Source, load, trace
from hfcompress.errors import CompressionError, ConfigError, MissingBackendError, RunFolderError, UnsupportedModelError
from hfcompress_runtime import MANIFEST
from tests.deployment.engines import ENGINE_WARNINGS, ENGINES, EVERY_ENGINE, near
from tests.other_tasks import save_task
from tests.workshop import NEVER_SAID, SPECIAL, WORDS, batches, save_model, sentences, tiny_classifier, tiny_tokenizer

TEXTS = [row["sentence"] for row in sentences(12, seed=5)]
TOKENS = len(SPECIAL + WORDS + NEVER_SAID)
LABELS = ("O", "B-FILM", "I-FILM")
# As many classes as no table has rows.
THREE: dict[str, Any] = {"id2label": dict(enumerate("abc")), "label2id": {"a": 0, "b": 1, "c": 2}}
EVERY_KIND: dict[str, Any] = {
    "classification": TEXTS[0],
    "token_classification": TEXTS[0],
    "question_answering": {"question": "good film", "context": TEXTS[1]},
    "masked_lm": "a [MASK] film",
    "causal_lm": "a very good",
}
STEPS = {
    "dense": [],
    "pruned": [StructuredPruningConfig(heads=0.4, neurons=0.3)],
    "low_rank": [LowRankConfig(keep=0.5)],
    "low_rank_heads": [LowRankConfig(keep=0.5, per_head=True, multiple_of=1)],
    "blocks_removed": [LayerDroppingConfig(part="attention"), LayerDroppingConfig(part="ffn", which="first")],
    "all_at_once": [
        StructuredPruningConfig(heads=0.4, neurons=0.3),
        LowRankConfig(keep=0.6),
        QuantizationConfig(weights="nf4", embeddings="int4"),
    ],
}
pytestmark = ENGINE_WARNINGS


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
    # Random weights of this size lose far more than trained ones.
    assert 1e-5 < np.linalg.norm(found - wanted) < 0.25 * np.linalg.norm(wanted)


@ENGINES["onnx"]
def test_what_leaves_a_layer_is_not_rounded(tmp_path: Path) -> None:
    import onnx

    source = save_model(tmp_path / "source", **THREE)
    export(source, tmp_path / "out", ExportConfig(int8="static"), calibration=batches(2))
    nodes = onnx.load(tmp_path / "out" / "model.onnx").graph.node
    made = {node.op_type: [] for node in nodes}
    for node in nodes:
        made[node.op_type] += node.output
    rounded = {node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
    assert rounded and not rounded & {*made["MatMul"], *made.get("Gemm", ())}


@ENGINES["onnx"]
def test_8_bit_weights_tables_and_head_are_what_the_onnx_file_holds(tmp_path: Path) -> None:
    import onnx

    source = save_model(tmp_path / "source", **THREE)
    export(source, tmp_path / "out", ExportConfig(int8="dynamic"))
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    kinds = {tuple(each.dims): each.data_type for each in graph.initializer}
    int8, real = onnx.TensorProto.INT8, onnx.TensorProto.FLOAT
    assert kinds[TOKENS, 64] == kinds[32, 64] == int8  # words and positions, whose tables have a scale a row
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
    assert kinds[TOKENS, 64] == kinds[32, 64] == kinds[96, 64] == kinds[64, 96] == "i8"
    assert kinds[TOKENS, 1] == kinds[3, 64] == "f32"  # scales of the table, and the head


def weights_of(file: Path) -> dict[str, np.ndarray]:
    """Returns the 8-bit weights of the linear layers: arrays by name."""
    import onnx
    from onnx import numpy_helper

    found = {}
    for each in onnx.load(file).graph.initializer:
        array = numpy_helper.to_array(each)
        if array.dtype == np.int8 and array.ndim == 2 and array.shape[0] % 32 == 0:
            found[each.name] = array
    return found


@pytest.fixture(scope="module")
def float_graph(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Path, Any]:
    folder = tmp_path_factory.mktemp("float")
    source = load(save_model(folder / "model", **THREE))
    prepare(source.model, "float")
    return source, folder, to_onnx.write(trace(source), source, folder)


@ENGINES["onnx"]
@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize("target", ["avx2", "avx512-vnni", "amx", "arm64"])
def test_a_graph_is_made_for_its_processor(target: Any, mode: Any, float_graph: Any, tmp_path: Path) -> None:
    import onnx

    source, folder, layers = float_graph
    rows = [{name: batch[name] for name in source.inputs} for batch in batches(2)]
    how: dict[str, Any] = {"mode": mode, "target": target, "layers": layers, "in_float": ["classifier"]}
    to_onnx.quantize(folder, tmp_path, **how, batches=rows, inputs=source.inputs)
    weights = weights_of(tmp_path / "model.onnx")
    largest = max(int(np.abs(array.astype(int)).max()) for array in weights.values())
    # 7 bits cannot overflow where products are summed in 16.
    assert len(weights) == 13 and (largest <= 64) == (target == "avx2") and largest <= 127
    graph = onnx.load(tmp_path / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    if mode == "dynamic":
        assert kinds.count("MatMulInteger") == 13 and "DynamicQuantizeLinear" in kinds
    else:
        arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
        points = [arrays[node.input[2]] for node in graph.node if node.op_type == "QuantizeLinear"]
        assert points and {each.dtype.name for each in points} == {"int8" if target == "arm64" else "uint8"}
        assert target != "arm64" or not any(each.any() for each in points)  # symmetric


@ENGINES["onnx"]
def test_a_graph_says_which_processor_it_is_for(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source")
    export(source, tmp_path / "out", ExportConfig(int8="dynamic", target="amx"))
    said = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert said["products"] == "vnni" and said["made"]["config"]["target"] == "amx"


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
    assert onnx.TensorProto.UINT8 in {each.data_type for each in graph.initializer if tuple(each.dims) == (TOKENS, 32)}


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


@EVERY_ENGINE
def test_a_floor_leaves_the_fewest_layers_in_float(engine: Any, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", initializer_range=0.2)
    texts = TEXTS * 3
    exact: list[np.ndarray] = []

    def score(pipeline: Pipeline) -> float:
        found = pipeline.logits(texts)
        exact.append(found)
        return 1 - float(np.abs(found - exact[0]).max() / np.abs(exact[0]).max())

    how: dict[str, Any] = {"format": engine, "int8": "dynamic"}
    plain = export(source, tmp_path / "all", ExportConfig(**how))
    config = ExportConfig(**how, floor=0.5)
    free = export(source, tmp_path / "free", config, calibration=batches(), score=score)
    assert free.in_float == plain.in_float and free.score is not None and free.score < 1
    exact.clear()
    config = ExportConfig(**how, floor=1 - 0.7 * (1 - free.score))
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


def test_what_one_onnx_file_cannot_hold_is_refused() -> None:
    with torch.device("meta"):
        large = torch.nn.Linear(30_000, 20_000)
    with pytest.raises(UnsupportedModelError, match=r"takes 2\.4 GB in float; one ONNX file holds less than 2"):
        to_onnx.refuse_large(large)
    to_onnx.refuse_large(torch.nn.Linear(3, 2))


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
    asked: list[tuple[str, Any]] = []
    for kind, given in EVERY_KIND.items():
        if kind == "classification":
            save_model(tmp_path / kind / "model")
        else:
            save_task(tmp_path / kind, kind, train=4, validation=4)
        config = ExportConfig(format=engine, int8="dynamic")  # type: ignore[arg-type]
        export(tmp_path / kind / "model", tmp_path / kind / "out", config)
        asked.append((f"{kind}/out", given))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    package = Path(hfcompress_runtime.__file__).parent
    constraints = package.parent / "scripts" / "constraints.txt"
    name = {"onnx": "onnxruntime", "openvino": "openvino"}[engine]
    install = [python, "-m", "pip", "install", "-q", "-c", constraints, "numpy", "tokenizers", name]
    subprocess.run(install, check=True)
    shutil.copytree(package, tmp_path / "hfcompress_runtime", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import importlib.util, json, sys\n"
        "from hfcompress_runtime import Pipeline\n"
        "assert not any(importlib.util.find_spec(name) for name in ('torch', 'transformers', 'hfcompress', 'PIL'))\n"
        "print(json.dumps([Pipeline.from_pretrained(place)(asked) for place, asked in json.loads(sys.argv[1])]))\n"
    )
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-c", code, json.dumps(asked)], capture_output=True, text=True, cwd=tmp_path, env=clean
    )
    assert done.returncode == 0, done.stderr
    for (place, given), found in zip(asked, json.loads(done.stdout), strict=True):
        assert near(found, Pipeline.from_pretrained(tmp_path / place)(given))
