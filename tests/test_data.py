"""Data sets of every kind of file, brought to the same columns; splits that are the same rows everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy
import pytest
from PIL import Image

from tiny_data import COLOURS, image, image_data, plain_data, write_images, write_texts
from transfuse.data.splits import DataSpec, class_names, few_shot, load_split
from transfuse.data.transforms import TRANSFORMS
from transfuse.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets `images` and `texts`."""
    place = tmp_path_factory.mktemp("data")
    write_images(place / "images")
    write_texts(place / "texts")
    return place


def pixels(rows: datasets.Dataset, row: int) -> numpy.ndarray:
    return numpy.asarray(rows[row]["image"]).astype(int)


def test_parquet_of_images(folder: Path) -> None:
    rows = load_split(image_data(folder / "images"), "test")
    assert rows.column_names == ["image", "label"] and len(rows) == 12
    assert rows.features["label"].names == list(COLOURS)
    assert rows["label"][:] == [0, 1, 2] * 4
    assert pixels(rows, 1).tolist() == numpy.asarray(image("green", 1001)).tolist()


TEXT_FILES = {
    "csv": 'text,label\n"one, two",b\nNA,a\n',
    "tsv": "text\tlabel\none, two\tb\nNA\ta\n",
    "jsonl": '{"text": "one, two", "label": "b"}\n{"text": "NA", "label": "a"}\n',
}


@pytest.mark.parametrize("kind", TEXT_FILES)
def test_text_files(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"test.{kind}").write_text(TEXT_FILES[kind])
    rows = load_split(DataSpec(path=str(tmp_path), train=None), "test")
    assert rows["text"][:] == ["one, two", "NA"]  # NA is a word, not a missing value
    assert rows["label"][:] == [1, 0] and rows.features["label"].names == ["a", "b"]


def test_files_may_be_called_as_on_the_hub(tmp_path: Path) -> None:
    write_texts(tmp_path)
    (tmp_path / "train.tsv").rename(tmp_path / "train10k.tsv")
    spec = DataSpec(path=str(tmp_path), test="validation")
    assert len(load_split(spec, "test")) == len(load_split(spec, "train")) + len(load_split(spec, "validation"))
    with pytest.raises(InputError, match="no split 'test'"):
        load_split(DataSpec(path=str(tmp_path)), "test")


def test_quotes_in_tsv_are_ordinary(tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_text('sentence1\tsentence2\tlabel\n"open\tshut\t1\nhe said "no"\t"\t0\n')
    rows = load_split(DataSpec(path=str(tmp_path), train=None, text_pair=("sentence1", "sentence2")), "test")
    assert rows["text"][:] == ['"open', 'he said "no"'] and rows["text_pair"][:] == ["shut", '"']
    assert rows["label"][:] == [1, 0]


def test_plain_text_has_no_blank_rows(folder: Path) -> None:
    rows = load_split(plain_data(folder / "texts"), "test")
    assert rows.column_names == ["text"] and len(rows) == 48 and rows[0]["text"] == "a fine film"


def test_folders_of_images_keep_their_classes(tmp_path: Path) -> None:
    """A split where the first class is missing must not shift the others."""
    for split, names in (("train", ("ant", "bee", "cat")), ("test", ("bee", "cat"))):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            image("red", 0).save(tmp_path / split / name / "1.png")
    spec = image_data(tmp_path, validation_share=0)
    assert class_names(spec) == ["ant", "bee", "cat"]
    assert load_split(spec, "test")["label"][:] == [1, 2]
    assert load_split(spec, "train")["label"][:] == [0, 1, 2]


def test_a_single_file_is_the_training_split(folder: Path) -> None:
    file = folder / "texts" / "train.tsv"
    assert len(load_split(DataSpec(path=str(file), validation_share=0), "train")) == 48
    assert len(load_split(DataSpec(path=str(file), train=None, test="train"), "test")) == 48
    with pytest.raises(InputError, match="a single file is one split"):
        load_split(DataSpec(path=str(file)), "test")


def test_local_wins_over_path(folder: Path) -> None:
    spec = DataSpec(path="nobody/nothing", local="images")
    assert len(load_split(spec, "test", data_dir=folder)) == 12
    assert class_names(spec, folder) == list(COLOURS)


def ids(rows: datasets.Dataset) -> set[int]:
    return {hash(numpy.asarray(one).tobytes()) for one in rows["image"][:]}


@pytest.mark.parametrize("part", [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0)])
def test_validation_is_held_out_of_train(folder: Path, part: tuple[float, float]) -> None:
    spec = image_data(folder / "images", part=part, validation_share=0.2)
    train, validation = (ids(load_split(spec, split)) for split in ("train", "validation"))
    count = 30 if part == (0.0, 1.0) else 15
    assert len(validation) == count // 5 and len(train) == count - len(validation)
    assert not train & validation
    # Another seed must not move a row from one to the other.
    assert ids(load_split(spec, "train", seed=3)) == train
    assert ids(load_split(spec, "validation", seed=4, limit=2)) < validation


def test_parts_do_not_overlap(folder: Path) -> None:
    halves = [
        ids(load_split(image_data(folder / "images", part=part, validation_share=0), "train"))
        for part in ((0.0, 0.5), (0.5, 1.0))
    ]
    assert not halves[0] & halves[1] and len(halves[0] | halves[1]) == 30


