"""Questions whose answer is a piece of a context (extractive question answering, as in SQuAD)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfcompress.errors import DataError
from hfcompress.tasks.checks import check_texts
from hfcompress.tasks.kinds.base import Given, Kind, pad
from hfcompress.tasks.kinds.blocks import require_fast
from hfcompress.tasks.task import Task

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

_BEST = 20  # starts and ends that are tried with one another
_LONGEST = 30  # tokens of an answer
_NO_INPUTS = frozenset({"example", "starts", "ends", "context", "texts"})


class QuestionAnswering(Kind):
    """The best span of a context.

    A context that is too long is read in windows that overlap by a third of `max_length`; the best span of all
    windows is the answer. An example without right answers is one that cannot be answered: the right answer is then
    the empty text, and a model gives it where its score at the first token is above that of every span.
    """

    name = "question_answering"
    auto_class = "AutoModelForQuestionAnswering"
    pipeline_tag = "question-answering"
    metrics = ("token_f1", "exact_match")
    defaults = ("token_f1", "exact_match")
    columns = ("question", "context")
    label = "answers"
    unit = "questions"
    encoded = ("input_ids", "starts", "ends", "context", "texts")

    def check(self, task: Task, split: Dataset, where: str, *, training: bool) -> None:
        """Two texts, and answers with their places."""
        if len(task.columns) != 2:
            raise DataError(f"{where}: this kind of task reads two columns, a question and a context")
        for column in task.columns:
            check_texts(split, column, where)
        for row, (given, context) in enumerate(zip(split[task.label], split[task.columns[1]], strict=True)):
            whole = isinstance(given, dict) and {"text", "answer_start"} <= given.keys()
            if not whole or len(given["text"]) != len(given["answer_start"]):
                raise DataError(
                    f"{where}: column '{task.label}' must hold {{text: [...], answer_start: [...]}}; row {row} does not"
                )
            for text, start in zip(given["text"], given["answer_start"], strict=True):
                if type(start) is not int or context[start : start + len(text)] != text:
                    raise DataError(f"{where}: row {row}: the answer {text!r} is not at {start!r} of its context")

    def encode(self, dataset: Dataset, task: Task, processor: Any, *, max_length: int) -> Dataset:
        """Returns windows with the places of the first right answer; where it is not inside, the first token's."""
        require_fast(processor)
        question, context = task.columns

        def tokenize(rows: dict[str, list[Any]], numbers: list[int]) -> dict[str, Any]:
            encoded = processor(
                rows[question],
                rows[context],
                truncation="only_second",
                max_length=max_length,
                stride=max_length // 3,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            own = [name for name in processor.model_input_names if name in encoded]
            made: dict[str, Any] = {name: encoded[name] for name in own}
            more = ("start_positions", "end_positions", "starts", "ends", "example", "context", "texts")
            made |= {name: [] for name in more}
            for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
                spans = [
                    span if part == 1 else (-1, -1)
                    for span, part in zip(encoded["offset_mapping"][window], encoded.sequence_ids(window), strict=True)
                ]
                answers = rows[task.label][row]
                start, end = _positions(spans, answers)
                values = (start, end, [a for a, _ in spans], [b for _, b in spans])
                values += (numbers[row], rows[context][row], list(answers["text"]))
                for name, value in zip(more, values, strict=True):
                    made[name].append(value)
            return made

        return dataset.map(
            tokenize,
            batched=True,
            with_indices=True,
            remove_columns=dataset.column_names,
            keep_in_memory=True,
            desc=f"Tokenizing {task.name}",
        )

    def collator(self, processor: Any) -> Any:
        """Pads with tokens that are not attended to."""
        padding = {"input_ids": processor.pad_token_id or 0}
        return lambda rows: pad(rows, padding, leave_out=_NO_INPUTS)

    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[Any]:
        """Keeps the logits of starts and ends: two of (tokens,)."""
        return list(zip(outputs.start_logits.float().cpu(), outputs.end_logits.float().cpu(), strict=True))

    def answers(self, task: Task, ids: Sequence[int], rows: Dataset, kept: Sequence[Any]) -> Given:
        """Returns the answers as texts; the references are lists of right ones."""
        best: dict[int, tuple[float, str]] = {}
        none: dict[int, float] = {}
        right: dict[int, list[str]] = {}
        for number, (start_logits, end_logits) in enumerate(kept):
            window: dict[str, Any] = rows[number]
            example = window["example"]
            right[example] = list(window["texts"]) or [""]
            none[example] = min(none.get(example, float("inf")), float(start_logits[0] + end_logits[0]))
            found = _best_span(window, start_logits.tolist(), end_logits.tolist())
            if found is not None and (example not in best or found[0] > best[example][0]):
                best[example] = found
        may_be_none = any(texts == [""] for texts in right.values())
        predictions = []
        for example in right:
            score, text = best.get(example, (float("-inf"), ""))
            predictions.append("" if may_be_none and none[example] > score else text)
        return Given(predictions, list(right.values()), [])


def _positions(spans: Sequence[tuple[int, int]], answers: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the first and last token of the first right answer, or 0 and 0 where the window does not hold it."""
    if not answers["text"]:
        return 0, 0
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    inside = [place for place, (start, stop) in enumerate(spans) if start >= 0 and start < end and stop > begin]
    known = [span for span in spans if span[0] >= 0]
    if not inside or known[0][0] > begin or known[-1][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def _best_span(window: Mapping[str, Any], starts: list[float], ends: list[float]) -> tuple[float, str] | None:
    """Returns the score and the text of a window's best span, or None where it has none."""
    places = [place for place, start in enumerate(window["starts"]) if start >= 0]
    tried = [sorted(places, key=lambda place: -logits[place])[:_BEST] for logits in (starts, ends)]
    found = [
        (starts[first] + ends[last], -first, -last)
        for first in tried[0]
        for last in tried[1]
        if first <= last < first + _LONGEST
    ]
    if not found:
        return None
    score, first, last = max(found)
    return score, window["context"][window["starts"][-first] : window["ends"][-last]]
