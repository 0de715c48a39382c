"""Deterministic changes of images, to make a shifted task or support set out of one data set."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..errors import InputError
from .extras import need

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

Transform = Literal["rotate90", "invert", "blur", "gray", "noise"]

_NOISE = 0.1  # standard deviation, of pixel values from 0 to 1
_BLUR = 1 / 32  # radius, in image sizes


def transformed(rows: Dataset, name: Transform | None) -> Dataset:
    """The rows with every image changed.

    Raises:
        InputError: they have no images.
    """
    if name is None:
        return rows
    if "image" not in rows.column_names:
        raise InputError(f"transform {name!r} is for images, and the data set has none")
    change = TRANSFORMS[name]

    def change_batch(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            key: [change(_plain(one)) for one in value] if key == "image" else value for key, value in batch.items()
        }

    # Applied when rows are read: nothing is stored twice.
    return rows.with_transform(change_batch)


def _plain(image: Image) -> Image:
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _rotate90(image: Image) -> Image:
    return image.transpose(need("PIL.Image").Transpose.ROTATE_90)


def _invert(image: Image) -> Image:
    return need("PIL.ImageOps").invert(image)


def _blur(image: Image) -> Image:
    return image.filter(need("PIL.ImageFilter").GaussianBlur(min(image.size) * _BLUR))


def _gray(image: Image) -> Image:
    return image.convert("L").convert(image.mode)


def _noise(image: Image) -> Image:
    """Gaussian noise from a seed that the pixels give: an image has the same noise in every subset."""
    pil, numpy = need("PIL.Image"), need("numpy")
    values = numpy.asarray(image)
    noise = numpy.random.default_rng(zlib.crc32(values.tobytes())).normal(0, 255 * _NOISE, values.shape)
    return pil.fromarray((values + noise).round().clip(0, 255).astype(numpy.uint8))


TRANSFORMS: dict[str, Callable[[Image], Image]] = {
    "rotate90": _rotate90,
    "invert": _invert,
    "blur": _blur,
    "gray": _gray,
    "noise": _noise,
}
