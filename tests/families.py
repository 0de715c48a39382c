"""Every model class whose layout is claimed, one row each: tiny, real, with random weights everywhere.

A family is added by adding a row to `CASES`. `tests/test_layouts.py` proves the layout of every row, plants maps in it
and damages it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from transfuse.running import text_tower
from transfuse.running.building import TEXT_CLASSIFIER, compute_in_double, seeded_inputs
from transfuse.running.reference import ReferenceConfig, forward, random_state

State = dict[str, Tensor]


@dataclass(frozen=True)
class Loaded:
    """A model in its real class, float64.

    Attributes:
        tensors: its parameters, by their names in the class; changing their data changes the model.
        run: from inputs to outputs by name.
    """

    tensors: Mapping[str, Tensor]
    run: Callable[[Mapping[str, Tensor]], State]


class Source(Protocol):
    """Where a model comes from: its real class, and how it is saved and loaded there."""

    def save(self, folder: Path, seed: int, noise: float = 0.0) -> None:
        """Saves the model of `seed`; every tensor plus `noise` times its standard deviation of other random values."""
        ...

    def load(self, folder: Path) -> Loaded:
        """The model saved in `folder`."""
        ...

    def inputs(self, config: Mapping[str, Any]) -> State:
        """Random inputs; one named "stream" is in the coordinates of the residual stream."""
        ...


@dataclass(frozen=True)
class Case:
    """One model class or variant.

    Attributes:
        name: of the test.
        family: the layout's name.
        source: how to build it.
        heads: key of the config that holds the head count (dotted for nested ones).
        unused: names of tensors that the class saves and never uses, as a regular expression.
        files: names of the config and of the weights.
    """

    name: str
    family: str
    source: Source
    heads: str = "num_attention_heads"
    unused: str = "(?!)"
    files: tuple[str, str] = ("config.json", "model.safetensors")

    def config(self, folder: Path) -> dict[str, Any]:
        """The config as saved."""
        return json.loads((folder / self.files[0]).read_text())

    def weights(self, folder: Path) -> State:
        """The tensors as saved."""
        return load_file(folder / self.files[1])

    def write(self, folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
        """Writes config and tensors under the names that the library itself uses."""
        folder.mkdir(exist_ok=True)
        (folder / self.files[0]).write_text(json.dumps(config))
        save_file({name: t.contiguous() for name, t in state.items()}, folder / self.files[1], {"format": "pt"})
        return folder


def randomise(model: nn.Module, seed: int, noise: float = 0.0) -> nn.Module:
    """The model in float64 with no parameter left at its initial value: gains around 1, all else around 0."""
    model = model.double()
    weights, change = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1000)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, dtype=torch.float64, generator=weights)
            if parameter.dim() == 1 and not name.endswith("bias"):
                values = 1 + 0.3 * values
            elif parameter.dim() > 1:
                values = values / parameter.shape[-1] ** 0.5
            scale = float(values.std()) if values.numel() > 1 else 1.0
            parameter.copy_(values + noise * scale * torch.randn(values.shape, dtype=torch.float64, generator=change))
    return model.eval()


def loaded(model: nn.Module, call: Callable[[Mapping[str, Tensor]], Any]) -> Loaded:
    """A module as `Loaded`; `call` runs it."""
    model.eval()

    def run(inputs: Mapping[str, Tensor]) -> State:
        with torch.no_grad():
            found = call(inputs)
        named = found if isinstance(found, Mapping) else {"logits": found}
        return {name: value.detach() for name, value in named.items() if isinstance(value, Tensor)}

    return Loaded(dict(model.named_parameters()), run)


@dataclass(frozen=True)
class Transformers:
    """A class of transformers and the arguments of its config.

    Attributes:
        masked: whether it takes `bool_masked_pos` (and has a mask token).
        untied: a module that gets a weight of its own where the class shares one.
    """

    model_class: str
    config: Mapping[str, Any]
    masked: bool = False
    untied: str = ""

    def save(self, folder: Path, seed: int, noise: float = 0.0) -> None:
        model_class = self._class()
        model = model_class(model_class.config_class(**self.config))
        if self.untied:
            module = model.get_submodule(self.untied)
            module.weight = nn.Parameter(torch.empty_like(module.weight))
        randomise(model, seed, noise).save_pretrained(folder)  # pyright: ignore[reportCallIssue]

    def load(self, folder: Path) -> Loaded:
        model = self._class().from_pretrained(folder, dtype=torch.float64)
        compute_in_double(model)
        return loaded(model, lambda inputs: model(**inputs))

    def _class(self) -> Any:
        """From transformers, or our own text classifier of CLIP."""
        return getattr(text_tower if self.model_class == TEXT_CLASSIFIER else transformers, self.model_class)

    def inputs(self, config: Mapping[str, Any]) -> State:
        inputs = seeded_inputs("transformers", config, 0, torch.float64)
        if config.get("type_vocab_size"):
            inputs["token_type_ids"] = (torch.arange(inputs["input_ids"].numel()) % 2).view_as(inputs["input_ids"])
        if self.masked:  # every second of the four patches
            inputs["bool_masked_pos"] = torch.tensor([[True, False] * 2] * 2)
        return inputs


class _Classifier(nn.Module):
    """A torch encoder stack as users have it: with an embedding and a head around it."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            d_model=16,
            nhead=config["nhead"],
            dim_feedforward=24,
            dropout=0.0,
            activation=config["activation"],
            norm_first=config["norm_first"],
            batch_first=True,
        )
        self.embed = nn.Linear(5, 16)
        norm = nn.LayerNorm(16) if config["norm_first"] else None
        self.encoder = nn.TransformerEncoder(layer, 2, norm=norm, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, src: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(src)).mean(1))


