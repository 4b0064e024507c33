"""From a checkpoint folder to an exported one, there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from hfcompress.configuration import Config
from hfcompress.deployment import companions, to_onnx, to_openvino, tracing
from hfcompress.deployment.heads import WRITTEN
from hfcompress.deployment.preparing import Embeddings, prepare
from hfcompress.deployment.tracing import Source
from hfcompress.errors import CheckpointError, CompressionError, RunFolderError
from hfcompress.modeling.anatomy import base_model
from hfcompress.modeling.checkpoint import replace_directory
from hfcompress.modeling.measure import weight_bytes
from hfcompress_runtime import MANIFEST, Pipeline

Batch = Mapping[str, torch.Tensor]
Score = Callable[[Pipeline], float]
# A float graph that is further from its checkpoint than this computes something else.
_LARGEST_DIFFERENCE = 1e-4
_SHAPES = ((2, 9), (1, 1), (3, 24), (1, 40))


class ExportConfig(Config):
    """How to export.

    Attributes:
        format: The engine: `onnx` for ONNX Runtime, `openvino`.
        int8: Quantize linear layers of the base model to 8 bit: `dynamic` needs no data, `static` needs calibration
            batches; None leaves them in float. Task heads stay in float.
        embeddings: What float embedding tables become: `float`, `int8` with a scale a row, `int4` with a scale
            for 32 neighbours; None for `int8` where `int8` is set and `float` elsewhere. Tables that are
            quantized already stay as they are.
        target: The processor that an 8-bit ONNX graph is made for. OpenVINO decides when it loads.
        floor: The share of the float graph's score that the 8-bit one must keep: as few layers as that takes stay in
            float. None to leave none.
    """

    format: Literal["onnx", "openvino"] = "onnx"
    int8: Literal["dynamic", "static"] | None = None
    embeddings: Embeddings | None = None
    target: to_onnx.Target = "avx512-vnni"
    floor: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _floor_needs_int8(self) -> Self:
        if self.floor is not None and self.int8 is None:
            raise ValueError("floor says what int8 must keep; set int8, or leave floor out")
        return self

    @property
    def tables(self) -> Embeddings:
        """What float embedding tables become."""
        return self.embeddings or ("int8" if self.int8 else "float")


@dataclass(frozen=True, kw_only=True)
class Export:
    """What an export has written.

    Attributes:
        folder: Where it is.
        difference: The largest difference between the float graph's logits and the checkpoint's, over the largest
            logit, on random inputs of several shapes.
        source_bytes: Of the checkpoint's weight files.
        graph_bytes: Of the exported graph, weights included.
        quantized: How many linear layers are in 8 bit.
        in_float: The linear layers that are not.
        score: The exported graph's, where a floor was asked for.
        float_score: The float graph's, likewise.
    """

    folder: Path
    difference: float
    source_bytes: int
    graph_bytes: int
    quantized: int
    in_float: tuple[str, ...]
    score: float | None = None
    float_score: float | None = None


def export(
    directory: Path | str,
    output: Path | str,
    config: ExportConfig | None = None,
    *,
    calibration: Sequence[Batch] = (),
    score: Score | None = None,
) -> Export:
    """Exports a checkpoint: dense, pruned, low-rank, distilled or quantized at rest.

    Weights that bitsandbytes holds are exported as the float values that they stand for.

    Args:
        directory: A checkpoint folder with its tokenizer.
        output: Where the export goes; must not exist, or be empty.
        config: How; the defaults when None.
        calibration: Batches of model inputs, for `int8="static"` and for `floor`.
        score: Judges a graph; higher is better. For `floor`; must not look at the data that results are reported on.

    Raises:
        RunFolderError: `output` holds something.
        MissingBackendError: The engine is not installed.
        CheckpointError: The checkpoint does not load, or `output` cannot be written.
        UnsupportedModelError: Its head or its code cannot be exported.
        CompressionError: Calibration batches or a score are missing or unusable, or the floor cannot be reached.
    """
    config = config or ExportConfig()
    directory, output = Path(directory), Path(output)
    _refuse_full(output)
    _require(config)
    _require_data(config, calibration, score)
    source = tracing.load(directory, fused_attention=config.format == "openvino")
    batches = [_batch(each, source) for each in calibration]
    # A vocabulary's output layer multiplies most of all: the engine quantizes it, apart from the table.
    prepare(source.model, config.tables, outputs_apart=config.int8 is not None)
    program = tracing.trace(source)
    scratch = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        plain = scratch / "float"
        plain.mkdir(parents=True)
        engine = _Engine(config, source, batches)
        engine.write(program, plain)
        difference = _difference(source, plain)
        made = scratch / "made"
        chosen = engine.quantize(plain, made, score) if config.int8 else _Choice()
        final = made if config.int8 else plain
        result = Export(
            folder=output,
            difference=difference,
            source_bytes=weight_bytes(directory),
            graph_bytes=sum(file.stat().st_size for file in final.glob(f"{Path(engine.file).stem}.*")),
            quantized=chosen.quantized,
            in_float=chosen.in_float if config.int8 else tuple(engine.layers),
            score=chosen.score,
            float_score=chosen.float_score,
        )
        _note(final, result, config)
        replace_directory(final, output)
    except OSError as error:
        raise CheckpointError(f"{output} could not be written: {error}", hint="Choose another place.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return result


def _refuse_full(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunFolderError(f"{output} is not empty", hint="Choose a new folder.")


def _require(config: ExportConfig) -> None:
    if config.format == "onnx":
        to_onnx.require()
    else:
        to_openvino.require(quantizing=config.int8 is not None)


def _require_data(config: ExportConfig, calibration: Sequence[Batch], score: Score | None) -> None:
    if not calibration and (config.int8 == "static" or config.floor is not None):
        why = "static int8" if config.int8 == "static" else "a floor"
        raise CompressionError(
            f"{why} needs calibration data, and there is none",
            hint="Pass calibration=[batch, ...]: mappings of model inputs such as a tokenizer returns.",
        )
    if config.floor is not None and score is None:
        raise CompressionError("a floor needs a score to hold", hint="Pass score=...: a function of a Pipeline.")


def _batch(batch: Batch, source: Source) -> dict[str, torch.Tensor]:
    if source.head.writes and WRITTEN not in batch and "labels" in batch:
        # A decoder reads what is right up to each place, as in training.
        shifted = cast(Any, source.model).prepare_decoder_input_ids_from_labels(labels=batch["labels"])
        batch = {**batch, WRITTEN: shifted}
    missing = [name for name in source.inputs if name not in batch]
    if missing:
        raise CompressionError(
            f"a calibration batch lacks {', '.join(missing)}; it has {', '.join(batch) or 'nothing'}",
            hint="Use what the checkpoint's own tokenizer returns.",
        )
    return {name: batch[name] for name in source.inputs}


@dataclass(frozen=True, kw_only=True)
class _Choice:
    quantized: int = 0
    in_float: tuple[str, ...] = ()
    score: float | None = None
    float_score: float | None = None


class _Engine:
    """Writes and quantizes the graphs of one export."""

    def __init__(self, config: ExportConfig, source: Source, batches: Sequence[Batch]) -> None:
        self.config = config
        self.source = source
        self.batches = batches
        self.room: Any = to_onnx if config.format == "onnx" else to_openvino
        self.file: str = self.room.FILE
        self.layers: Mapping[str, tuple[str, ...]] = {}

    @property
    def _products(self) -> str | None:
        """Says where 8-bit products must not run: they may overflow on x86 processors without VNNI."""
        unsafe = self.config.format == "onnx" and self.config.int8 and self.config.target in ("avx512-vnni", "amx")
        return "vnni" if unsafe else None

    def write(self, program: torch.export.ExportedProgram, folder: Path) -> None:
        """Writes the float graph and what the runtime needs beside it."""
        self.layers = self.room.write(program, self.source, folder)
        companions.write(self.source, folder, self.config.format, self.file)

    def quantize(self, plain: Path, made: Path, score: Score | None) -> _Choice:
        """Quantizes, and leaves in float the task head and what the floor asks for."""
        inside = _base_layers(self.source.model)
        heads = [path for path in self.layers if path not in inside]
        open_to = [path for path in self.layers if path in inside]
        if not open_to:
            raise CompressionError("no linear layer of the base model was found in the graph, so int8 has no object")
        if self.config.floor is None or score is None:
            self._build(plain, made, heads)
            return _Choice(quantized=len(open_to), in_float=tuple(heads))
        noise = tracing.rounding_noise(self.source, self.batches)
        order = sorted(open_to, key=lambda path: -noise[path])
        wanted = score(Pipeline.from_pretrained(plain))

        def build(count: int) -> float:
            self._build(plain, made, [*heads, *order[:count]])
            return score(Pipeline.from_pretrained(made))

        count, reached = fewest(len(order), build, self.config.floor * wanted)
        return _Choice(
            quantized=len(order) - count,
            in_float=(*heads, *order[:count]),
            score=reached,
            float_score=wanted,
        )

    def _build(self, plain: Path, made: Path, in_float: Sequence[str]) -> None:
        shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(plain, made, ignore=shutil.ignore_patterns(f"{Path(self.file).stem}.*"))
        # Eight bits err more than bfloat16 does in what is left.
        companions.change_json(made / MANIFEST, {"precision": None, "products": self._products})
        run = self.room.quantize
        if self.config.format == "onnx":
            run = partial(run, target=self.config.target)
        run(
            plain,
            made,
            mode=self.config.int8,
            layers=self.layers,
            in_float=in_float,
            batches=self.batches,
            inputs=self.source.inputs,
        )


def fewest(total: int, build: Callable[[int], float], least: float) -> tuple[int, float]:
    """Finds the smallest count whose score holds, by halving, and leaves that one built last.

    It takes scores to grow with the count. Where they do not, what is returned still holds.

    Args:
        total: The largest count that makes sense to try is one less: with all of them, nothing is left.
        build: Builds what a count means and returns its score.
        least: The score to reach.

    Raises:
        CompressionError: No count below `total` that was tried reaches it; the message says the best that does.
    """
    seen: dict[int, float] = {0: build(0)}
    if seen[0] >= least:
        return 0, seen[0]
    low, high = 0, total - 1
    if high > 0:
        seen[high] = build(high)
    if seen[high] < least:
        count, best = max(seen.items(), key=lambda item: item[1])
        raise CompressionError(
            f"the floor asks for a score of {least:.4f}; the best that 8 bit reaches is {best:.4f}, "
            f"with {count} of {total} layers in float",
            hint="Lower the floor, or export in float.",
        )
    while high - low > 1:
        middle = (low + high) // 2
        seen[middle] = build(middle)
        if seen[middle] >= least:
            high = middle
        else:
            low = middle
    return high, seen[high] if list(seen)[-1] == high else build(high)


def _base_layers(model: Any) -> set[str]:
    """Returns the paths, in the whole model, of the base model's linear layers and of a vocabulary's output layer."""
    base = base_model(model)
    inside = {id(module) for module in base.modules() if isinstance(module, nn.Linear)}
    inside.add(id(model.get_output_embeddings()))
    return {name for name, module in model.named_modules() if id(module) in inside}


def _difference(source: Source, folder: Path) -> float:
    """Compares the written float graph with the model on random inputs of several shapes."""
    pipeline = Pipeline.from_pretrained(folder)
    largest, off = dict.fromkeys(source.outputs, 0.0), dict.fromkeys(source.outputs, 0.0)
    for seed, (rows, tokens) in enumerate(_SHAPES):
        inputs = tracing.example(source, rows, tokens, seed)
        wanted = dict(zip(source.outputs, tracing.reference(source, inputs), strict=True))
        found = pipeline.outputs({name: value.numpy() for name, value in inputs.items()})
        for name, values in found.items():
            largest[name] = max(largest[name], float(wanted[name].abs().max()))
            off[name] = max(off[name], float(np.abs(values - wanted[name].numpy()).max()))
    difference = max(off[name] / largest[name] if largest[name] else off[name] for name in source.outputs)
    if not difference <= _LARGEST_DIFFERENCE:
        raise CompressionError(
            f"the exported graph's outputs differ from the checkpoint's by {difference:.1e} of the largest one",
            hint="The engine computes this model in another way; try the other --format.",
        )
    return difference


def _note(folder: Path, result: Export, config: ExportConfig) -> None:
    """Adds to the manifest how the graph was made; the runtime does not read it."""
    made = {
        "config": config.model_dump(mode="json"),
        "hfcompress": version("hfcompress"),
        "difference": result.difference,
        "graph_bytes": result.graph_bytes,
        "source_bytes": result.source_bytes,
        "quantized": result.quantized,
        "in_float": list(result.in_float),
        "score": result.score,
        "float_score": result.float_score,
    }
    companions.change_json(folder / MANIFEST, {"made": made})
