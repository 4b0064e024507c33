"""Runs a recipe: its steps, with each of its seeds, and the report of them.

A run has two folders. `runs/<name>` is the result: a checkpoint with its card and report, there whole or not at
all. `runs/<name>.work` holds one folder a step, those of further seeds in a folder a seed; a step that is recorded
as done, for the same inputs, is not done again, and one that was cut off goes on from its last whole training
checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from hfcompress.bench import Bench
from hfcompress.costing import Costing
from hfcompress.errors import HFCompressError
from hfcompress.evaluation.attacks import require_attacks, withstood
from hfcompress.evaluation.comparison import Answers, compare
from hfcompress.evaluation.curves import Training
from hfcompress.evaluation.explanations import agreement, require_explainer
from hfcompress.evaluation.quality import score_task
from hfcompress.evaluation.report import Report, Row, describe_environment, retention
from hfcompress.evaluation.seeds import over_seeds
from hfcompress.material import Material, find_model
from hfcompress.methods.training import require_trackers
from hfcompress.publishing.hub import push, require_login
from hfcompress.publishing.metadata import stated_license
from hfcompress.recipe import Recipe
from hfcompress.recipe.schema import PushConfig, is_local
from hfcompress.run_folder import Done, locked, publish, refuse_foreign, say_what_goes
from hfcompress.tasks import Task, judged_by

__all__ = ["find_model", "run"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Measured:
    """What the steps of one seed came to."""

    done: list[Done]
    answers: list[Answers]


def run(recipe: Recipe, output: Path, quiet: bool = False) -> Report:
    """Runs a recipe to its end and writes the result: the checkpoint of its first seed.

    Args:
        recipe: What to do.
        output: The result's folder; `<output>.work` holds the steps.
        quiet: No progress bars.

    Returns:
        The report, which is also in the result's folder.

    Raises:
        RunFolderError: Another run uses the folder, or it holds something that no run wrote.
        HubError: The recipe says `push`, and there is no login, or the upload failed; then the result is there.
        HFCompressError: Model, data or a step is not right; steps that were done stay done.
    """
    output = Path(output)
    refuse_foreign(output)
    say_what_goes(output, _published_recipe(recipe))
    require_trackers([step.training for step in recipe.steps if step.training is not None])
    if recipe.evaluation.explanations is not None:
        require_explainer(recipe.evaluation.explanations)
    if recipe.evaluation.attack is not None:
        require_attacks()
    if recipe.push is not None:
        require_login()
    work = output.with_name(f"{output.name}.work")
    with locked(work):
        material = Material(recipe, progress=not quiet)
        runs = _run_seeds(material, work, quiet)
        report, trials = _report(material, runs)
        publish(runs[0].done[-1].checkpoint, report, [each.answers for each in runs], output, **trials)
    if recipe.push is not None:
        _push(output, recipe.push)
    return report


def _push(output: Path, to: PushConfig) -> None:
    """Uploads a result; where that fails, says that nothing of it is lost."""
    try:
        logger.info("pushed to %s", push(output, to.repo, **to.options()))
    except HFCompressError:
        logger.error("the result is whole in %s, but was not uploaded; `hfcompress push` does that alone", output)
        raise


def _run_seeds(material: Material, work: Path, quiet: bool) -> list[_Measured]:
    """Does all steps with each seed; the first is the one whose result is published."""
    runs: list[_Measured] = []
    seeds = material.recipe.all_seeds
    for seed in seeds:
        if len(seeds) > 1:
            logger.info("seed %d, of %s", seed, ", ".join(map(str, seeds)))
        bench = Bench(material, seed, work / f"seed-{seed}" if runs else work, work.parent / "hfcompress_cache", quiet)
        # A base model that is not fine-tuned first is the same for every seed.
        shared = runs[0].done[0] if runs and not bench.begins_with_fine_tuning else None
        done = bench.run_steps(shared)
        runs.append(_Measured(done, [replace(bench.answers(each), groups=material.groups) for each in done]))
    return runs


def _report(material: Material, runs: Sequence[_Measured]) -> tuple[Report, dict[str, Any]]:
    """Compares every step with the original: the model after the leading fine-tuning step, or the base.

    Returns:
        The report, and what its explanations and its attack were summed up from, by field.
    """
    recipe, task = material.recipe, judged_by(material.task, material.recipe.evaluation.metrics)
    done, answers = runs[0].done, runs[0].answers
    costing = Costing(recipe, material.task, lambda each: material.cut(each).tokenizer)
    rows = _rows(task, done, answers, costing)
    names = [each.name for each in done]
    asked, split = recipe.evaluation, material.data[task.evaluation_split]
    explained = costing.explanations(done[0], done[-1], split, cast("list[int]", answers[0].predictions))
    attempts = costing.attack(done[0], done[-1], split)
    report = Report(
        name=recipe.name,
        base_model=_without_folders(recipe.model),
        license=stated_license(material.base / "README.md") if is_local(recipe.model) else None,
        task=task.name,
        recipe=_published_recipe(recipe),
        environment=describe_environment(),
        split=task.evaluation_split,
        examples=done[0].record["examples"],
        metric=task.metrics[0],
        seed=recipe.seed,
        rows=rows,
        grid=costing.grid(done[0], done[-1]),
        robustness=costing.robustness(done[0], done[-1], split),
        layers=costing.layers(done[0], done[-1]),
        seeds=over_seeds(recipe.seeds, names, [each.answers for each in runs], task) if recipe.seeds else None,
        explanations=agreement(asked.explanations, explained) if asked.explanations and explained else None,
        attack=withstood(asked.attack, attempts) if asked.attack and attempts else None,
    )
    return report, {"explanations": explained, "attack": attempts}


def _rows(task: Task, done: Sequence[Done], answers: Sequence[Answers], costing: Costing) -> tuple[Row, ...]:
    primary = task.metrics[0]
    scores = [score_task(task, each.predictions, each.references, each.confidences) for each in answers]
    return tuple(
        Row(
            name=each.name,
            methods=each.methods,
            metrics=score,
            retention=retention(score[primary], scores[0][primary], primary),
            parameters=each.record["parameters"],
            bytes=each.record["bytes"],
            speed=speed,
            seconds=each.record["seconds"],
            findings=each.record["findings"],
            comparison=compare(answers[0], given, task) if each is not done[0] else None,
            usage=usage,
            training=Training.of_record(kept) if (kept := each.record.get("training")) else None,
        )
        for each, given, score, (speed, usage) in zip(done, answers, scores, costing.costs(done), strict=True)
    )


def _published_recipe(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe without the folders of this machine."""
    values = recipe.to_dict()
    for field in {"model", "teacher", "data", "unlabelled"} & set(values):
        values[field] = _without_folders(values[field], always=field in ("data", "unlabelled"))
    if "more_teachers" in values:
        values["more_teachers"] = [_without_folders(each) for each in values["more_teachers"]]
    if isinstance(values["task"], dict):
        values["task"] = values["task"] | {"data": _without_folders(values["task"]["data"])}
    return values


def _without_folders(name: str, *, always: bool = False) -> str:
    return f"./{Path(name).name}" if always or is_local(name) else name
