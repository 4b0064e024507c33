"""What a model costs to run, always beside the original in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfcompress.errors import ConfigError, Problem
from hfcompress.evaluation.energy import find_meter
from hfcompress.evaluation.inference import inferring

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from hfcompress.tasks import Kind

_WARM_UP = 3
_DRAWS = 2000
_FEWEST_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How much faster one model is than another.

    Attributes:
        ratio: The original's median time / the compressed model's: above 1 is faster.
        low: The lower end of the ratio's 95% interval.
        high: Its upper end.
        original_seconds: The original's median time of one forward pass.
        compressed_seconds: The compressed model's.
        batch_size: Rows of the batch.
        sequence_length: Tokens a row; 0 where rows are not made of tokens.
        threads: PyTorch's threads during the measurement.
        repeats: Timed passes of each model.
        original_joules: The mean energy that the processor took over a pass of the original, with all else that ran
            on it meanwhile; None where the machine does not count it. (A mean: counters move once a millisecond.)
        compressed_joules: The compressed model's.
    """

    ratio: float
    low: float
    high: float
    original_seconds: float
    compressed_seconds: float
    batch_size: int
    sequence_length: int
    threads: int
    repeats: int
    original_joules: float | None = None
    compressed_joules: float | None = None


def speed_inputs(vocabulary: int, batch_size: int, sequence_length: int) -> dict[str, torch.Tensor]:
    """Returns the batch that costs are measured on: random tokens, the same ones every time, and no padding."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch_size, sequence_length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def cost_inputs(
    kind: Kind, models: Sequence[PreTrainedModel], batch_size: int, sequence_length: int
) -> dict[str, torch.Tensor]:
    """Returns the batch that costs of models with one kind of head are measured on.

    Args:
        kind: The kind of their task.
        models: The models; a step may have given one a smaller vocabulary.
        batch_size: Rows.
        sequence_length: Tokens of a row, where rows are made of tokens.
    """
    config = models[0].config
    if (own := kind.speed_inputs(config, batch_size)) is not None:
        return own
    vocabulary = min(each.config.vocab_size for each in models)
    return speed_inputs(vocabulary, batch_size, sequence_length) | kind.decoder_inputs(config, batch_size)


def measure_speed(
    original: nn.Module, compressed: nn.Module, inputs: Mapping[str, torch.Tensor], *, repeats: int = 20
) -> Speed:
    """Times two models on the same batch, by turns, so that what slows the machine slows both.

    Args:
        original: The model to compare with.
        compressed: The model to judge. Both are left in the mode they were in.
        inputs: Arguments of both models: `input_ids` (batch, tokens), or others with the batch first.
        repeats: Timed passes of each, at least 3, after a few that are not counted.

    Returns:
        Medians and their ratio, with a bootstrap interval over the repeats.

    Raises:
        ConfigError: Too few repeats, no inputs, or `input_ids` of another shape.
    """
    import numpy as np
    import torch

    if repeats < _FEWEST_REPEATS:
        raise _wrong("repeats", f"must be at least {_FEWEST_REPEATS}, not {repeats}")
    if not inputs or ("input_ids" in inputs and inputs["input_ids"].ndim != 2):
        raise _wrong("inputs", "must hold 'input_ids' of two dimensions (batch, tokens), or other inputs")
    batch_size = len(next(iter(inputs.values())))
    sequence_length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    runs = [(model, _to_device(inputs, model)) for model in (original, compressed)]
    times = np.empty((repeats, 2))
    meter, joules = find_meter(), np.empty((repeats, 2))
    with inferring(original, compressed):
        for _ in range(_WARM_UP):
            for model, batch in runs:
                _seconds(model, batch)
        for turn in range(repeats):
            # Whoever goes second finds the caches full of the other's weights: take turns at that too.
            for place in (0, 1) if turn % 2 == 0 else (1, 0):
                before = meter.read() if meter else ()
                times[turn, place] = _seconds(*runs[place])
                if meter:
                    joules[turn, place] = meter.joules(before, meter.read())
    ratio, low, high = _ratio_of_medians(times)
    return Speed(
        ratio=ratio,
        low=low,
        high=high,
        original_seconds=float(np.median(times[:, 0])),
        compressed_seconds=float(np.median(times[:, 1])),
        batch_size=batch_size,
        sequence_length=sequence_length,
        threads=torch.get_num_threads(),
        repeats=repeats,
        original_joules=float(joules[:, 0].mean()) if meter else None,
        compressed_joules=float(joules[:, 1].mean()) if meter else None,
    )


def measure_grid(
    original: nn.Module,
    compressed: nn.Module,
    inputs: Callable[[int, int], Mapping[str, torch.Tensor]],
    *,
    batch_sizes: Sequence[int],
    sequence_lengths: Sequence[int],
    repeats: int = 10,
) -> tuple[Speed, ...]:
    """Times two models by turns at every batch size and length.

    Args:
        original: The model to compare with.
        compressed: The model to judge.
        inputs: Makes both models' arguments for a batch size and a length.
        batch_sizes: Rows of a batch.
        sequence_lengths: Tokens of a row.
        repeats: Timed passes of each model at each place, at least 3.

    Raises:
        ConfigError: Too few repeats.
    """
    return tuple(
        measure_speed(original, compressed, inputs(batch_size, length), repeats=repeats)
        for batch_size in batch_sizes
        for length in sequence_lengths
    )


def _seconds(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> float:
    import torch

    cuda = next(iter(batch.values())).is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    model(**batch)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _ratio_of_medians(times: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Returns the ratio of the column medians of (repeats, 2) seconds, and the ends of its 95% interval."""
    import numpy as np

    medians = np.median(times, axis=0)
    # Turns are drawn whole, so that a turn in which the machine was busy counts for both models.
    picks = np.random.default_rng(seed).integers(len(times), size=(_DRAWS, len(times)))
    drawn = np.median(times[picks], axis=1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    return float(medians[0] / medians[1]), float(low), float(high)


def _to_device(inputs: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    parameter = next(model.parameters(), None)
    return {name: tensor if parameter is None else tensor.to(parameter.device) for name, tensor in inputs.items()}


def _wrong(field: str, message: str) -> ConfigError:
    return ConfigError("the speed measurement", (Problem((field,), message),))
