"""Every answer of every measured model of a run, kept beside the report: what its figures can be computed from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from hfcompress.errors import CheckpointError
from hfcompress.evaluation.attacks import Attempts
from hfcompress.evaluation.comparison import Answers
from hfcompress.evaluation.explanations import Explained
from hfcompress.evaluation.records import STRICT, Values
from hfcompress.evaluation.report import Report


@dataclass(frozen=True, kw_only=True)
class RowAnswers:
    """One model's answers.

    Attributes:
        name: The row of the report.
        predictions: Label ids of the task, numbers, texts or lists of these, one an example.
        confidences: The probability given to each prediction; nothing where answers are not label ids.
    """

    __pydantic_config__ = STRICT

    name: str
    predictions: Values
    confidences: list[float]


@dataclass(frozen=True, kw_only=True)
class SeedAnswers:
    """The answers of a further seed's models.

    Attributes:
        seed: The seed.
        rows: One for each row of the report, in its order.
    """

    __pydantic_config__ = STRICT

    seed: int
    rows: Annotated[tuple[RowAnswers, ...], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class AnswerBook:
    """The answers behind a report.

    Attributes:
        format: The version of this record.
        report: SHA-256 of the report's JSON, by which a report that was altered afterwards is known.
        references: The right answers, in the split's order.
        groups: Each example's group, by column of the data; empty where the recipe names none.
        rows: One for each row of the report, in its order.
        seeds: Those of the seeds after the first, in the recipe's order.
        explanations: What the words of some rows count for, where the recipe asks for it.
        attack: What an attack on some rows came to, where the recipe asks for it.
    """

    __pydantic_config__ = STRICT

    format: Literal[1] = 1
    report: str
    references: Values
    rows: Annotated[tuple[RowAnswers, ...], Field(min_length=1)]
    groups: dict[str, list[str]] = field(default_factory=dict)
    seeds: tuple[SeedAnswers, ...] = ()
    explanations: Explained | None = None
    attack: Attempts | None = None

    @classmethod
    def of_run(
        cls,
        report: Report,
        answers: Sequence[Sequence[Answers]],
        *,
        explanations: Explained | None = None,
        attack: Attempts | None = None,
    ) -> AnswerBook:
        """Returns the book of a report.

        Args:
            report: The report.
            answers: For each seed, the first one first, the answers that each row was measured by.
            explanations: What the report's explanations were summed up from.
            attack: What its attack was summed up from.
        """
        seeds = report.seeds.seeds if report.seeds else (report.seed,)
        first, *others = [
            tuple(
                RowAnswers(name=row.name, predictions=each.predictions, confidences=each.confidences)
                for row, each in zip(report.rows, own, strict=True)
            )
            for own in answers
        ]
        return cls(
            report=seal(report.to_json()),
            references=answers[0][0].references,
            rows=first,
            groups=answers[0][0].groups,
            seeds=tuple(SeedAnswers(seed=seed, rows=rows) for seed, rows in zip(seeds[1:], others, strict=True)),
            explanations=explanations,
            attack=attack,
        )

    def every_seed(self) -> list[list[Answers]]:
        """Returns the answers of each seed's rows, the first seed first."""
        return [[self._of(row) for row in rows] for rows in (self.rows, *(each.rows for each in self.seeds))]

    def answers(self, place: int) -> Answers:
        """Returns the answers of one row."""
        return self._of(self.rows[place])

    def _of(self, row: RowAnswers) -> Answers:
        return Answers(
            predictions=row.predictions,
            references=self.references,
            confidences=row.confidences,
            groups=self.groups,
        )

    def to_json(self) -> str:
        """Returns the book as JSON text, on few lines: it holds a number for every example."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> AnswerBook:
        """Reads what `to_json` wrote, strictly.

        Raises:
            CheckpointError: The text is no such JSON.
        """
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            lines = "".join(f"\n  {'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()[:5])
            raise CheckpointError(f"the kept predictions are not valid:{lines}") from None


def seal(report: str) -> str:
    """Returns the digest that ties a report's text to what was written with it."""
    return hashlib.sha256(report.encode()).hexdigest()
