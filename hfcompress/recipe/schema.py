"""What a recipe is once it has been read: frozen values and the rules for the order of steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from hfcompress.configuration import Config
from hfcompress.errors import DataError, Problem
from hfcompress.methods.registry import Method, method_of
from hfcompress.methods.training import TrainingConfig
from hfcompress.tasks import Task, TaskConfig, get_task, judged_by
from hfcompress.tasks.augmentation import AugmentationConfig

_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")
_STEP_NAME = re.compile(r"[a-z0-9][a-z0-9_+-]{0,79}")
_HUB_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.)){0,94}[A-Za-z0-9_]|[A-Za-z0-9_]"
_HUB_ID = re.compile(rf"(?:(?:{_HUB_PART})/)?(?:{_HUB_PART})")
_REFERENCE = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]|\.(?!\.|$|lock$)){0,99}")
_REPOSITORY = re.compile(rf"(?:{_HUB_PART})/(?:{_HUB_PART})")


def is_local(model: str) -> bool:
    """Tells whether a recipe's `model` is a folder: it starts with `/`, `./` or `../`."""
    return model.startswith(("/", "./", "../"))


class EvaluationConfig(Config):
    """How models are judged after each step."""

    batch_size: int = Field(default=32, ge=1, le=4096, description="examples in a batch, for quality")
    speed_batch_size: int = Field(default=8, ge=1, le=4096, description="examples in a batch, for speed")
    speed_sequence_length: int = Field(default=128, ge=1, le=8192, description="tokens in an example, for speed")
    speed_repeats: int = Field(default=20, ge=3, le=10_000, description="timed calls of each model")
    grid_batch_sizes: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        default=(1, 8), description="batches at which the result is timed beside the original; none for no grid"
    )
    grid_sequence_lengths: tuple[Annotated[int, Field(ge=1, le=8192)], ...] = Field(
        default=(32, 128), description="lengths at which it is timed; those that the model cannot read are left out"
    )
    groups: tuple[str, ...] = Field(
        default=(), description="columns of the data by whose values answers are compared too, to find the worst group"
    )
    robustness: tuple[Literal["typos", "case"], ...] = Field(
        default=(), description="changes of the texts on which the original and the result are measured too"
    )
    explanations: Literal["captum", "shap"] | None = Field(
        default=None, description="what explains answers, to tell whether the result has the original's reasons"
    )
    explanation_examples: int = Field(default=32, ge=1, le=10_000, description="rows whose answers are explained")
    attack: Literal["deepwordbug", "pruthi"] | None = Field(
        default=None, description="TextAttack's recipe by which the original and the result are attacked"
    )
    attack_examples: int = Field(default=32, ge=1, le=10_000, description="rows that are attacked")
    metrics: tuple[str, ...] = Field(
        default=(), description="metrics besides the task's, by the names that `evaluate` and hfcompress know them by"
    )
    curve_points: int = Field(default=4, ge=0, le=1000, description="how often the metric is measured in a training")


class PushConfig(Config):
    """Where the result is published."""

    repo: str = Field(description="the repository on the Hub, as org/name")
    private: bool = Field(default=False, description="whether only its owners see the repository")
    branch: str | None = Field(default=None, description="the branch, made where it does not exist; else the main one")
    pull_request: bool = Field(default=False, description="whether to open a pull request instead of writing")
    tag: str | None = Field(default=None, description="a name for the commit, such as v1.0; it is never moved")

    @field_validator("repo")
    @classmethod
    def _is_org_and_name(cls, repo: str) -> str:
        if not _REPOSITORY.fullmatch(repo):
            raise ValueError(f"should be org/name, not {repo!r}")
        return repo

    def options(self) -> dict[str, Any]:
        """Returns the keyword arguments of `publishing.push`."""
        return {
            "private": self.private,
            "revision": self.branch,
            "create_pr": self.pull_request,
            "tag": self.tag,
        }

    @field_validator("branch", "tag")
    @classmethod
    def _is_reference(cls, name: str | None) -> str | None:
        if name is not None and not _REFERENCE.fullmatch(name):
            raise ValueError(f"should be letters, digits, '.', '_' and '-', not {name!r}")
        return name

    @model_validator(mode="after")
    def _is_one_way(self) -> PushConfig:
        if self.pull_request and (self.branch or self.tag):
            raise ValueError("a pull request takes neither `branch` nor `tag`")
        return self


