"""torch.nn.TransformerEncoder stacks, whatever is around them.

The config is the caller's: {"nhead": 8, "norm_first": false, "activation": "relu", "prefix": "enc.", "axes": {...}}.
`prefix` is what stands before `layers.0.`; tensors outside the stack get their axes in `axes`.
"""

from ..table import Family, Tower

TORCH_ENCODER = Family(
    name="torch_encoder",
    model_types={"torch_encoder": ""},
    towers=(
        Tower(
            heads=("num_heads", "nhead"),
            layers=("num_layers",),
            norm=("norm_first", "=post"),
            activation=("activation", "=relu"),
            table="""
    layers.{l}.self_attn.in_proj_weight   heads.{l}/qk.{l} | heads.{l}/qk.{l}* | heads.{l}/vo.{l} <- stream.{in}
    layers.{l}.self_attn.in_proj_bias     heads.{l}/qk.{l} | heads.{l}/qk.{l}* | heads.{l}/vo.{l}
    layers.{l}.self_attn.out_proj.*       stream.{mid} <- heads.{l}/vo.{l}
    layers.{l}.linear1.*                  mlp.{l} <- stream.{mid}
    layers.{l}.linear2.*                  stream.{out} <- mlp.{l}
    layers.{l}.norm1.*                    stream.{mid}    if post-norm
    layers.{l}.norm2.*                    stream.{out}    if post-norm
    layers.{l}.norm1.*                    stream.{in}     as norm
    layers.{l}.norm2.*                    stream.{mid}    as norm
    norm.*                                stream.{last}   as norm
""",
        ),
    ),
    anchor="layers.0.self_attn.in_proj_weight",
    outputs={"output": "_, _, stream.{last} as normed"},
)
