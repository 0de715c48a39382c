"""Image models of open_clip and timm, one row each: their config, and the tensors that those libraries save.

`tests/test_layouts.py` uses the tables alone, so that these layouts are tested where the libraries are not installed.
`tests/test_vision_libraries.py` builds the real models, and holds the tables against them.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from families import Case, Loaded, State, loaded, randomise
from transfuse.running.building import seeded_inputs

Shapes = dict[str, tuple[int, ...]]

# Both towers are 16 wide with 4 heads, 2 layers deep, over 4 patches of an 8 x 8 image.
_OPEN_CLIP_BLOCK = """
ln_1.*               16
attn.in_proj_weight  48,16
attn.in_proj_bias    48
attn.out_proj.*      16,16
ln_2.*               16
mlp.c_fc.*           {hidden},16
mlp.c_proj.*         16,{hidden}
"""
_SCALED = """
ls_1.gamma           16
ls_2.gamma           16
"""
_OPEN_CLIP_VISUAL = """
class_embedding      16
positional_embedding 5,16
proj                 16,8
conv1.weight         16,3,4,4
ln_pre.*             16
ln_post.*            16
"""
_OPEN_CLIP_TEXT = """
token_embedding.weight  40,16
ln_final.*              16
"""
_TIMM_BLOCK = """
norm1.*              16
attn.qkv.*           48,16
attn.proj.*          16,16
norm2.*              16
mlp.fc1.*            24,16
mlp.fc2.*            16,24
"""
_TIMM = "patch_embed.proj.*   16,3,4,4"
_NORM = "norm.*  16"
_HEAD = "head.*  3,16"
_TIMM_POOL = """
attn_pool.latent     1,1,16
attn_pool.q.*        16,16
attn_pool.kv.*       32,16
attn_pool.proj.*     16,16
attn_pool.norm.*     16
attn_pool.mlp.fc1.*  24,16
attn_pool.mlp.fc2.*  16,24
"""


def _shapes(table: str, at: str = "") -> Shapes:
    """Rows `name shape` (`()`: a scalar); `name.*` is a weight of that shape and the bias of its outputs."""
    found: Shapes = {}
    for line in filter(None, table.splitlines()):
        name, text = line.split()
        shape = () if text == "()" else tuple(map(int, text.split(",")))
        if name.endswith(".*"):
            found[f"{at}{name[:-1]}bias"] = shape[:1]
            name = f"{name[:-1]}weight"
        found[at + name] = shape
    return found


def _layers(table: str, at: str) -> Shapes:
    return _shapes(table, f"{at}0.") | _shapes(table, f"{at}1.")


def _open_clip_shapes(extra: str, *, text: str = "", scaled: bool = False) -> Shapes:
    block = _OPEN_CLIP_BLOCK + (_SCALED.lstrip() if scaled else "")
    return (
        _shapes(extra)
        | _shapes(_OPEN_CLIP_VISUAL, "visual.")
        | _layers(block.replace("{hidden}", "24"), "visual.transformer.resblocks.")
        | _shapes(_OPEN_CLIP_TEXT, text)
        | _layers(block.replace("{hidden}", "64"), f"{text}transformer.resblocks.")
    )


def _timm_shapes(tokens: str, *, norm: str = _NORM, block: str = "", extra: str = _HEAD) -> Shapes:
    around = "\n".join((_TIMM, tokens, norm, extra))
    return _shapes(around) | _layers(_TIMM_BLOCK + block, "blocks.")


@dataclass(frozen=True)
class OpenClip:
    """A model of open_clip; `config` is its `model_cfg`."""

    config: Mapping[str, Any]

    def build(self) -> nn.Module:
        """The model with open_clip's own initial weights."""
        classes = importlib.import_module("open_clip.model")
        kwargs = {key: value for key, value in self.config.items() if key != "custom_text"}
        model_class = classes.CustomTextCLIP if self.config.get("custom_text") else classes.CLIP
        return model_class(**kwargs, output_dict=True)

    def save(self, folder: Path, seed: int, noise: float = 0.0) -> None:
        _write(folder, OPEN_CLIP_FILES, {"model_cfg": self.config}, randomise(self.build(), seed, noise).state_dict())

    def load(self, folder: Path) -> Loaded:
        model = _with_weights(self.build(), folder / OPEN_CLIP_FILES[1])
        return loaded(model, lambda inputs: model(**inputs))

    def inputs(self, config: Mapping[str, Any]) -> State:
        return seeded_inputs("open_clip", config, 0, torch.float64)


