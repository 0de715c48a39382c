"""The tables of a benchmark: for every regime the verdict first, then what was measured.

Nothing here is text yet, but for labels: `writing` makes markdown and csv of it, `page` HTML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .grid import Cell, Cells, Column, Lookup, Table, picked, table_of
from .records import (
    AlphaCurve,
    FewShot,
    Interpolated,
    Metric,
    Ported,
    Reference,
    Results,
    SectionPlan,
    ZeroShot,
)
from .values import Value, difference, mean_over, score_of, unit_of, value_of
from .verdicts import Verdict, equivalence_text, verdict_of
from .worth import worth_tables

TITLES = {
    "transport": "Transport of the task vector",
    "worth": "Keep the old model, port, or retrain?",
    "alpha": "Scale of the task vector",
    "fewshot": "Scales learned from a few labelled examples",
    "interpolation": "Interpolation between the bases",
}


@dataclass(frozen=True)
class RegimeReport:
    """One regime of a section: what the weights say, then what data say."""

    label: str
    verdict: Verdict
    tables: tuple[Table, ...]


@dataclass(frozen=True)
class SectionReport:
    """One section of a recipe."""

    kind: str
    title: str
    plan: SectionPlan
    regimes: tuple[RegimeReport, ...]


def sections_of(results: Results) -> tuple[SectionReport, ...]:
    """All tables of a run."""
    return tuple(_section(results, plan) for plan in results.sections)


def _section(results: Results, plan: SectionPlan) -> SectionReport:
    regimes = []
    for regime in plan.regimes:
        look = Lookup(results, regime)
        tables = tuple(_BUILDERS[plan.kind](look, plan))
        regimes.append(RegimeReport(regime, verdict_of(results, plan, regime), tables))
    return SectionReport(plan.kind, TITLES[plan.kind], plan, tuple(regimes))


# --- transport ----------------------------------------------------------------------------------------------------

_GAINS = (
    "Zero-shot (target as it is, with the fine-tune's own head where one is carried) and the fine-tune as they are; "
    "all other rows are differences to zero-shot, paired by seed."
)


def _transport(look: Lookup, plan: SectionPlan) -> list[Table]:
    titles = {"at_one": "alpha 1", "at_chosen": "alpha chosen on the validation split (test used once)"}
    return [_transport_table(look, plan, which, title) for which, title in titles.items()]


def _transport_table(look: Lookup, plan: SectionPlan, which: str, title: str) -> Table:
    names = ["task", "support"] if plan.support else ["task"]
    columns = [Column(task, name) for task in plan.tasks for name in names]
    if which == "at_chosen":
        columns = [Column(task, name) for task in plan.tasks for name in (*names, "alpha")]
    if len(plan.tasks) > 1:
        columns += [Column("mean", name) for name in names]
    if which == "at_one":
        columns.append(Column("", "equivalence", text=True))
    rows: list[tuple[str, str, Cells]] = [
        ("zero-shot", "reference", _with_means(_absolute_cells(look, plan, ZeroShot), plan)),
        ("fine-tune on source", "reference", _with_means(_absolute_cells(look, plan, Reference), plan)),
    ]
    for line in filter(look.has_records, plan.methods):
        cells = _with_means(_method_cells(look, plan, line.label, which), plan)
        said = equivalence_text(look.results, look.regime, line.label)
        rows.append((line.label, line.role, {**cells, ("", "equivalence"): said}))
    key = f"transport/{look.regime}/{which.replace('_', '-')}"
    return table_of(key, title, f"{_GAINS} {look.note()}", columns, rows)


def _absolute_cells(look: Lookup, plan: SectionPlan, kind: type[ZeroShot | Reference]) -> dict[tuple[str, str], Cell]:
    """Of what is there without any port: target with tuned's head, or the fine-tune on its source."""
    cells: dict[tuple[str, str], Cell] = {}
    for task in plan.tasks:
        found = look.find(kind, task=task)
        cells[task, "task"] = score_of(picked(found, "test"), look.metric(task))
        if plan.support:
            cells[task, "support"] = score_of(picked(found, "support"), look.metric(plan.support))
    return cells


def _method_cells(look: Lookup, plan: SectionPlan, method: str, which: str) -> dict[tuple[str, str], Cell]:
    cells: dict[tuple[str, str], Cell] = {}
    for task in plan.tasks:
        found, zero = look.find(Ported, task=task, method=method), look.find(ZeroShot, task=task)
        cells[task, "task"] = difference(picked(found, which), picked(zero, "test"), look.metric(task))
        cells[task, "alpha"] = value_of({seed: one.chosen for seed, one in found.items()}, "alpha")
        if plan.support:
            metric = look.metric(plan.support)
            cells[task, "support"] = difference(picked(found, f"support_{which}"), picked(zero, "support"), metric)
    return cells


def _with_means(cells: Mapping[tuple[str, str], Cell], plan: SectionPlan) -> Cells:
    """Adds the mean over tasks, where all of them are there and have one unit."""
    means = {}
    for name in ("task", "support"):
        values = [cells.get((task, name)) for task in plan.tasks]
        means["mean", name] = mean_over(one if isinstance(one, Value) else None for one in values)
    return {**cells, **means}


# --- alpha --------------------------------------------------------------------------------------------------------


def _alpha(look: Lookup, plan: SectionPlan) -> list[Table]:
    return [_alpha_table(look, plan, task, task, "scores") for task in plan.tasks] + [
        _alpha_table(look, plan, task, plan.support, "support") for task in plan.tasks if plan.support
    ]


