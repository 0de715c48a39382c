"""The axis grammar: a line of text says which space each axis of a parameter belongs to.

    mlp.0 <- stream                                   a Linear weight (out, in)
    heads.0/qk.0 | heads.0/qk.0* | heads.0/vo.0 <- stream   a fused q, k, v projection
    _, _, stream                                      a position table (1, tokens, width)
    -                                                 a tensor of any rank that nobody moves

`,` separates axes, in the order of the tensor's dimensions. `|` concatenates parts along one axis. `/` nests a
space inside every unit of another: `heads/qk` is one inner map per head. `_` is a part that nobody moves.
Left of `<-` are output axes, right of it input axes (`->` for the other order, as in Conv1D). An output axis takes
a map T, an input axis its dual T^-T, so that W becomes T_out W T_in^-1; `*` marks a part that takes the dual
although it is an output, as the keys do beside the queries (q.k must not change).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_SPACE = re.compile(r"^[A-Za-z][\w.{}-]*(/[A-Za-z][\w.{}-]*)*$")


class AxisError(ValueError):
    """A malformed axis expression, or one that does not fit a shape."""


@dataclass(frozen=True)
class Part:
    """One summand of an axis: a space (`None`: nobody moves it), and whether it takes the dual map."""

    space: str | None
    dual: bool = False


@dataclass(frozen=True)
class Axis:
    """A direct sum of parts along one dimension."""

    parts: tuple[Part, ...]

    def sizes(self, length: int, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Length of every part of this axis, when the axis is `length` long; at most one part may be unknown."""
        known = [sizes.get(part.space) if part.space else None for part in self.parts]
        missing = [i for i, size in enumerate(known) if size is None]
        rest = length - sum(size for size in known if size is not None)
        if len(missing) > 1 or rest < 0 or (not missing and rest):
            raise AxisError(f"an axis of length {length} cannot be split as {known}")
        return tuple(rest if size is None else size for size in known)


@dataclass(frozen=True)
class Axes:
    """What every dimension of a parameter belongs to; `dims` is None for a tensor of any rank that nobody moves."""

    dims: tuple[Axis, ...] | None
    inputs: frozenset[int] = frozenset()

    @property
    def spaces(self) -> frozenset[str]:
        """Every space that some part of some axis belongs to."""
        return frozenset(part.space for axis in self.dims or () for part in axis.parts if part.space)

    def outputs_only(self) -> Axes:
        """The axes of the bias that goes with this weight."""
        if self.dims is None or not self.inputs:
            return self
        return Axes(tuple(axis for i, axis in enumerate(self.dims) if i not in self.inputs))

    def rename(self, new_name: Callable[[str], str]) -> Axes:
        """The same axes with every space renamed."""
        if self.dims is None:
            return self
        return Axes(
            tuple(Axis(tuple(Part(p.space and new_name(p.space), p.dual) for p in axis.parts)) for axis in self.dims),
            self.inputs,
        )

    def check_rank(self, shape: Sequence[int]) -> None:
        """Raises `AxisError` when a tensor of `shape` cannot have these axes."""
        if self.dims is not None and len(self.dims) != len(shape):
            raise AxisError(f"expected {len(self.dims)} dimensions, the shape is {tuple(shape)}")


UNMOVED = Axes(None)


def parse_axes(text: str) -> Axes:
    """Parses an axis expression.

    Raises:
        AxisError: naming the malformed piece.
    """
    text = text.strip()
    if text == "-":
        return UNMOVED
    if text.count("<-") + text.count("->") > 1:
        raise AxisError(f"{text!r}: more than one arrow")
    if "<-" in text:
        outputs, inputs = (_parse_list(side, text) for side in text.split("<-"))
        return _join(outputs, inputs, inputs_first=False)
    if "->" in text:
        inputs, outputs = (_parse_list(side, text) for side in text.split("->"))
        return _join(outputs, inputs, inputs_first=True)
    return Axes(tuple(_parse_list(text, text)))


def _join(outputs: list[Axis], inputs: list[Axis], *, inputs_first: bool) -> Axes:
    duals = [Axis(tuple(Part(p.space, p.space is not None and not p.dual) for p in axis.parts)) for axis in inputs]
    if inputs_first:
        return Axes(tuple(duals + outputs), frozenset(range(len(duals))))
    return Axes(tuple(outputs + duals), frozenset(range(len(outputs), len(outputs) + len(duals))))


def _parse_list(text: str, whole: str) -> list[Axis]:
    return [_parse_axis(piece.strip(), whole) for piece in text.split(",")]


def _parse_axis(text: str, whole: str) -> Axis:
    if text.startswith("(") != text.endswith(")"):
        raise AxisError(f"{whole!r}: unbalanced parentheses in {text!r}")
    parts = tuple(_parse_part(piece.strip(), whole) for piece in text.strip("()").split("|"))
    if sum(part.space is None for part in parts) > 1:
        raise AxisError(f"{whole!r}: two unmoved parts in {text!r}, whose lengths could not be told apart")
    return Axis(parts)


def _parse_part(text: str, whole: str) -> Part:
    if not text:
        raise AxisError(f"{whole!r}: an empty axis or part")
    if text == "_":
        return Part(None)
    name, dual = (text[:-1], True) if text.endswith("*") else (text, False)
    if not _SPACE.match(name):
        raise AxisError(f"{whole!r}: {name!r} is not the name of a space")
    return Part(name, dual)
