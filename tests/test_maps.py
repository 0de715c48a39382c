"""The map algebra, against dense matrices: every kind of map, along any axis, to disk and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from transfuse.errors import InputError
from transfuse.maps.algebra import (
    Coupling,
    Dense,
    Identity,
    Map,
    Orthogonal,
    PerHead,
    Permutation,
    Rectangular,
    map_from_tensors,
)
from transfuse.maps.collection import FORMAT_VERSION, Maps

# (heads, units inside each): all kinds of maps of one shape can be composed.
SHAPES = ((1, 1), (1, 4), (3, 1), (2, 3), (4, 2))
KINDS = (
    "identity", "permutation", "dense", "orthogonal", "heads", "heads-dense", "heads-mixed", "heads-identity",
    "heads-orthogonal",
)  # fmt: skip

quick = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def make(kind: str, shape: tuple[int, int], seed: int) -> Map:
    """A random map of a kind over `heads * width` units."""
    heads, width = shape
    generator = torch.Generator().manual_seed(seed)

    def permutation(n: int) -> Permutation:
        return Permutation(torch.randperm(n, generator=generator))

    def dense(n: int) -> Dense:
        basis, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
        return Dense(basis * (0.5 + torch.rand(n, dtype=torch.float64, generator=generator)))

    def orthogonal(n: int) -> Orthogonal:
        return Orthogonal(torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0].contiguous())

    inner: dict[str, Callable[[int], Map]] = {
        "heads-orthogonal": lambda _: orthogonal(width),
        "heads": lambda _: permutation(width),
        "heads-dense": lambda _: dense(width),
        "heads-mixed": lambda h: (permutation(width), dense(width), Identity(width))[h % 3],
        "heads-identity": lambda h: (Identity(width), permutation(width))[h % 2],
    }
    if kind in inner:
        return PerHead(permutation(heads), tuple(inner[kind](h) for h in range(heads)))
    size = heads * width
    return {"identity": Identity, "permutation": permutation, "dense": dense, "orthogonal": orthogonal}[kind](size)


def oracle(one: Map) -> np.ndarray:
    """The matrix of a map, written from the definitions and not from `apply`."""
    if isinstance(one, Identity):
        return np.eye(one.length)
    if isinstance(one, Permutation):
        return np.eye(one.size)[one.index.numpy()]
    if isinstance(one, Dense | Orthogonal):
        return one.weight.double().numpy()
    assert isinstance(one, PerHead)
    width = one.inner[0].size
    matrix = np.zeros((one.size, one.size))
    for target, (source, inner) in enumerate(zip(one.heads.index.tolist(), one.inner, strict=True)):
        rows, columns = slice(target * width, (target + 1) * width), slice(source * width, (source + 1) * width)
        matrix[rows, columns] = oracle(inner)
    return matrix


maps = st.builds(make, st.sampled_from(KINDS), st.sampled_from(SHAPES), seeds)
pairs = st.builds(
    lambda shape, one, other, seed: (make(one, shape, seed), make(other, shape, seed // 2 + 1)),
    st.sampled_from(SHAPES),
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
    seeds,
)


@given(maps)
@quick
def test_matrix_is_that_of_the_definition(one: Map):
    np.testing.assert_allclose(one.matrix().numpy(), oracle(one), atol=1e-14)
    assert one.size == len(oracle(one))
    # A dense map and a mixed one never claim to be the identity; all others say so exactly when they are.
    if not any(isinstance(m, Dense | Orthogonal) for m in (one, *getattr(one, "inner", ()))):
        assert one.is_identity == bool((oracle(one) == np.eye(one.size)).all())


@given(maps, st.data())
@quick
def test_apply_is_a_matrix_product_along_any_axis(one: Map, data: st.DataObject):
    rank = data.draw(st.integers(1, 4))
    dim = data.draw(st.integers(-rank, rank - 1))
    shape = [2, 3, 1, 2][:rank]
    shape[dim] = one.size
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(data.draw(seeds)))
    expected = np.moveaxis(np.tensordot(oracle(one), x.numpy(), (1, dim)), 0, dim)
    found = one.apply(x, dim)
    assert found.dtype == x.dtype and found.shape == x.shape
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@given(maps)
@quick
def test_inverse(one: Map):
    for product in (one.inverse() @ one, one @ one.inverse()):
        np.testing.assert_allclose(product.matrix().numpy(), np.eye(one.size), atol=1e-12)
    np.testing.assert_allclose(one.inverse().matrix().numpy(), np.linalg.inv(oracle(one)), atol=1e-12)


@given(maps)
@quick
def test_dual_is_the_inverse_transpose(one: Map):
    np.testing.assert_allclose(one.dual().matrix().numpy(), np.linalg.inv(oracle(one)).T, atol=1e-12)


@given(pairs)
@quick
def test_composition_is_the_matrix_product(pair: tuple[Map, Map]):
    one, other = pair
    np.testing.assert_allclose((one @ other).matrix().numpy(), oracle(one) @ oracle(other), atol=1e-12)


@given(pairs)
@quick
def test_a_product_keeps_what_an_input_and_an_output_axis_take(pair: tuple[Map, Map]):
    one, other = pair
    back, dual = (one @ other).inverse(), (one @ other).dual()
    np.testing.assert_allclose(back.matrix(), (other.inverse() @ one.inverse()).matrix(), atol=1e-12)
    np.testing.assert_allclose(dual.matrix(), (one.dual() @ other.dual()).matrix(), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_dtype_stays(kind: str, dtype: torch.dtype):
    assert make(kind, (2, 3), 0).apply(torch.ones(6, 2, dtype=dtype), 0).dtype == dtype


def test_permutations_are_exact_in_every_dtype():
    one = make("heads", (2, 3), 0)
    assert isinstance(one, PerHead)
    flat = one.flat()
    assert flat is not None
    x = torch.randn(6, 5).to(torch.bfloat16)
    assert torch.equal(one.apply(x, 0), x[flat.index])


@pytest.mark.parametrize(
    "one",
    [
        Identity(6),
        Permutation(torch.arange(6)),
        PerHead(Permutation(torch.arange(2)), (Permutation(torch.arange(3)), Identity(3))),
    ],
)
def test_an_identity_never_touches_the_tensor(one: Map):
    x = torch.randn(6, 2)
    assert one.is_identity
    assert one.apply(x, 0) is x


def test_composing_with_an_identity_is_free():
    for kind in KINDS[1:]:
        one = make(kind, (2, 3), 0)
        assert one @ Identity(6) is one
        assert Identity(6) @ one is one


# ---- Maps: one map a space, and their file


def some_maps(seed: int = 0, **about: Any) -> Maps:
    return Maps({f"space.{kind}": make(kind, (2, 3), seed) for kind in KINDS}, **about)


def test_maps_invert_and_compose_space_by_space():
    first, second = some_maps(0, source="a", target="b"), some_maps(1, source="b", target="c")
    both = second @ first
    assert (both.source, both.target) == ("a", "c")
    assert (first.inverse().source, first.inverse().target) == ("b", "a")
    for space in first.spaces:
        one, other = first[space], second[space]
        assert one is not None and other is not None
        np.testing.assert_allclose(both.spaces[space].matrix(), oracle(other) @ oracle(one), atol=1e-12)
    back = (first.inverse() @ first).spaces.values()
    assert all(torch.allclose(one.matrix(), torch.eye(6, dtype=torch.float64)) for one in back)


def test_a_space_without_a_map_stays():
    one = Permutation(torch.tensor([1, 0]))
    both = Maps({"a": one}) @ Maps({"b": one})
    assert set(both.spaces) == {"a", "b"} and both["a"] is one and both["c"] is None
    assert Maps({}).is_identity and not both.is_identity


@pytest.mark.parametrize("other", [{"family": "bert"}, {"streams": "junction"}, {"tie_qkv": True}])
def test_maps_of_different_form_do_not_compose(other: dict[str, Any]):
    with pytest.raises(InputError, match="one family and one form"):
        _ = Maps({}) @ Maps({}, **other)


@given(seeds)
@quick
def test_save_and_load(tmp_path_factory: pytest.TempPathFactory, seed: int):
    folder = tmp_path_factory.mktemp("maps")
    about = {"family": "bert", "method": "tied", "streams": "junction", "tie_qkv": True, "source": "a", "target": "b"}
    written = some_maps(seed, **about, options={"seed": seed}, report={"layers": {"0": 0.5}, "none": None})
    written.save(folder / "one")
    read = Maps.load(folder / "one")
    assert list(read.spaces) == sorted(written.spaces)
    for field in (*about, "options", "report"):
        assert getattr(read, field) == getattr(written, field)
    for space, one in written.spaces.items():
        assert read.spaces[space].kind == one.kind
        np.testing.assert_array_equal(read.spaces[space].matrix(), one.matrix())
    read.save(folder / "two")
    some_maps(seed, **about, options=written.options, report=written.report).save(folder / "three")
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes() == (folder / "three").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["one", "three", "two"]


def test_heads_that_share_memory_are_saved(tmp_path: Path):
    heads = Permutation(torch.tensor([1, 0]))
    inner = (Permutation(torch.tensor([1, 0])), Identity(2))
    Maps({"qk": PerHead(heads, inner), "vo": PerHead(heads, inner)}).save(tmp_path / "maps")
    assert torch.equal(Maps.load(tmp_path / "maps").spaces["vo"].matrix(), PerHead(heads, inner).matrix())


def test_a_space_may_have_any_name(tmp_path: Path):
    names = ("a#b", "a", "a#", "#")
    Maps({name: make("permutation", (1, 4), i) for i, name in enumerate(names)}).save(tmp_path / "maps")
    read = Maps.load(tmp_path / "maps")
    assert all(
        torch.equal(read.spaces[n].matrix(), make("permutation", (1, 4), i).matrix()) for i, n in enumerate(names)
    )


def test_a_failed_write_leaves_nothing(tmp_path: Path):
    with pytest.raises(InputError, match="could not be written"):
        some_maps().save(tmp_path / "nowhere" / "maps")
    assert not list(tmp_path.iterdir())


# ---- Files that are damaged, or made to be


def _good(tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    path = tmp_path / "good"
    spaces = {"p": make("permutation", (1, 4), 0), "d": make("dense", (1, 4), 0), "i": Identity(4)}
    spaces |= {"h": make("heads", (2, 2), 0), "hd": make("heads-dense", (2, 2), 0)}
    Maps(spaces).save(path)
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads(file.metadata()["transfuse_maps"])


def _nan(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, float("nan"))


BAD_TENSORS: list[tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = [
    ("p#index", torch.zeros_like, "no permutation"),
    ("p#index", lambda x: x + 1, "no permutation"),
    ("p#index", lambda x: x - 10, "no permutation"),
    ("p#index", lambda x: x.double(), "no permutation"),
    ("p#index", lambda x: x.to(torch.int32), "no permutation"),
    ("p#index", lambda x: x[None], "no permutation"),
    ("p#index", lambda x: x[0], "no permutation"),
    ("d#weight", lambda x: x[:2], "no inverse"),
    ("d#weight", lambda x: x[0], "no inverse"),
    ("d#weight", lambda x: x.long(), "no inverse"),
    ("d#weight", torch.zeros_like, "no inverse"),
    ("d#weight", _nan, "no inverse"),
    ("i#size", lambda x: -x, "not one whole number"),
    ("i#size", lambda x: x.repeat(2), "not one whole number"),
    ("i#size", lambda x: x.double(), "not one whole number"),
    ("h#heads", torch.zeros_like, "no permutation"),
    ("h#heads", lambda x: torch.arange(3), "3 heads have an inner map of shape (2, 2)"),
    ("h#index", torch.zeros_like, "no permutation"),
    ("h#index", lambda x: x[0], "2 heads have an inner map of shape (2,)"),
    ("h#index", lambda x: x.double(), "no permutation"),
    ("hd#weight", lambda x: x[0], "no inverse"),
    ("hd#weight", lambda x: x[:1], "2 heads have an inner map of shape (1, 2, 2)"),
    ("hd#weight", torch.zeros_like, "no inverse"),
]


@pytest.mark.parametrize(("key", "damage", "message"), BAD_TENSORS)
def test_damaged_tensors(tmp_path: Path, key: str, damage: Callable[[torch.Tensor], torch.Tensor], message: str):
    tensors, about = _good(tmp_path)
    tensors[key] = damage(tensors[key]).contiguous()
    save_file(tensors, tmp_path / "bad", {"transfuse_maps": json.dumps(about)})
    with pytest.raises(InputError) as error:
        Maps.load(tmp_path / "bad")
    assert f"space {key.split('#')[0]!r}" in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("key", ["p#index", "d#weight", "i#size", "h#heads", "h#index", "hd#weight"])
def test_missing_tensors(tmp_path: Path, key: str):
    tensors, about = _good(tmp_path)
    del tensors[key]
    save_file(tensors, tmp_path / "bad", {"transfuse_maps": json.dumps(about)})
    with pytest.raises(InputError, match=f"space '{key.split('#')[0]}': the part .* is missing"):
        Maps.load(tmp_path / "bad")


BAD_ABOUT: list[tuple[dict[str, Any], str]] = [
    ({"format_version": FORMAT_VERSION + 1}, "newer than 1: update"),
    ({"format_version": "1"}, "no format version"),
    ({"format_version": None}, "no format version"),
    ({"kinds": ["p"]}, "'kinds' in its metadata is not dict"),
    ({"kinds": {"p": "rotation"}}, "kind 'rotation' is unknown"),
    ({"kinds": {"p": ["permutation"]}}, "is unknown"),
    ({"kinds": {"p": None}}, "is unknown"),
    ({"kinds": {"absent": "dense"}}, "space 'absent': the part 'weight' of a map is missing"),
    ({"family": 3}, "'family' in its metadata is not str"),
    ({"method": None}, "'method' in its metadata is not str"),
    ({"streams": "both"}, "none of tied, junction, module"),
    ({"tie_qkv": "yes"}, "'tie_qkv' in its metadata is not bool"),
    ({"source": {}}, "'source' in its metadata is not str"),
    ({"options": []}, "'options' in its metadata is not dict"),
    ({"report": 0.5}, "'report' in its metadata is not dict"),
    ({"spaces": {}}, "unknown keys ['spaces']"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ABOUT)
def test_damaged_metadata(tmp_path: Path, change: dict[str, Any], message: str):
    tensors, about = _good(tmp_path)
    save_file(tensors, tmp_path / "bad", {"transfuse_maps": json.dumps({**about, **change})})
    with pytest.raises(InputError) as error:
        Maps.load(tmp_path / "bad")
    assert str(tmp_path / "bad") in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("key", ["format_version", "kinds", "family", "streams", "report"])
def test_missing_metadata(tmp_path: Path, key: str):
    tensors, about = _good(tmp_path)
    del about[key]
    save_file(tensors, tmp_path / "bad", {"transfuse_maps": json.dumps(about)})
    with pytest.raises(InputError, match="metadata"):
        Maps.load(tmp_path / "bad")


@pytest.mark.parametrize("text", ["[]", "1", "null", '"text"', "{}", "{", "", "[" * 100_000])
def test_metadata_that_is_no_object(tmp_path: Path, text: str):
    save_file({"p#index": torch.arange(3)}, tmp_path / "bad", {"transfuse_maps": text})
    with pytest.raises(InputError):
        Maps.load(tmp_path / "bad")


def test_not_a_maps_file(tmp_path: Path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model")
    (tmp_path / "text").write_text("not a tensor in sight")
    (tmp_path / "empty").touch()
    for name in ("model", "text", "empty", "absent", "."):
        with pytest.raises(InputError, match="not a maps file"):
            Maps.load(tmp_path / name)


def test_every_cut_is_noticed(tmp_path: Path):
    some_maps().save(tmp_path / "good")
    content = (tmp_path / "good").read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(InputError, match="not a maps file"):
            Maps.load(tmp_path / "cut")


# ---- every kind with every other, also those that have no inverse


def every_kind(source: int = 6) -> dict[str, Map]:
    """A map of each kind from 6 units (rectangular ones from `source`, which two heads divide) to 6."""
    generator = torch.Generator().manual_seed(3)
    found = {kind: make(kind, (2, 3), 1) for kind in KINDS} | {"more-heads": make("heads-orthogonal", (3, 2), 2)}

    def coupling(n: int) -> Coupling:  # of rank 2: no inverse
        weight = torch.full((n, n), 1 / n, dtype=torch.float64)
        weight[:2, :2] += torch.tensor([[0.1, -0.1], [-0.1, 0.1]])
        return Coupling(weight)

    def rectangular(n: int, m: int) -> Rectangular:
        return Rectangular(torch.randn(n, m, dtype=torch.float64, generator=generator))

    swapped = Permutation(torch.tensor([1, 0]))
    found["coupling"], found["rectangular"] = coupling(6), rectangular(6, source)
    found["heads-coupling"] = PerHead(swapped, (coupling(3), coupling(3)))
    found["heads-rectangular"] = PerHead(swapped, (rectangular(3, source // 2), rectangular(3, source // 2)))
    found["heads-coupling-mixed"] = PerHead(swapped, (coupling(3), make("dense", (1, 3), 4)))
    found["heads-rectangular-mixed"] = PerHead(swapped, (rectangular(3, 3), Permutation(torch.tensor([1, 2, 0]))))
    return found


def dense(one: Map) -> np.ndarray:
    """Like `oracle`, of any kind."""
    if isinstance(one, Coupling | Rectangular):
        return one.weight.numpy()
    if not isinstance(one, PerHead):
        return oracle(one)
    height, width = one.inner[0].size, one.inner[0].source_size
    matrix = np.zeros((one.size, width * len(one.inner)))
    for i, (j, inner) in enumerate(zip(one.heads.index.tolist(), one.inner, strict=True)):
        matrix[i * height : (i + 1) * height, j * width : (j + 1) * width] = dense(inner)
    return matrix


def way_back(one: Map) -> np.ndarray:
    """The inverse, or what stands in for it."""
    if isinstance(one, Coupling):
        return one.weight.numpy().T
    if not isinstance(one, PerHead):
        return np.linalg.pinv(dense(one))
    width, height = one.inner[0].source_size, one.inner[0].size
    matrix = np.zeros((width * len(one.inner), one.size))
    for i, (j, inner) in enumerate(zip(one.heads.index.tolist(), one.inner, strict=True)):
        matrix[j * width : (j + 1) * width, i * height : (i + 1) * height] = way_back(inner)
    return matrix


@pytest.mark.parametrize("source", [6, 4, 8])
@pytest.mark.parametrize("kind", every_kind())
def test_every_kind_is_its_matrix(kind: str, source: int):
    one = every_kind(source)[kind]
    matrix = dense(one)
    assert (one.size, one.source_size) == matrix.shape
    np.testing.assert_allclose(one.matrix().numpy(), matrix, atol=1e-12)
    x = torch.randn(2, one.source_size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(one.apply(x, 1).numpy(), np.einsum("ij,ajb->aib", matrix, x.numpy()), atol=1e-12)
    np.testing.assert_allclose(one.inverse().matrix().numpy(), way_back(one), atol=1e-12)
    np.testing.assert_allclose(one.dual().matrix().numpy(), way_back(one).T, atol=1e-12)
    again = map_from_tensors(one.kind, one.tensors())
    assert (again.size, again.source_size) == matrix.shape
    np.testing.assert_allclose(again.matrix().numpy(), matrix, atol=1e-12)
    if "mixed" not in kind:
        np.testing.assert_allclose(again.inverse().matrix().numpy(), way_back(one), atol=1e-12)


@pytest.mark.parametrize("first", every_kind())
@pytest.mark.parametrize("second", every_kind())
def test_every_kind_after_every_other(second: str, first: str):
    for source in (6, 4, 8):
        after, before = every_kind()[second], every_kind(source)[first]
        both, wanted = after @ before, dense(after) @ dense(before)
        assert (both.size, both.source_size) == wanted.shape
        np.testing.assert_allclose(both.matrix().numpy(), wanted, atol=1e-12)
        np.testing.assert_allclose(both.inverse().matrix().numpy(), way_back(both), atol=1e-11)
        again = map_from_tensors(both.kind, both.tensors())  # a product is of a kind that a file can hold
        np.testing.assert_allclose(again.matrix().numpy(), wanted, atol=1e-12)
        if not ({"coupling", "rectangular"} & {*first.split("-"), *second.split("-")}):
            np.testing.assert_allclose(both.inverse().matrix().numpy(), np.linalg.inv(wanted), atol=1e-10)
        elif first == "heads" and second == "coupling":
            assert isinstance(both, Coupling)


def test_maps_of_other_sizes_do_not_compose():
    with pytest.raises(InputError, match="take 6 units where the first give 5"):
        _ = Maps({"a": make("permutation", (2, 3), 0)}) @ Maps({"a": make("permutation", (1, 5), 0)})


def test_a_maps_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    Maps({"s": Permutation(torch.arange(3))}, method="tied").save(tmp_path / "maps")
    assert (tmp_path / "maps").stat().st_mode == (tmp_path / "plain").stat().st_mode
