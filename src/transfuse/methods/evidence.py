"""What says that two units correspond: the first part of a method. Light to import; verbs load what they need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from ..evidence.activations import ActivationEvidence
    from ..evidence.weights import WeightEvidence
    from ..matching.solution import Solution
    from ..models.model import Models
    from ..options.groups import Run
    from ..running.inputs import Prepared
    from .forms import Form


@dataclass(frozen=True)
class Evidence(ABC):
    """One kind of it.

    Attributes:
        name: in the description of a method.
        needs_inputs: whether it needs unlabelled inputs.
        can_be_shuffled: whether matching can be done again on a shuffled target, as the null test does.
    """

    name: ClassVar[str]
    needs_inputs: ClassVar[bool] = False
    can_be_shuffled: ClassVar[bool] = False

    @abstractmethod
    def gather(self, models: Models, form: Form, inputs: Prepared | None, run: Run) -> Any:
        """What a solver is given.

        Args:
            models: the two bases.
            form: in which they are matched.
            inputs: unlabelled, for evidence that needs some.
            run: its device, and whether there are bars.
        """

    @abstractmethod
    def report(
        self, gathered: Any, found: Solution, solve: Callable[[Any], Solution], *, trials: int, seed: int
    ) -> dict[str, Any]:
        """What there is to say about the maps that were found.

        Args:
            gathered: what `gather` gave.
            found: what the solver gave for it.
            solve: the solver, for a null test where there can be one.
            trials, seed: shuffled targets of each kind in that test, and of which seed; 0 trials leave it out.
        """


@dataclass(frozen=True)
class NoEvidence(Evidence):
    """None: no maps are sought."""

    name: ClassVar[str] = "none"

    def gather(self, models: Models, form: Form, inputs: Prepared | None, run: Run) -> None:
        return None

    def report(
        self, gathered: None, found: Solution, solve: Callable[[Any], Solution], *, trials: int, seed: int
    ) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Weights(Evidence):
    """Cross-moments of the weights."""

    name: ClassVar[str] = "weights"
    can_be_shuffled: ClassVar[bool] = True

    def gather(self, models: Models, form: Form, inputs: Prepared | None, run: Run) -> WeightEvidence:
        from ..evidence.weights import weight_evidence

        layout, folding = form.of(models)
        return weight_evidence(models, layout, run.device, folding)

    def report(
        self, gathered: WeightEvidence, found: Solution, solve: Callable[[Any], Solution], *, trials: int, seed: int
    ) -> dict[str, Any]:
        from ..evidence.null import null_test
        from .findings import findings

        products = gathered.products_as_they_are(), gathered.products(found.maps)
        report = findings(found, *products)
        if trials:
            with gathered.phase("null test"):
                tests = null_test(gathered, *products, lambda one: solve(one).maps, trials=trials, seed=seed)
            report["null"] = {tower: asdict(one) for tower, one in tests.items()}
        return report


@dataclass(frozen=True)
class Activations(Evidence):
    """Cross-moments of activations on unlabelled inputs."""

    name: ClassVar[str] = "activations"
    needs_inputs: ClassVar[bool] = True

    def gather(self, models: Models, form: Form, inputs: Prepared | None, run: Run) -> ActivationEvidence:
        from ..evidence.activations import activation_evidence  # needs what evaluation needs

        assert inputs is not None
        layout, _ = form.of(models)
        return activation_evidence(models, layout, inputs, device=run.device, progress=run.progress)

    def report(
        self, gathered: ActivationEvidence, found: Solution, solve: Callable[[Any], Solution], *, trials: int, seed: int
    ) -> dict[str, Any]:
        return {"examples": gathered.examples, "alignment": gathered.alignment(found.maps)}
