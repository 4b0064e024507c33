"""The models that `scripts.studies.engines` measures, and the ways to run each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.studies.material import study_root, teacher_folder

CASES = ("minilm-l6-mrpc", "minilm-l6-sst2", "mpnet-base-mrpc", "mpnet-base-sst2", "smollm2")
TIMED = ("minilm-l6-mrpc", "mpnet-base-mrpc", "smollm2")  # the others are of the same shapes


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to run a model.

    Attributes:
        name: What it is called on the page.
        how: `source`, `compress` with values of a `QuantizationConfig`, `export` with values of an `ExportConfig`, or
            the name of a function of `scripts.studies.engines_by_hand`.
        values: See `how`.
        open_as: See `engine_process`.
        floats: The form of the same engine in float; itself where it is that.
        by_hand: The form that the same engine makes without us, where there is one.
        cases: The cases that it is for; all where it is empty.
    """

    name: str
    how: str
    values: dict[str, Any]
    open_as: str
    floats: str
    by_hand: str = ""
    cases: tuple[str, ...] = ()


_TEXT = tuple(case for case in CASES if case != "smollm2")
_LM = ("smollm2",)
_ONNX, _OPENVINO, _TORCH = "ONNX Runtime fp32", "OpenVINO f32", "PyTorch fp32"


def _compress(name: str, cases: tuple[str, ...] = (), **values: Any) -> Form:
    return Form(name=name, how="compress", values=values, open_as="torch", floats=_TORCH, cases=cases)


FORMS = (
    Form(name=_TORCH, how="source", values={}, open_as="torch", floats=_TORCH),
    Form(name="PyTorch bf16", how="source", values={}, open_as="torch-bf16", floats=_TORCH),
    _compress("bitsandbytes int8, tables int8", weights="int8", embeddings="int8"),
    _compress("bitsandbytes nf4, tables int4", _TEXT, weights="nf4-double", embeddings="int4"),
    _compress("torchao int8 dynamic, tables int8", weights="torchao-int8-dynamic", embeddings="int8"),
    _compress("packed 2 bit, tables int8", _LM, weights="packed-2", embeddings="int8"),
    Form(name=_ONNX, how="export", values={"format": "onnx"}, open_as="export", floats=_ONNX),
    Form(
        name="ONNX Runtime int8 dynamic",
        how="export",
        values={"format": "onnx", "int8": "dynamic"},
        open_as="export",
        floats=_ONNX,
        by_hand="ONNX Runtime int8 dynamic, by hand",
    ),
    Form(
        name="ONNX Runtime int8 static",
        how="export",
        values={"format": "onnx", "int8": "static"},
        open_as="export",
        floats=_ONNX,
        by_hand="ONNX Runtime int8 static, by hand",
        cases=_TEXT,
    ),
    Form(name="ONNX Runtime int8 dynamic, by hand", how="onnx_dynamic", values={}, open_as="export", floats=_ONNX),
    Form(
        name="ONNX Runtime int8 static, by hand",
        how="onnx_static",
        values={},
        open_as="export",
        floats=_ONNX,
        cases=("minilm-l6-mrpc",),  # it quantizes what is slower for it, and the more so the larger the model
    ),
    Form(name=_OPENVINO, how="export", values={"format": "openvino"}, open_as="export", floats=_OPENVINO),
    Form(name="OpenVINO bf16", how="export", values={"format": "openvino"}, open_as="export:bf16", floats=_OPENVINO),
    Form(
        name="OpenVINO int8",
        how="export",
        values={"format": "openvino", "int8": "static"},
        open_as="export",
        floats=_OPENVINO,
        by_hand="OpenVINO int8, by hand (NNCF)",
        cases=_TEXT,
    ),
    Form(
        name="OpenVINO int8, by hand (NNCF)",
        how="nncf_quantize",
        values={},
        open_as="export",
        floats=_OPENVINO,
        cases=_TEXT,
    ),
    Form(
        name="OpenVINO int8 weights",
        how="export",
        values={"format": "openvino", "int8": "dynamic"},
        open_as="export",
        floats=_OPENVINO,
        by_hand="OpenVINO int8 weights, by hand (NNCF)",
        cases=_LM,
    ),
    Form(
        name="OpenVINO int8 weights, by hand (NNCF)",
        how="nncf_weights",
        values={},
        open_as="export",
        floats=_OPENVINO,
        cases=_LM,
    ),
)
FORM = {form.name: form for form in FORMS}


def forms_of(case: str) -> list[Form]:
    """Returns the forms that a model is measured in."""
    return [form for form in FORMS if not form.cases or case in form.cases]


def made_forms(case: str) -> list[Form]:
    """Returns the forms that are there."""
    return [form for form in forms_of(case) if place_of(case, form).exists()]


def source_of(case: str) -> Path:
    """Returns the float checkpoint."""
    if case == "smollm2":
        return study_root().parent / "models" / "smollm2"
    model, _, task = case.rpartition("-")
    return teacher_folder(model, task)


def place_of(case: str, form: Form) -> Path:
    """Returns where a form lies; forms of one folder differ in how they are opened."""
    if form.how == "source":
        return source_of(case)
    named = "-".join([form.how, *(str(value) for value in form.values.values())])
    return study_root() / "engines" / case / re.sub(r"[^a-z0-9-]", "_", named)


def open_as(case: str, form: Form) -> str:
    """Returns what `engine_process` is told of a form."""
    auto = "AutoModelForCausalLM" if case == "smollm2" else "AutoModelForSequenceClassification"
    return f"{form.open_as}:{auto}" if form.open_as.startswith("torch") else form.open_as
