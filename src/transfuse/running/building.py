"""Real model classes, built from a config and a state dict: for checks only, matching and transport never need them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files.configs import Unavailable, complete_config, quiet_transformers, transformers_config
from .idle import Idle, dtype_of
from .reference import ReferenceConfig, forward

State = Mapping[str, Tensor]
Around = Callable[[nn.Module], AbstractContextManager[None]]

TEXT_CLASSIFIER = "CLIPTextModelForSequenceClassification"


@dataclass
class RealModel:
    """A real model class that runs with one state after the other; it is built for the first of them.

    Attributes:
        kind: as in `Checkpoint.kind`.
        config: the model's config.
        prefix: what stands before a bare stack's names (torch_encoder).
        optional: names (regular expressions) of heads that may be missing; they are set to zero, and so are their
            outputs. A body is often saved without the pooler that its class has.
        idle: classes of transformers one of which may be filled instead of building another one.
        module: the instance, once there is one.
    """

    kind: str
    config: Mapping[str, Any]
    prefix: str = ""
    optional: Sequence[str] = ()
    idle: Idle = field(default_factory=Idle)
    module: nn.Module | None = field(default=None, init=False)

    def run(self, state: State, inputs: Mapping[str, Tensor], around: Around | None = None) -> dict[str, Tensor]:
        """Its outputs by name.

        Args:
            state: weights under their on-disk names, all of one floating dtype.
            inputs: by name.
            around: a context for the run, made from the module (hooks, say).

        Raises:
            Unavailable: no class is known or installed for it, or `around` is given and it is not a module.
            InputError: weights are missing for the class.
        """
        if self.kind not in ("open_clip", "timm") and self.config.get("model_type") == "transfuse_reference":
            if around is not None:
                raise Unavailable("the reference transformer is not a module")
            return _reference_outputs(self.config, state, inputs)
        self.module = module = self._filled(state)
        with nullcontext() if around is None else around(module), torch.no_grad():
            found = module(**inputs)
        named = found if isinstance(found, Mapping) else self._named(found, state)
        # Some are parameters, which the next state overwrites.
        return {name: value.detach().clone() for name, value in named.items() if isinstance(value, Tensor)}

    def leave(self) -> None:
        """Leaves the instance to whoever needs one like it."""
        if self._is_of_transformers and self.module is not None:
            self.idle.give(self.config, self.module)
        self.module = None

    @property
    def _is_of_transformers(self) -> bool:
        return self.kind not in ("open_clip", "timm") and self.config.get("model_type") != "torch_encoder"

    def _filled(self, state: State) -> nn.Module:
        if self._is_of_transformers:
            return self._filled_transformers(state)
        if self.kind == "open_clip":
            return _load(_open_clip(self.config) if self.module is None else self.module, state)
        if self.kind == "timm":
            return _load(_timm(self.config) if self.module is None else self.module, state)
        module = _torch_encoder(self.config, state, self.prefix) if self.module is None else self.module
        return _load(module, _strip(state, self.prefix))

    def _filled_transformers(self, state: State) -> nn.Module:
        into = self.idle.take(self.config, dtype_of(state)) if self.module is None else self.module
        model, loading = load_transformers(self.config, state, into)
        if loading.mismatched:
            raise Unavailable(
                f"the shapes in {type(model).__name__} are others: {', '.join(sorted(loading.mismatched)[:5])}"
            )
        if wanted := sorted(name for name in loading.missing if not _is_one_of(name, self.optional)):
            raise InputError(f"the model class {type(model).__name__} misses weights: {', '.join(wanted[:5])}")
        for name in loading.missing:
            model.get_parameter(name).data.zero_()
        return model

    def _named(self, found: Any, state: State) -> dict[str, Tensor]:
        """Outputs that come without names."""
        if self.kind == "timm":
            return {"logits" if "head.weight" in state else "features" if found.dim() == 2 else "tokens": found}
        names = ("image_features", "text_features", "logit_scale") if self.kind == "open_clip" else ("output",)
        return dict(zip(names, found if isinstance(found, tuple) else (found,), strict=False))


def _is_one_of(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name, with or without the prefix of its body, matches one of the patterns."""
    return any(re.search(rf"(?:^|\.)(?:{pattern})$", name) for pattern in patterns)


@dataclass(frozen=True)
class Loading:
    """What did not fit when a class loaded a state dict: names it misses, does not expect, has in other shapes."""

    missing: frozenset[str]
    unexpected: frozenset[str]
    mismatched: frozenset[str]


