"""Classes are built once: an instance that was filled again is as good as a new one, and a run builds few."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from families import CASES, Case, Transformers
from transfuse.running.building import load_transformers, seeded_inputs
from transfuse.running.idle import Idle
from transfuse.running.live import load_class

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
