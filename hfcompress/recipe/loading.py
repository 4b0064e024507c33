"""From a file and `--set` arguments to a `Recipe`, or one error that lists all that is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hfcompress.configuration import Config, suggest
from hfcompress.errors import ConfigError, DataError, RecipeError
from hfcompress.methods.registry import Method, methods
from hfcompress.methods.training import TrainingConfig
from hfcompress.recipe.document import MAX_BYTES, Document, Finding, KeyPath, read_document
from hfcompress.recipe.overrides import STEP_FIELDS, apply_overrides, step_name
from hfcompress.recipe.schema import (
    EvaluationConfig,
    Header,
    Outline,
    PushConfig,
    Recipe,
    Step,
    is_local,
    order_problems,
    unheard_problems,
)
from hfcompress.tasks import TaskConfig, get_task, judged_by
from hfcompress.tasks.augmentation import AugmentationConfig

_MAX_MESSAGE = 400
AnyConfig = TypeVar("AnyConfig", bound=Config)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe and refuses whatever can be refused before a weight is loaded.

    Args:
        path: A YAML file.
        overrides: `key=value` texts that replace values, as `--set` gives them.

    Raises:
        RecipeError: The file cannot be read, or lists every problem with its line, the allowed values
            and the nearest right name.
    """
    return parse_recipe(_read(Path(path)), str(path), overrides)


def parse_recipe(text: str, source: str, overrides: Sequence[str] = ()) -> Recipe:
    """Does what `load_recipe` does with the text of a recipe; `source` is what findings name.

    Raises:
        RecipeError: As `load_recipe`.
    """
    document = read_document(text, source)
    if not document.findings and not isinstance(document.values, dict):
        document.complain((), _not_a_recipe(document.values))
    if not isinstance(document.values, dict):
        raise _error(document)
    known = _ordered_methods()
    apply_overrides(document, overrides, tuple(known))
    recipe = _Builder(document, known).recipe()
    if recipe is None:
        raise _error(document)
    return recipe


def _read(path: Path) -> str:
    hint = "Give the path of a YAML file, such as recipes/quickstart.yaml."
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        return data.decode()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, _neighbours(path), n=1)
        meant = f"; did you mean '{path.with_name(near[0])}'?" if near else ""
        raise RecipeError(f"{path}: no such file{meant}", hint=hint) from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder, not a recipe", hint=hint) from None
    except UnicodeDecodeError as error:
        if len(data) > MAX_BYTES:
            raise RecipeError(f"{path}: is larger than {MAX_BYTES >> 10} KiB", hint=hint) from None
        line = data[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}:{line}: is not UTF-8 text", hint="Save the file as UTF-8.") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}", hint=hint) from None


def _neighbours(path: Path) -> list[str]:
    try:
        return [file.name for file in path.parent.iterdir() if file.suffix in {".yaml", ".yml"}][:50]
    except OSError:
        return []


def _not_a_recipe(values: Any) -> str:
    if values is None:
        return "is empty; a recipe needs at least name, model, task and steps"
    return "should hold `key: value` lines with name, model, task and steps"


def _ordered_methods() -> dict[str, Method]:
    """Methods that leave float weights come first: what is quantized cannot be changed any more."""
    return dict(sorted(methods().items(), key=lambda item: item[1].quantizes))


