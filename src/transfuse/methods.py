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
        group: where the maps come from: "identity", "permutation", "orthogonal" (norm gains folded, the stream and the
            insides of heads rotated, permutations elsewhere) or "coupling" (doubly stochastic).
        solver: "-", "ascent" (coordinate ascent), "sinkhorn" (entropic couplings) or "emd" (exact ones).
        heads: "-" (not matched), "spectral" (singular values, once), "inner-product" (exact, at every step; brute force
            over pairs), "in-order" (only the units inside) or "flat" (all units of all heads in one set).
        streams: "tied" (one residual stream a tower) or "junction" (one at every residual sum).
        tie_qkv: whether q, k and v of a head share one inner map.
        start: "identity", or "anchored" on what both models share before any map is known.
        paper_heads: whether the step inside heads sees q, k, v only, as in the paper's eq. 9.
        skips: "stock", or "mapped": the mapped source is run with permuted skips (eq. 12), as junction maps need.
        control: whether the task vector is replaced by a random one of the same norms, tensor by tensor.
        exact: whether the mapped source computes what source does.
        exportable: whether the mapped source is an ordinary checkpoint of its family that computes the same.
        paper, summary: where it is from, and one line about it.
    """

    name: str
    evidence: str
    group: str
    solver: str
    heads: str
    streams: str
    tie_qkv: bool
    start: str
    paper_heads: bool
    skips: str
    control: bool
    exact: bool
    exportable: bool
    paper: str
    summary: str


# fmt: off
METHODS: dict[str, Method] = {
    row[0]: Method(*row)
    for row in (
        # name                    evidence   group          solver      heads            streams     qkv    start       paper  skips     control exact export paper, summary
        ("naive",                  "none",    "identity",    "-",        "-",             "tied",     False, "identity", False, "stock",  False, True,  True,
         "Ilharco et al. 2023 (2212.04089)", "adds the task vector as it is; right when the release kept its coordinates"),
        ("random",                 "none",    "identity",    "-",        "-",             "tied",     False, "identity", False, "stock",  True,  True,  True,
         "control", "adds a random vector of the same norms, tensor by tensor; what any real method must beat"),
        ("git-rebasin",            "weights", "permutation", "ascent",   "flat",          "tied",     True,  "identity", False, "stock",  False, False, False,
         "Ainsworth et al. 2023 (2209.04836)", "every projection one linear layer: mixes heads, so attention is not kept"),
        ("ot",                     "weights", "coupling",    "sinkhorn", "flat",          "junction", False, "identity", False, "stock",  False, False, False,
         "Imfeld et al. 2024 (2310.05719)", "soft assignments by entropic transport, averaged where the residual adds"),
        ("ot-hard",                "weights", "coupling",    "emd",      "flat",          "junction", False, "identity", False, "stock",  False, False, False,
         "Imfeld et al. 2024 (2310.05719)", "exact transport in place of entropic; the averages are still soft"),
        ("transfusion",            "weights", "permutation", "ascent",   "spectral",      "junction", True,  "identity", True,  "mapped", False, True,  False,
         "Rinaldi et al. 2025 (2505.22697)", "spectral heads, units inside heads, one stream at every residual sum"),
        ("brute-force",            "weights", "permutation", "ascent",   "inner-product", "junction", True,  "identity", True,  "mapped", False, True,  False,
         "Rinaldi et al. 2025, Table 3", "transfusion with every pair of heads tried"),
        ("no-attention-alignment", "weights", "permutation", "ascent",   "in-order",      "junction", True,  "identity", True,  "mapped", False, True,  False,
         "Rinaldi et al. 2025, ablation", "transfusion with heads in their natural order"),
        ("no-residual",            "weights", "permutation", "ascent",   "spectral",      "junction", True,  "identity", True,  "stock",  False, False, False,
         "Rinaldi et al. 2025, ablation", "transfusion's maps, skips left alone: the mapped source is broken"),
        ("tied",                   "weights", "permutation", "ascent",   "inner-product", "tied",     False, "anchored", False, "stock",  False, True,  True,
         "this project, after 2209.04836 and 2505.22697", "one residual stream, started on what both models share"),
        ("orthogonal",             "weights", "orthogonal",  "ascent",   "inner-product", "tied",     False, "anchored", False, "stock",  False, True,  True,
         "after 2502.00264 and 2401.15024", "norm gains folded, the stream and the insides of heads rotated"),
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
