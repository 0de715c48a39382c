"""`--method auto`: looks at the models and at the data there is, and takes the best sound method.

The rules come from measurements (docs/benchmarks.md, "Which method auto takes"):

1. Unlabelled inputs are given: functional, which carries nine tenths of a task in seconds; with inputs to keep:
   two-teachers, which carried the most of those that keep what a better release is better at on small models (on a
   real encoder functional with the same inputs did; there is no rule yet that tells them apart).
2. None are given and the bases nearly agree, as they are or after matching: naive, or the maps that were found.
3. They do not: functional on drawn inputs, or on texts that target writes where it is a masked language model, and a
   warning, since real ones serve better. That was better than any method by weights from the point on where the release
   has been trained for as long as the base, or is a stranger.
4. The models cannot be run here: what matching found, if the null test says that it found anything; else naive.

Labelled examples, if given, decide between that choice and naive, and for a scale, 0 included.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import InputError
from ..evidence.null import NullTest, stored_null
from ..evidence.relation import raw_cosines, relation, strength
from ..maps.collection import Maps
from ..models.model import Models
from ..options.groups import Inputs
from ..options.requests import PortRequest
from .match import match_models
from .method import Method
from .table import get_method

log = logging.getLogger(__name__)

# A cosine above it is "nearly". After short continuations it was 0.98 and more, and naive does as well as drawn inputs;
# where drawn inputs do better it was 0.92 and less (docs/benchmarks.md).
NEAR = 0.95
# By weights, in this order: maps that any stock model can have.
BY_WEIGHTS = ("tied", "orthogonal")
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        method: a row of the table.
        because: two sentences.
        inputs: on which it goes, if it goes by any.
        maps: what matching found on the way, if it is of that method.
        tried: method -> its null test, by tower.
    """

    method: str
    because: str
    inputs: Inputs = Inputs()
    maps: Maps | None = None
    tried: Mapping[str, Mapping[str, NullTest]] = field(default_factory=dict)

    @property
    def null(self) -> Mapping[str, NullTest] | None:
        """The null test that found the most."""
        return max(self.tried.values(), key=strength, default=None)

    def as_dict(self) -> dict[str, Any]:
        """For `result.json`."""
        return {
            "method": self.method,
            "because": self.because,
            "null_tests": {name: {t: one.verdict for t, one in null.items()} for name, null in self.tried.items()},
        }


def choose(models: Models, request: PortRequest) -> Choice:
    """The method for these models and inputs.

    Args:
        models: source, tuned and target.
        request: inputs, if any, and how maps are sought; there is at least one trial of the null test.
    """
    inputs = request.inputs
    runs = models.family is not None and all(one.checkpoint.kind == "transformers" for one in models.all())
    if inputs.given and runs and request.keep.given and _can_teach(models, request):
        return Choice(
            "two-teachers",
            "Inputs of the task and inputs to keep are given, so target is trained to do what the fine-tune does on "
            "the former and what it does itself on the latter. On small models that kept more of both than a closed "
            "form; a large one may be served as well by functional, which is faster.",
            inputs,
        )
    if inputs.given and runs:
        return Choice(
            "functional",
            "Unlabelled inputs are given, so target's modules are fitted to what the fine-tune does on them. No method "
            "that was measured carries more of a task as fast.",
            inputs,
        )
    if inputs.given:
        log.warning("the inputs are not used: these checkpoints cannot be run here (transfuse convert makes some run)")
    if models.resizing is not None and not models.resizing.same_shapes:
        drawn = _drawn(models, request, f"The bases are of different shapes ({models.resizing.why}). ")
        if drawn is None:
            raise InputError(
                f"{models.resizing.why}. Between such bases only what the fine-tune does can be carried over, on "
                "inputs, and these checkpoints cannot be run here (transfuse convert makes some run)"
            )
        return drawn
    if models.family is None:
        return Choice("naive", "The family of the models is not known, so nothing can be matched or run.")
    cosine = min(raw_cosines(models).values())
    if cosine > NEAR:
        return Choice(
            "naive",
            f"The bases share their coordinates as they are (cosine {cosine:.2f}), so the task vector is added "
            "unchanged. Unlabelled inputs (--inputs) would do a little better.",
        )
    if models.resizing is not None:
        return _drawn(models, request, f"The bases are of two kinds ({models.resizing.why}). ") or _as_it_is({})
    return _matched(models, request)