@dataclass(frozen=True)
class Timm:
    """A model of timm; `config` as in its config.json. Without classes, its features are its output."""

    config: Mapping[str, Any]

    def build(self) -> nn.Module:
        """The model with timm's own initial weights."""
        about, create = self.config, importlib.import_module("timm").create_model
        return create(about["architecture"], num_classes=about["num_classes"], **about["model_args"])

    def save(self, folder: Path, seed: int, noise: float = 0.0) -> None:
        _write(folder, TIMM_FILES, self.config, randomise(self.build(), seed, noise).state_dict())

    def load(self, folder: Path) -> Loaded:
        model = _with_weights(self.build(), folder / TIMM_FILES[1])
        name = "logits" if self.config["num_classes"] else "tokens" if self.pool == "" else "features"
        return loaded(model, lambda inputs: {name: model(inputs["x"])})

    @property
    def pool(self) -> str:
        """How tokens become features."""
        return self.config["model_args"].get("global_pool", "token")

    def inputs(self, config: Mapping[str, Any]) -> State:
        return seeded_inputs("timm", config, 0, torch.float64)


@dataclass(frozen=True)
class Table:
    """Random tensors of the given names and shapes, without any library."""

    config: Mapping[str, Any]
    shapes: Shapes
    files: tuple[str, str]

    def save(self, folder: Path, seed: int, noise: float = 0.0) -> None:
        weights, change = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1000)
        state = {}
        for name, shape in self.shapes.items():
            values = torch.randn(shape, dtype=torch.float64, generator=weights)
            state[name] = values + noise * torch.randn(shape, dtype=torch.float64, generator=change)
        _write(folder, self.files, self.config, state)

    def load(self, folder: Path) -> Loaded:
        raise NotImplementedError("there is no model behind a table")

    def inputs(self, config: Mapping[str, Any]) -> State:
        raise NotImplementedError("there is no model behind a table")


OPEN_CLIP_FILES = ("open_clip_config.json", "open_clip_model.safetensors")
TIMM_FILES = ("config.json", "model.safetensors")


def _write(folder: Path, files: tuple[str, str], config: Mapping[str, Any], state: State) -> None:
    folder.mkdir()
    (folder / files[0]).write_text(json.dumps(config))
    save_file({name: t.clone().contiguous() for name, t in state.items()}, folder / files[1], {"format": "pt"})


def _with_weights(model: nn.Module, path: Path) -> nn.Module:
    model.double().load_state_dict(load_file(path))
    return model


@dataclass(frozen=True)
class VisionCase:
    """A model of open_clip or timm.

    Attributes:
        library: its real class.
        shapes: the tensors it saves.
        unused: see `Case`.
    """

    name: str
    library: OpenClip | Timm
    shapes: Shapes
    unused: str = "(?!)"

    def from_library(self) -> Case:
        """The real model."""
        return self._case(self.library)

    def from_table(self) -> Case:
        """Its tensors alone."""
        files = OPEN_CLIP_FILES if isinstance(self.library, OpenClip) else TIMM_FILES
        about = self.library.config
        return self._case(Table({"model_cfg": about} if files is OPEN_CLIP_FILES else about, self.shapes, files))

    def _case(self, source: OpenClip | Timm | Table) -> Case:
        if isinstance(self.library, OpenClip):
            heads = "model_cfg.text_cfg.heads"
            return Case(self.name, "open_clip", source, heads, self.unused, OPEN_CLIP_FILES)
        return Case(self.name, "timm_vit", source, "model_args.num_heads", self.unused, TIMM_FILES)


