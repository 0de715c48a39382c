"""What is done with the maps: the last part of a method. Light to import; verbs load what they need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from ..maps.collection import Maps
    from ..models.model import Models
    from ..models.plan import Plan
    from ..running.inputs import Prepared
    from ..update.ported import PortedTensors
    from .match import MatchOptions


@dataclass(frozen=True)
class Update(ABC):
    """One way to make what target gets.

    Attributes:
        transport: in the description of a method: "maps", "fit" or "train".
        is_control: whether it carries nothing of the fine-tune, as a measure for what does.
        needs_inputs: whether it needs unlabelled inputs, beside what matching needs.
        moves_source: whether it takes the maps for what they say about source: that mapped by them is source again.
    """

    transport: ClassVar[str]
    is_control: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False
    moves_source: ClassVar[bool] = True

    @abstractmethod
    def tensors(
        self,
        models: Models,
        plan: Plan,
        maps: Maps,
        alpha: float,
        inputs: Prepared | None,
        options: MatchOptions,
        *,
        progress: bool = False,
    ) -> PortedTensors:
        """The tensors of the output.

        Args:
            models, plan: what is carried, and what happens to every tensor.
            maps: from source to target.
            alpha: scale of the change.
            inputs: unlabelled, processed for target, for updates that need some.
            options: see there.
            progress: bars on stderr.

        Raises:
            InputError: a model cannot be run here.
        """


@dataclass(frozen=True)
class Contract(Update):
    """The task vector is contracted with the maps (Rinaldi et al. 2025, eq. 13)."""

    transport: ClassVar[str] = "maps"

    def tensors(
        self,
        models: Models,
        plan: Plan,
        maps: Maps,
        alpha: float,
        inputs: Prepared | None,
        options: MatchOptions,
        *,
        progress: bool = False,
    ) -> PortedTensors:
        from ..update.ported import PortedTensors

        return PortedTensors(models, plan, maps, alpha, None, keep_embeddings=options.keep_embeddings)


@dataclass(frozen=True)
class Noise(Update):
    """The task vector is replaced by a random one of the same norms, tensor by tensor."""

    transport: ClassVar[str] = "maps"
    is_control: ClassVar[bool] = True

    def tensors(
        self,
        models: Models,
        plan: Plan,
        maps: Maps,
        alpha: float,
        inputs: Prepared | None,
        options: MatchOptions,
        *,
        progress: bool = False,
    ) -> PortedTensors:
        from ..update.ported import PortedTensors

        return PortedTensors(models, plan, maps, alpha, options.seed, keep_embeddings=options.keep_embeddings)


@dataclass(frozen=True)
class Fit(Update):
    """Target's modules are fitted, on inputs, to what tuned gives, carried by the maps."""

    transport: ClassVar[str] = "fit"
    needs_inputs: ClassVar[bool] = True
    moves_source: ClassVar[bool] = False

    def tensors(
        self,
        models: Models,
        plan: Plan,
        maps: Maps,
        alpha: float,
        inputs: Prepared | None,
        options: MatchOptions,
        *,
        progress: bool = False,
    ) -> PortedTensors:
        from ..update.functional import FitOptions, fit_port  # needs what evaluation needs
        from ..update.ported import PortedTensors

        assert inputs is not None
        start = PortedTensors(models, plan, maps, 1.0, None, {}, options.keep_embeddings)
        fitting = FitOptions(ridge=options.ridge)
        found = fit_port(start, inputs, fitting, device=options.device, progress=progress)
        return PortedTensors(models, plan, maps, alpha, None, found, options.keep_embeddings)


@dataclass(frozen=True)
class Train(Update):
    """Target is trained by gradient descent, on inputs, to give tuned's outputs; source takes no part."""

    transport: ClassVar[str] = "train"
    needs_inputs: ClassVar[bool] = True
    moves_source: ClassVar[bool] = False

    def tensors(
        self,
        models: Models,
        plan: Plan,
        maps: Maps,
        alpha: float,
        inputs: Prepared | None,
        options: MatchOptions,
        *,
        progress: bool = False,
    ) -> PortedTensors:
        from ..update.distillation import DistilOptions, distil_port  # needs what evaluation needs
        from ..update.ported import PortedTensors

        assert inputs is not None
        start = PortedTensors(models, plan, maps, 0.0, None)
        training = DistilOptions(seed=options.seed)
        found = distil_port(start, inputs, training, device=options.device, progress=progress)
        return PortedTensors(models, plan, maps, alpha, None, found)
