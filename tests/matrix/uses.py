"""What people do with a checkpoint, done with a pruned and factorised one of every family.

Run in a process of its own: `python -m tests.matrix.uses FAMILY [USE ...]` prints one JSON object, what is wrong
with each use, empty where all is right.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from hfcompress import compress
from hfcompress.modeling.layers.low_rank import LowRankLinear
from tests.matrix.cells import FACTORS, PRUNING
from tests.matrix.checking import auto_class, quiet
from tests.matrix.making import Broken, fresh, words
from tests.tiny_models import FAMILIES, inputs_for, run

# The head that is trained and compiled, and the head and name of the pipeline that a family is tried in.
_TRAINED = ("SequenceClassification", "ImageClassification", "ConditionalGeneration")
PIPELINES = {
    "SequenceClassification": "text-classification",
    "ImageClassification": "image-classification",
    "AudioClassification": "audio-classification",
    "CausalLM": "text-generation",
}
# Why a use is not there, where it is not.
REASONS = {
    ("mpnet", "attn_implementation"): "transformers has eager attention alone for it",
    ("deberta-v2", "attn_implementation"): "transformers has eager attention alone for it",
    ("deberta-v2-own", "attn_implementation"): "transformers has eager attention alone for it",
    ("t5-gated", "pipeline"): "transformers 5 has no pipeline from text to text",
}


def _trained(family: str) -> str:
    return next(head for head in _TRAINED if head in FAMILIES[family].heads)


def _piped(family: str) -> str:
    return next(head for head in PIPELINES if head in FAMILIES[family].heads)


def saved(family: str, head: str, place: Path) -> Any:
    """Saves a pruned and factorised model, and returns it."""
    model = compress(fresh(family, head), [PRUNING, FACTORS], calibration=[inputs_for(family, head)])
    model.save_pretrained(place)
    return model


def labelled(family: str, head: str) -> dict[str, torch.Tensor]:
    """Returns inputs with labels for a head that is trained."""
    inputs = dict(inputs_for(family, head))
    if head == "ConditionalGeneration":
        return inputs | {"labels": inputs.pop("decoder_input_ids")}
    return inputs | {"labels": torch.tensor([0, 1])}


def _require_close(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for left, right in zip(first, second, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def _require_equal(first: list[torch.Tensor], second: list[torch.Tensor], what: str) -> None:
    if len(first) != len(second) or not all(map(torch.equal, first, second)):
        raise Broken(what)


def use_dtype(family: str, place: Path) -> None:
    head = _trained(family)
    model = saved(family, head, place)
    half = auto_class(type(model).__name__).from_pretrained(place, dtype=torch.bfloat16)
    inputs = {name: each.bfloat16() if each.is_floating_point() else each for name, each in _inputs(family).items()}
    if half.dtype != torch.bfloat16 or not all(output.isfinite().all() for output in run(half, inputs)):
        raise Broken("not finite in bfloat16")
    for name, tensor in model.state_dict().items():
        loaded = half.state_dict()[name]
        if not torch.equal(loaded, tensor.to(loaded.dtype)):
            raise Broken(f"{name} is not the rounded weight")


def use_device_map(family: str, place: Path) -> None:
    model = saved(family, _trained(family), place)
    loaded = auto_class(type(model).__name__).from_pretrained(place, device_map="cpu")
    _require_equal(run(loaded, _inputs(family)), run(model, _inputs(family)), "other outputs")


def use_attention(family: str, place: Path) -> None:
    model = saved(family, _trained(family), place)
    expected = run(model, _inputs(family))
    for attention in ("eager", "sdpa"):
        loaded = auto_class(type(model).__name__).from_pretrained(place, attn_implementation=attention)
        if loaded.config._attn_implementation != attention:
            raise Broken(f"{attention} was not chosen")
        _require_close(run(loaded, _inputs(family)), expected)


def use_pipeline(family: str, place: Path) -> None:
    from transformers import pipeline

    head = _piped(family)
    model = saved(family, head, place)
    task = "audio-classification" if family == "wav2vec2" else PIPELINES[head]
    subject, tokenizer = _subject(family, model, place)
    answer: Any = pipeline(task, model=str(place), tokenizer=tokenizer)  # type: ignore[call-overload]
    if task == "text-generation":
        (said,) = answer(subject, max_new_tokens=3, do_sample=False)
        if not said["generated_text"].startswith(subject):
            raise Broken(f"answered {said}")
        return
    answers = answer(subject, top_k=None)
    if abs(sum(each["score"] for each in answers) - 1) > 1e-5:
        raise Broken(f"answered {answers}")
    if task == "text-classification":
        inputs = words(model)(subject, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            best = model(**inputs).logits[0].softmax(-1).max().item()
        if abs(max(each["score"] for each in answers) - best) > 1e-5:
            raise Broken("the pipeline's score is not the model's")


def _subject(family: str, model: Any, place: Path) -> tuple[Any, Any]:
    """Saves what turns a subject into inputs beside the model; returns a subject, and a tokenizer to be given."""
    if family == "wav2vec2":
        Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(place)
        return _inputs(family, "SequenceClassification")["input_values"][0].numpy(), None
    if family == "whisper":
        extractor = WhisperFeatureExtractor(feature_size=8, sampling_rate=100, hop_length=10, chunk_length=2, n_fft=32)
        extractor.save_pretrained(place)
        return torch.randn(200, generator=torch.Generator().manual_seed(0)).numpy(), None
    if family == "vit":
        from PIL import Image

        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(place)
        return Image.new("RGB", (8, 8), (200, 30, 90)), None
    text, tokenizer = " ".join(f"t{index}" for index in range(5, 12)), words(model)
    tokenizer.save_pretrained(place)
    # From a folder of Qwen's, transformers reads any tokenizer as one of Qwen's kind.
    return text, tokenizer if family.startswith("qwen") else None


def use_trainer(family: str, place: Path) -> None:
    head = _trained(family)
    model = auto_class(type(saved(family, head, place)).__name__).from_pretrained(place)
    batch = labelled(family, head)
    rows = [{name: value[index] for name, value in batch.items()} for index in range(2)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(place / "out"), max_steps=1, learning_rate=1e-2, per_device_train_batch_size=2,
        save_strategy="no", logging_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    made = Trainer(model=model, args=arguments, train_dataset=rows).train()  # type: ignore[arg-type]
    if not torch.tensor(made.training_loss).isfinite():
        raise Broken("the loss is not finite")
    after = model.state_dict()
    changed = [name for name, value in before.items() if not torch.equal(after[name], value)]
    if not any(".down." in name for name in changed) or not any(".up." in name for name in changed):
        raise Broken("the factors were not trained")
    model.eval().save_pretrained(place / "trained")
    again = auto_class(type(model).__name__).from_pretrained(place / "trained")
    _require_equal(run(again, _inputs(family)), run(model, _inputs(family)), "saved after training it is another one")


def use_lora(family: str, place: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    head = _trained(family)
    auto = auto_class(type(saved(family, head, place)).__name__)
    torch.manual_seed(0)
    # Each low-rank layer keeps its factors as two linear layers of these names.
    adapted: Any = get_peft_model(auto.from_pretrained(place), LoraConfig(r=2, target_modules=["down", "up"]))
    optimizer = torch.optim.SGD([each for each in adapted.parameters() if each.requires_grad], lr=0.5)
    before = run(adapted.eval(), _inputs(family))
    for _ in range(2):  # the first step leaves `A` as it was: `B` begins at 0
        adapted(**labelled(family, head)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = run(adapted, _inputs(family))
    if all(map(torch.equal, after, before)):
        raise Broken("training changed nothing")
    adapted.save_pretrained(place / "adapter")
    loaded = PeftModel.from_pretrained(auto.from_pretrained(place), place / "adapter").eval()
    _require_equal(run(loaded, _inputs(family)), after, "the adapter loads as another one")  # type: ignore[arg-type]


def use_compile(family: str, place: Path) -> None:
    model = saved(family, _trained(family), place)
    loaded = auto_class(type(model).__name__).from_pretrained(place)
    with torch.no_grad():
        outputs = torch.compile(loaded)(**_inputs(family))
    found = [value for key, value in outputs.items() if isinstance(value, torch.Tensor) and "past" not in key]
    _require_close(found, run(model, _inputs(family)))
    if not any(isinstance(module, LowRankLinear) for module in loaded.modules()):
        raise Broken("nothing was factorised")


def _inputs(family: str, head: str | None = None) -> dict[str, torch.Tensor]:
    return inputs_for(family, _trained(family) if head is None else head)


USES: dict[str, Callable[[str, Path], None]] = {
    "dtype": use_dtype,
    "device_map": use_device_map,
    "attn_implementation": use_attention,
    "pipeline": use_pipeline,
    "Trainer": use_trainer,
    "LoRA": use_lora,
    "torch.compile": use_compile,
}


def check_uses(family: str, names: list[str] | None = None) -> dict[str, str]:
    """Tries a family's uses; returns what is wrong with each, by name."""
    found: dict[str, str] = {}
    for name in names or USES:
        if (family, name) in REASONS:
            continue
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
            try:
                USES[name](family, Path(folder) / "model")
                found[name] = ""
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    quiet()
    print(json.dumps(check_uses(sys.argv[1], sys.argv[2:])))
