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
    generates = source.head.writes or source.head.task == "text-generation"
    if generates:
        values["use_cache"] = False  # the graph has none
        cast(Any, model).generation_config.save_pretrained(folder)
    write_json(folder / "config.json", values | {"architectures": [type(model).__name__]})
    reads, text = source.head.reads, source.head.reads == "text"
    labels = _letters(processor.tokenizer) if source.head.auto_class == "AutoModelForCTC" else []
    if source.head.task.endswith("classification"):
        labels = [stock.id2label[index] for index in range(stock.num_labels)]
    manifest = {
        "format": FORMAT,
        "engine": engine,
        "file": file,
        "task": source.head.task,
        "inputs": list(source.inputs),
        "outputs": list(source.outputs),
        "labels": labels,
        "scores": _scores(stock),
        "max_length": source.max_length,
        "padding": _padding(processor) if text else None,
        "truncation_side": processor.truncation_side if text else "right",
        # OpenVINO's own choice is bfloat16 where the processor has it.
        "precision": "f32" if engine == "openvino" else None,
        "mask_id": processor.mask_token_id if source.head.task == "fill-mask" else None,
        "begin_ids": _begin_ids(model) if source.head.writes else [],
        "end_ids": _end_ids(model) if generates else [],
        "never_ids": _never_ids(model, "suppress_tokens") if generates else [],
        "never_first_ids": _never_ids(model, "begin_suppress_tokens") if generates else [],
        "image": _image(processor) if reads == "images" else None,
        "sound": _sound(processor) if reads in ("sounds", "spectrograms") else None,
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


def _begin_ids(model: Any) -> list[int]:
    """Returns what a decoder's text begins with.

    Raises:
        UnsupportedModelError: The model does not say so.
    """
    said = model.generation_config
    start = said.decoder_start_token_id if said.decoder_start_token_id is not None else said.bos_token_id
    if start is None:
        start = model.config.decoder_start_token_id
    if start is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not say which token its texts begin with",
            hint="Set decoder_start_token_id in generation_config.json.",
        )
    forced = getattr(said, "forced_bos_token_id", None)
    prompt = [start] if forced is None else [start, forced]
    if getattr(said, "is_multilingual", False):
        prompt += [_told(said, "lang_to_id", "language", "en"), _told(said, "task_to_id", "task", "transcribe")]
    silent = getattr(said, "no_timestamps_token_id", None)
    return prompt if silent is None else [*prompt, silent]


def _told(said: Any, table: str, field: str, usual: str) -> int:
    """Returns the token that tells a model which language it hears, or what to do with it."""
    wanted = getattr(said, field, None) or usual
    tokens = {name.strip("<|>"): token for name, token in getattr(said, table, {}).items()}
    if wanted not in tokens:
        raise UnsupportedModelError(
            f"generation_config.json: {field} is {wanted!r}, which is none of {', '.join(sorted(tokens))}",
            hint=f"Set {field} there to one of these.",
        )
    return tokens[wanted]


def _never_ids(model: Any, field: str) -> list[int]:
    return list(getattr(model.generation_config, field, None) or [])


def _letters(tokenizer: Any) -> list[str]:
    """Returns what each output of a head that spells stands for: nothing, a space between words, or its token.

    Raises:
        UnsupportedModelError: The tokenizer does not say which is which.
    """
    letters = getattr(tokenizer, "get_vocab", dict)()
    if tokenizer.pad_token not in letters or sorted(letters.values()) != list(range(len(letters))):
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} does not name one letter for every output, and a blank",
            hint="Save the model's Wav2Vec2CTCTokenizer into the checkpoint's folder.",
        )
    told: dict[str, str] = {tokenizer.pad_token: "", str(getattr(tokenizer, "word_delimiter_token", None)): " "}
    named: list[str] = sorted(letters, key=lambda letter: letters[letter])
    lower = getattr(tokenizer, "do_lower_case", False)
    return [told.get(letter, letter.lower() if lower else letter) for letter in named]


def _sound(processor: Any) -> dict[str, Any]:
    """Says how sounds become what a model reads.

    Raises:
        UnsupportedModelError: Not as they are, with their mean and spread taken out, or as Whisper's spectrograms.
    """
    extractor = getattr(processor, "feature_extractor", processor)
    read, pitches = extractor.model_input_names[0], extractor.feature_size
    if read == "input_values" and pitches == 1:
        return {"rate": extractor.sampling_rate, "normalize": bool(extractor.do_normalize), "pitches": None}
    whisper = all(hasattr(extractor, name) for name in ("n_fft", "hop_length", "n_samples"))
    if read != "input_features" or not whisper or getattr(extractor, "dither", 0.0):
        raise UnsupportedModelError(
            f"{type(extractor).__name__} prepares sounds in another way than the runtime can: it takes them as they "
            "are, with their mean and spread taken out, or as the spectrograms that Whisper reads, without dither"
        )
    return {
        "rate": extractor.sampling_rate,
        "normalize": False,
        "pitches": pitches,
        "window": extractor.n_fft,
        "hop": extractor.hop_length,
        "numbers": extractor.n_samples,
    }


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
