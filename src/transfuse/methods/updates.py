"""What is done with the maps: the last part of a method. Light to import; verbs load what they need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from ..options.groups import Change, Run
    from ..running.given import Unlabelled
    from ..update.ported import Ported


OVERWRITES = (
    "no inputs to keep are given (--keep): what the new base does better than the old one on anything but the task's "
    "inputs will mostly be lost"
)


@dataclass(frozen=True)
class Update(ABC):
    """One way to make what target gets.

    Attributes:
        transport: in the description of a method: "maps", "fit" or "train".
        is_control: whether it carries nothing of the fine-tune, as a measure for what does.
        needs_inputs: whether it needs unlabelled inputs, beside what matching needs.
        takes: the options that change what it does, of those that some updates have no use for.
        moves_source: whether the maps are to carry source itself, so that the mapped source is a model to check.
    """

    transport: ClassVar[str]
    is_control: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False
    takes: ClassVar[frozenset[str]] = frozenset()
    moves_source: ClassVar[bool] = True

    @abstractmethod
    def of(self, ported: Ported, inputs: Unlabelled, change: Change, run: Run) -> Ported:
        """The port with what this adds in the place of the task vector as maps carry it.

        Args:
            ported: with the task vector carried over by the maps.
            inputs: unlabelled, for updates that need some.
            change: how it is made.
            run: its seed and device, and whether there are bars.

        Raises:
            InputError: a model cannot be run here.
        """

    def steps(self, change: Change) -> int:
        """How many steps of training are taken."""
        return 0

    def report(self, inputs: Unlabelled, change: Change) -> dict[str, Any]:
        """What the report says of the inputs, of updates that go by them."""
        if "keep" not in self.takes or inputs.task is None:
            return {}
        kept = None if inputs.keep is None else {"examples": len(inputs.keep), "weight": inputs.keep_weight}
        return {"examples": len(inputs.task), "kept": kept, "steps": self.steps(change)}

    def drift(self, ported: Ported, inputs: Unlabelled, run: Run) -> dict[str, Any] | None:
        """How far the port is from target on the inputs, of updates that go by some (see `update.drift`)."""
        if not self.needs_inputs:
            return None
        from ..update.drift import drift_of  # needs what evaluation needs

        return drift_of(ported, inputs, run.device)

    def warnings(self, inputs: Unlabelled, given: Mapping[str, Any]) -> list[str]:
        """What whoever asks for it should know; `given`: values of options that not all updates take."""
        found = [
            f"option {name} is given, but not used: the method does nothing that it could change"
            for name, value in given.items()
            if value and name not in self.takes
        ]
        return [*found, OVERWRITES] if "keep" in self.takes and inputs.keep is None else found


@dataclass(frozen=True)
class Contract(Update):
    """The task vector is contracted with the maps (Rinaldi et al. 2025, eq. 13)."""

    transport: ClassVar[str] = "maps"

    def of(self, ported: Ported, inputs: Unlabelled, change: Change, run: Run) -> Ported:
        return _with_embeddings_as_asked(ported, change)


@dataclass(frozen=True)
class Noise(Update):
    """The task vector is replaced by a random one of the same norms, tensor by tensor."""

    transport: ClassVar[str] = "maps"
    is_control: ClassVar[bool] = True

    def of(self, ported: Ported, inputs: Unlabelled, change: Change, run: Run) -> Ported:
        from ..update.objects import Noise as Drawn

        return _with_embeddings_as_asked(ported.with_update(Drawn(ported.update, run.seed)), change)


@dataclass(frozen=True)
class Fit(Update):
    """Target's modules are fitted, on inputs, to what tuned gives, carried by the maps."""

    transport: ClassVar[str] = "fit"
    takes: ClassVar[frozenset[str]] = frozenset({"keep", "polish"})
    needs_inputs: ClassVar[bool] = True
    moves_source: ClassVar[bool] = False

    def steps(self, change: Change) -> int:
        return change.polish

    def of(self, ported: Ported, inputs: Unlabelled, change: Change, run: Run) -> Ported:
        from ..update.functional import FitOptions, fit_port  # needs what evaluation needs
        from ..update.lessons import TWO_TEACHERS, train_port

        start, fitting = _with_embeddings_as_asked(ported, change), FitOptions(ridge=change.ridge)
        found = fit_port(start, inputs, fitting, device=run.device, progress=run.progress)
        fitted = ported.fitted(found)
        if change.polish:
            training = replace(TWO_TEACHERS, steps=change.polish, seed=run.seed)
            where = {"still": _still(ported, change), "device": run.device, "progress": run.progress}
            fitted = fitted.fitted(train_port(fitted.at(1.0), inputs, training, **where))
        return _with_embeddings_as_asked(fitted, change)


@dataclass(frozen=True)
class Train(Update):
    """Target is trained by gradient descent, on inputs, to give tuned's outputs, and on those to keep its own.

    Attributes:
        plain: whether as it is commonly done; else on views of the inputs, by features too, and to what tuned changed
            where the bases speak.
    """

    plain: bool = True

    transport: ClassVar[str] = "train"
    takes: ClassVar[frozenset[str]] = frozenset({"keep", "train_steps"})
    needs_inputs: ClassVar[bool] = True
    moves_source: ClassVar[bool] = False

    def steps(self, change: Change) -> int:
        return change.train_steps

    def of(self, ported: Ported, inputs: Unlabelled, change: Change, run: Run) -> Ported:
        from ..update.lessons import PLAIN, TWO_TEACHERS, train_port  # needs what evaluation needs
        from ..update.ported import unchanged

        training = replace(PLAIN if self.plain else TWO_TEACHERS, steps=change.train_steps, seed=run.seed)
        where = {"still": _still(ported, change), "device": run.device, "progress": run.progress}
        return ported.fitted(train_port(unchanged(ported).at(1.0), inputs, training, **where))


def _still(ported: Ported, change: Change) -> frozenset[str]:
    """What training leaves as it is."""
    from ..update.ported import embeddings_of

    return embeddings_of(ported) if change.keep_embeddings else frozenset()


def _with_embeddings_as_asked(ported: Ported, change: Change) -> Ported:
    """The same, or with target's own tables, positions and patches."""
    from ..update.ported import without_embeddings

    return without_embeddings(ported) if change.keep_embeddings else ported
