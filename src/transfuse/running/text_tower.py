"""Text classification on CLIP's text encoder, which transformers has no class for.

The classifier reads the text embedding: the public one, in which users keep prototypes, so its axes never move. A model
is stored as any other: the config of the text tower with labels in it, the weights of `CLIPTextModelWithProjection`,
and `classifier.weight` (labels, embedding) with its bias.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from transformers.modeling_outputs import SequenceClassifierOutput


class CLIPTextModelForSequenceClassification(CLIPTextModelWithProjection):
    """CLIP's text encoder with a linear classifier on the text embedding (Rinaldi et al. 2025, Table 2)."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__(config)
        self.classifier = nn.Linear(self.text_projection.out_features, config.num_labels or 2)
        self.post_init()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits (n, labels) of texts."""
        found = super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        return SequenceClassifierOutput(logits=self.classifier(found.text_embeds))
