"""Models of a recipe, made once and kept: a cache that is addressed by everything a model depends on.

A model's key is a hash of its spec, of the keys of the models it is made from and of the local data it is trained on:
a changed recipe makes what changed and nothing else, and recipes share what they have in common. A model is made beside
its place and renamed into it; what a killed run left half-way is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..data.splits import DataSpec, data_place
from ..errors import InputError
from ..files.opening import open_checkpoint
from ..porting.convert import convert
from ..porting.planted import plant
from ..study.initial import initialise
from ..study.train import train
from .recipes.parts import ConvertSpec, ModelSpec
from .recipes.reading import stated
from .recipes.spec import Recipe

FORMAT = 1  # raised when what models or cells hold changes, defaults included
_ABOUT = "made.json"


def default_cache() -> Path:
    """$TRANSFUSE_CACHE, or ~/.cache/transfuse."""
    return Path(os.environ.get("TRANSFUSE_CACHE") or "~/.cache/transfuse").expanduser()


def digest(content: Any) -> str:
    """Hash of plain JSON types, 64 hex digits."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=32).hexdigest()


@dataclass(frozen=True)
class MadeModel:
    """A model that is there.

    Attributes:
        name, seed: in the recipe.
        location: folder or hub id.
        key: of the cache.
        fingerprint: of its tensors.
        seconds: it took when it was made.
        report: of its training.
    """

    name: str
    seed: int
    location: str
    key: str
    fingerprint: str
    seconds: float
    report: dict[str, Any]


class ModelStore:
    """The models of one recipe in one cache."""

    def __init__(self, recipe: Recipe, cache: Path, *, data_dir: Path | None, device: str):
        self.recipe, self.root, self.data_dir, self.device = recipe, cache / "models", data_dir, device
        self._keys: dict[tuple[str, int], str] = {}

    def spec(self, name: str, seed: int) -> ModelSpec:
        """A model's spec under a recipe's seed."""
        return self.recipe.models[name].shifted(seed, self.recipe.limit.train)

    def key(self, name: str, seed: int) -> str:
        """What the model depends on, as a hash; nothing has to be made for it."""
        if (name, seed) not in self._keys:
            self._keys[name, seed] = digest(self._depends_on(self.spec(name, seed), seed))
        return self._keys[name, seed]

    def _depends_on(self, spec: ModelSpec, seed: int) -> dict[str, Any]:
        if spec.location is not None:
            place = Path(spec.location).expanduser()
            where = {"location": open_checkpoint(place).fingerprint() if place.exists() else spec.location}
            return where if spec.convert is None else {"format": FORMAT, **where, "convert": stated(spec.convert)}
        own = {key: value for key, value in stated(spec).items() if key not in ("base", "of", "architecture")}
        data = [data_fingerprint(one, self.data_dir) for one in data_specs(spec)]
        kept = None if spec.train is None or spec.train.keep is None else spec.train.keep.task
        if isinstance(kept, str) and Path(kept).is_file():
            data.append(_file_hash(Path(kept)))  # moments
        needs = [self.key(one, seed) for one in spec.needs]
        return {"format": FORMAT, "spec": own, "needs": needs, "data": data, "device": self.device.split(":")[0]}

    def location(self, name: str, seed: int) -> str:
        """Where the model is; it need not be there yet."""
        given = self.recipe.models[name].given
        return given if given is not None else str(self._folder(name, seed) / "model")

    def _folder(self, name: str, seed: int) -> Path:
        return self.root / self.key(name, seed)[:32]

    def made(self, name: str, seed: int) -> MadeModel | None:
        """The model if it was made and is whole."""
        key, location = self.key(name, seed), self.location(name, seed)
        try:
            about = json.loads((self._folder(name, seed) / _ABOUT).read_text(encoding="utf-8"))
            return MadeModel(name, seed, location, key, about["fingerprint"], about["seconds"], about["report"])
        except (OSError, ValueError, KeyError):
            return None

    def make(self, name: str, seed: int) -> MadeModel:
        """The model, made (or downloaded) if it is not there; the models it is made from have to be.

        Raises:
            TransfuseError: it cannot be made.
        """
        given = self.recipe.models[name].given
        if given is not None:
            return MadeModel(name, seed, given, self.key(name, seed), open_checkpoint(given).fingerprint(), 0.0, {})
        found = self.made(name, seed)
        if found is None:
            self._build(name, seed)
            found = self.made(name, seed)
            assert found is not None
        return found

    def _build(self, name: str, seed: int) -> None:
        folder, began = self._folder(name, seed), time.monotonic()
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        _sweep(folder)
        try:
            _make_folder(partial)
            report = self._make(self.spec(name, seed), seed, partial / "model")
            about = {
                "name": name,
                "fingerprint": open_checkpoint(partial / "model").fingerprint(),
                "seconds": round(time.monotonic() - began, 1),
                "report": report,
            }
            (partial / _ABOUT).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            if self.made(name, seed) is None:  # another run may have made it meanwhile
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _make(self, spec: ModelSpec, seed: int, out: Path) -> dict[str, Any]:
        if spec.convert is not None:
            return self._convert(spec, spec.convert, out)
        if spec.init is not None:
            initialise(spec.init, out, data_dir=self.data_dir)
            return {}
        assert spec.base is not None
        base = self.location(spec.base, seed)
        if spec.train is not None:
            found = train(base, spec.train, out, data_dir=self.data_dir, device=self.device)
            return {key: found.get(key) for key in ("loss", "validation", "steps", "examples")}
        assert spec.plant is not None and spec.of is not None
        plant(base, out, group=spec.plant, seed=spec.seed, like=self.location(spec.of, seed))
        return {}

    def _convert(self, spec: ModelSpec, how: ConvertSpec, out: Path) -> dict[str, Any]:
        given = spec.location
        if spec.init is not None:
            given = str(initialise(spec.init, out.with_name("unconverted"), data_dir=self.data_dir))
        assert given is not None
        convert(given, out, tokenizer=how.tokenizer, tower=how.tower)
        if spec.init is not None:
            shutil.rmtree(given)
        return {}


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"the cache {folder.parent} cannot be written ({error.strerror}); give another (--cache)"
        ) from error


