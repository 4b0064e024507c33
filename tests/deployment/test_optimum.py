"""Optimum's own classes read what we export; `scripts/environment_optimum.sh` makes the environment that has them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hfcompress.deployment import ExportConfig, Pipeline, export
from hfcompress.deployment.tracing import example, load
from tests.deployment.engines import ENGINE_WARNINGS, EVERY_ENGINE
from tests.other_tasks import save_task
from tests.tiny_models import make
from tests.workshop import save_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("HFCOMPRESS_OPTIMUM", ROOT / ".venv-optimum/bin/python"))
pytestmark = [
    ENGINE_WARNINGS,
    pytest.mark.slow,
    pytest.mark.timeout(1800),  # eight exports, and libraries that take their time to be imported
    pytest.mark.skipif(not PYTHON.exists(), reason="scripts/environment_optimum.sh has not made .venv-optimum"),
]
HEADS = {
    "ForSequenceClassification": "",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "ForMaskedLM": "masked_lm",
    "ForCausalLM": "causal_lm",
    "ForImageClassification": "image_classification",
    "ForFeatureExtraction": "features",
}


def checkpoint(folder: Path, kind: str) -> Path:
    if not kind:
        return save_model(folder / "model", initializer_range=0.2)
    if kind == "features":
        make("bert", "").save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
    else:
        save_task(folder, kind, train=4, validation=4)
    return folder / "model"


@EVERY_ENGINE
def test_optimum_opens_our_folders_and_computes_the_same(engine: str, tmp_path: Path) -> None:
    jobs: list[dict[str, Any]] = []
    wanted: list[dict[str, np.ndarray]] = []
    for head, kind in HEADS.items():
        place = tmp_path / head
        source = checkpoint(place, kind)
        forms: list[dict[str, Any]] = [{}, {"int8": "dynamic"}] if not kind else [{}]
        for number, how in enumerate(forms):
            folder = place / f"out-{number}"
            export(source, folder, ExportConfig(format=engine, **how))  # type: ignore[arg-type]
            inputs = example(load(source), 3, 7)
            ours = Pipeline.from_pretrained(folder, precision="f32" if engine == "openvino" else None)
            wanted.append(ours.outputs({name: value.numpy() for name, value in inputs.items()}))
            values = {name: value.tolist() for name, value in inputs.items()}
            jobs.append({"folder": str(folder), "engine": engine, "class": head, "inputs": values})
    script = [str(PYTHON), str(Path(__file__).with_name("optimum_reading.py")), json.dumps(jobs)]
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=clean | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    for job, outputs, found in zip(jobs, wanted, json.loads(done.stdout.splitlines()[-1]), strict=True):
        for name, value in outputs.items():
            largest = float(np.abs(value).max())
            assert np.abs(np.array(found[name]) - value).max() <= 1e-5 * largest, (job["class"], name)
