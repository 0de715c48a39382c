"""Writing model folders: what is written, what is copied, and that a failure changes nothing."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import stat
import subprocess
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from transformers import AutoModel, BertConfig, BertModel

from transfuse.errors import InputError
from transfuse.files import writing
from transfuse.files.checkpoint import Checkpoint
from transfuse.files.opening import open_checkpoint
from transfuse.files.reading import DTYPES, Parts, TensorInfo
from transfuse.files.streaming import Misformed
from transfuse.files.writing import Weights, check_output, plan_like, write_checkpoint

TENSORS = {name: torch.full((4, 3), float(number)) for number, name in enumerate("abcd")}
TWO = {"model-00001-of-00002.safetensors": ["a", "b"], "model-00002-of-00002.safetensors": ["c", "d"]}


def write(out: Path, **changes: object) -> None:
    read = {"form": TENSORS.__getitem__, "read": TENSORS.__getitem__}
    given = {"plan": TWO, **read, "files": {"config.json": "{}"}, "copy_from": None, **changes}
    weights = Weights(*(given.pop(key) for key in ("plan", "form", "read")))  # pyright: ignore[reportArgumentType]
    write_checkpoint(out, weights, **given)  # pyright: ignore[reportArgumentType]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tiny(path: Path, **options: object) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
                        vocab_size=30, max_position_embeddings=8)  # fmt: skip
    model = BertModel(config)
    model.save_pretrained(path, **options)  # pyright: ignore[reportArgumentType]
    return model


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "4KB"}])
def test_as_transformers_writes_it(tmp_path: Path, options: dict) -> None:
    model = tiny(tmp_path / "target", **options)
    target = open_checkpoint(tmp_path / "target")
    plan = plan_like(target, {name: name for name in target}, [])
    form = target.headers.__getitem__
    write(tmp_path / "out", plan=plan, form=form, read=target.tensor, files={}, copy_from=target.companions)
    expected, found = contents(tmp_path / "target"), contents(tmp_path / "out")
    assert found.keys() == expected.keys()
    if options:
        index = "model.safetensors.index.json"
        assert len(plan) > 2 and json.loads(found[index]) == json.loads(expected[index])
    assert open_checkpoint(tmp_path / "out").fingerprint() == target.fingerprint()
    loaded, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.arange(6)[None]
    assert torch.equal(loaded.eval()(ids).last_hidden_state, model.eval()(ids).last_hidden_state)


def test_details_of_the_files(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    odd = {"a": base, "b": base[1:2], "c": base.T, "d": torch.nn.Parameter(base.to(torch.bfloat16))}
    write(tmp_path / "out", form=odd.__getitem__, read=odd.__getitem__,
          files={"config.json": "{\"é\": 1}", "sub/x.bytes": b"\0\1"})  # fmt: skip
    opened = open_checkpoint(tmp_path / "out")
    assert all(torch.equal(opened.tensor(name), odd[name]) for name in odd)
    assert opened.shards == {file: tuple(names) for file, names in TWO.items()}
    assert opened.tensor("d").dtype == torch.bfloat16
    for file in TWO:
        with safe_open(tmp_path / "out" / file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
        # As readable as any other file: safetensors itself makes private ones.
        modes = [stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) for name in (file, "config.json")]
        assert modes[0] == modes[1]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 48 + 16 + 48 + 24, "total_parameters": 12 + 4 + 12 + 12}
    assert (tmp_path / "out/config.json").read_text(encoding="utf-8") == '{"é": 1}'
    assert (tmp_path / "out/sub/x.bytes").read_bytes() == b"\0\1" and os.listdir(tmp_path) == ["out"]


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    events: list[tuple[str, int, int]] = []
    made: list[weakref.ref[torch.Tensor]] = []

    def read(name: str) -> torch.Tensor:
        files = len(list(tmp_path.glob(".out.partial-*/*.safetensors")))
        events.append((name, files, sum(one() is not None for one in made)))
        tensor = TENSORS[name].clone()
        made.append(weakref.ref(tensor))
        return tensor

    write(tmp_path / "out", read=read)
    assert events == [("a", 1, 0), ("b", 1, 0), ("c", 2, 0), ("d", 2, 0)]


DTYPES_OF_FILES = sorted(set(DTYPES.values()), key=str)


@pytest.mark.parametrize("in_pieces", [False, True])
def test_byte_for_byte_what_save_file_writes(tmp_path: Path, in_pieces: bool) -> None:
    held = {f'{i % 3}.é\n"\\{i}': torch.arange(15.0).view(5, 3).to(d) for i, d in enumerate(DTYPES_OF_FILES)}
    held |= {"scalar": torch.tensor(2.0), "none": torch.zeros(0, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    safetensors.torch.save_file(held, tmp_path / "expected.safetensors", metadata={"format": "pt"})
    read = (lambda name: held[name].reshape(-1).split(4)) if in_pieces else held.__getitem__
    plan = {"model.safetensors": sorted(held, reverse=True)}
    write(tmp_path / "out", plan=plan, form=held.__getitem__, read=read)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


@pytest.mark.parametrize(
    "made",
    [
        torch.ones(3, 4),
        torch.ones(4, 3).double(),
        [torch.ones(11)],
        [torch.ones(12), torch.ones(1)],
        [torch.ones(12).half()],
    ],
)
def test_what_is_not_as_announced_is_an_error(tmp_path: Path, made: object) -> None:
    with pytest.raises(Misformed, match="tensor 'a'"):
        write(tmp_path / "out", read=lambda name: made)
    assert not list(tmp_path.iterdir())


COPIED = """
    tokenizer.json vocab.txt tokenizer.model generation_config.json preprocessor_config.json modules.json
    chat_template.jinja 1_Pooling/config.json 2_Dense/config.json deep/er/x.txt LICENSE merges.txt mel.npz
