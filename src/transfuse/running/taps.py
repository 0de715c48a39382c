"""Where the spaces of a layout can be seen inside a real model: the linear modules, and the sums they add to.

Everything is found from the layout alone: a weight with input and output axes belongs to a module whose input and
output lie in those spaces; a module that leads back into the residual stream adds to a sum, which a norm sees.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..families.registry import FAMILIES
from ..spaces.axes import parse_axes
from ..spaces.layout import Layout, is_linear, shared_path, tower_of
from .skips import sum_behind


@dataclass(frozen=True)
class Site:
    """A linear module.

    Attributes:
        name: canonical name of its weight.
        bias: canonical name of its bias, if it has one.
        weight: name of its weight in memory.
        widths: shape of its weight.
        transposed: whether that is (in, out), as in Conv1D.
        sum_at: for a module that adds to the residual stream, the norm (name in memory) that sees it: the one before
            the branch in pre-norm models, the one behind the sum in post-norm models.
        post: which of the two it is.
        scale: name in memory of a LayerScale between the module and the sum.
        carried: the space of what the sum had before.
        reads: the tower whose tokens enter it: in a decoder's layer the encoder's, where it attends to those.
    """

    name: str
    bias: str | None
    weight: str
    widths: tuple[int, ...]
    transposed: bool = False
    sum_at: str | None = None
    post: bool = False
    scale: str | None = None
    carried: str | None = None
    reads: str = ""

    @property
    def module(self) -> str:
        """Name of the module."""
        return self.weight.rpartition(".")[0]


@dataclass(frozen=True)
class Seen:
    """One site in one run; n inputs of t tokens each (no t where a module sees pooled inputs only).

    Attributes:
        x: what enters the module, (n, t, in).
        y: what it gives, (n, t, out); for a module that adds to the residual stream, the sum.
        carry: that sum without the module's part; None elsewhere.
    """

    x: Tensor
    y: Tensor
    carry: Tensor | None = None

    @property
    def own(self) -> Tensor:
        """What the module adds to the sum, or gives."""
        return self.y if self.carry is None else self.y - self.carry


def find_sites(model: nn.Module, layout: Layout, names: Mapping[str, str]) -> dict[str, Site]:
    """The linear modules of a model by the canonical name of their weight.

    Args:
        model: a real model.
        layout: bound to it, one stream at every junction (streams="junction").
        names: canonical tensor name -> name of the parameter in `model` (`skips.memory_names`).
    """
    found = {}
    for name, axes in layout.params.items():
        if name not in names or not is_linear(name, axes):
            continue
        module = model.get_submodule(names[name].rpartition(".")[0])
        if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
            continue  # of nn.MultiheadAttention, which uses it as a function
        if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
            continue
        into = next(iter(axes.inputs))
        bias = f"{name.removesuffix('.weight')}.bias"
        found[name] = Site(
            name,
            bias if bias in names else None,
            names[name],
            tuple(module.weight.shape),  # type: ignore[union-attr]
            transposed=into == 0,
            reads=_tower_read(name, layout),
            **_sum_of(name, layout, names),
        )
    return found


def _tower_read(name: str, layout: Layout) -> str:
    """The tower whose tokens a module reads, from the family's table: in a layout, towers can share a space."""
    row = FAMILIES[layout.family].row_of(name) if layout.family in FAMILIES else None
    axes = layout.params[name] if row is None else parse_axes(row.axes)
    spaces = (part.space for dim in axes.inputs for part in (axes.dims or ())[dim].parts)
    return next((tower_of(space) for space in spaces if space), "" if row is None else row.tower.name.rstrip("."))


def _sum_of(name: str, layout: Layout, names: Mapping[str, str]) -> dict[str, Any]:
    """Which norm sees the sum that a module adds to."""
    found = sum_behind(layout, layout.params[name])
    if found is None:
        return {}
    before, after = (layout.ties.get(space, space) for space in found)
    post = layout.facts.get(tower_of(found[1]), {}).get("norm") == "post"
    norm = _vector(layout, names, after if post else before, "" if post else "norm", name)
    if norm is None:
        return {}
    scale = _vector(layout, names, after, "scale", name)
    return {"sum_at": norm, "post": post, "scale": scale, "carried": before}


