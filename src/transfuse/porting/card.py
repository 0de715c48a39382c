"""The model card beside the weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from .._version import __version__
from ..models.model import Models

log = logging.getLogger(__name__)

_PORTED = """
The fine-tune `{tuned}` of `{source}`, carried over to `{target}` with [transfuse](https://arxiv.org/abs/2505.22697)
{version}: method **{method}**, alpha {alpha}.
"""

_MERGED = """
{count} fine-tunes of `{source}`, carried over to `{target}` through one set of maps with
[transfuse](https://arxiv.org/abs/2505.22697) {version} and merged there ({how}): method **{method}**, alpha {alpha}.

{listed}
"""

_BODY = """
# {title}
{said}
| | |
|---|---|
| method | {method}: {summary} |
| relation of the bases | {relation} |
| mapped source against source | {equivalence} |
| updates lost to rounding | {lost} |
| tensors | {counts} |
{kept}
{checked}Whether the task came along has to be measured on data. All numbers are in `result.json`.
"""


def model_card(models: Models, result: Mapping[str, Any]) -> str:
    """The README.md of an output, with the hub's metadata.

    Args:
        models: the three models; licence and language are taken over from target's and tuned's own cards.
        result: what `result.json` holds.
    """
    assert models.tuned is not None
    said = _PORTED.format(
        version=__version__,
        **{key: result[key] for key in ("method", "alpha")},
        **{role: result["models"][role]["location"] for role in ("source", "tuned", "target")},
    )
    title = f"{Path(models.tuned.checkpoint.location).name} on {Path(models.target.checkpoint.location).name}"
    return _card(models, result, title, said, [result["models"]["tuned"]["location"]])


def merge_card(models: Models, result: Mapping[str, Any]) -> str:
    """The README.md of a merge; `result` has "merge"."""
    about = result["merge"]
    locations = [one["location"] for one in about["tuned"]]
    how = about["how"] if about["density"] == 1 else f"{about['how']}, density {about['density']}"
    said = _MERGED.format(
        version=__version__,
        count=len(locations),
        how=how,
        listed="\n".join(f"- `{location}`" for location in locations),
        **{key: result[key] for key in ("method", "alpha")},
        **{role: result["models"][role]["location"] for role in ("source", "target")},
    )
    title = f"{len(locations)} fine-tunes on {Path(models.target.checkpoint.location).name}"
    return _card(models, result, title, said, locations)


def _card(models: Models, result: Mapping[str, Any], title: str, said: str, tuned: Sequence[str]) -> str:
    assert models.tuned is not None
    old = [_card_data(model.checkpoint.companions) for model in (models.target, models.tuned)]
    kept = {
        key: next((c[key] for c in old if c.get(key)), None)
        for key in ("license", "license_name", "license_link", "language", "pipeline_tag")
    }
    kept["pipeline_tag"] = old[1].get("pipeline_tag")
    data = ModelCardData(
        base_model=[name for name in (result["models"]["target"]["location"], *tuned) if _is_hub_id(name)] or None,
        base_model_relation="finetune" if len(tuned) == 1 else "merge",
        library_name=_library(models),
        tags=["transfuse", "task-vector", f"transfuse-{result['method']}"],
        **{key: value for key, value in kept.items() if value},
    )
    body = _BODY.format(
        title=title,
        said=said,
        relation=result["relation"]["text"],
        equivalence=_equivalence_text(result["equivalence"]),
        checked="What was checked is that the maps keep the function of the old base. "
        if result["equivalence"]
        else "",
        kept=_kept_text(result),
        lost=f"{result['lost_updates']:.2%}",
        counts=", ".join(f"{count} {action}" for action, count in result["tensors"].items()),
        **{key: result[key] for key in ("method", "summary")},
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}", ignore_metadata_errors=True))


def _kept_text(result: Mapping[str, Any]) -> str:
    """A row about what the new base keeps, of methods that go by inputs."""
    if "kept" not in result:
        return ""
    kept = result["kept"]
    said = (
        "nothing was held on to: what the new base did better than the old one is mostly overwritten"
        if kept is None
        else f"the new base was held to its own answers on {kept['examples']} generic inputs"
    )
    return f"| beside the task | {said}{_drift_text(result.get('drift') or {})} |\n"


def _drift_text(found: Mapping[str, Any]) -> str:
    """What the port does there, on inputs to keep: how much is lost goes by it (docs/benchmarks.md)."""
    one = found.get("keep")
    if not one or one["divergence"] is None:
        return ""
    return f"; {one['changed']:.0%} of these answers change all the same (KL {one['divergence']:.2g} nats)"


def _equivalence_text(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not checked"
    if found["error"] is None:
        return f"not checked: {found['reason']}"
    note = f" ({found['reason']})" if found["reason"] else ""
    return f"largest relative difference {found['error']:.1e} in {found['checked']}{note}"


def _library(models: Models) -> str:
    return {"transformers": "transformers", "open_clip": "open_clip", "timm": "timm"}.get(
        models.target.checkpoint.kind, "pytorch"
    )


def _is_hub_id(location: str) -> bool:
    return location.count("/") == 1 and not location.startswith((".", "/", "~")) and not Path(location).exists()


def _card_data(folder: Path | None) -> dict[str, Any]:
    if folder is None or not (folder / "README.md").is_file():
        return {}
    text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    try:
        return ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError) as error:
        log.warning("%s: its metadata cannot be read, so no licence is taken over (%s)", folder / "README.md", error)
        return {}
