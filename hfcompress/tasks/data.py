"""A task's rows: from the Hub, from a local folder in the same layout, or from the demo."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hfcompress.configuration import suggest
from hfcompress.errors import DataError
from hfcompress.tasks import demo
from hfcompress.tasks.kinds import kind_of
from hfcompress.tasks.task import Task

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, DatasetDict

_SPLITS = (
    "train",
    *(f"{split}{genre}" for split in ("validation", "test") for genre in ("", "_matched", "_mismatched")),
)
_SHARD = re.compile(r"(?P<split>.+?)(?:-(?P<index>\d{5})-of-(?P<count>\d{5}))?")
_LOCAL_HINT = (
    "Give {which} by `data:` in a recipe, or by --data on the command line; it should hold {files} "
    "(or the same as .jsonl or .txt)."
)


def load_data(task: Task, data: str | None = None, *, progress: bool = True) -> DatasetDict:
    """Loads every split of a task and checks the ones that are learnt from and measured.

    Args:
        task: The task.
        data: A local folder laid out like `nyu-mll/glue`: `<config>/<split>.parquet`, or
            `<config>/<split>-00000-of-00001.parquet`; without `<config>` where the task has none. A split may also
            be a `.jsonl`, or a `.txt` whose lines, ends included, become the column `text`. None takes the Hub, or
            what the demo fetches.
        progress: Whether a download shows its progress on standard error.

    Returns:
        The splits by name. Class labels are a `ClassLabel` with the task's names.

    Raises:
        DataError: The data is not there or is not what the task needs.
        FetchError: The demo's data did not arrive.
    """
    from datasets import DatasetDict

    splits = read_splits(task, data, progress=progress)
    for split in dict.fromkeys((task.training_split, task.evaluation_split)):
        if split is not None:
            _check_split(task, splits, split)
    return DatasetDict({name: kind_of(task).named(task, split) for name, split in splits.items()})


def read_splits(task: Task, data: str | None = None, *, progress: bool = True) -> dict[str, Dataset]:
    """Reads every split as it is; see `load_data`. Nothing is checked: a test split may have no labels.

    Raises:
        DataError: The data is not there.
        FetchError: The demo's data did not arrive.
    """
    if data is not None:
        return _read_folder(task, Path(data))
    if task.name == demo.REVIEWS:
        return demo.load_reviews(progress=progress)
    return _read_hub(task)


def _local_hint(task: Task) -> str:
    place = f"{task.dataset_config}/" if task.dataset_config else ""
    splits = (split for split in (task.training_split, task.evaluation_split) if split)
    files = " and ".join(f"{place}{split}.parquet" for split in splits)
    which = "that folder" if _is_local(task) else f"a local folder laid out like {task.dataset}"
    return _LOCAL_HINT.format(which=which, files=files)


def _is_local(task: Task) -> bool:
    return task.dataset.startswith("./")


def _read_hub(task: Task) -> dict[str, Dataset]:
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    if _is_local(task):
        raise DataError(f"the data of task '{task.name}' are a local folder ({task.dataset})", hint=_local_hint(task))
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
    if task.name == demo.REVIEWS:
        raise DataError(f"task '{task.name}' brings its own data", hint="Leave `data:` out.")
    place = folder / (task.dataset_config or "")
    if not place.is_dir():
        raise DataError(f"the folder {place} does not exist", hint=hint)
    files = _split_files(place, task)
    if not files:
        raise DataError(f"the folder {place} holds no file of rows", hint=hint)
    return {split: _read_files(paths) for split, paths in files.items()}


def _read_files(paths: list[Path]) -> Dataset:
    # Split by split and without the library's cache: a test split may lack a column that the others have,
    # and a file that was changed in place must not be answered from an older copy.
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable

    try:
        tables = [_READERS[path.suffix](path) for path in paths]
        return Dataset(InMemoryTable(pyarrow.concat_tables(tables)))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        names = ", ".join(path.name for path in paths)
        raise DataError(f"{names} in {paths[0].parent} could not be read: {error}") from error


def _read_parquet(path: Path) -> pyarrow.Table:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path)


def _read_jsonl(path: Path) -> pyarrow.Table:
    import pyarrow.json

    return pyarrow.json.read_json(path)


def _read_lines(path: Path) -> pyarrow.Table:
    import pyarrow

    # Lines keep their ends, so that joined they are the file again.
    with path.open(encoding="utf-8", newline="") as file:
        return pyarrow.table({"text": list(file)})


_READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".txt": _read_lines}


def _split_files(place: Path, task: Task) -> dict[str, list[Path]]:
    """Finds the files of every split and refuses doubles, strangers and missing shards."""
    shards: dict[str, dict[tuple[int, int], Path]] = {}
    known = {*_SPLITS, task.evaluation_split, *([task.training_split] if task.training_split else [])}
    for path in sorted(path for path in place.iterdir() if path.suffix in _READERS):
        match = _SHARD.fullmatch(path.stem)
        assert match is not None
        split = match["split"]
        if split not in known:
            raise DataError(f"{path}: split '{split}' is not known; {suggest(split, known)}")
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
    for column in (*task.columns, *([task.label] if task.label else [])):
        if column not in split.column_names:
            raise DataError(f"{where}: column '{column}' is missing; found: {', '.join(split.column_names)}")
    if len(split) == 0:
        raise DataError(f"{where} is empty")
    kind_of(task).check(task, split, where, training=name == task.training_split)
