"""Reports of interpolate, sweep, scale, refine and merge as text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .text import port_text

Scores = Mapping[str, float | None]


def interpolate_text(report: Mapping[str, Any]) -> str:
    return "\n\n".join(_curve_text(curve) for curve in report["curves"])


def _curve_text(curve: Mapping[str, Any]) -> str:
    names = [name for name in curve["source"] if name != "examples"]
    rows = [
        [f"{at:.2f}", *(_number(one[name]) for name in names)]
        for at, one in zip(curve["lambdas"], curve["scores"], strict=True)
    ]
    lines = [f"{curve['method']}, {curve['skips']} skips", *_table(["lambda", *names], rows)]
    off = _number(curve["equivalence"])
    lines.append(f"source     {_said(curve['source'])}; the mapped source (lambda 0) differs in loss by {off}")
    lines.append(
        f"barrier    {_number(curve['barrier'])} between the ends, {_number(curve['barrier_to_source'])} with source "
        f"itself as the end; loss at the midpoint {_number(curve['midpoint_loss'])}"
    )
    return "\n".join(lines)


def sweep_text(report: Mapping[str, Any]) -> str:
    metric = report["metric"]
    columns = {"alpha": [f"{alpha:g}" for alpha in report["alphas"]]}
    columns[report["chosen_on"]] = [_number(one[metric]) for one in report["validation"]]
    columns["loss"] = [_number(one["loss"]) for one in report["validation"]]
    if report["support"] is not None:
        columns["support"] = [_said(one) for one in report["support"]]
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    lines = [f"method     {report['method']}; the bases: {report['relation']}", *_table(list(columns), rows)]
    lines.append(f"chosen     alpha {report['chosen']:g}, by {metric} on {report['chosen_on']}")
    lines.append(f"test       {_said(report['test'])}; target alone {_said(report['zero_shot'])}")
    if report["test_support"] is not None:
        lines.append(f"support    {_said(report['test_support'])}; target alone {_said(report['zero_shot_support'])}")
    if report["chosen_on"] == "test":
        lines.append("WARNING: alpha was chosen on the test split; the test score is the best of several")
    return "\n".join(lines)


def scale_text(report: Mapping[str, Any]) -> str:
    found = report["scale"]
    rows = [[part, f"{alpha:+.3f}"] for part, alpha in found["alphas"].items()]
    lines = _port_lines(report, f"per {found['per']}, learned from {found['examples']} examples")
    lines += _table(["part", "alpha"], rows)
    lines += [f"{name:<10} {_said(scores)}" for name, scores in found["test"].items()]
    return "\n".join(lines)


def refine_text(report: Mapping[str, Any]) -> str:
    found = report["refine"]
    rule, mask, checked = found["rule"], found["mask"], found["validation"]
    how = "" if checked is None else f", by {checked['folds']}-fold cross-validation"
    lines = _port_lines(report, f"{found['alpha']:g}{how}")
    lines.append(f"mask       {rule['mode']}, vote {rule['vote']}, ties {rule['ties']}")
    change = f"loss {_number(found['before'])} before, {_number(found['after'])} after"
    lines.append(f"examples   {found['examples']}, {found['select']}; {change}")
    shares = [one for one in ("density", "agreement", "ties", "silent", "oracle_agreement") if one in mask]
    parts = {"all": mask, **mask["parts"]}
    rows = [[name, *(_percent(one.get(share)) for share in shares)] for name, one in parts.items()]
    lines += _table(["part", *(share.replace("_", " ") for share in shares)], rows)
    lines += [f"{name:<10} {_said(scores)}" for name, scores in found["test"].items()]
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _port_lines(report: Mapping[str, Any], alpha: str) -> list[str]:
    """Of a port that need not be written, and whose alpha is more than a number."""
    text = port_text({**report, "alpha": alpha})
    return [text if report["out"] is not None else text.rpartition("\n")[0]]


def merge_text(report: Mapping[str, Any]) -> str:
    found = report["merge"]
    lines = [f"merged     {len(found['tuned'])} fine-tunes ({found['how']}, density {found['density']:g})"]
    lines += [
        f"           {one['location']}: {one['delta']['relative_norm']:.4f} of the weights' norm"
        for one in found["tuned"]
    ]
    return "\n".join([*lines, port_text(report)])


def _said(scores: Scores) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in scores.items() if name != "examples")


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
