"""What every layout must hold, as functions of a case: the proof, and planted truths on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import transfuse
from families import Case
from transfuse.maps.algebra import Map
from transfuse.maps.collection import Maps
from transfuse.maps.random import random_maps
from transfuse.maps.transport import transport
from transfuse.models.folding import map_state
from transfuse.models.opening import open_models
from transfuse.porting.verify import check_equivalence, relative_error
from transfuse.spaces.layout import Layout

EXACT = 1e-9
NOISE = 0.01
# Softmax does not see what all keys have in common, so nothing can show in a key's bias (of two towers, or of one).
UNSEEN = r".*(k_proj|k_lin|self\.key|\.k)\.bias"


@dataclass(frozen=True)
class Planted:
    """Three folders and the truth between them.

    Attributes:
        source, tuned: as the library itself saves them; tuned is source plus noise.
        target: source with `maps` applied, under the same names on disk.
        layout: the layout with tied streams that the maps belong to.
    """

    source: Path
    tuned: Path
    target: Path
    layout: Layout
    maps: Mapping[str, Map]

    def there(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs of source in the coordinates of target."""
        return {name: self.maps["stream"].apply(x, -1) if name == "stream" else x for name, x in inputs.items()}

    def back(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of target, those in the stream's coordinates carried back to source's."""
        back = Maps(self.maps).inverse().spaces
        axes = {name.split(".")[-1]: one for name, one in self.layout.outputs.items()}  # "vision.last_hidden_state"
        return {name: transport(x, axes[name], back) if name in axes else x for name, x in outputs.items()}


def plant(case: Case, folder: Path) -> Planted:
    """Saves the three models of a case in `folder`."""
    source, tuned, target = (folder / name for name in ("source", "tuned", "target"))
    case.source.save(source, 0)
    case.source.save(tuned, 0, NOISE)
    models = open_models(source, tuned)
    layout = models.layout.with_ties(streams="tied")
    maps = random_maps(layout, torch.Generator().manual_seed(1))
    case.write(target, case.config(source), map_state(models.source, layout, maps, torch.float64))
    return Planted(source, tuned, target, layout, maps)


def check_proof(case: Case, group: str, folder: Path) -> None:
    """Random maps on all spaces at once keep the function of the real class, in float64."""
    case.source.save(folder / "source", 0)
    models = open_models(folder / "source", folder / "source")
    assert models.layout.family == case.family
    layout = models.layout.with_ties(streams="tied")
    maps = random_maps(layout, torch.Generator().manual_seed(1), group=group)
    assert set(maps) == {space.name for space in layout.spaces.values() if space.name.split(".")[-1] != "vocab"}
    found = check_equivalence(models.source, models.layout, Maps(maps), double=True)
    assert found.passed and found.error is not None and found.error < EXACT, found


def check_nothing_is_overlooked(case: Case, folder: Path) -> None:
    """A tensor left in place changes the outputs: without this the proof could pass by not looking."""
    planted = plant(case, folder)
    inputs = case.source.inputs(case.config(planted.source))
    source, target = case.source.load(planted.source), case.source.load(planted.target)
    expected = source.run(inputs)
    assert relative_error(expected, planted.back(target.run(planted.there(inputs)))) < EXACT
    for name, tensor in target.tensors.items():
        moved = tensor.data.clone()
        if torch.equal(moved, source.tensors[name]):
            continue
        tensor.data.copy_(source.tensors[name])
        error = relative_error(expected, planted.back(target.run(planted.there(inputs))))
        tensor.data.copy_(moved)
        unseen = re.fullmatch(UNSEEN, name) or re.fullmatch(case.unused, name)
        assert (error < EXACT) == bool(unseen), f"{name} left in place: error {error}"


def check_match(case: Case, folder: Path) -> None:
    """`match` finds exactly the planted maps."""
    planted = plant(case, folder)
    _check_recovered(planted, transfuse.match(planted.source, planted.target))


def _check_recovered(planted: Planted, found: Maps) -> None:
    assert set(found.spaces) == set(planted.maps)
    for space, one in planted.maps.items():
        assert torch.equal(found.spaces[space].matrix(), one.matrix()), space


def check_port(case: Case, folder: Path) -> None:
    """`port` finds the planted maps, and its output computes what tuned computes, both loaded with the real class."""
    planted, out = plant(case, folder), folder / "out"
    result = transfuse.port(
        planted.source, planted.tuned, planted.target, out=out, method="tied", double=True, null_trials=0
    )
    _check_recovered(planted, result.maps)
    assert result.report["equivalence"]["passed"]
    inputs = case.source.inputs(case.config(planted.source))
    expected, found = case.source.load(planted.tuned).run(inputs), case.source.load(out).run(planted.there(inputs))
    assert relative_error(expected, planted.back(found)) < EXACT
    assert relative_error(expected, case.source.load(planted.source).run(inputs)) > 1e-4, "tuned differs from source"


def check_ported_weights(case: Case, folder: Path) -> None:
    """The same without a model class: every tensor of the output is tuned's, its axes multiplied by matrices."""
    planted, out = plant(case, folder), folder / "out"
    result = transfuse.port(planted.source, planted.tuned, planted.target, out=out, method="tied", null_trials=0)
    _check_recovered(planted, result.maps)
    expected, found = case.weights(planted.tuned), case.weights(out)
    assert found.keys() == expected.keys()
    assert case.config(out) == case.config(planted.target)
    for name, on_disk in open_models(planted.source, out).target.disk.items():
        torch.testing.assert_close(found[on_disk], _moved(planted, name, expected[on_disk]), rtol=0, atol=1e-12)


def _moved(planted: Planted, name: str, x: Tensor) -> Tensor:
    """A tensor with the planted permutations applied as matrices: the oracle for transport, which gathers."""
    sizes = {space.name: space.size for space in planted.layout.spaces.values()}
    for dim, axis in enumerate(planted.layout.params[name].dims or ()):
        pieces = x.split(axis.sizes(x.shape[dim], sizes), dim)
        maps = [planted.maps.get(part.space or "") for part in axis.parts]
        moved = [p if one is None else _multiply(one.matrix(), p, dim) for p, one in zip(pieces, maps, strict=True)]
        x = torch.cat(moved, dim)
    return x


def _multiply(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    return (x.movedim(dim, -1) @ matrix.T).movedim(-1, dim)
