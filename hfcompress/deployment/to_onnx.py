"""Graphs for ONNX Runtime: written in float, and quantized to 8 bit."""

from __future__ import annotations

import ast
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from hfcompress.deployment.tracing import Source, module_path, quiet
from hfcompress.errors import MissingBackendError, UnsupportedModelError

FILE = "model.onnx"
Target = Literal["avx2", "avx512-vnni", "amx", "arm64"]
Layers = Mapping[str, tuple[str, ...]]
_LARGEST_FILE = 2_000_000_000


def require() -> None:
    """Imports what the export needs.

    Raises:
        MissingBackendError: onnx, onnxscript or onnxruntime is not installed.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise MissingBackendError(
            f"the export to ONNX needs {error.name}, which is not installed", hint="pip install 'hfcompress[onnx]'"
        ) from error
    assert onnx and onnxruntime and onnxscript


def write(program: torch.export.ExportedProgram, source: Source, folder: Path) -> Layers:
    """Writes a traced model as a float graph.

    Args:
        program: The trace.
        source: What was traced.
        folder: Where the graph goes, as `FILE`.

    Returns:
        The names of the matrix products in the graph, by the path of the layer that they come from.

    Raises:
        UnsupportedModelError: An operation has no counterpart in ONNX, or the graph would be over 2 GB.
    """
    import onnx

    refuse_large(source.model)
    try:
        with quiet():
            made = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(source.inputs),
                output_names=list(source.outputs),
                verbose=False,
            )
        assert made is not None
        graph = made.model_proto
    except Exception as error:  # the exporter has many classes of errors, most of them private
        said = str(error).strip().splitlines()
        raise UnsupportedModelError(
            f"{type(source.model).__name__} cannot be written as ONNX: {said[0] if said else type(error).__name__}"
        ) from error
    layers = _layers(graph)
    _forget_origin(graph)
    onnx.save(graph, folder / FILE)
    return layers


def refuse_large(model: torch.nn.Module) -> None:
    """Refuses what one ONNX file cannot hold: its format ends at 2 GB.

    Raises:
        UnsupportedModelError: The tensors take more.
    """
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}.values()
    size = sum(each.numel() * each.element_size() for each in tensors)
    if size >= _LARGEST_FILE:
        raise UnsupportedModelError(
            f"{type(model).__name__} takes {size / 1e9:.1f} GB in float; one ONNX file holds less than 2",
            hint="Use --format openvino.",
        )


def _layers(graph: Any) -> Layers:
    """Finds which module each product with a constant comes from; the exporter notes it on the nodes."""
    constants = {each.name for each in graph.graph.initializer}
    found: dict[str, tuple[str, ...]] = {}
    for node in graph.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants:
            notes = {entry.key: entry.value for entry in node.metadata_props}
            scopes = ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))
            path = module_path(next((each for each in reversed(scopes[:-1]) if each), ""))
            found[path] = (*found.get(path, ()), node.name)
    return found


def _forget_origin(graph: Any) -> None:
    """Drops notes about the source code, paths on this machine among them, and stale shapes.

    Shapes that the exporter inferred contradict those of the quantizer.
    """
    del graph.metadata_props[:]
    del graph.graph.metadata_props[:]
    del graph.graph.value_info[:]
    graph.graph.doc_string = graph.doc_string = ""
    for node in graph.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for part in (graph.graph.initializer, graph.graph.input, graph.graph.output):
        for each in part:
            del each.metadata_props[:]
    for function in graph.functions:
        del function.metadata_props[:]
        for node in function.node:
            del node.metadata_props[:]


def quantize(
    float_folder: Path,
    folder: Path,
    *,
    mode: Literal["dynamic", "static"],
    target: Target,
    layers: Layers,
    in_float: Collection[str],
    batches: Sequence[Mapping[str, torch.Tensor]],
    inputs: Sequence[str],
) -> None:
    """Quantizes the products of a float graph.

    Weights get a scale for each output. Inputs of a layer get one scale each time it runs (`dynamic`), or one that
    is found on calibration batches (`static`).

    Args:
        float_folder: Where `write` wrote.
        folder: Where the quantized graph goes.
        mode: How the scales of inputs are found.
        target: The processor: `avx2` has no 8-bit products that cannot overflow, so weights get 7 bits there;
            `avx512-vnni` and `amx` take the same graph, of unsigned inputs and signed weights; `arm64` prefers
            signed inputs, which `dynamic` cannot give it (ONNX rounds inputs to unsigned numbers there).
        layers: What `write` returned.
        in_float: Paths of the layers that stay as they are.
        batches: For `static`.
        inputs: Names of the graph's inputs.
    """
    from onnxruntime import quantization

    # The quantizer first turns `Gemm` into `MatMul`, under another name, and then looks for the names it was given.
    excluded = [name for path in in_float for node in layers.get(path, ()) for name in (node, f"{node}_MatMul")]
    common: dict[str, Any] = {
        "op_types_to_quantize": ["MatMul", "Gemm"],
        "per_channel": True,
        "reduce_range": target == "avx2",
        "weight_type": quantization.QuantType.QInt8,
        "nodes_to_exclude": excluded,
    }
    source, place = float_folder / FILE, folder / FILE
    with quiet(), _root_silenced():
        if mode == "dynamic":
            quantization.quantize_dynamic(source, place, extra_options={"MatMulConstBOnly": True}, **common)
        else:
            signed = target == "arm64"
            kinds = quantization.QuantType
            options = {
                "MatMulConstBOnly": True,
                "ActivationSymmetric": signed,
                "WeightSymmetric": True,
                # Else products are rounded again as they leave a layer, which costs most of the quality and no time.
                "OpTypesToExcludeOutputQuantization": common["op_types_to_quantize"],
            }
            quantization.quantize_static(
                source,
                place,
                _reader(batches, inputs),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=kinds.QInt8 if signed else kinds.QUInt8,
                extra_options=options,
                **common,
            )


def _root_silenced() -> Any:
    """The quantizer advises on the root logger to run a preprocessing that does not take these graphs."""
    import contextlib

    @contextlib.contextmanager
    def silenced() -> Iterator[None]:
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)
        try:
            yield
        finally:
            root.setLevel(level)

    return silenced()


def arrays(values: torch.Tensor) -> np.ndarray:
    """Returns a tensor in the dtype that graphs take: int64 of ids, float32 of pixel values."""
    return values.numpy().astype(np.float32 if values.is_floating_point() else np.int64)


def _reader(batches: Sequence[Mapping[str, torch.Tensor]], inputs: Sequence[str]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
            batch = next(self._left, None)
            return None if batch is None else {name: arrays(batch[name]) for name in inputs}

    return Reader()
