"""Reports as text for people; `--json` prints them whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..methods.method import Method


def inspect_text(report: Mapping[str, Any]) -> str:
    lines = [f"family     {report['family'] or 'unknown (only naive and random can port it)'}"]
    for tower, facts in report["towers"].items():
        said = ", ".join(
            f"{value} {key}" if isinstance(value, int) else f"{key} {value}" for key, value in facts.items()
        )
        lines.append(f"{tower or 'model':<10} {said}")
    for role, about in report["models"].items():
        lines.append(
            f"{role:<10} {about['location']}: {' '.join(about['architectures']) or about['kind']}, "
            f"{about['parameters']:,} parameters in {about['tensors']} tensors and {about['files']} files, "
            f"{', '.join(about['dtypes'])}" + (f", vocabulary {about['vocabulary']}" if about["vocabulary"] else "")
        )
        lines += [f"           shared: {one} = {other}" for one, other in about["tied"].items()]
    if "delta" in report:
        lines += _delta_lines(report["delta"])
    lines += _shape_lines(report.get("resized"))
    if "relation" in report:
        lines += _relation_lines(report["relation"])
    for action, names in report.get("plan", {}).items():
        shown = "" if action == "add" else ": " + ", ".join(names[:6]) + (" ..." if len(names) > 6 else "")
        lines.append(f"{action:<10} {len(names)} tensors{shown}")
    return "\n".join(lines)


def _shape_lines(resized: Mapping[str, Any] | None) -> list[str]:
    """In what the bases differ, of which the report has each thing once for source and once for tuned."""
    if not resized:
        return []
    inputs = [one for one in resized["inputs"] if not one.startswith("tuned: ")]
    return [f"inputs     {one}" for one in inputs] + ([f"shapes     {resized['shapes']}"] if resized["shapes"] else [])


def _delta_lines(delta: Mapping[str, Any]) -> list[str]:
    said = {
        "fine-tune": "tuned is a fine-tune of source",
        "head-only": "the body is source's own; only a head is new",
        "large": "WARNING: a very large change for a fine-tune; is source really its base?",
        "unrelated": "WARNING: larger than the weights themselves: source is not the base of tuned",
    }[delta["verdict"]]
    shares = {part: "new" if value is None else f"{value:.3f}" for part, value in delta["parts"].items()}
    parts = ", ".join(f"{part} {share}" for part, share in shares.items())
    return [f"delta      {delta['relative_norm']:.4f} of the weights' norm: {said}", f"           {parts}"]


def _relation_lines(found: Mapping[str, Any]) -> list[str]:
    lines = [f"relation   {found['verdict']}: {found['text']}"]
    for tower, cosine in found["cosines"].items():
        label = "layers" if tower == "model" else f"{tower} layers"
        line = f"           {label}: cosine of the weights as they are {cosine:.4f}"
        if null := (found["null"] or {}).get(tower):
            entries, orders = (sum(null[key]) / len(null[key]) for key in ("entries", "orders"))
            line += (
                f", after matching {null['matched']:.4f}; by chance {max(entries, orders):.4f} "
                f"(excess {null['excess']:.2f}, z {null['z']:.1f})"
            )
        lines.append(line)
        if null and null["shared"]:
            lines.append(f"           {label}: {_shared_text(null['shared'])}")
    return lines


def _shared_text(found: Mapping[str, Any]) -> str:
    return (
        f"of {found['units']} units of MLPs {found['numbered']} are matched to the one of their number "
        f"(p {found['p_numbered']:.2g}), {found['paired']} alike by what they read and by what they write "
        f"(p {found['p_paired']:.2g}); by chance {found['layers']}"
    )


def _match_lines(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    if "alignment" in found:
        fits = list(found["alignment"].values())
        mean = sum(fits) / max(len(fits), 1)
        return [f"matching   on {found['examples']} inputs; the maps bring {mean:.0%} of the activations together"]
    good = " (the identity is as good)" if found["identity_is_as_good"] else ""
    return [
        f"matching   {found['sweeps']} sweeps, similarity {found['similarity_identity']:.4f} -> "
        f"{found['similarity_matched']:.4f}{good}"
    ]


def match_text(report: Mapping[str, Any]) -> str:
    lines = _match_lines(report if "sweeps" in report or "alignment" in report else {}) + _relation_lines(
        report["relation"]
    )
    return "\n".join([*lines, f"maps       {report['out']}"])


def port_text(report: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{action} {count}" for action, count in report["tensors"].items())
    lines = [f"method     {report['method']}, alpha {report['alpha']}"]
    lines += [f"why        {report['choice']['because']}"] if "choice" in report else []
    lines += _shape_lines(report.get("resized"))
    lines += _delta_lines(report["delta"]) if "delta" in report else []  # a merge has many
    if "relation" in report:
        lines += [*_match_lines(report["match"]), *_relation_lines(report["relation"])]
    lines.append(f"tensors    {counts}" + (f" (carried: {', '.join(report['carried'])})" if report["carried"] else ""))
    lines += drift_lines(report.get("drift") or {})
    if report.get("equivalence"):
        lines.append(equivalence_text(report["equivalence"]))
    if report.get("lost_updates") is not None:
        lines.append(f"rounding   {report['lost_updates']:.2%} of the updates lost in the target's dtype")
    if report.get("loads"):
        lines.append(f"loads      {report['loads']}")
    return "\n".join([*lines, f"output     {report['out'] or 'nothing written (dry run)'}"])


def drift_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How far the port is from the new base: only what it does on inputs to keep says what was lost."""
    lines = []
    for name, what in (("task", "the task's inputs"), ("keep", "inputs to keep")):
        one = found.get(name)
        if one and one["divergence"] is not None:
            said = f"{one['changed']:.0%} of the new base's answers change (KL {one['divergence']:.2g} nats)"
            lines.append(f"{'drift' if not lines else '':<10} on {what} {said}")
        elif one and one["features"] is not None:
            lines.append(f"{'drift' if not lines else '':<10} on {what} its features move by {one['features']:.2g}")
    return lines


def equivalence_text(found: Mapping[str, Any]) -> str:
    if found["error"] is None:
        return f"verified   not run: {found['reason']}"
    word = "ok" if found["passed"] else "FAILED"
    note = f"; {found['reason']}" if found["reason"] else ""
    where = f"{found['checked']} ({found['dtype']})"
    return f"verified   {word}: mapped source differs by {found['error']:.1e} in {where}{note}"


def methods_text(methods: Iterable[Method]) -> str:
    """The table of methods: what each needs, where its maps come from, what it guarantees, its paper."""
    lines = [
        f"{'method':<23} {'needs':<13} {'group':<12} {'heads':<14} {'streams':<9} {'function':<9} {'exportable':<10} "
        "paper"
    ]
    for one in methods:
        row, kept = one.describe(), "exact" if one.exact else "broken"
        lines.append(
            f"{one.name:<23} {one.needs:<13} {row['group']:<12} {row['heads']:<14} {row['streams']:<9} {kept:<9} "
            f"{'yes' if one.exportable else 'no':<10} {one.paper}\n{'':<23} {one.summary}"
        )
    note = (
        "function: does the mapped source compute what source computes; transfusion and its ablations by permuted skips"
    )
    return "\n".join([*lines, note])
