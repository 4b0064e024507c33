"""The runtime's own checks, which need no engine."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hfcompress_runtime
from hfcompress_runtime import MANIFEST, Manifest, Pipeline, RuntimeFolderError

WHOLE: dict[str, Any] = {
    "format": 1,
    "engine": "onnx",
    "file": "model.onnx",
    "task": "text-classification",
    "inputs": ["input_ids", "attention_mask"],
    "labels": ["negative", "positive"],
    "scores": "softmax",
    "max_length": 32,
    "padding": {"id": 0, "type_id": 0, "token": "[PAD]", "side": "right"},
    "truncation_side": "right",
    "precision": None,
}


def write(folder: Path, **changes: Any) -> Path:
    (folder / MANIFEST).write_text(json.dumps(WHOLE | changes))
    return folder


def test_a_whole_manifest_is_read(tmp_path: Path) -> None:
    read = Manifest.read(write(tmp_path))
    assert (read.labels, read.inputs, read.max_length) == (
        ("negative", "positive"),
        ("input_ids", "attention_mask"),
        32,
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "format is 2, this version reads 1"),
        ({"engine": "tensorrt"}, "'engine'"),
        ({"file": "../model.onnx"}, "'file'"),
        ({"file": "/etc/passwd"}, "'file'"),
        ({"file": ".."}, "'file'"),
        ({"labels": []}, "'labels'"),
        ({"labels": "ab"}, "'labels'"),
        ({"max_length": 0}, "'max_length'"),
        ({"padding": {"id": 0}}, "'padding'"),
        ({"precision": "f8"}, "'precision'"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RuntimeFolderError, match=said.replace("'", ".")):
        Manifest.read(write(tmp_path, **changes))


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_manifest_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(RuntimeFolderError):
        Manifest.read(tmp_path)


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFolderError, match="`hfcompress export` did not write it"):
        Pipeline.from_pretrained(tmp_path)


def test_a_missing_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFolderError, match=r"model\.onnx is missing"):
        Pipeline.from_pretrained(write(tmp_path))


def test_precision_is_openvinos(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFolderError, match="choice of OpenVINO"):
        Pipeline.from_pretrained(write(tmp_path), precision="bf16")


def test_importing_it_loads_neither_torch_nor_the_package() -> None:
    code = "import sys, hfcompress_runtime; print(sorted({'torch', 'transformers', 'hfcompress'} & sys.modules.keys()))"
    folder = Path(hfcompress_runtime.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.stdout.strip() == "[]", done.stderr


def test_it_names_nothing_but_its_few_requirements() -> None:
    tree = ast.parse(Path(hfcompress_runtime.__file__).read_text(encoding="utf-8"))
    named = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    named |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = {name.split(".")[0] for name in named} - sys.stdlib_module_names
    assert outside == {"numpy", "tokenizers"}
