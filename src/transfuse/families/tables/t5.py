"""T5 of transformers: an encoder and a decoder with one embedding table between them, so with one residual stream.

The position biases of layer 0 serve the self-attention of all layers, which puts the heads of a stack in one order.
Heads of cross-attention have none: each layer's are free. An encoder is also a model of its own.
"""

from ..table import Family, Tie, Tower

_SELF_ATTENTION = """
    {tower}.block.{l}.layer.0.layer_norm.weight                               stream.{in}          as norm
    {tower}.block.{l}.layer.0.SelfAttention.q.weight                          heads.0/qk.{l} <- stream.{in}
    {tower}.block.{l}.layer.0.SelfAttention.k.weight                          heads.0/qk.{l}* <- stream.{in}
    {tower}.block.{l}.layer.0.SelfAttention.v.weight                          heads.0/vo.{l} <- stream.{in}
    {tower}.block.{l}.layer.0.SelfAttention.o.weight                          stream.{next} <- heads.0/vo.{l}
    {tower}.block.0.layer.0.SelfAttention.relative_attention_bias.weight      _, heads.0/bias.0
"""

_CROSS_ATTENTION = """
    decoder.block.{l}.layer.1.layer_norm.weight                               stream.{next}        as norm
    decoder.block.{l}.layer.1.EncDecAttention.q.weight                        heads.{l}.cross/qk.{l} <- stream.{next}
    decoder.block.{l}.layer.1.EncDecAttention.k.weight                        heads.{l}.cross/qk.{l}* <- encoder.stream.{encoder_last}
    decoder.block.{l}.layer.1.EncDecAttention.v.weight                        heads.{l}.cross/vo.{l} <- encoder.stream.{encoder_last}
    decoder.block.{l}.layer.1.EncDecAttention.o.weight                        stream.{mid} <- heads.{l}.cross/vo.{l}
    decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight    -
"""

_MLP = """
    {tower}.block.{l}.layer.{mlp}.layer_norm.weight                           stream.{mid}         as norm
    {tower}.block.{l}.layer.{mlp}.DenseReluDense.wi.weight                    mlp.{l} <- stream.{mid}
    {tower}.block.{l}.layer.{mlp}.DenseReluDense.wi_0.weight                  mlp.{l} <- stream.{mid}
    {tower}.block.{l}.layer.{mlp}.DenseReluDense.wi_1.weight                  mlp.{l} <- stream.{mid}
    {tower}.block.{l}.layer.{mlp}.DenseReluDense.wo.weight                    stream.{out} <- mlp.{l}
    {tower}.final_layer_norm.weight                                           stream.{last}        as norm
"""


def _tower(name: str, layers: tuple[str, ...], mlp: int, table: str) -> Tower:
    return Tower(
        name=f"{name}.",
        heads=("num_heads", "num_attention_heads"),
        layers=layers,
        activation=("feed_forward_proj",),
        table=table.replace("{tower}", name).replace("{mlp}", str(mlp)),
    )


T5 = Family(
    name="t5",
    model_types={"t5": ""},
    towers=(
        _tower(
            "encoder",
            ("num_layers", "num_hidden_layers"),
            1,
            _SELF_ATTENTION
            + _MLP
            + """
    shared.weight                                                             vocab, stream.{first}
    encoder.embed_tokens.weight                                               vocab, stream.{first}
""",
        ),
        _tower(
            "decoder",
            ("num_decoder_layers", "num_layers", "num_hidden_layers"),
            2,
            _SELF_ATTENTION
            + _CROSS_ATTENTION
            + _MLP
            + """
    decoder.embed_tokens.weight                                               encoder.vocab, stream.{first}
    lm_head.weight                                                            encoder.vocab <- stream.{last}
""",
        ),
    ),
    outputs={
        "encoder.encoder_last_hidden_state": "_, _, encoder.stream.{last} as normed @encoder.",
        "encoder.last_hidden_state": "_, _, encoder.stream.{last} as normed @encoder.",
        "decoder.last_hidden_state": "_, _, decoder.stream.{last} as normed @decoder.",
    },
    tied=dict.fromkeys(
        ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight"
    ),
    ties=(
        Tie("decoder.stream.{first}", "encoder.stream.{first}"),
        Tie("decoder.stream.{last}", "encoder.stream.{first}", unless="lm_head.weight"),
    ),
    optional=(r"lm_head\..*", r".*EncDecAttention\.relative_attention_bias\..*"),
)
