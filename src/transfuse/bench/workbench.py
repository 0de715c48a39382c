"""What a process keeps while it measures: live models, prepared data, scores of states it has seen."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..data.splits import Split
from ..data.tasks import TaskSpec
from ..files.checkpoint import Checkpoint
from ..files.folders import PROCESSOR_FILES, TOKENIZER_FILES
from ..files.opening import open_checkpoint
from ..running.corruption import corrupted
from ..running.inputs import Prepared, prepare
from ..running.live import LiveModel, load_live, with_state
from ..running.scores import Scores, evaluate, score_dict
from .cells import CellStore
from .recipes.reading import parse_recipe, stated
from .recipes.sections import Section
from .recipes.spec import Recipe
from .store import ModelStore, data_fingerprint

Value = TypeVar("Value")

_OPENED, _LIVE, _PREPARED, _SCORES = 16, 4, 16, 4096
_LABELS = ("id2label", "label2id", "num_labels", "_name_or_path", "transformers_version")


@dataclass(frozen=True)
class Settings:
    """What a run was asked for, in a form that goes to other processes.

    Attributes:
        recipe: plain JSON types.
        sections: names of those to run.
        threads: of torch, in every process.
    """

    recipe: Mapping[str, Any]
    sections: tuple[Section, ...]
    out: Path
    cache: Path
    data_dir: Path | None
    device: str
    threads: int
    progress: bool


class Recent(OrderedDict[Hashable, Any]):
    """Keeps the values that were used last."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def get_or(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of a key, made if it is not kept."""
        if key not in self:
            self[key] = make()
            if len(self) > self.size:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]


class Workbench:
    """Everything a process needs to measure cells."""

    def __init__(self, settings: Settings, *, only_read: bool = False):
        self.settings = settings
        self.recipe: Recipe = parse_recipe(settings.recipe)
        self.store = ModelStore(self.recipe, settings.cache, data_dir=settings.data_dir, device=settings.device)
        self.cells = CellStore(settings.cache / "cells", only_read=only_read)
        self._opened, self._live = Recent(_OPENED), Recent(_LIVE)
        self._prepared, self._scores = Recent(_PREPARED), Recent(_SCORES)

    def location(self, name: str, seed: int) -> str:
        """Where a model of the recipe is."""
        return self.store.location(name, seed)

    def checkpoint(self, name: str, seed: int) -> Checkpoint:
        """A model of the recipe, opened once: its fingerprint costs a pass over all tensors."""
        location = self.location(name, seed)
        return self._opened.get_or(location, lambda: open_checkpoint(location))

    def live(self, name: str, seed: int) -> LiveModel:
        """A model of the recipe, loaded."""
        found = self.checkpoint(name, seed)
        return self._live.get_or(found.location, lambda: load_live(found, device=self.settings.device))

    def prepared(
        self, task: TaskSpec, split: Split, live: LiveModel, *, shots: int | None = None, seed: int = 0
    ) -> Prepared:
        """Inputs of a split for models with these processors; shots come from all training rows."""
        limit = None if shots is not None else getattr(self.recipe.limit, split)
        key = (task.model_dump_json(), split, _processors(live), limit, shots, seed)
        options = {"data_dir": self.settings.data_dir, "limit": limit, "shots": shots, "seed": seed}
        return self._prepared.get_or(key, lambda: prepare(task, split, live, **options))

    def scores(self, live: LiveModel, state: Mapping[str, Tensor], task: TaskSpec, split: Split) -> Scores:
        """Scores of a model with these weights; the same weights are run once.

        Several methods give the same weights where the right answer is the identity.
        """
        inputs = self.prepared(task, split, live)
        about = (task.model_dump_json(), split, _processors(live), digest_of_config(live))
        key = (*about, digest_of_state(state))
        return self._scores.get_or(key, lambda: score_dict(evaluate(with_state(live, state), task, inputs)))

    def scores_on_corrupted(self, live: LiveModel, state: Mapping[str, Tensor], task: TaskSpec) -> Scores | None:
        """Scores on the test split's images, corrupted, as means over the corruptions; None for texts."""
        inputs = corrupted(self.prepared(task, "test", live))
        if not inputs:
            return None

        def measured() -> Scores:
            model = with_state(live, state)
            found = [score_dict(evaluate(model, task, one)) for one in inputs]
            return {name: sum(one[name] for one in found) / len(found) for name in found[0]}

        about = (task.model_dump_json(), "corrupted", _processors(live), digest_of_config(live))
        return self._scores.get_or((*about, digest_of_state(state)), measured)

    def task_depends_on(self, name: str | None) -> Any:
        """What the data of a task are, for keys."""
        if name is None:
            return None
        task = self.recipe.tasks[name]
        return [stated(task), data_fingerprint(task.data, self.settings.data_dir), stated(self.recipe.limit)]


def digest_of_state(state: Mapping[str, Tensor]) -> str:
    """Hash of tensors."""
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        found.update(f"{name} {tuple(state[name].shape)} {state[name].dtype}".encode())
        found.update(state[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def digest_of_config(live: LiveModel) -> str:
    """Hash of a model's config, labels included: they say which output is which class."""
    return hashlib.blake2b(json.dumps(live.config, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _processors(live: LiveModel) -> str:
    """Hash of what turns data into inputs: files of processors and tokenizer, and the config but for its labels."""
    config = {key: value for key, value in live.config.items() if key not in _LABELS}
    found = f"{_processor_files(live.location)} {json.dumps(config, sort_keys=True, default=str)}"
    return hashlib.blake2b(found.encode(), digest_size=16).hexdigest()


@lru_cache(maxsize=256)
def _processor_files(location: str) -> str:
    found = hashlib.blake2b(digest_size=16)
    folder = open_checkpoint(location).companions
    for name in (*PROCESSOR_FILES, *TOKENIZER_FILES) if folder is not None else ():
        if (file := Path(folder or ".") / name).is_file():
            found.update(name.encode() + file.read_bytes())
    return found.hexdigest()
