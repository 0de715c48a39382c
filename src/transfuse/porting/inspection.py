"""`inspect`: what the models are, how they are related, and what a port would do, before anything is written."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..errors import InputError
from ..evidence.null import stored_null
from ..evidence.relation import delta_report, relation
from ..files.opening import open_checkpoint
from ..methods.match import match_models
from ..methods.table import Method, method_for_maps
from ..models.model import Model, ModelLike, Models
from ..models.opening import open_models
from ..models.plan import make_plan
from ..options.requests import InspectRequest
from ..running.device import check_device


def inspect_models(
    source: ModelLike,
    tuned: ModelLike | None = None,
    target: ModelLike | None = None,
    *,
    request: InspectRequest | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Looks at one model, a base and its fine-tune, or all three.

    Args:
        source, tuned, target: old base, its fine-tune, new base.
        request, **options: what is asked for (`InspectRequest`), options by name over it: `method` is what the null
            test matches with ("auto" is "tied"), 0 `null_trials` leave matching and the test out.

    Returns:
        What `transfuse inspect --json` prints.

    Raises:
        InputError: a model cannot be read, they do not belong together, or the method does not match by weights.
    """
    asked = InspectRequest.asked(request, options)
    check_device(asked.run.device)
    base = open_checkpoint(source, role="source")  # once, also where it stands in for the target that is not given
    row = method_for_maps(asked.match.method)
    if row.needs_inputs:
        raise InputError(f"method {row.name} goes by activations; models are inspected by their weights alone")
    other = target if target is not None else base
    models = open_models(base, other, tuned, **vars(asked.opening), need_layout=False)
    report: dict[str, Any] = {"family": models.layout.family or None, "towers": dict(models.layout.facts)}
    shown = [models.source, *([models.tuned] if models.tuned else []), *([models.target] if target is not None else [])]
    report["models"] = {model.role: describe(model, models) for model in shown}
    report["spaces"] = {space.name: space.size for space in models.layout.with_ties().spaces.values()}
    plan = make_plan(models) if models.tuned is not None else None
    if plan is not None:
        report["delta"] = delta_report(models, [step.name for step in plan.of("carry")]).as_dict()
    if target is not None:
        report["resized"] = models.about_shapes()
        report["relation"] = _relation(models, row, asked)
    if plan is not None and target is not None:
        report["plan"] = {action: [step.out or step.name for step in plan.of(action)] for action in plan.count()}
    return report


def describe(model: Model, models: Models) -> dict[str, Any]:
    """One model: where, how large, of what dtype, what is tied."""
    checkpoint = model.checkpoint.origin or model.checkpoint
    headers = checkpoint.headers
    sizes = {name: _numel(info.shape) for name, info in headers.items()}
    vocabulary = [
        headers[model.disk[name]].shape[0]
        for name in model.floats()
        if "vocab" in {s.split(".")[-1] for s in _first_axis_spaces(models, name)}
    ]
    return {
        "location": model.checkpoint.location,
        "kind": model.checkpoint.kind,
        "architectures": list(model.checkpoint.config.get("architectures") or ()),
        "parameters": sum(sizes.values()),
        "tensors": len(headers),
        "files": len(model.checkpoint.shards),
        "dtypes": dict(Counter(str(info.dtype).removeprefix("torch.") for info in headers.values())),
        "vocabulary": vocabulary[0] if vocabulary else None,
        "tied": {a: b for a, b in model.tied.items() if a not in model.disk and b in model.disk and _used(model, a)},
    }


def _relation(models: Models, row: Method, asked: InspectRequest) -> dict[str, Any]:
    unmatched = not row.finds_maps or not asked.check.null_trials
    if unmatched or models.family is None or models.resizing is not None:
        return relation(models).as_dict()
    maps = match_models(models, row, asked.match, run=asked.run, check=asked.check)
    found = {key: value for key, value in maps.report.items() if key != "null"}
    return relation(models, maps, stored_null(maps)).as_dict() | {"match": found}


def _first_axis_spaces(models: Models, name: str) -> set[str]:
    layout = models.layout if name in models.layout.params else models.source_layout
    dims = layout.params[name].dims
    return {part.space for part in dims[0].parts if part.space} if dims else set()


def _used(model: Model, name: str) -> bool:
    """Whether a tied tensor's head is in the model at all (its siblings are on disk)."""
    stem = name.split(".")[0]
    return any(other.startswith(f"{stem}.") for other in model.disk)


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total
