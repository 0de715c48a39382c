"""Data sets by description: hub, local files or image folders, brought to the columns image | text (text_pair), label.

Every choice of rows has a fixed seed, so that training, validation and test are the same rows in every process.
"""

from __future__ import annotations

import csv
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from ..errors import InputError
from .extras import need
from .transforms import Transform, transformed

if TYPE_CHECKING:
    from datasets import Dataset

try:
    from pydantic import BaseModel, ConfigDict, Field, model_validator
except ImportError as error:
    raise InputError(
        "pydantic cannot be imported; install what evaluation needs: pip install 'transfuse[bench]'"
    ) from error

# What files of a split are called, as the hub's own loader takes them.
_STEMS = {"train": ("train", "train*"), "validation": ("validation", "valid", "val", "dev")}
Split = Literal["train", "validation", "test"]

_BUILDERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".json": "json",
    ".txt": "text",
}
# Local files over this size are read by way of the cache of `datasets`; others leave no copy behind.
_CACHED = 10**9
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class DataSpec(BaseModel):
    """One data set: where it is and which of its columns and rows are used.

    Attributes:
        path: hub id, or a local file or folder (.parquet .csv .tsv .jsonl .txt, or folders of images by class). A
            folder holds one file (or folder of images) per split; a single file is the training split.
        local: folder under the data directory the user gives; used instead of `path` where it exists.
        name: configuration of a hub data set.
        train: split (hub), or stem of the file in the folder ("train10k" serves as "train", "valid", "val" and "dev" as
            "validation"); None: there is none.
        validation: the same; None: a share of the training rows, which "train" then leaves out.
        validation_from: "test" where that share is to be taken from the test rows, which "test" then leaves out: for
            data sets that have no others.
        test: the same.
        image: names the image column may have; the first that is there is used.
        text: the same for one text; used when there is no image column.
        text_pair: the two columns of tasks on pairs of texts.
        label: names the label column may have.
        classes: class names in label order; None: those of the data set's features, or the sorted distinct values.
        transform: a deterministic change of every image: "rotate90" (anticlockwise), "invert", "blur", "gray", "noise"
            (seeded by the image itself).
        part: share of the training rows (in a fixed random order) that "train" and "validation" are taken from.
        validation_share: share of those rows that is held out when `validation` is None.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    local: str | None = None
    name: str | None = None
    train: str | None = "train"
    validation: str | None = None
    validation_from: Literal["test"] | None = None
    test: str | None = "test"
    image: list[str] = ["image", "img"]
    text: list[str] = ["text", "sentence"]
    text_pair: tuple[str, str] | None = None
    label: list[str] = ["label", "labels"]
    classes: list[str] | None = None
    transform: Transform | None = None
    part: tuple[float, float] = (0.0, 1.0)
    validation_share: float = Field(default=0.1, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _check_part(self) -> Self:
        low, high = self.part
        if not 0 <= low < high <= 1:
            raise ValueError(f"part is {list(self.part)}; two shares from 0 to 1, the first the smaller, are needed")
        return self


def data_place(spec: DataSpec, data_dir: Path | None) -> Path | None:
    """The local file or folder of a data set; None: there is none, it can only come from the hub."""
    path = Path(spec.path).expanduser()
    places = [path] if data_dir is None else [path, data_dir / path]
    if data_dir is not None and spec.local is not None:
        places.insert(0, data_dir / spec.local)
    return next((place for place in places if place.exists()), None)


def load_split(
    spec: DataSpec, split: Split, *, data_dir: Path | None = None, limit: int | None = None, seed: int = 0
) -> Dataset:
    """The rows of one split.

    Args:
        spec: what to load.
        split: "train", "validation" or "test".
        data_dir: where `spec.local` is looked for.
        limit: at most so many rows, chosen at random by `seed`.
        seed: of that choice only: which rows are training and which validation does not depend on it.

    Returns:
        `datasets.Dataset` with the columns `image`, or `text` (and `text_pair`), and, where the data have labels, an
        integer `label` whose feature holds the class names. Rows keep the order of the file.

    Raises:
        InputError: the data set, a split, a column or a label is not there; the message names it.
    """
    giver: Split = spec.validation_from or "train"
    shared = spec.validation is None and spec.validation_share > 0
    holder = giver if split == "validation" and shared else split
    name = getattr(spec, holder)
    if name is None:
        raise InputError(f"data set {spec.path}: it is given no {split} split (key {split!r})")
    rows = _normalised(spec, _read(spec, name, data_dir), data_dir, name)
    chosen = torch.arange(len(rows)) if holder != giver else _part(spec, len(rows), holder)
    if shared and holder == giver:
        held = math.ceil(spec.validation_share * len(chosen))
        chosen = chosen[:held] if split == "validation" else chosen[held:]
    if limit is not None and limit < len(chosen):
        chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))[:limit]]
    if not len(chosen):
        raise InputError(f"data set {spec.path}: no rows are left in its {split} split (limit, part, validation_share)")
    return transformed(rows.select(chosen.sort().values.tolist()), spec.transform)


def _part(spec: DataSpec, count: int, split: Split) -> torch.Tensor:
    """Row numbers of the part (of test rows: all), in an order that is the same always and everywhere."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    low, high = (round(share * count) for share in spec.part)
    return order[low:high] if split == "train" else order


