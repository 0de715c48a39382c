"""Moments of generic inputs in a file, from which inputs like them are drawn without the data.

Images: mean and covariance of all pixels together, of which the largest principal components are kept; what is drawn is
Gaussian. Texts: how often one token follows another (a Markov chain of the first order), how texts begin and end, and
how long they are. Both are second moments of what enters a model. Those of what enters its *modules* serve far worse:
they do not say what becomes of a module's input once the modules before it have changed (docs/benchmarks.md).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Generator, Tensor

from ..errors import InputError
from ..maps.file import format_of, read_file, write_file
from .drawn import Drawn
from .inputs import Prepared, ends_of_pixels
from .live import LiveModel
from .probes import batches
from .tokens import Batch

FORMAT_VERSION = 1
SUFFIX = ".safetensors"
# Principal components at most.
COMPONENTS = 256
_TOKENS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
_KEY = "transfuse_moments"


@dataclass(frozen=True)
class Counted:
    """Whole numbers and how often they were seen.

    Attributes:
        values: (n,) int64, ascending.
        counts: (n,) int64, at least 1.
    """

    values: Tensor
    counts: Tensor

    @classmethod
    def of(cls, seen: Tensor, before: Counted | None = None) -> Counted:
        """Numbers of any shape, int64, beside those that were counted before."""
        values, counts = seen.flatten().unique(return_counts=True)
        if before is None:
            return cls(values, counts)
        both, place = torch.cat([before.values, values]).unique(return_inverse=True)
        total = torch.zeros_like(both).index_add_(0, place, torch.cat([before.counts, counts]))
        return cls(both, total)

    def draw(self, count: int, generator: Generator) -> Tensor:
        """(count,) int64, each as likely as it was often."""
        return self.between(torch.zeros(count, dtype=torch.int64), torch.full((count,), len(self.values)), generator)

    def between(self, low: Tensor, high: Tensor, generator: Generator) -> Tensor:
        """One of the values from number `low` to `high` - 1 each, (n,) int64; where there are none one of all."""
        sums = torch.cat([torch.zeros(1, dtype=torch.int64), self.counts.cumsum(0)])
        none = high <= low
        low, high = low.masked_fill(none, 0), high.masked_fill(none, len(self.values))
        share = torch.rand(len(low), dtype=torch.float64, generator=generator)
        at = sums[low] + (share * (sums[high] - sums[low])).long()
        return self.values[torch.searchsorted(sums, at, right=True) - 1]

    def is_sound(self, most: int) -> bool:
        """Whether it is what `of` gives, of numbers below `most`."""
        flat = self.values.ndim == 1 and self.values.shape == self.counts.shape
        if not (flat and self.values.dtype == self.counts.dtype == torch.int64):
            return False
        known = bool(((self.values >= 0) & (self.values < most)).all())
        few = float(self.counts.double().sum()) < 2**53
        return known and few and bool((self.values.diff() > 0).all() and (self.counts > 0).all())


@dataclass(frozen=True)
class Chain:
    """Texts as a Markov chain of tokens.

    Attributes:
        lengths, first, last: of texts, and the tokens at their ends.
        pairs: neighbours, but for the last token, as token * 2^32 + next one.
        padding: what stands behind a text.
    """

    lengths: Counted
    first: Counted
    last: Counted
    pairs: Counted
    padding: Counted

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor, before: Chain | None = None) -> Chain:
        """Texts (n, t), int64, of which `mask`, bool, says what is a token, beside those that were counted before.

        Texts without any token are left out.
        """
        ids, mask = ids[mask.any(1)], mask[mask.any(1)]
        length = mask.sum(1)
        rows = torch.arange(len(ids))
        inner = torch.arange(1, ids.shape[1]) < length[:, None] - 1
        seen = {
            "lengths": length,
            "first": ids[:, 0],
            "last": ids[rows, length - 1],
            "pairs": (ids[:, :-1] * _NEXT + ids[:, 1:])[inner],
            "padding": ids[~mask],
        }
        return cls(**{name: Counted.of(x, before and getattr(before, name)) for name, x in seen.items()})

    def draw(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Ids (count, longest) and their mask, int64."""
        length = self.lengths.draw(count, generator)
        token, found = self.first.draw(count, generator), []
        for _ in range(int(length.max())):
            found.append(token)
            token = self._next(token, generator)
        ids = torch.stack(found, 1)
        mask = torch.arange(ids.shape[1]) < length[:, None]
        longer = (length > 1).nonzero()[:, 0]
        ids[longer, length[longer] - 1] = self.last.draw(len(longer), generator)
        padding = self.padding.values[:1] if len(self.padding.values) else ids.new_zeros(1)
        return torch.where(mask, ids, padding), mask.long()

    def is_sound(self, tokens: int) -> bool:
        """Whether it is what `of` gives, of a vocabulary of so many tokens."""
        limits = {"lengths": _LONGEST, "first": tokens, "last": tokens, "pairs": tokens * _NEXT, "padding": tokens}
        sound = all(getattr(self, part).is_sound(most) for part, most in limits.items())
        some = all(len(one.values) for one in (self.lengths, self.first, self.last))
        return sound and some and int(self.lengths.values[0]) > 0 and bool((self.pairs.values % _NEXT < tokens).all())

    def _next(self, token: Tensor, generator: Generator) -> Tensor:
        """What follows each of (n,) tokens; of one that nothing followed, what followed any."""
        if not len(self.pairs.values):
            return self.last.draw(len(token), generator)
        low, high = (torch.searchsorted(self.pairs.values, one * _NEXT) for one in (token, token + 1))
        return self.pairs.between(low, high, generator) % _NEXT


