"""The inputs of one split, processed once and used for any number of models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from ..data.splits import Split, few_shot, load_split
from ..data.tasks import LANGUAGE, SEQ2SEQ, ZERO_SHOT, TaskSpec
from ..errors import InputError
from .live import LiveModel
from .tokens import Batch, blocks_of, prompts_of, targets_of, texts_of

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

# Processed images are kept up to this size; larger splits are read again in every pass.
MEMORY = 2 * 10**9
_CHUNK = 256


class Source(Protocol):
    """Rows that can be read in any order."""

    def __len__(self) -> int: ...

    def read(self, index: Tensor, generator: Generator | None) -> Batch:
        """The rows of these numbers; a generator draws anew what is random (masks), else it is fixed."""
        ...


@dataclass(frozen=True)
class Prepared:
    """Model inputs of one split.

    Attributes:
        source: the processed rows.
        rows: numbers of the rows that are used, in the order of evaluation.
        classes: class names in label order; empty for language models.
        batch_size: of `batches`.
        extra: tensors that every batch gets as they are: the tokens of prompts or targets, or class prototypes.
    """

    source: Source
    rows: Tensor
    classes: tuple[str, ...]
    batch_size: int
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def has_images(self) -> bool:
        """Whether the inputs are images; else texts."""
        return "pixel_values" in next(self.batches(1))

    def batches(self, batch_size: int | None = None) -> Iterator[Batch]:
        """All rows once, always in the same order; `labels` are among the tensors."""
        for index in torch.arange(len(self)).split(batch_size or self.batch_size):
            yield self.batch(index)

    def batch(self, index: Tensor, generator: Generator | None = None) -> Batch:
        """Chosen rows.

        Args:
            index: their positions, from 0 to `len(self) - 1`.
            generator: draws new masks for masked-lm; None: those fixed by the seed of `prepare`.
        """
        return {**self.source.read(self.rows[index], generator), **self.extra}

    def select(self, index: Tensor) -> Prepared:
        """The same with some of the rows only."""
        return replace(self, rows=self.rows[index])

    def with_extra(self, **tensors: Tensor | None) -> Prepared:
        """The same with other tensors for every batch; None takes one away."""
        merged = {**self.extra, **tensors}
        return replace(self, extra={name: tensor for name, tensor in merged.items() if tensor is not None})


def prepare(
    task: TaskSpec,
    split: Split,
    live: LiveModel,
    *,
    data_dir: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Prepared:
    """Loads a split and processes it with the processors of a model.

    Args:
        task: what to prepare for.
        split: "train", "validation" or "test".
        live: gives image processor and tokenizer.
        data_dir: see `load_split`.
        limit: at most so many rows of the data set.
        shots: so many rows of each class instead of all.
        seed: of the choice of rows, and of the masks of masked-lm.
        progress: a bar on stderr.

    Raises:
        InputError: see `load_split`; or the model has no processor for such data.
    """
    rows = load_split(task.data, split, data_dir=data_dir, limit=limit, seed=seed)
    if shots is not None:
        rows = few_shot(rows, shots, seed)
    return prepare_rows(task, rows, live, seed=seed, progress=progress)


def prepare_rows(task: TaskSpec, rows: Dataset, live: LiveModel, *, seed: int = 0, progress: bool = False) -> Prepared:
    """The same for rows that `load_split` gave."""
    needed = "image" if "image" in task.kind else "text"
    if needed not in rows.column_names:
        raise InputError(f"data set {task.data.path}: a task of kind {task.kind} needs a column {needed!r}")
    if task.kind in LANGUAGE:
        source = blocks_of(task, rows, live, seed)
        return Prepared(source, torch.arange(len(source)), (), task.batch_size)
    if "label" not in rows.column_names:
        raise InputError(f"data set {task.data.path}: no label column ({', '.join(task.data.label)})")
    classes = tuple(rows.features["label"].names)
    if needed == "text":
        source = texts_of(task, rows, live)
        # Texts of one length together: less padding to compute.
        order = source.lengths.argsort(stable=True)
        extra = targets_of(task, classes, live) if task.kind == SEQ2SEQ else _order(live, classes)
        return Prepared(source, order, classes, task.batch_size, extra)
    source = _images(rows, live, progress)
    extra = prompts_of(task, classes, live) if task.kind == ZERO_SHOT else _order(live, classes)
    return Prepared(source, torch.arange(len(source)), classes, task.batch_size, extra)


def label_columns(live: LiveModel, classes: Sequence[str]) -> Tensor | None:
    """Which output of the model's head is which class, by name; None: they are in order.

    A head may have more labels than the data; where names tell nothing, equal counts are taken to be in order.

    Raises:
        InputError: the head has not these classes.
    """
    labels = getattr(live.model.config, "id2label", None) or {}
    names = [str(labels[number]) for number in sorted(labels)]
    if len(set(names)) == len(names) and set(classes) <= set(names):
        order = [names.index(name) for name in classes]
        return None if order == list(range(len(names))) else torch.tensor(order)
    if len(names) != len(classes):
        raise InputError(
            f"{live.location}: its head has {len(names)} labels ({', '.join(names[:5])}, ...), the data {len(classes)} "
            f"({', '.join(classes[:5])}, ...); the model was not trained for this task"
        )
    if not all(name == f"LABEL_{number}" for number, name in enumerate(names)):
        log.warning("%s: its labels are named otherwise than the data's; they are taken in order", live.location)
    return None


def _order(live: LiveModel, classes: Sequence[str]) -> dict[str, Tensor]:
    """The label order of this model's head, if it has one for these classes."""
    try:
        columns = label_columns(live, classes)
    except InputError:  # a base without the head; `evaluate` says so when it is asked for its score
        return {}
    return {} if columns is None else {"columns": columns}


