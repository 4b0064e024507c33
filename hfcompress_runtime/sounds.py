"""Sounds as a model hears them, and what it spells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

_HIGHEST = 8000.0  # Hz, of Whisper's spectrograms at any rate
_LEAST = 1e-10


def heard(sounds: Sequence[Any], how: Mapping[str, Any]) -> np.ndarray:
    """Makes what a model reads of sounds, as their feature extractor does.

    Args:
        sounds: Numbers between -1 and 1, `(numbers,)`, at the model's rate and of one length but for spectrograms; or
            `{"raw": numbers, "sampling_rate": rate}`, where `array` stands for `raw` as well.
        how: The manifest's `sound`.

    Returns:
        float32 `(sounds, numbers)`, or `(sounds, pitches, moments)`.

    Raises:
        ValueError: A sound is of another rate, or no row of numbers.
    """
    rows = [_numbers(sound, how["rate"]) for sound in sounds]
    if how["pitches"] is not None:
        return np.stack([spectrogram(row, how) for row in rows])
    made = np.stack(rows)
    if not how["normalize"]:
        return made
    mean, variance = made.mean(1, keepdims=True), made.var(1, keepdims=True)
    return (made - mean) / np.sqrt(variance + 1e-7)


def _numbers(sound: Any, rate: int) -> np.ndarray:
    if isinstance(sound, Mapping):
        if sound.get("sampling_rate") != rate:
            raise ValueError(f"the sound has a sampling rate of {sound.get('sampling_rate')}; the model hears {rate}")
        sound = sound["raw"] if "raw" in sound else sound["array"]
    numbers = np.asarray(sound, np.float32)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"a sound must be one row of numbers, not of shape {numbers.shape}")
    return numbers


def spectrogram(numbers: np.ndarray, how: Mapping[str, Any]) -> np.ndarray:
    """Returns how loud each pitch is at each moment, as Whisper reads it (Radford et al. 2022).

    Args:
        numbers: `(numbers,)`; cut, or filled up with silence.
        how: The manifest's `sound`.

    Returns:
        float32 `(pitches, moments)`: decimal logarithms, of which the largest is followed by no less than 8 below it.
    """
    whole = np.zeros(how["numbers"])
    numbers = numbers[: len(whole)]
    whole[: len(numbers)] = numbers
    window, hop = how["window"], how["hop"]
    around = np.pad(whole, window // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(around, window)[::hop][:-1]
    power = np.abs(np.fft.rfft(frames * np.hanning(window + 1)[:-1])) ** 2
    loud = np.log10(np.maximum(power @ _filters(window // 2 + 1, how["pitches"], how["rate"]), _LEAST)).T
    return ((np.maximum(loud, loud.max() - 8.0) + 4.0) / 4.0).astype(np.float32)


@lru_cache
def _filters(frequencies: int, pitches: int, rate: int) -> np.ndarray:
    """Returns triangles over frequencies, `(frequencies, pitches)`: even steps of mel, of one area (Slaney 1998)."""
    edges = _hertz(np.linspace(0.0, _mel(_HIGHEST), pitches + 2))
    own = np.linspace(0.0, rate / 2, frequencies)[:, None]
    rising = (own - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - own) / (edges[2:] - edges[1:-1])
    return np.maximum(0.0, np.minimum(rising, falling)) * 2.0 / (edges[2:] - edges[:-2])


def _mel(hertz: float) -> float:
    return 15.0 + 27.0 * np.log(hertz / 1000.0) / np.log(6.4) if hertz >= 1000.0 else 3.0 * hertz / 200.0


def _hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel >= 15.0, 1000.0 * np.exp(np.log(6.4) * (mel - 15.0) / 27.0), 200.0 * mel / 3.0)


def spelled(logits: np.ndarray, letters: Sequence[str]) -> str:
    """Returns the letters that are likeliest at each moment, of repeated ones the first (Graves et al. 2006).

    Args:
        logits: `(moments, letters)`.
        letters: What each stands for; the blank, which parts equal letters, for nothing.
    """
    best = logits.argmax(-1)
    changes = np.concatenate([[True], best[1:] != best[:-1]])
    said: list[int] = best[changes].tolist()
    return "".join(letters[index] for index in said).strip()