""".split()  # noqa: SIM905
LEFT_OUT = """
    model.safetensors other.safetensors pytorch_model.bin x.pt x.pth x.ckpt tf_model.h5 flax_model.msgpack m.onnx
    m.onnx_data onnx/config.json rust_model.ot q4.gguf m.tflite m.mlmodel m.mlpackage/Manifest.json x.pkl
    openvino_model.xml openvino_model.bin openvino/config.json model.safetensors.index.json model.ckpt.index
    pytorch_model.bin.index.json model.ckpt.data-00000-of-00001 README.md 1_Pooling/README.md modeling_x.py
    __pycache__/x.txt .gitattributes .git/config .hidden sub/.hidden result.json maps/a.json trainer_state.json
    checkpoint-500/config.json UPPER.BIN 2_Dense/pytorch_model.bin
""".split()  # noqa: SIM905


def make(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"old {name}")
    return folder


def test_copied_files(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_LARGE", 1000)
    source = make(tmp_path / "source", [*COPIED, *LEFT_OUT, "config.json"])
    (source / "large.json").write_bytes(b" " * 1001)
    (source / "link.txt").symlink_to(make(tmp_path / "blobs", ["blob"]) / "blob")  # as in the hub's cache
    (source / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / "pipe.txt")
    with caplog.at_level(logging.WARNING):
        write(tmp_path / "out", plan={"model.safetensors": list("abcd")}, copy_from=source)
    found = contents(tmp_path / "out")
    assert set(found) == {*COPIED, "link.txt", "config.json", "model.safetensors"}
    assert found["config.json"] == b"{}" and found["link.txt"] == b"old blob" and found["vocab.txt"] == b"old vocab.txt"
    assert not (tmp_path / "out/link.txt").is_symlink()
    assert "large.json" in caplog.text and "2_Dense/pytorch_model.bin" in caplog.text


def test_output_inside_the_copied_folder(tmp_path: Path) -> None:
    make(tmp_path, ["vocab.txt"])
    for force in (False, True):
        write(tmp_path / "out", copy_from=tmp_path, force=force)
        assert set(contents(tmp_path / "out")) == {*TWO, "vocab.txt", "config.json", "model.safetensors.index.json"}


@pytest.mark.parametrize("held", [["config.json", "sub/old.txt"], ["result.json"], []])
def test_force_replaces(tmp_path: Path, held: list[str]) -> None:
    (tmp_path / "out").mkdir()
    make(tmp_path / "out", held)
    with pytest.raises(InputError, match="it exists"):
        write(tmp_path / "out")
    write(tmp_path / "out", force=True)
    assert set(contents(tmp_path / "out")) == {*TWO, "config.json", "model.safetensors.index.json"}
    assert os.listdir(tmp_path) == ["out"]


def test_force_through_a_link(tmp_path: Path) -> None:
    make(tmp_path / "real", ["config.json"])
    (tmp_path / "out").symlink_to(tmp_path / "real")
    write(tmp_path / "out", force=True)
    assert (tmp_path / "out").is_symlink() and open_checkpoint(tmp_path / "real").tensor("d")[0, 0] == 3
    assert sorted(os.listdir(tmp_path)) == ["out", "real"]


OUTPUTS: dict[str, tuple[Callable[[Path], object], bool, str]] = {
    "exists": (lambda out: out.mkdir(), False, "it exists"),
    "a file": (lambda out: out.write_text("x"), True, "not a folder"),
    "not a model": (lambda out: make(out, ["letters.txt"]), True, "does not look like a model"),
    "a repository": (lambda out: make(out, ["config.json", ".git/HEAD"]), True, "git repository"),
    "no parent": (lambda out: out.parent.rmdir(), False, "does not exist"),
    "parent a file": (lambda out: (out.parent.rmdir(), out.parent.write_text("x")), False, "does not exist"),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_check_output(tmp_path: Path, case: str) -> None:
    prepare, force, message = OUTPUTS[case]
    out = tmp_path / "parent" / "out"
    out.parent.mkdir()
    check_output(out, force=force)
    prepare(out)
    before = contents(tmp_path)
    for call in (lambda: check_output(out, force=force), lambda: write(out, force=force)):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert str(out) in str(caught.value)
    assert contents(tmp_path) == before


def test_check_output_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = make(tmp_path / "home", ["config.json", "work/config.json"])
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    for out, message in ((home, "home"), (Path(), "current"), (Path("/"), "home"), (tmp_path, "home")):
        with pytest.raises(InputError, match=f"the {message} folder"):
            check_output(out, force=True)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="no permission"):
        check_output(tmp_path / "out", force=False)


@pytest.mark.parametrize(
    "changes",
    [{"files": {name: ""}} for name in ("../x", "/x", "", "a/../../x", "model-00001-of-00002.safetensors")]
    + [{"plan": plan} for plan in ({}, {"x.bin": ["a"]}, {"../x.safetensors": ["a"]}, {"a.safetensors": ["a", "a"]})],
)
def test_bad_names(tmp_path: Path, changes: dict) -> None:
    with pytest.raises(InputError):
        write(tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


def _full(number: int) -> Callable[..., None]:
    """A disk that is full, with a part written, on the given call."""
    calls: list[int] = []

    def put(file: BinaryIO, content: bytes) -> None:
        calls.append(1)
        if len(calls) == number:
            file.write(content[:4])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(content)

    return put


def _no_copy(source: Path, target: Path) -> None:
    target.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _raising(error: BaseException) -> Callable[..., torch.Tensor]:
    def read(name: str) -> torch.Tensor:
        if name == "d":
            raise error
        return TENSORS[name]

    return read


def _no_rename(old: Path, new: Path) -> Path:
    if ".partial-" in old.name:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(old))
    os.rename(old, new)
    return new


FAILURES: dict[str, tuple[Callable[[pytest.MonkeyPatch], dict], type[BaseException], str]] = {
    "disk full": (
        lambda patch: patch.setattr(writing, "_put", _full(5)) or {},  # a header and two tensors in each file
        InputError,
        "out/model-00002-of-00002.safetensors: cannot be written: No space left on device",
    ),
    "interrupt": (lambda patch: {"read": _raising(KeyboardInterrupt())}, KeyboardInterrupt, "^$"),
    "read fails": (lambda patch: {"read": _raising(InputError("x.bin: bad"))}, InputError, r"^x\.bin: bad$"),
    "read fails in the system": (lambda patch: {"read": _raising(OSError(5, "in"))}, OSError, "in"),
    "rename fails": (lambda patch: patch.setattr(Path, "rename", _no_rename) or {}, InputError, "Input/output error"),
    "copy fails": (
        lambda patch: patch.setattr(shutil, "copyfile", _no_copy) or {"copy_from": Path("source")},
        InputError,
        "out: cannot be written: No space left on device",
    ),
    "nothing to copy from": (lambda patch: {"copy_from": Path("none")}, InputError, "Not a directory.*none"),
    "extra file": (lambda patch: {"files": {"config.json/x": "", "config.json": ""}}, InputError, "Is a directory"),
}


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("case", FAILURES)
def test_failure_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, existing: bool) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("source"), ["vocab.txt"])
    if existing:
        make(Path("out"), ["config.json", "sub/old.txt"])
    before, names = contents(tmp_path), sorted(os.listdir())
    prepare, error, message = FAILURES[case]
    with pytest.raises(error, match=message):
        write(Path("out"), **{"force": existing, **prepare(monkeypatch)})
    assert (contents(tmp_path), sorted(os.listdir())) == (before, names)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("existing", [True, False])
def test_disk_really_full(small_disk: Path, existing: bool) -> None:
    if existing:
        make(small_disk / "out", ["config.json"])
    before = contents(small_disk)
    with pytest.raises(InputError, match=r"out/model-00002-of-00002\.safetensors: .*No space left on device"):
        write(small_disk / "out", **dict.fromkeys(("form", "read"), lambda name: torch.zeros(20_000)), force=existing)
    assert contents(small_disk) == before and os.listdir(small_disk) == (["out"] if existing else [])


def target(kind: str, shards: dict[str, str]) -> Checkpoint:
    """A checkpoint with one-letter tensors, given as file -> letters; its tensors are never read."""
    headers = {name: TensorInfo((1,), torch.float32, file) for file, names in shards.items() for name in names}
    plan = {file: tuple(names) for file, names in shards.items()}
    return Checkpoint("x", None, kind, {}, headers, plan, Parts({}, {}))


def of(count: int, stem: str = "model", suffix: str = "safetensors") -> list[str]:
    return [f"{stem}-{number:05d}-of-{count:05d}.{suffix}" for number in range(1, count + 1)]


@pytest.mark.parametrize(
    ("kind", "shards", "renamed", "extra", "expected"),
    [
        ("transformers", {"model.safetensors": "ab"}, {}, [], {"model.safetensors": "ab"}),
        ("transformers", {"pytorch_model.bin": "ba"}, {"a": "z"}, ["h"], {"model.safetensors": "bzh"}),
        ("timm", {"pytorch_model.bin": "ab"}, {}, [], {"model.safetensors": "ab"}),
        ("open_clip", {"open_clip_pytorch_model.bin": "ab"}, {}, [], {"open_clip_model.safetensors": "ab"}),
        ("state_dict", {"foo.safetensors": "ab"}, {}, [], {"model.safetensors": "ab"}),
        ("state_dict", {"": "ab"}, {}, ["c"], {"model.safetensors": "abc"}),
        ("transformers", dict(zip(of(3), ("ab", "c", "d"), strict=True)), {"a": None, "c": "z"}, ["h", "i"],
         dict(zip(of(3), ("b", "z", "dhi"), strict=True))),
        ("transformers", {"y.safetensors": "a", "x.safetensors": "b"}, {}, [], {"y.safetensors": "a",
                                                                                "x.safetensors": "b"}),
        ("transformers", dict(zip(of(2, "pytorch_model", "bin"), "ab", strict=True)), {}, [],
         dict(zip(of(2), "ab", strict=True))),
        ("transformers", dict(zip(of(3), "abc", strict=True)), {"b": None}, [], dict(zip(of(2), "ac", strict=True))),
        ("transformers", dict(zip(of(2), "ab", strict=True)), {"b": None}, ["h"], dict(zip(of(2), "ah", strict=True))),
        ("transformers", dict(zip(of(2), "ab", strict=True)), {"b": None}, [], {"model.safetensors": "a"}),
    ],
)  # fmt: skip
def test_plan_like(kind: str, shards: dict, renamed: dict, extra: list, expected: dict) -> None:
    checkpoint = target(kind, shards)
    plan = plan_like(checkpoint, {**{name: name for name in checkpoint}, **renamed}, extra)
    assert plan == {file: list(names) for file, names in expected.items()} and list(plan) == list(expected)


@pytest.mark.parametrize(
    ("names", "extra"),
    [({"a": "a"}, []), ({"a": "a", "b": "b", "c": "c"}, []), ({"a": "x", "b": "x"}, []), ({"a": "a", "b": "b"}, ["a"])],
)
def test_plan_like_misused(names: dict, extra: list) -> None:
    with pytest.raises(ValueError, match=r"names must cover|used twice"):
        plan_like(target("transformers", {"model.safetensors": "ab"}), names, extra)
