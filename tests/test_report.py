"""The report of a hand-made result: numbers by hand, the verdict before any accuracy, nothing from outside."""

from __future__ import annotations

import csv
import io
import re
import statistics
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser

import pytest

import made_results
from transfuse.report.figures import figures_of, regime_figures
from transfuse.report.grid import Lookup, Table
from transfuse.report.page import SectionFigures, render
from transfuse.report.records import AS_IT_IS, KEPT, Alignment, Failure, Metric, Results, Worth, as_json, from_json
from transfuse.report.tables import SectionReport, sections_of
from transfuse.report.values import MINUS, Value, difference, mean_over, score_of, value_of
from transfuse.report.worth import share_of_gap
from transfuse.report.writing import comma_separated, markdown

ACCURACY = Metric()
LOSS = Metric("loss", higher_is_better=False)


@cache
def results() -> Results:
    return made_results.made_results(failures=(Failure("transport x", "no <reason>"),))


@cache
def sections() -> tuple[SectionReport, ...]:
    return sections_of(results())


def table(section: int, regime: str, number: int = 0) -> Table:
    found = next(one for one in sections()[section].regimes if one.label == regime)
    return found.tables[number]


def cells(of: Table, row: str) -> dict[tuple[str, str], Value | str | None]:
    found = next(one for one in of.rows if one.label == row)
    return {(c.group, c.name): cell for c, cell in zip(of.columns, found.cells, strict=True)}


# --- values -------------------------------------------------------------------------------------------------------


def test_mean_spread_and_pairing_by_hand() -> None:
    after, before = {0: {"accuracy": 0.5}, 1: {"accuracy": 0.75}}, {0: {"accuracy": 0.25}, 1: {"accuracy": 0.25}}
    found = difference(after, before, ACCURACY)
    assert found is not None
    assert (found.mean, found.sd, found.n) == (37.5, pytest.approx(statistics.stdev([25.0, 50.0])), 2)
    assert found.by_seed == {0: 25.0, 1: 50.0}
    # Not the difference of means: a seed that only one of them has says nothing.
    assert difference(after, {1: {"accuracy": 0.25}}, ACCURACY) == value_of({1: 50.0}, "points", signed=True)


@pytest.mark.parametrize(
    ("value", "seeds", "said"),
    [
        (value_of({0: 12.34, 1: 12.34}, "points"), 2, "12.3 ± 0.0"),
        (value_of({0: 1.0}, "points", signed=True), 1, "+1.0"),
        (value_of({0: 1.0}, "points", signed=True), 3, "+1.0 (n=1)"),
        (value_of({0: -2.0, 1: -4.0}, "points", signed=True), 2, f"{MINUS}3.0 ± 1.4"),
        (value_of({0: -0.04}, "points", signed=True), 1, "0.0"),
        (score_of({0: {"loss": 1.23456}}, LOSS), 1, "1.235"),
    ],
)
def test_how_values_are_written(value: Value | None, seeds: int, said: str) -> None:
    assert value is not None and value.text(seeds) == said


def test_means_over_tasks_need_all_of_them_in_one_unit() -> None:
    one, other = value_of({0: 1.0, 1: 2.0}, "points"), value_of({0: 3.0, 1: 6.0}, "points")
    found = mean_over([one, other])
    assert found is not None and found.by_seed == {0: 2.0, 1: 4.0}
    assert mean_over([one, None]) is None
    assert mean_over([one, value_of({0: 1.0}, "nats")]) is None
    assert mean_over([]) is None


# --- tables -------------------------------------------------------------------------------------------------------


def test_the_transport_table_holds_paired_differences() -> None:
    fixed = table(0, "planted")
    zero = cells(fixed, "zero-shot")["eurosat", "task"]
    assert isinstance(zero, Value) and zero.mean == 37.5 and zero.sd == 12.5
    tied = cells(fixed, "tied")
    gain, support = tied["eurosat", "task"], tied["eurosat", "support"]
    assert isinstance(gain, Value) and (gain.mean, gain.sd) == (25.0, 0.0)  # seeds differ, the gain does not
    assert isinstance(support, Value) and support.mean == -25.0
    assert tied["", "equivalence"] == "exact (3e-07)"
    assert cells(fixed, "git-rebasin")["", "equivalence"] == "broken (0.83)"
    assert cells(fixed, "naive")["", "equivalence"] == "exact (identity)"
    mean = tied["mean", "task"]
    assert isinstance(mean, Value) and mean.mean == 25.0
    chosen = cells(table(0, "planted", 1), "tied")
    at, alpha = chosen["eurosat", "task"], chosen["eurosat", "alpha"]
    assert isinstance(at, Value) and at.mean == 12.5
    assert isinstance(alpha, Value) and alpha.mean == 0.5


