"""What the Hub reads of a model: the card's header, and the results beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import yaml

from hfcompress.evaluation.report import License
from hfcompress.publishing.markup import plain
from hfcompress.tasks import Task, kind_of, task_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from hfcompress.evaluation.report import Report

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_TAGS = {
    "distillation": "distilled",
    "structured_pruning": "pruned",
    "unstructured_pruning": "pruned",
    "width_pruning": "pruned",
    "layer_dropping": "pruned",
    "low_rank": "low-rank",
    "quantization": "quantized",
    "quantization_aware": "quantized",
    "qlora": "quantized",
    "gptq": "quantized",
    "vocabulary": "pruned",
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from that is fetched without the Hub."""

    hub_id: str
    license: License


DEMO_MODELS: Mapping[str, Source] = MappingProxyType(
    {
        "demo/minilm-l6": Source(hub_id="sentence-transformers/all-MiniLM-L6-v2", license=License(id="apache-2.0")),
        "demo/mpnet-base": Source(hub_id="sentence-transformers/all-mpnet-base-v2", license=License(id="apache-2.0")),
    }
)


def is_local(model: str) -> bool:
    """Tells whether a recipe's `model` is a folder."""
    return model.startswith(("/", "./", "../"))


def hub_id(model: str) -> str | None:
    """Returns the model's id on the Hub, or None where it is not known to have one."""
    if model in DEMO_MODELS:
        return DEMO_MODELS[model].hub_id
    return None if is_local(model) or model.startswith("demo/") else model


def find_license(report: Report) -> License | None:
    """Finds the base model's licence without the network: in the report, or in the Hub's cache.

    Returns:
        The licence that its own card states, or None where it cannot be known.
    """
    from huggingface_hub import try_to_load_from_cache

    model = report.base_model
    if report.license is not None or is_local(model):
        return report.license  # of a folder the report has the name alone
    if model in DEMO_MODELS:
        return DEMO_MODELS[model].license
    found = try_to_load_from_cache(model, "README.md") if hub_id(model) else None
    return stated_license(Path(found)) if isinstance(found, str) else None


def stated_license(card: Path) -> License | None:
    """Returns the licence that a model's card states; None where there is no card, or it cannot be read."""
    from huggingface_hub import ModelCard

    if not card.is_file():
        return None
    try:
        data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return None
    given = data.get("license")
    if not isinstance(given, str):
        return None
    name, link = data.get("license_name"), data.get("license_link")
    return License(
        id=plain(given),
        name=plain(name) if isinstance(name, str) else None,
        link=plain(link) if isinstance(link, str) else None,
    )


def header(report: Report, license: License | None) -> str:
    """Returns the YAML of the card's header, without the lines of dashes."""
    from huggingface_hub import ModelCardData

    task, base = task_of(report.task, report.recipe), hub_id(report.base_model)
    methods = [name for row in report.rows for name in row.methods]
    quantized = any(_TAGS.get(name) == "quantized" for name in methods)
    data = ModelCardData(
        base_model=base,
        datasets=[task.dataset] if on_hub(task) else None,
        eval_results=_results(report, task) or None,
        # The checkpoint loads by transformers' own from_pretrained, so that is what the Hub should show code
        # for and count downloads by; hfcompress is no library that the Hub knows, and stands in the tags.
        library_name="transformers",
        license=license.id if license else None,
        license_name=license.name if license else None,
        license_link=license.link if license else None,
        metrics=[plain(name) for name in report.rows[-1].metrics],
        model_name=plain(report.name),
        pipeline_tag=kind_of(task).pipeline_tag,
        tags=["hfcompress", *dict.fromkeys(_TAGS[name] for name in methods if name in _TAGS)],
        base_model_relation=("quantized" if quantized else "finetune") if base else None,
    )
    values = {key: value for key, value in data.to_dict().items() if key != "model_name" and value is not None}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip()


def eval_results(report: Report) -> tuple[str, str] | None:
    """Returns the name and the text of the file of results that the Hub reads beside the card.

    Returns:
        None where the data are not on the Hub, or the metric is not defined: there is nothing to refer to.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    task = task_of(report.task, report.recipe)
    value = report.rows[-1].metrics.get(report.metric, math.nan)
    if not on_hub(task) or not math.isfinite(value):
        return None
    entry = EvalResultEntry(
        dataset_id=task.dataset,
        task_id=task.dataset_config or "default",
        value=value,
        notes=plain(f"{report.metric} on {report.split}, {report.examples} rows"),
    )
    text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
    return f".eval_results/{re.sub(r'[^A-Za-z0-9_.-]', '-', task.name)}.yaml", text


def on_hub(task: Task) -> bool:
    """Tells whether the task's data have an id on the Hub."""
    return _HUB_ID.fullmatch(task.dataset) is not None


def _results(report: Report, task: Task) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    measured = {key: value for key, value in report.rows[-1].metrics.items() if math.isfinite(value)}
    return [
        EvalResult(
            task_type=kind_of(task).pipeline_tag,
            dataset_type=task.dataset if on_hub(task) else plain(task.name),
            dataset_name=plain(task.name),
            dataset_config=task.dataset_config,
            dataset_split=plain(report.split),
            metric_type=plain(name),
            metric_value=value,
        )
        for name, value in measured.items()
    ]
