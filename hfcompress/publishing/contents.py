"""What of a checkpoint folder belongs on the Hub, and what must never leave the machine."""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hfcompress.errors import CheckpointError
from hfcompress.publishing.card_text import MARK
from hfcompress.publishing.pictures import PICTURES

WEIGHTS = re.compile(r"model\.safetensors|model-\d{5}-of-\d{5}\.safetensors|model\.safetensors\.index\.json")

# A list of what belongs, never of what does not: a Trainer leaves pickles behind (training_args.bin
# holds the Hub token in clear), and nobody can name every file that a folder may hold tomorrow.
_OF_A_RUN = (
    WEIGHTS,
    re.compile(r"(config|generation_config|preprocessor_config|processor_config)\.json"),
    re.compile(r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"),
    re.compile(r"vocab\.txt|merges\.txt|bpe\.codes|spiece\.model|sentencepiece\.bpe\.model|tokenizer\.model"),
    re.compile(r"chat_template\.jinja"),
    re.compile(r"report\.(json|html)|predictions\.json"),
    re.compile("|".join(map(re.escape, PICTURES))),
)
CARD = "README.md"
# Only those that hold the mark are a run's.
_MARKED = (re.compile(re.escape(CARD)), re.compile(r"\.eval_results/[A-Za-z0-9][\w.-]*\.yaml"))
_OF_PEOPLE = (
    re.compile(r"provenance\.json|manifest\.json|recipe\.yaml|CITATION\.cff"),
    re.compile(r"(LICENSE|NOTICE)(\.md|\.txt)?"),
    re.compile(r"(pictures/)?[A-Za-z0-9][\w.-]*\.(png|svg|jpg|jpeg|webp)"),
)
_BELONGS = (*_OF_A_RUN, *_MARKED, *_OF_PEOPLE)
_FOLDERS = ("", ".eval_results", "pictures")

# Only the shortest form that counts is matched, and none is longer than _OVERLAP: so a secret across
# two chunks is always whole in the second.
_SECRETS = (
    ("a Hugging Face token", b"hf_", re.compile(rb"hf_[A-Za-z0-9]{30}")),
    ("an API key (sk-...)", b"sk-", re.compile(rb"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{20}")),
    ("a GitHub token", b"gh", re.compile(rb"gh[pousr]_[A-Za-z0-9]{36}")),
    ("a GitHub token", b"github_pat_", re.compile(rb"github_pat_[A-Za-z0-9_]{40}")),
    ("a GitLab token", b"glpat-", re.compile(rb"glpat-[A-Za-z0-9_-]{20}")),
    ("a Slack token", b"xox", re.compile(rb"xox[abprs]-[A-Za-z0-9-]{20}")),
    ("an AWS access key", b"AKIA", re.compile(rb"(?<![A-Za-z0-9+/])AKIA[A-Z0-9]{16}")),
    ("an AWS access key", b"ASIA", re.compile(rb"(?<![A-Za-z0-9+/])ASIA[A-Z0-9]{16}")),
    ("a Google API key", b"AIza", re.compile(rb"AIza[A-Za-z0-9_-]{35}")),
    ("a private key", b"-----BEGIN ", re.compile(rb"-----BEGIN ([A-Z0-9]{1,20} ){0,4}PRIVATE KEY-----")),
)
_OVERLAP = 256
_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Content:
    """One file to upload, as it was when it was looked through.

    Attributes:
        name: Its path in the repository, with forward slashes.
        path: Where it is.
        size: In bytes.
        sha256: Its digest in hexadecimal, by which the Hub knows large files.
        git: Its git blob id in hexadecimal, by which the Hub knows small files.
    """

    name: str
    path: Path
    size: int
    sha256: str
    git: str


def collect(directory: Path) -> tuple[Content, ...]:
    """Finds what belongs on the Hub in a checkpoint folder, and looks through every byte of it.

    Returns:
        The files, by name.

    Raises:
        CheckpointError: The folder is no whole checkpoint with a card, a file is a link that leaves
            it, or a file holds something that looks like a secret (which is not repeated).
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no folder", hint="give the folder that save_pretrained wrote")
    paths = {name: path for name, path in _walk(directory) if any(form.fullmatch(name) for form in _BELONGS)}
    for name, path in paths.items():
        _refuse_outsider(name, path, directory)
    _check_whole(directory, paths)
    return tuple(read(name, paths[name]) for name in sorted(paths))


def added_by_people(directory: Path) -> tuple[str, ...]:
    """Finds what no run wrote in the folder of a run's result.

    Returns:
        Paths in the folder, with forward slashes; of a folder that no run makes its own alone.
    """
    names = {name for name, path in _walk(directory) if not _is_of_a_run(name, path)}
    for folder in _FOLDERS:
        found = (path.relative_to(directory).as_posix() for path in _folders(directory / folder))
        names |= {name for name in found if name not in _FOLDERS}
    return tuple(sorted(names))


def _is_of_a_run(name: str, path: Path) -> bool:
    if any(form.fullmatch(name) for form in _MARKED):
        return MARK.encode() in path.read_bytes()
    return any(form.fullmatch(name) for form in _OF_A_RUN)


def _folders(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.is_dir()] if directory.is_dir() else []


def read(name: str, path: Path, *, chunk: int = _CHUNK) -> Content:
    """Reads a file once, in chunks: takes its digests and looks for secrets.

    Raises:
        CheckpointError: It holds something that looks like a secret, or cannot be read.
    """
    try:
        size = path.stat().st_size
        sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        look = _searcher(name)
        with path.open("rb") as file:
            while data := file.read(chunk):
                sha256.update(data)
                git.update(data)
                look(data)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error
    return Content(name=name, path=path, size=size, sha256=sha256.hexdigest(), git=git.hexdigest())


def find_secret(data: bytes, start: int = 0) -> str | None:
    """Returns the kind of the first thing in `data`, from `start` on, that looks like a secret."""
    for kind, prefix, form in _SECRETS:
        # bytes.find is many times faster than the expression, which matters for gigabytes of weights.
        at = data.find(prefix, start)
        while at >= 0:
            if form.match(data, at):
                return kind
            at = data.find(prefix, at + 1)
    return None


def _searcher(name: str) -> Callable[[bytes], None]:
    tail = b""

    def look(data: bytes) -> None:
        nonlocal tail
        window = tail + data
        # The first byte of the tail was a start in the last round; here it only tells what precedes.
        if kind := find_secret(window, start=1 if tail else 0):
            raise CheckpointError(
                f"{name} holds something that looks like {kind}; nothing was uploaded",
                hint="remove it from the file, and revoke it if it was real",
            )
        tail = window[-_OVERLAP:]

    return look


def _walk(directory: Path) -> list[tuple[str, Path]]:
    found = []
    for folder in _FOLDERS:
        base = directory / folder
        if base.is_dir():
            found += [(path.relative_to(directory).as_posix(), path) for path in base.iterdir() if not path.is_dir()]
    return found


def _refuse_outsider(name: str, path: Path, directory: Path) -> None:
    """A link may stay in the folder, or be the kind that the Hub's own cache is made of."""
    target, home = path.resolve(), directory.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if not target.is_relative_to(home) and target.parent != blobs:
        raise CheckpointError(f"{name} is a link that leaves {directory}", hint="put a copy of the file in its place")
    if not target.exists() or not stat.S_ISREG(target.stat().st_mode):
        raise CheckpointError(f"{name} is no regular file")


def _check_whole(directory: Path, paths: dict[str, Path]) -> None:
    for name in ("config.json", CARD):
        if name not in paths:
            raise CheckpointError(f"{directory} has no {name}", hint=_way_to(name, measured="report.json" in paths))
    if not any(WEIGHTS.fullmatch(name) and name.endswith(".safetensors") for name in paths):
        raise CheckpointError(
            f"{directory} has no model.safetensors (nor model-00001-of-....safetensors)",
            hint="save the model with save_pretrained; pickled weights are not published",
        )
    _parse(paths["config.json"])
    if index := paths.get("model.safetensors.index.json"):
        shards = _parse(index).get("weight_map")
        if not isinstance(shards, dict):
            raise CheckpointError(f"{index} has no weight_map")
        for shard in sorted({str(shard) for shard in shards.values()}):
            if shard not in paths:
                raise CheckpointError(f"{index.name} names {shard!r}, which is not in {directory}")
    try:
        paths[CARD].read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{paths[CARD]} is not UTF-8") from error


def _way_to(name: str, *, measured: bool) -> str:
    if name != CARD:
        return "give a checkpoint folder"
    if measured:
        return "write one with `hfcompress card`"
    return "write one; `hfcompress card` does from the measurements of `hfcompress run` only, and there are none here"


def _parse(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value