def test_rows_come_in_order_and_an_oracle_only_where_there_is_one() -> None:
    labels = [row.label for row in table(0, "planted").rows]
    assert labels == ["zero-shot", "fine-tune on source", "random", "naive", "git-rebasin", "tied", "oracle"]
    assert [row.label for row in table(0, "independent").rows] == labels[:-1]


def test_alpha_tables_are_about_validation_only() -> None:
    found = table(1, "continued")
    value = cells(found, "tied")["", "alpha 0.5"]
    assert isinstance(value, Value) and value.mean == 12.5
    assert "test split is not touched" in found.note


def test_few_shot_tables_have_a_column_for_every_count() -> None:
    found = cells(table(2, "continued"), "fine-tuning")
    four = found["eurosat", "4 a class"]
    assert isinstance(four, Value) and four.mean == 25.0


def test_interpolation_shows_both_ends_the_middle_and_the_barrier() -> None:
    found = cells(table(4, "pair"), "tied")
    values = {name: one.mean for (_, name), one in found.items() if isinstance(one, Value) and _ == "loss"}
    assert values["barrier"] == 1.0 and values["change"] == 0.0
    assert values["at 1/2"] == pytest.approx(2.125)
    middle = found["accuracy", "at 1/2"]
    assert isinstance(middle, Value) and middle.mean == 50.0


def test_what_a_port_is_worth_is_its_share_of_the_gap_and_what_it_costs() -> None:
    found = cells(table(3, "planted", 1), "tied")
    means = {name: one.mean for (_, name), one in found.items() if isinstance(one, Value)}
    assert means == {
        "share of the gap": 75.0,
        "support": -12.5,
        "corrupted": 37.5,
        "calibration error": 12.5,
        "seconds": 2.0,
        "memory, MB": 3.0,
    }
    kept, base = (cells(table(3, "planted", 1), row)["", "share of the gap"] for row in (KEPT, AS_IT_IS))
    assert isinstance(kept, Value) and isinstance(base, Value) and (kept.mean, base.mean) == (100.0, 0.0)
    assert [row.label for row in table(3, "planted").rows] == [KEPT, AS_IT_IS, "naive", "tied"], "none that is empty"
    scores = cells(table(3, "planted"), KEPT)["eurosat", "support"]
    assert isinstance(scores, Value) and scores.mean == 25.0, "absolute, not a difference"


def test_a_task_that_gains_nothing_has_no_gap_and_a_loss_counts_downwards() -> None:
    flat = [
        replace(one, test={"accuracy": 0.5, "loss": 4.0 - (one.row == KEPT) - 0.5 * (one.row == "tied")})
        if isinstance(one, Worth)
        else one
        for one in results().records
    ]
    changed = replace(results(), records=tuple(flat))
    plan = results().sections[3]
    assert share_of_gap(Lookup(changed, "planted"), plan, "tied") is None
    metrics = {**results().metrics, **dict.fromkeys(made_results.TASKS, LOSS)}
    share = share_of_gap(Lookup(replace(changed, metrics=metrics), "planted"), plan, "tied")
    assert share is not None and share.mean == 50.0
    upside_down = {**metrics, **dict.fromkeys(made_results.TASKS, Metric("loss"))}
    worse = share_of_gap(Lookup(replace(changed, metrics=upside_down), "planted"), plan, "tied")
    assert worse is None, "where the old fine-tune is worse than the new base there is no gap"


def test_the_verdict_is_that_of_most_seeds() -> None:
    records = [
        replace(one, verdict="weak-correspondence")
        if isinstance(one, Alignment) and (one.seed, one.regime, one.method) == (0, "independent", "tied")
        else one
        for one in results().records
    ]
    found = sections_of(replace(results(), records=tuple(records)))[0].regimes[2].verdict
    assert found.verdict == "no-correspondence"
    assert found.counted() == "no-correspondence (2 of 3 seeds), weak-correspondence (1 of 3 seeds)"


def test_no_null_test_is_said() -> None:
    records = tuple(one for one in results().records if not isinstance(one, Alignment))
    found = sections_of(replace(results(), records=records))[0].regimes[0].verdict
    assert found.verdict == "not-tested" and found.counted() == "not-tested"


@pytest.mark.parametrize("broken", [{"passed": None, "error": None, "reason": "no class"}])
def test_a_check_that_could_not_run_is_said(broken: dict[str, object]) -> None:
    records = [
        replace(one, equivalence={**one.equivalence, **broken})
        if isinstance(one, Alignment) and one.equivalence
        else one
        for one in results().records
    ]
    found = sections_of(replace(results(), records=tuple(records)))[0].regimes[0].tables[0]
    assert cells(found, "tied")["", "equivalence"] == "not run: no class"


