"""Real checkpoints, every kind of method: saved, loaded in a fresh process, equal bit by bit, and once more.

MiniLM and MPNet come from the package index, as the demo's do. SmolLM2 is unpacked by a script beside the project.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hfcompress import compress
from hfcompress.modeling.anatomy import embedding_paths
from hfcompress.modeling.layers.bitsandbytes import kind_of
from hfcompress.modeling.layers.quantized_embedding import QuantizedEmbedding
from hfcompress.modeling.layers.tied import LowRankEmbedding
from hfcompress.tasks import fetch_model
from hfcompress.tasks.fetching import cache_folder
from tests.matrix.cells import HERE, METHODS, Cell
from tests.matrix.making import keep, require_uneven
from tests.matrix.running import ROOT, in_fresh_process
from tests.tiny_models import run

pytestmark = pytest.mark.slow

UNPACKER = ROOT.parent / "shared" / "models" / "get.py"
FAMILIES = {"minilm-l6": "bert", "mpnet-base": "mpnet", "smollm2": "llama"}
TEXTS = [
    "The film was slow at first, but its last half hour is among the best of the year.",
    "A committee of the city council will vote on the new bridge in March.",
    "She opened the letter, read it twice, and put it back without a word.",
    "Rates rose again, and the bank said that it expects no change before summer.",
]


def folder_of(name: str) -> Path:
    """Returns the checkpoint's folder; fetches it once."""
    if name != "smollm2":
        return fetch_model(f"demo/{name}", progress=False)
    folder = cache_folder() / "models" / name
    if not folder.exists():
        if not UNPACKER.exists():
            pytest.skip(f"SmolLM2 is unpacked by shared/models/{UNPACKER.name} beside the project, which is not there")
        if importlib.util.find_spec("gguf") is None:
            pytest.skip("SmolLM2 comes as GGUF, and the package gguf is not installed")
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, str(UNPACKER), name, str(folder)], check=True)
    return folder


def load(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Returns the model with a task head, and inputs for it."""
    folder = folder_of(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)  # the classifier's weights are new
    if name == "smollm2":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)  # as its files are
        inputs = tokenizer(TEXTS[1:2], return_tensors="pt")
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    return model.eval(), {key: inputs[key] for key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("method", [name for name in HERE if name != "vocabulary"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_real_model_reloads_exactly(name: str, method: str) -> None:
    model, inputs = load(name)
    before = run(model, inputs)[0]
    cell = Cell(
        family=FAMILIES[name], head="CausalLM" if name == "smollm2" else "SequenceClassification", method=method
    )
    compress(model, METHODS[method](model), calibration=[inputs])
    after = run(model, inputs)[0]
    assert after.isfinite().all() and not torch.equal(after, before)
    if method in ("heads and neurons", "low rank", "chain"):
        require_uneven(cell, model)
    if method in ("int8", "nf4", "chain"):
        assert {kind_of(module) for module in model.modules()} - {None} == {"int8" if method == "int8" else "nf4"}
    tables = [type(model.base_model.get_submodule(path)) for path in embedding_paths(model)]
    if method in ("embeddings int8", "embeddings int4", "chain"):
        assert set(tables) == {QuantizedEmbedding}
    if method == "embeddings low rank":
        assert LowRankEmbedding in tables
    with tempfile.TemporaryDirectory() as text:  # hundreds of megabytes: they go at once
        place = Path(text) / "cell"
        place.mkdir()
        keep(cell, model, inputs, place)
        assert in_fresh_process("checking", text) == {"cell": ""}
