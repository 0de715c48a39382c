"""The project's own small transformer (`transfuse.reference`), whose skips can be permuted."""

from ..table import Family, Tower

REFERENCE = Family(
    name="reference",
    model_types={"transfuse_reference": ""},
    towers=(
        Tower(
            heads=("num_heads",),
            layers=("layers",),
            norm=("norm_first",),
            activation=("=gelu",),
            table="""
    embed.weight          vocab, stream.{first}
    position              _, stream.{first}
    layers.{l}.norm1.*    stream.{mid}    if post-norm
    layers.{l}.norm2.*    stream.{out}    if post-norm
    layers.{l}.norm1.*    stream.{in}     as norm
    layers.{l}.norm2.*    stream.{mid}    as norm
    layers.{l}.q.*        heads.{l}/qk.{l} <- stream.{in}
    layers.{l}.k.*        heads.{l}/qk.{l}* <- stream.{in}
    layers.{l}.v.*        heads.{l}/vo.{l} <- stream.{in}
    layers.{l}.o.*        stream.{mid} <- heads.{l}/vo.{l}
    layers.{l}.fc1.*      mlp.{l} <- stream.{mid}
    layers.{l}.fc2.*      stream.{out} <- mlp.{l}
    norm.*                stream.{last}   as norm
    head.*                _ <- stream.{last}
""",
        ),
    ),
)
