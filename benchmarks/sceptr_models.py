"""Real weights: the fine-tune of SCEPTR carried over to independently pre-trained models of the same architecture.

    pip install sceptr==1.2.0
    python benchmarks/sceptr_models.py

The models are files inside the package (MIT): 3-layer, 64-wide encoders of T-cell receptors. For every target and
method: does the output load in its own class, does the mapped source compute what source does, what does the null test
say, and does the change of the fine-tune come along. The last is the correlation, over the pairs of 200 synthetic
receptors, of how distances change from target to ported with how they change from source to tuned (1: the same change).
"""

from __future__ import annotations

import argparse
import random
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import transfuse
from transfuse.maps.collection import Maps
from transfuse.maps.transport import transport
from transfuse.models.folding import map_state
from transfuse.models.opening import open_models
from transfuse.porting.inspection import inspect_models

SOURCE, TUNED = "SCEPTR", "SCEPTR_finetuned"
TARGETS = (
    "SCEPTR_MLM_only",
    "SCEPTR_average_pooling",
    "SCEPTR_dropout_noise_only",
    "SCEPTR_shuffled_data",
    "SCEPTR_synthetic_data",
)
METHODS = ("naive", "random", "transfusion", "tied", "orthogonal")
CONFIG = {
    "nhead": 8,
    "norm_first": False,
    "activation": "relu",
    "axes": {
        "_token_embedder._token_embedding._token_embeddings": "-",
        "_token_embedder._compartment_embedding._token_embeddings": "-",
        "_self_attention_stack._initial_projector.weight": "stream.{first} <- _",
        "_mlm_token_prediction_projector.projector.weight": "_ <- stream.{last}",
        "_mlm_token_prediction_projector.projector.bias": "_",
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="*", default=list(TARGETS[:3]))
    names = parser.parse_args().targets
    receptors = synthetic_receptors(200)
    about = inspect_models(weights(SOURCE), weights(TUNED), family="torch_encoder", config=CONFIG)
    print(f"inspect: delta {about['delta']['relative_norm']:.4f} of the weights' norm: {about['delta']['verdict']}\n")
    print("| target | method | relation (excess, z) | equivalence | embeddings | reloads | change carried over |")
    print("|---|---|---|---|---|---|---|")
    for name in names:
        for method in METHODS:
            print(row(name, method, receptors), flush=True)


def row(target: str, method: str, receptors: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        result = transfuse.port(
            weights(SOURCE),
            weights(TUNED),
            weights(target),
            out=out,
            method=method,
            family="torch_encoder",
            config=CONFIG,
        )
        ported = load_file(out / "model.safetensors")
    report = result.report
    null = (report["relation"]["null"] or {}).get("model")
    equivalence = report["equivalence"]
    carried = change_correlation(target, ported, receptors)
    cells = (
        target,
        method,
        f"{report['relation']['verdict']} ({null['excess']:.2f}, {null['z']:.1f})"
        if null
        else report["relation"]["verdict"],
        f"{equivalence['error']:.0e} in {equivalence['checked']}" if equivalence else "identity",
        f"{embedding_error(result.maps, receptors):.0e}" if result.maps.streams == "tied" else "-",
        "yes",
        f"{carried:+.3f}",
    )
    return "| " + " | ".join(cells) + " |"


def weights(name: str) -> str:
    return str(resources.files("sceptr._model_saves") / name / "state_dict.pt")


def real_model(name: str, state: dict[str, torch.Tensor] | None = None) -> Any:
    """The package's own model, with these weights; strict loading is the check that an output reloads."""
    from sceptr import _model_saves

    model = _model_saves.load_variant(name)
    if state is not None:
        model._bert.load_state_dict(state, strict=True)
    return model


def synthetic_receptors(count: int) -> Any:
    from pandas import DataFrame

    draw = random.Random(0)
    acids = "ACDEFGHIKLMNPQRSTVWY"

    def loop() -> str:
        return "CA" + "".join(draw.choice(acids) for _ in range(draw.randint(7, 13))) + "F"

    alpha, beta = ("TRAV38-1*01", "TRAV3*01", "TRAV13-2*01"), ("TRBV2*01", "TRBV25-1*01", "TRBV9*01")
    rows = [(draw.choice(alpha), loop(), draw.choice(beta), loop()) for _ in range(count)]
    return DataFrame(rows, columns=["TRAV", "CDR3A", "TRBV", "CDR3B"])


def embedding_error(maps: Maps, receptors: Any) -> float:
    """Largest difference between the real model's embeddings and those of its mapped self, carried back."""
    models = open_models(weights(SOURCE), weights(SOURCE), family="torch_encoder", config=CONFIG)
    layout = models.layout.with_ties(streams=maps.streams, tie_qkv=maps.tie_qkv)
    moved = real_model(SOURCE, map_state(models.source, layout, maps.spaces, torch.float32))
    expected, found = (model.calc_vector_representations(receptors) for model in (real_model(SOURCE), moved))
    if "stream" in maps.spaces:
        found = transport(torch.from_numpy(found), layout.outputs["output"], {})
        found = maps.spaces["stream"].inverse().apply(found, -1).numpy()
    return float(np.abs(expected - found).max())


def change_correlation(target: str, ported: dict[str, torch.Tensor], receptors: Any) -> float:
    before, after = distances(real_model(SOURCE), receptors), distances(real_model(TUNED), receptors)
    start, end = distances(real_model(target), receptors), distances(real_model(target, ported), receptors)
    return float(np.corrcoef(after - before, end - start)[0, 1])


def distances(model: Any, receptors: Any) -> np.ndarray:
    """Cosine distances of all pairs."""
    vectors = model.calc_vector_representations(receptors)
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (1 - vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]


if __name__ == "__main__":
    main()
