"""The table of methods: what it says of every row, what follows from the parts, and that nobody else asks."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import transfuse
from tiny import add_noise, vit
from transfuse import METHODS, InputError, Maps
from transfuse.cli.common import app
from transfuse.maps.algebra import Orthogonal, PerHead
from transfuse.methods.evidence import Activations, NoEvidence, Weights
from transfuse.methods.forms import Form
from transfuse.methods.method import Method
from transfuse.methods.solvers import Ascent, NoMaps, Procrustes, Solver, Transport
from transfuse.methods.updates import Contract, Fit
from transfuse.options.groups import Inputs
from transfuse.porting.planted import plant

SOURCES = Path(transfuse.__file__).parent

# Results are compared by these descriptions, so they stay what they are.
DESCRIBED = """
name                   evidence    group       solver     heads         streams  tie_qkv start    skips  transport control exact exportable
naive                  none        identity    -          -             tied     no      identity stock  maps      no      yes   yes
random                 none        identity    -          -             tied     no      identity stock  maps      yes     yes   yes
git-rebasin            weights     permutation ascent     flat          tied     yes     identity stock  maps      no      no    no
ot                     weights     coupling    sinkhorn   flat          junction no      identity stock  maps      no      no    no
ot-hard                weights     coupling    emd        flat          junction no      identity stock  maps      no      no    no
transfusion            weights     permutation ascent     spectral      junction yes     identity mapped maps      no      yes   no
brute-force            weights     permutation ascent     inner-product junction yes     identity mapped maps      no      yes   no
no-attention-alignment weights     permutation ascent     in-order      junction yes     identity mapped maps      no      yes   no
no-residual            weights     permutation ascent     spectral      junction yes     identity stock  maps      no      no    no
tied                   weights     permutation ascent     inner-product tied     no      anchored stock  maps      no      yes   yes
orthogonal             weights     orthogonal  ascent     inner-product tied     no      anchored stock  maps      no      yes   yes
activation             activations orthogonal  procrustes inner-product tied     no      -        stock  maps      no      yes   yes
activation-permutation activations permutation procrustes inner-product tied     no      -        stock  maps      no      yes   yes
theseus                activations rotation    procrustes -             module   no      -        stock  maps      no      no    no
functional             activations rotation    procrustes inner-product junction no      -        stock  fit       no      no    no
distillation           activations identity    -          -             tied     no      -        stock  train     no      no    no
two-teachers           activations identity    -          -             tied     no      -        stock  train     no      no    no
"""  # noqa: E501


def described() -> dict[str, dict[str, Any]]:
    keys, *rows = (line.split() for line in DESCRIBED.strip().splitlines())
    words = {"yes": True, "no": False}
    return {row[0]: {k: words.get(v, v) for k, v in zip(keys, row, strict=True)} for row in rows}


def test_descriptions_are_what_they_were() -> None:
    result = CliRunner().invoke(app, ["methods", "--json"])
    found = json.loads(result.output)
    said = {name: (row.pop("paper"), row.pop("summary")) for name, row in found.items()}
    assert found == described() and list(METHODS) == list(described())
    assert all(paper and summary for paper, summary in said.values())


def test_properties_say_what_the_parts_are() -> None:
    for name, row in described().items():
        method = METHODS[name]
        assert method.needs_inputs == (row["evidence"] == "activations")
        assert method.finds_maps == (row["group"] != "identity")
        assert method.needs_layout == (method.finds_maps or method.needs_inputs)
        assert method.any_shape == (row["group"] in ("identity", "rotation"))
        assert method.gives_mapped_source == (row["group"] != "rotation" and row["transport"] == "maps")
        assert method.has_null_test == (row["evidence"] == "weights" and row["exact"])
        assert method.form.permutes_skips == (row["skips"] == "mapped")
        assert method.form.norms == ("folded" if row["group"] == "orthogonal" else "kept")
        assert ("POT" in method.needs) == (row["group"] == "coupling")


def test_the_table_is_light() -> None:
    code = "import sys, transfuse.methods.table; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "transfuse" in loaded and not {"torch", "numpy", "scipy", "transformers", "safetensors"} & set(loaded)


# --- a method is one row ----------------------------------------------------------------------------------------------


def folder_of_three(folder: Path, group: str) -> list[Path]:
    """A base, its fine-tune, and the base with its units in another form."""
    vit(0).save_pretrained(folder / "source")
    tuned = vit(0)
    add_noise(tuned, 0.05, 1)
    tuned.save_pretrained(folder / "tuned")
    plant(folder / "source", folder / "target", group=group, seed=3)
    return [folder / name for name in ("source", "tuned", "target")]


def logits(place: Path) -> torch.Tensor:
    pixels = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return type(vit(0)).from_pretrained(place, dtype=torch.float64).eval()(pixel_values=pixels).logits


def test_rotations_with_heads_by_their_spectra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = Form("tied", "spectral", norms="folded")
    row = Method("rotated-spectral", Weights(), form, Ascent("orthogonal"), Contract(), "nowhere", "made up")
    monkeypatch.setitem(METHODS, row.name, row)
    places = folder_of_three(tmp_path, "rotation")
    result = transfuse.port(*places, method=row.name, out=tmp_path / "out", double=True)
    assert result.report["method"] == row.name and result.report["exportable"] and row.exact
    assert result.report["equivalence"]["passed"]
    assert result.report["relation"]["verdict"] == "related-coordinates", "the null test goes by its own solver"
    assert any(isinstance(one, Orthogonal) for one in result.maps.spaces.values()), "streams are rotated"
    for name, one in result.report["match"]["heads"].items():
        assert one["order"] == one["spectral"], f"{name}: heads stay where their spectra put them"
    assert (logits(tmp_path / "out") - logits(places[1])).abs().max() < 1e-9
    result.maps.save(tmp_path / "maps")
    again = transfuse.port(*places, maps=Maps.load(tmp_path / "maps"))
    assert all(torch.equal(again.tensor(name), one) for name, one in result.state_dict().items())
    assert row.name in CliRunner().invoke(app, ["methods"]).output


def test_maps_of_weights_with_modules_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Method("tied-fit", Weights(), Form("tied", "inner-product"), Ascent(), Fit(), "nowhere", "made up")
    monkeypatch.setitem(METHODS, row.name, row)
    places = folder_of_three(tmp_path, "permutation")
    with pytest.raises(InputError, match="method tied-fit goes by activations: give unlabelled inputs"):
        transfuse.port(*places, method=row.name)
    inputs = Inputs("synthetic", count=64)
    result = transfuse.port(*places, method=row.name, inputs=inputs, out=tmp_path / "fitted")
    assert any(isinstance(one, PerHead) for one in result.maps.spaces.values()) and "sweeps" in result.report["match"]
    assert result.report["equivalence"] is None and not row.exact and row.needs_inputs
    tuned, source = logits(places[1]), logits(places[0])
    assert (logits(tmp_path / "fitted") - tuned).norm() < 0.5 * (source - tuned).norm()


@pytest.mark.parametrize(
    ("evidence", "heads", "solver", "said"),
    [
        (Activations(), "inner-product", Ascent(), r"goes by Weights, not by Activations\(\)"),
        (Weights(), "inner-product", Procrustes(), r"goes by Activations, not by Weights\(\)"),
        (NoEvidence(), "flat", Transport(), r"goes by Weights, not by NoEvidence\(\)"),
        (Weights(), "inner-product", Transport(), "matches heads flat, not inner-product"),
        (Activations(), "spectral", Procrustes(), "matches heads -, inner-product, flat, not spectral"),
        (Weights(), "flat", NoMaps(), "matches heads -, not flat"),
    ],
)
def test_parts_that_do_not_go_together(evidence: Any, heads: Any, solver: Solver, said: str) -> None:
    with pytest.raises(ValueError, match=f"method odd: .*{said}"):
        Method("odd", evidence, Form("tied", heads), solver, Contract(), "nowhere", "made up")


def test_permuted_skips_need_a_map_at_every_sum() -> None:
    with pytest.raises(ValueError, match="here streams are tied"):
        Form("tied", "spectral", skips="mapped")


# --- nobody asks a row what it is -------------------------------------------------------------------------------------


def asked(tree: ast.AST) -> Iterator[ast.Compare]:
    """Comparisons of part of a method with a text."""
    keys = {*next(iter(described().values()))} - {"name"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            leaves = [leaf for side in sides for leaf in ast.walk(side)]
            texts = any(isinstance(leaf, ast.Constant) and isinstance(leaf.value, str) for leaf in leaves)
            parts = [one.value for one in sides if isinstance(one, ast.Attribute) and one.attr in keys]
            if texts and any(_is_method(one) for one in parts):
                yield node


def _is_method(node: ast.AST) -> bool:
    """Whether it is named like a method or a part of one."""
    if isinstance(node, ast.Subscript):
        return _name(node.value) == "METHODS"
    return _name(node) in ("row", "method", "form", "solver", "update")


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None


def test_questions_to_a_row_are_seen() -> None:
    for text in (
        'METHODS[m].heads == "flat"',
        'row.group in ("a", "b")',
        'self.row.evidence != "none"',
        'method.form.heads == "flat"',
    ):
        assert list(asked(ast.parse(text))), text
    assert not list(asked(ast.parse('maps.streams == "tied" and row.exact and space.group == "rotation"')))


def test_nobody_outside_asks_a_row_what_it_is() -> None:
    for file in sorted(SOURCES.rglob("*.py")):
        if file.parent != SOURCES / "methods":
            found = [node.lineno for node in asked(ast.parse(file.read_text(encoding="utf-8")))]
            assert not found, f"{file.relative_to(SOURCES)}: lines {found}"
