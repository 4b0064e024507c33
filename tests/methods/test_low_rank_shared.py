"""Layers of one input that share the factor which reads it."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from hfcompress import LowRankConfig, QuantizationConfig, UnstructuredPruningConfig, compress, lora_targets
from hfcompress.errors import CheckpointError, ConfigError
from hfcompress.methods.low_rank import low_rank
from hfcompress.methods.low_rank.costs import costs_of
from hfcompress.methods.low_rank.maths import energies, truncate
from hfcompress.methods.registry import Context
from hfcompress.modeling import surgery
from hfcompress.modeling.anatomy import attention_blocks, base_model, feed_forward_blocks, modules_of
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.densify import densify
from hfcompress.modeling.layers.low_rank import LowRankLinear, SharedLinear
from hfcompress.modeling.measure import count_parameters
from hfcompress.modeling.sharing import readers_of_one_input
from hfcompress.modeling.structure import rebuild
from tests.tiny_models import FAMILIES, class_of, inputs_for, make, run
from tests.workshop import batches, logits, tiny_classifier

SHARED = LowRankConfig(keep=0.6, share=True, method="svd", multiple_of=2)
QUERY, KEY, VALUE = (f"encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value"))


def shared_layers(model: Any) -> dict[str, SharedLinear]:
    return {name: each for name, each in base_model(model).named_modules() if isinstance(each, SharedLinear)}


def same(left: list[torch.Tensor], right: list[torch.Tensor], **tolerance: float) -> None:
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def sample(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The form


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("bert", [("attention.self.query", "attention.self.key", "attention.self.value")]),
        ("llama", [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]),
        ("whisper", [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("encoder_attn.k_proj", "v_proj")]),
        ("gpt2", []),  # fused as it is
    ],
)
def test_they_are_those_that_read_one_tensor(family: str, groups: list[tuple[str, ...]]) -> None:
    model = make(family, FAMILIES[family].heads[1])
    found = [each for each in readers_of_one_input(model, modules_of(model, ("attention", "ffn"))) if len(each) > 1]
    wanted = {names[0] for names in groups}
    assert {name for each in found for name in wanted if each[0].endswith(f".{name}")} == wanted
    for each in found:
        names = next(names for names in groups if each[0].endswith(f".{names[0]}"))
        assert [path.endswith(name) for path, name in zip(each, names, strict=True)] == [True] * len(names)


@pytest.mark.parametrize("family", ["bert", "mpnet", "albert", "deberta-v2", "llama", "t5", "whisper", "vit"])
def test_it_computes_what_factors_of_their_own_do_and_comes_back_exactly(family: str, tmp_path: Path) -> None:
    head = FAMILIES[family].heads[1]
    inputs = inputs_for(family, head)
    attention = "sdpa" if FAMILIES[family].sdpa else "eager"  # as a plain load chooses
    model = compress(make(family, head, attention=attention), [SHARED])
    assert shared_layers(model)
    outputs, alone = run(model, inputs), copy.deepcopy(model)
    for path, each in shared_layers(alone).items():
        surgery.defactorize(alone, path)
        surgery.factorize(alone, path, each.rank, (each.up.weight.detach(), each.down.weight.detach()))
    assert not shared_layers(alone)
    same(run(alone, inputs), outputs, atol=1e-6, rtol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    again = class_of(family, head).from_pretrained(tmp_path / "saved")
    tensors = model.state_dict()
    assert tensors.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.state_dict().items())
    assert all(torch.equal(*each) for each in zip(run(again, inputs), outputs, strict=True))
    densify(tmp_path / "saved", tmp_path / "dense")
    same(run(class_of(family, head).from_pretrained(tmp_path / "dense"), inputs), outputs, atol=1e-4, rtol=1e-3)
    for path in modules_of(again, ("attention", "ffn")):  # leaders first
        if isinstance(base_model(again).get_submodule(path), LowRankLinear):
            surgery.defactorize(again, path)
    commit(again)
    assert getattr(again.config, "quantization_config", None) is None
    same(run(again, inputs), outputs, atol=1e-4, rtol=1e-3)


class Count(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[name-defined]
    """Counts matrix products."""

    products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packets = torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear
        self.products += function.overloadpacket in packets
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["evaluating", "training", "inference"])
def test_the_factor_is_multiplied_once_a_pass_and_nothing_is_kept(mode: str) -> None:
    model, batch = compress(tiny_classifier(), [SHARED]), batches(1)[0]
    model.train(mode == "training")
    context = {"evaluating": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    counts = []
    for form in (model, tiny_classifier()):
        with context(), Count() as count:
            form(**batch)
        counts.append(count.products)
    factorized = sum(isinstance(each, LowRankLinear) for each in model.modules()) - len(shared_layers(model))
    assert counts[0] == counts[1] + factorized
    assert all(each.leader._left is None for each in shared_layers(model).values())


def test_what_is_left_is_taken_only_where_it_is_right() -> None:
    model = compress(tiny_classifier(), [SHARED])
    query, key, value = (model.bert.get_submodule(path) for path in (QUERY, KEY, VALUE))
    inputs, others = sample(0, 3, 64).float(), sample(1, 3, 64).float()

    def right(layer: Any, rows: torch.Tensor) -> torch.Tensor:
        return layer.up(query.down(rows))

    query(inputs)
    assert torch.equal(key(others), right(key, others))
    query(inputs)
    with torch.no_grad():
        query.down.weight.mul_(2)
    assert torch.equal(key(inputs), right(key, inputs))
    query(inputs)
    inputs.mul_(3)
    assert torch.equal(key(inputs), right(key, inputs))
    with torch.no_grad():
        query(inputs)
    assert key(inputs).grad_fn is not None and query.down.weight.grad is None
    value(inputs).sum().backward()
    assert query.down.weight.grad is not None


def test_a_pass_that_is_cut_off_keeps_nothing_once_its_inputs_are_gone() -> None:
    model = compress(tiny_classifier(), [SHARED])
    query: Any = model.bert.get_submodule(QUERY)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.bert.get_submodule(KEY).register_forward_pre_hook(stop)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        model(**batches(1)[0])
    handle.remove()
    gc.collect()
    assert query._left is None
    query(sample(0, 3, 64).float().requires_grad_())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied = twin.bert.get_submodule(KEY)
        assert copied.leader is twin.bert.get_submodule(QUERY) is not query
        assert copied.leader._left is None
        assert torch.equal(logits(twin, batches(1)[0]), logits(model, batches(1)[0]))


@pytest.mark.slow
def test_compilers_and_exporters_see_one_product() -> None:
    model, batch = compress(tiny_classifier(), [SHARED]).eval(), batches(1, labels=False)[0]
    with torch.no_grad(), Count() as count:
        outputs = model(**batch).logits
    program = torch.export.export(model, (), dict(batch))
    found = [node for node in program.graph.nodes if str(node.target).startswith("aten.linear")]
    assert len(found) == count.products
    graphs: list[Any] = []
    seen = torch.compile(model, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        assert torch.equal(seen(**batch).logits, outputs)
    (graph,) = graphs
    assert sum(getattr(node.target, "__name__", "") == "linear" for node in graph.graph.nodes) == count.products


# With other methods


def test_it_is_pruned_below_the_rank_and_comes_back(tmp_path: Path) -> None:
    for config in (SHARED, LowRankConfig(keep=0.9, method="svd")):
        model = compress(tiny_classifier(), [config])
        for attention in attention_blocks(model):
            surgery.shrink_attention(attention, [2])
        for block in feed_forward_blocks(model):
            surgery.shrink_feed_forward(block, range(5))
        commit(model)
        model.save_pretrained(tmp_path / str(config.share))
        again = type(model).from_pretrained(tmp_path / str(config.share))
        assert torch.equal(logits(again, batches(1)[0]), logits(model, batches(1)[0]))


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_it_is_quantized_and_comes_back(weights: Any, tmp_path: Path) -> None:
    model = compress(tiny_classifier(), [SHARED, QuantizationConfig(weights=weights, embeddings=None)])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert shared_layers(again)
    assert torch.equal(logits(again, batches(1)[0]), logits(model, batches(1)[0]))


def test_each_factor_is_pruned_and_adapted_once() -> None:
    model = compress(tiny_classifier(), [SHARED])
    found = lora_targets(model, ["query", "key"])
    assert {"query.down", "query.up", "key.up"} == set(found)
    compress(model, [UnstructuredPruningConfig(sparsity=0.5)])
    layers = [each for each in model.bert.modules() if isinstance(each, torch.nn.Linear)]
    zeros = [(each.weight == 0).float().mean().item() for each in layers if each is not model.bert.pooler.dense]
    assert min(zeros) > 0.45 and max(zeros) < 0.55


# The fit


def test_blocks_of_curvature_are_one_of_them_all() -> None:
    weight, inputs, slopes = sample(0, 20, 10), sample(1, 50, 10), [sample(2, 60, 14), sample(3, 60, 6)]
    moment, blocks = inputs.T @ inputs / 50, [each.T @ each / 60 for each in slopes]
    whole = torch.block_diag(*blocks)
    torch.testing.assert_close(energies(weight, moment, blocks), energies(weight, moment, whole))
    pairs = zip(truncate(weight, 4, moment, blocks), truncate(weight, 4, moment, whole), strict=True)
    (up, whole_up), (down, whole_down) = pairs
    torch.testing.assert_close(up @ down, whole_up @ whole_down)


def test_matrices_that_look_the_same_way_are_nearer_at_the_same_size() -> None:
    data, sizes, distances = batches(2), [], []
    whole = tiny_classifier()
    with torch.no_grad():
        for name, module in whole.named_modules():
            if name.endswith(("query", "key", "value")):
                module.weight.copy_(module.weight @ torch.diag(torch.logspace(1, -1, 64)))
    for share in (False, True):
        config = LowRankConfig(targets=("query", "key", "value"), keep=0.375, share=share, multiple_of=1)
        model = compress(copy.deepcopy(whole), [config], calibration=data)
        sizes.append(count_parameters(model))
        distances.append((logits(model, data[0]) - logits(whole, data[0])).norm().item())
    assert sizes[1] == sizes[0]
    assert distances[1] < distances[0]


@pytest.mark.parametrize(
    "values",
    [
        {"method": "fisher", "keep": 0.5},
        {"method": "nmf", "keep": 0.5, "refit": True},
        {"energy": 0.9},
        {"rank": 20, "sequential": True, "correct_bias": True},
        {"budget": 0.5},
        {"budget": 0.5, "budget_of": "flops"},
    ],
    ids=lambda values: " ".join(values),
)
def test_every_way_to_fit_and_size_shares(values: dict[str, Any], tmp_path: Path) -> None:
    data, model = batches(2), tiny_classifier()
    found = low_rank(model, LowRankConfig(share=True, multiple_of=2, **values), Context(calibration=data))
    layers = {path: base_model(model).get_submodule(path) for path in modules_of(model, ("attention", "ffn"))}
    made = {path: each.rank for path, each in layers.items() if isinstance(each, LowRankLinear)}
    assert found["ranks"] == made
    assert set(found["left_whole"]) == set(layers) - set(made)
    assert made[QUERY] == made[KEY] == made[VALUE] and QUERY in made
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), data[0]), logits(model, data[0]))


def test_it_costs_one_factor_and_what_reads_it() -> None:
    model, batch = tiny_classifier(), batches(1)[0]
    cost = costs_of(model, {QUERY: ((64, 64, 64), 64)}, "parameters", batch, pivoted=False)[QUERY]
    assert (cost(None), cost(10)) == (3 * 64 * 64, 10 * 4 * 64)
    assert costs_of(model, {QUERY: ((64, 64, 64), 64)}, "latency", batch, pivoted=False)[QUERY](10) > 0
    compress(model, [LowRankConfig(targets=("query", "key", "value"), rank=10, share=True, method="svd")])
    attention = model.bert.encoder.layer[0].attention.self
    assert sum(each.numel() for each in attention.parameters() if each.dim() == 2) == 10 * 4 * 64


# What is refused


def test_pivoted_factors_are_not_shared() -> None:
    with pytest.raises(ConfigError, match="share goes without pivoted"):
        LowRankConfig(share=True, pivoted=True)


@pytest.mark.parametrize(
    ("leader", "said"),
    [
        (7, "must name one beside it, not 7"),
        ("output.dense", "must name one beside it"),
        ("nothing", "which is no low-rank layer"),
        ("value", "which is no low-rank layer"),
        ("key", "which is no low-rank layer"),
    ],
)
def test_a_record_that_names_no_leader_is_refused(leader: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=rf"structure\.shared: .*{said}"):
        rebuild(tiny_classifier(), {"low_rank": {QUERY: 8}, "shared": {KEY: leader}})
