"""Images as they come from a worse camera: what a model makes of them says how far its answers can be trusted.

Three of the corruptions of Hendrycks & Dietterich (2019, 1903.12261), each at one strength, which goes by the spread of
each image's own pixels, so that it is the same however a model wants its inputs normalised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor
from torch.nn import functional

from .inputs import Prepared, Source
from .tokens import Batch

# Standard deviation of the noise and what is left of the contrast, as shares of the image's own.
NOISE, CONTRAST = 0.5, 0.4
# Side of the box that blurs, as a share of the image's.
BLUR = 0.1


def corrupted(inputs: Prepared) -> list[Prepared]:
    """The same images with noise, blurred, and with little contrast; none for texts.

    The noise of an image is the same every time: its number among the rows is the seed.
    """
    if not inputs.has_images:
        return []
    return [replace(inputs, source=_Corrupted(inputs.source, how)) for how in (_noise, _blur, _contrast)]


@dataclass(frozen=True)
class _Corrupted:
    rows: Source
    how: Callable[[Tensor, Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: Tensor, generator: Generator | None) -> Batch:
        batch = self.rows.read(index, generator)
        return {**batch, "pixel_values": self.how(batch["pixel_values"].float(), index)}


def _noise(x: Tensor, rows: Tensor) -> Tensor:
    drawn = [torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(row)) for row in rows.tolist()]
    return x + NOISE * x.std((1, 2, 3), correction=0, keepdim=True) * torch.stack(drawn)


def _blur(x: Tensor, _: Tensor) -> Tensor:
    reach = min(max(1, round(BLUR * min(x.shape[-2:])) // 2), min(x.shape[-2:]) - 1)
    return functional.avg_pool2d(functional.pad(x, [reach] * 4, mode="reflect"), 2 * reach + 1, stride=1)


def _contrast(x: Tensor, _: Tensor) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + CONTRAST * (x - mean)
