"""What the null test says of pairs whose relation is known: where its thresholds come from.

    pip install sceptr==1.2.0
    python benchmarks/null_test.py

Pairs: independently pre-trained SCEPTR models; one of them re-ordered, with noise in standard deviations of each
tensor, or mixed with an independent one; small BERTs trained by masked LM on one Markov-chain corpus from different
initialisations, for longer and longer; and the same BERT trained on. Cosines over the layers' matrices, three shuffles
of each kind.
"""

from __future__ import annotations

import torch
from sceptr_models import CONFIG, SOURCE, TARGETS, weights
from transformers import BertConfig, BertForMaskedLM

from transfuse.evidence.null import stored_null
from transfuse.evidence.relation import relation
from transfuse.maps.random import random_maps
from transfuse.maps.transport import transport
from transfuse.methods.match import match_models
from transfuse.methods.table import METHODS
from transfuse.models.opening import open_models
from transfuse.options.groups import Check

State = dict[str, torch.Tensor]
STACK = {"model_type": "torch_encoder", **CONFIG}


def main() -> None:
    print("| pair | as is | matched | entries | rows, columns | excess | z | p, by number | p, by ends | verdict |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    sceptr = {name: torch.load(weights(name), weights_only=True) for name in (SOURCE, *TARGETS)}
    for name in TARGETS:
        row(f"{SOURCE}, {name}", sceptr[SOURCE], sceptr[name], STACK)
    generator = torch.Generator().manual_seed(0)
    planted, other = reordered(sceptr[SOURCE], sceptr[TARGETS[0]], generator)
    for noise in (1, 2, 3, 4):
        row(f"re-ordered, noise {noise}", sceptr[SOURCE], noisy(planted, noise, generator), STACK)
    for share in (0.2, 0.4, 0.6):
        mixed = {name: share * planted[name] + (1 - share) * other[name] for name in planted}
        row(f"re-ordered, {share} of it mixed with another", sceptr[SOURCE], mixed, STACK)
    berts()


def berts() -> None:
    config = {**small_bert(0).config.to_dict(), "architectures": ["BertForMaskedLM"]}
    base = train(small_bert(0), 400, seed=0)
    for steps in (0, 200, 400, 800):
        row(f"BERTs of two seeds, 400 and {steps} steps", base, train(small_bert(1), steps, seed=1), config)
    continued = small_bert(0)
    continued.load_state_dict(base, strict=False)
    row("BERT and itself, 400 steps on", base, train(continued, 400, seed=2), config)


def row(label: str, source: State, target: State, config: dict) -> None:
    models = open_models(source, target, config=config)
    maps = match_models(models, METHODS["tied"], check=Check(null_trials=3))
    null = (stored_null(maps) or {})["model"]
    entries, orders = (sum(found) / len(found) for found in (null.entries, null.orders))
    cells = (null.identity, null.matched, entries, orders)
    verdict = relation(models, maps, stored_null(maps)).verdict
    numbers = " | ".join(f"{cell:.3f}" for cell in cells)
    assert null.shared is not None
    chances = f"{null.shared.p_numbered:.1g} | {null.shared.p_paired:.1g}"
    print(f"| {label} | {numbers} | {null.excess:.2f} | {null.z:.1f} | {chances} | {verdict} |", flush=True)


def reordered(one: State, other: State, generator: torch.Generator) -> tuple[State, State]:
    """Two models re-ordered by the same random maps."""
    models = open_models(one, other, config=STACK)
    layout = models.layout.with_ties()
    maps = random_maps(layout, generator)
    first, second = (
        {m.disk[name]: transport(m.tensor(name), layout.params[name], maps) for name in m.disk}
        for m in (models.source, models.target)
    )
    return first, second


def noisy(state: State, noise: float, generator: torch.Generator) -> State:
    return {n: t + noise * t.std(correction=0) * torch.randn(t.shape, generator=generator) for n, t in state.items()}


def small_bert(seed: int) -> BertForMaskedLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(vocab_size=200, max_position_embeddings=32, **sizes, **dropout))


def train(model: BertForMaskedLM, steps: int, seed: int) -> State:
    """Masked LM on sequences of one fixed Markov chain: the corpus is the same for every model, its samples are not."""
    chain = torch.Generator().manual_seed(1234)
    following = torch.softmax(3 * torch.randn(200, 200, generator=chain), 1)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        ids = torch.randint(5, 200, (64, 1), generator=generator)
        for _ in range(23):
            ids = torch.cat([ids, torch.multinomial(following[ids[:, -1]], 1, generator=generator)], 1)
        masked = torch.rand(ids.shape, generator=generator) < 0.15
        loss = model(input_ids=ids.masked_fill(masked, 4), labels=ids.masked_fill(~masked, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: t.detach().clone() for name, t in model.state_dict().items() if "decoder" not in name}


if __name__ == "__main__":
    main()
