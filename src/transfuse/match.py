"""From two bases to maps: the matching half of every method, and the null test of what it found."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .evidence import Reader, WeightEvidence
from .layout import Layout, part_of, tower_of
from .maps import Map, Maps, PerHead
from .matching.ascent import Ascent, AscentOptions
from .methods import DEFAULT_METHOD, Method, get_method
from .models import ConfigLike, ModelLike, Models, open_models
from .transport import part_slices


@dataclass(frozen=True)
class MatchOptions:
    """How maps are sought.

    Attributes:
        tie_qkv: one inner map for q, k and v of a head; None for the method's own choice.
        spectra_output: the output projection counts in the spectra (the authors' code; the paper: no).
        max_sweeps: sweeps at most.
        restarts: further climbs in random order; the best by objective is taken.
        seed: of the orders of restarts and of the null test.
        device: where products are computed.

    Raises:
        InputError: a device that is not there.
    """

    tie_qkv: bool | None = None
    spectra_output: bool = False
    max_sweeps: int = 100
    restarts: int = 0
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
    null_trials: int = 1,
    progress: bool = False,
    **options: Any,
) -> Maps:
    """Finds which unit of source is which unit of target.

    Args:
        source, target: the two bases: directory, file, hub id, or state dict.
        method: a row of `transfuse.METHODS`.
        family: layout family, if the config does not say it.
        config: added to both models' configs.
        null_trials: shuffled targets in the null test, whose result the maps then bring along; 0 leaves it out.
        progress: a bar on stderr.
        **options: fields of `MatchOptions`.

    Returns:
        Maps, which `port` takes for any number of fine-tunes of source.

    Raises:
        InputError: the models cannot be read or do not belong together.
    """
    row = get_method(method)
    models = open_models(source, target, family=family, config=config, need_layout=row.group != "identity")
    return match_models(models, row, MatchOptions(**options), null_trials=null_trials, progress=progress)


def match_models(
    models: Models, method: Method, options: MatchOptions, *, null_trials: int = 0, progress: bool = False
) -> Maps:
    """`match` for models that are open."""
    tie_qkv = method.tie_qkv if options.tie_qkv is None else options.tie_qkv
    layout = models.layout.with_ties(streams=method.streams, tie_qkv=tie_qkv)
    about = {
        "family": layout.family,
        "method": method.name,
        "streams": method.streams,
        "tie_qkv": tie_qkv,
        "source": models.source.checkpoint.fingerprint(),
        "target": models.target.checkpoint.fingerprint(),
        "options": {**asdict(options), "tie_qkv": tie_qkv},
    }
    if method.group == "identity":
        return Maps({}, **about)
    evidence = weight_evidence(models, layout, options.device)
    ascent = climb(evidence, method, options, progress=progress)
    maps = Maps(ascent.maps, **about, report=_report(evidence, ascent))
    if not null_trials:
        return maps
    null = null_test(models, maps, method, options, trials=null_trials, progress=progress)
    return replace(maps, report={**maps.report, "null": {tower: asdict(one) for tower, one in null.items()}})


def stored_null(maps: Maps) -> dict[str, NullTest] | None:
    """The null test that was run when the maps were made, if it was."""
    found = maps.report.get("null")
    if not found:
        return None
    lists = {tower: {key: tuple(one[key]) for key in ("entries", "orders")} for tower, one in found.items()}
    return {tower: NullTest(**{**one, **lists[tower]}) for tower, one in found.items()}


def weight_evidence(models: Models, layout: Layout, device: str, target: Reader | None = None) -> WeightEvidence:
    """The evidence of two bases; `target` replaces what is read from the target (for the null test)."""
    moving = [n for n in models.shared() if any(layout.spaces[s].moves for s in layout.params[n].spaces)]
    return WeightEvidence(layout, models.source.tensor, target or models.target.tensor, moving, device)


def climb(evidence: WeightEvidence, method: Method, options: MatchOptions, *, progress: bool = False) -> Ascent:
    """The best of one climb in the order of the forward pass and `restarts` in random orders."""
    best: Ascent | None = None
    for order in (None, *(options.seed + i for i in range(options.restarts))):
        chosen = AscentOptions(
            heads=method.heads,
            start=method.start,
            paper_heads=method.paper_heads,
            spectra_output=options.spectra_output,
            max_sweeps=options.max_sweeps,
            order=order,
        )
        ascent = Ascent(evidence, chosen)
        ascent.run(progress=progress)
        if best is None or ascent.objective[-1] > best.objective[-1]:
            best = ascent
    assert best is not None
    return best


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
        ratio: matched over the larger mean of the two.
        z: matched minus that mean, in standard deviations of that shuffle (0.005 at least).
    """

    identity: float
    matched: float
    entries: tuple[float, ...]
    orders: tuple[float, ...]
    ratio: float
    z: float

    @property
    def verdict(self) -> str:
        """ "related-coordinates", "weak-correspondence" or "no-correspondence"."""
        if self.ratio <= WEAK_RATIO or self.z <= MIN_Z:
            return "no-correspondence"
        return "related-coordinates" if self.ratio > STRONG_RATIO else "weak-correspondence"


# Measured in docs/benchmarks.md ("Null test").
WEAK_RATIO, STRONG_RATIO, MIN_Z, MIN_SPREAD = 1.3, 2.0, 3.0, 0.005


def null_test(
    models: Models, maps: Maps, method: Method, options: MatchOptions, *, trials: int = 3, progress: bool = False
) -> dict[str, NullTest]:
    """Compares the alignment that maps reach with what matching reaches against shuffled targets.

    Args:
        maps: what `match_models` found with the same method and options.
        trials: targets of each shuffle.

    Returns:
        One test for each tower ("model" where there is one).
    """
    layout = models.layout.with_ties(streams=maps.streams, tie_qkv=maps.tie_qkv)
    evidence = weight_evidence(models, layout, options.device)
    towers = layers_by_tower(evidence)

    def reached(target: Reader) -> dict[str, float]:
        shuffled = weight_evidence(models, layout, options.device, _kept(target))
        found = climb(shuffled, method, options, progress=progress).maps
        return {tower: alignment(shuffled, found, names) for tower, names in towers.items()}

    read, seeds = models.target.tensor, range(options.seed, options.seed + trials)
    entries = [reached(_entries_shuffled(read, seed)) for seed in seeds]
    orders = [reached(_orders_shuffled(read, evidence, seed)) for seed in seeds]
    return {
        tower: _null_test(
            alignment(evidence, {}, names),
            alignment(evidence, maps.spaces, names),
            tuple(one[tower] for one in entries),
            tuple(one[tower] for one in orders),
        )
        for tower, names in towers.items()
    }


def _null_test(identity: float, matched: float, entries: tuple[float, ...], orders: tuple[float, ...]) -> NullTest:
    stricter = torch.tensor(max(entries, orders, key=sum), dtype=torch.float64)
    mean = float(stricter.mean())
    spread = max(float(stricter.std()) if len(stricter) > 1 else 0.0, MIN_SPREAD)
    return NullTest(identity, matched, entries, orders, matched / max(mean, 1e-12), (matched - mean) / spread)


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


def alignment(evidence: WeightEvidence, maps: Mapping[str, Map], names: Iterable[str] | None = None) -> float:
    """Cosine between target and mapped source over matrices (norm gains and biases are near-constant, so left out)."""
    chosen = [n for n in (evidence.names if names is None else names) if len(evidence.layout.params[n].dims or ()) > 1]
    target, source = evidence.norms(chosen)
    return evidence.value(maps, chosen) / (target * source) if target and source else 0.0


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


def tensor_generator(seed: int, name: str) -> torch.Generator:
    """A generator of this tensor's own, so that the order of reading does not matter."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def _report(evidence: WeightEvidence, ascent: Ascent) -> dict[str, Any]:
    target, source = evidence.norms(evidence.names)
    scale = target * source or 1.0
    before, after = evidence.value({}) / scale, ascent.objective[-1] / scale
    return {
        "objective": ascent.objective,
        "sweeps": len(ascent.objective) - 1,
        "converged": ascent.converged,
        "similarity_identity": before,
        "similarity_matched": after,
        "identity_is_as_good": all(m.is_identity for m in ascent.maps.values()) or before > 0.999 * after,
        "fixed_points": {name: _fixed_points(one) for name, one in ascent.maps.items()},
        "heads": {
            key: {"order": head.tolist(), "spectral": ascent.spectral[key].tolist()}
            for key, head in _head_orders(ascent.maps).items()
        },
        "layers": layer_alignment(evidence, ascent.maps),
    }


def _head_orders(maps: Mapping[str, Map]) -> dict[str, Tensor]:
    return {name.split("/")[0]: one.heads.index for name, one in maps.items() if isinstance(one, PerHead)}


def _fixed_points(one: Map) -> float:
    flat = one.flat() if isinstance(one, PerHead) else one
    index = getattr(flat, "index", None)
    return 1.0 if index is None else float((index == torch.arange(len(index))).double().mean())


def layer_alignment(evidence: WeightEvidence, maps: Mapping[str, Map]) -> dict[str, dict[str, float]]:
    """Cosine before and after matching, by part of the model."""
    groups: dict[str, list[str]] = {}
    for name in evidence.names:
        groups.setdefault(part_of(name), []).append(name)
    return {
        key: {"identity": alignment(evidence, {}, names), "matched": alignment(evidence, maps, names)}
        for key, names in groups.items()
    }