@dataclass(frozen=True)
class TorchEncoder:
    """A `torch.nn.TransformerEncoder`: bare, or as `encoder.` of a classifier whose other tensors get axes."""

    norm_first: bool
    activation: str
    wrapped: bool = False
    axes: Mapping[str, str] = field(
        default_factory=lambda: {
            "embed.weight": "stream.{first} <- _",
            "embed.bias": "stream.{first}",
            "head.weight": "_ <- stream.{last}",
            "head.bias": "_",
        }
    )

    def config(self) -> dict[str, Any]:
        """The config a caller would write."""
        config = {"nhead": 4, "norm_first": self.norm_first, "activation": self.activation}
        extra = {"prefix": "encoder.", "axes": dict(self.axes)} if self.wrapped else {}
        return {"model_type": "torch_encoder", **config, **extra}

    def save(self, folder: Path, seed: int, noise: float = 0.0) -> None:
        model = randomise(_Classifier(self.config()), seed, noise)
        state = (model if self.wrapped else model.get_submodule("encoder")).state_dict()
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config()))
        save_file(state, folder / "model.safetensors")

    def load(self, folder: Path) -> Loaded:
        whole = _Classifier(self.config()).double()
        model = whole if self.wrapped else whole.get_submodule("encoder")
        model.load_state_dict(load_file(folder / "model.safetensors"))
        output = "logits" if self.wrapped else "output"
        return loaded(model, lambda inputs: {output: model(*inputs.values())})

    def inputs(self, config: Mapping[str, Any]) -> State:
        name, width = ("features", 5) if self.wrapped else ("stream", 16)
        return {name: torch.randn(2, 7, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}


@dataclass(frozen=True)
class Reference:
    """The project's own transformer."""

    config: ReferenceConfig

    def save(self, folder: Path, seed: int, noise: float = 0.0) -> None:
        state = random_state(self.config, torch.Generator().manual_seed(seed))
        change = torch.Generator().manual_seed(seed + 1000)
        state = {n: t + noise * t.std() * torch.randn(t.shape, generator=change).double() for n, t in state.items()}
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config.as_dict()))
        save_file(state, folder / "model.safetensors")

    def load(self, folder: Path) -> Loaded:
        state = load_file(folder / "model.safetensors")
        return Loaded(state, lambda inputs: {"logits": forward(self.config, state, inputs["ids"])})

    def inputs(self, config: Mapping[str, Any]) -> State:
        return seeded_inputs("transformers", config, 0, torch.float64)


_LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
_TEXT = {**_LAYERS, "vocab_size": 40, "max_position_embeddings": 20, "type_vocab_size": 2}
_DISTIL = {"vocab_size": 40, "max_position_embeddings": 20, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}
_PIXELS = {**_LAYERS, "image_size": 8, "patch_size": 4, "num_channels": 3}
_VIT = {**_PIXELS, "encoder_stride": 4}
_DINO = {**_LAYERS, "image_size": 8, "patch_size": 4, "mlp_ratio": 2, "num_labels": 3}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
_TOWER_TEXT = {**_LAYERS, **_SPECIAL, "vocab_size": 40, "max_position_embeddings": 12, "projection_size": 16}
_TOWERS = {"text_config": _TOWER_TEXT, "vision_config": _PIXELS}
_MASK_TOKEN = r".*mask_token"
# Towers of different widths and depths, so that nothing of one can be taken for the other.
_UNEQUAL = {"text_config": {**_TOWER_TEXT, "hidden_size": 12, "num_hidden_layers": 1}, "vision_config": _PIXELS}
_T5 = {
    "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "decoder_start_token_id": 0,
}  # fmt: skip
_T5_11 = {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3}
_GELU = {"text_config": {**_TOWER_TEXT, "hidden_act": "gelu"}, "vision_config": {**_PIXELS, "hidden_act": "gelu"}}


def _case(
    family: str, model_class: str, config: Mapping[str, Any], variant: str = "", masked: bool = False, **more: Any
) -> Case:
    name = model_class + (f"-{variant}" if variant else "")
    return Case(name, family, Transformers(model_class, config, masked), **more)


def _t5(model_class: str, config: Mapping[str, Any], variant: str = "", untied: str = "") -> Case:
    name = model_class + (f"-{variant}" if variant else "")
    return Case(name, "t5", Transformers(model_class, config, untied=untied), heads="num_heads")


def _torch(norm_first: bool, activation: str, wrapped: bool) -> Case:
    name = f"torch-{'pre' if norm_first else 'post'}-{activation}-{'wrapped' if wrapped else 'bare'}"
    return Case(name, "torch_encoder", TorchEncoder(norm_first, activation, wrapped), heads="nhead")


def _reference(norm_first: bool) -> Case:
    source = Reference(ReferenceConfig(width=16, hidden=24, layers=2, norm_first=norm_first))
    return Case(f"reference-{'pre' if norm_first else 'post'}", "reference", source, heads="num_heads")