# --- images -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pixels:
    """How stored pixels become model inputs: (x * factor - mean) / std, per channel."""

    factor: float
    mean: Tensor
    std: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return (x.float() * self.factor - self.mean) / self.std


@dataclass(frozen=True)
class _Images:
    """Images in memory, or (`stored` None) read again each time."""

    labels: Tensor
    pixels: Pixels
    stored: Tensor | None
    load: Callable[[Sequence[int]], Tensor]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: Tensor, generator: Generator | None) -> Batch:
        stored = self.load(index.tolist()) if self.stored is None else self.stored[index]
        return {"pixel_values": self.pixels(stored), "labels": self.labels[index]}


def _images(rows: Dataset, live: LiveModel, progress: bool) -> _Images:
    if live.image_processor is None:
        raise InputError(f"{live.location}: it has no image processor (preprocessor_config.json), which the task needs")
    load, pixels = _loader(rows, live)
    labels = torch.tensor(rows["label"][:])
    first = load([0])
    stored = None
    if first.nbytes * len(rows) <= MEMORY:
        chunks = torch.arange(len(rows)).split(_CHUNK)
        bar = tqdm(chunks, desc="images", disable=not progress)
        stored = torch.cat([load(chunk.tolist()) for chunk in bar])
    return _Images(labels, pixels, stored, load)


def _loader(rows: Dataset, live: LiveModel) -> tuple[Callable[[Sequence[int]], Tensor], Pixels]:
    """Reads images by number as small a tensor as will do, and how it becomes the model's input.

    Processors spend much of their time on arithmetic in float32. Where theirs is plain (scale, then normalise), which
    the first images show, images are kept as bytes and the arithmetic is done a batch at a time.
    """
    process, mode = live.image_processor, _mode(live)

    def images(index: Sequence[int]) -> list[Any]:
        found = rows[list(index)]["image"]
        return [one if one.mode == mode else one.convert(mode) for one in found]

    def run(found: list[Any], **options: Any) -> Tensor:
        return torch.as_tensor(process(images=found, return_tensors="pt", **options)["pixel_values"])

    sample = images(range(min(4, len(rows))))
    wanted = run(sample)
    plain = _plain_arithmetic(process, wanted.shape[1])
    small = run(sample, do_rescale=False, do_normalize=False)
    if small.dtype != torch.uint8 or not torch.allclose(plain(small), wanted.float(), atol=1e-5):
        return lambda index: run(images(index)), Pixels(1.0, torch.tensor(0.0), torch.tensor(1.0))
    size = (wanted.shape[-1], wanted.shape[-2])
    fits = [one.size == size for one in sample]
    untouched = all(fits) and torch.equal(_stack(sample), small)

    def load(index: Sequence[int]) -> Tensor:
        found = images(index)
        if untouched and all(one.size == size for one in found):
            return _stack(found)
        return run(found, do_rescale=False, do_normalize=False)

    return load, plain


def pixels_of(live: LiveModel) -> Pixels:
    """How bytes become inputs of a model; without an image processor for as many channels between -1 and 1."""
    means = getattr(live.image_processor, "image_mean", None)
    if live.image_processor is None or (isinstance(means, list | tuple) and len(means) not in (1, live.channels)):
        return Pixels(1 / 255, torch.tensor(0.5), torch.tensor(0.5))
    return _plain_arithmetic(live.image_processor, live.channels)


def _plain_arithmetic(process: Any, channels: int) -> Pixels:
    factor = float(process.rescale_factor or 1) if getattr(process, "do_rescale", False) else 1.0
    normal = getattr(process, "do_normalize", False)
    mean, std = (
        torch.tensor(value, dtype=torch.float32).expand(channels).reshape(-1, 1, 1)
        for value in ((process.image_mean, process.image_std) if normal else (0.0, 1.0))
    )
    return Pixels(factor, mean, std)


def _stack(images: list[Any]) -> Tensor:
    """Images of one size as (n, channels, height, width), uint8."""
    import numpy

    stacked = torch.from_numpy(numpy.stack([numpy.asarray(one) for one in images]))
    return stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2).contiguous()


def ends_of_pixels(live: LiveModel) -> dict[str, Any]:
    """The shape of images as a model takes them, and what black and white become, channel by channel.

    Raises:
        InputError: the model has no image processor, or one for other images.
    """
    from PIL import Image

    if live.image_processor is None:
        raise InputError(f"{live.location}: it has no image processor (preprocessor_config.json), which images need")
    flat = [Image.new(_mode(live), (64, 64), color) for color in ("black", "white")]
    try:
        seen = torch.as_tensor(live.image_processor(images=flat, return_tensors="pt")["pixel_values"]).float()
    except ValueError as error:
        raise InputError(f"{live.location}: its image processor does not fit its images: {error}") from error
    if seen.shape[1] != live.channels:
        raise InputError(
            f"{live.location}: its image processor gives {seen.shape[1]} channels, it takes {live.channels}"
        )
    # Rounded, since versions of the processors differ in the last digits.
    black, white = ([round(x, 3) + 0.0 for x in one.mean((1, 2)).tolist()] for one in seen)
    return {"shape": list(seen.shape[1:]), "black": black, "white": white}


def _mode(live: LiveModel) -> str:
    return "L" if live.channels == 1 else "RGB"
