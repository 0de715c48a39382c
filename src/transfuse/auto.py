"""`--method auto`: looks at the models and at the data there is, and takes the best sound method.

The rules come from measurements (docs/benchmarks.md, "Unlabelled inputs"):

1. Unlabelled inputs are given: functional. No method was better by more than noise in any regime measured.
2. None are given and the bases share coordinates as they are: naive.
3. Matching finds their coordinates (null test): tied for permutations, orthogonal for rotations.
4. Nothing is shared: functional on drawn inputs, and a warning, since real ones serve far better.

Labelled examples, if given, decide between that choice and naive, and for a scale, 0 included.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .maps import Maps
from .match import MatchOptions, NullTest, match_models, stored_null
from .methods import METHODS
from .models import Models
from .relation import raw_cosines, relation

if TYPE_CHECKING:
    from .evaluate import TaskSpec
    from .evaluate.unlabelled import Inputs

log = logging.getLogger(__name__)

AUTO = "auto"
# Weak agreement by permutations moved nothing in any measurement; weak agreement by rotations did.
_ENOUGH = {"tied": ("related-coordinates",), "orthogonal": ("related-coordinates", "weak-correspondence")}
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        method: a row of the table.
        because: two sentences.
        inputs: on which it goes, if it goes by any.
        maps: what matching found on the way, if it is of that method.
        tried: method -> verdict of its null test, by tower.
    """

    method: str
    because: str
    inputs: Inputs | None = None
    maps: Maps | None = None
    tried: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For `result.json`."""
        return {
            "method": self.method,
            "because": self.because,
            "null_tests": {k: dict(v) for k, v in self.tried.items()},
        }


@dataclass(frozen=True)
class Labelled:
    """A few labelled examples.

    Attributes:
        task: whose training split they come from (spec, file or JSON text).
        per_class: so many of every class.
        data_dir: where the task's `local` data lie.
    """

    task: TaskSpec | str | Path
    per_class: int
    data_dir: Path | None = None


def choose(
    models: Models, inputs: Inputs | None, options: MatchOptions, *, null_trials: int = 1, progress: bool = False
) -> Choice:
    """The method for these models and inputs.

    Args:
        models: source, tuned and target.
        inputs: unlabelled, or None.
        options: of matching.
        null_trials: shuffled targets of each kind in the null tests; at least one.
        progress: bars on stderr.
    """
    runs = models.family is not None and all(one.checkpoint.kind == "transformers" for one in models.all())
    if inputs is not None and runs:
        return Choice(
            "functional",
            "Unlabelled inputs are given, so target's modules are fitted to what the fine-tune does on them. In no "
            "regime measured was another method better by more than noise.",
            inputs,
        )
    if inputs is not None:
        log.warning("the inputs are not used: these checkpoints cannot be run here (transfuse convert makes some run)")
    if relation(models).verdict == "same-lineage" or models.family is None:
        cosine = min(raw_cosines(models).values())
        return Choice(
            "naive",
            f"The bases share their coordinates as they are (cosine {cosine:.2f}), so the task vector is added "
            "unchanged. Unlabelled inputs (--inputs) would do better where the release was trained much further.",
        )
    tried: dict[str, dict[str, str]] = {}
    for name, enough in _ENOUGH.items():
        maps = match_models(models, METHODS[name], options, null_trials=max(null_trials, 1), progress=progress)
        null = stored_null(maps) or {}
        tried[name] = {tower: one.verdict for tower, one in null.items()}
        if null and all(verdict in enough for verdict in tried[name].values()):
            return Choice(name, _found(name, null), None, maps, tried)
    return _without_correspondence(models, tried)


def _found(name: str, null: Mapping[str, NullTest]) -> str:
    excess = min(one.excess for one in null.values())
    what = "permutations of units" if name == "tied" else "rotations"
    return (
        f"The bases do not share coordinates as they are, but {what} align them by more than chance (excess "
        f"{excess:.2f}). The task vector is carried by these maps."
    )


def _without_correspondence(models: Models, tried: Mapping[str, Mapping[str, str]]) -> Choice:
    nothing = "The weights of the bases have no more in common than chance, so none that goes by weights can help. "
    try:
        _check_that_it_runs(models)
        from .evaluate.unlabelled import SYNTHETIC, Inputs  # needs what evaluation needs
    except InputError as error:
        log.warning("%sThe task vector is added as it is, which is not expected to help either (%s)", nothing, error)
        because = nothing + "The models cannot be run on inputs here, so nothing better is left."
        return Choice("naive", because, tried=tried)
    log.warning("%sDrawn inputs stand in for real ones; some of the task (--inputs) would keep far more.", nothing)
    because = nothing + "No inputs are given, so target's modules are fitted on drawn ones, which keeps a part at best."
    return Choice("functional", because, Inputs(SYNTHETIC), None, tried)


def _check_that_it_runs(models: Models) -> None:
    """Raises InputError if a model has no class that can be built here, or what evaluation needs is not installed."""
    from .probes import probe_of_model

    for model in models.all():
        probe_of_model(model, models.layout, "cpu")
