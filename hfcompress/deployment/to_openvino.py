"""Graphs for OpenVINO: written in float, and quantized to 8 bit by NNCF."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from hfcompress.deployment.to_onnx import arrays
from hfcompress.deployment.tracing import Source, module_path, quiet
from hfcompress.errors import MissingBackendError, UnsupportedModelError

FILE = "openvino_model.xml"
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
    for port, name in zip(model.outputs, source.outputs, strict=True):
        port.get_tensor().set_names({name})
    layers = _layers(program, model)
    _fuse_lookups(model)
    openvino.save_model(model, folder / FILE, compress_to_fp16=False)
    return layers


def _layers(program: torch.export.ExportedProgram, model: Any) -> Layers:
    """Finds which module each product comes from: the converter keeps the trace's names in its own."""
    paths: dict[str, str] = {}
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if node.op == "call_function" and "linear" in str(node.target) and stack:
            paths[node.name] = module_path(list(stack.values())[-1][0])
    found: dict[str, tuple[str, ...]] = {}
    for operation in model.get_ops():
        if operation.get_type_name() == "MatMul":
            name = operation.get_friendly_name()
            path = paths.get(name.split("/")[0])
            if path is not None:
                found[path] = (*found.get(path, ()), name)
    return found


def _fuse_lookups(model: Any) -> None:
    """Scales 8-bit tables before rows are looked up instead of afterwards.

    That is the form in which the processor's plugin knows a compressed table: it keeps the bytes and does both at
    once. Rows with several scales, and 4-bit tables, stay as they were traced.
    """
    from openvino import opset13

    for gather in list(model.get_ops()):
        if gather.get_type_name() != "Gather":
            continue
        convert = _only_reader(gather, "Convert")
        scaled = convert and _only_reader(convert, "Multiply")
        codes = gather.input_value(0)
        if not scaled or codes.get_element_type().get_type_name() != "i8":
            continue
        others = [scaled.input_value(index).get_node() for index in range(2)]
        scales = next((each for each in others if each.get_type_name() == "Gather"), None)
        if scales is None or list(scales.input_value(0).shape) != [codes.shape[0], 1]:
            continue
        table = opset13.multiply(opset13.convert(codes, "f32"), scales.input_value(0))
        fused = opset13.gather(table, gather.input_value(1), gather.input_value(2))
        for reader in scaled.output(0).get_target_inputs():
            reader.replace_source_output(fused.output(0))


def _only_reader(node: Any, kind: str) -> Any:
    """Returns what reads a node, if it is one operation of a kind; None otherwise."""
    readers = [target.get_node() for target in node.output(0).get_target_inputs()]
    return readers[0] if len(readers) == 1 and readers[0].get_type_name() == kind else None


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
            rows = [{name: arrays(batch[name]) for name in inputs} for batch in batches]
            model = nncf.quantize(
                model,
                nncf.Dataset(rows),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(rows),
                ignored_scope=ignored,
            )
    openvino.save_model(model, folder / FILE, compress_to_fp16=False)
