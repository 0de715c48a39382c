"""A CLIP of open_clip as one of transformers: which tensor is which, and its config."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from ..errors import InputError
from .checkpoint import Checkpoint

# Pixel statistics that open_clip takes where its config gives none: those of the first CLIP.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


_RESAMPLING = {"bicubic": 3, "bilinear": 2}


# What a config may say that changes nothing at inference, and what a key has to be if it is there.
_FREE = {
    "vision_cfg": {"image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "patch_dropout",
                   "attn_pooler_queries", "attn_pooler_heads", "output_tokens", "pos_embed_type", "norm_kwargs",
                   "final_ln_after_pool"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id",
                 "output_tokens", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "norm_kwargs"},
    "model_cfg": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale",
                  "nonscalar_logit_scale", "cast_dtype", "output_dict"},
}  # fmt: skip


_WANTED = {"pool_type": ("tok", "argmax", "eos"), "proj_type": ("linear",), "block_type": ("default",)}


_LAYER = (
    ("ln_1.*", "layer_norm1.*"),
    ("attn.out_proj.*", "self_attn.out_proj.*"),
    ("ln_2.*", "layer_norm2.*"),
    ("mlp.c_fc.*", "mlp.fc1.*"),
    ("mlp.c_proj.*", "mlp.fc2.*"),
)


_AROUND = (
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.*", "text_model.final_layer_norm.*"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.ln_pre.*", "vision_model.pre_layrnorm.*"),
    ("visual.ln_post.*", "vision_model.post_layernorm.*"),
    ("logit_scale", "logit_scale"),
)


_TRANSPOSED = (("text_projection", "text_projection.weight"), ("visual.proj", "visual_projection.weight"))


_TEXT = re.compile(r"text_(model|projection)\.")


@dataclass(frozen=True)
class Piece:
    """Where a tensor of transformers comes from.

    Attributes:
        name: in the checkpoint that is converted.
        third: which third of the rows: 0 for q, 1 for k, 2 for v; None: all.
        transposed: whether it is stored the other way round.
    """

    name: str
    third: int | None = None
    transposed: bool = False

    def of(self, stored: Tensor) -> Tensor:
        """The tensor, from the stored one."""
        part = stored if self.third is None else stored.chunk(3)[self.third]
        return (part.T if self.transposed else part).contiguous()


@dataclass(frozen=True)
class Conversion:
    """A model of transformers inside another checkpoint.

    Attributes:
        config: its config.json.
        pieces: name of a tensor -> where it comes from.
        processor: its preprocessor_config.json; None for a model without images.
    """

    config: Mapping[str, Any]
    pieces: Mapping[str, Piece]
    processor: Mapping[str, Any] | None


def conversion(checkpoint: Checkpoint, tower: Literal["text"] | None = None) -> Conversion:
    """What is to be written for a checkpoint.

    Raises:
        InputError: the class of transformers cannot hold it; the message names the config key or the tensor.
    """
    if checkpoint.kind == "open_clip":
        whole = _of_open_clip(checkpoint)
    elif checkpoint.kind == "transformers" and checkpoint.config.get("model_type") == "clip":
        whole = Conversion(checkpoint.config, {name: Piece(name) for name in checkpoint}, None)
    else:
        raise InputError(
            f"{checkpoint.location}: a checkpoint of kind {checkpoint.kind!r} "
            f"({checkpoint.config.get('model_type') or 'no model_type'}); CLIPs of open_clip are converted"
        )
    if tower is None and checkpoint.kind == "transformers":
        raise InputError(f"{checkpoint.location}: it is in the format of transformers already")
    return whole if tower is None else _text_tower(whole)


def _text_tower(whole: Conversion) -> Conversion:
    pieces = {name: piece for name, piece in whole.pieces.items() if is_of_text_tower(name)}
    return Conversion(text_config(whole.config), pieces, None)


def is_of_text_tower(name: str) -> bool:
    """Whether a tensor of CLIPModel is one of the text tower or its projection."""
    return _TEXT.match(name) is not None


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the text tower with its projection, out of a CLIPModel's."""
    text = {key: value for key, value in (config.get("text_config") or {}).items() if key != "_name_or_path"}
    about = {"model_type": "clip_text_model", "architectures": ["CLIPTextModelWithProjection"]}
    return {**text, **about, "projection_dim": config.get("projection_dim", 512)}


