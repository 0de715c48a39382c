"""One value of a table: a mean over seeds with its spread, and how it is written."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .records import Metric, Scores

MINUS = "\u2212"
_DIGITS = {"points": 1, "percent": 0, "z": 1, "alpha": 2, "seconds": 1, "MB": 0}  # others 3


@dataclass(frozen=True)
class Value:
    """Mean and sample standard deviation over seeds.

    Attributes:
        unit: "points" (percent points), "percent", "seconds", "MB", "nats" (a loss), "cosine", "z" or "alpha".
        signed: whether it is a difference, written with its sign.
        mean, sd: sd is None for one seed.
        by_seed: seed -> value, from which both come.
    """

    unit: str
    signed: bool
    mean: float
    sd: float | None
    by_seed: dict[int, float]

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.by_seed)

    def text(self, seeds: int) -> str:
        """As in a table of `seeds` seeds: fewer are said."""
        digits = _DIGITS.get(self.unit, 3)
        shown = f"{self.mean:+.{digits}f}" if self.signed else f"{self.mean:.{digits}f}"
        if float(shown) == 0:
            shown = f"{0:.{digits}f}"  # no sign on a zero
        spread = "" if self.sd is None else f" ± {self.sd:.{digits}f}"
        fewer = "" if self.n == seeds else f" (n={self.n})"
        return shown.replace("-", MINUS) + spread + fewer


def value_of(by_seed: Mapping[int, float], unit: str, *, signed: bool = False) -> Value | None:
    """Mean and spread; None without a seed."""
    if not by_seed:
        return None
    found = dict(sorted(by_seed.items()))
    values = list(found.values())
    return Value(unit, signed, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, found)


def score_of(by_seed: Mapping[int, Scores], metric: Metric) -> Value | None:
    """The primary metric of scores by seed."""
    return value_of({seed: shown(scores, metric) for seed, scores in by_seed.items()}, unit_of(metric))


def difference(by_seed: Mapping[int, Scores], base: Mapping[int, Scores], metric: Metric) -> Value | None:
    """Scores minus those of a base, paired by seed: what seeds share cancels."""
    both = {s: shown(by_seed[s], metric) - shown(base[s], metric) for s in by_seed if s in base}
    return value_of(both, unit_of(metric), signed=True)


def mean_over(values: Iterable[Value | None]) -> Value | None:
    """Mean over tasks in every seed, then over seeds; seeds that lack a task are left out."""
    found = list(values)
    if not found or any(one is None for one in found) or len({one.unit for one in found if one}) > 1:
        return None
    kept = [one for one in found if one is not None]
    seeds = set.intersection(*(set(one.by_seed) for one in kept))
    means = {seed: statistics.fmean(one.by_seed[seed] for one in kept) for seed in seeds}
    return value_of(means, kept[0].unit, signed=kept[0].signed)


def shown(scores: Scores, metric: Metric) -> float:
    """The primary metric, shares in percent points."""
    return scores[metric.name] * (100 if metric.in_points else 1)


def unit_of(metric: Metric) -> str:
    """The unit of `shown`."""
    return "points" if metric.in_points else "nats" if metric.name == "loss" else ""
