"""The tiny models that `same_bytes.py` works on, made without transfuse.

A folder of models for each family: `old` (the base), `tuned` and `tuned2` (fine-tunes of it), and new bases:
`continued` (old trained further), `moved` (old with its units in another order and noise), `weak` (the same with much
more noise), `independent`, `shards` (bfloat16, several files), and others of other shapes or with other words.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from same_bytes_data import (
    COLOURS,
    HIDDEN,
    LAYERS,
    PIXELS,
    TEXTS,
    WIDTH,
    write_images,
    write_recipes,
    write_tasks,
    write_texts,
)
from torch import Tensor, nn

State = dict[str, Tensor]

_TEXTS = [*(text for texts in TEXTS.values() for text in texts), "photo of", *COLOURS]
_WORDS = sorted({word for text in _TEXTS for word in text.split()})
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENS = [*_SPECIAL, *_WORDS, "good", "number"]
# The same words under other ids, and some more.
OTHER_TOKENS = [*_SPECIAL, "film,", "films", *reversed(_WORDS), "good", "works"]

_TEXT = {**LAYERS, "vocab_size": len(TOKENS), "max_position_embeddings": 20, "pad_token_id": 0, "type_vocab_size": 2}
_DISTIL = {
    "vocab_size": len(TOKENS), "max_position_embeddings": 20, "dim": WIDTH, "n_layers": 2, "n_heads": 4,
    "hidden_dim": HIDDEN, "pad_token_id": 0,
}  # fmt: skip
_DINO = {**LAYERS, "image_size": 8, "patch_size": 4, "mlp_ratio": 2}
_TOWER = {**LAYERS, "vocab_size": len(TOKENS), "max_position_embeddings": 16, "projection_size": WIDTH}
_TOWERS = {
    "text_config": {**_TOWER, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0},
    "vision_config": PIXELS,
}
_T5 = {
    "vocab_size": len(TOKENS), "d_model": WIDTH, "d_kv": 6, "d_ff": HIDDEN, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "relative_attention_num_buckets": 8, "pad_token_id": 0, "eos_token_id": 3,
    "decoder_start_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One family of transformers models.

    Attributes:
        base, tuned: classes of the base and of its fine-tunes.
        config: of the base.
        labels: class names of the fine-tunes.
        reads: "text", "image" or both: which processors lie beside the weights.
        shapes: further new bases by name -> changes to the config.
    """

    name: str
    base: str
    tuned: str
    config: Mapping[str, Any]
    labels: tuple[str, ...] = ()
    reads: str = "text"
    shapes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_WIDE = {"hidden_size": 24, "intermediate_size": 32}
_BIG = {**_WIDE, "num_hidden_layers": 3}
_IMAGE_SHAPES = {
    "wide": _WIDE, "deep": {"num_hidden_layers": 3}, "shallow": {"num_hidden_layers": 1}, "big": _BIG,
    "resized": {"image_size": 12}, "patches": {"patch_size": 2},
}  # fmt: skip
_KINDS, _MOODS = tuple(COLOURS), tuple(sorted(TEXTS))
_TEXT_SHAPES = {"wide": _WIDE, "deep": {"num_hidden_layers": 3}, "words": {"vocab_size": len(OTHER_TOKENS)}}

FAMILIES = (
    Family("bert", "BertModel", "BertForSequenceClassification", _TEXT, _MOODS, shapes=_TEXT_SHAPES),
    Family("mlm", "BertForMaskedLM", "BertForMaskedLM", _TEXT),
    Family("roberta", "RobertaForMaskedLM", "RobertaForSequenceClassification", _TEXT, _MOODS),
    Family("distilbert", "DistilBertModel", "DistilBertForSequenceClassification", _DISTIL, _MOODS),
    Family("electra", "ElectraModel", "ElectraForSequenceClassification", {**_TEXT, "embedding_size": 12}, _MOODS),
    Family("vit", "ViTModel", "ViTForImageClassification", PIXELS, _KINDS, "image", _IMAGE_SHAPES),
    Family("vitc", "ViTForImageClassification", "ViTForImageClassification", PIXELS, _KINDS, "image"),
    Family("deit", "DeiTModel", "DeiTForImageClassification", PIXELS, _KINDS, "image"),
    Family("dinov2", "Dinov2Model", "Dinov2ForImageClassification", _DINO, _KINDS, "image"),
    Family("swiglu", "Dinov2Model", "Dinov2ForImageClassification", {**_DINO, "use_swiglu_ffn": True}, _KINDS, "image"),
    Family(
        "registers",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
        {**_DINO, "num_register_tokens": 2},
        _KINDS,
        "image",
    ),
    Family("clip", "CLIPModel", "CLIPModel", {**_TOWERS, "projection_dim": 8}, (), "text image"),
    Family("siglip", "SiglipModel", "SiglipModel", _TOWERS, (), "text image"),
    Family("t5", "T5ForConditionalGeneration", "T5ForConditionalGeneration", _T5),
    Family("t5gated", "T5EncoderModel", "T5EncoderModel", {**_T5, "feed_forward_proj": "gated-gelu"}),
)


