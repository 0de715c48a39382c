"""Reading checkpoints: folders, single files, hub models and models in memory, one tensor at a time.

Nothing in a checkpoint is ever executed: pickles are read with `weights_only=True`, which refuses code.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import errors as hub_errors
from torch import nn

from ..errors import InputError
from .reading import BLOCK, DTYPES, InMemory, Known, Part, Parts, Safetensors, TensorInfo, flat_blocks

_log = logging.getLogger(__name__)

_PICKLES = (".pt", ".pth", ".bin")
_PLAIN = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    *VOCABULARY_FILES, TOKENIZER_CONFIG, "merges.txt", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILES = (IMAGE_PROCESSOR_FILE, "processor_config.json")
_COMPANIONS = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.bpe", "*.vocab"]
_HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\S+))?", re.ASCII)
# Wrappers of training code (DataParallel, torch.compile) put their own name before every tensor name.
_WRAPPERS = ("module.", "_orig_mod.")
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_UNWRAP = ("state_dict", "model", "model_state_dict")
_QUANTISED = {"qweight", "qzeros", "SCB", "absmax", "quant_state"}
_ADAPTER = "adapters are not read yet: load it with peft, call merge_and_unload(), save the merged model and give that"
_MIXED = "the files of two models or versions may be mixed, or the download is not complete"
# What a malformed pickle or archive makes torch.load raise, besides UnpicklingError.
_LOAD_ERRORS = (OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, struct.error)
# The bases of HfHubHTTPError: OSError and what every failed request raises in the HTTP client of this release.
_HUB_ERRORS: tuple[Any, ...] = (*hub_errors.HfHubHTTPError.__bases__, OSError, ValueError, RuntimeError)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model's tensors, read from disk only when asked for and never cached.

    Attributes:
        location: What the user gave ('in memory' for a mapping or a module).
        root: Folder on disk; the parent for a single file, None in memory.
        kind: "transformers", "open_clip", "timm" or "state_dict" (a bare file, in memory, a folder without config).
        config: Parsed config, with the caller's keys over it; {} if there is none.
        headers: Tensor infos by name, in file order, without the wrapper prefix ("module.", "_orig_mod."). The dtype is
            the stored one, also of a tensor that `changes` make anew in float32.
        shards: File name -> names of the tensors in it.
        origin: What it was before it was seen otherwise (`conform.py`); None: it is as it was opened.
        changes: What makes a tensor of its form in `origin`, for those that are seen otherwise; linear.
    """

    location: str
    root: Path | None
    kind: str
    config: dict[str, Any] = field(repr=False)
    headers: Mapping[str, TensorInfo] = field(repr=False)
    shards: dict[str, tuple[str, ...]] = field(repr=False)
    _read: Callable[[str], torch.Tensor] = field(repr=False)
    origin: Checkpoint | None = field(default=None, repr=False)
    changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict, repr=False)
    known: Known = field(default_factory=Known, repr=False)

    @property
    def companions(self) -> Path | None:
        """Folder whose other files belong to the model; None for a bare file, beside which anything may lie."""
        return None if self.kind == "state_dict" else self.root

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor, on the CPU, in its stored dtype. It may be shared: do not change it in place.

        One of `changes` comes in float32, or float64 if it is stored so.

        Raises:
            InputError: No such tensor, its file cannot be read, or (checked on the first read) it has NaN or inf.
        """
        return self._finite(name, self._load(name))

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The numbers of a tensor in order, shape (n,), `reading.BLOCK` at a time; each is valid until the next.

        Raises:
            InputError: as `tensor`, but what was read before a NaN or inf has been given by then.
        """
        for block in self.raw_blocks(name):
            if name not in self.known.finite and not is_finite(block):
                self.tensor(name)  # says where
            yield block
        self.known.finite.add(name)

    def raw_blocks(self, name: str) -> Iterator[torch.Tensor]:
        """`blocks` with whatever is in them."""
        if self.origin is not None and name in self.changes:
            return iter(self.changed(name, self.origin.tensor(name)).reshape(-1).split(BLOCK))
        if self.origin is not None:
            return self.origin.raw_blocks(name)
        self._count(name)
        return flat_blocks(self._read, name)

    def changed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of `origin` as it is seen here."""
        change = self.changes.get(name)
        return tensor if change is None else change(tensor).contiguous()

    def rounded(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor as it would be if it had been stored in that dtype: rounded first, then seen otherwise."""
        if name not in self.changes or self.origin is None:
            return self.tensor(name).to(dtype)
        return self.changes[name](self.origin.tensor(name).to(dtype))

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    def fingerprint(self) -> str:
        """blake2b (64 hex digits) over name, dtype, shape and bytes of every tensor; the same however sharded."""
        if self.known.fingerprint is None:
            digest = Fingerprint(self.headers)
            for name in digest.names:
                digest.begin(name)
                for block in self.raw_blocks(name):
                    digest.update(block)
            self.known.fingerprint = digest.hexdigest()
        return self.known.fingerprint

    def _load(self, name: str) -> torch.Tensor:
        if self.origin is not None:
            return self.changed(name, self.origin.tensor(name))
        self._count(name)
        return self._read(name)

    def _count(self, name: str) -> None:
        if name not in self.headers:
            raise InputError(f"{self.location}: it has no tensor '{name}'; the model may be of another architecture")
        self.known.reads[name] += 1

    def _finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        bad = None if name in self.known.finite else _first_not_finite(tensor)
        if bad is not None:
            file = self.root / self.headers[name].file if self.root else self.location
            fault = f"tensor '{name}' holds {tensor[bad].item()} at index {bad}"
            raise InputError(f"{file}: {fault}; the model is damaged (training diverged, or a conversion overflowed)")
        self.known.finite.add(name)
        return tensor


