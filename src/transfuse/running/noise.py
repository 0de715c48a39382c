"""Images for who has none: coloured noise with the statistics that all photographs share."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

# Ranges that each image draws its own value from; chosen where they carried the most (docs/benchmarks.md, "No data").
FALLS = (0.5, 2.0)  # exponent by which amplitude falls with frequency; about 1 in photographs
STRETCHES = (0.0, 1.5)  # octaves by which the image is drawn out along one direction
SATURATIONS = (0.1, 1.0)  # share of what channels have of their own
BRIGHTNESSES = (0.15, 0.85)
CONTRASTS = (0.1, 0.35)
_TINT, _UNEVEN = 0.15, (0.6, 1.4)  # of each channel: how its mean strays, and what its contrast is times
_CHUNK = 64


def drawn_images(count: int, channels: int, size: tuple[int, int], generator: Generator) -> Tensor:
    """Noise whose amplitude falls with frequency f as 1/f^a, as in photographs (Field 1987), every image its own a.

    Networks that are trained on such images learn much of what they learn from photographs, and more than from images
    with the right marginals alone (Baradad et al. 2021, 2106.05963, who call it spectrum and colour).

    Args:
        count: how many.
        channels: of each.
        size: height and width in pixels.
        generator: of all that is drawn.

    Returns:
        (count, channels, height, width), uint8.
    """
    chunks = [min(_CHUNK, count - start) for start in range(0, count, _CHUNK)]
    return torch.cat([_coloured(_noise(n, channels, size, generator), generator) for n in chunks])


def _noise(count: int, channels: int, size: tuple[int, int], generator: Generator) -> Tensor:
    """Of mean 0 and variance 1 in every channel; channels know nothing of each other."""
    fall = _between(FALLS, count, generator)
    turn = _between((0.0, math.pi), count, generator)
    stretch = 2 ** _between(STRETCHES, count, generator)
    y, x = torch.fft.fftfreq(size[0])[:, None], torch.fft.fftfreq(size[1])
    along, across = (x * turn.cos() + y * turn.sin()) * stretch, (y * turn.cos() - x * turn.sin()) / stretch
    frequency = (along.square() + across.square()).sqrt()
    frequency[..., 0, 0] = 1.0  # the mean, which goes
    white = torch.fft.fft2(torch.randn(count, channels, *size, generator=generator))
    return _standard(torch.fft.ifft2(white * frequency**-fall).real)


def _coloured(noise: Tensor, generator: Generator) -> Tensor:
    """Bytes: channels vary together in part, round a brightness and with a contrast of the image's own."""
    count, channels = noise.shape[:2]
    own = _between(SATURATIONS, count, generator)
    mixed = _standard((1 - own) * noise[:, :1] + own * noise)
    uneven = _UNEVEN[0] + (_UNEVEN[1] - _UNEVEN[0]) * torch.rand(count, channels, 1, 1, generator=generator)
    tint = _TINT * torch.randn(count, channels, 1, 1, generator=generator)
    contrast, brightness = _between(CONTRASTS, count, generator), _between(BRIGHTNESSES, count, generator)
    x = brightness + tint + contrast * uneven * mixed
    return (255 * x.clamp(0, 1)).round().to(torch.uint8)


def _between(limits: tuple[float, float], count: int, generator: Generator) -> Tensor:
    """One number for each image, (count, 1, 1, 1)."""
    return limits[0] + (limits[1] - limits[0]) * torch.rand(count, 1, 1, 1, generator=generator)


def _standard(x: Tensor) -> Tensor:
    x = x - x.mean((-2, -1), keepdim=True)
    return x / x.square().mean((-2, -1), keepdim=True).sqrt().clamp_min(1e-6)