def make(place: Path) -> None:
    """Writes everything into a new folder."""
    place.mkdir(parents=True)
    write_images(place / "images")
    write_images(place / "cifar10", classes=10)
    write_texts(place)
    write_tasks(place)
    write_recipes(place)
    for number, family in enumerate(FAMILIES):
        write_family(place / family.name, family, 1000 * number)
    write_tables(place)
    write_broken(place)


# --- models of transformers ---------------------------------------------------------------------------------------


def write_family(place: Path, family: Family, seed: int) -> None:
    """All models of a family."""
    old = build(family.base, family.config, seed, family.labels if family.base == family.tuned else ())
    save(old, place / "old", family)
    for number, name in enumerate(("tuned", "tuned2")):
        tuned = build(family.tuned, family.config, seed + 10 + number, family.labels)
        tuned.base_model.load_state_dict(old.base_model.state_dict(), strict=False)
        tuned.load_state_dict(old.state_dict(), strict=False)
        save(noisy(tuned, 0.08, seed + 20 + number), place / name, family)
    save(noisy(old, 0.1, seed + 30), place / "continued", family)
    save(noisy(old, 0.1, seed + 30).bfloat16(), place / "shards", family, max_shard_size="6KB")
    moved = copy.deepcopy(old)
    moved.load_state_dict(reordered(old.state_dict(), seed + 40))
    save(noisy(moved, 0.3, seed + 41), place / "moved", family)
    save(noisy(moved, 1.6, seed + 42), place / "weak", family)
    labels = family.labels if family.base == family.tuned else ()
    save(build(family.base, family.config, seed + 50, labels), place / "independent", family)
    for number, (name, changes) in enumerate(family.shapes.items()):
        other = build(family.base, {**family.config, **changes}, seed + 60 + number)
        if not {"hidden_size", "num_hidden_layers"} & set(changes):  # the same model for other inputs
            shapes = {key: t.shape for key, t in other.state_dict().items()}
            fitting = {key: t for key, t in old.state_dict().items() if t.shape == shapes[key]}
            other.load_state_dict(fitting, strict=False)
        save(noisy(other, 0.05, seed + 70), place / name, family, OTHER_TOKENS if name == "words" else TOKENS)


def build(kind: str, config: Mapping[str, Any], seed: int, labels: tuple[str, ...] = ()) -> Any:
    """A model with random weights as after training: no bias is zero and no norm is one."""
    model_class = getattr(transformers, kind)
    named = {"id2label": dict(enumerate(labels)), "label2id": {one: i for i, one in enumerate(labels)}}
    model = model_class(model_class.config_class(**config, **(named if labels else {})))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn(name, parameter.shape, generator))
    return model.eval()


def drawn(name: str, shape: Any, generator: torch.Generator) -> Tensor:
    """Gains around 1, all else around 0, float32."""
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values * values[0].numel() ** -0.5
    return 0.3 * values + float(not name.endswith("bias"))


def noisy(model: Any, size: float, seed: int) -> Any:
    """A copy with Gaussian noise, in units of each tensor's standard deviation."""
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in changed.parameters():
            spread = parameter.std() if parameter.numel() > 1 else 1.0
            parameter.add_(size * spread * torch.randn(parameter.shape, generator=generator))
    return changed


_INNER_ROWS = re.compile(r"(query|key|value|[qkv]_proj|[qkv]_lin|\.[qkv])\.(weight|bias)$")
_INNER_COLUMNS = re.compile(r"((attention\.output\.dense|out_proj|out_lin|o_proj|attn\.proj)|\.o)\.weight$")


def reordered(state: State, seed: int) -> State:
    """The same units of the streams and of the hidden layers in another order; insides of heads stay."""
    orders: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)

    def order(key: str, size: int) -> Tensor:
        if key not in orders:
            orders[key] = torch.randperm(size, generator=generator)
        return orders[key]

    found = {}
    for name, t in state.items():
        layer = re.match(r".*?\.\d+\.", name)
        for dim, size in enumerate(t.shape):
            inner = (dim == 0 and _INNER_ROWS.search(name)) or (dim == 1 and _INNER_COLUMNS.search(name))
            if size == WIDTH and not inner:
                t = t.index_select(dim, order("text" if "text" in name else "stream", size))
            elif size == HIDDEN and layer:
                t = t.index_select(dim, order(layer.group(), size))
        found[name] = t
    return found


def save(model: Any, folder: Path, family: Family, tokens: list[str] = TOKENS, **options: Any) -> None:
    """A model folder with processors beside the weights."""
    model.save_pretrained(folder, **options)
    if "text" in family.reads:
        tokenizer(tokens, decoder=family.name == "t5").save_pretrained(folder)
    if "image" in family.reads:
        config = model.config.to_dict()
        write_image_processor(folder, config.get("vision_config", config)["image_size"])


def tokenizer(tokens: list[str], *, decoder: bool) -> Any:
    """One token a word; [CLS] text [SEP], or text [SEP] for models with a decoder."""
    made = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]")
    )
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    start = "" if decoder else "[CLS] "
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start}$A [SEP]", pair=f"{start}$A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_max_length=16,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _SPECIAL, strict=True)),
    )


