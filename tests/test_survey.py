"""One pass over the models: the sums are those of plain float64 code, and every tensor is read once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

from tiny import bert, fine_tuned, planted, save
from transfuse import InputError
from transfuse.evidence.relation import delta_report, is_nearer_to_target
from transfuse.files.opening import open_checkpoint
from transfuse.files.reading import BLOCK
from transfuse.models import survey as survey_module
from transfuse.models.model import Model, Models
from transfuse.models.opening import open_models
from transfuse.models.survey import survey
from transfuse.spaces.layout import unmoved_layout

SIZES = {"a": (3, BLOCK), "b": (BLOCK + 1,), "c": (5,), "d": (2, 2)}


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The same weights with a little noise of the seed's own."""
    base, noise = (torch.Generator().manual_seed(n) for n in (0, seed))
    return {
        name: (torch.randn(shape, generator=base) + 0.01 * torch.randn(shape, generator=noise)).to(dtype)
        for name, shape in SIZES.items()
    }


def opened(
    folder: Path, states: dict[str, dict[str, Tensor]], names: dict[str, dict[str, str]] | None = None
) -> Models:
    """Files of these weights, under other names if these are given, as models of an unknown family."""
    found = {}
    for role, state in states.items():
        disk = {name: (names or {}).get(role, {}).get(name, name) for name in state}
        path = folder / f"{role}.safetensors"
        save_file({disk[name]: tensor for name, tensor in state.items()}, path)
        found[role] = Model(role, open_checkpoint(path), disk, {})
    return Models(None, unmoved_layout(SIZES), found["source"], found["target"], found.get("tuned"))


