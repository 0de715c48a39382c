"""Which methods a section measures: those of the recipe, the controls, and an oracle where the truth is planted."""

from __future__ import annotations

from ..methods.table import DEFAULT_METHOD, METHODS
from .recipes.parts import ORACLE, MethodSpec
from .recipes.sections import CONTROLS, CarriedSpec, InterpolationSpec
from .recipes.spec import Recipe

NAIVE = MethodSpec.model_validate("naive")
ORACLE_METHOD = MethodSpec.model_construct(method="naive", name=ORACLE, options={})
SectionSpec = CarriedSpec | InterpolationSpec


def with_controls(spec: SectionSpec, oracle: bool = False) -> list[MethodSpec]:
    """The methods of a section with the controls, those first."""
    wanted = ("naive",) if isinstance(spec, InterpolationSpec) else CONTROLS
    given = {one.label: one for one in spec.methods}
    controls = [given.pop(one, MethodSpec.model_validate(one)) for one in wanted]
    return [*controls, *given.values(), *([ORACLE_METHOD] if oracle else [])]


def is_tested(method: MethodSpec) -> bool:
    """Whether a null test says something: the maps move units and keep the function."""
    row = method.row
    return row is not None and row.has_null_test and method.then == "scale"


def verdict_methods(spec: SectionSpec) -> list[MethodSpec]:
    """The methods whose null test says how bases are related: maps that a stock model can have."""
    found = [one for one in spec.methods if is_tested(one) and METHODS[one.method].exportable]
    return found or [MethodSpec.model_validate(DEFAULT_METHOD)]


def has_oracle(recipe: Recipe, source: str, target: str) -> bool:
    """Whether the maps from source to target are known."""
    return recipe.models[target].plant is not None and recipe.models[target].of == source
