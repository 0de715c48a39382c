"""open_clip ViT models, both towers (fused in_proj; projections are stored input first)."""

from collections.abc import Mapping
from typing import Any

from ...errors import InputError
from ..table import Family, Tower

_BLOCKS = """
    {tower}transformer.resblocks.{l}.ln_1.*              stream.{in}     as norm
    {tower}transformer.resblocks.{l}.attn.in_proj_weight heads.{l}/qk.{l} | heads.{l}/qk.{l}* | heads.{l}/vo.{l} <- stream.{in}
    {tower}transformer.resblocks.{l}.attn.in_proj_bias   heads.{l}/qk.{l} | heads.{l}/qk.{l}* | heads.{l}/vo.{l}
    {tower}transformer.resblocks.{l}.attn.out_proj.*     stream.{mid} <- heads.{l}/vo.{l}
    {tower}transformer.resblocks.{l}.ls_1.gamma          stream.{mid}    as scale
    {tower}transformer.resblocks.{l}.ln_2.*              stream.{mid}    as norm
    {tower}transformer.resblocks.{l}.mlp.c_fc.*          mlp.{l} <- stream.{mid}
    {tower}transformer.resblocks.{l}.mlp.c_proj.*        stream.{out} <- mlp.{l}
    {tower}transformer.resblocks.{l}.ls_2.gamma          stream.{out}    as scale
"""


def _activation(config: Mapping[str, Any]) -> str | None:
    model = config.get("model_cfg")
    return None if model is None else "quick_gelu" if model.get("quick_gelu") else "gelu"


def _text_heads(config: Mapping[str, Any]) -> int | None:
    text = config.get("model_cfg", {}).get("text_cfg")
    if text is None:
        return None
    if text.get("proj_type") == "none":
        raise InputError(
            "its text tower has no projection (text_cfg.proj_type is 'none'): the stream itself is the public embedding "
            "and cannot be moved; this variant is not supported"
        )
    return int(text.get("heads", 8))  # CLIPTextCfg's own default


def _vision_heads(config: Mapping[str, Any]) -> int | None:
    vision = config.get("model_cfg", {}).get("vision_cfg")
    if vision is None or not isinstance(vision.get("layers", 12), int):
        return None
    return int(vision.get("width", 768)) // int(vision.get("head_width", 64))  # CLIPVisionCfg's own defaults


OPEN_CLIP = Family(
    name="open_clip",
    model_types={},
    recognise=lambda kind, _: kind == "open_clip",
    prefixes=("text.",),
    towers=(
        Tower(
            name="text.",
            heads=(_text_heads, "heads"),
            layers=("model_cfg.text_cfg.layers",),
            activation=(_activation, "activation"),
            table=_BLOCKS.replace("{tower}", "")
            + """
    token_embedding.weight                               vocab, stream.{first}
    positional_embedding                                 _, stream.{first}
    cls_emb                                              stream.{first}
    ln_final.*                                           stream.{last}   as norm
    text_projection                                      stream.{last} -> _
    text_projection.*                                    _ <- stream.{last}
    logit_scale                                          -
    logit_bias                                           -
""",
        ),
        Tower(
            name="vision.",
            heads=(_vision_heads, "heads"),
            layers=("model_cfg.vision_cfg.layers",),
            activation=(_activation, "activation"),
            table=_BLOCKS.replace("{tower}", "visual.")
            + """
    visual.conv1.*                                       stream.{first} <- _, _, _
    visual.class_embedding                               stream.{first}
    visual.positional_embedding                          _, stream.{first}
    visual.ln_pre.*                                      stream.{first}  as stream-norm
    visual.ln_post.*                                     stream.{last}   as norm
    visual.proj                                          stream.{last} -> _
""",
        ),
    ),
    optional=(r"logit_(scale|bias)",),
)
