"""Children that are killed on purpose, and what they must not share with the test that kills them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import NoReturn

from transformers.utils import logging


def fork(work: Callable[[], None]) -> int:
    """Runs `work` in a forked process, which starts in milliseconds with everything imported; returns its id.

    The child shows no progress bars: their lock is a semaphore that forked processes share, and a child that is killed
    while it holds the lock would leave this process, and all its later children, waiting for ever.
    """
    process = os.fork()
    if process:
        return process
    _run_and_exit(work)


def _run_and_exit(work: Callable[[], None]) -> NoReturn:
    status = 1
    try:
        logging.disable_progress_bar()
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # no clean-up of the test runner's in here