def fingerprint(state: dict[str, Tensor]) -> str:
    """As the format of the maps has it, in plain code."""
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted(state.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\0")
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def reads(models: Models) -> dict[str, int]:
    """How often tensors were read, by role."""
    return {one.role: sum((one.checkpoint.origin or one.checkpoint).known.reads.values()) for one in models.all()}


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sums_are_those_of_float64(tmp_path: Path, narrow: torch.dtype) -> None:
    source, tuned, target = drawn(1), drawn(2, narrow), drawn(3)
    still = source["c"].to(narrow)
    states = {"source": source, "tuned": {**tuned, "c": still}, "target": {**target, "d": torch.ones(2, 3)}}
    found = survey(opened(tmp_path, states))
    old, new, release = ({n: x.double() for n, x in state.items()} for state in states.values())
    assert list(found.changes) == list("abcd") and list(found.products) == list("abc")
    for name, one in found.changes.items():
        base = source[name].to(narrow).double()
        assert one.delta == pytest.approx(float((new[name] - base).square().sum()), rel=1e-12)
        assert one.base == pytest.approx(float(base.square().sum()), rel=1e-12)
        assert one.changed == (name != "c")
    for name, one in found.products.items():
        pairs = ((old, release), (release, release), (old, old))
        expected = [float((x[name] * y[name]).sum()) for x, y in pairs]
        assert list(one[:3]) == pytest.approx(expected, rel=1e-12) and one.is_matrix == (name == "a")
    sums = [sum(float((new[n] - base[n]).square().sum()) for n in "abc") for base in (release, old)]
    assert [found.to_target, found.to_source] == pytest.approx(sums, rel=1e-12)


def test_every_tensor_is_read_once(tmp_path: Path) -> None:
    states = {role: drawn(seed) for seed, role in enumerate(("source", "tuned", "target"))}
    states["tuned"]["A head"], states["target"]["steps"] = torch.ones(2), torch.tensor(3)
    models = opened(tmp_path, states)
    for _ in range(2):
        assert models.survey.fingerprints == {role: fingerprint(state) for role, state in states.items()}
        delta_report(models)
        is_nearer_to_target(models)
        assert all(set(one.checkpoint.known.reads.values()) == {1} for one in models.all())
    assert reads(models) == {"source": 4, "tuned": 5, "target": 5}


def test_names_that_sort_otherwise(tmp_path: Path) -> None:
    states = {role: drawn(seed) for seed, role in enumerate(("source", "tuned", "target"))}
    names = {"tuned": dict(zip("abcd", "bcda", strict=True)), "target": dict(zip("abcd", "dcba", strict=True))}
    models, plain = opened(tmp_path, states, names), opened(tmp_path, states)
    for role, prints in survey(models).fingerprints.items():
        held = {names.get(role, {}).get(name, name): x for name, x in states[role].items()}
        assert prints == fingerprint(held), role
    assert reads(models) == {"source": 4, "tuned": 5, "target": 7}, "what is out of order is read again"
    one, other = survey(models), survey(plain)
    assert replace(one, fingerprints={}) == replace(other, fingerprints={})


def test_a_base_in_two_roles_is_read_once(tmp_path: Path) -> None:
    models = opened(tmp_path, {"source": drawn(1), "tuned": drawn(2), "target": drawn(3)})
    both = replace(models, target=replace(models.source, role="target"))
    found = survey(both)
    assert reads(both) == {"source": 4, "tuned": 4, "target": 4} and found.to_target == found.to_source > 0
    assert all(one.both == one.source == one.target for one in found.products.values())
    assert not is_nearer_to_target(both)


@pytest.mark.parametrize("role", ["source", "tuned", "target"])
def test_what_is_not_finite_is_refused(tmp_path: Path, role: str) -> None:
    states = {one: drawn(seed) for seed, one in enumerate(("source", "tuned", "target"))}
    states[role]["b"][BLOCK] = torch.inf
    with pytest.raises(InputError, match=rf"{role}\.safetensors: tensor 'b' holds inf at index \({BLOCK},\)"):
        survey(opened(tmp_path, states))
    huge = {one: {n: x.double() * 1e200 for n, x in state.items()} for one, state in states.items()}
    huge[role]["b"][BLOCK] = 1.0
    survey(opened(tmp_path, huge))  # their squares are infinite, they are not


def test_of_models_with_other_inputs(tmp_path: Path) -> None:
    source, target = bert(BertForMaskedLM), bert(BertModel, 1, vocab_size=40, max_position_embeddings=20)
    places = [save(source, tmp_path / "s"), save(target, tmp_path / "t"), save(fine_tuned(source), tmp_path / "f")]
    models, again = open_models(*places), open_models(*places)
    assert models.source.checkpoint.origin is not None
    prints = models.survey.fingerprints
    for model, other in zip(models.all(), again.all(), strict=True):
        assert prints[model.role] == other.checkpoint.fingerprint()
        raw, other = model.checkpoint.origin or model.checkpoint, other.checkpoint.origin or other.checkpoint
        assert raw.known.fingerprint == other.fingerprint() and set(raw.known.reads.values()) == {1}
    for name, change in models.survey.changes.items():
        base, new = (model.tensor(name).double() for model in (models.source, models.tuned) if model)
        assert change.delta == pytest.approx(float((new - base).square().sum()), rel=1e-12), name


def test_of_a_real_trio_each_tensor_is_read_once(tmp_path: Path) -> None:
    source = bert(BertForMaskedLM)
    tuned = fine_tuned(bert(BertForSequenceClassification))
    target, _ = planted(source, 1)
    models = open_models(*(save(m, tmp_path / n) for m, n in ((source, "s"), (target, "t"), (tuned, "f"))))
    survey(models)
    assert all(set(one.checkpoint.known.reads.values()) == {1} for one in models.all())


def test_a_survey_runs_on_one_thread_and_leaves_the_number_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads that wait for each other over small blocks cost more than the sums; users' settings are theirs."""
    seen = []
    add = survey_module._add
    monkeypatch.setattr(survey_module, "_add", lambda *given: (seen.append(torch.get_num_threads()), add(*given)))
    base = bert(seed=0)
    places = [save(one, tmp_path / name) for name, one in (("source", base), ("target", bert(seed=1)))]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        models = open_models(*places)
        assert models.survey.fingerprints and set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
