"""From two bases to maps: the matching half of every method, and the null test of what it found."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .evidence import Reader, WeightEvidence
from .layout import Layout
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
    """

    tie_qkv: bool | None = None
    spectra_output: bool = False
    max_sweeps: int = 100
    restarts: int = 0
    seed: int = 0
    device: str = "cpu"


def match(
    source: ModelLike,
    target: ModelLike,
    *,
    method: str = DEFAULT_METHOD,
    family: str | None = None,
    config: ConfigLike = None,
    progress: bool = False,
    **options: Any,
) -> Maps:
    """Finds which unit of source is which unit of target.

    Args:
        source, target: the two bases: directory, file, hub id, or state dict.
        method: a row of `transfuse.METHODS`.
        family: layout family, if the config does not say it.
        config: added to both models' configs.
        progress: a bar on stderr.
        **options: fields of `MatchOptions`.

    Returns:
        Maps, which `port` takes for any number of fine-tunes of source.

    Raises:
        InputError: the models cannot be read or do not belong together.
    """
    row = get_method(method)
    models = open_models(source, target, family=family, config=config, need_layout=row.group != "identity")
    return match_models(models, row, MatchOptions(**options), progress=progress)


def match_models(models: Models, method: Method, options: MatchOptions, *, progress: bool = False) -> Maps:
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
    return Maps(ascent.maps, **about, report=_report(evidence, ascent))


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

    Attributes:
        identity: cosine of source and target as they are, over all matrices that can move.
        matched: cosine after matching.
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
    def corresponds(self) -> bool:
        """Whether units of the two models correspond, by this test."""
        return self.ratio > MIN_RATIO and self.z > MIN_Z


# Independent trainings of one architecture reach ratios up to 1.1, pairs whose units correspond 1.7 and more even under
# noise of three times the weights (docs/benchmarks.md).
MIN_RATIO, MIN_Z, MIN_SPREAD = 1.3, 3.0, 0.005


def null_test(
    models: Models, maps: Maps, method: Method, options: MatchOptions, *, trials: int = 3, progress: bool = False
) -> NullTest:
    """Compares the alignment that maps reach with what matching reaches against shuffled targets.

    Args:
        maps: what `match_models` found with the same method and options.
        trials: targets of each shuffle.
    """
    layout = models.layout.with_ties(streams=maps.streams, tie_qkv=maps.tie_qkv)
    evidence = weight_evidence(models, layout, options.device)

    def reached(target: Reader) -> float:
        shuffled = weight_evidence(models, layout, options.device, target)
        return alignment(shuffled, climb(shuffled, method, options, progress=progress).maps)

    read, seeds = models.target.tensor, range(options.seed, options.seed + trials)
    entries = [reached(_entries_shuffled(read, seed)) for seed in seeds]
    orders = [reached(_orders_shuffled(read, evidence, seed)) for seed in seeds]
    matched = alignment(evidence, maps.spaces)
    stricter = torch.tensor(max(entries, orders, key=sum), dtype=torch.float64)
    mean = float(stricter.mean())
    spread = max(float(stricter.std()) if trials > 1 else 0.0, MIN_SPREAD)
    return NullTest(
        identity=alignment(evidence, {}),
        matched=matched,
        entries=tuple(entries),
        orders=tuple(orders),
        ratio=matched / max(mean, 1e-12),
        z=(matched - mean) / spread,
    )


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
    """Cosine before and after matching, layer by layer ("rest": embeddings and heads)."""
    groups: dict[str, list[str]] = {}
    for name in evidence.names:
        found = re.search(r"^(.*?\.)?(layers?|resblocks|blocks)\.(\d+)\.", name)
        groups.setdefault(f"{found.group(1) or ''}{found.group(3)}" if found else "rest", []).append(name)
    return {
        key: {"identity": alignment(evidence, {}, names), "matched": alignment(evidence, maps, names)}
        for key, names in groups.items()
    }
