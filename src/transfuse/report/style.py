"""How figures look: one colour and marker a method, told apart by colour-blind readers and in print."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..data.extras import need

# Okabe and Ito; a method has the same look in every figure.
_LOOKS = {
    "naive": ("#8a8a8a", "o", "-"),
    "random": ("#000000", "x", ":"),
    "transfusion": ("#E69F00", "s", "-"),
    "tied": ("#0072B2", "D", "-"),
    "orthogonal": ("#009E73", "^", "-"),
    "git-rebasin": ("#D55E00", "v", "--"),
    "ot": ("#CC79A7", "P", "--"),
    "ot-hard": ("#CC79A7", "*", ":"),
    "brute-force": ("#B8860B", "<", "-."),
    "no-attention-alignment": ("#56B4E9", ">", "-."),
    "no-residual": ("#A0522D", "p", "-."),
    "fine-tuning": ("#6A3D9A", "h", "-"),
    "oracle": ("#222222", "d", "--"),
}
_SPARE = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#332288", "v"), ("#B15928", "P"))
_SETTINGS = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.hashsalt": "transfuse",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Look:
    """Colour, marker and line of a method."""

    colour: str
    marker: str
    line: str


def looks_of(labels: Iterable[str]) -> dict[str, Look]:
    """The look of every label; those of unknown methods depend on their order only."""
    found, spare = {}, iter(_SPARE * 9)
    lines = (line for line in ("--", "-", ":", "-.") * 9 for _ in _SPARE)
    for label in dict.fromkeys(labels):
        if label in _LOOKS:
            found[label] = Look(*_LOOKS[label])
        else:
            found[label] = Look(*next(spare), next(lines))
    return found


@dataclass(frozen=True)
class Figure:
    """A drawn figure: the same bytes for the same results."""

    key: str
    title: str
    caption: str
    png: bytes
    svg: bytes


@contextmanager
def drawing() -> Any:
    """Our settings, for a while; the matplotlib module is given."""
    matplotlib = need("matplotlib")
    need("matplotlib.figure")
    with matplotlib.rc_context(_SETTINGS):
        yield matplotlib


def new_figure(width: float, height: float) -> Any:
    """An empty figure that no window knows of."""
    return need("matplotlib.figure").Figure(figsize=(width, height), layout="constrained", dpi=130)


def finished(figure: Any, key: str, title: str, caption: str) -> Figure:
    """The figure's files, without dates in them."""
    # Drawing costs most, so: one layout for both files, and the canvases are asked directly (`savefig` draws twice).
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    png, svg = io.BytesIO(), io.StringIO()
    need("matplotlib.backends.backend_agg").FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})
    metadata = {"Date": None, "Creator": None}
    need("matplotlib.backends.backend_svg").FigureCanvasSVG(figure).print_svg(svg, metadata=metadata)
    return Figure(key, title, caption, png.getvalue(), svg.getvalue().encode())


def add_legend(figure: Any, axes: Iterable[Any]) -> None:
    """One legend for all panels, below them."""
    found: dict[str, Any] = {}
    for panel in axes:
        handles, labels = panel.get_legend_handles_labels()
        found |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in found}
    if not found:
        return
    columns = max(1, int(figure.get_figwidth() * 8 / max(len(label) + 6 for label in found)))
    names = sorted(found, key=lambda label: label.startswith("chance"))
    handles = [found[name] for name in names]
    rows = -(-len(found) // min(columns, len(found)))
    figure.set_figheight(figure.get_figheight() + 0.2 * (rows - 1))
    figure.legend(handles, names, loc="outside lower center", ncols=min(columns, len(found)))


def points(by_x: Mapping[Any, Any]) -> tuple[list[Any], list[float], list[float]]:
    """x, means and spreads of the values that are there; a spread of one seed is drawn as none."""
    kept = {x: value for x, value in by_x.items() if value is not None}
    return list(kept), [one.mean for one in kept.values()], [one.sd or 0.0 for one in kept.values()]