class Step(Config):
    """One or more methods done together: inside a Trainer with `training`, at once without it.

    A step without methods fine-tunes.
    """

    name: str = Field(description="what the step is called in reports")
    methods: tuple[SerializeAsAny[Config], ...] = ()
    training: TrainingConfig | None = None
    calibration: int = Field(256, ge=1, le=100_000, description="training examples for methods that need some")

    @field_validator("name")
    @classmethod
    def _is_addressable(cls, name: str) -> str:
        if not _STEP_NAME.fullmatch(name):
            raise ValueError(f"should be lower-case letters, digits, _, + and -, not {name!r}")
        return name

    def key(self) -> dict[str, Any]:
        """Returns what the step's result depends on."""
        values = self.to_dict()
        if "training" in values:
            values["training"] = {name: value for name, value in values["training"].items() if name != "report_to"}
        return values

    def outline(self) -> Outline:
        """Returns what the rules of order look at."""
        methods = tuple(method_of(config) for config in self.methods)
        return Outline(self.name, methods, self.training is not None, self.methods)

    def to_dict(self) -> dict[str, Any]:
        """Returns the step as it could stand in a recipe, every default written out."""
        values: dict[str, Any] = {"name": self.name}
        for config in self.methods:
            values[method_of(config).name] = config.model_dump(mode="json")
        if self.training is not None:
            values["training"] = self.training.model_dump(mode="json")
        return values | {"calibration": self.calibration}


class Header(Config):
    """The fields of a recipe that stand alone."""

    name: str = Field(description="what the run is called; its output goes to runs/<name>")
    model: str = Field(description="demo/..., an id on the Hub, or a local folder (/, ./ or ../ first)")
    teacher: str | None = Field(
        default=None,
        description="another model, fine-tuned for the task, named as `model` is: distilling steps learn from it, and "
        "all that is made is compared with it",
    )
    more_teachers: tuple[str, ...] = Field(
        default=(),
        max_length=8,
        description="further models that know the task, named as `model` is: distilling steps learn from them too, "
        "each as much as `distillation.teacher_weights` says, that of the first teacher first",
    )
    task: str | TaskConfig = Field(description="a known task such as sst2, or a description: kind, data, columns, ...")
    data: str | None = Field(default=None, description="a local folder with the task's data")
    unlabelled: str | None = Field(
        default=None,
        description="a local folder laid out as that of `data`: distilling steps learn the rows of its training split "
        "from the teacher alone; labels are not read and may be missing",
    )
    augmentation: AugmentationConfig | None = Field(
        default=None,
        description="makes further texts out of the training texts, which distilling steps learn from the teacher "
        "alone: `share` of as many, with `words` of their words changed, `combined` of them made of two texts",
    )
    seed: int = Field(default=42, ge=0, lt=2**32, description="makes runs repeatable")
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**32)], ...] = Field(
        default=(),
        max_length=20,
        description="does every step with each of these, to tell the spread; the first one's result is published",
    )
    max_length: int = Field(default=128, ge=4, le=8192, description="tokens after which a text is cut")

    @field_validator("name")
    @classmethod
    def _is_file_name(cls, name: str) -> str:
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"should be lower-case letters, digits, '.', '_' and '-', not {name!r}")
        return name

    @model_validator(mode="before")
    @classmethod
    def _begins_with_the_first_seed(cls, values: Any) -> Any:
        seeds = values.get("seeds") if isinstance(values, dict) else None
        if isinstance(seeds, list | tuple) and seeds and "seed" not in values:
            return {**values, "seed": seeds[0]}
        return values

    @model_validator(mode="after")
    def _has_seeds_of_one_mind(self) -> Header:
        if self.seeds and self.seed != self.seeds[0]:
            raise ValueError("seed: is the first of `seeds`; leave it out, or leave `seeds` out")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: each may be named once")
        return self

    @field_validator("model", "teacher")
    @classmethod
    def _is_model(cls, model: str | None) -> str | None:
        if model is not None and not is_local(model) and not _HUB_ID.fullmatch(model):
            allowed = "demo/..., a Hub id (org/name), or a folder that starts with /, ./ or ../"
            raise ValueError(f"should be {allowed}, not {model!r}")
        return model

    @field_validator("more_teachers")
    @classmethod
    def _are_models(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for model in models if (name := cls._is_model(model)))

    @field_validator("data", "unlabelled")
    @classmethod
    def _is_folder_name(cls, data: str | None) -> str | None:
        if data == "":
            raise ValueError("should name a local folder, or be left out")
        return data


