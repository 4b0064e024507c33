"""What lies beside a graph: the tokenizer or the image settings, the config, and the manifest for the runtime."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from hfcompress.deployment.tracing import Source
from hfcompress.errors import UnsupportedModelError
from hfcompress_runtime import FORMAT, MANIFEST

_RESAMPLES = (2, 3)  # Pillow's numbers of bilinear and bicubic


def write(source: Source, folder: Path, engine: str, file: str) -> None:
    """Writes processor, config and manifest beside a graph.

    Args:
        source: What was exported.
        folder: Where the graph lies.
        engine: `onnx` or `openvino`.
        file: The graph's name.

    Raises:
        UnsupportedModelError: Images are prepared in a way that the runtime does not know.
    """
    model, processor = source.model, source.processor
    stock = cast(Any, model.config)
    processor.save_pretrained(folder)
    values = stock.to_dict()
    # The graph holds the structure: readers of this config must not put it back.
    values.pop("quantization_config", None)
    values.pop("_name_or_path", None)  # a path on this machine
    if source.head.task == "text-generation":
        values["use_cache"] = False  # the graph has none
        cast(Any, model).generation_config.save_pretrained(folder)
    write_json(folder / "config.json", values | {"architectures": [type(model).__name__]})
    text = source.head.reads == "text"
    labelled = source.head.task.endswith("classification")
    manifest = {
        "format": FORMAT,
        "engine": engine,
        "file": file,
        "task": source.head.task,
        "inputs": list(source.inputs),
        "outputs": list(source.outputs),
        "labels": [stock.id2label[index] for index in range(stock.num_labels)] if labelled else [],
        "scores": _scores(stock),
        "max_length": source.max_length,
        "padding": _padding(processor) if text else None,
        "truncation_side": processor.truncation_side if text else "right",
        # OpenVINO's own choice is bfloat16 where the processor has it.
        "precision": "f32" if engine == "openvino" else None,
        "mask_id": processor.mask_token_id if source.head.task == "fill-mask" else None,
        "end_ids": _end_ids(model) if source.head.task == "text-generation" else [],
        "image": None if text else _image(processor),
        "products": None,
    }
    write_json(folder / MANIFEST, manifest)


def _padding(tokenizer: Any) -> dict[str, Any]:
    return {
        "id": tokenizer.pad_token_id or 0,
        "type_id": tokenizer.pad_token_type_id,
        "token": tokenizer.pad_token or "",
        "side": tokenizer.padding_side,
    }


def _scores(config: Any) -> str:
    if config.problem_type == "regression":
        return "none"
    return "sigmoid" if config.problem_type == "multi_label_classification" or config.num_labels == 1 else "softmax"


def _end_ids(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return list(ends) if isinstance(ends, list | tuple) else [] if ends is None else [ends]


def _image(processor: Any) -> dict[str, Any]:
    """Says how images become pixel values.

    Raises:
        UnsupportedModelError: Not by resizing to one size, rescaling and normalising.
    """
    said = processor.to_dict()
    size = said.get("size") or {}
    whole = said.get("do_resize") and said.get("do_rescale") and said.get("do_normalize")
    resample = int(said["resample"]) if said.get("resample") is not None else 2
    if not whole or set(size) != {"height", "width"} or said.get("do_center_crop") or resample not in _RESAMPLES:
        raise UnsupportedModelError(
            f"{type(processor).__name__} prepares images in another way than the runtime can: it resizes them to one "
            "height and width (bilinear or bicubic), rescales and normalises",
            hint="Save an image processor that does so into the checkpoint's folder.",
        )
    return {
        "height": size["height"],
        "width": size["width"],
        "resample": resample,
        "factor": said["rescale_factor"],
        "mean": list(said["image_mean"]),
        "std": list(said["image_std"]),
    }


def change_json(file: Path, values: Mapping[str, Any]) -> None:
    """Changes some keys of a JSON object in a file."""
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | dict(values))


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object, its keys in order."""
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