def _vector(layout: Layout, names: Mapping[str, str], space: str, role: str, near: str) -> str | None:
    """The name in memory of a vector on a space with a role (a norm's gains, a LayerScale); None: there is none.

    Several, where towers share a space: the one in the same part of the model as the tensor `near`.
    """
    found = [
        name
        for name, axes in layout.params.items()
        if layout.roles.get(name, "") == role and len(axes.dims or ()) == 1 and space in axes.spaces
        if name in names and not name.endswith(".bias")
    ]
    return names[max(found, key=lambda name: shared_path(name, near))] if found else None


class _Stop(Exception):
    """Everything that was wanted has been seen."""


def block_of(model: nn.Module, sites: Collection[Site]) -> str | None:
    """Name of the layer, an element of a list of modules, that all sites are inside; None: there is none."""
    found = {_block_of(model, site) for site in sites}
    return found.pop() if len(found) == 1 else None


def _block_of(model: nn.Module, site: Site) -> str | None:
    path = site.module.split(".")
    for end in range(1, len(path)):
        if isinstance(model.get_submodule(".".join(path[:end])), nn.ModuleList):
            block = ".".join(path[: end + 1])
            norm = site.sum_at
            return block if norm is None or norm.startswith(f"{block}.") else None
    return None


@dataclass(frozen=True)
class Call:
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def call_of(model: nn.Module, block: str, run: Callable[[], Any]) -> Call | None:
    """What a layer is called with in a run; None: it is not reached."""
    found: list[Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(Call(args, kwargs))
        raise _Stop

    handle = model.get_submodule(block).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad(), suppress(_Stop):
            run()
    finally:
        handle.remove()
    return found[0] if found else None


def observe(model: nn.Module, sites: Collection[Site], run: Callable[[], Any]) -> dict[str, Seen]:
    """Runs a model as far as needed and gives what the sites see.

    Args:
        model: in eval mode.
        sites: which.
        run: calls the model, or a layer that all of them are in.

    Returns:
        Name of the site -> what was seen; sites that the run does not call miss.
    """
    kept: dict[str, Tensor] = {}
    wanted = {f"{site.name} {end}" for site in sites for end in ("in", "out")}
    wanted |= {f"{site.sum_at} sum" for site in sites if site.sum_at is not None}

    def keep(key: str, x: Tensor) -> None:
        kept[key] = x
        if wanted <= kept.keys():
            raise _Stop

    with ExitStack() as stack, torch.no_grad():
        for site in sites:
            stack.callback(model.get_submodule(site.module).register_forward_hook(_both_ends(site, keep)).remove)
        for norm in {site.sum_at for site in sites if site.sum_at is not None}:
            hook = model.get_submodule(norm.rpartition(".")[0]).register_forward_pre_hook(
                _input(norm, keep), with_kwargs=True
            )
            stack.callback(hook.remove)
        with suppress(_Stop):
            run()
    called = [site for site in sites if f"{site.name} out" in kept]
    return {site.name: _seen(model, site, kept) for site in called}


def call_order(model: nn.Module, sites: Collection[Site], run: Callable[[], Any]) -> list[list[str]]:
    """Names of the sites in the order they are called; those that read the same tensor stand together."""
    groups: list[list[str]] = []
    last: list[Tensor] = []

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = _first(args, kwargs)
            if groups and last[0] is x:
                groups[-1].append(name)
            else:
                groups.append([name])
            last[:] = [x]

        return note

    with ExitStack() as stack, torch.no_grad():
        for site in sites:
            module = model.get_submodule(site.module)
            stack.callback(module.register_forward_pre_hook(hook(site.name), with_kwargs=True).remove)
        run()
    return groups


def _both_ends(site: Site, keep: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        keep(f"{site.name} in", args[0])
        keep(f"{site.name} out", output)

    return hook


def _input(norm: str, keep: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(f"{norm} sum", _first(args, kwargs))

    return hook


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _seen(model: nn.Module, site: Site, kept: Mapping[str, Tensor]) -> Seen:
    x, out = kept[f"{site.name} in"], kept[f"{site.name} out"]
    if site.sum_at is None or f"{site.sum_at} sum" not in kept:
        return Seen(x, out)
    if site.scale is not None:
        out = out * model.get_parameter(site.scale)
    beside = kept[f"{site.sum_at} sum"]
    return Seen(x, beside, beside - out) if site.post else Seen(x, beside + out, beside)
