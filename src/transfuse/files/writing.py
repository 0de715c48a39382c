"""Writing a model folder: all of it or nothing.

The folder is built beside its final place and renamed into it at the end, so that a full disk, an interrupt or an
error half-way leaves neither a part of a model nor a damaged older one.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from ..errors import InputError
from .checkpoint import Checkpoint
from .reading import numel
from .streaming import Formed, Pieces, write_safetensors

_log = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_LARGE = 200 * 10**6
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".hdf5", ".keras", ".msgpack", ".onnx", ".onnx_data", ".ot",
    ".gguf", ".ggml", ".tflite", ".mlmodel", ".pb", ".pkl", ".pickle", ".nemo", ".mar",
}  # fmt: skip
RESULT_FILE = "result.json"  # beside every model that this tool writes
_LEFT_OUT_NAMES = {"README.md", RESULT_FILE, "map.json", "maps.json", "trainer_state.json"}
_LEFT_OUT_FOLDERS = {"maps", "onnx", "openvino", "coreml", "runs", "__pycache__"}
_LEFT_OUT_PATTERN = re.compile(
    r"\..*|.*\.pyc?|.*\.index(\.json)?|.*\.map\.json|openvino.*\.xml|.*\.data-\d+-of-\d+|.*\.ml(package|modelc)"
    r"|checkpoint-\d+"
)


def check_output(out: Path, *, force: bool) -> None:
    """Says whether a model folder can be written at `out`, before any work is done.

    Raises:
        InputError: `out` exists (with `force`: and is not an empty folder or one that looks like a model), or the
            folder it would lie in is missing or cannot be written to.
    """
    place = Path(os.path.realpath(out))
    if os.path.lexists(place):
        if not force:
            raise InputError(f"{out}: it exists; give another place, or ask for it to be replaced (force)")
        _check_replaceable(out, place)
    if not place.parent.is_dir():
        raise InputError(f"{out}: the folder {place.parent} does not exist; make it first")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise InputError(f"{out}: no permission to write to {place.parent}")


def _check_replaceable(out: Path, place: Path) -> None:
    """Refuses to replace what was hardly meant: force deletes the whole folder."""
    if not place.is_dir():
        raise InputError(f"{out}: it is not a folder; only a model folder is ever replaced")
    for name, kept in (("home", Path.home()), ("current", Path.cwd())):
        if kept.resolve().is_relative_to(place):
            raise InputError(f"{out}: the {name} folder is (in) it; it is never replaced")
    try:
        names = set(os.listdir(place))
    except OSError as err:
        raise InputError(f"{out}: cannot be read ({err.strerror})") from err
    if ".git" in names:
        raise InputError(f"{out}: it is a git repository, whose history would be lost; give another place")
    if names and names.isdisjoint({"config.json", RESULT_FILE}):
        raise InputError(f"{out}: it does not look like a model (no config.json or result.json); it is not replaced")


@dataclass(frozen=True)
class Weights:
    """What goes into the weight files of a folder.

    Attributes:
        plan: File name (.safetensors) -> names of the tensors in it, as `plan_like` gives it.
        form: Gives the shape and dtype of an output tensor by its name, before any is read.
        read: Gives an output tensor by its name, on any device, in the dtype to store: whole, or piece by piece in
            the order of its numbers. Called once for each, in the order of the file.
    """

    plan: Mapping[str, Sequence[str]]
    form: Callable[[str], Formed]
    read: Callable[[str], Pieces]


def write_checkpoint(
    out: Path,
    weights: Weights,
    *,
    files: Mapping[str, bytes | str],
    copy_from: Path | None,
    finish: Callable[[Path], Mapping[str, bytes | str]] | None = None,
    force: bool = False,
) -> None:
    """Writes a model folder; needs memory for what `read` gives at a time.

    Args:
        out: The folder to make.
        weights: Its weight files.
        files: Further files by name (text is stored as UTF-8); they win over copied ones.
        copy_from: Folder whose tokenizer, processor and other small files are copied; weights of any framework,
            indices, README.md, code, hidden files, maps, results and files over 200 MB are not.
        finish: Called with the folder when all else is in it and it is not yet in place: a last check of it, which may
            give further files.
        force: Replace an existing model folder.

    Raises:
        InputError: See `check_output`; or the disk is full, or a file cannot be read or written. `out` is then as it
            was before. What `read` raises is passed on, with the same promise.
    """
    check_output(out, force=force)
    _check_names(weights.plan, files)
    place = Path(os.path.realpath(out))
    # `read` and `finish` are called outside `_explained`: their errors are not the disk's.
    with _partial_folder(out, place) as partial:
        if copy_from is not None:
            with _explained(out):
                _copy_companions(copy_from, partial, skip=place)
        metadata = _write_shards(out, partial, weights)
        with _explained(out):
            _write_index(partial, weights.plan, metadata)
            for name, content in files.items():
                _write_file(partial / name, content)
        late = finish(partial) if finish is not None else {}
        with _explained(out):
            for name, content in late.items():
                _write_file(partial / name, content)
            _swap_in(partial, place)


def _check_names(plan: Mapping[str, Sequence[str]], files: Mapping[str, bytes | str]) -> None:
    """Refuses names that lead out of the folder, and a plan that cannot be stored."""
    for file in (*plan, *files):
        path = PurePosixPath(file)
        if not path.name or path.is_absolute() or ".." in path.parts or "\\" in file:
            raise InputError(f"'{file}': not the name of a file within the output folder")
    names = [name for shard in plan.values() for name in shard]
    for file in plan:
        if "/" in file or not file.endswith(".safetensors") or file in files:
            raise InputError(f"'{file}': not a name for a weight file; NAME.safetensors is needed, once")
    if not names or len(names) != len(set(names)):
        raise InputError("the output would have no tensors, or one tensor in two files")


@contextmanager
def _partial_folder(out: Path, place: Path) -> Iterator[Path]:
    """A new folder beside `place`, gone at the end unless it was renamed."""
    partial = _sibling(place, "partial")
    try:
        with _explained(out):
            partial.mkdir()
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sibling(place: Path, role: str) -> Path:
    return place.with_name(f".{place.name}.{role}-{secrets.token_hex(4)}")


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Turns errors of the file system into InputErrors that name `out` and the cause."""
    try:
        yield
    except OSError as err:
        about = f" ({err.filename})" if err.filename else ""
        raise InputError(f"{out}: cannot be written: {err.strerror or err}{about}; nothing was changed") from err


