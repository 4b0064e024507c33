from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import hfcompress_cli
from hfcompress import commands
from hfcompress.errors import DataError, HubError
from tests.workshop import save_data, save_model

ROOT = Path(__file__).resolve().parent.parent
RECIPE = """\
name: tiny
model: demo/minilm-l6
task: demo/movie-reviews
steps:
  - name: teach
    training: {epochs: 1, learning_rate: 5e-5}
  - low_rank: {keep: 0.6}
"""


def hfcompress(*arguments: str | Path, before: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a process of its own; `before` is Python that runs first."""
    return subprocess.run(command(before, *arguments), capture_output=True, text=True, cwd=cwd, env=environment())


def invoke(*arguments: str | Path) -> Any:
    """Runs the command line in this process, which has paid for importing torch already."""
    return CliRunner().invoke(hfcompress_cli.app, [str(argument) for argument in arguments])


def command(before: str, *arguments: str | Path) -> list[str]:
    code = f"{textwrap.dedent(before)}\nimport hfcompress_cli\nhfcompress_cli.main()\n"
    return [sys.executable, "-c", code, *map(str, arguments)]


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "100", "NO_COLOR": "1"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["evaluate", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    watch = """
    import atexit, sys
    def tell():
        heavy = {"torch", "transformers", "hfcompress", "datasets", "numpy"} & sys.modules.keys()
        print("HEAVY", sorted(heavy), file=sys.stderr)
    atexit.register(tell)
    """
    done = hfcompress(*arguments, before=watch)
    assert done.returncode == 0
    assert "Usage:" in done.stdout
    assert "HEAVY []" in done.stderr


def test_help_names_every_command() -> None:
    shown = hfcompress("--help").stdout
    for name in ("run", "evaluate", "export", "card", "push", "methods", "version"):
        assert name in shown


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["nothing"], ["run", "x.yaml", "--nothing"], ["evaluate", "x", "--batch-size", "0"]],
)
def test_a_wrong_usage_is_2(arguments: list[str]) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "Usage:" in done.stderr and "Traceback" not in done.stderr


def test_plan_shows_the_steps_and_runs_nothing(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("run", recipe, "--plan", "--set", "steps.low_rank.keep=0.4")
    assert done.exit_code == 0, done.stderr
    assert "teach" in done.stdout and '"keep": 0.4' in done.stdout and "runs/tiny" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_plan_as_json_is_the_recipe_with_its_defaults(recipe: Path) -> None:
    done = hfcompress("run", recipe, "--plan", "--json", "--set", "seed=7")
    values = json.loads(done.stdout)
    assert (values["seed"], values["max_length"], values["steps"][0]["name"]) == (7, 128, "teach")


def test_a_wrong_recipe_is_2_with_all_problems_and_no_traceback(recipe: Path) -> None:
    recipe.write_text(RECIPE.replace("keep: 0.6", "keep: 1.5").replace("name: tiny", "nam: tiny"))
    done = invoke("run", recipe)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "error: 3 problems in" in done.stderr
    assert "tiny.yaml:7: steps.low_rank.keep: " in done.stderr and "did you mean 'name'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback_with_the_same_exit_code(recipe: Path) -> None:
    done = invoke("run", recipe.with_name("gone.yaml"), "--debug")
    assert done.exit_code == 2
    assert "Traceback" in done.stderr and "no such file" in done.stderr


FAKED = """
import hfcompress_cli
class Faked:
    @staticmethod
    def methods(as_json):
        {body}
hfcompress_cli._commands = lambda: Faked
"""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("no rows", hint="give rows"), 2, "error: no rows\ngive rows\n"),
        (HubError("the Hub says no"), 1, "error: the Hub says no\n"),
        (ZeroDivisionError("by zero"), 1, "error: ZeroDivisionError: by zero\nThis was not foreseen."),
        (ImportError("no torch"), 1, "error: ImportError: no torch\n"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "error: the disk is full"),
        (KeyboardInterrupt(), 130, "\ninterrupted\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_exit_codes(error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(commands, "methods", fail)
    done = invoke("methods")
    assert done.exit_code == code
    assert done.stderr.startswith(said) and "Traceback" not in done.stderr


def test_an_interrupted_run_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run", fail)
    assert "finished steps are kept" in invoke("run", "recipe.yaml").stderr


def test_an_interrupt_from_outside_is_130() -> None:
    # A shell that starts a script in the background has it ignore interrupts, and a child inherits that.
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    sleeping = listening + FAKED.format(body="print('ready', flush=True); __import__('time').sleep(60)")
    with subprocess.Popen(
        command(sleeping, "methods"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in said and "Traceback" not in said


def test_a_reader_that_leaves_early_causes_no_noise() -> None:
    writing = FAKED.format(body="[print('x' * 1000, flush=True) for _ in range(1000)]")
    with subprocess.Popen(
        command(writing, "methods"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_methods_are_listed_with_their_fields() -> None:
    done = invoke("methods", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert {"low_rank", "structured_pruning", "distillation", "quantization", "training"} <= found.keys()
    keep = next(entry for entry in found["low_rank"]["fields"] if entry["name"] == "keep")
    assert keep["type"].startswith("float") and "<" in keep["allowed"] and keep["description"]
    shown = invoke("methods").stdout
    assert all(name in shown for name in found) and "keep" in shown


def test_version() -> None:
    done = invoke("version")
    assert done.exit_code == 0
    assert done.stdout.strip().split(".")[0].isdigit()


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "FOLDER", "--task", "sst2"],
        ["export", "FOLDER", "-o", "x"],
        ["card", "FOLDER"],
        ["densify", "FOLDER", "x"],
        ["verify-files", "FOLDER"],
        ["push", "FOLDER", "org/name"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_folder_that_is_no_checkpoint_is_2(arguments: list[str], tmp_path: Path) -> None:
    for folder, said in ((tmp_path, "holds no config.json"), (tmp_path / "gone", "no such folder")):
        done = invoke(*(str(folder) if part == "FOLDER" else part for part in arguments))
        assert done.exit_code == 2
        assert said in done.stderr and "Traceback" not in done.stderr


def test_a_repository_without_an_owner_is_2(tmp_path: Path) -> None:
    done = invoke("push", tmp_path, "name-only")
    assert done.exit_code == 2
    assert "repo: should be org/name, not 'name-only'" in done.stderr


def test_a_wrong_way_to_export_is_2_with_all_problems(tmp_path: Path) -> None:
    done = invoke("export", tmp_path, "-o", tmp_path / "out", "--format", "tflite", "--int8", "half")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "format: should be 'onnx' or 'openvino', not 'tflite'" in done.stderr and "int8: " in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_static_export_without_a_task_is_2(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    done = invoke("export", folder, "-o", tmp_path / "out", "--int8", "static")
    assert done.exit_code == 2
    assert "--task: is required" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.skipif(
    not (find_spec("onnx") and find_spec("onnxscript") and find_spec("onnxruntime")),
    reason="the extra 'onnx' is not installed",
)
@pytest.mark.filterwarnings("ignore:::(onnx|onnxscript|onnxruntime|torch|copyreg)")
def test_an_export_with_a_floor_is_told_as_json(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    data = save_data(tmp_path / "data")
    how = ["--int8", "static", "--floor", "0.5", "--task", "sst2", "--data", data, "--calibration", "32"]
    done = invoke("export", folder, "-o", tmp_path / "out", *how, "--max-length", "16", "--json", "--quiet")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["difference"] < 1e-5 and told["score"] >= 0.5 * told["float_score"] > 0
    assert told["graph_bytes"] == (tmp_path / "out" / "model.onnx").stat().st_size


def test_a_damaged_tensor_is_named_and_a_dense_twin_is_stock(tmp_path: Path) -> None:
    from hfcompress import LowRankConfig, compress
    from tests.workshop import tiny_classifier

    compress(tiny_classifier(), [LowRankConfig(method="svd")]).save_pretrained(tmp_path / "small")
    whole = invoke("verify-files", str(tmp_path / "small"))
    assert whole.exit_code == 0, whole.stderr
    assert invoke("densify", str(tmp_path / "small"), str(tmp_path / "dense")).exit_code == 0
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    weights = tmp_path / "small" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    damaged = invoke("verify-files", str(tmp_path / "small"))
    assert damaged.exit_code == 1 and "model.safetensors: " in damaged.stdout
