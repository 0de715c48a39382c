"""timm VisionTransformer (ViT, DeiT, CLIP and SigLIP image towers): fused qkv, optional LayerScale, attention pool."""

import re
from collections.abc import Mapping
from typing import Any

from ..table import Family, Tie, Tower

# Facts of timm's registry: its configs name the architecture, not the head count.
_HEADS = (
    (r"vit_giant_patch14(_reg\d)?_(dinov2|tipsv2)|vit_giant_patch16_radio", 24),
    (r"vit_base_patch16_gap_224", 16),
    (r"vit_base_patch\d+_plus|vit_so150m_patch", 14),
    (r"vit_so150m2_patch", 13),
    (r"vit_betwixt_patch", 10),
    (r"vit_little_patch", 5),
    (r"vit_(wee|xsmall)_patch", 4),
    (r"(vit|deit)_tiny_(distilled_)?patch", 3),
    (r"(vit|deit3?)_small_(distilled_)?patch", 6),
    (r"(vit|deit3)_mediumd?_patch", 8),
    (r"(vit|deit3?)_base_(distilled_)?patch", 12),
    (r"(vit|deit3)_(large|huge)_patch|vit_(so400m|giant|giantopt|gigantic|intern300m)_patch", 16),
)


def _registry_heads(config: Mapping[str, Any]) -> int | None:
    named = str(config.get("architecture", ""))
    return next((heads for pattern, heads in _HEADS if re.match(pattern, named)), None)


def _is_plain_vit(kind: str, config: Mapping[str, Any]) -> bool:
    """Whether timm builds its VisionTransformer for the architecture named.

    vit_pe_* and *_rope_* have rotary positions, which fix the units inside a head; nothing in their tensors says so.
    """
    architecture = str(config.get("architecture", ""))
    return kind == "timm" and re.match(r"(vit|deit3?)_(?!pe_)(?!.*rope)", architecture) is not None


TIMM_VIT = Family(
    name="timm_vit",
    model_types={},
    towers=(
        Tower(
            layers=("model_args.depth",),
            heads=("model_args.num_heads", "num_heads", _registry_heads),
            activation=("model_args.act_layer", "=gelu"),
            table="""
    cls_token                              _, _, stream.{first}
    dist_token                             _, _, stream.{first}
    reg_token                              _, _, stream.{first}
    pos_embed                              _, _, stream.{first}
    patch_embed.proj.*                     stream.{first} <- _, _, _
    norm_pre.*                             stream.{first}  as stream-norm
    blocks.{l}.norm1.*                     stream.{in}     as norm
    blocks.{l}.attn.qkv.*                  heads.{l}/qk.{l} | heads.{l}/qk.{l}* | heads.{l}/vo.{l} <- stream.{in}
    blocks.{l}.attn.proj.*                 stream.{mid} <- heads.{l}/vo.{l}
    blocks.{l}.ls1.gamma                   stream.{mid}    as scale
    blocks.{l}.norm2.*                     stream.{mid}    as norm
    blocks.{l}.mlp.fc1.*                   mlp.{l} <- stream.{mid}
    blocks.{l}.mlp.fc2.*                   stream.{out} <- mlp.{l}
    blocks.{l}.ls2.gamma                   stream.{out}    as scale
    norm.*                                 stream.{last}   as norm
    attn_pool.latent                       _, _, probe
    attn_pool.q.*                          heads.pool/qk.pool <- probe
    attn_pool.kv.*                         heads.pool/qk.pool* | heads.pool/vo.pool <- stream.{last}
    attn_pool.proj.*                       features <- heads.pool/vo.pool
    attn_pool.norm.*                       features
    attn_pool.mlp.fc1.*                    mlp.pool <- features
    attn_pool.mlp.fc2.*                    features <- mlp.pool
    fc_norm.*                              features        as norm
    head.*                                 _ <- features
    head_dist.*                            _ <- features
""",
        ),
    ),
    outputs={"features": "_, features as normed", "tokens": "_, _, features as normed"},  # of a model without a head
    ties=(Tie("features", "stream.{last}", unless="attn_pool.latent"),),
    optional=(r"head(_dist)?\..*", r"fc_norm\..*"),
    recognise=_is_plain_vit,
)
