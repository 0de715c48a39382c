"""BERT, RoBERTa and ELECTRA of transformers: post-norm encoders with one table between them."""

from ..table import Family, Tie, Tower

_ENCODER = """
    embeddings.LayerNorm.*                          embed
    embeddings.word_embeddings.*                    vocab, embed
    embeddings.position_embeddings.*                _, embed
    embeddings.token_type_embeddings.*              _, embed
    embeddings_project.*                            stream.{first} <- embed
    encoder.layer.{l}.attention.self.query.*        heads.{l}/qk.{l} <- stream.{in}
    encoder.layer.{l}.attention.self.key.*          heads.{l}/qk.{l}* <- stream.{in}
    encoder.layer.{l}.attention.self.value.*        heads.{l}/vo.{l} <- stream.{in}
    encoder.layer.{l}.attention.output.dense.*      stream.{mid} <- heads.{l}/vo.{l}
    encoder.layer.{l}.attention.output.LayerNorm.*  stream.{mid}
    encoder.layer.{l}.intermediate.dense.*          mlp.{l} <- stream.{mid}
    encoder.layer.{l}.output.dense.*                stream.{out} <- mlp.{l}
    encoder.layer.{l}.output.LayerNorm.*            stream.{out}
    pooler.dense.*                                  pooled <- stream.{last}
    qa_outputs.*                                    _ <- stream.{last}
    classifier.*                                    _ <- stream.{last}    if TokenClassification
"""

_SEQUENCE_HEAD = """
    classifier.dense.*                              features <- stream.{last}
    classifier.out_proj.*                           _ <- features
"""

_OLD_NAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
_OUTPUTS = {"last_hidden_state": "_, _, stream.{last}", "pooler_output": "_, pooled"}
_SAME_WIDTH = (Tie("embed", "stream.{first}", unless="embeddings_project.weight"),)

BERT = Family(
    name="bert",
    model_types={"bert": ""},
    prefixes=("bert.",),
    aliases=_OLD_NAMES,
    towers=(
        Tower(
            norm=("=post",),
            table=_ENCODER
            + """
    classifier.*                                    _ <- pooled           if SequenceClassification
    classifier.*                                    _ <- pooled           if MultipleChoice
    classifier.*                                    _ <- stream.{last}    unless pooler.dense.weight
    cls.predictions.transform.dense.*               embed <- stream.{last}
    cls.predictions.transform.LayerNorm.*           embed
    cls.predictions.decoder.*                       vocab <- embed
    cls.predictions.bias                            vocab
    cls.seq_relationship.*                          _ <- pooled
""",
        ),
    ),
    outputs=_OUTPUTS,
    tied={
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    ties=_SAME_WIDTH,
    optional=(r"pooler\..*", r"cls\..*", r"classifier\..*", r"qa_outputs\..*"),
)

ROBERTA = Family(
    name="roberta",
    model_types={"roberta": "", "xlm-roberta": "", "camembert": ""},
    prefixes=("roberta.",),
    aliases=_OLD_NAMES,
    towers=(
        Tower(
            norm=("=post",),
            table=_ENCODER
            + _SEQUENCE_HEAD
            + """
    classifier.*                                    _ <- pooled           if MultipleChoice
    classifier.*                                    _ <- stream.{last}    unless pooler.dense.weight
    lm_head.dense.*                                 embed <- stream.{last}
    lm_head.layer_norm.*                            embed
    lm_head.decoder.*                               vocab <- embed
    lm_head.bias                                    vocab
""",
        ),
    ),
    outputs=_OUTPUTS,
    tied={"lm_head.decoder.weight": "embeddings.word_embeddings.weight", "lm_head.decoder.bias": "lm_head.bias"},
    ties=_SAME_WIDTH,
    optional=(r"pooler\..*", r"lm_head\..*", r"classifier\..*", r"qa_outputs\..*"),
)

ELECTRA = Family(
    name="electra",
    model_types={"electra": ""},
    prefixes=("electra.",),
    aliases=_OLD_NAMES,
    towers=(
        Tower(
            norm=("=post",),
            table=_ENCODER
            + _SEQUENCE_HEAD
            + """
    discriminator_predictions.dense.*               features <- stream.{last}
    discriminator_predictions.dense_prediction.*    _ <- features
    sequence_summary.summary.*                      features <- stream.{last}
    classifier.*                                    _ <- features         if MultipleChoice
    generator_predictions.dense.*                   embed <- stream.{last}
    generator_predictions.LayerNorm.*               embed
    generator_lm_head.*                             vocab <- embed
""",
        ),
    ),
    outputs=_OUTPUTS,
    tied={"generator_lm_head.weight": "embeddings.word_embeddings.weight"},
    ties=_SAME_WIDTH,
    optional=(
        r"discriminator_predictions\..*",
        r"generator_.*",
        r"sequence_summary\..*",
        r"classifier\..*",
        r"qa_outputs\..*",
    ),
)
