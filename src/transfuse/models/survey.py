"""What a run has to know of its models' weights before anything moves, from one pass over each.

Fingerprints, the size of the task vector, whether tuned is nearer to target than to source, the cosines of the bases:
all are sums over the same tensors, so each tensor is read once and all of them are taken from its blocks.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..files.checkpoint import Checkpoint, Fingerprint
from ..files.reading import BLOCK
from .products import Products
from .sums import Scratch, one_thread


class OneModel(Protocol):
    """What a survey asks of a model (`model.Model`)."""

    @property
    def role(self) -> str: ...
    @property
    def checkpoint(self) -> Checkpoint: ...
    @property
    def disk(self) -> Mapping[str, str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> torch.dtype: ...


class Surveyed(Protocol):
    """What a survey asks of the models of a run (`model.Models`)."""

    @property
    def source(self) -> OneModel: ...
    @property
    def tuned(self) -> OneModel | None: ...
    @property
    def target(self) -> OneModel: ...
    @property
    def resizing(self) -> object | None: ...
    def all(self) -> Sequence[OneModel]: ...
    def shared(self) -> list[str]: ...


@dataclass(frozen=True)
class Change:
    """What the fine-tune did to one tensor.

    Attributes:
        delta: |tuned - source|^2; source rounded to tuned's dtype where that is narrower (`delta.py`).
        base: |source|^2, rounded so.
        changed: whether any number changed.
    """

    delta: float
    base: float
    changed: bool


@dataclass(frozen=True)
class Survey:
    """Sums over the models' tensors as they are, in float64.

    Attributes:
        fingerprints: by role, of the models as this run sees them; those of the files are known to the checkpoints too.
        changes: of every floating-point tensor that source and tuned have in one shape, by canonical name.
        to_target, to_source: squared distance of tuned from each, over the tensors that all three have in one shape.
        products: of source and target, for every tensor of `Models.shared`.
    """

    fingerprints: Mapping[str, str]
    changes: Mapping[str, Change]
    to_target: float
    to_source: float
    products: Mapping[str, Products]


@dataclass(frozen=True)
class _Task:
    """What is asked of one tensor: its change, its distances from both bases, the products of these."""

    name: str
    change: bool
    distance: bool
    product: bool

    @property
    def roles(self) -> tuple[str, ...]:
        """The models it is read from."""
        tuned, target = self.change or self.distance, self.product or self.distance
        return ("source", *(("tuned",) if tuned else ()), *(("target",) if target else ()))


def survey(models: Surveyed) -> Survey:
    """Reads every tensor of the models once.

    A second read of a tensor is needed only where the models' names on disk sort otherwise, since fingerprints go by
    sorted names.

    Raises:
        InputError: a tensor cannot be read, or has NaN or inf.
    """
    by_role = {model.role: model for model in models.all()}
    tasks = sorted(_tasks(models), key=lambda task: models.source.disk[task.name])
    # A base that stands in for another model too is the same checkpoint, and read once.
    keys = {role: id(model.checkpoint.known) for role, model in by_role.items()}
    places = {task.name: {role: (keys[role], by_role[role].disk[task.name]) for role in task.roles} for task in tasks}
    asked: dict[int, dict[str, None]] = {key: {} for key in keys.values()}
    for task in tasks:
        for key, on_disk in places[task.name].values():
            asked[key][on_disk] = None
    streams = {keys[role]: _Stream(one.checkpoint, list(asked[keys[role]])) for role, one in by_role.items()}
    with one_thread():
        scratch = Scratch(3)
        sums = {task.name: _summed(task, places[task.name], streams, scratch) for task in tasks}
        for stream in streams.values():
            stream.finish()
    return _collected(models, {task.name: task for task in tasks}, sums)


def _tasks(models: Surveyed) -> list[_Task]:
    source, tuned, target = models.source, models.tuned, models.target
    shared = set(models.shared())
    tasks = []
    for name in source.disk:
        shape = source.shape(name)
        both = tuned is not None and name in tuned.disk and tuned.shape(name) == shape
        change = both and source.dtype(name).is_floating_point
        all_three = both and name in target.disk and target.shape(name) == shape
        distance = all_three and models.resizing is None and tuned is not None and tuned.dtype(name).is_floating_point
        if change or distance or name in shared:
            tasks.append(_Task(name, change, distance, name in shared))
    return tasks


class _Sums:
    """The sums over one tensor."""

    def __init__(self):
        self.delta = self.base = self.to_target = self.to_source = self.both = self.target = self.source = 0.0
        self.changed = False


def _summed(
    task: _Task, places: Mapping[str, tuple[int, str]], streams: Mapping[int, _Stream], scratch: Scratch
) -> _Sums:
    distinct, sums = list(dict.fromkeys(places.values())), _Sums()
    for blocks in zip(*(streams[key].blocks(name) for key, name in distinct), strict=True):
        found = dict(zip(distinct, blocks, strict=True))
        _add(sums, task, {role: found[place] for role, place in places.items()}, scratch)
    # Squares of numbers that are all finite can be infinite in float64 only where these are float64 too.
    finite = math.isfinite(sums.base + sums.delta + sums.to_source + sums.to_target + sums.source + sums.target)
    for key, name in distinct:
        streams[key].checkpoint.known.finite.add(name) if finite else streams[key].checkpoint.tensor(name)
    return sums


def _add(sums: _Sums, task: _Task, blocks: Mapping[str, Tensor], scratch: Scratch) -> None:
    """Adds what one block of each model gives. Differences are taken in place, which keeps all of it in the cache."""
    source = scratch.numbers(0, blocks["source"])
    target = scratch.numbers(1, blocks["target"]) if "target" in blocks else source
    square = _square(source)
    if task.product:
        sums.both += float(torch.dot(source, target))
        sums.target += _square(target)
        sums.source += square
    if "tuned" not in blocks:
        return
    tuned = scratch.numbers(2, blocks["tuned"])
    if task.distance:
        sums.to_target += _square(target.sub_(tuned))
    delta = tuned.sub_(source)
    away = _square(delta)
    sums.to_source += away
    if blocks["tuned"].dtype.itemsize < blocks["source"].dtype.itemsize:
        source = scratch.numbers(0, blocks["source"].to(blocks["tuned"].dtype))
        delta = scratch.numbers(2, blocks["tuned"]).sub_(source)
        away, square = _square(delta), _square(source)
    sums.delta += away
    sums.base += square
    sums.changed = sums.changed or away > 0 or bool(delta.any())


def _square(x: Tensor) -> float:
    return float(torch.dot(x, x))


def _collected(models: Surveyed, tasks: Mapping[str, _Task], sums: Mapping[str, _Sums]) -> Survey:
    """The sums in the order of source's file."""
    ordered = [(name, tasks[name], sums[name]) for name in models.source.disk if name in sums]
    return Survey(
        {model.role: model.checkpoint.fingerprint() for model in models.all()},
        {name: Change(s.delta, s.base, s.changed) for name, task, s in ordered if task.change},
        sum(s.to_target for _, task, s in ordered if task.distance),
        sum(s.to_source for _, task, s in ordered if task.distance),
        {
            name: Products(s.both, s.target, s.source, len(models.source.shape(name)) > 1)
            for name, task, s in ordered
            if task.product
        },
    )