class Fingerprint:
    """The fingerprint of tensors that are given block by block, in the order of `names`."""

    def __init__(self, headers: Mapping[str, TensorInfo]):
        self.names = sorted(headers)
        self._headers = headers
        self._digest = hashlib.blake2b(digest_size=32)

    def begin(self, name: str) -> None:
        """The next blocks are of this tensor."""
        info = self._headers[name]
        self._digest.update(json.dumps([name, str(info.dtype), info.shape]).encode() + b"\0")

    def update(self, block: torch.Tensor) -> None:
        """Numbers of a tensor, in order, of any shape."""
        self._digest.update(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """64 hex digits."""
        return self._digest.hexdigest()


def open_checkpoint(
    location: str | os.PathLike[str] | Mapping[str, torch.Tensor] | nn.Module | Checkpoint,
    *,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    role: str = "the model",
) -> Checkpoint:
    """Opens a checkpoint; only file headers are read.

    Args:
        location: A model folder (transformers, open_clip, timm), a .safetensors/.pt/.pth/.bin file, a hub id
            ("org/name", "org/name@revision"), a mapping name -> tensor, a module (its state dict, and its
            config if it has one), or a Checkpoint. What is in memory is copied (tied tensors once), so that it can be
            changed later: training a model changes its state dict.
        config: Keys that go over those of the model's own config: a mapping, a JSON file, or JSON text ("{...").
        role: What the model is to the caller ("source", "tuned", ...), for messages.

    Raises:
        InputError: It is not there, not readable, not complete, quantised, an adapter, or holds code; or nothing that
            can be opened.
    """
    extra = _given_config(config)
    if isinstance(location, Checkpoint):
        return replace(location, config={**location.config, **extra}) if extra else location
    if isinstance(location, nn.Module):
        location, extra = location.state_dict(), {**_config_of(location), **extra}
    if isinstance(location, Mapping):
        part = _mapping_part(location, "", "in memory", copied=True)
        return _assemble("in memory", None, "state_dict", extra, {"": part})
    if not isinstance(location, str | os.PathLike):
        raise InputError(
            f"{role} is given as {type(location).__name__}, which is no model: give a folder, a weight file, a hub id, "
            "a state dict (name -> tensor) or a torch.nn.Module"
        )
    where = os.fspath(location)
    path = Path(where).expanduser()
    if where and os.path.isdir(path):
        return _open_folder(where, path, extra)
    if where and os.path.exists(path):
        return _assemble(where, path.parent, "state_dict", extra, {path.name: _file_part(path)})
    match = _HUB_ID.fullmatch(where) if isinstance(location, str) else None
    if match is None or path.suffix in (".safetensors", *_PICKLES):
        raise InputError(f"'{where}': no such file or folder, and not a hub id (org/name or org/name@revision)")
    return _open_folder(where, _fetch(where, match["repo"], match["revision"]), extra)


def _given_config(config: Mapping[str, Any] | str | os.PathLike[str] | None) -> dict[str, Any]:
    if config is None or isinstance(config, Mapping):
        return copy.deepcopy(dict(config or {}))  # the caller may go on to change it, like the tensors
    text = os.fspath(config)
    return _object(text, "config text") if text.lstrip().startswith("{") else _read_object(Path(text).expanduser())


def _config_of(model: nn.Module) -> dict[str, Any]:
    """What a model's own config says, as it would stand in a file; {} if it has none."""
    inner = getattr(model, "_orig_mod", model.module if isinstance(model, _PARALLEL) else model)
    if inner is not model:
        return _config_of(inner)
    own: Any = getattr(model, "config", None)
    if not hasattr(own, "to_dict"):
        return {}
    found = json.loads(json.dumps(own.to_dict(), default=str))  # a file has text where labels have numbers
    # The config of a model with a new head still names the class that it was loaded from until it is saved.
    return {**found, "architectures": [type(model).__name__]}


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return _object(path.read_bytes(), str(path))
    except OSError as err:
        raise InputError(f"{path}: cannot be read ({err.strerror or err})") from err


def _object(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise InputError(f"{where}: not valid JSON ({err}); it may be cut off, or wrongly edited") from err
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON object was expected, not {type(value).__name__}")
    return value


def _candidates(folder: Path) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The weight files to look for, best first, and the folder's config.json ({} if none).

    A folder can hold a model twice: transformers is preferred to open_clip, and that to timm (image tower only).
    """
    plain = _read_object(folder / "config.json") if (folder / "config.json").exists() else {}
    if not (folder / "open_clip_config.json").exists():
        return _PLAIN, plain
    return (*_PLAIN, *_OPEN_CLIP) if "model_type" in plain else (*_OPEN_CLIP, *_PLAIN), plain


def _open_folder(where: str, folder: Path, extra: dict[str, Any]) -> Checkpoint:
    names, config = _candidates(folder)
    weights = next((name for name in names if (folder / name).exists()), None)
    if weights is None:
        if (folder / "adapter_config.json").exists():
            raise InputError(f"{where}: an adapter without the model's weights; {_ADAPTER}")
        raise InputError(f"{where}: no weights in it; looked for {', '.join(names)}")
    if weights in _OPEN_CLIP:
        config = _read_object(folder / "open_clip_config.json")
    config = {**config, **extra}
    parts = _index_parts(folder, weights) if weights.endswith(".json") else {}
    return _assemble(where, folder, _kind(weights, config), config, parts or {weights: _file_part(folder / weights)})


def _kind(weights: str, config: Mapping[str, Any]) -> str:
    if weights in _OPEN_CLIP:
        return "open_clip"
    if "model_type" not in config and isinstance(config.get("architecture"), str):
        return "timm"
    return "transformers" if config else "state_dict"


def _file_part(path: Path) -> Part:
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as err:
        raise InputError(f"{path}: cannot be read ({err.strerror or err})") from err
    if not start or start.startswith(b"version https://git-lfs"):
        fault = "a Git LFS pointer, not the weights ('git lfs pull' brings them)" if start else "the file is empty"
        raise InputError(f"{path}: {fault}; get it again")
    if path.suffix == ".safetensors":
        return Safetensors(path)
    if path.suffix in _PICKLES:
        return _pickle_part(path)
    raise InputError(f"{path}: not a weight file; .safetensors, {', '.join(_PICKLES)} are read")


def _weight_map(path: Path) -> dict[str, list[str]]:
    """File name -> tensor names, as an index file says."""
    weight_map = _read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: it has no 'weight_map' object; the index is damaged")
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        # A name such as "../x" would read outside the model's folder.
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"{path}: tensor '{name}' is said to be in {file!r}, which is not a file of this folder")
        files.setdefault(file, []).append(name)
    return dict(sorted(files.items()))


def _index_parts(folder: Path, index: str) -> dict[str, Part]:
    parts = {}
    for file, named in _weight_map(folder / index).items():
        path = folder / file
        if not path.exists():
            raise InputError(f"{path}: missing, though {index} names it; the download is not complete")
        parts[file] = part = _file_part(path)
        for name in sorted(part.infos.keys() ^ set(named)):
            is_in, says = ("is in", "does not say so") if name in part.infos else ("is not in", "says so")
            raise InputError(f"{path}: tensor '{name}' {is_in} it, but {index} {says}; {_MIXED}")
    return parts


def _assemble(where: str, root: Path | None, kind: str, config: dict[str, Any], parts: dict[str, Part]) -> Checkpoint:
    names = [name for part in parts.values() for name in part.infos]
    if not names:
        raise InputError(f"{where}: it holds no tensors")
    cut = _wrapper_length(names)
    headers = {name[cut:]: info for part in parts.values() for name, info in part.infos.items()}
    shards = {file: tuple(name[cut:] for name in part.infos) for file, part in parts.items()}
    _refuse_unmergeable(where, config, headers)
    holds = {name[cut:]: (file, name) for file, part in parts.items() for name in part.infos}
    return Checkpoint(
        location=where, root=root, kind=kind, config=config, headers=headers, shards=shards, _read=Parts(parts, holds)
    )  # fmt: skip


def _wrapper_length(names: Sequence[str]) -> int:
    """Length of the wrapper prefixes that all names have, one inside the other."""
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) and len(name) > len(prefix) for name in names):
            return len(prefix) + _wrapper_length([name[len(prefix) :] for name in names])
    return 0


def _refuse_unmergeable(where: str, config: Mapping[str, Any], headers: Mapping[str, TensorInfo]) -> None:
    advice = "quantised weights cannot be merged; give the model in float16, bfloat16 or float32"
    if config.get("quantization_config"):
        raise InputError(f"{where}: its config has a 'quantization_config'; {advice}")
    for name, info in headers.items():
        small_float = info.dtype.is_floating_point and info.dtype.itemsize == 1
        packed = name.endswith(".weight") and info.dtype in (torch.int8, torch.uint8)
        if small_float or packed or not _QUANTISED.isdisjoint(name.split(".")):
            raise InputError(f"{where}, file '{info.file}': tensor '{name}' is quantised ({info.dtype}); {advice}")
    if all(".lora_" in name for name in headers):
        raise InputError(f"{where}: it holds LoRA matrices only (such as '{next(iter(headers))}'); {_ADAPTER}")


def _first_not_finite(tensor: torch.Tensor) -> tuple[int, ...] | None:
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    if is_finite(tensor):
        return None
    flat = torch.isfinite(tensor).logical_not().reshape(-1).nonzero()[0, 0]
    return tuple(int(i) for i in torch.unravel_index(flat, tensor.shape))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor has neither NaN nor inf."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if math.isfinite(tensor.sum()):
        return True
    # Sums can overflow. The extremes are NaN or inf if any entry is, and need no mask of the tensor's size.
    return bool(torch.isfinite(torch.stack(list(tensor.aminmax()))).all())


def _pickle_part(path: Path) -> Part:
    try:
        # Files from before torch 1.6 are not zip archives and cannot be mapped: they are held in memory whole.
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as err:
        raise InputError(
            f"{path}: refused, since reading it can run code: it holds more than tensors and plain values (or is no "
            f"torch file at all). If you trust it, load it and write it with safetensors.torch.save_file. Reason: {err}"
        ) from err
    except _LOAD_ERRORS as err:
        reason = (str(err) or type(err).__name__).splitlines()[0]
        raise InputError(f"{path}: not a readable torch file ({reason}), cut off or damaged; get it again") from err
    return _mapping_part(content, path.name, str(path))


def _mapping_part(content: Any, file: str, where: str, *, copied: bool = False) -> Part:
    """A part of a state dict, after unwrapping one level ({"state_dict": ...} and such)."""
    if isinstance(content, Mapping):
        content = next((content[key] for key in _UNWRAP if isinstance(content.get(key), Mapping)), content)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            _log.debug("%s: '%s' is %s, not a tensor: left out", where, name, type(value).__name__)
            continue
        if value.layout != torch.strided or value.is_meta or value.dtype not in DTYPES.values():
            raise InputError(f"{where}: tensor '{name}' ({value.dtype}) is sparse, quantised, odd or without data")
        tensors[name] = value.detach()
    if not tensors:
        raise InputError(f"{where}: no tensors in it; a state dict is read, alone or under one of {', '.join(_UNWRAP)}")
    return InMemory(_copies(tensors) if copied else tensors, file)


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU; tensors that are one in memory (tied weights) stay one."""
    made: dict[object, torch.Tensor] = {}
    found = {}
    for name, x in tensors.items():
        place = x.device, x.data_ptr(), x.shape, x.stride(), x.dtype
        if place not in made:
            made[place] = x.to("cpu", copy=True)
        found[name] = made[place]
    return found


def _fetch(where: str, repo: str, revision: str | None) -> Path:
    """Brings a hub model's small files and the weights of one format; honours the cache and HF_HUB_OFFLINE."""
    folder = _snapshot(where, repo, revision, _COMPANIONS)
    for name in _candidates(folder)[0]:
        is_index = name.endswith(".json") and (folder / name).exists()
        files = list(_weight_map(folder / name)) if is_index else [name]
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
    match = _HUB_ID.fullmatch(location)
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