DAMAGED = "the moments file is damaged"
_NEXT = 2**32
_LONGEST = 2**20
_PARTS = ("lengths", "first", "last", "pairs", "padding")


@dataclass(frozen=True)
class Pictures:
    """Images as a Gaussian.

    Attributes:
        mean: (channels, height, width), float32.
        components: (k, channels, height, width), float32; the covariance is the sum of their products with themselves.
    """

    mean: Tensor
    components: Tensor

    @classmethod
    def of(cls, inputs: Prepared, most: int = COMPONENTS) -> Pictures:
        """The moments of all images, in two passes, sums in float64.

        Components are merged batch after batch, the `most` largest kept (Levey & Lindenbaum 2000).
        """
        total = sum(batch["pixel_values"].sum(0, dtype=torch.float64) for batch in batches(inputs))
        assert isinstance(total, Tensor)
        if not total.isfinite().all():
            raise InputError("the images have pixels that are no numbers, or are too large")
        mean = total / len(inputs)
        kept = torch.zeros(0, mean.numel(), dtype=torch.float64)
        for batch in batches(inputs):
            kept = torch.cat([kept, (batch["pixel_values"].double() - mean).flatten(1)])
            values, vectors = torch.linalg.eigh(kept @ kept.T)
            some = (values > values[-1] * len(values) * torch.finfo(values.dtype).eps).nonzero()[:, 0][-most:]
            kept = vectors[:, some].T @ kept
        return cls(mean.float(), (kept / len(inputs) ** 0.5).float().unflatten(1, mean.shape))

    def is_sound(self, shape: tuple[int, ...]) -> bool:
        """Whether it is what `of` gives, of images of this shape."""
        both = self.mean, self.components
        fits = self.mean.shape == shape and self.components.shape[1:] == shape and self.components.ndim == 4
        return fits and all(x.dtype == torch.float32 and bool(x.isfinite().all()) for x in both)

    def draw(self, count: int, generator: Generator) -> Tensor:
        """(count, channels, height, width), float32."""
        weights = torch.randn(count, len(self.components), generator=generator)
        return self.mean + torch.tensordot(weights, self.components, 1)


