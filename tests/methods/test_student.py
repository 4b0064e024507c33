from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hfcompress import LowRankConfig, StudentConfig, compress
from hfcompress.errors import CompressionError, ConfigError
from hfcompress.methods.registry import Context
from hfcompress.methods.student import principal_directions, sizes_of, student
from hfcompress.modeling.anatomy import attention_blocks
from hfcompress.modeling.checkpoint import needs_plugin
from hfcompress.modeling.depth import evenly
from tests.tiny_models import CELLS, WIDTH, inputs_for, make, run

# Their tables are of another width than the hidden one, or they read no words.
WITHOUT_TABLE = ("electra", "albert", "vit", "wav2vec2")


def halves(model: Any) -> dict[str, int]:
    return {name: size // 2 for name, size in sizes_of(model).items() if name != "head_dim"}


@pytest.mark.parametrize(("family", "head"), CELLS)
def test_a_student_is_stock_and_reloads(family: str, head: str, tmp_path: Path) -> None:
    model, inputs = make(family, head), inputs_for(family, head)
    before, sizes = sizes_of(model), halves(model)
    found = student(model, StudentConfig(sizes=sizes), Context())
    assert sizes_of(model) == before | sizes
    assert found["sizes"] == {name: [before[name], size] for name, size in sizes.items()}
    between = [name for name in model.state_dict() if "embeddings_project" in name and family == "electra"]
    assert set(found["begun_anew"]) <= set(between)
    assert not needs_plugin(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    for got, wanted in zip(run(again, inputs), run(model, inputs), strict=True):
        assert torch.isfinite(got).all()
        assert torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("family", dict(CELLS))
def test_every_family_is_begun_in_each_way(family: str) -> None:
    for initialisation in ("truncated_svd", "random"):
        model = make(family)
        config = StudentConfig.model_validate({"sizes": halves(model), "initialisation": initialisation})
        if initialisation == "truncated_svd" and family in WITHOUT_TABLE:
            with pytest.raises(CompressionError, match="initialisation: weight_selection"):
                student(model, config, Context())
            continue
        student(model, config, Context())
        assert all(torch.isfinite(each).all() for each in run(model, inputs_for(family)))


# The definitions


def test_places_are_evenly_spaced() -> None:
    assert evenly(12, 4) == [0, 3, 6, 9]
    assert evenly(5, 5) == [0, 1, 2, 3, 4]
    assert evenly(7, 3) == [0, 2, 4]


def test_weights_are_selected_by_layer_head_neuron_and_dimension() -> None:
    model = make("bert")  # 3 layers, 4 heads of 8, 24 neurons, 32 wide
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "hidden_size": 16}
    student(model, StudentConfig(sizes=sizes), Context())
    new, wide = model.state_dict(), torch.arange(0, 32, 2)
    heads = torch.cat([torch.arange(8), torch.arange(16, 24)])  # heads 0 and 2, whole
    for layer, source in ((0, 0), (1, 1)):  # of three layers the first two of 0, 1.5
        stem, was = f"bert.encoder.layer.{layer}.", f"bert.encoder.layer.{source}."
        query = old[f"{was}attention.self.query.weight"][heads][:, wide]
        assert torch.equal(new[f"{stem}attention.self.query.weight"], query)
        assert torch.equal(new[f"{stem}attention.self.value.bias"], old[f"{was}attention.self.value.bias"][heads])
        output = old[f"{was}attention.output.dense.weight"][wide][:, heads]
        assert torch.equal(new[f"{stem}attention.output.dense.weight"], output)
        neurons = old[f"{was}output.dense.weight"][wide][:, ::3]
        assert torch.equal(new[f"{stem}output.dense.weight"], neurons)
    assert torch.equal(new["classifier.weight"], old["classifier.weight"][:, wide])


def test_groups_keep_their_queries_and_fused_layers_their_parts() -> None:
    model = make("llama", "CausalLM")  # 8 query heads in 4 groups of 8 wide
    old = model.model.layers[0].self_attn.q_proj.weight.clone()
    student(model, StudentConfig(sizes={"num_attention_heads": 4, "num_key_value_heads": 2}), Context())
    heads = [0, 1, 4, 5]  # both queries of groups 0 and 2
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, old.view(8, 8, -1)[heads].flatten(0, 1))
    fused = make("gpt2", "LMHeadModel")
    whole = fused.transformer.h[0].attn.c_attn.weight.clone()
    student(
        fused, StudentConfig(sizes={"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}), Context()
    )
    wide = torch.arange(0, 32, 2)
    places = torch.cat([part * 32 + head * 8 + torch.arange(8) for part in range(3) for head in (0, 2)])
    assert torch.equal(fused.transformer.h[0].attn.c_attn.weight, whole[wide][:, places])
    assert fused.lm_head.weight is fused.transformer.wte.weight


def test_truncated_svd_keeps_the_most_of_the_embeddings() -> None:
    model = make("llama", "CausalLM")
    table = model.model.embed_tokens.weight.detach().clone()
    up = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    down = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    scale = model.model.norm.weight.detach().clone()
    config = StudentConfig(sizes={"hidden_size": WIDTH // 2}, initialisation="truncated_svd")
    student(model, config, Context())
    kept = model.model.embed_tokens.weight
    discarded = torch.linalg.svdvals(table.double())[WIDTH // 2 :].square().sum()
    assert (table.square().sum() - kept.square().sum()).item() == pytest.approx(discarded.item(), rel=1e-4)
    mixtures = principal_directions(table, WIDTH // 2)
    assert torch.allclose(mixtures.T @ mixtures, torch.eye(WIDTH // 2), atol=1e-5)
    assert torch.allclose(model.model.layers[1].mlp.up_proj.weight, up @ mixtures, atol=1e-5)
    assert torch.allclose(model.model.layers[1].mlp.down_proj.weight, mixtures.T @ down, atol=1e-5)
    assert torch.allclose(model.model.norm.weight, mixtures.square().T @ scale, atol=1e-5)


def test_a_width_that_is_not_needed_goes_without_loss() -> None:
    # A model made twice as wide by zeros is the same again: RMSNorm alone sees how wide it is, by the root of two.
    model = make("llama", "CausalLM")
    for name, tensor in model.named_parameters():
        with torch.no_grad():
            if "norm" in name:
                tensor.fill_(1.0)
            elif tensor.shape[-1] == WIDTH and "down" not in name and "o_proj" not in name:
                tensor[:, 1::2] = 0.0
            else:
                tensor[1::2] = 0.0
    inputs = inputs_for("llama", "CausalLM")
    wanted = run(model, inputs)[0]
    student(model, StudentConfig(sizes={"hidden_size": WIDTH // 2}), Context())
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.fill_(2**0.5)
    assert torch.allclose(run(model, inputs)[0], wanted, atol=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"vocab_size": 8}, "sizes.vocab_size is no size of this family.*hidden_size"),
        ({"hiden_size": 16}, "did you mean 'hidden_size'"),
        ({"hidden_size": 64}, "sizes.hidden_size must be from 1 to 32"),
        ({"num_hidden_layers": 0}, "sizes.num_hidden_layers must be from 1 to 3"),
        ({"num_hidden_layers": 3}, "as large as the model"),
        ({"num_attention_heads": 3}, "the family builds no such model"),
    ],
)
def test_what_no_student_can_be_is_refused(sizes: dict[str, int], says: str) -> None:
    model = make("bert")
    wanted = run(model, inputs_for("bert"))[0]
    with pytest.raises(CompressionError, match=says):
        student(model, StudentConfig(sizes=sizes), Context())
    assert torch.equal(run(model, inputs_for("bert"))[0], wanted)


def test_a_compressed_model_and_no_sizes_are_refused() -> None:
    model = compress(make("bert"), [LowRankConfig(method="svd", keep=0.5)])
    with pytest.raises(CompressionError, match="Put the student's step before"):
        student(model, StudentConfig(sizes={"num_hidden_layers": 1}), Context())
    assert len(attention_blocks(model)) == 3
    with pytest.raises(ConfigError, match="sizes"):
        StudentConfig(sizes={})


def test_names_common_to_all_families_are_understood() -> None:
    model = make("distilbert")
    student(model, StudentConfig(sizes={"num_hidden_layers": 1, "hidden_size": 16}), Context())
    assert (model.config.n_layers, model.config.dim) == (1, 16)
