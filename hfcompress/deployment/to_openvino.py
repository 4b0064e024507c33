"""Graphs for OpenVINO: written in float, and quantized to 8 bit by NNCF."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from hfcompress.deployment.tracing import Source, quiet
from hfcompress.errors import MissingBackendError, UnsupportedModelError

FILE = "openvino_model.xml"
OUTPUT = "logits"
Layers = Mapping[str, tuple[str, ...]]


def require(*, quantizing: bool) -> None:
    """Imports what the export needs.

    Raises:
        MissingBackendError: openvino is not installed, or nncf is not and is needed.
    """
    try:
        import openvino

        if quantizing:
            import nncf

            assert nncf
    except ImportError as error:
        raise MissingBackendError(
            f"the export to OpenVINO needs {error.name}, which is not installed",
            hint="pip install 'hfcompress[openvino]'",
        ) from error
    assert openvino


def write(program: torch.export.ExportedProgram, source: Source, folder: Path) -> Layers:
    """Writes a traced model as a float graph.

    Args:
        program: The trace.
        source: What was traced.
        folder: Where the graph goes, as `FILE` and its weights beside it.

    Returns:
        The names of the matrix products in the graph, by the path of the layer that they come from.

    Raises:
        UnsupportedModelError: An operation has no counterpart in OpenVINO.
    """
    import openvino

    try:
        with quiet():
            model = openvino.convert_model(program)
    except Exception as error:  # the converter raises whatever its operations do
        said = str(error).strip().splitlines()
        raise UnsupportedModelError(
            f"{type(source.model).__name__} cannot be written for OpenVINO: {said[0] if said else 'no reason given'}"
        ) from error
    for port, name in zip(model.inputs, source.inputs, strict=True):
        port.get_node().set_friendly_name(name)
        port.get_tensor().set_names({name})
    model.outputs[0].get_tensor().set_names({OUTPUT})
    layers = _layers(program, model)
    openvino.save_model(model, folder / FILE, compress_to_fp16=False)
    return layers


def _layers(program: torch.export.ExportedProgram, model: Any) -> Layers:
    """Finds which module each product comes from: the converter keeps the trace's names in its own."""
    paths: dict[str, str] = {}
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if node.op == "call_function" and "linear" in str(node.target) and stack:
            paths[node.name] = list(stack.values())[-1][0].removeprefix("model.")
    found: dict[str, tuple[str, ...]] = {}
    for operation in model.get_ops():
        if operation.get_type_name() == "MatMul":
            name = operation.get_friendly_name()
            path = paths.get(name.split("/")[0])
            if path is not None:
                found[path] = (*found.get(path, ()), name)
    return found


def quantize(
    float_folder: Path,
    folder: Path,
    *,
    mode: Literal["dynamic", "static"],
    layers: Layers,
    in_float: Collection[str],
    batches: Sequence[Mapping[str, torch.Tensor]],
    inputs: Sequence[str],
) -> None:
    """Quantizes the products of a float graph.

    `dynamic` stores 8-bit weights with a scale for each output, and leaves it to the processor's plugin what it
    does with the inputs. `static` quantizes inputs too, by scales that are found on calibration batches.

    Args:
        float_folder: Where `write` wrote.
        folder: Where the quantized graph goes.
        mode: Which of the two.
        layers: What `write` returned.
        in_float: Paths of the layers that stay as they are.
        batches: For `static`.
        inputs: Names of the graph's inputs.
    """
    import nncf
    import openvino

    model = openvino.Core().read_model(float_folder / FILE)
    names = [name for path in in_float for name in layers.get(path, ())]
    # Tables are quantized already or meant to be float; their scales must not be taken for tables.
    ignored = nncf.IgnoredScope(names=names, types=["Gather"], validate=False)
    with quiet():
        if mode == "dynamic":
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=ignored)
        else:
            rows = [{name: batch[name].numpy().astype(np.int64) for name in inputs} for batch in batches]
            model = nncf.quantize(
                model,
                nncf.Dataset(rows),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(rows),
                ignored_scope=ignored,
            )
    openvino.save_model(model, folder / FILE, compress_to_fp16=False)
