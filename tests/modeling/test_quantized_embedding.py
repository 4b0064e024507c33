from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hfcompress.modeling.layers.quantized_embedding import (
    QuantizedEmbedding,
    pack_nibbles,
    quantize_rows,
    unpack_nibbles,
)


def test_nibbles_pack_and_unpack() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 1)
    packed = pack_nibbles(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 8)
    assert torch.equal(unpack_nibbles(packed), codes)


@pytest.mark.parametrize(("bits", "limit"), [(8, 127), (4, 7)])
@pytest.mark.parametrize("group_size", [8, 32])
def test_rounding_error_is_within_half_a_step(bits: Any, limit: int, group_size: int) -> None:
    torch.manual_seed(0)
    table = torch.randn(50, 32)
    codes, scales = quantize_rows(table, bits, group_size)
    assert codes.dtype == torch.int8 and codes.abs().max() <= limit
    assert scales.shape == (50, 32 // group_size)
    steps = scales.repeat_interleave(group_size, dim=1)
    errors = (codes * steps - table).abs()
    inside = table.abs() <= limit * steps + 1e-5  # 4-bit scales may clip an outlier
    assert (errors <= steps / 2 + 1e-5)[inside].all()
    assert inside.float().mean() > (0.999 if bits == 8 else 0.9)


def test_clipping_four_bit_outliers_is_never_worse_than_not() -> None:
    torch.manual_seed(0)
    table = torch.randn(20, 32)
    table[:, 0] = 9.0
    codes, scales = quantize_rows(table, 4, 32)
    plain = table.abs().amax(1, keepdim=True) / 7
    rounded = (table / plain).round() * plain
    assert ((codes * scales - table) ** 2).sum() <= ((rounded - table) ** 2).sum()


def test_rows_of_zeros_and_many_rows() -> None:
    table = torch.zeros(9000, 8)
    table[5000] = 1.0
    codes, scales = quantize_rows(table, 8, 8)
    assert torch.equal(codes * scales, table)
    assert scales[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_looks_up_what_it_stores(bits: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(11, 16, dtype=dtype)
    module = QuantizedEmbedding.from_float(embedding, bits=bits, group_size=8)
    codes, scales = quantize_rows(embedding.weight.detach(), bits, 8)
    table = (codes.float() * scales.repeat_interleave(8, dim=1)).to(dtype)
    indices = torch.tensor([[0, 10], [3, 3]])
    assert module(indices).dtype == dtype
    assert torch.equal(module(indices), table[indices])
    again = QuantizedEmbedding(11, 16, bits=bits, group_size=8, dtype=dtype)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(indices), module(indices))
    with pytest.raises(IndexError):
        module(torch.tensor([11]))


def test_is_a_quarter_of_the_size_and_refuses_a_stock_table() -> None:
    embedding = nn.Embedding(1000, 64)
    module = QuantizedEmbedding.from_float(embedding, bits=8, group_size=64)
    assert sum(each.nbytes for each in module.buffers()) < 0.28 * embedding.weight.nbytes
    assert module.weight.shape == (1,)  # so that a stock embedding refuses the file
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        nn.Embedding(1000, 64).load_state_dict(module.state_dict(), strict=False)


def test_a_change_of_dtype_and_back_leaves_every_scale_as_it_was() -> None:
    from hfcompress import LowRankConfig, QuantizationConfig, compress
    from hfcompress.modeling.tables import cast_floats
    from tests.workshop import batches, logits, tiny_classifier

    steps = [LowRankConfig(targets=["ffn_input"], rank=8), QuantizationConfig(weights="packed-4", embeddings="int4")]
    model = compress(tiny_classifier().to(torch.bfloat16), steps)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cast_floats(model, torch.float32)
    assert model.dtype == torch.float32
    assert logits(model, batches(1)[0]).dtype == torch.float32  # no layer is left behind
    now = model.state_dict()
    assert all(torch.equal(now[name], before[name]) for name in now if name.endswith(("scales", "codes")))
    cast_floats(model, torch.bfloat16)
    after = model.state_dict()
    assert all(after[name].dtype == each.dtype and torch.equal(after[name], each) for name, each in before.items())
