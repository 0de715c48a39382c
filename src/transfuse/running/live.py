"""Models that run: the real class of a checkpoint, with its processors."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..files.configs import Unavailable, quiet_transformers
from ..files.folders import PROCESSOR_FILES, TOKENIZER_CONFIG, VOCABULARY_FILES
from ..files.opening import open_checkpoint
from ..models.plan import LABEL_HEAD
from .building import Loading, load_transformers
from .idle import Idle, dtype_of

State = Mapping[str, Tensor]

_FIRST = 1000


@dataclass(frozen=True)
class LiveModel:
    """A model with what makes its inputs.

    Attributes:
        model: the real transformers class, in eval mode.
        config: as in its config.json.
        image_processor, tokenizer: None where the folder has none.
        location: where config and processors come from.
        shapes: names and shapes of its weights as stored; transformers names many of them otherwise in memory.
    """

    model: nn.Module
    config: Mapping[str, Any]
    image_processor: Any
    tokenizer: Any
    location: str
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def stored_names(self) -> Mapping[str, str]:
        """Name of a parameter in memory -> its name as stored; parameters that are not stored are left out."""
        return _stored_names(self)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def has_decoder(self) -> bool:
        """Whether it has a decoder beside an encoder."""
        return "decoder_input_ids" in inspect.signature(self.model.forward).parameters

    @property
    def channels(self) -> int:
        """Of the images that it takes; 3 if its config does not say."""
        config: Any = self.model.config
        return int(getattr(getattr(config, "vision_config", None) or config, "num_channels", 3))

    @property
    def positions(self) -> int | None:
        """Most tokens of a text; None: its config does not say."""
        config: Any = self.model.config
        found = getattr(getattr(config, "text_config", None) or config, "max_position_embeddings", None)
        # Of these the first positions start after the padding index.
        after = 2 if self.config.get("model_type") in ("roberta", "xlm-roberta", "camembert") else 0
        return None if found is None else int(found) - after

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(one.dtype for one in self.model.parameters() if one.is_floating_point())


def load_live(
    location: str | os.PathLike[str] | Checkpoint,
    *,
    state: State | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    idle: Idle | None = None,
) -> LiveModel:
    """Loads a model for evaluation or training.

    Args:
        location: model folder or hub id, in the format of transformers.
        state: weights under their stored names, instead of those at `location`; config and processors are still its.
        device: where to compute.
        dtype: what to compute in.
        idle: classes one of which may be filled instead of building another one.

    Raises:
        InputError: it cannot be read, its class is unknown, or weights that its class needs (a head) are missing.
    """
    checkpoint = _open(location)
    state = state if state is not None else {name: checkpoint.tensor(name) for name in checkpoint}
    model = _build(checkpoint.location, checkpoint.config, state, device, dtype, idle)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return of_checkpoint(checkpoint, model, checkpoint.config, shapes)


def of_checkpoint(
    checkpoint: Checkpoint, model: nn.Module, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]] = {}
) -> LiveModel:
    """A model that was built already, with the processors of a checkpoint."""
    folder = checkpoint.companions
    return LiveModel(
        model=model,
        config=config,
        image_processor=_image_processor(folder, checkpoint.location) if _sees(model) else None,
        tokenizer=_tokenizer(folder, checkpoint.location),
        location=checkpoint.location,
        shapes=shapes,
    )


def with_state(live: LiveModel, state: State) -> LiveModel:
    """The same class and processors with other weights, on the same device, in the same dtype.

    Args:
        state: all weights under stored names, as `PortResult.state_dict` gives them.

    Raises:
        InputError: weights are missing, of other shapes, or a head has no place in the class.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != live.shapes:
        model = _build(live.location, live.config, state, live.device, live.dtype)
        return replace(live, model=model, shapes=shapes)
    model = copy.deepcopy(live.model)
    given = {name: state[stored].to(live.dtype) for name, stored in live.stored_names.items()}
    given |= {name: state[name] for name, _ in model.named_buffers() if name in state}
    model.load_state_dict(given, strict=False)
    new = replace(live, model=model.eval())
    new.__dict__["stored_names"] = live.stored_names
    return new


def module_params(live: LiveModel, state: State) -> dict[str, Tensor]:
    """Stored tensors under the names that parameters have in memory, for `torch.func.functional_call`.

    The tensors are passed on as they are, so gradients flow to them. What the class has no parameter for is left out.
    """
    return {name: state[stored] for name, stored in live.stored_names.items() if stored in state}


