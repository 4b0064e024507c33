"""Images, each with one of the labels."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.errors import DataError
from hfcompress.tasks.checks import check_classes
from hfcompress.tasks.kinds.base import Given, Labelled
from hfcompress.tasks.kinds.classification import label_answers, named_labels, translated
from hfcompress.tasks.task import Task

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from hfcompress.tasks.kinds.base import Rows


class ImageClassification(Labelled):
    """One label an image.

    Rows keep the images as they are in their files; they are decoded batch by batch, since all of them at a model's
    size would not fit into memory.
    """

    name = "image_classification"
    auto_class = "AutoModelForImageClassification"
    pipeline_tag = "image-classification"
    metrics = ("accuracy", "f1", "f1_macro", "matthews_correlation", "precision", "recall", "roc_auc")
    defaults = ("accuracy",)
    columns = ("image",)
    unit = "images"
    reads = "images"
    encoded = ("image", "labels")

    def check(self, task: Task, split: Dataset, where: str, *, training: bool) -> None:
        """Images with their bytes, and ids of labels."""
        column = task.columns[0]
        for row, value in enumerate(_undecoded(split, column, where)[column]):
            if not value or not value.get("bytes"):
                # A path in the data could name any file of this machine: only bytes are read.
                raise DataError(f"{where}: column '{column}' must hold the bytes of images; row {row} does not")
        check_classes(task, split, where, training=training)

    def named(self, task: Task, split: Dataset) -> Dataset:
        """Makes the label column a `ClassLabel`."""
        return named_labels(task, split)

    def texts(self, task: Task, rows: Dataset) -> list[str]:
        """Returns nothing: there are none."""
        return []

    def load_processor(self, checkpoint: str | Path) -> Any:
        """Loads the image processor."""
        from transformers import AutoImageProcessor

        return AutoImageProcessor.from_pretrained(checkpoint)

    def processor_key(self, processor: Any) -> Any:
        """Returns the processor's settings."""
        return processor.to_json_string()

    def encode(self, dataset: Dataset, task: Task, processor: Any, *, max_length: int) -> Dataset:
        """Returns the bytes of images (`image`) and labels."""
        column = task.columns[0]
        from datasets import Dataset

        undecoded = _undecoded(dataset, column, f"task '{task.name}'")
        images = [value["bytes"] for value in undecoded[column]]
        return Dataset.from_dict({"image": images, "labels": list(dataset[task.label])})

    def with_label_ids(self, rows: Dataset, ids: Sequence[int]) -> Dataset:
        """Translates each row's label."""
        return translated(rows, ids)

    def collator(self, processor: Any) -> Any:
        """Decodes images and makes `pixel_values`."""
        import torch
        from PIL import Image

        def collate(rows: Rows) -> dict[str, torch.Tensor]:
            images = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in rows]
            batch = dict(processor(images=images, return_tensors="pt"))
            others = [name for name in rows[0] if name != "image"]
            return batch | {name: torch.tensor([row[name] for row in rows]) for name in others}

        return collate

    def lengths(self, rows: Dataset) -> list[int]:
        """Returns the same for all: images come to one size."""
        return [1] * len(rows)

    def speed_inputs(self, config: Any, batch_size: int) -> dict[str, torch.Tensor] | None:
        """Returns random images of the model's size, the same ones every time."""
        import torch

        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        generator = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(batch_size, config.num_channels, height, width, generator=generator)}

    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[Any]:
        """Keeps the logits: (labels,), float32."""
        return list(outputs.logits.float().cpu())

    def answers(self, task: Task, ids: Sequence[int], rows: Dataset, kept: Sequence[Any]) -> Given:
        """Returns the task's label ids."""
        return label_answers(ids, list(rows["labels"]), kept)


def _undecoded(split: Dataset, column: str, where: str) -> Dataset:
    from datasets import Image

    feature = split.features[column]
    if isinstance(feature, dict) and set(feature) == {"bytes", "path"}:
        return split
    if not isinstance(feature, Image):
        raise DataError(f"{where}: column '{column}' must hold images, not {feature}")
    return split.cast_column(column, Image(decode=False))
