"""The runs of `same_bytes.py`: name -> command lines, one after the other in one empty folder.

`@x` stands for the path of x in the folder of models. Method and family are crossed as far as each adds something.
"""

from __future__ import annotations

from collections.abc import Sequence

# Methods that go by weights alone or by nothing.
WEIGHT_METHODS = (
    "naive", "random", "git-rebasin", "ot", "ot-hard", "transfusion", "brute-force", "no-attention-alignment",
    "no-residual", "tied", "orthogonal",
)  # fmt: skip
INPUT_METHODS = ("activation", "activation-permutation", "theseus", "functional", "distillation")
FAMILY_TARGETS = {
    "mlm": "words", "roberta": "texts", "distilbert": "texts", "electra": "texts", "deit": "images",
    "dinov2": "images", "swiglu": "images", "registers": "images", "clip": "zeroshot", "siglip": "zeroshot",
    "t5": "answers",
}  # fmt: skip
_ENCODER = """--family torch_encoder --config '{"nhead": 4, "norm_first": true, "activation": "relu"}'"""
_CLASSES = "--task @tasks/images.json"


def _bases(family: str, target: str = "moved") -> str:
    return f"@{family}/old @{family}/tuned @{family}/{target}"


def _port(family: str, target: str, options: str, out: str = "out") -> str:
    return f"port {_bases(family, target)} -o {out} --json {options}".strip()


def _ports() -> dict[str, Sequence[str]]:
    runs: dict[str, Sequence[str]] = {}
    for method in WEIGHT_METHODS:
        runs[f"port/vit/{method}"] = [_port("vit", "moved", f"--method {method}")]
    for method in ("naive", "git-rebasin", "ot", "transfusion", "tied", "orthogonal"):
        runs[f"port/bert/{method}"] = [_port("bert", "moved", f"--method {method}")]
    for method in INPUT_METHODS:
        given = f"--method {method} --inputs-count 16 --inputs"
        runs[f"port/vit/{method}"] = [_port("vit", "moved", f"{given} @tasks/images.json")]
        runs[f"port/bert/{method}"] = [_port("bert", "independent", f"{given} @tasks/texts.json")]
    for family, task in FAMILY_TARGETS.items():
        runs[f"port/{family}"] = [
            _port(family, "moved", "--method tied", "tied"),
            _port(family, "moved", "--method transfusion", "transfusion"),
            _port(family, "independent", f"--method functional --inputs @tasks/{task}.json --inputs-count 12", "fit"),
        ]
    for family in ("open_clip", "timm", "t5gated"):
        runs[f"port/{family}"] = [
            _port(family, "moved", f"--method {method}", method) for method in ("tied", "transfusion", "orthogonal")
        ]
    encoder = "port @encoder/old.pt @encoder/tuned.pt @encoder/moved.pt --json"
    runs["port/encoder"] = [
        f"{encoder} -o {method} --method {method} {_ENCODER}" for method in ("tied", "transfusion", "orthogonal")
    ]
    return runs


