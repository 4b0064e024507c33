"""What the engines' own quantizers make of a float graph, as their guides say, to compare our exports with.

Each function takes a float export, a folder to write to, and calibration batches. Graph and files beside it are the
same; what differs is the quantizing.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Batches = Sequence[Mapping[str, Any]]


def _beside(plain: Path, place: Path) -> None:
    shutil.copytree(plain, place, ignore=shutil.ignore_patterns("model.onnx*", "openvino_model.*"))


def _arrays(plain: Path, batches: Batches) -> list[dict[str, np.ndarray]]:
    from hfcompress_runtime import Manifest

    names = Manifest.read(plain).inputs
    return [{name: batch[name].numpy().astype(np.int64) for name in names} for batch in batches]


def onnx_dynamic(plain: Path, place: Path, batches: Batches) -> None:
    """`quantize_dynamic` with its defaults."""
    from onnxruntime.quantization import quantize_dynamic

    _beside(plain, place)
    quantize_dynamic(plain / "model.onnx", place / "model.onnx")


def onnx_static(plain: Path, place: Path, batches: Batches) -> None:
    """`quantize_static` with its defaults."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(_arrays(plain, batches))

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
            return next(self.left, None)

    _beside(plain, place)
    quantize_static(plain / "model.onnx", place / "model.onnx", Reader())


def nncf_quantize(plain: Path, place: Path, batches: Batches) -> None:
    """`nncf.quantize` for a transformer, and nothing else said."""
    import nncf
    import openvino

    _beside(plain, place)
    _own_precision(place)
    model = openvino.Core().read_model(plain / "openvino_model.xml")
    data = nncf.Dataset(_arrays(plain, batches))
    made = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches))
    openvino.save_model(made, place / "openvino_model.xml", compress_to_fp16=False)


def nncf_weights(plain: Path, place: Path, batches: Batches) -> None:
    """`nncf.compress_weights` with its defaults."""
    import nncf
    import openvino

    _beside(plain, place)
    _own_precision(place)
    made = nncf.compress_weights(openvino.Core().read_model(plain / "openvino_model.xml"))
    openvino.save_model(made, place / "openvino_model.xml", compress_to_fp16=False)


def _own_precision(place: Path) -> None:
    """Lets OpenVINO choose what it computes the rest in, as it does unless told otherwise and as in our exports."""
    from hfcompress.deployment.companions import change_json
    from hfcompress_runtime import MANIFEST

    change_json(place / MANIFEST, {"precision": None})
