"""Texts as tokens: texts with labels, prompts and targets of classes, and blocks for language models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from ..data.tasks import TaskSpec
from ..errors import InputError
from .live import LiveModel

if TYPE_CHECKING:
    from datasets import Dataset

Batch = dict[str, Tensor]

_IGNORED = -100  # label of a token that is not to be predicted


@dataclass(frozen=True)
class Texts:
    """Tokens padded on the right to the longest text."""

    fields: Mapping[str, Tensor]
    lengths: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: Tensor, generator: Generator | None) -> Batch:
        longest = int(self.lengths[index].max())
        batch = {name: tensor[index, :longest].long() for name, tensor in self.fields.items()}
        return {**batch, "labels": self.labels[index]}


def texts_of(task: TaskSpec, rows: Dataset, live: LiveModel) -> Texts:
    labels = torch.tensor(rows["label"][:])
    if "text_pair" not in rows.column_names:
        return Texts(*_tokens(live, task, (rows["text"][:],)), labels)
    texts = (rows["text"][:], rows["text_pair"][:])
    joined = str(live.config.get("model_type")).startswith("clip")
    return Texts(*(_joined_tokens(live, task, *texts) if joined else _tokens(live, task, texts)), labels)


def _joined_tokens(
    live: LiveModel, task: TaskSpec, first: list[str], second: list[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """Pairs as one text each.

    CLIP's tokenizer puts the end token behind each text of a pair, and CLIP reads at the first of them, before it has
    seen the second text.
    """
    tokenizer = _tokenizer_of(live)
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise InputError(f"{live.location}: its tokenizer has no tokens for the start and the end of a text")
    room = _max_length(live, task) - 2
    ids = [tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] for texts in (first, second)]
    pairs = [_cut(one, other, room) for one, other in zip(*ids, strict=True)]
    rows = [[tokenizer.bos_token_id, *pair, tokenizer.eos_token_id] for pair in pairs]
    lengths = torch.tensor([len(row) for row in rows])
    masks = [[1] * len(row) for row in rows]
    fields = {"input_ids": _pad(rows, lengths, tokenizer.pad_token_id or 0), "attention_mask": _pad(masks, lengths, 0)}
    return fields, lengths


def _cut(first: Sequence[int], second: Sequence[int], room: int) -> list[int]:
    """Two texts in a row, of which the longer one loses what is too much, and both if neither is short."""
    half = room // 2
    most = max(room - len(second), room - half)
    kept = list(first[:most])
    return [*kept, *second[: room - len(kept)]]


def _tokens(live: LiveModel, task: TaskSpec, texts: tuple[list[str], ...]) -> tuple[dict[str, Tensor], Tensor]:
    """What the model takes of what the tokenizer gives, as (n, longest) int32, and the lengths."""
    tokenizer = _tokenizer_of(live)
    takes = inspect.signature(live.model.forward).parameters
    given = tokenizer(*texts, truncation=True, max_length=_max_length(live, task))
    lengths = torch.tensor([len(one) for one in given["input_ids"]])
    pad = {"input_ids": tokenizer.pad_token_id or 0}
    fields = {name: _pad(given[name], lengths, pad.get(name, 0)) for name in given if name in takes}
    return fields, lengths


def _pad(rows: Sequence[Sequence[int]], lengths: Tensor, value: int) -> Tensor:
    padded = torch.full((len(rows), int(lengths.max())), value, dtype=torch.int32)
    for row, target in zip(rows, padded, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=torch.int32)
    return padded


def _tokenizer_of(live: LiveModel) -> Any:
    if live.tokenizer is None:
        raise InputError(f"{live.location}: it has no tokenizer (tokenizer.json), which the task needs")
    return live.tokenizer


def _max_length(live: LiveModel, task: TaskSpec) -> int:
    """As many tokens as the task allows and the model has positions for."""
    return min(task.max_length, live.positions or task.max_length)


def prompts_of(task: TaskSpec, classes: Sequence[str], live: LiveModel) -> dict[str, Tensor]:
    """The tokens of every class in every template, class by class."""
    texts = [template.replace("{}", name.replace("_", " ")) for name in classes for template in task.templates]
    fields, lengths = _tokens(live, task, (texts,))
    ids = fields["input_ids"]
    if str(live.config.get("model_type")).startswith("siglip"):
        # SigLIP was trained without a mask on texts padded to the full length.
        longest = _max_length(live, task)
        padding = torch.full((len(ids), longest - ids.shape[1]), live.tokenizer.pad_token_id or 0)
        return {"prompt_input_ids": torch.cat([ids, padding], 1).long()}
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return {"prompt_input_ids": ids.long(), "prompt_attention_mask": mask.long()}


def targets_of(task: TaskSpec, classes: Sequence[str], live: LiveModel) -> dict[str, Tensor]:
    """The tokens of the text that stands for each class: (classes, longest), -100 behind the end."""
    texts = task.targets or [name.replace("_", " ") for name in classes]
    if len(texts) != len(classes):
        raise InputError(f"data set {task.data.path}: {len(texts)} targets for {len(classes)} classes")
    given = _tokenizer_of(live)(text_target=texts, truncation=True, max_length=task.max_length)["input_ids"]
    targets = _pad(given, torch.tensor([len(one) for one in given]), _IGNORED).long()
    if len(targets.unique(dim=0)) < len(targets):
        raise InputError(
            f"{live.location}: two classes have the same tokens as their target ({', '.join(texts[:5])}); give others "
            "in the key 'targets'"
        )
    return {"targets": targets}


# --- blocks of text for language models ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Blocks:
    """Blocks of one length, all tokens real: `ids` (n, length)."""

    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: Tensor, generator: Generator | None) -> Batch:
        ids = self.ids[index].long()
        return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class _MaskedBlocks:
    """The same with hidden tokens: `hidden` (n, length) is what the model sees instead when masks are fixed."""

    ids: Tensor
    seen: Tensor
    chosen: Tensor
    hide: Callable[[Tensor, Generator], tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: Tensor, generator: Generator | None) -> Batch:
        ids = self.ids[index].long()
        fixed = (self.seen[index].long(), self.chosen[index])
        seen, chosen = fixed if generator is None else self.hide(ids, generator)
        return {"input_ids": seen, "labels": ids.masked_fill(~chosen, _IGNORED)}


def blocks_of(task: TaskSpec, rows: Dataset, live: LiveModel, seed: int) -> _Blocks | _MaskedBlocks:
    ids = _packed(task, rows, live)
    if task.kind == "causal-lm":
        return _Blocks(ids)
    tokenizer = _tokenizer_of(live)
    if tokenizer.mask_token_id is None:
        raise InputError(f"{live.location}: its tokenizer has no mask token, which masked-lm needs")
    special = torch.tensor(tokenizer.all_special_ids)

    def hide(ids: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        return mask_tokens(ids, task.mask_share, tokenizer.mask_token_id, special, len(tokenizer), generator)

    seen, chosen = hide(ids, torch.Generator().manual_seed(seed))
    return _MaskedBlocks(ids, seen, chosen, hide)


def _packed(task: TaskSpec, rows: Dataset, live: LiveModel) -> Tensor:
    """All texts in a row, cut into blocks of one length; (n, length) int32."""
    tokenizer, length = _tokenizer_of(live), _max_length(live, task)
    texts = tokenizer(rows["text"][:], add_special_tokens=False, verbose=False)["input_ids"]
    causal = task.kind == "causal-lm"
    end = tokenizer.eos_token_id if causal else tokenizer.sep_token_id
    ends = [] if end is None else [end]
    stream = torch.tensor([token for text in texts for token in (*text, *ends)], dtype=torch.int32)
    before, after = ([], []) if causal else ([tokenizer.cls_token_id], [tokenizer.sep_token_id])
    before, after = ([one for one in side if one is not None] for side in (before, after))
    inner = length - len(before) - len(after)
    count = len(stream) // inner
    if not count:
        raise InputError(
            f"data set {task.data.path}: {len(stream)} tokens, not enough for one block of {length}: lower max_length"
        )
    parts = [torch.tensor(before).expand(count, -1), stream[: count * inner].reshape(count, inner)]
    return torch.cat([*parts, torch.tensor(after).expand(count, -1)], 1).to(torch.int32)


def mask_tokens(
    ids: Tensor, share: float, mask_id: int, special: Tensor, vocabulary: int, generator: Generator
) -> tuple[Tensor, Tensor]:
    """Hides tokens as BERT does: 80 % become the mask, 10 % a random token, 10 % stay (Devlin et al. 2019, 3.1).

    Args:
        ids: tokens (n, length).
        share: of the tokens that are to be predicted.
        special: token ids that are never hidden.

    Returns:
        What the model sees (n, length), and which tokens it is to predict (n, length), bool.
    """
    chosen = (torch.rand(ids.shape, generator=generator) < share) & ~torch.isin(ids, special.to(ids.dtype))
    what = torch.rand(ids.shape, generator=generator)
    random = torch.randint(vocabulary, ids.shape, generator=generator).to(ids.dtype)
    seen = torch.where(chosen & (what < 0.8), torch.full_like(ids, mask_id), ids)
    return torch.where(chosen & (what >= 0.9), random, seen), chosen
