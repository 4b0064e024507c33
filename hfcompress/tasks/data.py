"""A task's rows: from the Hub, from a local folder in the same layout, or from the demo."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hfcompress.configuration import suggest
from hfcompress.errors import DataError
from hfcompress.tasks import demo
from hfcompress.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

_SPLITS = (
    "train",
    *(f"{split}{genre}" for split in ("validation", "test") for genre in ("", "_matched", "_mismatched")),
)
_NO_LABELS = "Use a split, or a copy of the data, that has labels."
_SHARD = re.compile(r"(?P<split>.+?)(?:-(?P<index>\d{5})-of-(?P<count>\d{5}))?")
_LOCAL_HINT = "Give `data:` a local folder laid out like nyu-mll/glue; it should hold {files}."


def load_data(task: Task, data: str | None = None, *, progress: bool = True) -> DatasetDict:
    """Loads every split of a task and checks the ones that are learnt from and measured.

    Args:
        task: The task.
        data: A local folder laid out like `nyu-mll/glue`: `<config>/<split>.parquet`, or
            `<config>/<split>-00000-of-00001.parquet`. None takes the Hub, or what the demo fetches.
        progress: Whether a download shows its progress on standard error.

    Returns:
        The splits by name. Class labels are a `ClassLabel` with the task's names.

    Raises:
        DataError: The data is not there or is not what the task needs.
        FetchError: The demo's data did not arrive.
    """
    from datasets import DatasetDict

    if data is not None:
        splits = _read_folder(task, Path(data))
    elif task.name == demo.REVIEWS:
        splits = demo.load_reviews(progress=progress)
    else:
        splits = _read_hub(task)
    for split in dict.fromkeys((task.training_split, task.evaluation_split)):
        if split is not None:
            _check_split(task, splits, split)
    return DatasetDict({name: _name_labels(task, split) for name, split in splits.items()})


def _local_hint(task: Task) -> str:
    splits = (split for split in (task.training_split, task.evaluation_split) if split)
    return _LOCAL_HINT.format(files=" and ".join(f"{task.dataset_config}/{split}.parquet" for split in splits))


def _read_hub(task: Task) -> dict[str, Dataset]:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        splits = datasets.load_dataset(task.dataset, task.dataset_config)
    except (OSError, HfHubHTTPError, DatasetsError) as error:
        raise DataError(
            f"{task.dataset} ({task.dataset_config}) could not be loaded from the Hub: {error}",
            hint=_local_hint(task),
        ) from error
    return {str(name): split for name, split in splits.items()}


def _read_folder(task: Task, folder: Path) -> dict[str, Dataset]:
    hint = _local_hint(task)
    if task.dataset_config is None:
        raise DataError(f"task '{task.name}' brings its own data", hint="Leave `data:` out.")
    place = folder / task.dataset_config
    if not place.is_dir():
        raise DataError(f"the folder {place} does not exist", hint=hint)
    files = _split_files(place)
    if not files:
        raise DataError(f"the folder {place} holds no .parquet file", hint=hint)
    return {split: _read_files(paths) for split, paths in files.items()}


def _read_files(paths: list[Path]) -> Dataset:
    # Split by split and without the library's cache: a test split may lack a column that the others have,
    # and a file that was changed in place must not be answered from an older copy.
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset
    from datasets.table import InMemoryTable

    try:
        tables = [pyarrow.parquet.read_table(path) for path in paths]
        return Dataset(InMemoryTable(pyarrow.concat_tables(tables)))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        names = ", ".join(path.name for path in paths)
        raise DataError(f"{names} in {paths[0].parent} could not be read: {error}") from error


def _split_files(place: Path) -> dict[str, list[Path]]:
    """Finds the files of every split and refuses doubles, strangers and missing shards."""
    shards: dict[str, dict[tuple[int, int], Path]] = {}
    for path in sorted(place.glob("*.parquet")):
        match = _SHARD.fullmatch(path.stem)
        assert match is not None
        split = match["split"]
        if split not in _SPLITS:
            raise DataError(f"{path}: split '{split}' is not known; {suggest(split, _SPLITS)}")
        part = (int(match["index"] or 0), int(match["count"] or 1))
        same = shards.setdefault(split, {})
        if part in same:
            raise DataError(f"split '{split}' is there twice in {place}: {same[part].name}, {path.name}")
        same[part] = path
    for split, parts in shards.items():
        (count, *others) = {count for _, count in parts}
        if others or sorted(index for index, _ in parts) != list(range(count)):
            names = ", ".join(path.name for path in parts.values())
            raise DataError(f"split '{split}' in {place} is not whole or there twice: found {names}")
    return {split: [parts[part] for part in sorted(parts)] for split, parts in shards.items()}


def _check_split(task: Task, splits: Mapping[str, Dataset], name: str) -> None:
    where = f"task '{task.name}', split '{name}'"
    if name not in splits:
        raise DataError(f"{where} is not in the data; found: {', '.join(splits)}")
    split = splits[name]
    for column in (*task.columns, task.label):
        if column not in split.column_names:
            raise DataError(f"{where}: column '{column}' is missing; found: {', '.join(split.column_names)}")
    if len(split) == 0:
        raise DataError(f"{where} is empty")
    for column in task.columns:
        _check_texts(split, column, where)
    if task.kind == "regression":
        _check_numbers(split, task.label, where)
    else:
        _check_classes(task, split, where, training=name == task.training_split)


def _check_texts(split: Dataset, column: str, where: str) -> None:
    if getattr(split.features[column], "dtype", None) not in ("string", "large_string"):
        raise DataError(f"{where}: column '{column}' must hold text, not {split.features[column]}")
    nulls = split.data.column(column).null_count
    if nulls:
        raise DataError(f"{where}: column '{column}' has no text in {nulls} rows")


def _check_numbers(split: Dataset, column: str, where: str) -> None:
    for row, value in enumerate(split[column]):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"{where}: column '{column}' must hold finite numbers; row {row} holds {value!r}")
    if set(split[column]) == {-1}:
        raise DataError(f"{where}: every label is -1, which stands for none", hint=_NO_LABELS)


def _check_classes(task: Task, split: Dataset, where: str, *, training: bool) -> None:
    names = getattr(split.features[task.label], "names", None)
    if names is not None and tuple(names) != task.labels:
        raise DataError(
            f"{where}: column '{task.label}' names its classes {', '.join(names)}; "
            f"the task needs {', '.join(task.labels)}, in this order"
        )
    counts = Counter(split[task.label])
    strange = [value for value in counts if type(value) is not int or not 0 <= value < len(task.labels)]
    if strange == [-1]:
        raise DataError(
            f"{where}: {counts[-1]} of {len(split)} rows have label -1, which stands for none",
            hint=_NO_LABELS,
        )
    if strange:
        raise DataError(
            f"{where}: column '{task.label}' holds {strange[0]!r} in {counts[strange[0]]} rows; "
            f"allowed: 0 to {len(task.labels) - 1} ({', '.join(task.labels)})"
        )
    if training and len(counts) == 1:
        (only,) = counts
        raise DataError(f"{where}: every row is '{task.labels[only]}', so there is nothing to learn")


def _name_labels(task: Task, split: Dataset) -> Dataset:
    from datasets import ClassLabel

    if not task.labels or task.label not in split.column_names:
        return split
    if isinstance(split.features[task.label], ClassLabel):
        return split
    return split.cast_column(task.label, ClassLabel(names=list(task.labels)))