def _sweep(folder: Path) -> None:
    """Takes away what killed runs left of this model."""
    for old in folder.parent.glob(f".{folder.name}.*.partial"):
        if not _is_alive(int(old.name.split(".")[-2])):
            shutil.rmtree(old, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# --- data ---------------------------------------------------------------------------------------------------------


def data_specs(spec: Any) -> Iterator[DataSpec]:
    """All data sets that a spec speaks of."""
    if isinstance(spec, DataSpec):
        yield spec
    elif isinstance(spec, BaseModel):
        for name in type(spec).model_fields:
            yield from data_specs(getattr(spec, name))
    elif isinstance(spec, list | tuple):
        for one in spec:
            yield from data_specs(one)


def data_fingerprint(spec: DataSpec, data_dir: Path | None) -> str:
    """Hash of the local files of a data set; "" where they come from the hub."""
    place = data_place(spec, data_dir)
    if place is None:
        return ""
    files = [place] if place.is_file() else sorted(one for one in place.rglob("*") if one.is_file())
    return digest([[one.relative_to(place).as_posix(), _file_hash(one)] for one in files])


_HASHES: dict[tuple[str, int, int], str] = {}


def _file_hash(file: Path) -> str:
    about = file.stat()
    key = (str(file.resolve()), about.st_size, about.st_mtime_ns)
    if key not in _HASHES:
        with file.open("rb") as stream:
            _HASHES[key] = hashlib.file_digest(stream, "blake2b").hexdigest()
    return _HASHES[key]
