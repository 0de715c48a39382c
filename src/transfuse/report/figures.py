"""The figures of a benchmark. Every panel of a regime says its verdict, so that no curve is seen without it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..spaces.layout import tower_of
from .grid import Lookup, picked
from .records import AlphaCurve, FewShot, Interpolated, Metric, Ported, Results, Scores, SectionPlan, ZeroShot
from .style import Figure, Look, add_legend, drawing, finished, looks_of, new_figure, points
from .tables import RegimeReport, SectionReport
from .values import Value, difference, score_of, unit_of, value_of
from .verdicts import alignments
from .worth import frontier


def figures_of(results: Results, section: SectionReport) -> list[Figure]:
    """Figures of a section over all its regimes; those of one regime are made by `regime_figures`."""
    drawers: dict[str, Sequence[Callable[[Results, SectionReport], Figure | None]]] = {
        "transport": (_gains, _validation_curves),
        "worth": (_frontier,),
        "alpha": (_alpha_curves, _support_curves),
        "fewshot": (_shot_curves,),
        "interpolation": (_lines,),
    }
    with drawing():
        made = [draw(results, section) for draw in drawers[section.kind]]
    return [one for one in made if one is not None]


def regime_figures(results: Results, section: SectionReport, regime: RegimeReport) -> list[Figure]:
    """What matching found, without any data: alignment by layer against chance, and what became of the heads."""
    with drawing():
        made = _matching(results, section, regime)
    return [] if made is None else [made]


# --- matching -----------------------------------------------------------------------------------------------------


def _matching(results: Results, section: SectionReport, regime: RegimeReport) -> Figure | None:
    tested = list(dict.fromkeys(line.method for line in regime.verdict.lines))
    labels = list(dict.fromkeys((*tested, *(line.label for line in section.plan.methods))))
    found = {label: alignments(results, regime.label, label) for label in labels}
    layers = {label: found[label] for label in tested}
    heads = {label: records for label, records in found.items() if any(one.heads for one in records)}
    towers = _towers([part for records in layers.values() for one in records for part in one.layers])
    wide = len(towers) + (len(_HEAD_PANELS) if heads else 0)
    if not wide:
        return None
    figure = new_figure(3.6 * wide + 0.5, 3.0)
    panels = figure.subplots(1, wide, squeeze=False)[0]
    looks = looks_of(labels)
    for panel, (tower, parts) in zip(panels, towers.items(), strict=False):
        _draw_layers(panel, tower, parts, layers, looks)
    for panel, key in zip(panels[len(towers) :], _HEAD_PANELS, strict=False):
        _draw_heads(panel, key, heads, looks)
    add_legend(figure, panels)
    caption = (
        f"{regime.label}, by layer. Left: cosine of target with source; dotted lines are what the same matching "
        "reaches against shuffled targets (mean); only what is above them was found. Right: shares of the heads."
    )
    return finished(figure, f"{section.kind}-{regime.label}-matching", "Matching", caption)


def _draw_layers(
    panel: Any, tower: str, parts: Sequence[str], layers: Mapping[str, Sequence[Any]], looks: Mapping[str, Look]
) -> None:
    positions = range(len(parts))
    for number, (method, found) in enumerate(layers.items()):
        if number == 0:
            _draw_line(panel, positions, _part_values(found, parts, "identity"), Look("#8a8a8a", ".", "--"), "as is")
        _draw_line(panel, positions, _part_values(found, parts, "matched"), looks[method], method)
        _draw_chance(panel, positions, _part_values(found, parts, "chance"), looks[method], method)
    panel.set_xticks(positions, [_short(part) for part in parts], rotation=45 if len(parts) > 8 else 0)
    panel.set_title(f"Alignment{', ' if tower else ''}{tower}", loc="left")
    panel.axhline(0, color="#bbbbbb", linewidth=0.8)


def _draw_heads(panel: Any, key: str, heads: Mapping[str, Sequence[Any]], looks: Mapping[str, Look]) -> None:
    groups = list(dict.fromkeys(name for records in heads.values() for one in records for name in one.heads))
    for label, records in heads.items():
        values = [
            value_of({one.seed: one.heads[g][key] for one in records if key in one.heads.get(g, {})}, "share")
            for g in groups
        ]
        _draw_line(panel, range(len(groups)), values, looks[label], label)
    panel.set_xticks(range(len(groups)), [_short(one) for one in groups], rotation=45 if len(groups) > 8 else 0)
    panel.set_title(_HEAD_PANELS[key], loc="left")
    panel.set_ylim(-0.05, 1.05)


_HEAD_PANELS = {"moved": "Heads that moved", "as_spectra": "Heads placed as by spectra"}


def _part_values(found: Sequence[Any], parts: Sequence[str], key: str) -> list[Value | None]:
    return [
        value_of({one.seed: one.layers[part][key] for one in found if key in one.layers.get(part, {})}, "cosine")
        for part in parts
    ]


def _towers(parts: Sequence[str]) -> dict[str, list[str]]:
    """The layers by tower, in the order of the model: null test and verdict are about them alone."""
    found: dict[str, list[str]] = {}
    layers = [part for part in dict.fromkeys(parts) if re.search(r"\.\d+$", part)]
    for part in layers or dict.fromkeys(parts):
        tower = next((one for one in ("text", "vision", "visual", "decoder") if one in part), "")
        found.setdefault(tower, []).append(part)
    return {tower: sorted(one, key=_depth) for tower, one in found.items()}


def _depth(part: str) -> tuple[int, int, str]:
    number = re.search(r"\.(\d+)$", part)
    return (1, int(number[1]), "") if number else (0 if "embed" in part else 2, 0, part)


def _short(part: str) -> str:
    number = re.search(r"^(.*?)[a-z_]*\.(\d+)$", part)
    if not number:
        return part
    tower = tower_of(part) if ".heads." in part else ""
    return f"{tower} {int(number[2]) + 1}".strip()


# --- scores -------------------------------------------------------------------------------------------------------


def _gains(results: Results, section: SectionReport) -> Figure | None:
    """Gains over zero-shot at the chosen alpha: a panel a regime, a row a method, a mark a task."""
    plan = section.plan
    found = {regime.label: _gain_values(results, plan, regime.label) for regime in section.regimes}
    labels = [line.label for line in plan.methods if any(line.label in one for one in found.values())]
    if not labels:
        return None
    looks = looks_of(f"task {task}" for task in plan.tasks)
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure = new_figure(3.4 * columns + 0.8, (0.26 * len(labels) + 0.9) * rows + 0.5)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    step = 0.6 / max(1, len(plan.tasks))
    for panel, regime in zip(panels, section.regimes, strict=False):
        _regime_title(panel, regime)
        panel.axvline(0, color="#666666", linewidth=1)
        for j, task in enumerate(plan.tasks):
            values = {i: found[regime.label].get(label, {}).get(task) for i, label in enumerate(labels)}
            x, means, spreads = points(values)
            look, offset = looks[f"task {task}"], (j - (len(plan.tasks) - 1) / 2) * step
            style = {"fmt": look.marker, "color": look.colour, "markersize": 4, "elinewidth": 1.2}
            panel.errorbar(means, [i + offset for i in x], xerr=spreads, label=task, **style)
    _name_rows(panels, labels, len(found))
    add_legend(figure, panels)
    caption = (
        "Difference to zero-shot on the test split, alpha chosen on validation; whiskers: one sample standard "
        "deviation over seeds. Under each regime, what the weights alone say."
    )
    return finished(figure, f"{section.kind}-gains", "Gains over zero-shot", caption)


def _name_rows(panels: Sequence[Any], labels: Sequence[str], used: int) -> None:
    for number, panel in enumerate(panels):
        panel.set_visible(number < used)
        panel.set_yticks(range(len(labels)), labels)
        panel.set_ylim(len(labels) - 0.4, -0.6)
        panel.tick_params(labelbottom=True)
        panel.set_xlabel("points" if number < used else "")


def _gain_values(results: Results, plan: SectionPlan, regime: str) -> dict[str, dict[str, Value]]:
    look = Lookup(results, regime)
    found: dict[str, dict[str, Value]] = {}
    for task in plan.tasks:
        zero = picked(look.find(ZeroShot, task=task), "test")
        for line in plan.methods:
            chosen = picked(look.find(Ported, task=task, method=line.label), "at_chosen")
            value = difference(chosen, zero, look.metric(task))
            if value is not None and look.metric(task).in_points:
                found.setdefault(line.label, {})[task] = value
    return found


def _frontier(results: Results, section: SectionReport) -> Figure | None:
    reports = {one.label: one for one in section.regimes}
    looks = [Lookup(results, label) for label in reports]
    return frontier(looks, section.plan, lambda panel, look: _regime_title(panel, reports[look.regime]))


Series = Callable[[Lookup, str, str], Mapping[int, tuple[Sequence[float], Sequence[Scores]]]]


def _validation_curves(results: Results, section: SectionReport) -> Figure | None:
    def series(look: Lookup, task: str, method: str) -> Any:
        found = look.find(Ported, task=task, method=method)
        return {seed: (one.alphas, one.validation) for seed, one in found.items()}

    caption = "Validation scores over alpha, from which alpha was chosen; the dashed line is zero-shot."
    return _curve_grid(results, section, series, "validation", None, "alpha-validation", "Choice of alpha", caption)


def _alpha_curves(results: Results, section: SectionReport) -> Figure | None:
    def series(look: Lookup, task: str, method: str) -> Any:
        found = look.find(AlphaCurve, task=task, method=method)
        return {seed: (one.alphas, one.scores) for seed, one in found.items()}

    caption = "Scores on the validation split over the scale of the task vector; the dashed line is zero-shot."
    return _curve_grid(results, section, series, "validation", None, "alpha-task", "Task over alpha", caption)


def _support_curves(results: Results, section: SectionReport) -> Figure | None:
    support = section.plan.support
    if support is None:
        return None

    def series(look: Lookup, task: str, method: str) -> Any:
        found = look.find(AlphaCurve, task=task, method=method)
        return {seed: (one.alphas, one.support) for seed, one in found.items() if one.support}

    caption = f"The same on the support task {support}: what the port costs there."
    return _curve_grid(
        results, section, series, "support_validation", support, "alpha-support", "Support over alpha", caption
    )


def _shot_curves(results: Results, section: SectionReport) -> Figure | None:
    def series(look: Lookup, task: str, method: str) -> Any:
        by_seed: dict[int, tuple[list[float], list[Scores]]] = {}
        for shots in section.plan.shots:
            for seed, one in look.find(FewShot, task=task, method=method, shots=shots).items():
                x, scores = by_seed.setdefault(seed, ([], []))
                x.append(shots)
                scores.append(one.test)
        return by_seed

    caption = "Test scores over the number of labelled examples of each class; the dashed line is zero-shot."
    return _curve_grid(results, section, series, "test", None, "fewshot", "A few labelled examples", caption)


def _curve_grid(
    results: Results,
    section: SectionReport,
    series: Series,
    base: str,
    measured: str | None,
    key: str,
    title: str,
    caption: str,
) -> Figure | None:
    """Small multiples: a row a regime, a column a task, a line a method."""
    plan = section.plan
    looks = looks_of(line.label for line in plan.methods)
    shape = (len(section.regimes), len(plan.tasks))
    figure = new_figure(2.9 * shape[1] + 0.8, 2.1 * shape[0] + 0.8)
    grid = figure.subplots(*shape, squeeze=False, sharex=True, sharey="col")
    drawn = 0
    for panels, regime in zip(grid, section.regimes, strict=True):
        look = Lookup(results, regime.label)
        for panel, task in zip(panels, plan.tasks, strict=True):
            metric = look.metric(measured or task)
            for line in plan.methods:
                curve = _curve(series(look, task, line.label), metric)
                drawn += len(curve)
                _draw_band(panel, curve, looks[line.label], line.label)
            zero = score_of(picked(look.find(ZeroShot, task=task), base), metric)
            if zero is not None:
                panel.axhline(zero.mean, color="#444444", linestyle="--", linewidth=1)
            _regime_title(panel, regime, f" · {task}")
            panel.set_ylabel(_unit_label(metric) if panel is panels[0] else "")
    for panel in grid[-1]:
        panel.set_xlabel("examples a class" if section.kind == "fewshot" else "alpha")
        if section.kind == "fewshot":
            panel.set_xscale("log", base=2)
            panel.set_xticks(plan.shots, [str(one) for one in plan.shots])
            panel.minorticks_off()
    add_legend(figure, list(grid.flat))
    return finished(figure, f"{section.kind}-{key}", title, caption) if drawn else None


def _curve(by_seed: Mapping[int, Any], metric: Metric) -> dict[float, Value]:
    """x -> mean and spread over seeds."""
    values: dict[float, dict[int, Scores]] = {}
    for seed, (xs, scores) in by_seed.items():
        for x, one in zip(xs, scores, strict=True):
            values.setdefault(x, {})[seed] = one
    found = {x: score_of(one, metric) for x, one in sorted(values.items())}
    return {x: one for x, one in found.items() if one is not None}


def _lines(results: Results, section: SectionReport) -> Figure | None:
    """Loss (and accuracy) along the line between the bases: a column a pair, a line a method."""
    metric = results.metrics[section.plan.tasks[0]]
    measured = [Metric("loss", higher_is_better=False), *([metric] if metric.name != "loss" else [])]
    kept = [one for one in results.records if isinstance(one, Interpolated)]
    names = list(dict.fromkeys((one.method, one.skips) for one in kept))
    if not names:
        return None
    looks = looks_of(method for method, _ in names)
    figure = new_figure(3.4 * len(section.regimes) + 0.8, 2.4 * len(measured) + 0.9)
    grid = figure.subplots(len(measured), len(section.regimes), squeeze=False, sharex=True, sharey="row")
    for panels, one in zip(grid, measured, strict=True):
        for panel, regime in zip(panels, section.regimes, strict=True):
            for method, skips in names:
                found = Lookup(results, regime.label).find(Interpolated, method=method, skips=skips)
                curve = _curve({seed: (line.lambdas, line.scores) for seed, line in found.items()}, one)
                look = looks[method]
                look = Look(look.colour, look.marker, ":") if skips == "rounded" else look
                _draw_band(panel, curve, look, method if skips == "identity" else f"{method}, {skips} skips")
            _regime_title(panel, regime)
        panels[0].set_ylabel(f"{one.name}, {_unit_label(one)}" if one.name != "loss" else "loss, nats")
    for panel in grid[-1]:
        panel.set_xlabel("mapped source  →  target")
    add_legend(figure, list(grid.flat))
    caption = "On the straight line from the mapped source to target; bands: one sample standard deviation over seeds."
    return finished(figure, "interpolation-lines", "Interpolation", caption)


# --- strokes ------------------------------------------------------------------------------------------------------


def _draw_line(panel: Any, positions: Any, values: Sequence[Value | None], look: Look, label: str) -> None:
    x, means, spreads = points(dict(zip(positions, values, strict=True)))
    if x:
        style = {"color": look.colour, "marker": look.marker, "linestyle": look.line, "markersize": 4}
        panel.errorbar(x, means, yerr=spreads, label=label, linewidth=1.4, elinewidth=0.9, **style)


def _draw_chance(panel: Any, positions: Any, values: Sequence[Value | None], look: Look, method: str) -> None:
    x, means, _ = points(dict(zip(positions, values, strict=True)))
    if x:
        marker = "_" if len(x) == 1 else ""  # a line of one point is not seen
        style = {"color": look.colour, "linestyle": ":", "marker": marker, "markersize": 14}
        panel.plot(x, means, linewidth=1.2, label=f"chance, {method}", **style)


def _draw_band(panel: Any, curve: Mapping[float, Value], look: Look, label: str) -> None:
    x, means, spreads = points(curve)
    if not x:
        return
    style = {"color": look.colour, "marker": look.marker, "linestyle": look.line}
    panel.plot(x, means, label=label, markersize=3.5, linewidth=1.4, **style)
    low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
    high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    if any(spreads):
        panel.fill_between(x, low, high, color=look.colour, alpha=0.12, linewidth=0)


def _regime_title(panel: Any, regime: RegimeReport, more: str = "") -> None:
    """The regime, and its verdict in small letters below."""
    panel.set_title(f"{regime.label}{more}\n", loc="left")
    where = {"xycoords": "axes fraction", "xytext": (0, 4), "textcoords": "offset points"}
    panel.annotate(regime.verdict.verdict, (0, 1), fontsize=8, color="#666666", **where)


def _unit_label(metric: Metric) -> str:
    return "%" if unit_of(metric) == "points" else unit_of(metric)
