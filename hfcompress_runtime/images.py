"""Images as a model reads them, without an imaging library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

BICUBIC = 3
_BITS = 22  # after the point of a weight, as in Pillow


def pixel_values(images: Sequence[Any], how: Mapping[str, Any]) -> np.ndarray:
    """Resizes, rescales and normalises images as their processor does.

    Args:
        images: uint8 arrays `(height, width, 3)` or `(height, width)`, Pillow images, or paths of files, which
            need Pillow.
        how: The manifest's `image`.

    Returns:
        float32 `(images, 3, height, width)`.
    """
    mean, std = (np.array(how[name], np.float32) for name in ("mean", "std"))
    made = []
    for image in images:
        pixels = _resized(image, how["height"], how["width"], how["resample"])
        values = pixels.astype(np.float32) * np.float32(how["factor"])
        made.append(((values - mean) / std).transpose(2, 0, 1))
    return np.ascontiguousarray(np.stack(made), np.float32)


def _resized(image: Any, height: int, width: int, resample: int) -> np.ndarray:
    if isinstance(image, str | Path):
        from PIL import Image

        with Image.open(image) as opened:
            image = opened.convert("RGB")
    if hasattr(image, "convert"):
        return np.asarray(image.convert("RGB").resize((width, height), resample))
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = np.stack([pixels] * 3, axis=-1)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"an image must be uint8 (height, width, 3), not {pixels.dtype} {pixels.shape}")
    return resized(pixels, height, width, resample)


def resized(pixels: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    """Resizes uint8 `(height, width, channels)` with Pillow's filters: first along rows, rounded, then along columns.

    Pillow may go along columns first, which rounds some pixels to a neighbouring value.

    Args:
        pixels: The image.
        height: The new one.
        width: The new one.
        resample: 2 for bilinear, 3 for bicubic.
    """
    made = pixels.astype(np.int64)
    steps = [("wx,hxc->hwc", 1, width), ("hy,ywc->hwc", 0, height)]
    for said, axis, size in steps:
        if size != pixels.shape[axis]:
            sums = np.einsum(said, _weights(pixels.shape[axis], size, resample), made)
            made = ((sums + (1 << _BITS - 1)) >> _BITS).clip(0, 255)
    return made.astype(np.uint8)


@lru_cache(maxsize=32)
def _weights(before: int, after: int, resample: int) -> np.ndarray:
    """Returns what each new pixel takes of each old one, int64 `(after, before)` in units of 2**-22.

    The filter is as wide as what it shrinks.
    """
    scale = before / after
    stretch, reach = max(scale, 1.0), 2.0 if resample == BICUBIC else 1.0
    made = np.zeros((after, before))
    for place in range(after):
        centre = (place + 0.5) * scale
        first = max(int(centre - reach * stretch + 0.5), 0)
        last = min(int(centre + reach * stretch + 0.5), before)
        away = np.abs((np.arange(first, last) - centre + 0.5) / stretch)
        values = _bicubic(away) if resample == BICUBIC else np.clip(1 - away, 0, None)
        made[place, first:last] = values / values.sum()
    return np.sign(made).astype(np.int64) * (np.abs(made) * (1 << _BITS) + 0.5).astype(np.int64)


def _bicubic(away: np.ndarray) -> np.ndarray:
    """Keys' cubic with a = -0.5, as in Pillow."""
    near = (1.5 * away - 2.5) * away * away + 1
    far = ((-0.5 * away + 2.5) * away - 4) * away + 2
    return np.where(away < 1, near, np.where(away < 2, far, 0.0))