def test_a_named_validation_split_is_used_whole(folder: Path) -> None:
    spec = image_data(folder / "images", validation="test")
    assert len(load_split(spec, "validation")) == 12 and len(load_split(spec, "train")) == 30


def test_validation_rows_of_a_data_set_that_has_test_rows_only(folder: Path) -> None:
    spec = image_data(folder / "images", train=None, validation_from="test", validation_share=0.25)
    whole = ids(load_split(image_data(folder / "images"), "test"))
    validation, test = (ids(load_split(spec, split)) for split in ("validation", "test"))
    assert (len(validation), len(test)) == (3, 9) and validation | test == whole and not validation & test
    assert ids(load_split(spec, "validation", seed=5)) == validation
    training = image_data(folder / "images", validation_from="test")
    assert len(load_split(training, "train")) == 30 and len(load_split(training, "validation")) == 2
    with pytest.raises(InputError, match="no train split"):
        load_split(spec, "train")


def test_limit_is_a_random_choice_by_seed(folder: Path) -> None:
    spec = image_data(folder / "images")
    chosen = [ids(load_split(spec, "test", limit=5, seed=seed)) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and len(chosen[0]) == 5


def test_few_shot(folder: Path) -> None:
    rows = load_split(image_data(folder / "images", transform="invert"), "test")
    one, two, other = (few_shot(rows, k, seed) for k, seed in ((1, 0), (2, 0), (2, 1)))
    assert sorted(two["label"][:]) == [0, 0, 1, 1, 2, 2]
    assert ids(one) < ids(two) != ids(other)
    with pytest.raises(InputError, match="'red' has only 4 rows"):
        few_shot(rows, 5, 0)


ORACLES: dict[str, Any] = {
    "rotate90": lambda x: numpy.rot90(x),
    "invert": lambda x: 255 - x,
    "gray": lambda x: numpy.repeat((x @ [0.299, 0.587, 0.114]).round()[..., None], 3, -1),
}


@pytest.mark.parametrize("name", ORACLES)
def test_transforms(folder: Path, name: Any) -> None:
    plain = load_split(image_data(folder / "images"), "test")
    changed = load_split(image_data(folder / "images", transform=name), "test")
    for row in range(3):
        assert abs(pixels(changed, row) - ORACLES[name](pixels(plain, row))).max() <= (1 if name == "gray" else 0)


@pytest.mark.parametrize("name", ["noise", "blur"])
def test_transforms_that_only_disturb(folder: Path, name: Any) -> None:
    plain = load_split(image_data(folder / "images"), "test")
    spec = image_data(folder / "images", transform=name)
    changed, some = load_split(spec, "test"), load_split(spec, "test", limit=3)
    assert 1 < abs(pixels(changed, 0) - pixels(plain, 0)).mean() < 40
    assert ids(some) < ids(changed)  # the same noise in a subset


BAD_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "nothing there": ({"path": "no/such/folder"}, "no such file or folder"),
    "not on the hub": ({"path": "nobody/nothing", "local": "nothing"}, "could not be had from the hub"),
    "no split": ({"path": "images", "test": "dev"}, "no split 'dev'.*train.parquet"),
    "split not given": ({"path": "images", "test": None}, "given no test split"),
    "no column": ({"path": "images", "image": ["photo"]}, "name the column"),
    "no pair": ({"path": "texts", "test": "dev", "text_pair": ["sentence", "other"]}, "no column other"),
    "unknown label": ({"path": "texts", "test": "dev", "classes": ["good"]}, "column 'label': row 4 .* 'bad'"),
    "transform of text": ({"path": "texts", "test": "dev", "transform": "invert"}, "is for images"),
    "hidden labels": ({"path": "hidden", "train": None}, "Hidden test labels"),
}


@pytest.mark.parametrize("fault", BAD_DATA)
def test_what_is_wrong_with_data_is_said(folder: Path, fault: str) -> None:
    (folder / "hidden").mkdir(exist_ok=True)
    (folder / "hidden" / "test.csv").write_text("text,label\none,-1\ntwo,-1\n")
    fields, message = BAD_DATA[fault]
    with pytest.raises(InputError, match=message):
        load_split(DataSpec(**fields), "test", data_dir=folder)


def test_rows_that_nobody_labelled_are_left_out(tmp_path: Path) -> None:
    """As pairs in SNLI that annotators did not agree on."""
    (tmp_path / "test.csv").write_text("text,label\none,0\ntwo,-1\nthree,1\n")
    rows = load_split(DataSpec(path=str(tmp_path), train=None, classes=["no", "yes"]), "test")
    assert rows["text"][:] == ["one", "three"] and rows["label"][:] == [0, 1]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "test.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match=r"test\.parquet: cannot be read as parquet"):
        load_split(DataSpec(path=str(tmp_path), train=None), "test")


def test_local_files_leave_no_copy(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    load_split(image_data(folder / "images"), "train")
    assert not (tmp_path / "cache").exists()


def test_a_blurred_grey_image_keeps_its_mode() -> None:
    grey = Image.fromarray(numpy.arange(64, dtype=numpy.uint8).reshape(8, 8))
    assert all(change(grey).mode == "L" for change in TRANSFORMS.values())
