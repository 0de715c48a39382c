"""Evidence from activations, and a fit, at BERT-base size: seconds and peak memory. Random weights of the real class.

python benchmarks/activations_bert.py                 # evidence: 512 inputs of 128 tokens
python benchmarks/activations_bert.py --fit --inputs 64
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM

from transfuse import port
from transfuse.evidence.activations import collect
from transfuse.methods.table import METHODS
from transfuse.models.opening import open_models
from transfuse.options.groups import Inputs
from transfuse.running.live import of_checkpoint
from transfuse.running.probes import probe_of_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--fit", action="store_true", help="A whole port with functional, not the evidence alone.")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = make_models(Path(folder), asked.layers)
        (fit if asked.fit else evidence)(paths, asked.inputs)


def make_models(folder: Path, layers: int) -> dict[str, Path]:
    """A source, a fine-tune of it (5 % noise) and a target, saved."""
    config = BertConfig(num_hidden_layers=layers, architectures=["BertForMaskedLM"])
    paths = {}
    for seed, name in enumerate(("source", "target")):
        torch.manual_seed(seed)
        model: Any = BertForMaskedLM(config)
        paths[name] = folder / name
        model.save_pretrained(paths[name])
        if name == "source":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.05 * parameter.std(correction=0) * torch.randn_like(parameter)
            paths["tuned"] = folder / "tuned"
            model.save_pretrained(paths["tuned"])
    return paths


def evidence(paths: dict[str, Path], count: int) -> None:
    models = open_models(paths["source"], paths["target"])
    source, target = (probe_of_model(one, models.layout, "cpu") for one in (models.source, models.target))
    live = of_checkpoint(models.target.checkpoint, target.module, models.target.checkpoint.config)
    inputs = drawn(live, count)
    form, _ = METHODS["functional"].form.of(models)
    before = peak()
    collect(source, target, form, inputs.select(torch.arange(4)))  # the first call sets things up
    print(f"models loaded: {before:,.0f} MB", flush=True)
    for share in (4, 1):
        some = inputs.select(torch.arange(count // share))
        began = time.monotonic()
        found = collect(source, target, form, some)
        seconds, moments = time.monotonic() - began, sum(len(one) for one in found.values())
        print(
            f"{count // share} inputs: {seconds:.1f} s, peak {peak():,.0f} MB, moments of {moments} places", flush=True
        )
        del found


def fit(paths: dict[str, Path], count: int) -> None:
    began = time.monotonic()
    result = port(
        paths["source"], paths["tuned"], paths["target"], method="functional", inputs=Inputs("synthetic", count=count)
    )
    result.state_dict()
    print(f"functional, {count} inputs of 64 tokens: {time.monotonic() - began:.1f} s, peak {peak():,.0f} MB")


def drawn(live: Any, count: int) -> Any:
    from transfuse.running.unlabelled import synthetic

    return synthetic(live, count=count, tokens=128)


def peak() -> float:
    """Peak resident memory in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