def class_names(spec: DataSpec, data_dir: Path | None = None) -> list[str]:
    """The class names in label order.

    Raises:
        InputError: the data set is not there or has no label column.
    """
    if spec.classes is not None:
        return list(spec.classes)
    split = spec.train or spec.validation or spec.test
    if split is None:
        raise InputError(f"data set {spec.path}: it is given no split at all")
    rows = _read(spec, split, data_dir)
    column = _first(spec.label, rows.column_names)
    if column is None:
        raise InputError(f"data set {spec.path}: no label column ({_or(spec.label)}); it has {_or(rows.column_names)}")
    return _names_in(spec, rows, column)


def _names_in(spec: DataSpec, rows: Dataset, column: str) -> list[str]:
    names = getattr(rows.features[column], "names", None)
    if names is not None:
        return list(names)
    values = {_plain(value) for value in _values(rows, column)} - {-1, None}
    if all(isinstance(value, int) for value in values):
        if values and not 0 <= min(values) <= max(values) < 10**5:
            raise InputError(f"data set {spec.path}: column {column!r} holds no class numbers (up to {max(values)})")
        return [str(number) for number in range(max(values, default=-1) + 1)]
    return sorted(str(value) for value in values)


def few_shot(dataset: Dataset, k: int, seed: int) -> Dataset:
    """`k` rows of each class, chosen by `seed`; a larger `k` contains the choice of a smaller one.

    Raises:
        InputError: a class has fewer rows, or there are no labels.
    """
    if "label" not in dataset.column_names:
        raise InputError("the data set has no labels, so there are no shots of each class to choose")
    labels = torch.tensor(dataset["label"][:])
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    chosen: list[int] = []
    for number, name in enumerate(dataset.features["label"].names):
        rows = order[labels[order] == number]
        if len(rows) < k:
            raise InputError(f"class {name!r} has only {len(rows)} rows, fewer than {k} shots")
        chosen.extend(rows[:k].tolist())
    return dataset.select(sorted(chosen))


# --- reading ------------------------------------------------------------------------------------------------------


def _read(spec: DataSpec, split: str, data_dir: Path | None) -> Dataset:
    """One split as it is stored."""
    place = data_place(spec, data_dir)
    if place is None:
        _check_hub_id(spec)
    datasets = need("datasets")
    with no_bars(datasets):
        if place is None:
            return _read_hub(datasets, spec, split)
        kind, files, options = _files(spec, place, split)
        try:
            if sum(Path(file).stat().st_size for file in files if Path(file).is_file()) > _CACHED:
                return datasets.load_dataset(kind, data_files=files, split="train", **options)
            with tempfile.TemporaryDirectory() as cache:
                options |= {"keep_in_memory": True, "cache_dir": cache}
                return datasets.load_dataset(kind, data_files=files, split="train", **options)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            cause = error.__cause__ or error
            raise InputError(f"data set {spec.path}, {files[0]}: cannot be read as {kind}: {_line(cause)}") from error


def _check_hub_id(spec: DataSpec) -> None:
    if not _HUB_ID.fullmatch(spec.path) or Path(spec.path).suffix in _BUILDERS:
        raise InputError(f"data set {spec.path}: no such file or folder here, and not a hub id (org/name)")