@dataclass(frozen=True)
class Moments:
    """What generic inputs of a model look like.

    Attributes:
        examples: how many were looked at.
        form: what makes them, by name of the input: pixels of black and white, or the vocabulary.
        pictures: of images.
        chains: of texts, by name of the input.
        masked: the inputs of those that come with a mask.
    """

    examples: int
    form: Mapping[str, Any]
    pictures: Pictures | None = None
    chains: Mapping[str, Chain] = field(default_factory=dict)
    masked: tuple[str, ...] = ()

    @classmethod
    def of(cls, inputs: Prepared, live: LiveModel) -> Moments:
        """The moments of inputs that were processed for a model.

        Raises:
            InputError: the model has nothing that makes inputs from data, or there is nothing in them.
        """
        if inputs.has_images:
            return cls(len(inputs), _form(live, ["pixel_values"]), Pictures.of(inputs))
        chains: dict[str, Chain] = {}
        masked: set[str] = set()
        for batch in batches(inputs):
            for name, mask in _TOKENS.items():
                if name in batch:
                    whole = torch.ones_like(batch[name])
                    chains[name] = Chain.of(batch[name], batch.get(mask, whole).bool(), chains.get(name))
                    masked |= {name} & {n for n, m in _TOKENS.items() if m in batch}
        if not all(len(one.lengths.values) for one in chains.values()):
            raise InputError("the texts have no tokens: there is nothing to take moments of")
        return cls(len(inputs), _form(live, list(chains)), chains=chains, masked=tuple(sorted(masked)))

    def drawn(self, live: LiveModel, *, count: int, batch_size: int = 64, seed: int = 0) -> Prepared:
        """Inputs like those that were looked at.

        Args:
            live: the model that they are for.
            count: how many.
            batch_size: of `Prepared.batches`.
            seed: of their own generator.

        Raises:
            InputError: the model takes other inputs.
        """
        mine = _form(live, list(self.form))
        if mine != self.form:
            raise InputError(
                f"the moments were taken of inputs of another kind than {live.location} takes: {json.dumps(self.form)} "
                f"there, {json.dumps(mine)} here; take them again with this model (transfuse moments)"
            )
        generator = torch.Generator().manual_seed(seed)
        tensors: Batch = {}
        if self.pictures is not None:
            tensors["pixel_values"] = self.pictures.draw(count, generator)
        for name, chain in self.chains.items():
            longest = int(chain.lengths.values[-1])
            if live.positions is not None and longest > live.positions:
                raise InputError(
                    f"the moments are of texts of up to {longest} tokens, and {live.location} has positions for "
                    f"{live.positions}: take them again with this model (transfuse moments)"
                )
            tensors[name], mask = chain.draw(count, generator)
            if name in self.masked:
                tensors[_TOKENS[name]] = mask
        return Prepared(Drawn(tensors), torch.arange(count), (), batch_size)

    # --- file -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file with JSON metadata; the same inputs give the same bytes."""
        tensors = {
            f"{name}#{part}.{key}": getattr(getattr(chain, part), key)
            for name, chain in self.chains.items()
            for part in _PARTS
            for key in ("values", "counts")
        }
        if self.pictures is not None:
            tensors |= {f"pixel_values#{key}": x.contiguous() for key, x in vars(self.pictures).items()}
        about = {"format_version": FORMAT_VERSION, "examples": self.examples, "form": dict(self.form)}
        about["masked"] = list(self.masked)
        write_file(path, tensors, _KEY, about, "moments")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads moments written by `save`.

        Raises:
            InputError: no such file, not a file of moments, damaged, or written by a newer format.
        """
        about, tensors = read_file(path, _KEY, "moments")
        _check_about(path, about)
        try:
            return cls(about["examples"], about["form"], *_rebuilt(tensors, about["form"]), tuple(about["masked"]))
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise InputError(f"{path}: {error}: {DAMAGED}") from error


def _check_about(path: str | os.PathLike[str], about: Any) -> None:
    """The metadata: every key there and of its type."""
    format_of(path, about, FORMAT_VERSION, "moments", DAMAGED)
    for key, kind in (("examples", int), ("form", dict), ("masked", list)):
        if not isinstance(about.get(key), kind):
            raise InputError(f"{path}: {key!r} in its metadata is not {kind.__name__}: {DAMAGED}")
    known = all(isinstance(one, str) and one in _TOKENS for one in about["masked"])
    if not about["form"] or not known or isinstance(about["examples"], bool) or about["examples"] < 1:
        raise InputError(f"{path}: its metadata says nothing about inputs: {DAMAGED}")


def _rebuilt(tensors: Mapping[str, Tensor], form: Mapping[str, Any]) -> tuple[Pictures | None, dict[str, Chain]]:
    """What a file holds; ValueError, KeyError or TypeError if something is missing or of another kind."""
    pictures, chains = None, {}
    for name, about in form.items():
        if name in _TOKENS:
            parts = {
                part: Counted(*(tensors[f"{name}#{part}.{key}"] for key in ("values", "counts"))) for part in _PARTS
            }
            chains[name] = Chain(**parts)
            tokens = int(about["tokens"])
            if not (0 < tokens < _NEXT // 2 and chains[name].is_sound(tokens)):
                raise ValueError(f"the counts of {name!r} are none of texts")
        else:
            pictures = Pictures(tensors[f"{name}#mean"], tensors[f"{name}#components"])
            if not pictures.is_sound(tuple(about["shape"])):
                raise ValueError(f"the mean and the components of {name!r} are none of such images")
    return pictures, chains


def _form(live: LiveModel, names: list[str]) -> dict[str, Any]:
    """What makes these inputs of a model, as far as it matters for what they mean.

    Raises:
        InputError: it has no image processor, or no tokenizer.
    """
    found: dict[str, Any] = {}
    for name in names:
        if name in _TOKENS:
            if live.tokenizer is None:
                raise InputError(f"{live.location}: it has no tokenizer (tokenizer.json), which moments of texts need")
            words = sorted(live.tokenizer.get_vocab().items())
            digest = hashlib.blake2b(json.dumps(words).encode(), digest_size=32).hexdigest()
            found[name] = {"vocabulary": digest, "tokens": 1 + max(number for _, number in words)}
        else:
            found[name] = ends_of_pixels(live)
    return found


def given_moments(given: Any) -> Moments | None:
    """Moments that a user gave, read if they are in a file; None: it is something else.

    Raises:
        InputError: see `Moments.load`.
    """
    if isinstance(given, str | os.PathLike) and Path(given).suffix == SUFFIX:
        return Moments.load(Path(given).expanduser())
    return given if isinstance(given, Moments) else None
