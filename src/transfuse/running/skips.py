"""Permuted skips on real models, by forward hooks.

The per-junction form maps the residual stream differently at every sum, so the mapped model computes what the model did
only if the skip, an identity in a stock model, becomes S = P_out P_in^-1 (Rinaldi et al. 2025, eq. 11 and 12). No stock
class has such skips, but the sum x + branch(x) becomes S x + branch(x) if the last module of the branch gives
branch(x) + (S - 1) x. Where x is seen and which module is the last follows from the layout alone:

- x is what enters the norm on its junction (pre-norm), or the first projection of the branch (post-norm);
- the last module is the one that leads from the inside of the layer into the next junction, or a LayerScale after it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..families.binding import canonical_names
from ..families.registry import FAMILIES
from ..files.configs import Unavailable
from ..maps.algebra import Identity, Map
from ..spaces.axes import Axes
from ..spaces.layout import TOWERS, Layout, shared_path

Skip = Map | Tensor
"""What a skip does to the stream: a map, or its matrix of shape (width, width)."""


def skips_of(spaces: Mapping[str, Map], ties: Mapping[str, str] = {}) -> dict[str, Map]:
    """The skips that per-junction maps need: P_out P_in^-1 at each residual sum (eq. 12).

    Args:
        spaces: space -> map; a junction without a map stays as it is.
        ties: junctions that take the map of another one (`Layout.ties`).

    Returns:
        Space that comes in ("stream.3", "vision.stream.3") -> map of the skip. Skips that do nothing are left out.
    """
    found = {}
    for into, out in _sums(spaces, ties):
        before, after = (spaces.get(ties.get(name, name)) for name in (into, out))
        size = (before or after or Identity(0)).size
        before, after = before or Identity(size), after or Identity(size)
        skip = after @ before.inverse()
        if not skip.is_identity:
            found[into] = skip
    return found


def memory_names(model: nn.Module, layout: Layout, config: Mapping[str, Any]) -> dict[str, str]:
    """Canonical tensor name -> name of the parameter in memory, which can differ from the one on disk."""
    parameters = [name for name, _ in model.named_parameters()]
    named = canonical_names(FAMILIES[layout.family], parameters, config)
    return {canonical: name for name, canonical in named.items()}


@contextmanager
def permuted_skips_of(
    model: nn.Module, layout: Layout, names: Mapping[str, str], skips: Mapping[str, Skip], *, strength: float = 1.0
) -> Iterator[None]:
    """Within it, the residual sums of a real model carry S x in place of x. The model is to be in eval mode.

    Args:
        layout: bound to the model, one stream at every junction (streams="junction").
        names: canonical tensor name -> name of the parameter in `model`, as from `memory_names`.
        skips: space that comes in -> S, as from `skips_of`; a sum without one stays as it is.
        strength: l for a skip of l S + (1 - l) 1: skips are interpolated as weights are.

    Raises:
        Unavailable: a branch does not end in a module that is called (`nn.MultiheadAttention` uses its output
            projection as a function), or the layout has no such sum.
    """
    sites = _sites(model, layout, names, skips)
    with ExitStack() as stack:
        for site in sites:
            seen: list[Tensor] = []
            reading = site.reader.register_forward_pre_hook(_catch(seen), with_kwargs=True)
            stack.callback(reading.remove)
            writing = site.writer.register_forward_hook(_add(seen, skips[site.into], strength))
            stack.callback(writing.remove)
        yield


def sum_behind(layout: Layout, axes: Axes) -> tuple[str, str] | None:
    """The residual sum that a module with these axes adds to: the space that comes in, and that of the sum."""
    sums = ((into, out) for into, out in _sums(layout.spaces, layout.ties) if _is_inside(_inputs(axes), into))
    return next(((into, out) for into, out in sums if _outputs(axes) == {layout.ties.get(out, out)}), None)


@dataclass(frozen=True)
class _Site:
    """One residual sum: the space that comes in, the module that x enters, and the last module of the branch."""

    into: str
    reader: nn.Module
    writer: nn.Module


def _catch(seen: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[:] = [args[0] if args else next(iter(kwargs.values()))]

    return hook


def _add(seen: list[Tensor], skip: Skip, strength: float) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = seen.pop()
        return output + strength * (_apply(skip, x) - x)

    return hook


def _apply(skip: Skip, x: Tensor) -> Tensor:
    return skip.apply(x, -1) if isinstance(skip, Map) else x @ skip.to(x).T


def _sites(model: nn.Module, layout: Layout, names: Mapping[str, str], skips: Mapping[str, Skip]) -> list[_Site]:
    known = {name: axes for name, axes in layout.params.items() if name in names}
    modules = {name: _owner(model, names[name]) for name in known}
    found = []
    for into, out in _sums(layout.spaces, layout.ties):
        if into not in skips:
            continue
        writer = _writer(layout, known, into, out)
        reader = _reader(layout, known, into, writer or "")
        if reader is None or writer is None:
            if any(space.startswith(_split(into)[0]) for axes in known.values() for space in axes.spaces):
                raise Unavailable(f"the residual sum after {into!r} is not between two modules of this model")
            continue  # the other tower's
        if isinstance(modules[reader][0], nn.MultiheadAttention) or isinstance(
            modules[writer][1], nn.MultiheadAttention
        ):
            raise Unavailable("its attention is nn.MultiheadAttention, whose output projection is never called")
        found.append(_Site(into, modules[reader][0], modules[writer][0]))
    if missing := sorted(skips.keys() - {into for into, _ in _sums(layout.spaces, layout.ties)}):
        raise Unavailable(f"the layout has no residual sum after {missing[0]!r}")
    return found


def _owner(model: nn.Module, parameter: str) -> tuple[nn.Module, nn.Module]:
    """The module that a parameter belongs to, and the one around that."""
    path = parameter.rpartition(".")[0]
    return model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])


def _reader(layout: Layout, known: Mapping[str, Axes], into: str, writer: str) -> str | None:
    """A tensor of the module that x enters: the norm on its junction, or in post-norm models the first projection."""
    if layout.facts[_split(into)[0].rstrip(".")]["norm"] == "pre":
        norms = _of_role(layout, known, into, "norm")  # several where towers share their embeddings
        return max(norms, key=lambda name: shared_path(name, writer), default=None)
    readers = (name for name, axes in known.items() if axes.inputs and _inputs(axes) == {into})
    return next((name for name in readers if _is_inside(_outputs(known[name]), into)), None)


def _writer(layout: Layout, known: Mapping[str, Axes], into: str, out: str) -> str | None:
    """A tensor of the last module of the branch: the LayerScale if there is one, else what leads out of the layer."""
    space = layout.ties.get(out, out)
    writers = (name for name, axes in known.items() if axes.inputs and _outputs(axes) == {space})
    ends = (name for name in writers if _is_inside(_inputs(known[name]), into))
    return next(iter(_of_role(layout, known, out, "scale")), None) or next(ends, None)


def _of_role(layout: Layout, known: Mapping[str, Axes], junction: str, role: str) -> list[str]:
    space = layout.ties.get(junction, junction)
    return [name for name, axes in known.items() if layout.roles.get(name) == role and space in axes.spaces]


def _inputs(axes: Axes) -> set[str | None]:
    return {part.space for dim in axes.inputs for part in (axes.dims or ())[dim].parts}


def _outputs(axes: Axes) -> set[str | None]:
    return {part.space for dim, axis in enumerate(axes.dims or ()) if dim not in axes.inputs for part in axis.parts}


def _is_inside(spaces: Iterable[str | None], into: str) -> bool:
    """Whether these are spaces inside the layer that a junction leads into: of its heads or of its MLP."""
    tower, junction = _split(into)
    layer = junction // TOWERS[tower.rstrip(".")]
    pattern = rf"{re.escape(tower)}(heads\.[^/]+/\w+|heads|mlp)\.{layer}"
    return all(space is not None and re.fullmatch(pattern, space) for space in spaces)


def _sums(spaces: Iterable[str], ties: Iterable[str]) -> list[tuple[str, str]]:
    """(space that comes in, space of the sum) for all residual sums whose two junctions may be among `spaces`."""
    found: dict[str, set[int]] = {}
    for name in (*spaces, *ties):
        if re.fullmatch(r"(\w+\.)?stream\.\d+", name):
            tower, junction = _split(name)
            found.setdefault(tower, set()).add(junction)
    return [(f"{tower}stream.{j}", f"{tower}stream.{j + 1}") for tower, js in found.items() for j in range(max(js))]


def _split(stream: str) -> tuple[str, int]:
    """ "vision.stream.3" -> ("vision.", 3)."""
    tower, _, number = stream.rpartition("stream.")
    return tower, int(number)
