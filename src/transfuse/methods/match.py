"""From two bases to maps: the matching half of every method, and the null test of what it found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from ..evidence.weights import Products, Reader, WeightEvidence, cosine
from ..maps.algebra import Map, PerHead
from ..maps.collection import Maps
from ..maps.random import tensor_generator
from ..maps.transport import part_slices
from ..matching.ascent import Ascent, AscentOptions
from ..matching.couplings import couple
from ..models.folding import NO_FOLDING, Folding, norm_folding, rotatable_layout
from ..models.model import ConfigLike, ModelLike, Models
from ..models.opening import open_models
from ..models.passes import ASCENT
from ..spaces.layout import Layout, part_of, tower_of
from .table import DEFAULT_METHOD, Method, get_method

if TYPE_CHECKING:
    from ..running.inputs import Prepared
    from ..running.unlabelled import Inputs


@dataclass(frozen=True)
class MatchOptions:
    """How maps are sought.

    Attributes:
        tie_qkv: one inner map for q, k and v of a head; None for the method's own choice.
        spectra_output: the output projection counts in the spectra (the authors' code; the paper: no).
        max_sweeps: sweeps at most.
        restarts: further climbs in random order; the best by objective is taken.
        ridge: of methods that fit: pull toward target's own weights (`functional.FitOptions`); None: chosen on inputs.
        keep_embeddings: of the port: no task vector for tables, positions and patches, as in Theseus (2602.12952).
        seed: of the orders of restarts and of the null test.
        device: where products are computed.

    Raises:
        InputError: a device that is not there.
    """

    tie_qkv: bool | None = None
    spectra_output: bool = False
    max_sweeps: int = 100
    restarts: int = 0
    ridge: float | None = None
    keep_embeddings: bool = False
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        try:
            torch.zeros(1, device=self.device).cpu()
        except (RuntimeError, AssertionError, ImportError) as error:  # AssertionError: torch without CUDA
            raise InputError(f"device {self.device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def match(
    source: ModelLike,
    target: ModelLike,
    *,
    method: str = DEFAULT_METHOD,
    family: str | None = None,
    config: ConfigLike = None,
    inputs: Inputs | None = None,
    null_trials: int = 1,
    progress: bool = False,
    **options: Any,
) -> Maps:
    """Finds which unit of source is which unit of target.

    Args:
        source, target: the two bases: directory, file, hub id, state dict or module.
        method: a row of `transfuse.METHODS`.
        family: layout family, if the config does not say it.
        config: added to both models' configs.
        inputs: unlabelled inputs (`evaluate.Inputs`), for methods that go by activations.
        null_trials: shuffled targets in the null test, whose result the maps then bring along; 0 leaves it out.
        progress: a bar on stderr.
        **options: fields of `MatchOptions`.

    Returns:
        Maps, which `port` takes for any number of fine-tunes of source.

    Raises:
        InputError: the models cannot be read or do not belong together.
    """
    row = get_method(method)
    models = open_models(source, target, family=family, config=config, need_layout=row.needs_layout)
    chosen = MatchOptions(**options)
    prepared = open_inputs(models, row, inputs, chosen.seed, progress=progress)
    return match_models(models, row, chosen, inputs=prepared, null_trials=null_trials, progress=progress)


def open_inputs(
    models: Models, method: Method, inputs: Inputs | None, seed: int, *, progress: bool = False
) -> Prepared | None:
    """The inputs that a method needs, processed for target; None: it needs none.

    Raises:
        InputError: it needs some and none are given, or they cannot be read.
    """
    if method.evidence != "activations":
        return None
    if inputs is None:
        raise InputError(
            f"method {method.name} goes by activations: give unlabelled inputs (--inputs TASK; 'synthetic' draws some, "
            "which serve worse)"
        )
    from ..running.live import of_checkpoint
    from ..running.probes import probe_of_model

    checkpoint = models.target.checkpoint
    live = of_checkpoint(checkpoint, probe_of_model(models.target, models.layout, "cpu").module, checkpoint.config)
    return inputs.open(live, seed, progress=progress)


def match_models(
    models: Models,
    method: Method,
    options: MatchOptions,
    *,
    inputs: Prepared | None = None,
    null_trials: int = 0,
    progress: bool = False,
) -> Maps:
    """`match` for models that are open; `inputs` as from `open_inputs`."""
    if not method.any_shape:
        models.need_one_shape(f"method {method.name}")
    options = replace(options, tie_qkv=method.tie_qkv if options.tie_qkv is None else options.tie_qkv)
    about = {
        "family": models.layout.family,
        "method": method.name,
        "streams": method.streams,
        "tie_qkv": options.tie_qkv,
        "norms": "folded" if method.group == "orthogonal" else "kept",
        "source": models.survey.fingerprints["source"],
        "target": models.survey.fingerprints["target"],
        "options": asdict(options),
    }
    if method.group == "identity":
        return Maps({}, **about)
    if method.evidence == "activations":
        from ..evidence.activations import match_activations  # needs what evaluation needs

        assert inputs is not None
        how = {"tie_qkv": bool(options.tie_qkv), "device": options.device, "progress": progress}
        with models.passes.phase("match"):
            found, report = match_activations(models, method, inputs, **how)
        return Maps(found, **about, report=report)
    with models.passes.phase("match"):
        found, report = _match_weights(models, method, options, null_trials, progress=progress)
    return Maps(found.maps, **about, report=report)


def _match_weights(
    models: Models, method: Method, options: MatchOptions, null_trials: int, *, progress: bool
) -> tuple[Found, dict[str, Any]]:
    """What a solver finds, and the report on it with its null test."""
    evidence = matching_evidence(models, method, options)
    found = solve(evidence, method, options, progress=progress)
    # Folded weights are others than those of the survey.
    as_is = evidence.products({}) if method.group == "orthogonal" else _of_survey(models, evidence)
    products = as_is, evidence.products(found.maps)
    report = _report(found, *products)
    if null_trials:
        with evidence.phase("null test"):
            null = null_test(evidence, *products, method, options, trials=null_trials, progress=progress)
        report["null"] = {tower: asdict(one) for tower, one in null.items()}
    return found, report


def _of_survey(models: Models, evidence: WeightEvidence) -> dict[str, Products]:
    return {name: models.survey.products[name] for name in evidence.names}


def stored_null(maps: Maps) -> dict[str, NullTest] | None:
    """The null test that was run when the maps were made, if it was."""
    found = maps.report.get("null")
    if not found:
        return None
    lists = {tower: {key: tuple(one[key]) for key in ("entries", "orders")} for tower, one in found.items()}
    return {tower: NullTest(**{**one, **lists[tower]}) for tower, one in found.items()}


def weight_evidence(models: Models, layout: Layout, device: str, folding: Folding = NO_FOLDING) -> WeightEvidence:
    """The evidence of two bases, norm gains folded if asked for."""
    moving = [n for n in models.shared() if any(layout.spaces[s].moves for s in layout.params[n].spaces)]
    source, target = (partial(folding.read, model) for model in (models.source, models.target))
    return WeightEvidence(layout, source, target, moving, device, models.passes.phase)


def matching_evidence(models: Models, method: Method, options: MatchOptions) -> WeightEvidence:
    """The evidence in the form that a method matches: streams, heads and norms as its row says."""
    tie_qkv = method.tie_qkv if options.tie_qkv is None else options.tie_qkv
    layout = models.layout.with_ties(streams=method.streams, tie_qkv=tie_qkv, flat_heads=method.heads == "flat")
    if method.group != "orthogonal":
        return weight_evidence(models, layout, options.device)
    folding = norm_folding(models.layout, [models.source, models.target])
    evidence = weight_evidence(models, rotatable_layout(layout, folding), options.device, folding)
    source, target = _kept(evidence.source), _kept(evidence.target)  # each step would fold them anew
    return WeightEvidence(evidence.layout, source, target, evidence.names, options.device, evidence.phase)


@dataclass(frozen=True)
class Found:
    """What a solver found.

    Attributes:
        maps: space -> map.
        objective: F at the start and after every sweep; of one pass, at the start and the end.
        converged: whether nothing was left to improve.
        spectral: head group -> heads by singular values, where they were looked at.
    """

    maps: Mapping[str, Map]
    objective: list[float]
    converged: bool
    spectral: Mapping[str, Tensor]


def solve(evidence: WeightEvidence, method: Method, options: MatchOptions, *, progress: bool = False) -> Found:
    """The maps of a method; of several climbs (`restarts`, in random orders) the best."""
    with evidence.phase(ASCENT):
        return _solve(evidence, method, options, progress=progress)


def _solve(evidence: WeightEvidence, method: Method, options: MatchOptions, *, progress: bool) -> Found:
    if method.solver != "ascent":
        maps = couple(evidence, method.solver)
        return Found(maps, [evidence.value(one) for one in ({}, maps)], True, {})
    climbs = []
    for order in (None, *(options.seed + i for i in range(options.restarts))):
        chosen = AscentOptions(
            group=method.group,
            heads=method.heads,
            start=method.start,
            paper_heads=method.paper_heads,
            spectra_output=options.spectra_output,
            max_sweeps=options.max_sweeps,
            order=order,
        )
        ascent = Ascent(evidence, chosen)
        ascent.run(progress=progress)
        climbs.append(ascent)
    best = max(climbs, key=lambda one: one.objective[-1])
    return Found(best.maps, best.objective, best.converged, best.spectral)


@dataclass(frozen=True)
class NullTest:
    """Whether the alignment found is more than fitting noise.

    The same matching runs against shuffled targets: whatever similarity it reaches there comes from the freedom of the
    maps alone. Two shuffles, since one is not strict enough: trained weights concentrate in some rows and columns,
    which alone lets matching reach more than on shuffled entries, also where nothing is shared (docs/methods.md).
    All similarities are cosines over the matrices of the layers: embeddings of one vocabulary agree in models whose
    layers share nothing.

    Attributes:
        identity: of source and target as they are.
        matched: after matching.
        entries: after matching against targets whose entries are shuffled inside every tensor.
        orders: after matching against targets whose rows and columns are re-ordered, in every tensor by itself: its
            norms and spectrum stay, what tensors agree on is gone.
        excess: by how much matched exceeds the larger mean of the two, as a share of what that leaves to 1 (not their
            ratio: rotations reach twice as much by chance as permutations, so that it would hide what they find).
        z: matched minus that mean, in standard deviations of that shuffle (0.005 at least).
        layers: mean over all shuffled targets, by part of the model.
    """

    identity: float
    matched: float
    entries: tuple[float, ...]
    orders: tuple[float, ...]
    excess: float
    z: float
    layers: Mapping[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """ "related-coordinates", "weak-correspondence" or "no-correspondence"."""
        if self.excess <= WEAK or self.z <= MIN_Z:
            return "no-correspondence"
        return "related-coordinates" if self.excess > STRONG else "weak-correspondence"


# Measured in docs/benchmarks.md ("Null test").
WEAK, STRONG, MIN_Z, MIN_SPREAD = 0.05, 0.25, 3.0, 0.005


def null_test(
    evidence: WeightEvidence,
    before: Mapping[str, Products],
    after: Mapping[str, Products],
    method: Method,
    options: MatchOptions,
    *,
    trials: int = 3,
    progress: bool = False,
) -> dict[str, NullTest]:
    """Compares the alignment that maps reach with what matching reaches against shuffled targets.

    Args:
        evidence: from `matching_evidence`, with the same method and options.
        before, after: its products as the bases are, and with the maps that `solve` found.
        trials: targets of each shuffle.

    Returns:
        One test for each tower ("model" where there is one).
    """
    towers = layers_by_tower(evidence)
    parts = {tower: _by_part(names) for tower, names in towers.items()}

    def reached(target: Reader) -> dict[str, Products]:
        shuffled = evidence.against(_kept(target))
        return shuffled.products(solve(shuffled, method, options, progress=progress).maps)

    def cosines(found: Mapping[str, Products], tower: str) -> float:
        return cosine(found[name] for name in towers[tower])

    read, seeds = evidence.target, range(options.seed, options.seed + trials)
    entries = [reached(_entries_shuffled(read, seed)) for seed in seeds]
    orders = [reached(_orders_shuffled(read, evidence, seed)) for seed in seeds]
    return {
        tower: _null_test(
            cosines(before, tower),
            cosines(after, tower),
            tuple(cosines(one, tower) for one in entries),
            tuple(cosines(one, tower) for one in orders),
            {part: _mean(cosine(one[n] for n in names) for one in entries + orders) for part, names in inside.items()},
        )
        for tower, inside in parts.items()
    }


def _null_test(
    identity: float,
    matched: float,
    entries: tuple[float, ...],
    orders: tuple[float, ...],
    layers: Mapping[str, float],
) -> NullTest:
    stricter = torch.tensor(max(entries, orders, key=sum), dtype=torch.float64)
    mean = float(stricter.mean())
    spread = max(float(stricter.std()) if len(stricter) > 1 else 0.0, MIN_SPREAD)
    excess = (matched - mean) / max(1 - mean, 1e-12)
    return NullTest(identity, matched, entries, orders, excess, (matched - mean) / spread, layers)


def _mean(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).mean())


def _by_part(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(part_of(name), []).append(name)
    return groups


def layers_by_tower(evidence: WeightEvidence) -> dict[str, list[str]]:
    """Tensors of the layers, without embeddings and heads, by tower ("model" where there is one)."""
    found: dict[str, list[str]] = {}
    for name in evidence.names:
        spaces = evidence.layout.params[name].spaces
        inside = [space for space in spaces if re.search(r"(^|\.)(heads|mlp)\.\d", space)]
        if inside:
            found.setdefault(tower_of(inside[0]) or "model", []).append(name)
    return found


def _kept(read: Reader, limit: int = 2**30) -> Reader:
    """Keeps what was read, up to `limit` bytes: shuffling a tensor costs far more than reading it."""
    kept: dict[str, Tensor] = {}
    room = [limit]

    def read_kept(name: str) -> Tensor:
        if name in kept:
            return kept[name]
        tensor = read(name)
        if tensor.nbytes <= room[0]:
            room[0] -= tensor.nbytes
            kept[name] = tensor
        return tensor

    return read_kept


def _entries_shuffled(read: Reader, seed: int) -> Reader:
    def shuffled(name: str) -> Tensor:
        tensor = read(name)
        return tensor.flatten()[torch.randperm(tensor.numel(), generator=tensor_generator(seed, name))].view(
            tensor.shape
        )

    return shuffled


def _orders_shuffled(read: Reader, evidence: WeightEvidence, seed: int) -> Reader:
    def shuffled(name: str) -> Tensor:
        tensor, generator = read(name), tensor_generator(seed, name)
        for dim, axis in enumerate(evidence.layout.params[name].dims or ()):
            slices = part_slices(axis, tensor.shape[dim], evidence.sizes)  # q, k and v of a fused tensor stay apart
            order = torch.cat([start + torch.randperm(length, generator=generator) for _, start, length in slices])
            tensor = tensor.index_select(dim, order)
        return tensor

    return shuffled


def _report(found: Found, before: Mapping[str, Products], after: Mapping[str, Products]) -> dict[str, Any]:
    products = {"identity": before, "matched": after}
    similarity = {when: _similarity(one) for when, one in products.items()}
    return {
        "objective": found.objective,
        "sweeps": len(found.objective) - 1,
        "converged": found.converged,
        "similarity_identity": similarity["identity"],
        "similarity_matched": similarity["matched"],
        "identity_is_as_good": all(m.is_identity for m in found.maps.values())
        or similarity["identity"] > 0.999 * similarity["matched"],
        "fixed_points": {name: _fixed_points(one) for name, one in found.maps.items()},
        "heads": {
            key: {"order": head.tolist(), "spectral": found.spectral[key].tolist() if key in found.spectral else None}
            for key, head in _head_orders(found.maps).items()
        },
        "layers": {
            part: {when: cosine(one[name] for name in names) for when, one in products.items()}
            for part, names in _by_part(before).items()
        },
    }


def _similarity(products: Mapping[str, Products]) -> float:
    """Cosine over all tensors, the objective's own scale."""
    both, target, source = (sum(one[i] for one in products.values()) for i in range(3))
    return both / (target * source) ** 0.5 if target and source else 0.0


def _head_orders(maps: Mapping[str, Map]) -> dict[str, Tensor]:
    return {name.split("/")[0]: one.heads.index for name, one in maps.items() if isinstance(one, PerHead)}


def _fixed_points(one: Map) -> float:
    """Share of the units that stay where they are; of matrices, of their weight."""
    flat = one.flat() if isinstance(one, PerHead) else one
    index = getattr(flat, "index", None)
    if index is not None:
        return float((index == torch.arange(len(index))).double().mean())
    return float(one.matrix().diagonal().clamp(0, 1).mean())
