"""A hand-made benchmark result with known numbers: what the report is tested on."""

from __future__ import annotations

import random
from typing import Any

from transfuse.evidence.relation import TEXTS
from transfuse.report.records import (
    AS_IT_IS,
    KEPT,
    Alignment,
    AlphaCurve,
    Failure,
    FewShot,
    Interpolated,
    MethodLine,
    Metric,
    Ported,
    Record,
    Reference,
    Results,
    SectionPlan,
    Worth,
    ZeroShot,
)

SEEDS = (0, 1, 2)
REGIMES = {"continued": "same-lineage", "planted": "related-coordinates", "independent": "no-correspondence"}
TASKS = ("eurosat", "gtsrb")
METHODS = (
    MethodLine("random", "random", "control"),
    MethodLine("naive", "naive", "control"),
    MethodLine("git-rebasin", "git-rebasin", "method"),
    MethodLine("tied", "tied", "method"),
    MethodLine("oracle", "oracle", "oracle"),
)
ALPHAS = (0.5, 1.0)
LAMBDAS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Accuracy of zero-shot by seed, and what each method adds to it: exact binary fractions.
ZERO = {0: 0.25, 1: 0.5, 2: 0.375}
GAIN = {"random": -0.125, "naive": 0.0625, "git-rebasin": 0.03125, "tied": 0.25, "oracle": 0.25}
SHOTS = (1, 4)


def made_results(seeds: tuple[int, ...] = SEEDS, failures: tuple[Failure, ...] = ()) -> Results:
    """Three regimes, two tasks, all five sections."""
    records: list[Record] = [Reference(seed, task, scores(0.9)) for seed in seeds for task in TASKS]
    for seed in seeds:
        for regime, verdict in REGIMES.items():
            records += [alignment(seed, regime, line.label, verdict) for line in METHODS if line.role != "oracle"]
            for task in TASKS:
                records += records_of(seed, regime, task)
        records += [line_of(seed, "pair", "tied"), line_of(seed, "pair", "naive")]
        records.append(alignment(seed, "pair", "tied", "no-correspondence"))
    return Results(
        name="made",
        title="Made by hand <&>",
        about="Nothing was measured.",
        paper="Nobody et al. 2025, Table 1",
        seeds=seeds,
        metrics={task: Metric() for task in (*TASKS, "support")},
        sections=tuple(plans()),
        records=tuple(records),
        failures=failures,
        provenance={"versions": {"transfuse": "0"}, "recipe_text": "name: made\n", "command": "transfuse bench made"},
    )


def plans() -> list[SectionPlan]:
    """The five sections."""
    regimes = tuple(REGIMES)
    rows = [MethodLine(one, one, "reference") for one in (KEPT, AS_IT_IS)]
    few = (MethodLine("tied", "tied", "method"), MethodLine("fine-tuning", "fine-tuning", "control"))
    return [
        SectionPlan("transport", regimes, TASKS, METHODS, "support", verdict_methods=("tied",)),
        SectionPlan("alpha", regimes, TASKS, METHODS, "support", verdict_methods=("tied",)),
        SectionPlan("fewshot", regimes, TASKS, few, "support", SHOTS, ("tied",)),
        SectionPlan("worth", regimes, TASKS, (*rows, *METHODS), "support", verdict_methods=("tied",)),
        SectionPlan("interpolation", ("pair",), ("eurosat",), METHODS[1:4], verdict_methods=("tied",)),
    ]


def scores(accuracy: float) -> dict[str, float]:
    """Scores of that accuracy."""
    return {"accuracy": accuracy, "loss": 2.0 - accuracy, "examples": 100.0}


def alignment(seed: int, regime: str, method: str, verdict: str) -> Alignment:
    """What matching found: tied is exact, git-rebasin is broken."""
    rng = random.Random(f"{seed}{regime}{method}")
    moves = method not in ("naive", "random")
    found = 0.9 if verdict != "no-correspondence" else 0.2
    null = {"identity": 0.1, "matched": found, "chance": 0.2, "excess": (found - 0.2) / 0.8, "z": (found - 0.2) / 0.005}
    layers = {
        f"encoder.layers.{i}": {"identity": 0.1, "matched": found + 0.02 * rng.random(), "chance": 0.2}
        for i in range(4)
    }
    broken = method == "git-rebasin"
    checked = {"error": 0.83 if broken else 3.2e-7, "passed": not broken, "checked": "ViTModel", "reason": ""}
    return Alignment(
        seed=seed,
        regime=regime,
        method=method,
        exact=not broken,
        exportable=not broken,
        verdict=verdict if moves else "not-tested",
        text=TEXTS[verdict],
        null={"model": null} if method == "tied" else None,
        equivalence=checked if moves else None,
        layers=layers if moves else {},
        heads={f"heads.{i}": {"moved": rng.random(), "as_spectra": rng.random()} for i in range(4)} if moves else {},
    )


def records_of(seed: int, regime: str, task: str) -> list[Record]:
    """Everything measured of one task on one regime."""
    zero, support = scores(ZERO[seed]), scores(0.75)
    found: list[Record] = [ZeroShot(seed, regime, task, zero, zero, support, support)]
    for line in METHODS:
        if line.role == "oracle" and regime != "planted":
            continue
        gain = GAIN[line.label]
        curve = tuple(scores(ZERO[seed] + gain * alpha) for alpha in ALPHAS)
        at = {"at_one": curve[1], "at_chosen": curve[0], "support_at_one": scores(0.5), "support_at_chosen": support}
        found.append(Ported(seed, regime, task, line.label, ALPHAS, curve, 0.5, **at))
        found.append(AlphaCurve(seed, regime, task, line.label, ALPHAS, curve, (support, scores(0.5))))
    for row, gain, held in ((KEPT, 0.5, 0.25), (AS_IT_IS, 0.0, 0.75), ("naive", 0.125, 0.5), ("tied", 0.375, 0.625)):
        cost = {"seconds": 2.0, "memory": 3 * 10**6} if row == "tied" else {}
        test = {**scores(ZERO[seed] + gain), "calibration_error": 0.125}
        found.append(Worth(seed, regime, task, row, test, scores(held), scores(gain), **cost))
    for shots in SHOTS:
        for method in ("tied", "fine-tuning"):
            found.append(FewShot(seed, regime, task, method, shots, scores(ZERO[seed] + 0.0625 * shots), support))
    return found


def line_of(seed: int, regime: str, method: str) -> Interpolated:
    """A barrier of one nat in the middle."""
    losses: list[dict[str, Any]] = [
        {"loss": 1.0 + 4 * x * (1 - x) + seed / 8, "accuracy": 0.75 - x * (1 - x)} for x in LAMBDAS
    ]
    return Interpolated(seed, regime, method, "identity", LAMBDAS, tuple(losses), losses[0], 1.0, losses[2]["loss"])
