"""CLIP and SigLIP of transformers: a text and a vision tower.

The joint embedding is public (users keep prototypes and indices in it), so its axis does not move. A classifier of texts
reads it (`text_tower.py`), one of images reads the vision tower's stream.
"""

from ..table import Family, Tower

_LAYERS = """
    {tower}.encoder.layers.{l}.layer_norm1.*          stream.{in}          as norm
    {tower}.encoder.layers.{l}.self_attn.q_proj.*     heads.{l}/qk.{l} <- stream.{in}
    {tower}.encoder.layers.{l}.self_attn.k_proj.*     heads.{l}/qk.{l}* <- stream.{in}
    {tower}.encoder.layers.{l}.self_attn.v_proj.*     heads.{l}/vo.{l} <- stream.{in}
    {tower}.encoder.layers.{l}.self_attn.out_proj.*   stream.{mid} <- heads.{l}/vo.{l}
    {tower}.encoder.layers.{l}.layer_norm2.*          stream.{mid}         as norm
    {tower}.encoder.layers.{l}.mlp.fc1.*              mlp.{l} <- stream.{mid}
    {tower}.encoder.layers.{l}.mlp.fc2.*              stream.{out} <- mlp.{l}
"""

_TEXT = (
    _LAYERS.replace("{tower}", "text_model")
    + """
    text_model.embeddings.token_embedding.*           vocab, stream.{first}
    text_model.embeddings.position_embedding.*        _, stream.{first}
    text_model.final_layer_norm.*                     stream.{last}        as norm
"""
)

_VISION = (
    _LAYERS.replace("{tower}", "vision_model")
    + """
    vision_model.embeddings.patch_embedding.*         stream.{first} <- _, _, _
    vision_model.embeddings.position_embedding.*      _, stream.{first}
    vision_model.post_layernorm.*                     stream.{last}        as norm
"""
)


def _tower(name: str, table: str) -> Tower:
    def keys(key: str) -> tuple[str, str]:
        return f"{name}_config.{key}", key

    return Tower(
        name=f"{name}.",
        heads=keys("num_attention_heads"),
        layers=keys("num_hidden_layers"),
        activation=keys("hidden_act"),
        table=table,
    )


CLIP = Family(
    name="clip",
    model_types={"clip": "", "clip_vision_model": "vision_model.", "clip_text_model": "text_model."},
    towers=(
        _tower(
            "text",
            _TEXT
            + """
    text_projection.weight                            _ <- stream.{last}
    classifier.*                                      _ <- _               if SequenceClassification
    logit_scale                                       -
""",
        ),
        _tower(
            "vision",
            _VISION
            + """
    vision_model.embeddings.class_embedding           stream.{first}
    vision_model.pre_layrnorm.*                       stream.{first}       as stream-norm
    visual_projection.weight                          _ <- stream.{last}
    classifier.*                                      _ <- stream.{last}  as raw
""",
        ),
    ),
    outputs={
        "vision.last_hidden_state": "_, _, vision.stream.{last} @vision.",
        "vision.pooler_output": "_, vision.stream.{last} as normed @vision.",
        "text.last_hidden_state": "_, _, text.stream.{last} as normed @text.",
        "text.pooler_output": "_, text.stream.{last} as normed @text.",
    },
    optional=(r"classifier\..*", r"(text|visual)_projection\..*", r"logit_scale"),
)

SIGLIP = Family(
    name="siglip",
    model_types={"siglip": "", "siglip_vision_model": "vision_model.", "siglip_text_model": "text_model."},
    towers=(
        _tower(
            "text",
            _TEXT
            + """
    text_model.head.*                                 _ <- stream.{last}
    logit_scale                                       -
    logit_bias                                        -
""",
        ),
        _tower(
            "vision",
            _VISION
            + """
    classifier.*                                      _ <- stream.{last}
    vision_model.head.probe                           _, _, stream.{last}  as normed
    vision_model.head.attention.in_proj_weight        heads.pool/qk.pool | heads.pool/qk.pool* | heads.pool/vo.pool <- stream.{last}
    vision_model.head.attention.in_proj_bias          heads.pool/qk.pool | heads.pool/qk.pool* | heads.pool/vo.pool
    vision_model.head.attention.out_proj.*            _ <- heads.pool/vo.pool
    vision_model.head.layernorm.*                     _
    vision_model.head.mlp.fc1.*                       mlp.pool <- _
    vision_model.head.mlp.fc2.*                       _ <- mlp.pool
""",
        ),
    ),
    outputs={
        "vision.last_hidden_state": "_, _, vision.stream.{last} as normed @vision.",
        "text.last_hidden_state": "_, _, text.stream.{last} as normed @text.",
    },
    optional=(r"classifier\..*", r"logit_(scale|bias)", r"vision_model\.head\..*"),
)
