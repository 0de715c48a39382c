"""The methods, as one table: each is a row of answers to the same questions, over the same code."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InputError


@dataclass(frozen=True)
class Method:
    """One recipe.

    Attributes:
        name: as in `--method`.
        evidence: what says that two units correspond: "none" or "weights".
        group: where the maps come from: "identity" or "permutation".
        heads: "-" (not matched), "spectral" (singular values, once) or "inner-product" (exact, at every step).
        streams: "tied" (one residual stream a tower) or "junction" (one at every residual sum).
        tie_qkv: whether q, k and v of a head share one inner map.
        start: "identity", or "anchored" on what both models share before any map is known.
        paper_heads: whether the step inside heads sees q, k, v only, as in the paper's eq. 9.
        control: whether the task vector is replaced by a random one of the same norms, tensor by tensor.
        exact: whether the mapped source computes what source does.
        exportable: whether the mapped source is an ordinary checkpoint of its family.
        paper, summary: where it is from, and one line about it.
    """

    name: str
    evidence: str
    group: str
    heads: str
    streams: str
    tie_qkv: bool
    start: str
    paper_heads: bool
    control: bool
    exact: bool
    exportable: bool
    paper: str
    summary: str


# fmt: off
METHODS: dict[str, Method] = {
    row[0]: Method(*row)
    for row in (
        # name          evidence   group          heads            streams     qkv    start       paper  control exact export paper, summary
        ("naive",       "none",    "identity",    "-",             "tied",     False, "identity", False, False, True, True,
         "Ilharco et al. 2023 (2212.04089)", "adds the task vector as it is; right when the release kept its coordinates"),
        ("random",      "none",    "identity",    "-",             "tied",     False, "identity", False, True,  True, True,
         "control", "adds a random vector of the same norms, tensor by tensor; what any real method must beat"),
        ("transfusion", "weights", "permutation", "spectral",      "junction", True,  "identity", True,  False, True, False,
         "Rinaldi et al. 2025 (2505.22697)", "spectral heads, units inside heads, one stream at every residual sum"),
        ("tied",        "weights", "permutation", "inner-product", "tied",     False, "anchored", False, False, True, True,
         "this project, after 2209.04836 and 2505.22697", "one residual stream, started on what both models share"),
    )
}
# fmt: on

DEFAULT_METHOD = "tied"


def get_method(name: str) -> Method:
    """The row of that name.

    Raises:
        InputError: no such method.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]