class _Builder:
    """Turns a document into a recipe, leaving a finding in the document for all that is wrong."""

    def __init__(self, document: Document, known: Mapping[str, Method]) -> None:
        self.document = document
        self.known = known

    def recipe(self) -> Recipe | None:
        values: dict[str, Any] = self.document.values
        self._unknown((), values, Recipe.model_fields)
        fields = {key: value for key, value in values.items() if key in Header.model_fields}
        if isinstance(task := fields.get("task"), dict):
            # A description that is wrong is complained of in its own place; a name stands in for it.
            described = self._config(TaskConfig, task, ("task",))
            fields["task"] = described or "described"
        if isinstance(made := fields.get("augmentation"), dict):
            fields["augmentation"] = self._config(AugmentationConfig, made, ("augmentation",))
        header = self._config(Header, fields, ())
        self._look_up(fields)
        evaluation = self._config(EvaluationConfig, values.get("evaluation"), ("evaluation",))
        push = self._config(PushConfig, values["push"], ("push",)) if "push" in values else None
        steps = self._steps(values)
        for problem in unheard_problems(header, [step.outline() for step in steps]) if header else ():
            self.document.complain(problem.path, problem.message)
        self._metrics(header, evaluation)
        if self.document.findings or header is None or evaluation is None:
            return None
        own = {name: getattr(header, name) for name in Header.model_fields}
        return Recipe(**own, evaluation=evaluation, push=push, steps=tuple(steps))

    def _config(self, cls: type[AnyConfig], values: Any, path: KeyPath) -> AnyConfig | None:
        """Builds a part; a part without fields (`low_rank:`) takes every default."""
        values = {} if values is None else values
        if not isinstance(values, dict):
            self.document.complain(path, f"should hold fields ({', '.join(cls.model_fields)}), not {values!r}")
            return None
        try:
            return cls(**values)
        except ConfigError as error:
            for problem in error.problems:
                self.document.complain((*path, *problem.path), problem.message)
            return None

    def _unknown(self, path: KeyPath, values: Iterable[str], allowed: Iterable[str]) -> None:
        allowed = tuple(allowed)
        for key in values:
            if key not in allowed:
                self.document.complain((*path, key), f"unknown field; {suggest(key, allowed)}")

    def _look_up(self, fields: Mapping[str, Any]) -> None:
        """Checks names against what exists: the task, the demo model, local folders."""
        from hfcompress.tasks.demo import MODELS, is_demo_model

        task = fields.get("task")
        if isinstance(task, TaskConfig) and task.folder and not Path(task.folder).is_dir():
            self.document.complain(("task", "data"), f"there is no folder {task.folder}")
        if isinstance(task, str) and isinstance(self.document.values["task"], str):
            try:
                get_task(task)
            except DataError as error:
                self.document.complain(("task",), " ".join(str(error).split()))
        more = fields.get("more_teachers")
        named = [("model", fields.get("model")), ("teacher", fields.get("teacher"))]
        named += [("more_teachers", each) for each in (more if isinstance(more, tuple) else ())]
        for field, model in named:
            if isinstance(model, str) and is_local(model) and not Path(model, "config.json").is_file():
                self.document.complain((field,), f"the folder {model} is not there or holds no config.json")
            if isinstance(model, str) and is_demo_model(model) and model not in MODELS:
                self.document.complain((field,), f"there is no such demo model; {suggest(model, MODELS)}")
        for field in ("data", "unlabelled"):
            folder = fields.get(field)
            if isinstance(folder, str) and folder and not Path(folder).is_dir():
                self.document.complain((field,), f"there is no folder {folder}")

    def _metrics(self, header: Header | None, evaluation: EvaluationConfig | None) -> None:
        """Checks the names of further metrics, which depend on the kind of task."""
        if header is None or evaluation is None or self.document.findings:
            return
        task = header.task.task() if isinstance(header.task, TaskConfig) else get_task(header.task)
        try:
            judged_by(task, evaluation.metrics)
        except DataError as error:
            self.document.complain(("evaluation", "metrics"), error.message.removeprefix("metrics: "))

    def _steps(self, values: Mapping[str, Any]) -> list[Step]:
        steps = values.get("steps")
        if "steps" not in values:
            self.document.complain(("steps",), "is required")
            return []
        if not isinstance(steps, tuple):
            self.document.complain(("steps",), "should be a list of steps, each line starting with '- '")
            return []
        built, outlines = [], []
        for index, step in enumerate(steps):
            if not isinstance(step, dict):
                message = f"should hold methods ({', '.join(self.known)}) or `training`, not {step!r}"
                # Refused: no rule of order can say anything about it.
                self.document.refuse(("steps", index), message)
                outlines.append(Outline(f"steps[{index}]", (), True))
                continue
            built.append(self._step(step, ("steps", index)))
            outlines.append(self._outline(step, built[-1].methods if built[-1] else ()))
        for problem in order_problems(outlines):
            self.document.complain(problem.path, problem.message)
        return [step for step in built if step is not None]

    def _outline(self, step: Mapping[str, Any], configs: tuple[Config, ...]) -> Outline:
        held = tuple(method for name, method in self.known.items() if name in step)
        strange = any(key not in STEP_FIELDS and key not in self.known for key in step)
        # A misspelt method or `training` has been reported; "the step is empty" would only confuse.
        trains = "training" in step or (strange and not held)
        return Outline(step_name(step, tuple(self.known)), held, trains, configs)

    def _step(self, step: dict[str, Any], path: KeyPath) -> Step | None:
        self._unknown(path, step, (*STEP_FIELDS, *self.known))
        configs = [
            self._config(method.config, step[name], (*path, name))
            for name, method in self.known.items()
            if name in step
        ]
        own: dict[str, Any] = {"name": step_name(step, tuple(self.known))}
        own |= {key: step[key] for key in ("name", "calibration") if key in step}
        if "training" in step:
            own["training"] = self._config(TrainingConfig, step["training"], (*path, "training"))
        if self.document.findings:
            # Only the step's own fields are left to check; its parts are known to be wrong or right.
            own.pop("training", None)
            self._config(Step, own, path)
            return None
        return self._config(Step, {**own, "methods": tuple(configs)}, path)


def _error(document: Document) -> RecipeError:
    findings = sorted(document.findings, key=lambda finding: (not finding.place.line, finding.place.line))
    lines = [_render(document, finding) for finding in findings]
    if len(lines) == 1:
        return RecipeError(lines[0])
    return RecipeError(f"{len(lines)} problems in {document.source}:\n  " + "\n  ".join(lines))


def _render(document: Document, finding: Finding) -> str:
    message = finding.message
    if len(message) > _MAX_MESSAGE:
        message = f"{message[:_MAX_MESSAGE]}..."
    where = _address(document.values, finding.path)
    return f"{finding.place}: {where}: {message}" if where else f"{finding.place}: {message}"


def _address(values: Any, path: KeyPath) -> str:
    """Returns a path the way `--set` would address it, so that a finding can be pasted there."""
    names = [_printable(key) for key in path]
    # What YAML could not read to its end has findings, but no values.
    steps = values.get("steps") if isinstance(values, dict) else None
    if len(path) < 2 or path[0] != "steps" or not isinstance(steps, tuple):
        return ".".join(names)
    known, index, rest = tuple(_ordered_methods()), int(path[1]), names[2:]
    if rest and rest[0] in known:
        holding = [step for step in steps if isinstance(step, dict) and rest[0] in step]
        if len(holding) == 1:
            return ".".join(["steps", *rest])
    called = [step_name(step, known) for step in steps]
    if called[index] and called.count(called[index]) == 1:
        return ".".join(["steps", _printable(called[index]), *rest])
    return ".".join([f"steps[{index}]", *rest])


def _printable(key: str | int) -> str:
    text = str(key)[:80]
    return text if text.isprintable() else ascii(text)