_VISION = {"image_size": 8, "patch_size": 4, "layers": 2, "width": 16, "head_width": 4, "mlp_ratio": 1.5}
_TEXT = {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 4, "layers": 2}
_VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5}
_SCALE = {"ls_init_value": 0.1}


def _open_clip(name: str, shapes: Shapes, vision: dict[str, Any], text: dict[str, Any], **more: Any) -> VisionCase:
    config = {"embed_dim": 8, "vision_cfg": {**_VISION, **vision}, "text_cfg": {**_TEXT, **text}, **more}
    return VisionCase(f"open_clip-{name}", OpenClip(config), shapes)


def _timm(name: str, architecture: str, shapes: Shapes, classes: int = 3, **more: Any) -> VisionCase:
    config = {"architecture": architecture, "num_classes": classes, "model_args": {**_VIT, **more}}
    return VisionCase(f"timm-{name}", Timm(config), shapes)


_PLAIN_CLIP = """
logit_scale           ()
positional_embedding  8,16
text_projection       16,8
"""
_CUSTOM_CLIP = """
logit_scale                ()
text.positional_embedding  8,16
text.text_projection       16,8
"""
_CLS_CLIP = """
logit_scale                ()
logit_bias                 ()
text.cls_emb               16
text.positional_embedding  9,16
text.text_projection.*     8,16
"""
_CLS = "cls_token  1,1,16\npos_embed  1,5,16"
_REG = "cls_token  1,1,16\nreg_token  1,2,16\npos_embed  1,7,16"
_DIST = "cls_token  1,1,16\ndist_token  1,1,16\npos_embed  1,6,16\nhead_dist.*  3,16"
_NO_CLS = "pos_embed  1,4,16"
_GAMMAS = "ls1.gamma  16\nls2.gamma  16"

VISION_CASES: tuple[VisionCase, ...] = (
    _open_clip("plain", _open_clip_shapes(_PLAIN_CLIP), {}, {}),
    _open_clip("quick-gelu", _open_clip_shapes(_PLAIN_CLIP), {}, {}, quick_gelu=True),
    _open_clip("scaled", _open_clip_shapes(_PLAIN_CLIP, scaled=True), _SCALE, _SCALE),
    _open_clip("custom", _open_clip_shapes(_CUSTOM_CLIP, text="text."), {}, {}, custom_text=True),
    _open_clip(
        "custom-cls",
        _open_clip_shapes(_CLS_CLIP, text="text.", scaled=True),
        _SCALE,
        {**_SCALE, "embed_cls": True, "proj_bias": True},
        custom_text=True,
        init_logit_bias=0.0,
    ),
    _timm("plain", "vit_tiny_patch16_224", _timm_shapes(_CLS)),
    _timm("scaled", "vit_tiny_patch16_224", _timm_shapes(_CLS, block=_GAMMAS), init_values=0.1),
    _timm("registers", "vit_tiny_patch16_224", _timm_shapes(_REG), reg_tokens=2),
    _timm("distilled", "deit_tiny_distilled_patch16_224", _timm_shapes(_DIST)),
    _timm(
        "map",
        "vit_tiny_patch16_224",
        _timm_shapes(_NO_CLS, extra=_HEAD + _TIMM_POOL),
        class_token=False,
        global_pool="map",
    ),
    _timm(
        "mean",
        "vit_tiny_patch16_224",
        _timm_shapes(_NO_CLS, norm="fc_norm.*  16"),
        class_token=False,
        global_pool="avg",
        fc_norm=True,
    ),
    _timm("features", "vit_tiny_patch16_224", _timm_shapes(_CLS, extra=""), classes=0),
    _timm("tokens", "vit_tiny_patch16_224", _timm_shapes(_CLS, extra=""), classes=0, global_pool=""),
    _timm(
        "pooled-features",
        "vit_tiny_patch16_224",
        _timm_shapes(_NO_CLS, extra=_TIMM_POOL),
        classes=0,
        class_token=False,
        global_pool="map",
    ),
)
