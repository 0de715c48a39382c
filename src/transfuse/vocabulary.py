"""Do the models mean the same tokens by the same ids? Read from the tokenizer files beside them, if there are any."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import InputError

log = logging.getLogger(__name__)

# A few renamed special or unused tokens do no harm; another vocabulary does.
TOLERATED = 0.01
# With fewer of target's tokens known to source, texts would mean nothing to it.
NEEDED = 0.5


def check_vocabularies(folders: Mapping[str, Path | None]) -> None:
    """Compares the vocabularies of some models with that of source; those without files are taken on trust.

    Raises:
        InputError: more than one token in a hundred has another id, so embeddings would be added to the wrong tokens.
    """
    source = _tokens(folders.get("source"))
    for role, folder in folders.items():
        tokens = _tokens(folder)
        differing = _differing(source, tokens) if source and tokens else []
        if len(differing) > TOLERATED * len(source):
            token = differing[0]
            raise InputError(
                f"{role} {folder} has another vocabulary than source: {len(differing)} tokens of {len(source)} have "
                f"other ids (e.g. {token!r}: {source[token]} in source, {tokens.get(token)} here). "
                + ("Is it a fine-tune of this base?" if role == "tuned" else "Name the family, if it is a known one")
            )
        if differing:
            log.warning("%s: %d tokens have other ids than in source", folder, len(differing))


def token_rows(source: Path | None, target: Path | None, notes: list[str]) -> Tensor | None:
    """int64 (rows of target's table,): the id in source of every token of target, -1 where source has no such token.

    None where ids agree, or a vocabulary is not there. `notes` get a line about it.

    Raises:
        InputError: source knows less than half of target's tokens.
    """
    old, new = _tokens(source), _tokens(target)
    if not old or not new:
        if source is not None and target is not None and (old or new or _unread(source) or _unread(target)):
            log.warning("the vocabularies of %s and %s cannot be compared; rows go by number", source, target)
        return None
    if not _differing(old, new):
        return None
    rows = torch.full((max(new.values()) + 1,), -1)
    for token, index in new.items():
        rows[index] = old.get(token, -1)
    known = sum(token in old for token in new)
    if known < NEEDED * len(new):
        raise InputError(
            f"{target}: of its {len(new)} tokens source ({source}) knows {known}; texts cut into target's tokens would "
            "mean nothing to it, so nothing can be carried over between these vocabularies"
        )
    notes.append(f"vocabulary: {known} of target's {len(new)} tokens are in source, under other ids in part")
    return rows


def _unread(folder: Path) -> bool:
    return (folder / "spiece.model").is_file()


def _tokens(folder: Path | None) -> dict[str, int]:
    return read_vocabulary(folder) if folder else {}


def _differing(one: Mapping[str, int], other: Mapping[str, int]) -> list[str]:
    return [token for token, index in one.items() if other.get(token) != index]


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id from tokenizer.json, vocab.json or vocab.txt; empty if there is none that can be read."""
    try:
        found = _read(folder)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        log.warning("%s: its tokenizer files cannot be read (%s), so the vocabulary is not compared", folder, error)
        return {}
    wrong = next(
        (token for token, index in found.items() if not isinstance(index, int) or not 0 <= index < _MOST), None
    )
    if wrong is not None:
        raise InputError(
            f"{folder}: token {wrong!r} of its vocabulary has the id {found[wrong]!r}: the file is damaged"
        )
    return found


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
