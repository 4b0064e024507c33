from __future__ import annotations

from typing import Any

import pytest
import torch

from hfcompress.methods.pruning.stream import StreamWatch
from hfcompress.modeling.anatomy import attention_blocks, base_model, feed_forward_blocks
from tests.tiny_models import inputs_for, make, run

LAST_NORM = {
    "bert": "output.LayerNorm",
    "mpnet": "output.LayerNorm",
    "distilbert": "output_layer_norm",
    "llama": None,
    "gpt2": None,
    "vit": None,
    "deberta-v2": "output.LayerNorm",
}


def seen(family: str, head: str) -> tuple[Any, StreamWatch, list[str], torch.Tensor, torch.Tensor]:
    """Runs a model, watching its second layer."""
    model = make(family, head)
    blocks = [*attention_blocks(model), *feed_forward_blocks(model)]
    path = blocks[1].layer
    own = [block for block in blocks if block.layer == path]
    layer = base_model(model).get_submodule(path)
    watch, calls = StreamWatch(layer, own), []

    def note(module: Any, arguments: Any, output: Any) -> None:
        calls.append((arguments[0], output if isinstance(output, torch.Tensor) else output[0]))

    handle = layer.register_forward_hook(note)
    with watch.watching():
        run(model, inputs_for(family, head))
    handle.remove()
    return layer, watch, [block.spec.output for block in own], *calls[0]


@pytest.mark.parametrize("family", LAST_NORM)
def test_the_stream_is_what_a_block_adds_to(family: str) -> None:
    head = "ImageClassification" if family == "vit" else "SequenceClassification"
    layer, watch, names, hidden, output = seen(family, head)
    norm = watch.norm(hidden, output)
    last = names[-1]
    whole = watch.before(last, norm, hidden) + watch.gives[last]
    path = LAST_NORM[family]
    assert norm == ("before" if path is None else "after")
    ended = whole if path is None else layer.get_submodule(path)(whole)
    torch.testing.assert_close(ended, output, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.as_tensor(watch.before(names[0], norm, hidden)), hidden)