class _Stream:
    """The tensors of one checkpoint, in any order, with its fingerprint taken on the way.

    Args:
        names: on disk, in the order in which they will be asked for.
    """

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str]):
        self.checkpoint = checkpoint
        views = [one for one in (checkpoint.origin, checkpoint) if one is not None and one.known.fingerprint is None]
        self._digests = [(one, Fingerprint(one.headers)) for one in views]
        self._left = iter(sorted(checkpoint.headers) if views else ())
        self._on_the_way = set(_ascending(names)) if views else set()

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The blocks of one tensor, with whatever is in them."""
        if name not in self._on_the_way:
            yield from self.checkpoint.raw_blocks(name)
            return
        self._on_the_way.remove(name)
        self._digest_until(name)
        yield from self._digested(name)

    def finish(self) -> None:
        """Reads what nobody asked for, and tells the checkpoints their fingerprints."""
        self._digest_until(None)
        for one, digest in self._digests:
            one.known.fingerprint = digest.hexdigest()

    def _digest_until(self, stop: str | None) -> None:
        for name in self._left:
            if name == stop:
                return
            for _ in self._digested(name):
                pass

    def _digested(self, name: str) -> Iterator[Tensor]:
        checkpoint = self.checkpoint
        for _, digest in self._digests:
            digest.begin(name)
        if checkpoint.origin is not None and name in checkpoint.changes:
            raw = checkpoint.origin.tensor(name)
            seen = checkpoint.changed(name, raw)
            for one, digest in self._digests:
                digest.update(seen if one is checkpoint else raw)
            yield from seen.reshape(-1).split(BLOCK)
            return
        for block in checkpoint.raw_blocks(name):
            for _, digest in self._digests:
                digest.update(block)
            yield block


def _ascending(names: Iterable[str]) -> list[str]:
    """The longest ascending subsequence (patience sorting)."""
    ends: list[str] = []  # the smallest last name of an ascending run, by its length
    before: dict[str, str | None] = {}
    for name in names:
        place = bisect_left(ends, name)
        before[name] = ends[place - 1] if place else None
        ends[place : place + 1] = [name]
    found, name = list[str](), ends[-1] if ends else None
    while name is not None:
        found.append(name)
        name = before[name]
    return found[::-1]