def _alpha_table(look: Lookup, plan: SectionPlan, task: str, measured: str, field: str) -> Table:
    """One row a method, one column an alpha; `measured` is the task or the support task."""
    metric = look.metric(measured)
    found = {line.label: look.find(AlphaCurve, task=task, method=line.label) for line in plan.methods}
    alphas = next((one.alphas for by_seed in found.values() for one in by_seed.values()), ())
    names = [f"alpha {alpha:g}" for alpha in alphas]
    zero = look.find(ZeroShot, task=task)
    base = picked(zero, "validation" if field == "scores" else "support_validation")
    absolute = score_of(base, metric)
    rows: list[tuple[str, str, Cells]] = [("zero-shot", "reference", {("", name): absolute for name in names})]
    for line in filter(look.has_records, plan.methods):
        series = {seed: getattr(one, field) or () for seed, one in found[line.label].items()}
        cells = {
            ("", name): difference({seed: scores[i] for seed, scores in series.items() if scores}, base, metric)
            for i, name in enumerate(names)
        }
        rows.append((line.label, line.role, cells))
    what = f"{task}" if measured == task else f"{task}, on the support task {measured}"
    note = f"Validation split; the test split is not touched. Differences to zero-shot. {look.note()}"
    columns = [Column("", name) for name in names]
    return table_of(f"alpha/{look.regime}/{task}/{field}", what, note, columns, rows)


# --- few shots ----------------------------------------------------------------------------------------------------


def _few_shot(look: Lookup, plan: SectionPlan) -> list[Table]:
    tables = [_few_shot_table(look, plan, "test", "task")]
    return [*tables, _few_shot_table(look, plan, "support", "support task")] if plan.support else tables


def _few_shot_table(look: Lookup, plan: SectionPlan, field: str, title: str) -> Table:
    columns = [Column(task, f"{shots} a class") for task in plan.tasks for shots in plan.shots]
    zero: dict[tuple[str, str], Cell] = {}
    for task in plan.tasks:
        base = score_of(picked(look.find(ZeroShot, task=task), field), look.metric(_measured(plan, task, field)))
        zero |= {(task, f"{shots} a class"): base for shots in plan.shots}
    rows: list[tuple[str, str, Cells]] = [("zero-shot", "reference", zero)]
    for line in filter(look.has_records, plan.methods):
        rows.append((line.label, line.role, _few_shot_cells(look, plan, line.label, field)))
    note = f"Test split. Differences to zero-shot, paired by seed. {look.note()}"
    return table_of(f"fewshot/{look.regime}/{field}", title, note, columns, rows)


def _few_shot_cells(look: Lookup, plan: SectionPlan, method: str, field: str) -> Cells:
    cells: dict[tuple[str, str], Cell] = {}
    for task in plan.tasks:
        base = picked(look.find(ZeroShot, task=task), field)
        for shots in plan.shots:
            found = picked(look.find(FewShot, task=task, method=method, shots=shots), field)
            metric = look.metric(_measured(plan, task, field))
            cells[task, f"{shots} a class"] = difference(found, base, metric)
    return cells


def _measured(plan: SectionPlan, task: str, field: str) -> str:
    return plan.support if field == "support" and plan.support else task


# --- interpolation ------------------------------------------------------------------------------------------------

_ENDS = ("source", "mapped source", "change")
_LINE = ("at 1/2", "target", "barrier")


def _interpolation(look: Lookup, plan: SectionPlan) -> list[Table]:
    metric = look.metric(plan.tasks[0])
    columns = [Column("loss", name) for name in (*_ENDS, *_LINE)]
    if metric.name != "loss":
        columns += [Column(metric.name, name) for name in ("mapped source", "at 1/2", "target")]
    columns.append(Column("", "equivalence", text=True))
    rows: list[tuple[str, str, Cells]] = []
    for line in plan.methods:
        kept = [one for one in look.records if isinstance(one, Interpolated) and one.method == line.label]
        for skips in dict.fromkeys(one.skips for one in kept):
            label = line.label if skips == "identity" else f"{line.label}, {skips} skips"
            cells = dict(_line_cells(look, line.label, skips, metric))
            cells["", "equivalence"] = equivalence_text(look.results, look.regime, line.label)
            rows.append((label, line.role, cells))
    note = (
        "Loss on the straight line from the mapped source to target; 'change': of the mapped source less source's own, "
        f"zero where the maps keep the function. {look.note()}"
    )
    return [table_of(f"interpolation/{look.regime}", plan.tasks[0], note, columns, rows)]


def _line_cells(look: Lookup, method: str, skips: str, metric: Metric) -> Cells:
    found = look.find(Interpolated, method=method, skips=skips)
    loss = Metric("loss", higher_is_better=False)
    ends = {seed: one.scores[0] for seed, one in found.items()}
    target = {seed: one.scores[-1] for seed, one in found.items()}
    middle = {seed: one.scores[len(one.scores) // 2] for seed, one in found.items()}
    source = picked(found, "source")
    cells: dict[tuple[str, str], Cell] = {
        ("loss", "source"): score_of(source, loss),
        ("loss", "mapped source"): score_of(ends, loss),
        ("loss", "change"): difference(ends, source, loss),
        ("loss", "at 1/2"): value_of({seed: one.midpoint_loss for seed, one in found.items()}, unit_of(loss)),
        ("loss", "target"): score_of(target, loss),
        ("loss", "barrier"): value_of({seed: one.barrier for seed, one in found.items()}, unit_of(loss)),
    }
    if metric.name != "loss":
        for name, scores in (("mapped source", ends), ("at 1/2", middle), ("target", target)):
            cells[metric.name, name] = score_of(scores, metric)
    return cells


_BUILDERS = {
    "transport": _transport,
    "worth": worth_tables,
    "alpha": _alpha,
    "fewshot": _few_shot,
    "interpolation": _interpolation,
}
