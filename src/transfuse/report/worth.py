"""Keep the old model, port, or retrain: what arrives of a fine-tune, what stays of the new base, at what price."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .grid import Cell, Column, Lookup, Table, picked, table_of
from .records import AS_IT_IS, KEPT, Metric, SectionPlan, Worth
from .style import Figure, add_legend, finished, looks_of, new_figure
from .values import Value, difference, mean_over, score_of, shown, unit_of, value_of

# What a port should reach: share of the gap, and points of support that it may cost.
GOAL = (92.0, -3.0)

_PRICE = ("share of the gap", "support", "corrupted", "calibration error", "seconds", "memory, MB")


def worth_tables(look: Lookup, plan: SectionPlan) -> list[Table]:
    """The scores themselves, and what they come to over all tasks."""
    return [_scores_table(look, plan), _price_table(look, plan)]


def share_of_gap(look: Lookup, plan: SectionPlan, row: str) -> Value | None:
    """How much of what the fine-tunes gain on the new base arrives, in percent: of the sums over all tasks.

    A mean of shares would be that of the task on which there is least to gain.
    """
    if len({unit_of(look.metric(task)) for task in plan.tasks}) > 1:
        return None
    found = {one: [_shown(look, task, one) for task in plan.tasks] for one in (row, KEPT, AS_IT_IS)}
    seeds = set.intersection(*(set(by_seed) for each in found.values() for by_seed in each))
    sums = {seed: {one: sum(by_seed[seed] for by_seed in each) for one, each in found.items()} for seed in seeds}
    up = 1 if look.metric(plan.tasks[0]).higher_is_better else -1
    # Where the old fine-tune is no better than the new base, there is nothing to carry.
    there = {seed: one for seed, one in sums.items() if up * (one[KEPT] - one[AS_IT_IS]) > 0}
    shares = {seed: 100 * (one[row] - one[AS_IT_IS]) / (one[KEPT] - one[AS_IT_IS]) for seed, one in there.items()}
    return value_of(shares, "percent")


def _shown(look: Lookup, task: str, row: str) -> dict[int, float]:
    found = picked(look.find(Worth, task=task, row=row), "test")
    return {seed: shown(scores, look.metric(task)) for seed, scores in found.items()}


def support_lost(look: Lookup, plan: SectionPlan, row: str) -> Value | None:
    """Support less that of the new base, as mean over the tasks."""
    if plan.support is None:
        return None
    metric = look.metric(plan.support)
    rows = [[picked(look.find(Worth, task=task, row=one), "support") for one in (row, AS_IT_IS)] for task in plan.tasks]
    return mean_over(difference(mine, base, metric) for mine, base in rows)


def _scores_table(look: Lookup, plan: SectionPlan) -> Table:
    names = ["task", "support"] if plan.support else ["task"]
    columns = [Column(task, name) for task in plan.tasks for name in names]
    rows = []
    for line in (one for one in plan.methods if look.find(Worth, row=one.label)):
        cells: dict[tuple[str, str], Cell] = {}
        for task in plan.tasks:
            found = look.find(Worth, task=task, row=line.label)
            cells[task, "task"] = score_of(picked(found, "test"), look.metric(task))
            if plan.support:
                cells[task, "support"] = score_of(picked(found, "support"), look.metric(plan.support))
        rows.append((line.label, line.role, cells))
    note = f"Test split, alpha 1; support under the base's own head. {look.note()}"
    return table_of(f"worth/{look.regime}/scores", "what one has", note, columns, rows)


def _price_table(look: Lookup, plan: SectionPlan) -> Table:
    rows = []
    for line in (one for one in plan.methods if look.find(Worth, row=one.label)):
        cells: dict[tuple[str, str], Cell] = {
            ("", "share of the gap"): share_of_gap(look, plan, line.label),
            ("", "support"): support_lost(look, plan, line.label),
            ("", "corrupted"): _mean_score(look, plan, line.label, "corrupted"),
            ("", "calibration error"): _mean_score(look, plan, line.label, "test", Metric("calibration_error")),
            ("", "seconds"): _mean_of(look, plan, line.label, lambda one: one.seconds, "seconds"),
            ("", "memory, MB"): _mean_of(look, plan, line.label, lambda one: one.memory and one.memory / 1e6, "MB"),
        }
        rows.append((line.label, line.role, cells))
    note = (
        "Over all tasks. Share: of what the old fine-tunes have above the new base on their tasks, in percent; "
        "support: less that of the new base; corrupted: on the task's images with noise, blurred, with little "
        f"contrast; seconds and memory of the port (maps of weights found before), or of the training. {look.note()}"
    )
    there = [name for name in _PRICE if any(cells["", name] is not None for _, _, cells in rows)]
    columns = [Column("", name) for name in there]
    return table_of(f"worth/{look.regime}/price", "keep, port or retrain?", note, columns, rows)


def _mean_score(look: Lookup, plan: SectionPlan, row: str, field: str, metric: Metric | None = None) -> Value | None:
    values = []
    for task in plan.tasks:
        by_seed, asked = picked(look.find(Worth, task=task, row=row), field), metric or look.metric(task)
        values.append(score_of({seed: one for seed, one in by_seed.items() if asked.name in one}, asked))
    return mean_over(values)


def _mean_of(
    look: Lookup, plan: SectionPlan, row: str, read: Callable[[Worth], float | None], unit: str
) -> Value | None:
    found = [{seed: read(one) for seed, one in look.find(Worth, task=task, row=row).items()} for task in plan.tasks]
    return mean_over(value_of({s: v for s, v in by_seed.items() if v is not None}, unit) for by_seed in found)


# --- the frontier -------------------------------------------------------------------------------------------------


def frontier(looks: list[Lookup], plan: SectionPlan, title: Callable[[Any, Lookup], None]) -> Figure | None:
    """Task against support: a panel a regime, a mark a row; further up and to the right is better.

    Args:
        looks: the records of each regime.
        title: writes what the regime is over its panel.
    """
    if plan.support is None or not looks:
        return None
    styles = looks_of(line.label for line in plan.methods)
    columns = min(3, len(looks))
    rows = -(-len(looks) // columns)
    figure = new_figure(3.6 * columns + 0.6, 3.0 * rows + 0.8)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    drawn = 0
    metric = looks[0].metric(plan.support)
    for number, panel in enumerate(panels):
        panel.set_visible(number < len(looks))
        if number >= len(looks):
            continue
        look = looks[number]
        title(panel, look)
        for line in plan.methods:
            share, lost = share_of_gap(look, plan, line.label), support_lost(look, plan, line.label)
            if share is None or lost is None:
                continue
            drawn += 1
            style = styles[line.label]
            spread = {"xerr": lost.sd or 0.0, "yerr": share.sd or 0.0, "elinewidth": 0.9, "label": line.label}
            # There are more rows than marks; every other round of them is hollow.
            fill = style.colour if style.line in ("--", ":") else "white"
            where = {"fmt": style.marker, "color": style.colour, "markersize": 6, "markerfacecolor": fill}
            panel.errorbar(lost.mean, share.mean, **where, **spread)
        _mark_goal(panel, metric)
        panel.set_xlabel(f"support, less the new base's ({'points' if metric.in_points else unit_of(metric)})")
    panels[0].set_ylabel("share of the gap, %")
    add_legend(figure, panels[: len(looks)])
    caption = (
        "How much of the fine-tune arrives against what is left of what the new base is better at; means over the "
        "tasks, whiskers: one sample standard deviation over seeds. The goal is above the dashed line, on grey."
    )
    return finished(figure, "worth-frontier", "Task against support", caption) if drawn else None


def _mark_goal(panel: Any, metric: Metric) -> None:
    if metric.in_points:
        panel.set_xlim(right=max(6, panel.get_xlim()[1]))
        panel.axvspan(GOAL[1], panel.get_xlim()[1], color="#f2f2f2", zorder=0)
    else:
        panel.invert_xaxis()  # a loss: less is better
    panel.axhline(GOAL[0], color="#888888", linewidth=0.8, linestyle="--")
    panel.axvline(0, color="#888888", linewidth=0.8)
