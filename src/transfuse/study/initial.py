"""Models with random weights, complete with tokenizer and image processor: where training from scratch starts."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.splits import BaseModel, ConfigDict, DataSpec, Field, load_split
from ..errors import InputError
from ..files.configs import BAD_CONFIG, complete_config, quiet_transformers
from ..files.folders import IMAGE_PROCESSOR_FILE
from ..files.opening import open_checkpoint
from ..files.writing import Weights, check_output, write_checkpoint
from .open_clip_init import write_open_clip

# The usual order of BERT. The end is not token 2: CLIP takes that number for the sign of an old, wrong config and pools
# at the highest token instead.
_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "dropout_rate",
    "attention_dropout",
    "activation_dropout",
)
_BICUBIC = 3


class TokenizerSpec(BaseModel):
    """A WordPiece tokenizer, trained on the spot.

    Attributes:
        vocab_size: at most so many tokens, special ones included.
        data: data sets whose training texts it is trained on.
        texts: further texts, such as class names and prompts.
        lowercase: whether case is dropped.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    vocab_size: int = Field(default=8192, ge=16)
    data: list[DataSpec] = Field(default=[])
    texts: list[str] = Field(default=[])
    lowercase: bool = True


class InitSpec(BaseModel):
    """A model with random weights.

    Attributes:
        config: transformers config with `model_type` and `architectures`. Dropout is 0 unless it is given; vocabulary
            and special tokens are the tokenizer's. Or what open_clip_config.json holds (`model_cfg`), for a model in
            that format, which has to be converted.
        seed: of the weights.
        seeds: regular expression on parameter names -> another seed for those it finds: a text tower that models with
            different vision towers share, say. It is not shifted by a recipe's seed.
        std: if given, all matrices are drawn again from N(0, std). Small models learn faster with more than 0.02.
        tokenizer: None: the model gets none.
        image_size: None: that of the config.
        image_mean, image_std: of the image processor; None: 0.5 for each channel.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: dict[str, Any]
    seed: int = 0
    seeds: dict[str, int] = Field(default={})
    std: float | None = Field(default=None, gt=0)
    tokenizer: TokenizerSpec | None = None
    image_size: int | None = None
    image_mean: list[float] | None = None
    image_std: list[float] | None = None


def initialise(spec: InitSpec, out: str | Path, *, data_dir: Path | None = None, force: bool = False) -> Path:
    """Writes a model folder with random weights.

    Args:
        spec: what to make. The same spec gives the same bytes.
        out: folder to write.
        data_dir: where local data sets of the tokenizer lie.
        force: replace an existing model.

    Raises:
        InputError: the config cannot be built, or data are not there.
    """
    place = Path(out)
    check_output(place, force=force)
    config = copy.deepcopy(spec.config)
    tokenizer = None if spec.tokenizer is None else _train_tokenizer(spec.tokenizer, config, data_dir)
    with tempfile.TemporaryDirectory() as folder:
        if tokenizer is not None:
            config = _with_tokens(config, tokenizer)
            tokenizer.save_pretrained(folder)
        if "model_cfg" in config:
            files = {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}
            write_open_clip(config, place, seed=spec.seed, std=spec.std, files=files, force=force)
            return place
        model = _build(config, spec)
        if processor := _processor(spec, model.config.to_dict()):
            (Path(folder) / IMAGE_PROCESSOR_FILE).write_text(json.dumps(processor, indent=2) + "\n")
        save(model, Path(folder), place, {}, force=force)
    return place


def save(
    model: Any, folder: Path, out: Path, files: Mapping[str, str], *, companions: Path | None = None, force: bool
) -> None:
    """Saves a model in a scratch folder, and that as a whole to its place.

    Args:
        model: a transformers model.
        folder: scratch folder; what is in it already comes along.
        files: further files.
        companions: another model whose tokenizer and processor files come along.
    """
    with quiet_transformers():
        model.save_pretrained(folder)
    checkpoint = open_checkpoint(folder)
    own = {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in checkpoint.shards and not file.name.endswith(".index.json")
    }
    write_checkpoint(
        out,
        Weights(checkpoint.shards, checkpoint.headers.__getitem__, checkpoint.blocks),
        files={**own, **files},
        copy_from=companions,
        force=force,
    )


# --- weights ------------------------------------------------------------------------------------------------------


def _build(config: Mapping[str, Any], spec: InitSpec) -> Any:
    import transformers

    if not config.get("model_type") or not config.get("architectures"):
        raise InputError("init: the config needs model_type and architectures, e.g. 'clip' and ['CLIPModel']")
    name = config["architectures"][0]
    kind = getattr(transformers, name, None)
    if kind is None:
        raise InputError(f"init: transformers has no class {name!r} (key architectures)")
    try:
        built = transformers.AutoConfig.for_model(**config)
        for part in (built, *(getattr(built, key, None) for key in ("text_config", "vision_config"))):
            _no_dropout(part, spec.config)
        model = _drawn(kind, built, spec.seed, spec.std)
        for pattern, seed in spec.seeds.items():
            _copy(_drawn(kind, built, seed, spec.std), model, pattern)
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, BAD_CONFIG) as error:
        raise InputError(f"init: {name} cannot be built from this config: {error}") from error
    return model.float().eval()


def _drawn(kind: Any, config: Any, seed: int, std: float | None) -> Any:
    # The model's own initialisation draws from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    if std is not None:
        _redraw(model, std, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module, pattern: str) -> None:
    """Copies the parameters whose names a pattern finds."""
    found = [name for name, _ in source.named_parameters() if re.search(pattern, name)]
    if not found:
        raise InputError(f"init: seeds: no parameter has a name like {pattern!r}")
    for name in found:
        target.get_parameter(name).copy_(source.get_parameter(name))


def _no_dropout(part: Any, given: Mapping[str, Any]) -> None:
    mentioned = {**given, **given.get("text_config", {}), **given.get("vision_config", {})}
    for key in _DROPOUTS:
        if part is not None and hasattr(part, key) and key not in mentioned:
            setattr(part, key, 0.0)


@torch.no_grad()
def _redraw(model: nn.Module, std: float, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, std, generator=generator)


# --- tokenizer and image processor --------------------------------------------------------------------------------


def _train_tokenizer(spec: TokenizerSpec, config: Mapping[str, Any], data_dir: Path | None) -> Any:
    """WordPiece over words of letters, digits or single marks, as BERT's; a text is [CLS] text [SEP].

    Of a model with a decoder it is text [SEP], as T5 has it: a start would be one more token of every target.
    """
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if not spec.data and not spec.texts:
        raise InputError("init: the tokenizer has neither data nor texts to be trained on")

    def empty(**vocab: dict[str, int]) -> Any:
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]", **vocab))  # type: ignore[call-arg]
        made.normalizer = normalizers.BertNormalizer(lowercase=spec.lowercase)  # type: ignore[assignment]
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
        return made

    trained, texts = empty(), list(_texts(spec, data_dir))
    letters = sorted({letter for text in texts for letter in trained.normalizer.normalize_str(text)} - {" "})
    # The trainer numbers the pieces inside words in the order of a hash table, which differs from run to run, and
    # breaks ties by number. Given beforehand, they have one order.
    fixed = [*_SPECIAL.values(), *(f"##{letter}" for letter in letters)]
    trainer = trainers.WordPieceTrainer(vocab_size=spec.vocab_size, special_tokens=fixed, show_progress=False)
    trained.train_from_iterator(texts, trainer)
    # A model of its own: in the trained one the pieces would count as special tokens.
    made = empty(vocab=trained.get_vocab())
    ends = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    start = "" if _has_decoder(config) else "[CLS] "
    made.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{start}$A [SEP]", pair=f"{start}$A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    text = {**config, **config.get("text_config", {}), **config.get("model_cfg", {}).get("text_cfg", {})}
    length = text.get("max_position_embeddings") or text.get("context_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="[CLS]",
        eos_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **({"model_max_length": int(length)} if length else {}),
        **_SPECIAL,
    )


def _texts(spec: TokenizerSpec, data_dir: Path | None) -> Iterable[str]:
    for data in spec.data:
        rows = load_split(data, "train", data_dir=data_dir)
        for column in ("text", "text_pair"):
            if column in rows.column_names:
                yield from rows[column]
    yield from spec.texts


def _has_decoder(config: Mapping[str, Any]) -> bool:
    return bool(complete_config(config).get("is_encoder_decoder"))


def _with_tokens(config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    tokens = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
    }
    if "text_config" in config:
        return {**config, "text_config": {**config["text_config"], **tokens}}
    if "model_cfg" in config:
        text = {**config["model_cfg"]["text_cfg"], "vocab_size": len(tokenizer)}
        return {**config, "model_cfg": {**config["model_cfg"], "text_cfg": text}}
    starts = {"decoder_start_token_id": tokenizer.pad_token_id} if _has_decoder(config) else {}
    return {**starts, **config, **tokens}


def _processor(spec: InitSpec, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the file of the image processor holds, or None for a model without images."""
    vision = {**config, **config.get("vision_config", {})}
    size = spec.image_size or vision.get("image_size")
    if size is None:
        return None
    channels = int(vision.get("num_channels", 3))
    clip = str(config.get("model_type")).startswith("clip")
    square = {"height": size, "width": size}
    about: dict[str, Any] = {
        "image_processor_type": "CLIPImageProcessor" if clip else "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size} if clip else square,
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": spec.image_mean or [0.5] * channels,
        "image_std": spec.image_std or [0.5] * channels,
        "do_convert_rgb": channels == 3,
    }
    return {**about, "do_center_crop": True, "crop_size": square} if clip else about