def write_image_processor(folder: Path, size: int) -> None:
    """Resizes to the model's size, values from -1 to 1."""
    about = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(about))


# --- models as tables of tensors ----------------------------------------------------------------------------------


def _open_clip_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (), "positional_embedding": (8, WIDTH), "text_projection": (WIDTH, 8),
        "token_embedding.weight": (len(TOKENS), WIDTH), "ln_final.weight": (WIDTH,), "ln_final.bias": (WIDTH,),
        "visual.class_embedding": (WIDTH,), "visual.positional_embedding": (5, WIDTH), "visual.proj": (WIDTH, 8),
        "visual.conv1.weight": (WIDTH, 3, 4, 4),
    }  # fmt: skip
    for name in ("ln_pre", "ln_post"):
        shapes |= {f"visual.{name}.weight": (WIDTH,), f"visual.{name}.bias": (WIDTH,)}
    for at, hidden in (("visual.", HIDDEN), ("", 4 * WIDTH)):
        for layer in range(2):
            shapes |= _block(
                f"{at}transformer.resblocks.{layer}.",
                {"ln_1": (WIDTH,), "ln_2": (WIDTH,), "attn.out_proj": (WIDTH, WIDTH), "mlp.c_fc": (hidden, WIDTH),
                 "mlp.c_proj": (WIDTH, hidden)},
            )  # fmt: skip
            inner = f"{at}transformer.resblocks.{layer}.attn.in_proj_"
            shapes |= {f"{inner}weight": (3 * WIDTH, WIDTH), f"{inner}bias": (3 * WIDTH,)}
    return shapes


def _timm_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 5, WIDTH)}
    shapes |= _block("", {"norm": (WIDTH,), "head": (3, WIDTH)}) | {"patch_embed.proj.weight": (WIDTH, 3, 4, 4)}
    shapes["patch_embed.proj.bias"] = (WIDTH,)
    for layer in range(2):
        shapes |= _block(
            f"blocks.{layer}.",
            {"norm1": (WIDTH,), "norm2": (WIDTH,), "attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH),
             "mlp.fc1": (HIDDEN, WIDTH), "mlp.fc2": (WIDTH, HIDDEN)},
        )  # fmt: skip
    return shapes


def _block(at: str, weights: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Each with the bias of its outputs."""
    return {f"{at}{name}.{kind}": shape[:size] for name, shape in weights.items()
            for kind, size in (("weight", None), ("bias", 1))}  # fmt: skip


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {
            "image_size": 8, "patch_size": 4, "layers": 2, "width": WIDTH, "head_width": 4, "mlp_ratio": HIDDEN / WIDTH,
        },
        "text_cfg": {"context_length": 8, "vocab_size": len(TOKENS), "width": WIDTH, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}  # fmt: skip
TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 3,
    "model_args": {"img_size": 8, "patch_size": 4, "embed_dim": WIDTH, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5},
}


def write_tables(place: Path) -> None:
    """Models of open_clip, timm and torch, of which only the tensors are needed."""

    def open_clip(folder: Path, state: State) -> None:
        folder.mkdir(parents=True)
        (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
        save_file(state, folder / "open_clip_model.safetensors", {"format": "pt"})
        tokenizer(TOKENS, decoder=False).save_pretrained(folder)

    def timm(folder: Path, state: State) -> None:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(TIMM))
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    def encoder(folder: Path, state: State) -> None:
        folder.parent.mkdir(exist_ok=True)
        torch.save(state, folder.with_suffix(".pt"))

    layer = nn.TransformerEncoderLayer(WIDTH, 4, HIDDEN, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
    write_table(place / "open_clip", _open_clip_shapes(), 50_000, open_clip)
    write_table(place / "timm", _timm_shapes(), 51_000, timm)
    write_table(place / "encoder", {name: t.shape for name, t in stack.state_dict().items()}, 52_000, encoder)


def write_table(place: Path, shapes: Mapping[str, Any], seed: int, write: Callable[[Path, State], None]) -> None:
    """The roles of a family, from names and shapes."""

    def random(number: int) -> State:
        generator = torch.Generator().manual_seed(seed + number)
        return {name: drawn(name, shape, generator) for name, shape in shapes.items()}

    def mixed(state: State, number: int, size: float) -> State:
        other = random(number)
        return {name: (t + size * (other[name] - other[name].mean())).contiguous() for name, t in state.items()}

    old = random(0)
    write(place / "old", old)
    write(place / "tuned", mixed(old, 1, 0.08))
    write(place / "continued", mixed(old, 2, 0.1))
    write(place / "moved", mixed(reordered(old, seed), 3, 0.2))
    write(place / "independent", random(4))


def write_broken(place: Path) -> None:
    """Models that have to be refused."""
    for name in ("nan", "missing"):
        folder = place / "broken" / name
        folder.mkdir(parents=True)
        state = load_file(place / "bert" / "tuned" / "model.safetensors")
        first = sorted(name for name in state if "attention" in name)[0]
        if name == "nan":
            state[first][0] = float("nan")
        else:
            del state[first]
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text((place / "bert" / "tuned" / "config.json").read_text())
