"""How much noise matching survives: planted permutations of a small ViT, target = planted + noise.

    python benchmarks/noise.py -o docs/noise.png

A 4-layer, 64-wide ViT (4 heads, random weights, 17 tokens, 8-pixel patches). Noise is in units of each tensor's own
standard deviation. Mean share of stream indices and of heads recovered over seeds, beside the figures of earlier small
experiments on the authors' code and another synthetic model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import transfuse
from transfuse.maps.algebra import PerHead, Permutation
from transfuse.maps.collection import Maps
from transfuse.maps.random import random_maps
from transfuse.maps.transport import transport
from transfuse.models.opening import open_models

CONFIG = {"model_type": "vit", "num_attention_heads": 4, "hidden_act": "gelu"}
State = dict[str, torch.Tensor]
NOISES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
EARLIER = {"tied": {1.0: 1.0, 1.5: 1.0, 2.0: 0.92}, "transfusion": {1.0: 0.75, 1.5: 0.35, 2.0: 0.18}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    table: dict[tuple[str, float], torch.Tensor] = {}
    print("| noise | method | stream | heads | heads by spectra | earlier: stream |\n|---|---|---|---|---|---|")
    for noise in NOISES:
        for method in ("transfusion", "tied"):
            found = torch.tensor([recovered(method, noise, seed) for seed in range(options.seeds)])
            table[method, noise] = found
            mean = found.mean(0)
            earlier = EARLIER[method].get(noise, "-")
            print(f"| {noise} | {method} | {mean[0]:.2f} | {mean[1]:.2f} | {mean[2]:.2f} | {earlier} |", flush=True)
    if options.out:
        plot(table, options.out)


def recovered(method: str, noise: float, seed: int) -> tuple[float, float, float]:
    """Shares of (stream indices, heads, heads by spectra alone) that equal the planted ones."""
    generator = torch.Generator().manual_seed(seed)
    source, target, truth = planted_pair(vit_state(generator), method, noise, generator)
    maps = transfuse.match(source, target, method=method, config=CONFIG, null_trials=0)
    return shares(maps, truth)


def planted_pair(source: State, method: str, noise: float, generator: torch.Generator) -> tuple[State, State, dict]:
    """A ViT, the same in another order plus noise, and that order as maps of a method's form."""
    row = transfuse.METHODS[method]
    models = open_models(source, source, config=CONFIG)
    layout = models.layout.with_ties(streams=row.form.streams, tie_qkv=row.form.tie_qkv)
    truth = random_maps(models.layout.with_ties(tie_qkv=row.form.tie_qkv), generator)
    if row.form.streams == "junction":  # one order at every junction: what a real pair of checkpoints can have
        truth |= {name: truth["stream"] for name in layout.spaces if name.startswith("stream.")}
    target = {name: transport(t, layout.params[name], truth) for name, t in source.items()}
    for name, t in target.items():
        target[name] = t + noise * t.std(correction=0) * torch.randn(t.shape, generator=generator)
    return source, target, truth


def shares(maps: Maps, truth: dict) -> tuple[float, float, float]:
    streams, heads, spectral = [], [], []
    for name, found in maps.spaces.items():
        expected = truth[name]
        if isinstance(found, Permutation) and name.startswith("stream"):
            streams.append((found.index == expected.index).float().mean())
        if isinstance(found, PerHead):
            first = torch.tensor(maps.report["heads"][name.split("/")[0]]["spectral"])
            heads.append((found.heads.index == expected.heads.index).float().mean())
            spectral.append((first == expected.heads.index).float().mean())
    return tuple(float(torch.stack(one).mean()) for one in (streams, heads, spectral))


def vit_state(generator: torch.Generator, layers: int = 4, width: int = 64, hidden: int = 256) -> State:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    state = {
        "embeddings.cls_token": normal(1, 1, width),
        "embeddings.position_embeddings": normal(1, 17, width),
        "embeddings.patch_embeddings.projection.weight": normal(width, 3, 8, 8),
        "embeddings.patch_embeddings.projection.bias": normal(width),
        "layernorm.weight": 1 + normal(width),
        "layernorm.bias": normal(width),
    }
    for layer in range(layers):
        at = f"encoder.layer.{layer}."
        sizes = {f"attention.attention.{name}": (width, width) for name in ("query", "key", "value")}
        sizes |= {"attention.output.dense": (width, width)}
        sizes |= {"intermediate.dense": (hidden, width), "output.dense": (width, hidden)}
        for name, shape in sizes.items():
            state |= {f"{at}{name}.weight": normal(*shape), f"{at}{name}.bias": normal(shape[0])}
        for name in ("layernorm_before", "layernorm_after"):
            state |= {f"{at}{name}.weight": 1 + normal(width), f"{at}{name}.bias": normal(width)}
    return state


def plot(table: dict[tuple[str, float], torch.Tensor], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for method, color in (("tied", "tab:blue"), ("transfusion", "tab:orange")):
        mean = [float(table[method, noise].mean(0)[0]) for noise in NOISES]
        axes.plot(NOISES, mean, "o-", color=color, label=f"{method}: stream")
        axes.plot(
            *zip(*EARLIER[method].items(), strict=True), "x", color=color, markersize=9, label=f"{method}: earlier code"
        )
    spectra = [float(table["tied", noise].mean(0)[2]) for noise in NOISES]
    axes.plot(NOISES, spectra, "--", color="gray", label="heads by spectra")
    axes.set(
        xlabel="noise on target (standard deviations of each tensor)", ylabel="share recovered", ylim=(-0.05, 1.05)
    )
    axes.legend(fontsize=8)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
