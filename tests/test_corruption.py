"""A part of scripts/corruption.py: every class of damage, each on every checkpoint that it can be done to."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from tests.corruption.judging import judge, measure_controls, quiet, run_class
from tests.corruption.mutations import CLASSES
from tests.corruption.originals import load, make_originals

EACH = 7


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    quiet()
    # Measuring the controls is a test of its own: each must load, bit by bit what was saved.
    yield measure_controls(make_originals(tmp_path_factory.mktemp("originals")))
    gc.unfreeze()
    logging.enable_progress_bar()
    logging.set_verbosity(verbosity)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", CLASSES)
def test_damage_is_never_silent(name: str, originals: dict[str, Any], tmp_path: Path) -> None:
    judged = run_class(name, EACH, 7, originals, tmp_path)
    assert [(said, verdict) for said, verdict in judged if not verdict.caught] == []
    assert len(judged) == EACH


def test_the_judge_sees_what_is_silently_wrong(originals: dict[str, Any], tmp_path: Path) -> None:
    # Without digests nothing tells a flipped byte: the judge must call that out, or it would prove nothing.
    original = originals["mpnet-pruned"]
    model = load(original.folder)
    with torch.no_grad():
        model.classifier.out_proj.bias.add_(1.0)
    model.save_pretrained(tmp_path)
    assert judge(tmp_path, original).outcome == "SILENT"
    assert judge(original.folder, original).outcome == "harmless"


def test_there_are_enough_classes_for_the_whole_suite() -> None:
    assert 110 * len(CLASSES) >= 2000
