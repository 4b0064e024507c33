"""Checks saved cells in a process that never saw the models: `python -m tests.matrix.checking FOLDER`.

Prints one JSON object: what is wrong with each cell, empty where all is right.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForTextEncoding, AutoTokenizer
from transformers.models.auto import modeling_auto
from transformers.utils import logging

import hfcompress  # registers the loader
from hfcompress.errors import CheckpointError
from hfcompress.modeling.anatomy import base_model
from hfcompress.modeling.checkpoint import HFCompressConfig, commit
from hfcompress.modeling.layers.bitsandbytes import settle_all
from tests.matrix.cells import STOCK
from tests.matrix.making import generate
from tests.tiny_models import FAMILIES, run

assert hfcompress

# What stock classes cannot find in another head's checkpoint, compressed or not: these load no base model from it.
NO_BASE = {
    ("llama", "QuestionAnswering"): "the class keeps its base model under another name",
    ("qwen2", "QuestionAnswering"): "the class keeps its base model under another name",
    ("qwen3", "QuestionAnswering"): "the class keeps its base model under another name",
    ("bart", "CausalLM"): "the base model has an encoder, this head has none",
    ("pegasus", "CausalLM"): "the base model has an encoder, this head has none",
    ("whisper", "CausalLM"): "the base model has an encoder, this head has none",
    ("whisper", "AudioClassification"): "the base model has a decoder, this head has none",
}
# Heads on an encoder alone, whose base model is one.
ENCODER_ALONE = {("t5", "EncoderModel"), ("t5", "TokenClassification")}
# General Auto classes come last, where another one is as good.
_LAST = ("AutoModelForPreTraining", "AutoModelForTextEncoding")


def auto_class(name: str) -> Any:
    """Returns the Auto class that makes this model class; the class itself where transformers has none."""
    wanted = getattr(transformers, name)
    autos = [each for each in vars(modeling_auto).values() if isinstance(each, type) and each is not wanted]
    tables = {each: getattr(each, "_model_mapping", None) or {} for each in autos}
    makes = [each for each, table in tables.items() if table.get(wanted.config_class, None) is wanted]
    makes.sort(key=lambda each: (each.__name__ in _LAST, each.__name__ != "AutoModel"))
    return makes[0] if makes else wanted


def check_cell(place: Path) -> str:
    """Loads a cell by its Auto class and compares, bit by bit; returns what is wrong, or nothing."""
    known = json.loads((place / "cell.json").read_text())
    family, head, method = known["family"], known["head"], known["method"]
    checkpoint, auto = place / "checkpoint", auto_class(known["class"])
    inputs, expected = load_file(place / "inputs.safetensors"), load_file(place / "expected.safetensors")
    model = _load(auto, checkpoint)
    if type(model).__name__ != known["class"]:
        return f"{auto.__name__} made a {type(model).__name__}"
    if method in STOCK and "quantization_config" in json.loads((checkpoint / "config.json").read_text()):
        return "an ordinary checkpoint was not written as one"
    if method == "vocabulary" and len(AutoTokenizer.from_pretrained(checkpoint)) != model.config.vocab_size:
        return "the tokenizer and the model know different tokens"
    problem = _differs(model, family, head, inputs, expected)
    if problem:
        return problem
    with tempfile.TemporaryDirectory() as folder:
        if _is_stock_quantized(model):
            commit(model)  # transformers loads it and cannot write it again
        model.save_pretrained(folder)
        if not _same(_tensors(checkpoint), _tensors(Path(folder))):
            return "saved again, the tensors differ"
        problem = _differs(_load(auto, Path(folder)), family, head, inputs, expected)
    return f"saved again: {problem}" if problem else _base_differs(checkpoint, model, family, head)


def _load(auto: Any, checkpoint: Path) -> Any:
    model = auto.from_pretrained(checkpoint)
    if _is_stock_quantized(model):
        settle_all(model)  # no hook of ours sees such a load, and bitsandbytes rounds scales on some CPUs
    return model


def _is_stock_quantized(model: Any) -> bool:
    return not isinstance(getattr(model.config, "quantization_config", None), (HFCompressConfig, type(None)))


def _differs(model: Any, family: str, head: str, inputs: dict[str, Any], expected: dict[str, Any]) -> str:
    outputs = {f"output.{index}": output for index, output in enumerate(run(model, inputs))}
    if head in FAMILIES[family].generates:
        outputs |= {f"token.{index}": logits for index, logits in enumerate(generate(model, inputs))}
    wrong = [name for name in expected if name not in outputs or not torch.equal(outputs[name], expected[name])]
    return f"differs in {', '.join(wrong)}" if wrong or len(outputs) != len(expected) else ""


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = sorted(checkpoint.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _base_differs(checkpoint: Path, model: Any, family: str, head: str) -> str:
    """Loads the base model from the task's checkpoint; returns what is wrong with it, or nothing."""
    if (family, head) in NO_BASE:
        return ""
    auto: Any = AutoModelForTextEncoding if (family, head) in ENCODER_ALONE else AutoModel
    try:
        base = base_model(auto.from_pretrained(checkpoint)).state_dict()
    except CheckpointError as error:
        return f"no base model: {error}"
    trunk = base_model(model).state_dict()
    shared = base.keys() & trunk.keys()
    # A head's own pooler or output layer is no part of the base model, and some heads are without its pooler.
    if len(shared) < 0.5 * len(base):
        return "the base model has other weights"
    wrong = [name for name in shared if not torch.equal(base[name], trunk[name])]
    return f"the base model differs in {', '.join(sorted(wrong)[:3])}" if wrong else ""


def quiet() -> None:
    """Makes transformers say nothing, and everything run on one thread."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def check(folder: Path) -> dict[str, str]:
    """Checks every cell below a folder."""
    found: dict[str, str] = {}
    for file in sorted(folder.rglob("cell.json")):
        place = file.parent
        try:
            found[place.relative_to(folder).as_posix()] = check_cell(place)
        except Exception as error:
            found[place.relative_to(folder).as_posix()] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    quiet()
    print(json.dumps(check(Path(sys.argv[1]))))