_OPTIONS: dict[str, Sequence[str]] = {
    "auto/continued": [_port("vit", "continued", "")],
    "auto/moved": [_port("bert", "moved", "")],
    "auto/weak": [_port("vit", "weak", ""), _port("bert", "weak", "--null-trials 3", "bert")],
    "auto/independent": [_port("vit", "independent", "")],
    "auto/inputs": [_port("vit", "independent", "--inputs @tasks/images.json")],
    "auto/labelled": [
        _port("vit", "independent", "--labelled @tasks/images.json --per-class 3 --inputs @tasks/images.json")
    ],
    "auto/labelled-texts": [_port("bert", "moved", "--labelled @tasks/texts.json --per-class 3")],
    "option/alpha": [_port("vit", "moved", "--method tied --alpha 0.5")],
    "option/split-qkv": [_port("vit", "moved", "--method transfusion --split-qkv")],
    "option/tie-qkv": [_port("vit", "moved", "--method tied --tie-qkv")],
    "option/restarts": [_port("vit", "moved", "--method tied --restarts 2 --seed 3")],
    "option/paper-form": [_port("vit", "moved", "--method transfusion --paper-form")],
    "option/max-sweeps": [_port("bert", "moved", "--method transfusion --max-sweeps 1 --null-trials 2")],
    "option/no-verify": [_port("bert", "moved", "--method tied --no-verify --null-trials 0")],
    "option/double": [_port("bert", "moved", "--method tied --double --seed 1")],
    "option/dry-run": [f"port {_bases('vit')} --dry-run --json", f"port {_bases('bert', 'wide')} --dry-run --json"],
    "option/text": [f"port {_bases('vit')} --method tied -o out", f"port {_bases('bert')} --dry-run"],
    "option/synthetic": [
        _port("vit", "independent", "--method functional --inputs synthetic --inputs-count 16", "images"),
        _port("bert", "independent", "--method functional --inputs synthetic --inputs-count 16", "texts"),
    ],
    "option/synthetic-clip": [_port("clip", "independent", "--inputs synthetic --inputs-count 12")],
    "option/synthetic-encoder": [
        f"port @encoder/old.pt @encoder/tuned.pt @encoder/moved.pt -o out --json {_ENCODER} --method functional "
        "--inputs synthetic --inputs-count 8"
    ],
    "option/ridge": [
        _port("vit", "independent", "--method functional --ridge 0.1 --inputs @tasks/images.json --alpha 0.7")
    ],
    "option/keep-embeddings": [
        _port("vit", "moved", "--method theseus --keep-embeddings --inputs @tasks/images.json --inputs-count 16")
    ],
    "option/force": [_port("vit", "moved", "--method naive"), _port("vit", "moved", "--method tied --force")],
    "shape/bf16-shards": [_port("vit", "shards", "--method tied"), _port("bert", "shards", "--method naive", "bert")],
    "shape/bf16-fitted": [_port("vit", "shards", "--inputs @tasks/images.json --inputs-count 16")],
    **{
        f"shape/vit-{name}": [_port("vit", name, "--inputs @tasks/images.json --inputs-count 24")]
        for name in ("wide", "deep", "shallow", "big", "resized", "patches")
    },
    "shape/vit-theseus": [
        _port("vit", name, "--method theseus --inputs @tasks/images.json --inputs-count 16", name)
        for name in ("wide", "patches")
    ],
    "shape/vit-distillation": [
        _port("vit", "big", "--method distillation --inputs @tasks/images.json --inputs-count 16")
    ],
    "shape/resized-tied": [_port("vit", "resized", "--method tied"), _port("vit", "patches", "--method naive", "two")],
    "shape/bert-wide": [_port("bert", "wide", "--inputs @tasks/texts.json --inputs-count 24")],
    "shape/bert-deep": [_port("bert", "deep", "--inputs @tasks/texts.json --inputs-count 24")],
    "shape/words-tied": [_port("bert", "words", "--method tied"), _port("bert", "words", "--method naive", "naive")],
    "shape/words-fitted": [_port("bert", "words", "--inputs @tasks/texts.json --inputs-count 24")],
}


def _maps(family: str, method: str, more: str = "") -> Sequence[str]:
    return [
        f"match @{family}/old @{family}/moved -o maps.safetensors --method {method} --json {more}",
        f"port {_bases(family)} --maps maps.safetensors -o out --json",
        f"verify @{family}/old maps.safetensors --json",
        f"verify @{family}/old maps.safetensors --double --seed 2 --json",
    ]


