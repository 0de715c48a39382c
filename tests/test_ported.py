"""The tensors of a port: their form is known before they are made, and blocks give what the whole tensor gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

from tiny import bert, fine_tuned, planted, save
from transfuse import port
from transfuse.files.reading import BLOCK
from transfuse.porting.port import PortResult
from transfuse.update.ported import Ported


def checked(result: PortResult) -> None:
    """Whether form and pieces are those of the tensors, and lost updates those of plain code."""
    tensors = result.tensors
    for out, step in tensors.steps.items():
        whole = tensors.read(out)
        lost = tensors.lost.pop(out, None)
        form = tensors.form(out)
        assert (form.shape, form.dtype) == (tuple(whole.shape), whole.dtype), out
        pieces = [piece.clone().reshape(-1) for piece in tensors.pieces(out)]
        assert torch.equal(torch.cat(pieces), whole.reshape(-1)), out
        if step.action == "add":
            old, update = tensors.models.target.tensor(step.name), tensors.alpha * tensors.update.of(step.name)
            assert torch.equal(whole, (old.to(update.dtype) + update).to(old.dtype)), out
            swallowed = (update != 0) & (whole == old)
            assert tensors.lost[out] == lost == (int(swallowed.sum()), int((update != 0).sum())), out


@pytest.mark.parametrize("method", ["naive", "tied", "orthogonal", "random"])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_of_one_shape_with_a_head_that_is_carried(tmp_path: Path, method: str, alpha: float) -> None:
    source = bert(BertModel)
    tuned = fine_tuned(source, BertForSequenceClassification)
    target, _ = planted(source, 1, noise=0.2)
    places = [save(m, tmp_path / n) for n, m in {"s": source, "f": tuned, "t": target}.items()]
    result = port(*places, method=method, alpha=alpha, null_trials=0, verify=False)
    assert {step.action for step in result.tensors.steps.values()} >= {"add", "carry"}
    checked(result)


@pytest.mark.parametrize("keep", [True, False])
def test_of_another_vocabulary(tmp_path: Path, keep: bool) -> None:
    source = bert(BertForMaskedLM)
    target = bert(BertModel, 1, vocab_size=40)
    places = [save(m, tmp_path / n) for n, m in {"s": source, "f": fine_tuned(source), "t": target}.items()]
    checked(port(*places, method="naive", keep_embeddings=keep))


def test_heads_of_another_width_are_announced_as_they_come(tmp_path: Path) -> None:
    source = bert(BertModel)
    tuned = fine_tuned(source, BertForSequenceClassification)
    target = bert(BertModel, 1, hidden_size=24, num_attention_heads=3, intermediate_size=40)
    places = [save(m, tmp_path / n) for n, m in {"s": source, "f": tuned, "t": target}.items()]
    planned = port(*places, dry_run=True).tensors
    assert planned.models.resizing is not None and planned.plan.of("carry")
    for step in planned.plan.of("carry"):
        form = planned.form(step.out)
        whole = planned.read(step.out)
        assert (form.shape, form.dtype) == (tuple(whole.shape), whole.dtype), step.out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_of_large_tensors(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(3, BLOCK, generator=generator)
    states: dict[str, Any] = {}
    for role, noise in (("source", 0.0), ("tuned", 1e-3), ("target", 0.1)):
        states[role] = {"x": (base + noise * torch.randn(base.shape, generator=generator)).to(dtype)}
        states[role]["x"][0, :9] = -0.0
        save_file(states[role], tmp_path / f"{role}.safetensors")
    places = [tmp_path / f"{role}.safetensors" for role in states]
    result = port(*places, method="naive")
    checked(result)
    lost = result.tensors.lost["x"]
    assert lost[1] > 0 and (lost[0] > 0) == (dtype != torch.float32)
    monkeypatch.setattr(Ported, "read", None)  # nothing is made whole
    port(*places, method="naive", out=tmp_path / "out")
    old, tau = states["target"]["x"].float(), states["tuned"]["x"].float() - states["source"]["x"].float()
    written = load_file(tmp_path / "out/model.safetensors")["x"]
    assert torch.equal(written, (old + tau).to(dtype))
