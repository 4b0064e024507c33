"""Downloads with the real pip, from a folder of packages made here."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from hfcompress.errors import FetchError
from hfcompress.tasks.fetching import Package, build_folder, cache_folder, download, locked


def make_wheel(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/data.txt", "data")
        archive.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return wheel


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    wheel = make_wheel(tmp_path / "index", "hfcompress_test_package")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Package(name="hfcompress-test-package", version="1.0", sha256=digest, wheel=True, megabytes=0.1)


def altered(package: Package) -> Package:
    return Package(name=package.name, version="1.0", sha256="0" * 64, wheel=True, megabytes=0.1)


def test_a_file_arrives_whole_and_alone(package: Package, tmp_path: Path) -> None:
    file = download(package, tmp_path / "kept", progress=False)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == package.sha256
    assert list((tmp_path / "kept").iterdir()) == [file]


def test_a_file_that_is_there_is_not_fetched_again(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = download(package, tmp_path / "kept", progress=False)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    assert download(package, tmp_path / "kept", progress=False) == first


def test_a_damaged_file_is_fetched_again(package: Package, tmp_path: Path) -> None:
    file = download(package, tmp_path / "kept", progress=False)
    file.write_bytes(file.read_bytes()[:-1])
    again = download(package, tmp_path / "kept", progress=False)
    assert hashlib.sha256(again.read_bytes()).hexdigest() == package.sha256


def test_another_file_under_the_name_is_thrown_away(package: Package, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="could not download hfcompress-test-package") as caught:
        download(altered(package), tmp_path / "kept", progress=False)
    assert "DO NOT MATCH THE HASHES" in str(caught.value)
    assert list((tmp_path / "kept").iterdir()) == []


def test_the_digest_is_checked_here_too(package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A pip that does not check: the only way past it is a stand-in for the step that runs it.
    wheel = next((tmp_path / "index").iterdir())
    monkeypatch.setattr("hfcompress.tasks.fetching._pip_download", lambda *_, **__: wheel)
    with pytest.raises(FetchError, match="instead of 0000"):
        download(altered(package), tmp_path / "kept", progress=False)
    assert list((tmp_path / "kept").iterdir()) == []


def test_what_pip_said_is_passed_on_with_what_to_do(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    with pytest.raises(FetchError, match="No matching distribution found") as caught:
        download(package, tmp_path / "kept", progress=False)
    assert "run the same command again" in caught.value.hint


def test_an_environment_without_pip_is_told_how_to_get_it(tmp_path: Path, package: Package) -> None:
    code = (
        "import sys, pathlib, importlib.util as util\n"
        "from hfcompress.tasks import fetching\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'pip' else find(name, *rest)\n"
        f"package = fetching.Package(**{vars(package)!r})\n"
        "fetching.download(package, pathlib.Path(sys.argv[1]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "pip is needed to fetch hfcompress-test-package" in result.stderr
    assert "-m ensurepip" in result.stderr


def test_progress_leaves_standard_output_alone(
    package: Package, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    download(package, tmp_path / "kept")
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "Fetching hfcompress-test-package (0.1 MB)" in shown.err


def test_a_folder_is_built_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "models" / "one"

    def fail(scratch: Path) -> None:
        (scratch / "half").write_text("x")
        raise OSError("no space left")

    with pytest.raises(FetchError, match="no space left"):
        build_folder(target, fail)
    assert list(target.parent.iterdir()) == []
    build_folder(target, lambda scratch: scratch.joinpath("a").touch())
    build_folder(target, lambda scratch: scratch.joinpath("b").touch())
    assert [path.name for path in target.iterdir()] == ["b"]
    assert list(target.parent.iterdir()) == [target]


def test_what_a_killed_run_left_does_not_get_into_the_next(tmp_path: Path) -> None:
    (tmp_path / ".one.partial").mkdir()
    (tmp_path / ".one.partial" / "stale").touch()
    build_folder(tmp_path / "one", lambda scratch: scratch.joinpath("a").touch())
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["a"]


def test_one_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    order: list[str] = []

    def wait() -> None:
        with locked("thing"):
            order.append("second")

    with locked("thing") as folder:
        assert folder == cache_folder()
        other = threading.Thread(target=wait)
        other.start()
        other.join(timeout=0.3)
        order.append("first")
    other.join()
    assert order == ["first", "second"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HFCOMPRESS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FetchError, match="Set HFCOMPRESS_CACHE"), locked("thing"):
        pass


def test_the_cache_is_in_the_home_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HFCOMPRESS_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "hfcompress"
