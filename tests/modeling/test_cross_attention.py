"""BERT and its like as decoders beside an encoder: their cross-attention is pruned, saved and loaded as their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CamembertConfig, CamembertForCausalLM

from hfcompress import LayerDroppingConfig, LowRankConfig, StructuredPruningConfig, compress
from hfcompress.errors import CompressionError
from hfcompress.modeling.anatomy import attention_blocks
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.structure import describe
from tests.modeling.test_families import close, reload, same, uneven
from tests.tiny_models import LAYERS, WIDTH, make, run

DECODERS = {
    "bert": "LMHeadModel",
    "roberta": "CausalLM",
    "xlm-roberta": "CausalLM",
    "camembert": "CausalLM",
    "electra": "CausalLM",
}


def decoder(family: str) -> Any:
    """Makes a decoder that attends to the states of an encoder."""
    if family != "camembert":
        return make(family, DECODERS[family], add_cross_attention=True)
    like = make("roberta", "CausalLM", add_cross_attention=True)
    values: dict[str, Any] = {name: value for name, value in like.config.to_dict().items() if name != "model_type"}
    values["attn_implementation"] = "eager"
    model = CamembertForCausalLM(CamembertConfig(**values)).eval()
    model.load_state_dict(like.state_dict())
    return model


def decoder_inputs(family: str, width: int = WIDTH) -> dict[str, torch.Tensor]:
    """Returns inputs of one, with the states of an encoder, another number of them."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(5, 61, (2, 7), generator=generator)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, 3:] = 0
    states = torch.randn(2, 5, width, generator=generator)
    return {"input_ids": ids, "encoder_hidden_states": states, "encoder_attention_mask": mask}


@pytest.mark.parametrize("family", DECODERS)
def test_pruned_heads_equal_zeroed_ones_and_reload(family: str, tmp_path: Path) -> None:
    model, inputs = decoder(family), decoder_inputs(family)
    zeroed = copy.deepcopy(model)
    assert len(attention_blocks(model)) == 2 * LAYERS
    uneven(model, by="pruning")
    uneven(zeroed, by="zeroing")
    commit(model)
    assert any("crossattention" in name for name in describe(model)["heads"])
    assert close(run(model, inputs), run(zeroed, inputs))
    again = reload(model, tmp_path)
    assert describe(again) == describe(model)
    assert same(run(again, inputs), run(model, inputs))


@pytest.mark.parametrize("family", DECODERS)
def test_methods_see_it(family: str, tmp_path: Path) -> None:
    model, inputs = decoder(family), decoder_inputs(family)
    batch = inputs | {"labels": inputs["input_ids"]}
    steps = [StructuredPruningConfig(heads=0.4, neurons=0.4, multiple_of=1), LowRankConfig(keep=0.6, share=True)]
    compress(model, steps, calibration=[batch])
    ranks = [name for section in ("low_rank", "shared") for name in describe(model).get(section, {})]
    assert [name for name in ranks if "crossattention.self" in name]
    assert sum(block.heads for block in attention_blocks(model)) < 2 * LAYERS * 4
    assert same(run(reload(model, tmp_path), inputs), run(model, inputs))


def test_its_attentions_alone_cannot_be_taken_out() -> None:
    model = decoder("bert")
    with pytest.raises(CompressionError, match="cannot be taken out"):
        compress(model, [LayerDroppingConfig(part="attention", which="last")])
    assert not describe(model)
