"""ViT, DeiT and DINOv2 of transformers: pre-norm vision encoders."""

from ..table import Family, Tower

# Names of transformers 5 in memory (it writes the old ones to disk), for state dicts taken from a model.
_ATTENTION_NAMES = (
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)
_VIT_NAMES = (
    (r"(^|\.)layers\.(\d+)\.", r"\1encoder.layer.\2."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    *_ATTENTION_NAMES,
)

_EMBEDDINGS = """
    embeddings.cls_token                               _, _, stream.{first}
    embeddings.position_embeddings                     _, _, stream.{first}
    embeddings.patch_embeddings.projection.*           stream.{first} <- _, _, _
"""

_ATTENTION = """
    encoder.layer.{l}.attention.attention.query.*      heads.{l}/qk.{l} <- stream.{in}
    encoder.layer.{l}.attention.attention.key.*        heads.{l}/qk.{l}* <- stream.{in}
    encoder.layer.{l}.attention.attention.value.*      heads.{l}/vo.{l} <- stream.{in}
    encoder.layer.{l}.attention.output.dense.*         stream.{mid} <- heads.{l}/vo.{l}
"""

_VIT = (
    _EMBEDDINGS
    + _ATTENTION
    + """
    embeddings.mask_token                              _, _, stream.{first}
    embeddings.distillation_token                      _, _, stream.{first}
    encoder.layer.{l}.layernorm_before.*               stream.{in}    as norm
    encoder.layer.{l}.layernorm_after.*                stream.{mid}   as norm
    encoder.layer.{l}.intermediate.dense.*             mlp.{l} <- stream.{mid}
    encoder.layer.{l}.output.dense.*                   stream.{out} <- mlp.{l}
    layernorm.*                                        stream.{last}  as norm
    pooler.dense.*                                     pooled <- stream.{last}
    classifier.*                                       _ <- stream.{last}
    cls_classifier.*                                   _ <- stream.{last}
    distillation_classifier.*                          _ <- stream.{last}
    decoder.0.*                                        _ <- stream.{last}, _, _
"""
)
_OUTPUTS = {"last_hidden_state": "_, _, stream.{last} as normed", "pooler_output": "_, pooled"}
_HEADS = (r"pooler\..*", r".*classifier\..*", r"decoder\..*", r"embeddings\.mask_token")

VIT = Family(
    name="vit",
    model_types={"vit": ""},
    prefixes=("vit.",),
    aliases=_VIT_NAMES,
    towers=(Tower(table=_VIT),),
    outputs=_OUTPUTS,
    optional=_HEADS,
)

DEIT = Family(
    name="deit",
    model_types={"deit": ""},
    prefixes=("deit.",),
    aliases=_VIT_NAMES,
    towers=(Tower(table=_VIT),),
    outputs=_OUTPUTS,
    optional=_HEADS,
)

DINOV2 = Family(
    name="dinov2",
    model_types={"dinov2": ""},
    prefixes=("dinov2.",),
    aliases=_ATTENTION_NAMES,
    towers=(
        Tower(
            table=_EMBEDDINGS
            + _ATTENTION
            + """
    embeddings.mask_token                              _, stream.{first}
    encoder.layer.{l}.norm1.*                          stream.{in}    as norm
    encoder.layer.{l}.layer_scale1.lambda1             stream.{mid}   as scale
    encoder.layer.{l}.norm2.*                          stream.{mid}   as norm
    encoder.layer.{l}.mlp.fc1.*                        mlp.{l} <- stream.{mid}
    encoder.layer.{l}.mlp.fc2.*                        stream.{out} <- mlp.{l}
    encoder.layer.{l}.mlp.weights_in.*                 mlp.{l} | mlp.{l} <- stream.{mid}
    encoder.layer.{l}.mlp.weights_out.*                stream.{out} <- mlp.{l}
    encoder.layer.{l}.mlp.gate_proj.*                  mlp.{l} <- stream.{mid}
    encoder.layer.{l}.mlp.up_proj.*                    mlp.{l} <- stream.{mid}
    encoder.layer.{l}.mlp.down_proj.*                  stream.{out} <- mlp.{l}
    encoder.layer.{l}.layer_scale2.lambda1             stream.{out}   as scale
    layernorm.*                                        stream.{last}  as norm
    classifier.*                                       _ <- stream.{last} | stream.{last}
""",
        ),
    ),
    outputs={"last_hidden_state": "_, _, stream.{last} as normed", "pooler_output": "_, stream.{last} as normed"},
    optional=_HEADS,
)
