"""Do the models mean the same tokens by the same ids? Read from the tokenizer files beside them, if there are any."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from .errors import InputError

log = logging.getLogger(__name__)

# A few renamed special or unused tokens do no harm; another vocabulary does.
TOLERATED = 0.01


def check_vocabularies(folders: Mapping[str, Path | None]) -> None:
    """Compares the vocabularies of source, tuned and target; those without files are taken on trust.

    Raises:
        InputError: more than one token in a hundred has another id, so embeddings would be added to the wrong tokens.
    """
    found = {role: tokens for role, folder in folders.items() if folder and (tokens := read_vocabulary(folder))}
    if "source" not in found:
        return
    for role, tokens in found.items():
        differing = [token for token, index in found["source"].items() if tokens.get(token) != index]
        if len(differing) > TOLERATED * len(found["source"]):
            token = differing[0]
            raise InputError(
                f"{role} {folders[role]} has another vocabulary than source: {len(differing)} tokens of "
                f"{len(found['source'])} have other ids (e.g. {token!r}: {found['source'][token]} in source, "
                f"{tokens.get(token)} here). Porting between vocabularies is not supported."
            )
        if differing:
            log.warning("%s: %d tokens have other ids than in source, e.g. %r", role, len(differing), differing[0])


def read_vocabulary(folder: Path) -> dict[str, int]:
    """Token -> id from tokenizer.json, vocab.json or vocab.txt; empty if there is none that can be read."""
    try:
        if (folder / "tokenizer.json").is_file():
            model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
            vocab = model["vocab"]
            return dict(vocab) if isinstance(vocab, dict) else {piece[0]: i for i, piece in enumerate(vocab)}
        if (folder / "vocab.json").is_file():
            return dict(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
        if (folder / "vocab.txt").is_file():
            lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
            return {token: i for i, token in enumerate(lines)}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        log.warning("%s: its tokenizer files cannot be read (%s), so the vocabulary is not compared", folder, error)
    return {}
