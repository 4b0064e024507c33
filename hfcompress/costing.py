"""What a run's models cost and bear, the original beside them; every measurement is kept with its step."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.evaluation.attacks import Attempt, Attempts, attack_model
from hfcompress.evaluation.cost import Speed, cost_inputs, measure_grid, measure_speed
from hfcompress.evaluation.explanations import Explained, explain, spread_rows
from hfcompress.evaluation.layers import LayerCost, measure_layers
from hfcompress.evaluation.report import describe_environment
from hfcompress.evaluation.robustness import Robustness, evaluate_changed
from hfcompress.evaluation.usage import Usage, measure_usage
from hfcompress.recipe import Recipe
from hfcompress.run_folder import (
    ATTACK,
    COSTS,
    EXPLANATIONS,
    GRID,
    LAYERS,
    ROBUSTNESS,
    Done,
    key_of,
    read_json,
    write_json,
)
from hfcompress.tasks import Task, kind_of

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# What is asked of answers, which times do not depend on.
_UNTIMED = {"explanations", "explanation_examples", "attack", "attack_examples"}


class Costing:
    """Times models and measures them on changed texts.

    Args:
        recipe: Says what is asked for.
        task: The recipe's task.
        tokenizer_of: Returns the tokenizer (or image processor) of a checkpoint.
    """

    def __init__(self, recipe: Recipe, task: Task, tokenizer_of: Callable[[Path], Any]) -> None:
        self._asked, self._max_length = recipe.evaluation, recipe.max_length
        self._task, self._kind, self._tokenizer_of = task, kind_of(task), tokenizer_of

    def costs(self, done: Sequence[Done]) -> list[tuple[Speed | None, Usage]]:
        """Times each step's model beside the original, which is the first of them and has no speed of its own."""
        original = None
        costs: list[tuple[Speed | None, Usage]] = []
        for each in done:
            file = each.folder / COSTS
            key = key_of(each.key, self._asked.model_dump(exclude=_UNTIMED), describe_environment())
            known = read_json(file)
            if known and known["key"] == key:
                costs.append((known["speed"] and Speed(**known["speed"]), Usage(**known["usage"])))
                continue
            logger.info("timing %s", each.name)
            original = original or self._kind.load(done[0].checkpoint)
            model = self._kind.load(each.checkpoint)
            size, length = self._asked.speed_batch_size, self._asked.speed_sequence_length
            inputs = cost_inputs(self._kind, (original, model), size, length)
            speed = None
            if each is not done[0]:
                speed = measure_speed(original, model, inputs, repeats=self._asked.speed_repeats)
            del model
            usage = measure_usage(partial(self._kind.load, each.checkpoint), inputs)
            write_json(file, {"key": key, "speed": speed and asdict(speed), "usage": asdict(usage)})
            costs.append((speed, usage))
        return costs

    def grid(self, first: Done, last: Done) -> tuple[Speed, ...]:
        """Times the result beside the original at several batch sizes and lengths."""
        asked, file = self._asked, last.folder / GRID
        key = key_of(first.key, last.key, asked.model_dump(exclude=_UNTIMED), describe_environment())
        known = read_json(file)
        if known and known["key"] == key:
            return tuple(Speed(**speed) for speed in known["grid"])
        if last is first or not asked.grid_batch_sizes:
            return ()
        original, model = self._kind.load(first.checkpoint), self._kind.load(last.checkpoint)
        longest = _longest(self._tokenizer_of(last.checkpoint), original.config)
        lengths = [each for each in asked.grid_sequence_lengths if each <= longest]
        if self._kind.speed_inputs(original.config, 1):
            lengths = lengths[:1]  # its inputs are of one size
        logger.info("timing batches of %s at lengths %s", list(asked.grid_batch_sizes), lengths)
        grid = measure_grid(
            original,
            model,
            partial(cost_inputs, self._kind, (original, model)),
            batch_sizes=asked.grid_batch_sizes,
            sequence_lengths=lengths,
            repeats=max(3, asked.speed_repeats // 2),
        )
        write_json(file, {"key": key, "grid": [asdict(speed) for speed in grid]})
        return grid

    def layers(self, first: Done, last: Done) -> tuple[LayerCost, ...]:
        """Times the result's linear layers beside the original's, on the batch of the speed measurement."""
        asked, file = self._asked, last.folder / LAYERS
        how = (asked.speed_batch_size, asked.speed_sequence_length)
        key = key_of(first.key, last.key, how, describe_environment())
        known = read_json(file)
        if known and known["key"] == key:
            return tuple(LayerCost.of_record(each) for each in known["layers"])
        if last is first:
            return ()
        logger.info("timing the layers of %s", last.name)
        original, model = self._kind.load(first.checkpoint), self._kind.load(last.checkpoint)
        layers = measure_layers(original, model, cost_inputs(self._kind, (original, model), *how))
        write_json(file, {"key": key, "layers": [asdict(each) for each in layers]})
        return layers

    def robustness(self, first: Done, last: Done, rows: Dataset) -> tuple[Robustness, ...]:
        """Measures the original and the result on changed texts of `rows`."""
        asked, file = self._asked, last.folder / ROBUSTNESS
        key = key_of(first.key, last.key, asked.robustness)
        known = read_json(file)
        if not known or known["key"] != key:
            scores: dict[str, list[dict[str, float]]] = {change: [] for change in asked.robustness}
            for each in (first, last) if asked.robustness else ():
                model, tokenizer = self._kind.load(each.checkpoint), self._tokenizer_of(each.checkpoint)
                for change in asked.robustness:
                    logger.info("measuring %s with %s", each.name, change)
                    quality = evaluate_changed(model, rows, self._task, tokenizer, change, **self._reading())
                    scores[change].append(quality.metrics)
            known = {"key": key, "scores": scores}
            write_json(file, known)
        return tuple(
            Robustness(change=change, original=before, compressed=after)
            for change, (before, after) in known["scores"].items()
        )

    def explanations(self, first: Done, last: Done, rows: Dataset, answers: Sequence[int]) -> Explained | None:
        """Explains the original's answers by the original and by the result, where the recipe asks for it.

        Args:
            first: The original.
            last: The result.
            rows: The evaluation split.
            answers: The original's answers to it.
        """
        library, count = self._asked.explanations, self._asked.explanation_examples
        if library is None:
            return None
        said = [answers[place] for place in spread_rows(count, len(rows))]
        logger.info("explaining answers by %s", library)
        explained = partial(explain, library=library, answers=said)
        tried = self._of_both(first, last, EXPLANATIONS, library, rows, count, explained)
        return Explained(original=tried[0], compressed=tried[1])

    def attack(self, first: Done, last: Done, rows: Dataset) -> Attempts | None:
        """Attacks the original and the result on rows of the evaluation split, where the recipe asks for it."""
        name, count = self._asked.attack, self._asked.attack_examples
        if name is None:
            return None
        logger.info("attacking by %s", name)

        def attacked(*given: Any, **how: Any) -> list[dict[str, Any]]:
            return [asdict(attempt) for attempt in partial(attack_model, name=name)(*given, **how)]

        tried = self._of_both(first, last, ATTACK, name, rows, count, attacked)
        before, after = ([Attempt(**each) for each in attempts] for attempts in tried)
        return Attempts(original=before, compressed=after)

    def _of_both(
        self, first: Done, last: Done, file: str, how: str, rows: Dataset, count: int, find_out: Callable[..., Any]
    ) -> list[Any]:
        """Finds something out about the original and the result on rows from all over a split, or reads it back."""
        places = spread_rows(count, len(rows))
        key = key_of(first.key, last.key, how, places)
        known = read_json(last.folder / file)
        if not known or known["key"] != key:
            chosen, found = rows.select(places, keep_in_memory=True), []
            for each in (first, last):
                model, tokenizer = self._kind.load(each.checkpoint), self._tokenizer_of(each.checkpoint)
                found.append(find_out(model, chosen, self._task, tokenizer, **self._reading()))
            known = {"key": key, "found": found}
            write_json(last.folder / file, known)
        return known["found"]

    def _reading(self) -> dict[str, int]:
        return {"max_length": self._max_length, "batch_size": self._asked.batch_size}


def _longest(processor: Any, config: Any) -> int:
    """Returns how many tokens a model can read, as far as its tokenizer and its config say."""
    said = (getattr(processor, "model_max_length", None), getattr(config, "max_position_embeddings", None))
    return min((each for each in said if each), default=sys.maxsize)