class Recipe(Header):
    """All that a run is told, checked as far as it can be before a weight is loaded.

    Raises:
        ConfigError: A value is wrong, or the steps stand in an impossible order.
    """

    evaluation: EvaluationConfig = EvaluationConfig()
    push: PushConfig | None = None
    steps: tuple[Step, ...]

    @property
    def described_task(self) -> Task:
        """The task: the known one of that name, or the one described."""
        return self.task.task() if isinstance(self.task, TaskConfig) else get_task(self.task)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds that every step is done with, the published one first."""
        return self.seeds or (self.seed,)

    @property
    def data_folder(self) -> str | None:
        """The local folder with the task's data, or None where they come from elsewhere."""
        return self.data or (self.task.folder if isinstance(self.task, TaskConfig) else None)

    @model_validator(mode="after")
    def _is_judged_by_metrics_of_its_kind(self) -> Recipe:
        try:
            judged_by(self.described_task, self.evaluation.metrics)
        except DataError as error:
            raise ValueError(f"evaluation.{error.message}") from None
        return self

    @model_validator(mode="after")
    def _somebody_learns(self) -> Recipe:
        if problems := unheard_problems(self, [step.outline() for step in self.steps]):
            raise ValueError("; ".join(str(problem) for problem in problems))
        return self

    @model_validator(mode="after")
    def _is_in_order(self) -> Recipe:
        if problems := order_problems([step.outline() for step in self.steps]):
            raise ValueError("; ".join(str(problem) for problem in problems))
        return self

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as plain JSON values, every default written out."""
        optional = ("seeds", "teacher", "more_teachers", "data", "unlabelled", "augmentation")
        unsaid = [field for field in optional if not getattr(self, field)]
        values = self.model_dump(mode="json", exclude={"steps", "push", *unsaid})
        if self.push is not None:
            values["push"] = self.push.model_dump(mode="json")
        return values | {"steps": [step.to_dict() for step in self.steps]}


@dataclass(frozen=True)
class Outline:
    """What the rules of order need to know of a step, known even when its values are wrong: then it has no configs."""

    name: str
    methods: tuple[Method, ...]
    trains: bool
    configs: tuple[Config, ...] = ()


_FROZEN = (
    "cannot train once the model is quantized ({since}): move the training before it, or add `qlora` to the step, "
    "which trains adapters on the frozen weights"
)


def order_problems(steps: Sequence[Outline]) -> list[Problem]:
    """Returns why steps cannot be done in their order; paths are (`steps`, index, key...)."""
    problems: list[Problem] = []
    if not steps:
        problems.append(Problem(("steps",), "should hold at least one step"))
    quantized_by = ""
    names: dict[str, int] = {}
    for index, step in enumerate(steps):
        path = ("steps", index)
        if not step.methods and not step.trains:
            message = "the step is empty: give it at least one method, or `training` to fine-tune"
            problems.append(Problem(path, message))
        elif step.name in names:
            problems.append(Problem((*path, "name"), f"another step is called '{step.name}'; give it its own `name`"))
        names.setdefault(step.name, index)
        problems += _mode_problems(step, path)
        if quantized_by:
            problems += _late_problems(step, path, f"by step '{quantized_by}'")
        if any(method.quantizes for method in step.methods):
            quantized_by = quantized_by or step.name
    return problems


def unheard_problems(header: Header, steps: Sequence[Outline]) -> list[Problem]:
    """Returns which fields say something to steps that learn from a teacher, where there is none, or to other ones."""
    taught = [(n, step) for n, step in enumerate(steps) if any(each.name == "distillation" for each in step.methods)]
    if taught:
        teachers = 1 + len(header.more_teachers)
        return [
            Problem(
                ("steps", index, "distillation", "teacher_weights"),
                f"has {len(weights)} entries for {teachers} teacher{'s' * (teachers > 1)}",
            )
            for index, step in taught
            for config in step.configs
            if (weights := getattr(config, "teacher_weights", ())) and len(weights) != teachers
        ]
    message = "no step learns from a teacher; add `distillation` to one, or leave the field out"
    fields = ("more_teachers", "unlabelled", "augmentation")
    return [Problem((field,), message) for field in fields if getattr(header, field)]


def _mode_problems(step: Outline, path: tuple[str | int, ...]) -> list[Problem]:
    """A method must be able to work the way its step works: in a Trainer, or at once."""
    problems = []
    for method in step.methods:
        if step.trains and method.part is None:
            message = "works at once and not in training; give it a step of its own, without `training`"
            problems.append(Problem((*path, method.name), message))
        if not step.trains and method.apply is None:
            message = "works only in training; add `training: {epochs: ..., learning_rate: ...}` to the step"
            problems.append(Problem((*path, method.name), message))
    for method, later in pairwise(step.methods):
        if method.renumbers:
            message = f"gives tokens other ids than the step's calibration data have, which {later.name} may read"
            problems.append(Problem((*path, method.name), f"{message}; give it a step of its own"))
    if step.trains and any(method.shrinks for method in step.methods):
        message = "cannot pack layers in the training that makes them smaller; give it a step of its own, after this"
        packing = [method for method in step.methods if method.quantizes and method.part]
        problems += [Problem((*path, method.name), message) for method in packing]
    for config in step.configs:
        method = method_of(config)
        if method.why_not and (reason := method.why_not(config, step.trains)):
            problems.append(Problem((*path, method.name), reason))
    return problems


def _late_problems(step: Outline, path: tuple[str | int, ...], since: str) -> list[Problem]:
    problems = []
    for method in step.methods:
        if method.needs_float and method.apply is not None:
            message = f"needs float weights, but the model is quantized {since}; move it before that step"
            problems.append(Problem((*path, method.name), message))
    if step.trains and not any(method.trains_quantized for method in step.methods):
        problems.append(Problem((*path, "training"), _FROZEN.format(since=since)))
    return problems
