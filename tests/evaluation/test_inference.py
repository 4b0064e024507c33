"""Models come back as they went in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hfcompress.evaluation.inference import inferring


def test_every_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model.train()
    model[1].eval()
    with inferring(model):
        assert not any(module.training for module in model.modules())
        assert torch.is_inference_mode_enabled()
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_modes_come_back_after_an_error() -> None:
    model = nn.Dropout()
    with pytest.raises(RuntimeError, match="inside"), inferring(model):
        raise RuntimeError("inside")
    assert model.training
    assert not torch.is_inference_mode_enabled()
