"""Other views of unlabelled inputs, on which teachers are asked anew.

A teacher answers any input, so a few hundred inputs are as many as one cares to draw from them (Beyer et al. 2022,
2106.05237: a student that sees what the teacher sees, on mixed inputs, for long). All that is drawn comes from the
generator given.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional

from ..running.tokens import Batch

# Shares of the images that are mixed and mirrored, and the smallest part of an image (of a side) that is cut out.
MIXED, MIRRORED, SMALLEST = 0.75, 0.5, 0.6
# Share of the texts that go on as another one.
SPLICED = 0.5


def viewed(batch: Batch, generator: Generator, *, mix: bool = True) -> Batch:
    """A batch as it is seen this time; labels that it may have mean nothing any more.

    Args:
        batch: pixels (n, channels, height, width), or tokens (n, length) with what belongs to them.
        generator: of all that is drawn, on the CPU.
        mix: whether two inputs may become one; else images are cut out and mirrored alone, texts left as they are.
    """
    if "pixel_values" in batch:
        return {**batch, "pixel_values": _images(batch["pixel_values"], generator, mix)}
    return _spliced(batch, generator) if mix and "input_ids" in batch else batch


def _images(x: Tensor, generator: Generator, mix: bool) -> Tensor:
    count = len(x)
    if mix:
        share = torch.rand(count, generator=generator)
        share = share.where(torch.rand(count, generator=generator) < MIXED, 1.0)[:, None, None, None].to(x)
        x = share * x + (1 - share) * x[torch.randperm(count, generator=generator)]
    mirrored = torch.rand(count, generator=generator) < MIRRORED
    x = torch.where(mirrored[:, None, None, None].to(x.device), x.flip(-1), x)
    size = SMALLEST + (1 - SMALLEST) * torch.rand(count, generator=generator)
    place = (1 - size)[:, None] * (2 * torch.rand(count, 2, generator=generator) - 1)
    zoom = torch.zeros(count, 2, 3)
    zoom[:, 0, 0] = zoom[:, 1, 1] = size
    zoom[:, :, 2] = place
    grid = functional.affine_grid(zoom.to(x), list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def _spliced(batch: Batch, generator: Generator) -> Batch:
    """Texts that end as another one of the batch does, from a place inside both on."""
    fields = {name: x for name, x in batch.items() if name in ("input_ids", "attention_mask", "token_type_ids")}
    ids = fields["input_ids"]
    count, longest = ids.shape
    partner = torch.randperm(count, generator=generator)
    mask = fields.get("attention_mask", torch.ones_like(ids)).cpu()
    both = torch.minimum(mask.sum(1), mask[partner].sum(1))
    cut = 1 + (torch.rand(count, generator=generator) * (both - 1)).long()
    cut = cut.where(torch.rand(count, generator=generator) < SPLICED, torch.tensor(longest))
    first = (torch.arange(longest) < cut[:, None]).to(ids.device)
    return {**batch, **{name: x.where(first, x[partner.to(x.device)]) for name, x in fields.items()}}
