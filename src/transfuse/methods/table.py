"""The methods, as one table: each is a row of answers to the same questions, over the same code."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError


@dataclass(frozen=True)
class Method:
    """One recipe.

    Attributes:
        name: as in `--method`.
        evidence: what says that two units correspond: "none", "weights", or "activations" on unlabelled inputs.
        group: where the maps come from: "identity", "permutation", "orthogonal" (norm gains folded, the stream and the
            insides of heads rotated, permutations elsewhere), "rotation" (rotations of every space, kept function or
            not) or "coupling" (doubly stochastic).
        solver: "-", "ascent" (coordinate ascent), "sinkhorn" (entropic couplings), "emd" (exact ones) or "procrustes"
            (every space by itself).
        heads: "-" (not matched), "spectral" (singular values, once), "inner-product" (exact, at every step; brute force
            over pairs), "in-order" (only the units inside) or "flat" (all units of all heads in one set).
        streams: "tied" (one residual stream a tower), "junction" (one at every residual sum) or "module" (none: every
            module has maps of its own at both ends).
        tie_qkv: whether q, k and v of a head share one inner map.
        start: "identity", or "anchored" on what both models share before any map is known.
        paper_heads: whether the step inside heads sees q, k, v only, as in the paper's eq. 9.
        skips: "stock", or "mapped": the mapped source is run with permuted skips (eq. 12), as junction maps need.
        transport: "maps": the task vector is contracted with the maps (eq. 13). "fit": target's modules are fitted, on
            inputs, to what tuned gives, carried by the maps. "train": by gradient descent.
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
    transport: str
    control: bool
    exact: bool
    exportable: bool
    paper: str
    summary: str

    @property
    def needs_layout(self) -> bool:
        """Whether the family of the models has to be known."""
        return self.group != "identity" or self.evidence == "activations"

    @property
    def any_shape(self) -> bool:
        """Whether source may be of another width or depth than target: nothing between those keeps a function."""
        return self.group in ("identity", "rotation")


# fmt: off
METHODS: dict[str, Method] = {
    row[0]: Method(*row)
    for row in (
        # name                    evidence   group          solver      heads            streams     qkv    start       paper  skips     transport control exact export paper, summary
        ("naive",                  "none",    "identity",    "-",        "-",             "tied",     False, "identity", False, "stock",  "maps", False, True,  True,
         "Ilharco et al. 2023 (2212.04089)", "adds the task vector as it is; right when the release kept its coordinates"),
        ("random",                 "none",    "identity",    "-",        "-",             "tied",     False, "identity", False, "stock",  "maps", True,  True,  True,
         "control", "adds a random vector of the same norms, tensor by tensor; what any real method must beat"),
        ("git-rebasin",            "weights", "permutation", "ascent",   "flat",          "tied",     True,  "identity", False, "stock",  "maps", False, False, False,
         "Ainsworth et al. 2023 (2209.04836)", "every projection one linear layer: mixes heads, so attention is not kept"),
        ("ot",                     "weights", "coupling",    "sinkhorn", "flat",          "junction", False, "identity", False, "stock",  "maps", False, False, False,
         "Imfeld et al. 2024 (2310.05719)", "soft assignments by entropic transport, averaged where the residual adds"),
        ("ot-hard",                "weights", "coupling",    "emd",      "flat",          "junction", False, "identity", False, "stock",  "maps", False, False, False,
         "Imfeld et al. 2024 (2310.05719)", "exact transport in place of entropic; the averages are still soft"),
        ("transfusion",            "weights", "permutation", "ascent",   "spectral",      "junction", True,  "identity", True,  "mapped", "maps", False, True,  False,
         "Rinaldi et al. 2025 (2505.22697)", "spectral heads, units inside heads, one stream at every residual sum"),
        ("brute-force",            "weights", "permutation", "ascent",   "inner-product", "junction", True,  "identity", True,  "mapped", "maps", False, True,  False,
         "Rinaldi et al. 2025, Table 3", "transfusion with every pair of heads tried"),
        ("no-attention-alignment", "weights", "permutation", "ascent",   "in-order",      "junction", True,  "identity", True,  "mapped", "maps", False, True,  False,
         "Rinaldi et al. 2025, ablation", "transfusion with heads in their natural order"),
        ("no-residual",            "weights", "permutation", "ascent",   "spectral",      "junction", True,  "identity", True,  "stock",  "maps", False, False, False,
         "Rinaldi et al. 2025, ablation", "transfusion's maps, skips left alone: the mapped source is broken"),
        ("tied",                   "weights", "permutation", "ascent",   "inner-product", "tied",     False, "anchored", False, "stock",  "maps", False, True,  True,
         "this project, after 2209.04836 and 2505.22697", "one residual stream, started on what both models share"),
        ("orthogonal",             "weights", "orthogonal",  "ascent",   "inner-product", "tied",     False, "anchored", False, "stock",  "maps", False, True,  True,
         "after 2502.00264 and 2401.15024", "norm gains folded, the stream and the insides of heads rotated"),
        ("activation",             "activations", "orthogonal", "procrustes", "inner-product", "tied",     False, "-",       False, "stock",  "maps", False, True,  True,
         "this project, after 2506.22712", "orthogonal's maps from activations in place of weights"),
        ("activation-permutation", "activations", "permutation", "procrustes", "inner-product", "tied",    False, "-",       False, "stock",  "maps", False, True,  True,
         "after Ainsworth et al. 2023, section 3.1", "tied's maps from activations in place of weights"),
        ("theseus",                "activations", "rotation",   "procrustes", "-",             "module",   False, "-",       False, "stock",  "maps", False, False, False,
         "Theseus (2602.12952)", "both ends of every module by orthogonal Procrustes on activations"),
        ("functional",             "activations", "rotation",   "procrustes", "inner-product", "junction", False, "-",       False, "stock",  "fit",  False, False, False,
         "this project", "fits target's modules, one after the other, to what tuned does on unlabelled inputs"),
        ("distillation",           "activations", "identity",   "-",          "-",             "tied",     False, "-",       False, "stock",  "train", False, False, False,
         "Hinton et al. 2015 (1503.02531)", "trains target to give tuned's outputs on unlabelled inputs; source takes no part"),
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