def _of_open_clip(checkpoint: Checkpoint) -> Conversion:
    about = checkpoint.config.get("model_cfg")
    if not isinstance(about, Mapping) or not all(
        isinstance(about.get(key), Mapping) for key in ("vision_cfg", "text_cfg")
    ):
        raise InputError(f"{checkpoint.location}: open_clip_config.json has no model_cfg with vision_cfg and text_cfg")
    _refuse_config(checkpoint.location, about)
    pieces = open_clip_pieces(checkpoint.headers)
    _refuse_tensors(checkpoint, pieces)
    config = _config(checkpoint, about, pieces)
    return Conversion(config, pieces, _image_processor(checkpoint, config["vision_config"]["image_size"]))


def open_clip_pieces(names: Iterable[str]) -> dict[str, Piece]:
    """Name of a tensor of `CLIPModel` -> where it is in an open_clip checkpoint with these names."""
    found: dict[str, Piece] = {}
    for stored in names:
        plain = stored.removeprefix("text.")  # of models that keep their text tower in a module of its own
        for name, piece in _targets(plain):
            found[name] = replace(piece, name=stored)
    return found


def _targets(name: str) -> Iterable[tuple[str, Piece]]:
    """The tensors of transformers that one of open_clip holds."""
    plain, here = name, ""
    block = re.match(r"(visual\.)?transformer\.resblocks\.(\d+)\.", name)
    if block:
        here = f"{'vision' if block[1] else 'text'}_model.encoder.layers.{block[2]}."
        plain = name[block.end() :]
        fused = re.fullmatch(r"attn\.in_proj_(weight|bias)", plain)
        if fused:
            return [(f"{here}self_attn.{part}_proj.{fused[1]}", Piece(name, i)) for i, part in enumerate("qkv")]
    for old, new in _LAYER if block else (*_AROUND, *_TRANSPOSED):
        stem = old.removesuffix("*")
        if plain == old or (stem != old and plain.startswith(stem) and plain[len(stem) :] in ("weight", "bias")):
            transposed = (old, new) in _TRANSPOSED
            return [(here + new.removesuffix("*") + plain[len(stem) :], Piece(name, None, transposed))]
    return []


def _refuse_config(where: str, about: Mapping[str, Any]) -> None:
    """Refuses what makes another function of the same tensors, or other tensors."""
    for section, part in (("model_cfg", about), *((key, about[key]) for key in ("vision_cfg", "text_cfg"))):
        for key, value in part.items():
            # What is off or empty is as if it were not there.
            if key in _FREE[section] or value in (None, False, 0, {}, "") or value in _WANTED.get(key, ()):
                continue
            raise InputError(
                f"{where}: its {section} has {key} = {json.dumps(value, default=str)}, which CLIPModel cannot hold"
            )
    vision, text = about["vision_cfg"], about["text_cfg"]
    if not isinstance(vision.get("layers", 12), int):
        raise InputError(f"{where}: its vision_cfg has layers = {vision['layers']}: a ResNet, which CLIPModel is not")
    if text.get("pool_type") == "eos" and text.get("eos_id", 2) == 2:
        raise InputError(
            f"{where}: its text_cfg pools at the token eos_id = 2; CLIPModel takes that number for the sign of an old "
            "config and pools at the highest token instead"
        )


def _refuse_tensors(checkpoint: Checkpoint, pieces: Mapping[str, Piece]) -> None:
    used = {piece.name for piece in pieces.values()}
    # A causal mask, which some files hold, is no weight.
    left = [name for name in checkpoint if name not in used and not name.endswith("attn_mask")]
    if left:
        raise InputError(
            f"{checkpoint.location}: CLIPModel has no place for tensor {left[0]!r} {checkpoint.headers[left[0]].shape}"
            + (f" and {len(left) - 1} more" if left[1:] else "")
        )
    needed = [new for _, new in (*_AROUND, *_TRANSPOSED) if not new.endswith("*")]
    needed += ["vision_model.pre_layrnorm.weight", "vision_model.encoder.layers.0.mlp.fc1.weight"]
    needed += ["text_model.encoder.layers.0.mlp.fc1.weight"]
    if missing := [name for name in needed if name not in pieces]:
        raise InputError(f"{checkpoint.location}: it lacks what CLIPModel has as {missing[0]!r}")


