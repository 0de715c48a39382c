"""DistilBERT of transformers."""

from ..table import Family, Tower

DISTILBERT = Family(
    name="distilbert",
    model_types={"distilbert": ""},
    prefixes=("distilbert.",),
    aliases=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    towers=(
        Tower(
            heads=("n_heads", "num_attention_heads"),
            layers=("n_layers", "num_hidden_layers"),
            norm=("=post",),
            activation=("activation",),
            table="""
    embeddings.word_embeddings.*                   vocab, stream.{first}
    embeddings.position_embeddings.*               _, stream.{first}
    embeddings.LayerNorm.*                         stream.{first}
    transformer.layer.{l}.attention.q_lin.*        heads.{l}/qk.{l} <- stream.{in}
    transformer.layer.{l}.attention.k_lin.*        heads.{l}/qk.{l}* <- stream.{in}
    transformer.layer.{l}.attention.v_lin.*        heads.{l}/vo.{l} <- stream.{in}
    transformer.layer.{l}.attention.out_lin.*      stream.{mid} <- heads.{l}/vo.{l}
    transformer.layer.{l}.sa_layer_norm.*          stream.{mid}
    transformer.layer.{l}.ffn.lin1.*               mlp.{l} <- stream.{mid}
    transformer.layer.{l}.ffn.lin2.*               stream.{out} <- mlp.{l}
    transformer.layer.{l}.output_layer_norm.*      stream.{out}
    vocab_transform.*                              stream.{first} <- stream.{last}
    vocab_layer_norm.*                             stream.{first}
    vocab_projector.*                              vocab <- stream.{first}
    pre_classifier.*                               features <- stream.{last}
    classifier.*                                   _ <- features    if pre_classifier.weight
    classifier.*                                   _ <- stream.{last}
    qa_outputs.*                                   _ <- stream.{last}
""",
        ),
    ),
    outputs={"last_hidden_state": "_, _, stream.{last}"},
    tied={"vocab_projector.weight": "embeddings.word_embeddings.weight"},
    optional=(r"vocab_.*", r"pre_classifier\..*", r"classifier\..*", r"qa_outputs\..*"),
)
