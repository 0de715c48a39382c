"""What the weights alone say of two bases, over seeds: shown before any accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..evidence.relation import TEXTS
from .records import Alignment, Results, SectionPlan
from .values import Value, value_of

NOT_TESTED = "not-tested"


@dataclass(frozen=True)
class NullLine:
    """The null test of one method and tower, over seeds.

    Attributes:
        identity, matched, chance: cosines of the layers' matrices: as they are, after matching, and after the same
            matching against shuffled targets.
        verdicts: verdict -> seeds that got it.
    """

    method: str
    tower: str
    identity: Value | None
    matched: Value | None
    chance: Value | None
    excess: Value | None
    z: Value | None
    verdicts: dict[str, int]

    @property
    def name(self) -> str:
        """What the line is called: its tower is named where there are two."""
        return self.method if self.tower == "model" else f"{self.method}, {self.tower}"

    @property
    def values(self) -> tuple[Value | None, ...]:
        """As is, matched, by chance, excess, z."""
        return (self.identity, self.matched, self.chance, self.excess, self.z)


@dataclass(frozen=True)
class Verdict:
    """How the bases of a regime are related.

    Attributes:
        verdict: a key of `relation.TEXTS`: what most seeds got from the method that found most.
        text: it in a sentence.
        by_method: method -> seed -> verdict. Rotations can find what permutations do not.
        lines: the null tests behind it.
    """

    verdict: str
    text: str
    by_method: dict[str, dict[int, str]]
    lines: tuple[NullLine, ...]

    def counted(self) -> str:
        """For example "no-correspondence (all 3 seeds)"; method by method where they disagree."""
        said = {method: counted(Counter(by_seed.values())) for method, by_seed in self.by_method.items()}
        if len(set(said.values())) > 1:
            return "; ".join(f"{method}: {one}" for method, one in said.items())
        return next(iter(said.values()), NOT_TESTED)


def counted(verdicts: Counter[str] | dict[str, int]) -> str:
    """Verdicts with how many seeds got them, the commonest first."""
    seeds = sum(verdicts.values())
    if not seeds:
        return NOT_TESTED
    named = sorted(verdicts.items(), key=lambda pair: (-pair[1], list(TEXTS).index(pair[0])))
    if len(named) == 1:
        return f"{named[0][0]} ({'all ' if seeds > 1 else ''}{seeds} seed{'s' if seeds > 1 else ''})"
    return ", ".join(f"{name} ({count} of {seeds} seeds)" for name, count in named)


def alignments(results: Results, regime: str, method: str | None = None) -> list[Alignment]:
    """Of one regime, sorted by seed."""
    found = [one for one in results.records if isinstance(one, Alignment) and one.regime == regime]
    return sorted((one for one in found if method in (None, one.method)), key=lambda one: one.seed)


def verdict_of(results: Results, plan: SectionPlan, regime: str) -> Verdict:
    """The strongest correspondence that any of the plan's verdict methods found, by seed."""
    order = list(TEXTS)
    by_method = {
        method: {one.seed: one.verdict for one in alignments(results, regime, method)}
        for method in plan.verdict_methods
    }
    by_method = {method: by_seed for method, by_seed in by_method.items() if by_seed}
    if not by_method:
        return Verdict(NOT_TESTED, TEXTS[NOT_TESTED], {}, ())
    seeds = sorted(set().union(*by_method.values()))
    by_seed = {seed: max((one[seed] for one in by_method.values() if seed in one), key=order.index) for seed in seeds}
    counts = Counter(by_seed.values())
    most = min(counts, key=lambda verdict: (-counts[verdict], order.index(verdict)))
    lines = [line for method in _tested(results, plan, regime) for line in _null_lines(results, regime, method)]
    return Verdict(most, TEXTS[most], by_method, tuple(lines))


def _tested(results: Results, plan: SectionPlan, regime: str) -> list[str]:
    """Methods with a null test: those that decide first."""
    others = [line.label for line in plan.methods if line.label not in plan.verdict_methods]
    tested = {one.method for one in alignments(results, regime) if one.null}
    return [method for method in (*plan.verdict_methods, *others) if method in tested]


def _null_lines(results: Results, regime: str, method: str) -> list[NullLine]:
    found = [one for one in alignments(results, regime, method) if one.null]
    towers = dict.fromkeys(tower for one in found for tower in one.null or {})
    return [_null_line(found, method, tower) for tower in towers]


def _null_line(found: Sequence[Alignment], method: str, tower: str) -> NullLine:
    tests = {one.seed: one.null[tower] for one in found if one.null and tower in one.null}
    units = {"identity": "cosine", "matched": "cosine", "chance": "cosine", "excess": "share", "z": "z"}
    values = {key: value_of({seed: one[key] for seed, one in tests.items()}, unit) for key, unit in units.items()}
    return NullLine(
        method, tower, **values, verdicts=dict(Counter(one.towers.get(tower, one.verdict) for one in found))
    )


def equivalence_text(results: Results, regime: str, method: str) -> str:
    """Whether the mapped source computes what source does: "exact" with the error, or "broken" with its number."""
    found = alignments(results, regime, method)
    if not found:
        return ""
    checked = [one.equivalence for one in found if one.equivalence]
    if not checked:
        return "exact (identity)" if all(one.exact for one in found) else "not run"
    errors = [one["error"] for one in checked if one["error"] is not None]
    if not errors:
        return f"not run: {checked[0]['reason']}"
    # What was measured decides, not what the table of methods promises.
    holds = all(one["passed"] is not False for one in checked)
    permuted = any("permuted skips" in (one.get("reason") or "") for one in checked)
    skips = " with permuted skips" if holds and permuted else ""
    return f"exact{skips} ({max(errors):.0e})" if holds else f"broken ({max(errors):.2g})"