_MATCHES: dict[str, Sequence[str]] = {
    **{f"maps/vit-{method}": _maps("vit", method) for method in ("tied", "orthogonal", "transfusion", "ot")},
    "maps/vit-activation": _maps("vit", "activation", "--inputs @tasks/images.json --inputs-count 16"),
    "maps/vit-theseus": _maps("vit", "theseus", "--inputs @tasks/images.json --inputs-count 16"),
    "maps/bert-tied": _maps("bert", "tied", "--restarts 1 --null-trials 2"),
    "maps/bert-git-rebasin": _maps("bert", "git-rebasin"),
    "maps/clip-orthogonal": _maps("clip", "orthogonal"),
    "maps/t5-tied": _maps("t5", "tied"),
    "maps/open_clip-tied": _maps("open_clip", "tied"),
    "maps/words": ["match @bert/old @bert/words -o maps.safetensors --json"],
    "maps/text": ["match @vit/old @vit/independent -o maps.safetensors", "verify @vit/old maps.safetensors"],
    "inspect/one": [f"inspect @{name} --json" for name in ("bert/old", "clip/old", "t5/old", "open_clip/old")]
    + ["inspect @siglip/old", f"inspect @encoder/old.pt --json {_ENCODER}", "inspect @vit/shards --json"],
    "inspect/three": [
        "inspect @vit/old --tuned @vit/tuned --target @vit/moved --json",
        "inspect @bert/old --tuned @bert/tuned --target @bert/independent --method transfusion",
        "inspect @vit/old --tuned @vit/tuned --target @vit/patches --null-trials 1 --json",
        "inspect @vit/old --tuned @vit/tuned --target @vit/big --json",
        "inspect @bert/old --tuned @bert/independent --target @bert/words --json",
    ],
    "methods": ["methods --json", "methods"],
    "convert": [
        "convert @open_clip/old -o clip --json",
        "convert @open_clip/old -o tower --tower text --json",
        "convert @clip/old -o other --tower text",
    ],
    "merge/sum": ["merge @vitc/old @vitc/tuned @vitc/tuned2 @vitc/moved -o out --json"],
    "merge/mean": ["merge @mlm/old @mlm/tuned @mlm/tuned2 @mlm/moved -o out --how mean --alpha 0.5 --json"],
    "merge/ties": ["merge @vitc/old @vitc/tuned @vitc/tuned2 @vitc/moved -o out --how ties --density 0.3 --json"],
    "merge/dare": [
        "merge @vitc/old @vitc/tuned @vitc/tuned2 @vitc/moved -o out --how dare --seed 4 --json",
        "merge @clip/old @clip/tuned @clip/tuned2 @clip/continued -o two --how dare --method naive",
    ],
    "merge/maps": [
        "match @t5/old @t5/moved -o maps.safetensors --method transfusion --json",
        "merge @t5/old @t5/tuned @t5/tuned2 @t5/moved -o out --how ties --maps maps.safetensors --json",
    ],
    "merge/fitted": [
        "merge @vitc/old @vitc/tuned @vitc/tuned2 @vitc/independent -o out --method theseus --json "
        "--inputs @tasks/images.json --inputs-count 16"
    ],
}