def _read_hub(datasets: Any, spec: DataSpec, split: str) -> Dataset:
    try:
        return datasets.load_dataset(spec.path, spec.name, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        hint = f", and there is no folder {spec.local!r} in the data directory" if spec.local else ""
        raise InputError(
            f"data set {spec.path} (configuration {spec.name or 'default'}, split {split!r}) could not be had from the "
            f"hub{hint}: {_line(error)}. Check the name, the split and the network; without network, put its parquet "
            "files into a folder and give that"
        ) from error


def _files(spec: DataSpec, place: Path, split: str) -> tuple[str, list[str], dict[str, Any]]:
    """Builder, files and options that read a split from a local file or folder."""
    if place.is_file():
        if split != spec.train and place.stem != split:
            raise InputError(
                f"data set {spec.path}: a single file is one split, {spec.train or 'train'!r}, so there is no "
                f"{split!r}; give a folder with a file per split, or, to test on all of this file, train: null and "
                f"test: {place.stem}"
            )
        return _with_builder(spec, [place])
    found = [one for stem in _STEMS.get(split, (split,)) for end in _BUILDERS for one in sorted(place.glob(stem + end))]
    found = found[:1] or [one for suffix in _BUILDERS for one in sorted(place.glob(f"**/{split}-*-of-*{suffix}"))]
    if found:
        return _with_builder(spec, [one for one in found if one.suffix == found[0].suffix])
    if (place / split).is_dir():
        return "imagefolder", [str(place / split / "**")], {"drop_labels": False}
    there = sorted(one.name for one in place.iterdir() if not one.name.startswith("."))
    raise InputError(f"data set {spec.path}: no split {split!r} in {place}; it has {_or(there)}")


def _with_builder(spec: DataSpec, files: list[Path]) -> tuple[str, list[str], dict[str, Any]]:
    suffix = files[0].suffix
    if suffix not in _BUILDERS:
        raise InputError(f"data set {spec.path}: {files[0].name} is of no known kind ({_or(list(_BUILDERS))})")
    options: dict[str, Any] = {}
    if _BUILDERS[suffix] == "csv":
        # "NA" and "null" are words, and in .tsv files quotes are ordinary characters.
        options["keep_default_na"] = False
        options |= {"sep": "\t", "quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {}
    return _BUILDERS[suffix], [str(file) for file in files], options


@contextmanager
def no_bars(datasets: Any) -> Iterator[None]:
    """The bars of reading would mix with our own."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bar()


# --- columns ------------------------------------------------------------------------------------------------------


def _normalised(spec: DataSpec, rows: Dataset, data_dir: Path | None, split: str) -> Dataset:
    datasets = need("datasets")
    columns = _input_columns(spec, rows)
    label = _first(spec.label, rows.column_names)
    rows = rows if label is None else _with_labels(rows, label)
    numbers = None if label is None else _label_numbers(spec, rows, label, data_dir, split)
    rows = rows.select_columns(list(columns.values()))
    # In two steps: a name that is wanted may be that of another column.
    rows = rows.rename_columns({old: f"_{new}" for new, old in columns.items()})
    rows = rows.rename_columns({f"_{new}": new for new in columns})
    if "image" in columns and not isinstance(rows.features["image"], datasets.Image):
        rows = rows.cast_column("image", datasets.Image())
    if numbers is None:
        if "text" not in columns:
            return rows
        # Files of plain text have empty lines between paragraphs.
        return rows.select([row for row, text in enumerate(rows["text"][:]) if text and text.strip()])
    names, values = numbers
    return rows.add_column("label", values, feature=datasets.ClassLabel(names=names))


def _input_columns(spec: DataSpec, rows: Dataset) -> dict[str, str]:
    """Wanted name -> name in the data."""
    there = rows.column_names
    if spec.text_pair is not None:
        if missing := [name for name in spec.text_pair if name not in there]:
            raise InputError(f"data set {spec.path}: no column {_or(missing)}; it has {_or(there)}")
        return dict(zip(("text", "text_pair"), spec.text_pair, strict=True))
    image, text = _first(spec.image, there), _first(spec.text, there)
    if image is not None:
        return {"image": image}
    if text is None:
        raise InputError(
            f"data set {spec.path}: no image column ({_or(spec.image)}) and no text column ({_or(spec.text)}); it has "
            f"{_or(there)}: name the column in the key 'image', 'text' or 'text_pair'"
        )
    return {"text": text}


def _with_labels(rows: Dataset, column: str) -> Dataset:
    """Without the rows that have no label where others have one (pairs that annotators did not agree on, in SNLI)."""
    kept = [row for row, value in enumerate(_values(rows, column)) if value not in (-1, None)]
    if not 0 < len(kept) < len(rows):
        return rows
    # `_values` reads the table behind the rows, so it has to be one of these rows alone.
    return rows.select(kept, keep_in_memory=True).flatten_indices(keep_in_memory=True)


def _label_numbers(
    spec: DataSpec, rows: Dataset, column: str, data_dir: Path | None, split: str
) -> tuple[list[str], list[int]]:
    """Class names, and the label of every row as a number into them."""
    own = getattr(rows.features[column], "names", None)
    names = spec.classes or _names_in(spec, rows, column)
    if spec.classes is None and split != spec.train:
        try:
            names = class_names(spec, data_dir)
        except InputError:
            if own is None:  # numbers or words in a split alone need not show all classes
                raise
    index: dict[Any, int] = {name: number for number, name in enumerate(names)}
    if own is not None and list(own) != list(names) and set(own) <= set(names):
        # Another split may have been numbered on its own (folders of images where a class is missing).
        index = {number: index[name] for number, name in enumerate(own)}
    else:
        index |= {number: number for number in range(len(names))}
    found = [index.get(_plain(value), -1) for value in _values(rows, column)]
    if -1 in found:
        raise InputError(
            f"data set {spec.path}, split {split!r}, column {column!r}: row {found.index(-1)} has the label "
            f"{_values(rows, column)[found.index(-1)]!r}, which is none of the {len(names)} classes "
            f"({_or(names)}). Hidden test labels (-1) cannot be scored: use the validation split"
        )
    return list(names), found


def _values(rows: Dataset, column: str) -> list[Any]:
    return rows.data.column(column).to_pylist()


def _plain(value: Any) -> Any:
    """Whole numbers as int, whatever they were stored as; other values as text."""
    if isinstance(value, bool | int):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if value is None else str(value)


def _first(wanted: Sequence[str], there: Sequence[str]) -> str | None:
    return next((name for name in wanted if name in there), None)


def _or(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown}, ..." if len(names) > 8 else shown or "nothing"


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
