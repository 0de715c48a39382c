"""A port written: weights, config, companions, report and model card, and whether it loads."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ..errors import VerificationError
from ..families.binding import canonical_names
from ..files.configs import Unavailable
from ..files.opening import open_checkpoint
from ..files.writing import RESULT_FILE, Weights, write_checkpoint
from ..models.model import Models
from ..models.plan import output_config, output_files
from ..running.building import load_transformers
from ..running.instances import idle_of
from .card import model_card
from .run import PortResult

log = logging.getLogger(__name__)


def write_port(
    result: PortResult,
    out: Path,
    *,
    card: Callable[[Models, Mapping[str, Any]], str] = model_card,
    verify: bool,
    force: bool,
    progress: bool,
) -> None:
    """Writes a result: weights, config, companions, `result.json` and a model card, all or nothing.

    Args:
        card: makes README.md from the models and the report.
        verify, force, progress: see `port`.

    Raises:
        InputError: it cannot be written there.
        VerificationError: what was written does not load.
    """
    tensors = result.tensors
    models, plan = tensors.models, tensors.plan
    file, config = output_config(plan, models)
    bar = tqdm(total=len(tensors.steps), desc="writing", unit="tensor", disable=not progress)

    def read(name: str) -> Iterator[Tensor]:
        bar.update()
        return tensors.pieces(name)

    def finish(folder: Path) -> dict[str, str]:
        result.report["lost_updates"] = tensors.lost_share
        if verify and models.target.checkpoint.kind == "transformers":
            result.report["loads"] = _check_loads(folder, config, models, [s.out for s in plan.of("carry")])
        report = json.dumps(result.report, indent=2, sort_keys=True) + "\n"
        return {RESULT_FILE: report, "README.md": card(models, result.report)}

    with models.passes.phase("write"):
        write_checkpoint(
            out,
            Weights(output_files(plan, models.target), tensors.form, read),
            files={file: json.dumps(config, indent=2, sort_keys=True) + "\n"} if config else {},
            copy_from=models.target.checkpoint.companions,
            finish=finish,
            force=force,
        )
    bar.close()
    log.info("%s", models.passes.text())


def _check_loads(folder: Path, config: Mapping[str, Any], models: Models, carried: Iterable[str]) -> str:
    """Loads what was written in its real class; the name of that class.

    Raises:
        VerificationError: weights are missing that target or tuned has.
    """
    written = open_checkpoint(folder)
    try:
        state = {name: written.tensor(name) for name in written}
        model, loading = load_transformers(config, state, idle_of(models).take(config))
    except Unavailable as error:
        return f"not checked: {error}"
    name = type(model).__name__
    if lost := sorted(one for one in loading.missing if _is_known(models, config, one)):
        raise VerificationError(f"the ported model does not load: {name} misses {lost[:5]}")
    if loading.mismatched:
        raise VerificationError(
            f"the ported model does not load: shapes differ in {name}: {sorted(loading.mismatched)}"
        )
    if ignored := sorted(loading.unexpected & set(carried)):
        raise VerificationError(
            f"{name} has no place for the carried {ignored[:5]}, so the head would be lost: tuned's config does not "
            'name its architecture; give it, e.g. --config \'{"architectures": ["BertForSequenceClassification"]}\''
        )
    return name


def _is_known(models: Models, config: Mapping[str, Any], name: str) -> bool:
    """Whether target or tuned has a weight of the model class; a body is often saved without its pooler."""
    known = canonical_names(models.family, [name], config)[name] if models.family else name
    return any(model is not None and known in model.disk for model in (models.target, models.tuned))