def _config(checkpoint: Checkpoint, about: Mapping[str, Any], pieces: Mapping[str, Piece]) -> dict[str, Any]:
    """Sizes from the tensors; what they do not show from the config."""
    shapes = {name: checkpoint.headers[piece.name].shape for name, piece in pieces.items()}
    vision, text = about["vision_cfg"], about["text_cfg"]
    positions, width = shapes["vision_model.embeddings.position_embedding.weight"]
    patch = shapes["vision_model.embeddings.patch_embedding.weight"][-1]
    size = _image_size(checkpoint.location, vision.get("image_size", 224))
    if (size // patch) ** 2 + 1 != positions:
        raise InputError(
            f"{checkpoint.location}: images of {size} pixels have {(size // patch) ** 2} patches of {patch}, but there "
            f"are {positions} positions (one is the class token's)"
        )
    vocabulary, text_width = shapes["text_model.embeddings.token_embedding.weight"]
    activation = "quick_gelu" if about.get("quick_gelu") else "gelu"
    # CLIPModel pools at the highest token if its eos_token_id is 2, else at the first token of that number.
    end = int(text["eos_id"]) if text.get("pool_type") == "eos" else 2
    projection = shapes["text_projection.weight"][-1]  # stored input first

    def tower(name: str, part: Mapping[str, Any], wide: int, heads: int) -> dict[str, Any]:
        layers = {one.split(".")[3] for one in shapes if one.startswith(f"{name}_model.encoder.layers.")}
        if part.get("layers", 12) != len(layers) or wide % heads:
            raise InputError(
                f"{checkpoint.location}: {name}_cfg says {part.get('layers', 12)} layers and {heads} heads; the "
                f"tensors have {len(layers)} layers of width {wide}"
            )
        return {
            "model_type": f"clip_{name}_model",
            "hidden_size": wide,
            "intermediate_size": shapes[f"{name}_model.encoder.layers.0.mlp.fc1.weight"][0],
            "num_hidden_layers": len(layers),
            "num_attention_heads": heads,
            "hidden_act": activation,
            "layer_norm_eps": float((part.get("norm_kwargs") or {}).get("eps", 1e-5)),
            "projection_dim": projection,
        }

    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": projection,
        "text_config": {
            **tower("text", text, text_width, int(text.get("heads", 8))),
            "vocab_size": vocabulary,
            "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
            "bos_token_id": vocabulary - 2,
            "eos_token_id": end,
            "pad_token_id": int(text.get("pad_id", 0)),
        },
        "vision_config": {
            **tower("vision", vision, width, width // int(vision.get("head_width", 64))),
            "image_size": size,
            "patch_size": patch,
        },
    }


def _image_size(where: str, size: Any) -> int:
    sizes = list(size) if isinstance(size, list | tuple) else [size]
    if len(set(sizes)) != 1:
        raise InputError(f"{where}: images of {sizes} pixels; CLIPModel has square ones")
    return int(sizes[0])


def _image_processor(checkpoint: Checkpoint, size: int) -> dict[str, Any]:
    """A preprocessor_config.json that does what open_clip does at evaluation."""
    about = checkpoint.config.get("preprocess_cfg") or {}
    mode, way = about.get("resize_mode", "shortest"), about.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or way not in _RESAMPLING:
        raise InputError(
            f"{checkpoint.location}: its preprocess_cfg resizes by {mode!r} with {way!r}; shortest or squash, with "
            f"{' or '.join(_RESAMPLING)}, can be done"
        )
    square = {"height": size, "width": size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size} if mode == "shortest" else square,
        "resample": _RESAMPLING[way],
        "do_center_crop": mode == "shortest",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(about.get("mean") or _MEAN),
        "image_std": list(about.get("std") or _STD),
        "do_convert_rgb": True,
    }
