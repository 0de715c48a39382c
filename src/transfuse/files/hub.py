"""Models of the hub: what of one is fetched into the cache, and what is said where that fails."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors as hub_errors

from ..errors import InputError
from .folders import candidates, weight_map

_log = logging.getLogger(__name__)

HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\S+))?", re.ASCII)
_COMPANIONS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.bpe", "*.vocab"]
# The bases of HfHubHTTPError: OSError and what every failed request raises in the HTTP client of this release.
_HUB_ERRORS: tuple[Any, ...] = (*hub_errors.HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError)


def fetch_model(where: str, repo: str, revision: str | None) -> Path:
    """Brings a hub model's small files and the weights of one format; honours the cache and HF_HUB_OFFLINE."""
    folder = _snapshot(where, repo, revision, _COMPANIONS)
    for name in candidates(folder)[0]:
        is_index = name.endswith(".json") and (folder / name).exists()
        files = list(weight_map(folder / name)) if is_index else [name]
        folder = _snapshot(where, repo, revision, [*_COMPANIONS, *files])
        if (folder / files[0]).exists():
            break
    return folder


def fetch_files(location: str, patterns: Sequence[str]) -> Path:
    """The folder with the files of these names: a local one, or what a hub model has of them.

    Raises:
        InputError: it is neither, or cannot be had.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        return path
    match = HUB_ID.fullmatch(location)
    if match is None:
        raise InputError(f"'{location}': no such folder, and not a hub id (org/name or org/name@revision)")
    return _snapshot(location, match["repo"], match["revision"], list(patterns))


def _snapshot(where: str, repo: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except hub_errors.IncompleteSnapshotError as err:
        # Offline, with a part of the repository in the cache: it may well have the weights.
        _log.warning("%s: the hub was not reached; using what the cache has of it", where)
        return Path(err.snapshot_path)
    except _HUB_ERRORS as err:
        raise InputError(
            f"'{where}': no such file or folder here, and as the hub model '{repo}' (revision {revision or 'main'}) it "
            f"could not be had ({type(err).__name__}: {str(err).strip()[:300]}); check the name and the network; for a "
            "gated or private model ask for access on its page and log in with 'hf auth login'"
        ) from err
