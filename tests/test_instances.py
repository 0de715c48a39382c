"""Classes are built once: an instance that was filled again is as good as a new one, and a run builds few."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tiny
from families import CASES, Case, Transformers
from transfuse import VerificationError, port
from transfuse.models.model import Models
from transfuse.models.plan import make_plan
from transfuse.running.building import load_transformers, seeded_inputs
from transfuse.running.idle import Idle
from transfuse.running.instances import idle_of
from transfuse.running.live import load_class, load_live
from transfuse.running.probes import Replay
from transfuse.running.unlabelled import Inputs

every_class = pytest.mark.parametrize(
    "case", [case for case in CASES if isinstance(case.source, Transformers)], ids=lambda case: case.name
)


def outputs(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: x for name, x in model(**inputs).items() if isinstance(x, Tensor)}


@every_class
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_filled_again_it_is_what_a_new_one_is(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    states = []
    for seed in (0, 1):
        case.source.save(tmp_path / str(seed), seed)
        states.append({name: x.to(dtype) for name, x in case.weights(tmp_path / str(seed)).items()})
    states[1] = {name: x for name, x in states[1].items() if "pooler" not in name}
    config, idle = case.config(tmp_path / "0"), Idle()
    inputs = seeded_inputs("transformers", config, 0, dtype)
    used, _ = load_class("there", config, states[0])
    outputs(used, inputs)
    idle.give(config, used)
    assert all(one.is_meta for one in (*used.parameters(), *used.buffers()))
    into = idle.take(config, dtype)
    assert into is used and idle.take(config, dtype) is None
    torch.manual_seed(0)
    new, expected = load_transformers(config, states[1])
    torch.manual_seed(0)
    filled, found = load_transformers(config, states[1], into)
    assert filled is used and found == expected
    assert {name: type(one) for name, one in filled.named_modules()} == {
        name: type(one) for name, one in new.named_modules()
    }
    for (name, one), (same, other) in zip(_tensors(filled), _tensors(new), strict=True):
        assert name == same and one.dtype == other.dtype and torch.equal(one, other), name
    wanted = outputs(new, inputs)
    assert wanted and all(torch.equal(x, wanted[name]) for name, x in outputs(filled, inputs).items())
    torch.manual_seed(0)
    fastest, _ = load_class("there", config, states[1])
    idle.give(config, filled)
    torch.manual_seed(0)
    again, _ = load_class("there", config, states[1], idle)
    assert again is used
    wanted = outputs(fastest, inputs)
    assert all(torch.equal(x, wanted[name]) for name, x in outputs(again, inputs).items())


def _tensors(model: Any) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def test_only_the_same_config_and_dtype_will_do() -> None:
    idle, module, config = Idle(), torch.nn.Linear(2, 2), {"model_type": "bert", "hidden_size": 2}
    idle.give(config, module)
    assert idle.take({**config, "hidden_size": 4}) is None
    assert idle.take(config, torch.float64) is None
    assert idle.take(dict(config), torch.float32) is module
    idle.give(config, module)
    assert idle.take(config) is module


# --- how many a run builds ------------------------------------------------------------------------------------------

Trio = tuple[Path, Path, Path]
DRAWN = Inputs("synthetic", count=12)
# (run, options): instances built where the configs of all models are the same, and where each has one of its own.
# Of functional: source, tuned, target and the output. Theseus runs the two bases, and where one of them fits loads the
# output into it. The check of maps needs source alone. Naive loads what was written, which is all the others end with.
BUILT: dict[str, tuple[dict[str, Any], int, int]] = {
    "auto": ({}, 4, 4),
    "auto with inputs": ({"inputs": DRAWN}, 4, 4),
    "functional": ({"method": "functional", "inputs": DRAWN}, 4, 4),
    "functional, not verified": ({"method": "functional", "inputs": DRAWN, "verify": False}, 4, 4),
    "distillation": ({"method": "distillation", "inputs": DRAWN}, 2, 3),
    "theseus": ({"method": "theseus", "inputs": DRAWN}, 2, 3),
    "activation": ({"method": "activation", "inputs": DRAWN}, 2, 3),
    "tied": ({"method": "tied"}, 1, 2),
    "tied in double": ({"method": "tied", "double": True}, 1, 2),
    "transfusion": ({"method": "transfusion"}, 1, 2),
    "naive": ({"method": "naive"}, 1, 1),
    "naive, not verified": ({"method": "naive", "verify": False}, 0, 0),
}


@pytest.fixture(scope="module")
def trios(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trio, Trio]:
    """Independent bases: of one config, and of three."""
    folder = tmp_path_factory.mktemp("trios")
    source, target = (tiny.vit(seed).float() for seed in (0, 9))
    tuned = tiny.fine_tuned(source)
    same = [tiny.save(one, folder / f"same{n}") for n, one in enumerate((source, tuned, target))]
    for number, model in enumerate((source, tuned, target)):
        model.config.id2label = {n: f"{number}-{n}" for n in range(7)}
    own = [tiny.save(one, folder / f"own{n}") for n, one in enumerate((source, tuned, target))]
    return (same[0], same[1], same[2]), (own[0], own[1], own[2])


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of all whole models that are constructed from now on, whatever for and on whatever device."""
    found: list[str] = []
    construct = PreTrainedModel.__init__

    def counted(self: Any, config: Any, *given: Any, **more: Any) -> None:
        if type(self).__name__ in (config.architectures or ()):
            found.append(type(self).__name__)
        construct(self, config, *given, **more)

    monkeypatch.setattr(PreTrainedModel, "__init__", counted)
    return found


