"""`inspect`: what the models are, how they are related, and what a port would do, before anything is written."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..errors import InputError
from ..evidence.null import stored_null
from ..evidence.relation import delta_report, relation
from ..files.checkpoint import open_checkpoint
from ..methods.match import MatchOptions, match_models
from ..methods.table import DEFAULT_METHOD, Method, get_method
from ..models.model import ConfigLike, Model, ModelLike, Models
from ..models.opening import open_models
from ..models.plan import make_plan


def inspect_models(
    source: ModelLike,
    tuned: ModelLike | None = None,
    target: ModelLike | None = None,
    *,
    family: str | None = None,
    config: ConfigLike = None,
    method: str = DEFAULT_METHOD,
    null_trials: int = 3,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Looks at one model, a base and its fine-tune, or all three.

    Args:
        source, tuned, target: old base, its fine-tune, new base.
        family, config: see `match`.
        method: what the null test matches with.
        null_trials: shuffled targets; 0 leaves matching and the null test out.
        progress: bars on stderr.
        **options: fields of `MatchOptions`.

    Returns:
        What `transfuse inspect --json` prints.

    Raises:
        InputError: a model cannot be read, they do not belong together, or the method does not match by weights.
    """
    base = open_checkpoint(source, role="source")  # once, also where it stands in for the target that is not given
    row = get_method(method)
    if row.needs_inputs:
        raise InputError(f"method {row.name} goes by activations; models are inspected by their weights alone")
    models = open_models(
        base, target if target is not None else base, tuned, family=family, config=config, need_layout=False
    )
    report: dict[str, Any] = {"family": models.layout.family or None, "towers": dict(models.layout.facts)}
    shown = [models.source, *([models.tuned] if models.tuned else []), *([models.target] if target is not None else [])]
    report["models"] = {model.role: describe(model, models) for model in shown}
    report["spaces"] = {space.name: space.size for space in models.layout.with_ties().spaces.values()}
    plan = make_plan(models) if models.tuned is not None else None
    if plan is not None:
        report["delta"] = delta_report(models, heads_come=bool(plan.of("carry"))).as_dict()
    if target is not None:
        report["resized"] = models.about_shapes()
        report["relation"] = _relation(models, row, MatchOptions(**options), null_trials, progress)
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


def _relation(models: Models, row: Method, options: MatchOptions, trials: int, progress: bool) -> dict[str, Any]:
    if not row.finds_maps or not trials or models.family is None or models.resizing is not None:
        return relation(models).as_dict()
    maps = match_models(models, row, options, null_trials=trials, progress=progress)
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
