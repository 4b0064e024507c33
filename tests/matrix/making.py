"""Makes the cells: a tiny model of the family, compressed, saved, with what it computed before it was saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hfcompress import compress
from hfcompress.errors import HFCompressError
from hfcompress.modeling.anatomy import attention_blocks, base_model, feed_forward_blocks, linear_layers
from hfcompress.modeling.layers.low_rank import LowRankLinear
from tests.matrix.cells import METHODS, Cell
from tests.tiny_models import FAMILIES, VOCABULARY, inputs_for, make, run

TOKENS = 5  # how many tokens are generated


class Broken(Exception):
    """A cell is not what it must be; says how."""


def make_cell(cell: Cell, place: Path) -> None:
    """Compresses a model as the cell says, and saves it with its inputs and outputs under `place`.

    Raises:
        Broken: The method failed, changed nothing, left all layers alike, or worked where a reason says it cannot.
    """
    reason = cell.reason
    if reason is not None and reason.error is None:
        return
    model, inputs = fresh(cell.family, cell.head), inputs_for(cell.family, cell.head)
    before, rows = run(model, inputs), model.config.vocab_size if cell.method == "vocabulary" else None
    tokenizer = words(model)
    texts = [said(ids) for name, ids in inputs.items() if name.endswith("input_ids")]
    try:
        compress(model, METHODS[cell.method](model), calibration=[inputs], tokenizer=tokenizer, texts=texts)
    except HFCompressError as error:
        if reason is not None and str(reason.error) in str(error):
            return
        raise Broken(f"refused: {error}") from error
    if reason is not None:
        raise Broken(f"it works, and is said to be impossible: {reason.text}")
    if rows is not None:
        inputs = {name: renumber(ids, tokenizer) if "input_ids" in name else ids for name, ids in inputs.items()}
        tokenizer.save_pretrained(place / "checkpoint")
        changed = model.get_input_embeddings().weight.shape[0] == len(tokenizer) < rows  # type: ignore[union-attr]
    else:
        changed = not all(map(torch.equal, run(model, inputs), before))
    if not changed:
        raise Broken("the method changed nothing")
    if cell.method in ("heads and neurons", "low rank", "chain"):
        require_uneven(cell, model)
    if cell.method == "low rank":
        require_factors(model)
    keep(cell, model, inputs, place)


def fresh(family: str, head: str) -> Any:
    """Returns the float model, with the attention that a plain load chooses."""
    return make(family, head, attention="sdpa" if FAMILIES[family].sdpa else "eager")


def keep(cell: Cell, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], place: Path) -> None:
    """Saves the checkpoint by plain `save_pretrained`, and beside it all that a check needs to know."""
    expected = {f"output.{index}": output for index, output in enumerate(run(model, inputs))}
    if cell.head in FAMILIES[cell.family].generates:
        expected |= {f"token.{index}": logits for index, logits in enumerate(generate(model, inputs))}
    model.save_pretrained(place / "checkpoint")
    save_file({name: value.contiguous() for name, value in expected.items()}, place / "expected.safetensors")
    save_file({name: value.contiguous() for name, value in inputs.items()}, place / "inputs.safetensors")
    known = {"family": cell.family, "head": cell.head, "method": cell.method, "class": type(model).__name__}
    (place / "cell.json").write_text(json.dumps(known))


def generate(model: Any, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Generates with a cache; returns the logits of each token, for tokens alone hide small differences."""
    prompt = {name: value for name, value in inputs.items() if "decoder" not in name}
    lengths = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    made = model.generate(**prompt, **lengths, use_cache=True, return_dict_in_generate=True, output_logits=True)
    return list(made.logits)


def require_uneven(cell: Cell, model: PreTrainedModel) -> None:
    """Refuses a cell whose layers all kept the same, so that a mix-up of layers would not show.

    Raises:
        Broken: They did; ALBERT's layers are one, so there they may.
    """
    sizes: dict[str, list[int]] = {}
    if cell.method != "low rank":
        sizes["heads"] = [block.heads for block in attention_blocks(model)]
        sizes["neurons"] = [block.neurons for block in feed_forward_blocks(model)]
    if cell.method != "heads and neurons":
        sizes["ranks"] = [each.rank for each in base_model(model).modules() if isinstance(each, LowRankLinear)]
    for what, found in sizes.items():
        if not found or (len(set(found)) == 1 and cell.family != "albert"):
            raise Broken(f"the layers all have the same {what}: {found}")


def require_factors(model: PreTrainedModel) -> None:
    """Refuses a cell in which a linear layer of the base model was left whole.

    Raises:
        Broken: Names the first.
    """
    base = base_model(model)
    for path in linear_layers(model):
        if not isinstance(base.get_submodule(path.rpartition(".")[0]), LowRankLinear):
            raise Broken(f"{path} was left whole")


# A tokenizer of one word a token


def words(model: PreTrainedModel) -> PreTrainedTokenizerFast:
    """Returns a tokenizer whose words are `t0`, `t1` and so on, with the model's special tokens among them."""
    tokenizer = Tokenizer(models.WordLevel({f"t{index}": index for index in range(VOCABULARY)}, unk_token="t3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A t2", special_tokens=[("t2", 2)])
    pad = getattr(model.config, "pad_token_id", None) or 0
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t3", eos_token="t2", pad_token=f"t{pad}", model_max_length=32
    )


def said(ids: torch.Tensor) -> str:
    """Returns the text of these tokens, all special ones included."""
    return " ".join(f"t{index}" for index in [*range(5), *ids.flatten().tolist()])


def renumber(ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Returns what the tokens are called in a trimmed tokenizer."""
    new = tokenizer.convert_tokens_to_ids([f"t{index}" for index in ids.flatten().tolist()])
    return torch.tensor(new).view(ids.shape)