@pytest.mark.parametrize("own", [False, True], ids=["one config", "three configs"])
@pytest.mark.parametrize("name", BUILT)
def test_classes_are_built_once(
    name: str, own: bool, trios: tuple[Trio, Trio], built: list[str], tmp_path: Path
) -> None:
    options, *counts = BUILT[name]
    result = port(*trios[own], out=tmp_path / "out", **options)
    if "not verified" not in name:
        assert result.report["loads"] == "ViTForImageClassification"
    assert len(built) == counts[own]


def test_the_builder_is_counted(trios: tuple[Trio, Trio], built: list[str]) -> None:
    load_live(trios[0][0])
    assert built == ["ViTForImageClassification"]


@pytest.mark.parametrize("name", BUILT)
def test_no_weights_are_kept(name: str, trios: tuple[Trio, Trio]) -> None:
    models = port(*trios[0], **BUILT[name][0]).tensors.models
    assert not at_work(models)
    assert all(x.is_meta for _, _, module in idle_of(models).found for x in (*module.parameters(), *module.buffers()))


def at_work(models: Models) -> list[str]:
    """Roles of the models that have their weights in memory, in a class that runs."""
    return sorted(models.kept["instances"].probes) if "instances" in models.kept else []


def test_bases_are_let_go_once_their_means_are_known(trios: tuple[Trio, Trio], monkeypatch: pytest.MonkeyPatch) -> None:
    opened, seen = [], []
    monkeypatch.setattr("transfuse.porting.port.make_plan", lambda models: opened.append(models) or make_plan(models))

    class Watched(Replay):
        def __init__(self, probe: Any):
            seen.append(at_work(opened[0]))
            super().__init__(probe)

    monkeypatch.setattr("transfuse.update.functional.Replay", Watched)
    port(*trios[0], method="functional", inputs=DRAWN)
    assert seen == [["tuned"], ["tuned"]]


@pytest.mark.parametrize("method", ["functional", "distillation", "theseus", "tied", "naive"])
@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_what_does_not_load_is_still_found(
    method: str, fault: str, trios: tuple[Trio, Trio], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "vit.encoder.layer.1.output.dense.weight"

    def damaged(config: Any, state: dict[str, Tensor], into: Any) -> Any:
        assert (into is None) == (method == "naive")
        assert name in state
        given = {one: x for one, x in state.items() if one != name}
        return load_transformers(config, given if fault == "missing" else {**given, name: state[name][:, 1:]}, into)

    monkeypatch.setattr("transfuse.porting.output.load_transformers", damaged)
    inputs = None if method in ("tied", "naive") else DRAWN
    with pytest.raises(VerificationError, match=r"does not load: .*layers?\.1\.(output\.dense|mlp\.fc2)\.weight"):
        port(*trios[0], out=tmp_path / "out", method=method, inputs=inputs)
    assert not (tmp_path / "out").exists()