CASES: tuple[Case, ...] = (
    _case("bert", "BertModel", _TEXT),
    _case("bert", "BertForMaskedLM", _TEXT),
    _case("bert", "BertForMaskedLM", {**_TEXT, "tie_word_embeddings": False}, "untied"),
    _case("bert", "BertForPreTraining", _TEXT),
    _case("bert", "BertForSequenceClassification", {**_TEXT, "num_labels": 3}),
    _case("bert", "BertForTokenClassification", {**_TEXT, "num_labels": 3}),
    _case("bert", "BertForQuestionAnswering", _TEXT),
    _case("bert", "BertForMultipleChoice", _TEXT),
    _case("bert", "BertForNextSentencePrediction", _TEXT),
    _case("roberta", "RobertaModel", _TEXT),
    _case("roberta", "RobertaForMaskedLM", _TEXT),
    _case("roberta", "RobertaForSequenceClassification", {**_TEXT, "num_labels": 3}),
    _case("roberta", "RobertaForTokenClassification", {**_TEXT, "num_labels": 3}),
    _case("roberta", "RobertaForQuestionAnswering", _TEXT),
    _case("roberta", "RobertaForMultipleChoice", _TEXT),
    _case("roberta", "XLMRobertaForMaskedLM", _TEXT),
    _case("roberta", "CamembertForTokenClassification", {**_TEXT, "num_labels": 3}),
    _case("distilbert", "DistilBertModel", _DISTIL, heads="n_heads"),
    _case("distilbert", "DistilBertForMaskedLM", _DISTIL, heads="n_heads"),
    _case("distilbert", "DistilBertForSequenceClassification", {**_DISTIL, "num_labels": 3}, heads="n_heads"),
    _case("distilbert", "DistilBertForTokenClassification", {**_DISTIL, "num_labels": 3}, heads="n_heads"),
    _case("distilbert", "DistilBertForQuestionAnswering", _DISTIL, heads="n_heads"),
    _case("distilbert", "DistilBertForMultipleChoice", _DISTIL, heads="n_heads"),
    _case("electra", "ElectraForPreTraining", {**_TEXT, "embedding_size": 16}, "same-width"),
    _case("electra", "ElectraForPreTraining", {**_TEXT, "embedding_size": 12}),
    _case("electra", "ElectraForMaskedLM", {**_TEXT, "embedding_size": 16}, "same-width"),
    _case("electra", "ElectraForMaskedLM", {**_TEXT, "embedding_size": 12}),
    _case("electra", "ElectraForSequenceClassification", {**_TEXT, "embedding_size": 12, "num_labels": 3}),
    _case("electra", "ElectraForTokenClassification", {**_TEXT, "embedding_size": 12, "num_labels": 3}),
    _case("electra", "ElectraForQuestionAnswering", {**_TEXT, "embedding_size": 12}),
    _case("electra", "ElectraModel", {**_TEXT, "embedding_size": 12}),
    _case("electra", "ElectraForMultipleChoice", {**_TEXT, "embedding_size": 12}),
    _case("vit", "ViTModel", _VIT),
    _case("vit", "ViTModel", {**_VIT, "qkv_bias": False}, "no-qkv-bias"),
    _case("vit", "ViTForImageClassification", {**_VIT, "num_labels": 3}),
    _case("vit", "ViTForMaskedImageModeling", _VIT, masked=True),
    _case("deit", "DeiTModel", _VIT),
    _case("deit", "DeiTForImageClassification", {**_VIT, "num_labels": 3}),
    _case("deit", "DeiTForImageClassificationWithTeacher", {**_VIT, "num_labels": 3}),
    _case("deit", "DeiTForMaskedImageModeling", _VIT, masked=True),
    _case("dinov2", "Dinov2Model", _DINO, masked=True),
    _case("dinov2", "Dinov2ForImageClassification", _DINO, unused=_MASK_TOKEN),
    _case("dinov2", "Dinov2ForImageClassification", {**_DINO, "use_swiglu_ffn": True}, "swiglu", unused=_MASK_TOKEN),
    _case("dinov2_with_registers", "Dinov2WithRegistersModel", {**_DINO, "num_register_tokens": 2}, masked=True),
    _case("clip", "CLIPModel", {**_UNEQUAL, "projection_dim": 8}, heads="text_config.num_attention_heads"),
    _case("clip", "CLIPModel", {**_GELU, "projection_dim": 8}, "gelu", heads="vision_config.num_attention_heads"),
    _case("clip", "CLIPVisionModel", _PIXELS),
    _case("clip", "CLIPVisionModelWithProjection", {**_PIXELS, "projection_dim": 8}),
    _case("clip", "CLIPTextModel", _TOWER_TEXT),
    _case("clip", "CLIPTextModelWithProjection", {**_TOWER_TEXT, "projection_dim": 8}),
    _case("clip", TEXT_CLASSIFIER, {**_TOWER_TEXT, "projection_dim": 8, "num_labels": 3}),
    _case(
        "clip",
        "CLIPForImageClassification",
        {**_TOWERS, "num_labels": 3},
        heads="vision_config.num_attention_heads",
        unused=r".*post_layernorm\..*",  # its classifier takes the mean over patches before it
    ),
    _case("siglip", "SiglipModel", _TOWERS, heads="text_config.num_attention_heads"),
    _case("siglip", "SiglipVisionModel", _PIXELS),
    _case("siglip", "SiglipVisionModel", {**_PIXELS, "vision_use_head": False}, "no-head"),
    _case("siglip", "SiglipTextModel", _TOWER_TEXT),
    _case(
        "siglip",
        "SiglipForImageClassification",
        {**_TOWERS, "num_labels": 3},
        heads="vision_config.num_attention_heads",
        unused=r".*vision_model\.head\..*",
    ),
    _t5("T5ForConditionalGeneration", _T5),
    _t5("T5ForConditionalGeneration", _T5_11, "v1.1", untied="lm_head"),
    _t5("T5Model", {**_T5, "num_decoder_layers": 3}),
    _t5("T5EncoderModel", _T5_11),
    *(
        _torch(norm_first, act, wrapped)
        for norm_first in (True, False)
        for act, wrapped in (("relu", True), ("gelu", False))
    ),
    _reference(norm_first=True),
    _reference(norm_first=False),
)