def test_records_survive_json() -> None:
    for record in results().records:
        assert from_json(as_json(record)) == record
    with pytest.raises((KeyError, TypeError)):
        from_json({"kind": "transport"})


# --- text ---------------------------------------------------------------------------------------------------------


def test_markdown_gives_every_verdict_before_its_numbers() -> None:
    text = markdown(results(), sections())
    for part in re.split(r"^### ", text, flags=re.M)[1:]:
        assert part.index("Verdict, from weights alone") < part.index("| zero-shot") if "| zero-shot" in part else True
    assert "no-correspondence (all 3 seeds)" in text
    assert "+25.0 ± 0.0" in text and "- transport x: no <reason>" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    widths = [line.count("|") for line in rows]
    assert all(widths[i] == widths[i + 1] for i, line in enumerate(rows[:-1]) if rows[i + 1].startswith("|--"))


def test_csv_holds_every_seed() -> None:
    lines = list(csv.DictReader(io.StringIO(comma_separated(sections()))))
    wanted = {"regime": "planted", "row": "tied", "column": "eurosat task", "table": "alpha 1"}
    found = next(one for one in lines if all(one[key] == value for key, value in wanted.items()))
    assert (found["mean"], found["n"], found["difference"], found["verdict"]) == (
        "25.0",
        "3",
        "1",
        "related-coordinates",
    )
    assert found["seeds"] == "0:25.0 1:25.0 2:25.0"


# --- figures and page ---------------------------------------------------------------------------------------------


@cache
def drawn() -> dict[str, SectionFigures]:
    """All figures of one seed: spread is drawn in `test_spread_is_drawn`."""
    small = made_results.made_results(seeds=(0,))
    found = {}
    for section in sections_of(small):
        regimes = {one.label: regime_figures(small, section, one) for one in section.regimes[:1]}
        found[section.kind] = SectionFigures(figures_of(small, section), regimes)
    return found


def test_there_is_a_figure_of_everything() -> None:
    found = {one.key for section in drawn().values() for one in section.overall}
    assert found == {
        "transport-gains",
        "transport-alpha-validation",
        "worth-frontier",
        "alpha-alpha-task",
        "alpha-alpha-support",
        "fewshot-fewshot",
        "interpolation-lines",
    }
    assert [one.key for one in drawn()["transport"].by_regime["continued"]] == ["transport-continued-matching"]
    for section in drawn().values():
        for one in (*section.overall, *(figure for figures in section.by_regime.values() for figure in figures)):
            assert one.png.startswith(b"\x89PNG") and one.svg.startswith(b"<?xml") and one.caption


def test_figures_have_the_same_bytes_every_time() -> None:
    small = made_results.made_results(seeds=(0, 1))
    section = sections_of(small)[3]
    first, again = figures_of(small, section)[0], figures_of(small, section)[0]
    assert (first.svg, first.png) == (again.svg, again.png)


class Page(HTMLParser):
    """Where regimes, verdicts and scores stand, and whatever a page could fetch."""

    def __init__(self, text: str):
        super().__init__()
        self.seen: list[tuple[str, str]] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.fetched += [found[key] for key in ("src", "href", "action", "data", "srcset", "poster") if key in found]
        if "data-regime" in found:
            self.seen.append(("regime", found["data-regime"]))
        if "data-verdict" in found:
            self.seen.append(("verdict", found["data-verdict"]))
        if "score" in found.get("class", "").split():
            self.seen.append(("score", ""))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_says_every_verdict_before_the_first_accuracy_and_needs_nothing() -> None:
    text = render(results(), sections(), drawn())
    page = Page(text)
    assert page.open == []
    regimes = [i for i, (what, _) in enumerate(page.seen) if what == "regime"]
    assert len(regimes) == 4 * 3 + 1 and regimes[0] == 0  # no score stands before the first regime
    for start, end in zip(regimes, [*regimes[1:], None], strict=True):
        kinds = [what for what, _ in page.seen[start:end]]
        assert kinds[1] == "verdict" and "score" in kinds and kinds.count("verdict") == 1
    assert [name for what, name in page.seen if what == "verdict"][2] == "no-correspondence"
    assert all(one.startswith(("data:", "#")) for one in page.fetched)
    assert "<script" not in text and "http://" not in text and "https://" not in text and "@import" not in text
    assert "url(" not in text
    assert "Made by hand &lt;&amp;&gt;" in text and "no &lt;reason&gt;" in text
    assert "seed 0: 25" in text  # every value of a mean, on hovering


def test_a_failed_run_still_has_its_page() -> None:
    empty = replace(results(), records=())
    found = sections_of(empty)
    figures = {one.kind: SectionFigures(figures_of(empty, one), {}) for one in found}
    assert "not-tested" in render(empty, found, figures)
