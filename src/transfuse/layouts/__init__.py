"""The families whose layout is known. A new one is one declarative file here and one line in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..layout import Family
from .bert import BERT, ELECTRA, ROBERTA
from .clip import CLIP, SIGLIP
from .dinov2_with_registers import DINOV2_WITH_REGISTERS
from .distilbert import DISTILBERT
from .open_clip import OPEN_CLIP
from .reference import REFERENCE
from .t5 import T5
from .timm_vit import TIMM_VIT, is_plain_vit
from .torch_encoder import TORCH_ENCODER
from .vit import DEIT, DINOV2, VIT

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        BERT,
        ROBERTA,
        DISTILBERT,
        ELECTRA,
        VIT,
        DEIT,
        DINOV2,
        DINOV2_WITH_REGISTERS,
        CLIP,
        SIGLIP,
        T5,
        OPEN_CLIP,
        TIMM_VIT,
        TORCH_ENCODER,
        REFERENCE,
    )
}


def find_family(config: Mapping[str, Any], kind: str, name: str | None = None) -> Family | None:
    """The family of a checkpoint: the one named, else what its config says, else None.

    Raises:
        InputError: a name that no family has.
    """
    if name is not None:
        if name not in FAMILIES:
            raise InputError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}")
        return FAMILIES[name]
    if kind == "open_clip":
        return OPEN_CLIP
    if kind == "timm" and is_plain_vit(str(config.get("architecture", ""))):
        return TIMM_VIT
    model_type = config.get("model_type")
    return next((family for family in FAMILIES.values() if model_type in family.model_types), None)
