"""Real model classes, built from a config and a state dict: for checks only, matching and transport never need them."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .reference import ReferenceConfig, forward

State = Mapping[str, Tensor]
Runner = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


class Unavailable(Exception):
    """There is no model class here to run this checkpoint with; the message says what is missing."""


def build_runner(kind: str, config: Mapping[str, Any], state: State, prefix: str = "") -> Runner:
    """A function from inputs to outputs by name, for the real model with these weights.

    Args:
        kind: as in `Checkpoint.kind`.
        config: the model's config.
        state: weights under their on-disk names, all of one floating dtype.
        prefix: what stands before a bare stack's names (torch_encoder).

    Raises:
        Unavailable: no class is known or installed for it.
        InputError: weights are missing for the class.
    """
    if kind == "open_clip":
        return _module_runner(_load(_open_clip(config), state), ("image_features", "text_features", "logit_scale"))
    if kind == "timm":
        return _module_runner(_load(_timm(config), state), ("logits",))
    if config.get("model_type") == "transfuse_reference":
        return _reference_runner(config, state)
    if config.get("model_type") in (None, "torch_encoder"):
        return _module_runner(_load(_torch_encoder(config, state, prefix), _strip(state, prefix)), ("output",))
    model, missing = load_transformers(config, state)
    if missing:
        raise InputError(f"the model class {type(model).__name__} misses weights: {', '.join(sorted(missing)[:5])}")
    return _transformers_runner(model)


def load_transformers(config: Mapping[str, Any], state: State) -> tuple[nn.Module, set[str]]:
    """The transformers model of a config with the weights of a state dict, and the names it misses."""
    import transformers

    dtype = next(t.dtype for t in state.values() if t.is_floating_point())
    built, model_class = _transformers_class(config)
    with _quiet(transformers):
        model, info = model_class.from_pretrained(
            None, config=built, state_dict=dict(state), dtype=dtype, output_loading_info=True
        )
    return model.eval(), set(info["missing_keys"])


def seeded_inputs(kind: str, config: Mapping[str, Any], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random inputs that the model of this config accepts, two samples, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)

    def pixels(about: Mapping[str, Any], size_key: str = "image_size") -> Tensor:
        size = about.get(size_key, 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        shape = (2, about.get("num_channels", 3), height, width)
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    def ids(about: Mapping[str, Any]) -> Tensor:
        length = min(
            12, int(about.get("max_position_embeddings", about.get("context_length", about.get("tokens", 16)))) - 2
        )
        vocab = int(about.get("vocab_size", about.get("vocab", 49408)))
        return torch.randint(2, vocab, (2, length), generator=generator)

    model_type = str(config.get("model_type"))
    if kind == "open_clip":
        about = config["model_cfg"]
        text = torch.randint(
            2,
            about["text_cfg"].get("vocab_size", 49408),
            (2, about["text_cfg"].get("context_length", 77)),
            generator=generator,
        )
        return {"image": pixels(about["vision_cfg"]), "text": text}
    if kind == "timm":
        return {
            "x": pixels(
                {
                    "image_size": _timm_image_size(config),
                    "num_channels": config.get("model_args", {}).get("in_chans", 3),
                }
            )
        }
    if model_type == "transfuse_reference":
        return {"ids": torch.randint(0, config["vocab"], (4, config["tokens"]), generator=generator)}
    if model_type in ("None", "torch_encoder"):
        return {"src": torch.randn(2, 9, int(config["d_model"]), dtype=torch.float64, generator=generator).to(dtype)}
    inputs: dict[str, Tensor] = {}
    if "vision_config" in config or "patch_size" in config:
        inputs["pixel_values"] = pixels({**config, **config.get("vision_config", {})})
    if "text_config" in config or "vocab_size" in config:
        inputs["input_ids"] = ids({**config, **config.get("text_config", {})})
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if any("MultipleChoice" in name for name in config.get("architectures") or ()):
        inputs = {name: one[:, None] for name, one in inputs.items()}
    if any("ImageClassification" in name for name in config.get("architectures") or ()):
        inputs = {"pixel_values": inputs["pixel_values"]}
    return inputs


def _transformers_class(config: Mapping[str, Any]) -> tuple[Any, Any]:
    import transformers

    model_type = str(config.get("model_type"))
    try:
        plain = {key: value for key, value in config.items() if key not in ("axes", "prefix", "auto_map")}
        built = transformers.AutoConfig.for_model(**plain)
    except (ValueError, TypeError) as error:
        raise Unavailable(f"transformers knows no model of type {model_type!r}") from error
    named = [getattr(transformers, name, None) for name in config.get("architectures") or ()]
    found = next((one for one in named if one is not None), None)
    if found is None:
        found = transformers.AutoModel._model_mapping[type(built)]
    built._attn_implementation = "eager"
    return built, found


def _transformers_runner(model: nn.Module) -> Runner:
    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            found = model(**inputs)
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    return run


def _module_runner(model: nn.Module, names: tuple[str, ...]) -> Runner:
    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            found = model(**inputs)
        if isinstance(found, dict):
            return {name: value for name, value in found.items() if isinstance(value, Tensor)}
        return dict(zip(names, found if isinstance(found, tuple) else (found,), strict=False))

    return run


def _reference_runner(config: Mapping[str, Any], state: State) -> Runner:
    fields = {key: config[key] for key in ReferenceConfig.__dataclass_fields__ if key in config}
    return lambda inputs: {"logits": forward(ReferenceConfig(**fields), state, inputs["ids"])}


def _torch_encoder(config: Mapping[str, Any], state: State, prefix: str) -> nn.Module:
    layers = {
        name.removeprefix(f"{prefix}layers.").split(".")[0] for name in state if name.startswith(f"{prefix}layers.")
    }
    hidden, width = state[f"{prefix}layers.0.linear1.weight"].shape
    layer = nn.TransformerEncoderLayer(
        d_model=width,
        nhead=int(config.get("num_heads", config.get("nhead", 0))),
        dim_feedforward=hidden,
        dropout=0.0,
        activation=config.get("activation", "relu"),
        layer_norm_eps=float(config.get("layer_norm_eps", 1e-5)),
        batch_first=True,
        norm_first=bool(config.get("norm_first", False)),
        bias=f"{prefix}layers.0.linear1.bias" in state,
    )
    norm = nn.LayerNorm(width) if f"{prefix}norm.weight" in state else None
    return nn.TransformerEncoder(layer, len(layers), norm=norm, enable_nested_tensor=False)


def _strip(state: State, prefix: str) -> dict[str, Tensor]:
    inside = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    return {name: t for name, t in inside.items() if name.startswith(("layers.", "norm."))}


def _open_clip(config: Mapping[str, Any]) -> nn.Module:
    model = _import("open_clip.model", "vision")
    about = dict(config["model_cfg"])
    kwargs = {key: value for key, value in about.items() if key not in ("custom_text", "multimodal_cfg")}
    if about.get("custom_text"):
        return model.CustomTextCLIP(**kwargs, output_dict=True)
    return model.CLIP(**kwargs, output_dict=True)


def _timm(config: Mapping[str, Any]) -> nn.Module:
    timm = _import("timm", "vision")
    kwargs = {"num_classes": config.get("num_classes", 1000), **config.get("model_args", {})}
    if config.get("global_pool"):
        kwargs["global_pool"] = config["global_pool"]
    return timm.create_model(str(config["architecture"]), pretrained=False, **kwargs)


def _timm_image_size(config: Mapping[str, Any]) -> Any:
    args = config.get("model_args", {})
    return args.get("img_size") or config.get("pretrained_cfg", {}).get("input_size", (3, 224, 224))


def _import(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # torchvision beside a torch it was not built for: RuntimeError
        raise Unavailable(f"{name} cannot be imported (pip install 'transfuse[{extra}]'): {error}") from error


def _load(model: nn.Module, state: State) -> nn.Module:
    dtype = next(t.dtype for t in state.values() if t.is_floating_point())
    missing, _ = model.to(dtype).load_state_dict(dict(state), strict=False)
    buffers = {name for name, _ in model.named_buffers()}
    if wanted := sorted(set(missing) - buffers):
        raise InputError(f"the model class {type(model).__name__} misses weights: {', '.join(wanted[:5])}")
    return model.eval()


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silences transformers' progress bars and advice; what matters is in the loading info."""
    logger = logging.getLogger("transformers")
    level, bars = logger.level, transformers.utils.logging.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