_MEASURES: dict[str, Sequence[str]] = {
    "sweep/vit": [f"sweep {_bases('vitc')} {_CLASSES} --alphas 0.25,1 --json"],
    "sweep/support": [
        f"sweep {_bases('vitc')} {_CLASSES} --support @tasks/turned.json --alphas 0.5,1 --method transfusion --json",
        f"sweep {_bases('vitc')} {_CLASSES} --alphas 0.5,1 --choose-on test --allow-test",
    ],
    "sweep/fitted": [
        f"sweep {_bases('vitc')} {_CLASSES} --alphas 0.5,1 --method functional --inputs @tasks/images.json --json"
    ],
    "sweep/clip": [f"sweep {_bases('clip')} --task @tasks/zeroshot.json --alphas 0.5,1 --json"],
    "sweep/texts": [f"sweep {_bases('bert')} --task @tasks/texts.json --alphas 0.5,1 --limit 12 --json"],
    "sweep/t5": [f"sweep {_bases('t5')} --task @tasks/answers.json --alphas 1 --json"],
    "scale/layer": [f"scale {_bases('vitc')} {_CLASSES} --shots 2 --steps 4 -o out --json"],
    "scale/tensor": [
        f"scale {_bases('bert')} --task @tasks/texts.json --shots 2 --steps 3 --per tensor --init 0.5 "
        "--baseline-lr 1e-3 --method tied --json"
    ],
    "scale/text": [f"scale {_bases('vitc')} {_CLASSES} --shots 2 --steps 2 -o out"],
    **{
        f"refine/{mode}": [f"refine {_bases('vitc')} {_CLASSES} --per-class 2 --mode {mode} -o out --json"]
        for mode in ("normal", "force", "soft-share", "soft-sigmoid", "random")
    },
    "refine/oracle": [
        f"refine {_bases('vitc')} {_CLASSES} --per-class 2 --mode oracle --oracle @vitc/tuned2 -o out --json"
    ],
    "refine/cv": [
        f"refine {_bases('vitc')} {_CLASSES} --per-class 4 --alpha cv --alphas 0.5,1 --folds 2 --vote mean --json"
    ],
    "refine/select": [
        f"refine {_bases('vitc')} {_CLASSES} --per-class 2 --select {select} --ties {ties} --pool 20 --json"
        for select, ties in (("herding", "drop"), ("k-medoid", "keep"), ("coreset", "mean"))
    ],
    "refine/zeroshot": [
        f"refine {_bases('clip')} --task @tasks/zeroshot.json --per-class 2 --select herding --json",
        f"refine {_bases('vitc')} {_CLASSES} --per-class 2 -o out",
    ],
    "refine/texts": [
        f"refine {_bases('bert')} --task @tasks/texts.json --per-class 2 --micro-batch 2 -o out --json",
        f"refine {_bases('mlm')} --task @tasks/words.json --per-class 2 -o words --json",
    ],
    "interpolate/tied": [f"interpolate @vitc/old @vitc/moved {_CLASSES} --points 3 --json"],
    "interpolate/transfusion": [
        f"interpolate @vitc/old @vitc/independent {_CLASSES} --points 3 --method transfusion --json"
    ],
    "interpolate/words": [
        "interpolate @mlm/old @mlm/moved --task @tasks/words.json --points 3 --split train",
        "interpolate @mlm/old @mlm/moved --task @tasks/words.json --points 3 --method ot --skips rounded --json",
    ],
    "finetune/images": [
        f"finetune @vit/old {_CLASSES} --steps 4 --batch-size 8 -o out --json",
        f"finetune @vitc/old {_CLASSES} --epochs 1 --batch-size 16 --augment flip-crop --shots 4 -o two --json",
    ],
    "finetune/texts": [
        "finetune @bert/old --task @tasks/texts.json --steps 3 --batch-size 8 --freeze embeddings -o out --json",
        "finetune @mlm/old --task @tasks/words.json --steps 3 --batch-size 4 --schedule constant -o words --json",
        "finetune @t5/old --task @tasks/answers.json --steps 3 --batch-size 4 -o answers --json",
    ],
    "finetune/pairs": [
        "finetune @bert/old --task @tasks/pairs.json --steps 2 --batch-size 8 -o out",
        "eval out --task @tasks/pairs.json --json",
        "port @bert/old out @bert/moved -o ported --method tied --json",
        "finetune @t5/old --task @tasks/duels.json --steps 2 --batch-size 4 -o t5 --json",
    ],
    "tower": [
        "convert @clip/old -o old --tower text --json",
        "convert @clip/moved -o new --tower text --json",
        "finetune old --task @tasks/texts.json --steps 3 --batch-size 8 -o tuned --json",
        "port old tuned new -o ported --json",
        "port @clip/old tuned @clip/moved -o whole --method tied --json",
        "port old tuned new -o fitted --method functional --inputs @tasks/texts.json --inputs-count 12 --json",
        "eval ported --task @tasks/texts.json --json",
    ],
    "finetune/zeroshot": ["finetune @clip/old --task @tasks/zeroshot.json --steps 3 --batch-size 8 -o out --json"],
    "eval": [
        f"eval @vitc/tuned {_CLASSES} --json",
        "eval @vit/tuned --task @tasks/turned.json --split validation",
        "eval @bert/tuned --task @tasks/texts.json --limit 9 --json",
        "eval @mlm/old --task @tasks/words.json --json",
        "eval @clip/tuned --task @tasks/zeroshot.json --json",
        "eval @t5/tuned --task @tasks/answers.json --json",
    ],
    "eval/changed": [
        f"eval @vitc/tuned --task @tasks/{name}.json --json" for name in ("inverted", "blurred", "gray", "noise")
    ]
    + ["eval @bert/tuned --task @tasks/correlation.json --json", "eval @vitc/tuned --task @tasks/f1.json"],
}

