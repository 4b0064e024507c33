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


def seen(family: str, head: str, number: int = 1) -> tuple[Any, StreamWatch, list[str], torch.Tensor, torch.Tensor]:
    """Runs a model, watching one of its layers: the second."""
    model = make(family, head)
    blocks = [*attention_blocks(model), *feed_forward_blocks(model)]
    path = blocks[number].layer
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


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit", "t5", "whisper"])
def test_bfloat16_does_not_hide_where_the_norms_are(family: str) -> None:
    head = {"vit": "ImageClassification", "llama": "CausalLM", "gpt2": "LMHeadModel"}.get(family, "")
    for number in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            _, watch, _, hidden, output = seen(family, head, number)
        assert watch.norm(hidden, output) == "before"


def test_a_first_layer_that_reads_the_stream_itself_adds_to_it_all_the_same() -> None:
    _, watch, names, hidden, output = seen("modernbert", "SequenceClassification", 0)
    stream = watch.before(names[-1], watch.norm(hidden, output), hidden)
    torch.testing.assert_close(stream + watch.gives[names[-1]], output)
