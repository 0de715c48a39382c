"""CLIPs of open_clip as models of transformers, which evaluation and training run.

    convert("laion/CLIP-ViT-B-16-DataComp.L-s1B-b8K", "datacomp", tokenizer="openai/clip-vit-base-patch16")

A conversion is a table: every tensor of `CLIPModel` is a tensor of open_clip, or a third of one (q, k and v are fused
there), or its transpose (projections are stored input first). Everything is said by the files, no library is needed;
what `CLIPModel` has no place for is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError, VerificationError
from ..files.checkpoint import Checkpoint
from ..files.configs import Unavailable
from ..files.folders import IMAGE_PROCESSOR_FILE, TOKENIZER_FILES, VOCABULARY_FILES
from ..files.hub import fetch_files
from ..files.open_clip import Piece, conversion
from ..files.opening import open_checkpoint
from ..files.writing import Weights, check_output, write_checkpoint
from ..running.building import load_transformers


def convert(
    location: str | Path | Checkpoint,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    tower: Literal["text"] | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Writes a CLIP as a model folder of transformers, and loads it once to see that nothing is missing.

    Args:
        location: folder or hub id of an open_clip ViT CLIP; with `tower`, a CLIPModel of transformers serves as well.
        out: folder to write. The same input gives the same bytes.
        tokenizer: folder or hub id whose tokenizer is taken where the checkpoint has none.
        tower: "text" for the text tower with its projection alone.
        force: replace an existing model.

    Returns:
        `out`, `class`, `tensors`, `source` (location and fingerprint), and `tokenizer`: where it is from, or None.

    Raises:
        InputError: the checkpoint cannot be read, or is something that the class cannot hold.
        VerificationError: what was written does not load.
    """
    place = Path(out)
    check_output(place, force=force)
    checkpoint = open_checkpoint(location)
    found = conversion(checkpoint, tower)
    files, origin = _tokenizer(checkpoint, tokenizer)
    if found.processor is not None:
        files[IMAGE_PROCESSOR_FILE] = _json(found.processor)
    write_checkpoint(
        place,
        Weights(
            {"model.safetensors": list(found.pieces)},
            lambda name: _form(checkpoint, found.pieces[name]),
            lambda name: _read(checkpoint, found.pieces[name]),
        ),
        files={"config.json": _json(found.config), **files},
        copy_from=None,
        finish=lambda folder: _check_loads(folder, found.config),
        force=force,
    )
    return {
        "out": str(out),
        "class": found.config["architectures"][0],
        "tensors": len(found.pieces),
        "source": {"location": checkpoint.location, "fingerprint": checkpoint.fingerprint()},
        "tokenizer": origin,
    }


def _read(checkpoint: Checkpoint, piece: Piece) -> Tensor:
    return _taken(piece, checkpoint.tensor(piece.name))


def _form(checkpoint: Checkpoint, piece: Piece) -> Tensor:
    """A tensor without numbers, of the shape and dtype of the one that is written."""
    info = checkpoint.headers[piece.name]
    return _taken(piece, torch.empty(info.shape, dtype=info.dtype, device="meta"))


def _taken(piece: Piece, stored: Tensor) -> Tensor:
    tensor = piece.of(stored)
    # open_clip can store the scale as a vector of one.
    return tensor.reshape(()) if piece.name == "logit_scale" else tensor


def _check_loads(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    written = open_checkpoint(folder)
    try:
        model, loading = load_transformers(config, {name: written.tensor(name) for name in written})
    except Unavailable as error:
        raise VerificationError(f"what was converted does not load: {error}") from error
    if odd := sorted(loading.missing | loading.unexpected | loading.mismatched):
        raise VerificationError(f"what was converted does not load as {type(model).__name__}: {', '.join(odd[:5])}")
    return {}


# --- open_clip ----------------------------------------------------------------------------------------------------


# --- files --------------------------------------------------------------------------------------------------------


def _tokenizer(checkpoint: Checkpoint, given: str | Path | None) -> tuple[dict[str, bytes | str], str | None]:
    """Tokenizer files by name, and where they are from."""
    for folder, origin in ((checkpoint.companions, checkpoint.location), (None, given)):
        if origin is None:
            continue
        place = folder if folder is not None else fetch_files(str(origin), TOKENIZER_FILES)
        if any((place / name).is_file() for name in VOCABULARY_FILES):
            files = {name: (place / name).read_bytes() for name in TOKENIZER_FILES if (place / name).is_file()}
            return dict(files), str(origin)
    if given is not None:
        raise InputError(f"{given}: no tokenizer there (tokenizer.json, or vocab.json with merges.txt)")
    return {}, None


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
