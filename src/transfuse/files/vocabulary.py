"""Do the models mean the same tokens by the same ids? Read from the tokenizer files beside them, if there are any."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .folders import VOCABULARY_FILES

log = logging.getLogger(__name__)

# A few renamed special or unused tokens do no harm; another vocabulary does.
TOLERATED = 0.01
# With fewer of target's tokens known to source, texts would mean nothing to it.
NEEDED = 0.5


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a model.

    Attributes:
        location: of the model.
        tokens: token -> id; empty where none can be read.
        has_files: whether there are tokenizer files, readable or not.
    """

    location: str
    tokens: Mapping[str, int]
    has_files: bool

    def differing(self, other: Vocabulary) -> list[str]:
        """Tokens of this one that have another id in the other, or none; nothing is known where one is empty."""
        if not self.tokens or not other.tokens:
            return []
        return [token for token, index in self.tokens.items() if other.tokens.get(token) != index]


def check_vocabularies(source: Vocabulary, others: Mapping[str, Vocabulary]) -> None:
    """Compares the vocabularies of some models, by role, with that of source; those without files are taken on trust.

    Raises:
        InputError: more than one token in a hundred has another id, so embeddings would be added to the wrong tokens.
    """
    for role, other in others.items():
        differing = source.differing(other)
        if len(differing) > TOLERATED * len(source.tokens):
            token = differing[0]
            raise InputError(
                f"{role} {other.location} has another vocabulary than source: {len(differing)} tokens of "
                f"{len(source.tokens)} have other ids (e.g. {token!r}: {source.tokens[token]} in source, "
                f"{other.tokens.get(token)} here). "
                + ("Is it a fine-tune of this base?" if role == "tuned" else "Name the family, if it is a known one")
            )
        if differing:
            log.warning("%s: %d tokens have other ids than in source", other.location, len(differing))


def token_rows(source: Vocabulary, target: Vocabulary, notes: list[str]) -> Tensor | None:
    """int64 (rows of target's table,): the id in source of every token of target, -1 where source has no such token.

    None where ids agree, or a vocabulary is not there. `notes` get a line about it.

    Raises:
        InputError: source knows less than half of target's tokens.
    """
    old, new = source.tokens, target.tokens
    if not old or not new:
        if source.has_files or target.has_files:
            log.warning(
                "the vocabularies of %s and %s cannot be compared; rows go by number", source.location, target.location
            )
        return None
    if not source.differing(target):
        return None
    rows = torch.full((max(new.values()) + 1,), -1)
    for token, index in new.items():
        rows[index] = old.get(token, -1)
    known = sum(token in old for token in new)
    if known < NEEDED * len(new):
        raise InputError(
            f"{target.location}: of its {len(new)} tokens source ({source.location}) knows {known}; texts cut into "
            "target's tokens would mean nothing to it, so nothing can be carried over between these vocabularies"
        )
    notes.append(f"vocabulary: {known} of target's {len(new)} tokens are in source, under other ids in part")
    return rows


def read_vocabulary(location: str, folder: Path | None) -> Vocabulary:
    """The tokens of a model, from tokenizer.json, vocab.json or vocab.txt in its folder.

    Raises:
        InputError: an id is no row number.
    """
    if folder is None:
        return Vocabulary(location, {}, False)
    has_files = any((folder / name).is_file() for name in VOCABULARY_FILES)
    try:
        found = _read(folder)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        log.warning("%s: its tokenizer files cannot be read (%s), so the vocabulary is not compared", folder, error)
        return Vocabulary(location, {}, has_files)
    for token, index in found.items():
        if not isinstance(index, int) or not 0 <= index < _MOST:
            raise InputError(f"{folder}: token {token!r} of its vocabulary has the id {index!r}: the file is damaged")
    return Vocabulary(location, found, has_files)


_MOST = 10**7  # tokens; no vocabulary is larger


def _read(folder: Path) -> dict[str, Any]:
    if (folder / "tokenizer.json").is_file():
        whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocab = whole["model"]["vocab"]
        found = dict(vocab) if isinstance(vocab, dict) else {piece[0]: i for i, piece in enumerate(vocab)}
        return found | {one["content"]: one["id"] for one in whole.get("added_tokens") or ()}
    if (folder / "vocab.json").is_file():
        found = dict(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
    elif (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        found = {token.removesuffix("\r"): i for i, token in enumerate(lines)}
    else:
        return {}
    if (folder / "added_tokens.json").is_file():
        found |= json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
    return found
