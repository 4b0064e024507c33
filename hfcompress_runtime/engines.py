"""The graph in its engine: ONNX Runtime or OpenVINO."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hfcompress_runtime.manifest import Manifest, RuntimeFolderError

Arrays = Mapping[str, np.ndarray]
_CAPABILITIES = {"bf16": "BF16", "f16": "FP16"}


class _OnnxSession:
    def __init__(self, file: Path, outputs: tuple[str, ...], threads: int | None, precision: str | None) -> None:
        onnxruntime = _engine("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self._outputs = list(outputs)

    def run(self, inputs: Arrays) -> list[np.ndarray]:
        return self._session.run(self._outputs, dict(inputs))


class _OpenVinoSession:
    def __init__(self, file: Path, outputs: tuple[str, ...], threads: int | None, precision: str | None) -> None:
        openvino = _engine("openvino")
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        core = openvino.Core()
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        if precision is not None:
            options["INFERENCE_PRECISION_HINT"] = precision
        if precision == "f32":
            # Else inputs of layers whose weights are bytes are rounded to bytes as well.
            options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        needed = _CAPABILITIES.get(precision or "")
        if needed and needed not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise RuntimeFolderError(f"this processor does not compute in {precision}\nuse precision='f32'")
        self._model = core.compile_model(str(file), "CPU", options)
        self._outputs = outputs

    def run(self, inputs: Arrays) -> list[np.ndarray]:
        found = self._model(dict(inputs))
        return [np.array(found[name]) for name in self._outputs]


_SESSIONS = {"onnx": _OnnxSession, "openvino": _OpenVinoSession}


def open_graph(folder: Path, manifest: Manifest, threads: int | None, precision: str | None) -> Any:
    """Opens a folder's graph.

    Raises:
        RuntimeFolderError: The engine is not installed, or the processor lacks what the graph needs.
    """
    require_products(manifest.products)
    made = _SESSIONS[manifest.engine]
    return made(folder / manifest.file, manifest.outputs, threads, precision or manifest.precision)


def require_products(products: str | None, flags: frozenset[str] | None = None) -> None:
    """Refuses 8-bit products that this processor would compute with overflow, and so wrongly.

    Args:
        products: What the manifest says.
        flags: The processor's; those of this machine when None. Where they cannot be read nothing is refused.

    Raises:
        RuntimeFolderError: An x86 processor without VNNI has a graph that needs it.
    """
    flags = _flags() if flags is None else flags
    if products == "vnni" and flags and not flags & {"avx512_vnni", "avx_vnni"}:
        raise RuntimeFolderError(
            "this graph is for processors with VNNI, which this one lacks: its 8-bit products could overflow here\n"
            "export it again with --target avx2"
        )


def _flags() -> frozenset[str]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), ()))


def _engine(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeFolderError(f"this folder needs {name}, which is not installed\npip install {name}") from error