def _write_shards(out: Path, partial: Path, weights: Weights) -> dict[str, int]:
    """Writes the weight files and returns the metadata that transformers puts into an index."""
    totals = {"total_parameters": 0, "total_size": 0}
    for file, names in weights.plan.items():
        forms = {name: weights.form(name) for name in names}
        with _new_file(out / file, partial / file) as put:
            write_safetensors(put, forms, weights.read)
        totals["total_parameters"] += sum(numel(one.shape) for one in forms.values())
        totals["total_size"] += sum(numel(one.shape) * one.dtype.itemsize for one in forms.values())
    return totals


def _write_index(partial: Path, plan: Mapping[str, Sequence[str]], metadata: Mapping[str, Any]) -> None:
    """Writes the index of several weight files, as transformers does."""
    if len(plan) > 1:
        weight_map = {name: file for file, names in plan.items() for name in names}
        index = {"metadata": metadata, "weight_map": weight_map}
        _write_file(partial / _INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


@contextmanager
def _new_file(shown: Path, path: Path) -> Iterator[Callable[[bytes | memoryview], None]]:
    """A function that writes to a new file."""

    def put(content: bytes | memoryview) -> None:
        with _explained(shown):
            _put(file, content)

    with _explained(shown):
        file = path.open("xb")
    try:
        yield put
    finally:
        with _explained(shown):
            file.close()


def _put(file: BinaryIO, content: bytes | memoryview) -> None:
    file.write(content)


def _write_file(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _copy_companions(source: Path, target: Path, *, skip: Path) -> None:
    """Copies the files that belong to a model but are not its weights (see `write_checkpoint`).

    Raises:
        OSError: `source` is not a folder, or a file cannot be read or written.
    """
    if not source.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(source))
    for folder, folders, files in os.walk(source, onerror=_raise):
        here = Path(folder)
        # The old or the new output may lie inside the folder that is copied.
        folders[:] = [
            name
            for name in folders
            if not _left_out(name, folder=True) and (here / name).resolve() != skip and not _is_output(here / name)
        ]
        for name in files:
            if _is_companion(here / name, source):
                copy = target / here.relative_to(source) / name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(here / name, copy)


def _raise(err: OSError) -> None:
    raise err


def _is_output(folder: Path) -> bool:
    """Whether this tool wrote a model there, which is no part of another one."""
    return (folder / RESULT_FILE).is_file()


def _left_out(name: str, *, folder: bool) -> bool:
    names = _LEFT_OUT_FOLDERS if folder else _LEFT_OUT_NAMES
    return name in names or _LEFT_OUT_PATTERN.fullmatch(name) is not None


def _is_companion(path: Path, source: Path) -> bool:
    if _left_out(path.name, folder=False):
        return False
    if path.suffix.lower() in _WEIGHT_SUFFIXES:
        # sentence-transformers keeps modules with weights of their own (a Dense layer) in folders such as 2_Dense.
        if path.parent != source and path.parent.name[:1].isdigit():
            _log.warning("%s: the weights of this module are not copied; the output lacks them", path)
        return False
    if not path.is_file():
        return False
    if path.stat().st_size > _LARGE:
        _log.warning("%s: not copied, since it is larger than %d MB", path, _LARGE // 10**6)
        return False
    return True


def _swap_in(partial: Path, place: Path) -> None:
    """Renames the finished folder into place; an older one goes only once the new one is there."""
    if not place.exists():
        partial.rename(place)
        return
    aside = _sibling(place, "old")
    try:
        place.rename(aside)
        partial.rename(place)
    finally:
        if aside.exists() and not place.exists():
            aside.rename(place)
    try:
        shutil.rmtree(aside)
    except OSError as err:
        _log.warning("%s: the replaced folder could not be deleted (%s)", aside, err.strerror)


def plan_like(target: Checkpoint, names: Mapping[str, str | None], extra: Sequence[str]) -> dict[str, list[str]]:
    """The output's weight files, laid out as the target's.

    Args:
        target: Checkpoint whose shards are followed.
        names: For each of the target's tensors its name in the output, or None if it is dropped.
        extra: Names of further tensors (heads that are carried over); they go into the last file.

    Returns:
        File name -> output names. Files are named as in the target if it has them as safetensors and none is left
        empty, else model.safetensors or model-0000x-of-0000y.safetensors.

    Raises:
        ValueError: `names` is not about exactly the target's tensors, or an output name comes up twice.
    """
    if names.keys() != target.headers.keys():
        odd = sorted(names.keys() ^ target.headers.keys())
        raise ValueError(f"names must cover exactly the target's tensors; odd ones: {odd[:5]}")
    shards = [[new for name in held if (new := names[name]) is not None] for held in target.shards.values()]
    shards[-1].extend(extra)
    flat = [name for shard in shards for name in shard]
    if len(flat) != len(set(flat)):
        raise ValueError(f"output name used twice: {sorted({name for name in flat if flat.count(name) > 1})[:5]}")
    shards = [shard for shard in shards if shard]
    return dict(zip(_shard_files(target, len(shards)), shards, strict=True))


def _shard_files(target: Checkpoint, count: int) -> list[str]:
    if count == 1:
        return ["open_clip_model.safetensors" if target.kind == "open_clip" else "model.safetensors"]
    files = list(target.shards)
    if len(files) == count and all(file.endswith(".safetensors") for file in files):
        return files
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