def load_transformers(
    config: Mapping[str, Any], state: State, into: nn.Module | None = None
) -> tuple[nn.Module, Loading]:
    """The transformers model of a config with the weights of a state dict, and what did not fit.

    Args:
        config, state: what it is made of.
        into: an instance of that class from the same config, whose weights nobody needs: it is filled, on the same way,
            instead of building another one. (Versions of transformers before 5 build another one.)

    Raises:
        Unavailable: the class cannot be built from this config here.
    """
    dtype = dtype_of(state)
    built, model_class = _transformers_class(config)
    try:
        with quiet_transformers():
            loader = model_class if into is None else _filling(model_class, into)
            model, info = loader.from_pretrained(
                None,
                config=built,
                state_dict=dict(state),
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (ImportError, LookupError, AttributeError, RuntimeError, ValueError, TypeError) as error:
        raise Unavailable(f"{model_class.__name__} cannot be built from this config: {error!r}") from error
    mismatched = frozenset(str(one[0]) for one in info["mismatched_keys"])
    if dtype == torch.float64:
        compute_in_double(model)
    return model.eval(), Loading(frozenset(info["missing_keys"]), frozenset(info["unexpected_keys"]), mismatched)


def _filling(model_class: Any, module: Any) -> Any:
    """The class, but its constructor gives this instance, as if it had just been built with eager attention."""
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:  # they load in place, where there must be something
        return model_class
    module.to("meta")
    for one in module.modules():
        one.__dict__.pop("_is_hf_initialized", None)  # else buffers that are not stored stay empty
    if getattr(module, "_supports_sdpa", False) and hasattr(module, "set_attn_implementation"):
        module.set_attn_implementation("eager")
    about = {"__new__": lambda *_, **__: module, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), about)


def compute_in_double(model: nn.Module) -> None:
    """Norms of T5 take the variance in float32 whatever the model is in, which would hide what float64 is to show."""
    norms: list[tuple[str, Any]] = [one for one in model.named_modules() if type(one[1]).__name__ == "T5LayerNorm"]
    for name, norm in norms:
        plain = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
        plain.weight = norm.weight
        model.set_submodule(name, plain)


def seeded_inputs(kind: str, config: Mapping[str, Any], seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random inputs that the model of this config accepts, from a generator of their own.

    Raises:
        Unavailable: the config does not say what the inputs look like.
    """
    draw = _Draw(torch.Generator().manual_seed(seed), dtype)
    try:
        if kind == "open_clip":
            vision, text = config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"]
            return {"image": draw.pixels(vision), "text": draw.ids(text, int(text.get("context_length", 77)))}
        if kind == "timm":
            channels = config.get("model_args", {}).get("in_chans", 3)
            return {"x": draw.pixels({"image_size": _timm_image_size(config), "num_channels": channels})}
        if config.get("model_type") == "transfuse_reference":
            return {"ids": draw.ids({"vocab_size": config["vocab"]}, config["tokens"])}
        if config.get("model_type") == "torch_encoder":
            return {"src": draw.normal(2, 9, int(config["d_model"]))}
        return _transformers_inputs(config, draw)
    except (LookupError, ValueError, TypeError, RuntimeError) as error:
        raise Unavailable(f"no inputs can be made from this config: {error!r}") from error


@dataclass(frozen=True)
class _Draw:
    """Two samples of random inputs."""

    generator: torch.Generator
    dtype: torch.dtype

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator).to(self.dtype)

    def pixels(self, about: Mapping[str, Any]) -> Tensor:
        size = about.get("image_size", 224)
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        return self.normal(2, about.get("num_channels", 3), height, width)

    def ids(self, about: Mapping[str, Any], length: int) -> Tensor:
        return torch.randint(2, int(about.get("vocab_size", 49408)), (2, length), generator=self.generator)


def _transformers_inputs(config: Mapping[str, Any], draw: _Draw) -> dict[str, Tensor]:
    architectures = " ".join(config.get("architectures") or ())
    inputs: dict[str, Tensor] = {}
    if "vision_config" in config or "patch_size" in config:
        inputs["pixel_values"] = draw.pixels({**config, **config.get("vision_config", {})})
    if ("text_config" in config or "vocab_size" in config) and "ImageClassification" not in architectures:
        about = {**config, **config.get("text_config", {})}
        length = min(12, int(about.get("max_position_embeddings", 16)) - 2)  # RoBERTa's positions start at 2
        inputs["input_ids"] = draw.ids(about, length)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if complete_config(config).get("is_encoder_decoder") and "EncoderModel" not in architectures:
            inputs["decoder_input_ids"] = draw.ids(about, 7)
    if "MultipleChoice" in architectures:
        inputs = {name: one[:, None] for name, one in inputs.items()}
    return inputs


def _transformers_class(config: Mapping[str, Any]) -> tuple[Any, Any]:
    import transformers

    built = transformers_config(config)
    named = [_own_class(name) or getattr(transformers, name, None) for name in config.get("architectures") or ()]
    found = next((one for one in named if one is not None), None)
    if found is None and named:
        raise Unavailable(f"transformers has no class {', '.join(config['architectures'])}")
    if found is None:
        try:
            found = transformers.AutoModel._model_mapping[type(built)]
        except LookupError as error:
            raise Unavailable(f"transformers has no plain model of type {config['model_type']!r}") from error
    built._attn_implementation = "eager"
    return built, found


def _own_class(name: str) -> Any:
    """A class of ours, built of transformers' parts."""
    if name != TEXT_CLASSIFIER:
        return None
    from . import text_tower

    return getattr(text_tower, name)


def _reference_outputs(config: Mapping[str, Any], state: State, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    fields = {key: config[key] for key in ReferenceConfig.__dataclass_fields__ if key in config}
    return {"logits": forward(ReferenceConfig(**fields), state, inputs["ids"])}


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
    missing, _ = model.to(dtype_of(state)).load_state_dict(dict(state), strict=False)
    buffers = {name for name, _ in model.named_buffers()}
    if wanted := sorted(set(missing) - buffers):
        raise InputError(f"the model class {type(model).__name__} misses weights: {', '.join(wanted[:5])}")
    return model.eval()
