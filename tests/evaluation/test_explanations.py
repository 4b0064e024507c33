from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Literal, cast

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertTokenizer, PreTrainedModel

from hfcompress.errors import DataError, MissingBackendError
from hfcompress.evaluation import explanations
from hfcompress.evaluation.explanations import Explained, agreement, explain, require_explainer, spread_rows
from hfcompress.methods.quantization import QuantizationConfig, quantization
from hfcompress.methods.registry import Context
from hfcompress.tasks import get_task
from tests.workshop import batches, sentences, tiny_classifier, tiny_tokenizer

Library = Literal["captum", "shap"]
TASK, TOKENIZER = get_task("sst2"), tiny_tokenizer()
ROWS = Dataset.from_list(sentences(6))
WHY = "captum and shap are not here; `bash scripts/beside.sh explain -m pytest tests/evaluation/test_explanations.py`"


def library(name: str) -> pytest.ParameterSet:  # pyright: ignore[reportGeneralTypeIssues]
    return pytest.param(name, marks=pytest.mark.skipif(find_spec(name) is None, reason=WHY))


# shap and captum import what warns of its own future.
LIBRARIES = pytest.mark.parametrize("library", [library("captum"), library("shap")])
pytestmark = pytest.mark.filterwarnings("ignore")


def shares(model: PreTrainedModel, library: str, length: int = 16) -> list[list[float]]:
    chosen = cast("Library", library)
    return explain(model, ROWS, TASK, TOKENIZER, chosen, [1] * len(ROWS), max_length=length, batch_size=8)


def log_probability(model: PreTrainedModel, text: str) -> float:
    with torch.no_grad():
        return float(model(**TOKENIZER(text, return_tensors="pt")).logits.log_softmax(-1)[0, 1])


@LIBRARIES
def test_the_words_of_a_text_add_up_to_what_the_text_changes(library: str) -> None:
    model = tiny_classifier(initializer_range=0.1)
    found = shares(model, library)
    for row, values in zip(ROWS["sentence"], found, strict=True):
        words = row.split()
        assert len(values) == len(words)
        whole = log_probability(model, row) - log_probability(model, " ".join(["[MASK]"] * len(words)))
        assert sum(values) == pytest.approx(whole, abs=0.02 if library == "captum" else 1e-4)
        assert max(map(abs, values)) > 0
    assert found == shares(model, library), "the same every time"
    assert [len(values) for values in shares(model, library, length=5)] == [3] * len(ROWS), (
        "what is cut off is not read"
    )


@LIBRARIES
def test_a_model_has_its_own_reasons_and_another_has_others(library: str) -> None:
    model, other = tiny_classifier(initializer_range=0.3), tiny_classifier(5, initializer_range=0.3)
    own, others = shares(model, library), shares(other, library)
    same = agreement(library, Explained(original=own, compressed=own))
    assert (same.rank_correlation, same.strongest_shared, same.same_strongest, same.rank_low) == (1, 1, 1, 1)
    assert agreement(library, Explained(original=own, compressed=others)).rank_correlation < 0.7
    assert not model.training and not any(parameter.grad is not None for parameter in model.parameters())


@LIBRARIES
@pytest.mark.parametrize("weights", ["int8", "nf4", "ternary"])
def test_what_quantization_leaves_of_the_reasons_is_told(library: str, weights: str) -> None:
    model = tiny_classifier(initializer_range=0.3)
    before = shares(model, library)
    config = QuantizationConfig.model_validate({"weights": weights, "embeddings": "int8"})
    quantization(model, config, Context(calibration=batches(1)))
    told = agreement(library, Explained(original=before, compressed=shares(model, library)))
    assert told.examples == len(ROWS)
    assert told.rank_correlation > (0.8 if weights == "int8" else -1)
    assert told.rank_low <= told.rank_correlation <= told.rank_high


def test_tokens_are_put_together_to_words() -> None:
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "the", "good", "film", "##s", ".")
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=32)
    inputs, numbers = explanations._read(["playing  the", "good films."], tokenizer, 32)
    assert tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist()) == [
        "[CLS]", "play", "##ing", "the", "[SEP]", "good", "film", "##s", ".", "[SEP]",
    ]  # fmt: skip
    assert numbers.tolist() == [-1, 0, 0, 1, -1, 2, 3, 3, 3, -1]


def test_agreement_is_of_ranks_and_of_the_strongest_words() -> None:
    before = [[4.0, -3.0, 2.0, 1.0, 0.5], [1.0, 2.0], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]]
    after = [[4.0, 3.0, 2.0, 1.0, 0.5, 9.0], [2.0, 1.0], [1.0, 2.0, 3.0], [3.0, 2.0, 1.0]]
    told = agreement("shap", Explained(original=before, compressed=after))
    # Two words, or words that count alike, have no order. Of five words the strongest two are a quarter, rounded up.
    assert told.examples == 2
    first = float(np.corrcoef([4, 0, 3, 2, 1], [4, 3, 2, 1, 0])[0, 1])
    assert told.rank_correlation == pytest.approx((first - 1) / 2)
    assert (told.strongest_shared, told.same_strongest) == (0.5, 0.5)
    assert told.rank_low == -1 and told.rank_high == pytest.approx(first)
    nothing = agreement("shap", Explained(original=[[]], compressed=[[]]))
    assert nothing.examples == 0 and math.isnan(nothing.rank_correlation) and math.isnan(nothing.rank_low)


def test_rows_come_from_all_over_a_split() -> None:
    assert spread_rows(4, 100) == [0, 25, 50, 75]
    assert spread_rows(8, 3) == [0, 1, 2]


@pytest.mark.skipif(find_spec("captum") is not None, reason="captum is here")
def test_a_library_that_is_not_here_is_named_with_its_extra() -> None:
    with pytest.raises(MissingBackendError, match=r"captum is not installed\n.*hfcompress\[explain\]"):
        require_explainer("captum")


@pytest.mark.skipif(find_spec("shap") is None, reason=WHY)
def test_a_tokenizer_that_knows_no_places_is_refused() -> None:
    with pytest.raises(DataError, match="does not tell where its tokens stand"):
        explain(tiny_classifier(), ROWS, TASK, object(), "shap", [1] * len(ROWS), max_length=16)
