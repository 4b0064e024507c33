"""Measures a result again and compares every figure that its report and its card state.

What can be measured is measured: the quality of the checkpoint, its parameters, bytes and operations, and, where the
original can be had, the speed-up at every batch. What was measured on models that are not in the folder (the steps
before the last, the seeds after the first) is computed again from the answers that the run kept. What is neither is
held to what the run wrote, by a digest.
"""

from __future__ import annotations

from pathlib import Path

from hfcompress.verification.checks import Check, holds
from hfcompress.verification.judging import judge
from hfcompress.verification.measuring import Measured, measure_again
from hfcompress.verification.timing import BETWEEN_RUNS, speeds_agree

__all__ = ["BETWEEN_RUNS", "Check", "Measured", "holds", "judge", "measure_again", "speeds_agree", "verify"]


def verify(
    directory: Path, *, original: str | None = None, data: str | None = None, progress: bool = True
) -> list[Check]:
    """Measures a result again and compares.

    Args:
        directory: A folder that a run has written, or a download of one.
        original: The original, for the speed-up: a checkpoint folder or a model's name. By default it is looked for
            in the run's working folder, and else made from the report's base model.
        data: A local folder with the task's data.
        progress: Whether to show progress bars.

    Returns:
        What holds, what does not, and what cannot be checked here.

    Raises:
        HFCompressError: The folder holds no checkpoint with a report, or its task's data are not here.
    """
    return judge(directory, measure_again(directory, original=original, data=data, progress=progress))
