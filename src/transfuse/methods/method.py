"""A method: four parts, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .evidence import Evidence
from .forms import Form
from .solvers import Solver
from .updates import Update


@dataclass(frozen=True)
class Method:
    """One recipe. What it needs and what it keeps is answered by its parts; nobody has to know which they are.

    Attributes:
        name: as in `--method`.
        evidence: what says that two units correspond.
        form: in which the bases are matched.
        solver: how maps are found.
        update: what is done with them.
        paper, summary: where it is from, and one line about it.

    Raises:
        ValueError: parts that do not go together: the solver cannot go by this evidence, or match heads in this way.
    """

    name: str
    evidence: Evidence
    form: Form
    solver: Solver
    update: Update
    paper: str
    summary: str

    def __post_init__(self) -> None:
        if not isinstance(self.evidence, self.solver.takes):
            known = ", ".join(one.__name__ for one in self.solver.takes)
            raise ValueError(f"method {self.name}: {self.solver} goes by {known}, not by {self.evidence}")
        if self.form.heads not in self.solver.heads:
            known = ", ".join(self.solver.heads)
            raise ValueError(f"method {self.name}: {self.solver} matches heads {known}, not {self.form.heads}")

    # --- what it needs ------------------------------------------------------------------------------------------------

    @property
    def needs_inputs(self) -> bool:
        """Whether unlabelled inputs have to be given."""
        return self.evidence.needs_inputs or self.update.needs_inputs

    @property
    def needs_layout(self) -> bool:
        """Whether the family of the models has to be known."""
        return self.finds_maps or self.needs_inputs

    @property
    def any_shape(self) -> bool:
        """Whether source may be of another width or depth than target."""
        return self.solver.any_shape

    # --- what it gives ------------------------------------------------------------------------------------------------

    @property
    def finds_maps(self) -> bool:
        """Whether units are matched at all."""
        return self.solver.finds_maps

    @property
    def gives_mapped_source(self) -> bool:
        """Whether source, carried by the maps, is a model that can be run, checked and interpolated with target."""
        return self.solver.gives_mapped_source and self.update.moves_source

    @property
    def exact(self) -> bool:
        """Whether the mapped source computes what source does."""
        return self.gives_mapped_source and self.solver.keeps_function and self.form.keeps_function

    @property
    def exportable(self) -> bool:
        """Whether the mapped source is an ordinary checkpoint of its family that computes the same."""
        return self.exact and self.form.fits_stock_models

    @property
    def has_null_test(self) -> bool:
        """Whether a null test says something about the bases: the maps go by weights and keep the function."""
        return self.evidence.can_be_shuffled and self.exact

    # --- words --------------------------------------------------------------------------------------------------------

    @property
    def needs(self) -> str:
        """What has to be there beside the bases, in words."""
        evidence = self.evidence.name if self.finds_maps or self.needs_inputs else "tuned"
        return ", ".join(filter(None, (evidence, self.solver.package)))

    def describe(self) -> dict[str, Any]:
        """Flat, for JSON and tables; keys stay what they are, since results are compared."""
        solver = self.solver.describe()
        return {
            "name": self.name,
            "evidence": self.evidence.name,
            "group": solver["group"],
            "solver": solver["solver"],
            "heads": self.form.heads,
            "streams": self.form.streams,
            "tie_qkv": self.form.tie_qkv,
            "start": "-" if self.evidence.needs_inputs else solver["start"],  # a climb alone starts somewhere
            "skips": self.form.skips,
            "transport": self.update.transport,
            "control": self.update.is_control,
            "exact": self.exact,
            "exportable": self.exportable,
            "paper": self.paper,
            "summary": self.summary,
        }