_BENCH: dict[str, Sequence[str]] = {
    "bench/list": ["bench --list"],
    "bench/vits": ["bench @recipes/vits.yaml -o out --cache cache --workers 1 -q"],
    "bench/clips": ["bench @recipes/clips.yaml -o out --cache cache --workers 1 -q --json"],
    "bench/quick": [
        "bench @recipes/clips.yaml -o out --cache cache --workers 1 -q --quick --seeds 1 --limit 20 "
        "--override transport.methods=[tied]"
    ],
    "bench/processes": ["bench @recipes/vits.yaml -o out --cache cache --workers 2 -q --only interpolation"],
    "bench/tiny": [
        "bench fig5-lmc-vit-cifar10 -o out --cache cache --workers 1 --tiny --data-dir @ -q "
        "--override interpolation.methods=[tied]"
    ],
    "bench/tiny-clip": [
        "bench table4-fewshot -o out --cache cache --workers 1 --tiny --data-dir @ -q --limit 8 --only fewshot"
    ],
    "bench/tiny-t5": ["bench gradfix-t5 -o out --cache cache --workers 1 --tiny --data-dir @ -q --limit 8"],
}

_ERRORS: dict[str, Sequence[str]] = {
    "error/models": [
        _port("broken", "x", ""),
        "port @bert/old @broken/nan @bert/moved -o out",
        "port @bert/old @broken/missing @bert/moved -o out",
        "port @bert/old @bert/old @bert/moved -o out",
        "port @bert/old @bert/tuned @vit/old -o out",
        "inspect @nowhere --json",
        "inspect @encoder/old.pt",
        "inspect @encoder/old.pt --family no-such-family",
    ],
    "error/options": [
        f"port {_bases('vit')}",
        f"port {_bases('vit')} -o out --method no-such-method",
        f"port {_bases('vit')} -o out --method functional",
        f"port {_bases('vit')} -o no/such/folder",
        f"port {_bases('vit', 'wide')} -o out --method tied",
        f"port {_bases('vit')} -o out --maps none.safetensors",
        f"port {_bases('vit')} -o out --maps none.safetensors --method tied",
        f"merge {_bases('vit')} -o out --how ties --density 2",
        "merge @vit/old @vit/tuned @vit/tuned2 @vit/moved -o out",
        "verify @vit/old @vit/old/model.safetensors",
        "convert @bert/old -o out",
        "bench no-such-recipe -o out",
        "bench @recipes/vits.yaml -o out --override transport.nothing=1",
    ],
    "error/tasks": [
        "eval @vitc/tuned --task none.json",
        """eval @vitc/tuned --task '{"kind": "image-classification"}'""",
        "eval @vitc/tuned --task @tasks/texts.json",
        f"sweep {_bases('vitc')} {_CLASSES} --alphas a,b",
        f"sweep {_bases('vitc')} {_CLASSES} --choose-on test",
        f"refine {_bases('vitc')} {_CLASSES} --per-class 2 --mode oracle",
        f"scale {_bases('vitc')} {_CLASSES} --shots 0",
    ],
    "error/maps": [
        "match @vit/old @vit/moved -o maps.safetensors --json",
        "verify @vit/independent maps.safetensors",
        f"port {_bases('vit', 'independent')} --maps maps.safetensors -o out",
        f"port {_bases('bert')} --maps maps.safetensors -o out",
        "match @vit/old @vit/moved -o maps.safetensors",
    ],
}

RUNS: dict[str, Sequence[str]] = {**_ports(), **_OPTIONS, **_MATCHES, **_MEASURES, **_BENCH, **_ERRORS}
