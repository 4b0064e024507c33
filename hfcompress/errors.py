"""Everything hfcompress can refuse, in one tree: what was wrong and what to do about it.

This module imports nothing heavy, so the command line can handle every error without torch.
"""

from __future__ import annotations

from dataclasses import dataclass


class HFCompressError(Exception):
    """Base of every error that hfcompress raises on purpose.

    Args:
        message: What was wrong, naming the file, field or tensor and the allowed values.
        hint: What to do about it; printed on a line of its own.
    """

    user_error = True

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(f"{message}\n{hint}" if hint else message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration.

    Attributes:
        path: Keys and indexes from the outermost mapping down to the value.
        message: What is wrong with it and what would be right.
    """

    path: tuple[str | int, ...]
    message: str

    def __str__(self) -> str:
        where = ".".join(str(key) for key in self.path)
        return f"{where}: {self.message}" if where else self.message


class ConfigError(HFCompressError, ValueError):
    """A method's or trainer's configuration holds wrong values; `problems` lists them all."""

    def __init__(self, subject: str, problems: tuple[Problem, ...]) -> None:
        lines = "".join(f"\n  {problem}" for problem in problems)
        super().__init__(f"{subject} is not valid:{lines}")
        self.problems = problems


class RecipeError(HFCompressError, ValueError):
    """A recipe cannot be run as it stands; every problem is reported at once."""


class UnsupportedModelError(HFCompressError, ValueError):
    """A model family, head or module that a method does not know how to change."""


class CompressionError(HFCompressError, ValueError):
    """A method cannot do what it was asked on this model (targets, calibration data, weights)."""


class CheckpointError(HFCompressError, ValueError):
    """A checkpoint is damaged, hostile, or does not hold what its config says."""


class DataError(HFCompressError, ValueError):
    """A task's data lacks a column, a label or a row that is needed."""


class MissingBackendError(HFCompressError, ImportError):
    """An optional engine is not installed; the hint names the extra that brings it."""


class RunFolderError(HFCompressError):
    """An output folder is in use by another run, or holds something that is not ours."""


class FetchError(HFCompressError):
    """Something that had to be downloaded did not arrive whole."""

    user_error = False


class HubError(HFCompressError):
    """The Hub refused or could not be reached."""

    user_error = False


class TrainingError(HFCompressError):
    """Training cannot go on (a loss that is not finite, an unusable resume point)."""

    user_error = False
