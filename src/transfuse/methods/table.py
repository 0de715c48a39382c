"""The methods, as one table of parts: what says that units correspond, in which form, how maps are found, and what for.

A method that combines known parts is one row; a new part is one class beside those it is like.
"""

from __future__ import annotations

from ..errors import InputError
from ..options.declare import near_or_known
from ..options.groups import AUTO
from .evidence import Activations, NoEvidence, Weights
from .forms import Form
from .method import Method
from .solvers import Ascent, NoMaps, Procrustes, Transport
from .updates import Contract, Fit, Noise, Train

# fmt: off
METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("naive", NoEvidence(), Form(), NoMaps(), Contract(),
               "Ilharco et al. 2023 (2212.04089)", "adds the task vector as it is; right when the release kept its coordinates"),
        Method("random", NoEvidence(), Form(), NoMaps(), Noise(),
               "control", "adds a random vector of the same norms, tensor by tensor; what any real method must beat"),
        Method("git-rebasin", Weights(), Form("tied", "flat", tie_qkv=True), Ascent(start="identity"), Contract(),
               "Ainsworth et al. 2023 (2209.04836)", "every projection one linear layer: mixes heads, so attention is not kept"),
        Method("ot", Weights(), Form("junction", "flat"), Transport("sinkhorn"), Contract(),
               "Imfeld et al. 2024 (2310.05719)", "soft assignments by entropic transport, averaged where the residual adds"),
        Method("ot-hard", Weights(), Form("junction", "flat"), Transport("emd"), Contract(),
               "Imfeld et al. 2024 (2310.05719)", "exact transport in place of entropic; the averages are still soft"),
        Method("transfusion", Weights(), Form("junction", "spectral", tie_qkv=True, skips="mapped"), Ascent(start="identity"), Contract(),
               "Rinaldi et al. 2025 (2505.22697)", "spectral heads, units inside heads, one stream at every residual sum"),
        Method("brute-force", Weights(), Form("junction", "inner-product", tie_qkv=True, skips="mapped"), Ascent(start="identity"), Contract(),
               "Rinaldi et al. 2025, Table 3", "transfusion with every pair of heads tried"),
        Method("no-attention-alignment", Weights(), Form("junction", "in-order", tie_qkv=True, skips="mapped"), Ascent(start="identity"), Contract(),
               "Rinaldi et al. 2025, ablation", "transfusion with heads in their natural order"),
        Method("no-residual", Weights(), Form("junction", "spectral", tie_qkv=True), Ascent(start="identity"), Contract(),
               "Rinaldi et al. 2025, ablation", "transfusion's maps, skips left alone: the mapped source is broken"),
        Method("tied", Weights(), Form("tied", "inner-product"), Ascent(), Contract(),
               "this project, after 2209.04836 and 2505.22697", "one residual stream, started on what both models share"),
        Method("orthogonal", Weights(), Form("tied", "inner-product", norms="folded"), Ascent("orthogonal"), Contract(),
               "after 2502.00264 and 2401.15024", "norm gains folded, the stream and the insides of heads rotated"),
        Method("activation", Activations(), Form("tied", "inner-product", norms="folded"), Procrustes("orthogonal"), Contract(),
               "this project, after 2506.22712", "orthogonal's maps from activations in place of weights"),
        Method("activation-permutation", Activations(), Form("tied", "inner-product"), Procrustes("permutation"), Contract(),
               "after Ainsworth et al. 2023, section 3.1", "tied's maps from activations in place of weights"),
        Method("theseus", Activations(), Form("module"), Procrustes("rotation"), Contract(),
               "Theseus (2602.12952)", "both ends of every module by orthogonal Procrustes on activations"),
        Method("functional", Activations(), Form("junction", "inner-product"), Procrustes("rotation", keep_spreads=True), Fit(),
               "this project", "fits target's modules, one after the other, to what tuned does on unlabelled inputs"),
        Method("distillation", Activations(), Form(), NoMaps(), Train(),
               "Hinton et al. 2015 (1503.02531)", "trains target to give tuned's outputs on unlabelled inputs; source takes no part"),
        Method("two-teachers", Activations(), Form(), NoMaps(), Train(plain=False),
               "this project, after 1606.09282 and 2106.05237", "trains target: tuned's change on views of task inputs, its own answers on --keep"),
    )
}
# fmt: on

DEFAULT_METHOD = "tied"


def method_for_maps(name: str) -> Method:
    """The row of that name, where maps are needed whatever the models are: auto is `DEFAULT_METHOD`.

    Raises:
        InputError: no such method.
    """
    return get_method(DEFAULT_METHOD if name == AUTO else name)


def get_method(name: str) -> Method:
    """The row of that name.

    Raises:
        InputError: no such method.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; {near_or_known(name, [*METHODS, AUTO])}")
    return METHODS[name]