def _matched(models: Models, request: PortRequest) -> Choice:
    """By maps from the weights if they bring the bases near; else by drawn inputs; else by whatever there is."""
    tried: dict[str, Mapping[str, NullTest]] = {}
    found: list[Choice] = []
    check = replace(request.check, null_trials=max(request.check.null_trials, 1))
    for method in map(get_method, BY_WEIGHTS):
        maps = match_models(models, method, request.match, request.change, request.run, check=check)
        null = stored_null(maps) or {}
        tried[method.name] = null
        if null and all(one.verdict in _enough(method) for one in null.values()):
            choice = Choice(method.name, _found(method, null), Inputs(), maps, dict(tried))
            if min(one.matched for one in null.values()) > NEAR:
                return choice
            found.append(choice)
    near = relation(models).verdict == "same-lineage"
    nothing = "The weights of the bases agree in part at best" if found or near else "The weights say nothing"
    drawn = _drawn(models, request, f"{nothing}, so methods that go by weights carry little. ", tried)
    return drawn or (found[0] if found and not near else _as_it_is(tried))


def _enough(method: Method) -> tuple[str, ...]:
    """What a null test has to say where nothing better can be done.

    Weak agreement by permutations moved nothing in any measurement; weak agreement by rotations did.
    """
    return ("related-coordinates", "weak-correspondence") if method.solver.rotates else ("related-coordinates",)


def _as_it_is(tried: Mapping[str, Mapping[str, NullTest]]) -> Choice:
    because = "The models cannot be run on inputs here, so the task vector is added as it is. Little is expected of it."
    return Choice("naive", because, tried=tried)


def _found(method: Method, null: Mapping[str, NullTest]) -> str:
    excess = min(one.excess for one in null.values())
    what = "rotations" if method.solver.rotates else "permutations of units"
    return (
        f"The bases do not share coordinates as they are, but {what} align them by more than chance (excess "
        f"{excess:.2f}). The task vector is carried by these maps."
    )


def _drawn(
    models: Models, request: PortRequest, why: str, tried: Mapping[str, Mapping[str, NullTest]] = {}
) -> Choice | None:
    """Functional on inputs that nobody has to give; None where the models cannot be run."""
    try:
        _check_that_it_runs(models)
        from ..running.unlabelled import GENERATED, SYNTHETIC  # needs what evaluation needs
    except InputError as error:
        log.warning("%sDrawn inputs cannot be used either (%s)", why, error)
        return None
    log.warning("%sDrawn inputs stand in for real ones; some of the task (--inputs) would keep more.", why)
    writes = _writes(models)
    what = "texts that it writes itself" if writes else "drawn ones"
    because = why + f"No inputs are given, so target's modules are fitted on {what}, which keeps a part at best."
    inputs = replace(request.inputs, task=GENERATED if writes else SYNTHETIC)
    return Choice("functional", because, inputs, None, tried)


def _writes(models: Models) -> bool:
    """Whether target can write texts itself, with a head that was trained."""
    from ..running.instances import probe_of
    from ..running.live import load_live, of_checkpoint
    from ..running.written import written_texts

    checkpoint = models.target.checkpoint
    try:
        built = of_checkpoint(checkpoint, probe_of(models, "target", "cpu").module, checkpoint.config)
        written_texts(built, count=1, tokens=8)  # most models cannot, and are not read for that
        load_live(checkpoint)  # which insists on a head that was trained
    except InputError:
        return False
    return True


def _can_teach(models: Models, request: PortRequest) -> bool:
    """Whether tuned says something that training could go by: a body alone does not."""
    from ..running.instances import probe_of
    from ..update.teachers import says_something

    return says_something(probe_of(models, "tuned", request.run.device))


def _check_that_it_runs(models: Models) -> None:
    """Raises InputError if a model has no class that can be built here, or what evaluation needs is not installed."""
    from ..running.instances import let_go, probe_of

    try:
        for model in models.all():
            probe_of(models, model.role, "cpu")
    except InputError:
        let_go(models)
        raise
    let_go(models, "tuned")  # matching, which is next, runs the bases alone