def _open(location: str | os.PathLike[str] | Checkpoint) -> Checkpoint:
    checkpoint = open_checkpoint(location)
    if checkpoint.kind != "transformers":
        raise InputError(
            f"{checkpoint.location}: a checkpoint of kind {checkpoint.kind!r}; only models in the format of "
            "transformers (config.json with a model_type) are run on data. CLIPs of open_clip can be converted: "
            "transfuse convert"
        )
    return checkpoint


def _build(
    location: str,
    config: Mapping[str, Any],
    state: State,
    device: Any,
    dtype: torch.dtype,
    idle: Idle | None = None,
) -> nn.Module:
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    model, loading = load_class(location, config, cast, idle)
    kind = type(model).__name__
    if loading.missing or loading.mismatched:
        fault = "lacks weights of" if loading.missing else "has other shapes than"
        raise InputError(
            f"{location}: the checkpoint {fault} {kind}: {_some(loading.missing or loading.mismatched)}. A base model "
            "has no trained head: give a fine-tuned model, or train the head first (transfuse finetune)"
        )
    # Without a word only poolers and language model heads may go.
    if lost := [name for name in loading.unexpected if LABEL_HEAD.match(name)]:
        raise InputError(f"{location}: {kind} has no place for {_some(lost)}; its config names another architecture")
    return model.to(device)


def load_class(
    location: str, config: Mapping[str, Any], state: State, idle: Idle | None = None
) -> tuple[nn.Module, Loading]:
    """The transformers model with the fastest attention it has, and what did not fit.

    Args:
        location: for messages.
        config, state: what it is made of.
        idle: classes one of which may be filled instead of building another one.

    Raises:
        InputError: the class cannot be built here.
    """
    try:
        into = None if idle is None else idle.take(config, dtype_of(state))
        model, loading = load_transformers(config, state, into)
    except Unavailable as error:
        raise InputError(f"{location}: {error}") from error
    if getattr(model, "_supports_sdpa", False) and hasattr(model, "set_attn_implementation"):
        with quiet_transformers():
            model.set_attn_implementation("sdpa")  # type: ignore[operator]
    return model.eval(), loading


def _some(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _stored_names(live: LiveModel) -> dict[str, str]:
    """Loads tensors that hold their own number, and looks where each number went."""
    stored = sorted(live.shapes)
    # From 1000 on: a norm that is not stored starts as 1, a bias as 0.
    numbered = {name: torch.full(live.shapes[name], float(n)) for n, name in enumerate(stored, _FIRST)}
    model, _ = load_class(live.location, live.config, numbered)
    found = {}
    for name, parameter in model.named_parameters():
        low, high = parameter.detach().aminmax()
        number = int(low) - _FIRST
        # A class may fuse several stored tensors into one parameter.
        if low != high or low != int(low) or not 0 <= number < len(stored):
            raise InputError(
                f"{live.location}: the parameter {name} is not one stored tensor, so it cannot be exchanged"
            )
        found[name] = stored[number]
    return found


# --- processors ---------------------------------------------------------------------------------------------------


def _sees(model: Any) -> bool:
    return any(hasattr(model.config, key) for key in ("vision_config", "patch_size", "num_channels"))


def _image_processor(folder: Path | None, location: str) -> Any:
    if folder is None or not any((folder / name).exists() for name in PROCESSOR_FILES):
        return None
    import transformers

    # Pillow gives the same pixels whether or not torchvision is there.
    version = int(transformers.__version__.split(".")[0])
    choice: dict[str, Any] = {"backend": "pil"} if version >= 5 else {"use_fast": False}
    try:
        with quiet_transformers():
            return transformers.AutoImageProcessor.from_pretrained(str(folder), trust_remote_code=False, **choice)
    except (OSError, ValueError, TypeError, ImportError, LookupError, AttributeError) as error:
        raise InputError(f"{location}: its image processor cannot be loaded: {error}") from error


def _tokenizer(folder: Path | None, location: str) -> Any:
    signs = (*VOCABULARY_FILES, TOKENIZER_CONFIG)  # tokenizers of bytes have no vocabulary
    if folder is None or not any((folder / name).exists() for name in signs):
        return None
    import transformers

    try:
        with quiet_transformers():
            return transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError, TypeError, ImportError, LookupError, AttributeError) as error:
        # What transformers says of a sentencepiece model alone names another package.
        alone = (folder / "spiece.model").exists() and not (folder / "tokenizer.json").exists()
        hint = " (it is a sentencepiece model: pip install 'transfuse[t5]')" if alone else ""
        raise InputError(f"{location}: its tokenizer cannot be loaded{hint}: {error}") from error
