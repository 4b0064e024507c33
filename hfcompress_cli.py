"""The console script's entry: parses arguments and imports nothing heavy until a command runs.

This module stands beside the package, not in it: importing anything of the package loads torch.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

DONE, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(
    name="hfcompress",
    help="Compress transformers models by recipe, and measure what comes out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A YAML file.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where results go; runs/<name> by default.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, such as steps.low_rank.keep=0.4."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Check the recipe, print its steps and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no logs.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a recipe: train, compress, save, reload, evaluate, and write report and card."""
    _call(
        "run",
        debug,
        recipe=recipe,
        output=output,
        overrides=overrides or [],
        plan=plan,
        quiet=quiet,
        as_json=as_json,
    )


@app.command()
def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.", show_default=False)],
    task: Annotated[
        str | None, typer.Option("--task", help="The task; by default the one in the folder's report.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="A local folder with the task's data.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Examples in a batch.")] = 32,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=4, help="Tokens after which a text is cut; as in the report."),
    ] = None,
    submission: Annotated[
        Path | None,
        typer.Option(
            "--submission", help="A folder for the files that GLUE's server takes: answers to the test set, no score."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no logs.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a checkpoint's quality on a task, or answer a GLUE test set."""
    options = {"task": task, "data": data, "batch_size": batch_size, "max_length": max_length}
    options["submission"] = submission
    _call("evaluate", debug, directory=directory, **options, quiet=quiet, as_json=as_json)


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the export.", show_default=False)],
    engine: Annotated[str, typer.Option("--format", help="onnx or openvino.")] = "onnx",
    int8: Annotated[
        str | None, typer.Option("--int8", help="dynamic (needs no data) or static (calibrates); float by default.")
    ] = None,
    embeddings: Annotated[
        str | None, typer.Option("--embeddings", help="float, int8 or int4; int8 where --int8 is given.")
    ] = None,
    target: Annotated[
        str, typer.Option("--target", help="avx2, avx512-vnni, amx or arm64, for 8-bit ONNX graphs.")
    ] = "avx512-vnni",
    floor: Annotated[
        float | None,
        typer.Option("--floor", help="Share of the float score to keep, on a part of train; layers stay in float."),
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="For calibration; by default the one in the folder's report.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="A local folder with the task's data.")] = None,
    calibration: Annotated[int, typer.Option("--calibration", min=1, help="Training examples to calibrate on.")] = 256,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=4, help="Tokens after which their text is cut; as in the report."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no logs.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Export a checkpoint to ONNX Runtime or OpenVINO, in float or 8 bit."""
    how = {"format": engine, "int8": int8, "embeddings": embeddings, "target": target, "floor": floor}
    examples = {"task": task, "data": data, "calibration": calibration, "max_length": max_length}
    _call("export", debug, directory=directory, output=output, how=how, **examples, quiet=quiet, as_json=as_json)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's result.", show_default=False)],
    original: Annotated[
        str | None,
        typer.Option("--original", help="The original, for the speed-up; by default from the run or the report."),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="A local folder with the task's data.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no logs.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a result again and compare every figure of its report and card; exit code 1 if one does not hold."""
    _call("verify", debug, directory=directory, original=original, data=data, quiet=quiet, as_json=as_json)


@app.command()
def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Results of runs.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("comparison.html"),
    debug: Debug = False,
) -> None:
    """Draw several results into one page."""
    _call("compare", debug, directories=directories, output=output)


@app.command("verify-files")
def verify_files(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.", show_default=False)],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check every tensor of a checkpoint against the digest it was saved with; exit code 1 if one differs."""
    _call("verify_files", debug, directory=directory, as_json=as_json)


@app.command()
def densify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A compressed checkpoint.", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Write a checkpoint in stock shapes, for servers that know only stock models; it is as large as the original."""
    _call("densify", debug, directory=directory, output=output)


@app.command()
def factorize(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A stock checkpoint.", show_default=False)],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.", show_default=False)],
    keep: Annotated[float | None, typer.Option("--keep", help="Share of the parameters that each layer keeps.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="The rank of every layer.")] = None,
    energy: Annotated[
        float | None, typer.Option("--energy", help="Share of the squared singular values that each layer keeps.")
    ] = None,
    targets: Annotated[
        list[str] | None, typer.Option("--target", help="attention, ffn, linear, ...; may be given several times.")
    ] = None,
    pivoted: Annotated[bool, typer.Option("--pivoted", help="Say outputs by other outputs: higher ranks.")] = False,
    shard_size: Annotated[str, typer.Option("--shard-size", help="Largest weight file that is written.")] = "2GB",
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no logs.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Split the layers of a checkpoint that need not fit into memory, by plain singular value decomposition."""
    given = {"keep": keep, "rank": rank, "energy": energy, "targets": targets, "pivoted": pivoted or None}
    settings = {name: value for name, value in given.items() if value is not None}
    options = {"settings": settings, "shard_size": shard_size, "quiet": quiet, "as_json": as_json}
    _call("factorize", debug, directory=directory, output=output, **options)


@app.command()
def card(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.", show_default=False)],
    debug: Debug = False,
) -> None:
    """Write the model card of a checkpoint again, from its report."""
    _call("card", debug, directory=directory)


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.", show_default=False)],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where to.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Only its owners see the repository.")] = False,
    branch: Annotated[str | None, typer.Option("--branch", help="The branch; the main one by default.")] = None,
    pull_request: Annotated[
        bool, typer.Option("--pull-request", help="Open a pull request on an existing repository instead.")
    ] = False,
    tag: Annotated[str | None, typer.Option("--tag", help="A name for the commit, such as v1.0.")] = None,
    debug: Debug = False,
) -> None:
    """Upload a checkpoint, its card and its report to the Hub."""
    target = {"repo": repository, "private": private, "branch": branch, "pull_request": pull_request, "tag": tag}
    _call("push", debug, directory=directory, target=target)


@app.command()
def methods(as_json: Json = False, debug: Debug = False) -> None:
    """List the methods with their fields, defaults and allowed values."""
    _call("methods", debug, as_json=as_json)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    print(installed("hfcompress"))


def main() -> None:
    """Runs the command line."""
    # Read when torch is loaded. `verify` must wait as `run` did, or small layers seem faster or slower than they were;
    # and threads that spin while they wait slow whatever shares the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(_interrupted(resumes=False)) from None


def _call(name: str, debug: bool, **values: Any) -> None:
    """Runs a command's body and turns what it raises into a message and an exit code."""
    code = _guarded(lambda: getattr(_commands(), name)(**values), debug, resumes=name == "run")
    if code != DONE:
        raise typer.Exit(code)


def _commands() -> Any:
    from hfcompress import commands

    return commands


def _guarded(body: Callable[[], bool | None], debug: bool, *, resumes: bool) -> int:
    try:
        done = body()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _interrupted(resumes=resumes)
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        return _explain(error, debug)
    return FAILED if done is False else DONE


def _explain(error: Exception, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    # The class lives in the package, whose import may be what failed: it is known by its attributes.
    user_error = getattr(error, "user_error", None)
    if user_error is None and _is_of_a_full_disk(error):
        print("error: the disk is full; what was whole before is untouched. Free some space", file=sys.stderr)
        return FAILED
    if user_error is None:
        said = str(error) or "no message"
        advice = "" if debug else "\nThis was not foreseen. Run it again with --debug for the traceback."
        print(f"error: {type(error).__name__}: {said}{advice}", file=sys.stderr)
        return FAILED
    print(f"error: {error}", file=sys.stderr)
    return USER_ERROR if user_error else FAILED


def _is_of_a_full_disk(error: BaseException | None) -> bool:
    """Tells whether a write found no room; safetensors says so in words only."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _interrupted(*, resumes: bool) -> int:
    kept = "; finished steps are kept, the same command goes on from there" if resumes else ""
    print(f"\ninterrupted{kept}", file=sys.stderr)
    return INTERRUPTED


if __name__ == "__main__":
    main()
