"""How maps are found: the third part of a method. Light to import; verbs load the solvers of `matching/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .evidence import Activations, Evidence, Weights

if TYPE_CHECKING:
    from ..matching.solution import Solution
    from ..options.groups import Match, Run
    from .forms import Form


@dataclass(frozen=True)
class Solver(ABC):
    """One way to find maps. What is said here holds of most; others say what does not.

    Attributes:
        takes: the kinds of evidence it can go by.
        heads: how it can match heads, as in `Form`.
        package: what has to be installed beside.
        finds_maps: whether there are maps at all.
    """

    takes: ClassVar[tuple[type[Evidence], ...]]
    heads: ClassVar[tuple[str, ...]]
    package: ClassVar[str] = ""
    finds_maps: ClassVar[bool] = True

    @abstractmethod
    def solve(self, gathered: Any, form: Form, match: Match, run: Run) -> Solution:
        """The maps.

        Args:
            gathered: evidence, as from `Evidence.gather`.
            form: in which the bases are matched.
            match: how maps are sought.
            run: its seed, and whether there are bars.
        """

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """`group`, `solver` and `start`, as in the description of a method."""

    @property
    def any_shape(self) -> bool:
        """Whether source may be of another width or depth than target: nothing between those keeps a function."""
        return False

    @property
    def gives_mapped_source(self) -> bool:
        """Whether source carried by the maps is a model to speak of."""
        return True

    @property
    def keeps_function(self) -> bool:
        """Whether the maps are of groups that keep what a model computes."""
        return True

    @property
    def rotates(self) -> bool:
        """Whether maps mix units, where that keeps the function."""
        return False


@dataclass(frozen=True)
class NoMaps(Solver):
    """None: every unit stays where it is."""

    takes: ClassVar[tuple[type[Evidence], ...]] = (Evidence,)
    heads: ClassVar[tuple[str, ...]] = ("-",)
    finds_maps: ClassVar[bool] = False

    def solve(self, gathered: Any, form: Form, match: Match, run: Run) -> Solution:
        from ..matching.solution import Solution

        return Solution({})

    def describe(self) -> dict[str, Any]:
        return {"group": "identity", "solver": "-", "start": "identity"}

    @property
    def any_shape(self) -> bool:
        return True


@dataclass(frozen=True)
class Ascent(Solver):
    """Coordinate ascent; of several climbs (`restarts`) the best.

    Attributes:
        group: "permutation", or "orthogonal": rotations where the layout allows them, permutations elsewhere.
        start: "identity", or "anchored" on what both models share before any map is known.
    """

    takes: ClassVar[tuple[type[Evidence], ...]] = (Weights,)
    heads: ClassVar[tuple[str, ...]] = ("spectral", "inner-product", "in-order", "flat")
    group: Literal["permutation", "orthogonal"] = "permutation"
    start: Literal["identity", "anchored"] = "anchored"

    def solve(self, gathered: Any, form: Form, match: Match, run: Run) -> Solution:
        from ..matching.ascent import CoordinateAscent

        solver = CoordinateAscent(
            group=self.group,
            heads=form.heads,
            start=self.start,
            paper_form=match.paper_form,
            max_sweeps=match.max_sweeps,
            restarts=match.restarts,
            seed=run.seed,
        )
        return solver.solve(gathered, progress=run.progress)

    def describe(self) -> dict[str, Any]:
        return {"group": self.group, "solver": "ascent", "start": self.start}

    @property
    def rotates(self) -> bool:
        return self.group == "orthogonal"


@dataclass(frozen=True)
class Transport(Solver):
    """Optimal transport in place of assignment.

    Attributes:
        plan: "sinkhorn" (entropic couplings) or "emd" (exact ones).
    """

    takes: ClassVar[tuple[type[Evidence], ...]] = (Weights,)
    heads: ClassVar[tuple[str, ...]] = ("flat",)
    package: ClassVar[str] = "POT"
    plan: Literal["sinkhorn", "emd"] = "sinkhorn"

    def solve(self, gathered: Any, form: Form, match: Match, run: Run) -> Solution:
        from ..matching.couplings import Couplings

        return Couplings(self.plan).solve(gathered)

    def describe(self) -> dict[str, Any]:
        return {"group": "coupling", "solver": self.plan, "start": "identity"}

    @property
    def keeps_function(self) -> bool:
        return False


@dataclass(frozen=True)
class Procrustes(Solver):
    """Every space by itself.

    Attributes:
        group: "permutation", "orthogonal" (rotations where the layout allows them, permutations elsewhere) or
            "rotation" (rotations of every space, kept function or not).
        keep_spreads: maps between different numbers of units give activations of target's size, as fitting needs them.
    """

    takes: ClassVar[tuple[type[Evidence], ...]] = (Activations,)
    heads: ClassVar[tuple[str, ...]] = ("-", "inner-product", "flat")
    group: Literal["permutation", "orthogonal", "rotation"] = "orthogonal"
    keep_spreads: bool = False

    def solve(self, gathered: Any, form: Form, match: Match, run: Run) -> Solution:
        from ..matching.by_space import BySpace

        return BySpace(self.group, self.keep_spreads).solve(gathered)

    def describe(self) -> dict[str, Any]:
        return {"group": self.group, "solver": "procrustes", "start": "identity"}

    @property
    def any_shape(self) -> bool:
        return not self.gives_mapped_source

    @property
    def gives_mapped_source(self) -> bool:
        return self.group != "rotation"

    @property
    def rotates(self) -> bool:
        return self.group != "permutation"
