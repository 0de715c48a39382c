"""What is measured: the kind of task, its data, its metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..errors import InputError
from .splits import DataSpec

Kind = Literal[
    "image-classification",
    "zero-shot-image-classification",
    "text-classification",
    "seq2seq",
    "masked-lm",
    "causal-lm",
]
Metric = Literal["accuracy", "matthews_correlation", "f1", "loss", "perplexity"]

ZERO_SHOT = "zero-shot-image-classification"
SEQ2SEQ = "seq2seq"
LANGUAGE = ("masked-lm", "causal-lm")
_OF_LANGUAGE = ("loss", "perplexity")


class TaskSpec(BaseModel):
    """One task.

    Attributes:
        kind: which model output is scored, and how.
        data: its data.
        templates: prompts of a zero-shot task; {} stands for the class name.
        targets: of a seq2seq task, the text that stands for each class, in label order; None: the names of the classes.
        max_length: tokens of a text, or of a block of a language model.
        batch_size: of evaluation. It changes no result but the last bits.
        metric: the primary metric; None: accuracy, or the loss of language models. "f1" is that of class 1 for two
            classes, and else the macro average.
        mask_share: share of tokens that masked-lm hides.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Kind
    data: DataSpec
    templates: list[str] = Field(default=["a photo of a {}."], min_length=1)
    targets: list[str] | None = None
    max_length: int = Field(default=128, ge=4)
    batch_size: int = Field(default=128, ge=1)
    metric: Metric | None = None
    mask_share: float = Field(default=0.15, gt=0.0, lt=1.0)

    @field_validator("templates")
    @classmethod
    def _check_templates(cls, templates: list[str]) -> list[str]:
        for template in templates:
            if "{}" not in template:
                raise ValueError(f"{template!r} has no {{}} for the class name")
        return templates

    @property
    def primary(self) -> str:
        """Name of the metric that models are compared by."""
        if self.metric is not None:
            return self.metric
        return "loss" if self.kind in LANGUAGE else "accuracy"

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of the primary metric is better."""
        return self.primary not in _OF_LANGUAGE


def load_task(given: TaskSpec | str | Path) -> TaskSpec:
    """A task from a YAML or JSON file, or from JSON text ("{..."); a spec is one.

    Raises:
        InputError: it cannot be read, or a key is wrong; the message names it.
    """
    if isinstance(given, TaskSpec):
        return given
    text, where = str(given), "task text"
    if not text.lstrip().startswith("{"):
        where = text
        try:
            text = Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{where}: the task cannot be read ({error})") from error
    try:
        content = json.loads(text) if where == "task text" else yaml.safe_load(text)
        return TaskSpec.model_validate(content)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{where}: not valid YAML or JSON ({error})") from error
    except ValidationError as error:
        raise InputError(f"{where}: {validation_text(error)}") from error


def validation_text(error: ValidationError) -> str:
    """What is wrong, one key after the other."""
    return "; ".join(f"{'.'.join(map(str, one['loc'])) or 'it'}: {one['msg']}" for one in error.errors())
