"""The engines that are installed here; `scripts/environment_export.sh` makes an environment that has them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

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
# The engines' own code warns of its own future.
ENGINE_WARNINGS = pytest.mark.filterwarnings("ignore:::(onnx|onnxscript|onnxruntime|openvino|nncf|torch|copyreg)")


def near(found: Any, wanted: Any) -> bool:
    """Compares what pipelines return; numbers within 1e-5."""
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(near(*pair) for pair in zip(found, wanted, strict=True))
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(near(found[key], wanted[key]) for key in wanted)
    return abs(found - wanted) < 1e-5 if isinstance(wanted, float) else found == wanted
