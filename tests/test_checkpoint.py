"""Reading checkpoints: every form that is read, and every one that is refused."""

from __future__ import annotations

import gc
import json
import math
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from transformers import BertConfig, BertModel

from transfuse.errors import InputError
from transfuse.files import checkpoint
from transfuse.files.checkpoint import Checkpoint
from transfuse.files.opening import open_checkpoint
from transfuse.files.reading import BLOCK, TensorInfo

BERT = {"model_type": "bert", "hidden_size": 4}
TIMM = {"architecture": "vit_tiny_patch16_224", "num_classes": 3}
PLAIN = {"config.json": BERT, "model.safetensors": None}
PLAIN_TIMM = {"config.json": TIMM, "model.safetensors": None}
CLIP = {"model_cfg": {"embed_dim": 4}}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(4, 3, generator=generator),
        "a.bias": torch.randn(3, generator=generator).to(torch.bfloat16),
        "steps": torch.tensor(7),
        "none": torch.zeros(0, 2),
    }


def folder(path: Path, config: object = None, name: str = "config.json") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (path / name).write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def store(path: Path, content: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def sharded(path: Path, suffix: str = "safetensors", held: dict | None = None) -> Path:
    """A folder of two shards; `held` replaces what the second one holds."""
    all_tensors = tensors()
    first = {name: all_tensors[name] for name in ("b.weight", "steps")}
    second = {name: all_tensors[name] for name in ("a.bias", "none")}
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for number, shard in enumerate((first, second), start=1):
        file = f"{stem}-0000{number}-of-00002.{suffix}"
        store(folder(path, BERT) / file, held if held is not None and number == 2 else shard)
        weight_map |= dict.fromkeys(shard, file)
    (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def same(opened: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert set(opened) == set(expected) == set(opened.headers) and len(opened) == len(expected)
    for name, tensor in expected.items():
        assert opened.headers[name].shape == tuple(tensor.shape) and opened.headers[name].dtype == tensor.dtype
        assert torch.equal(opened.tensor(name), tensor) and opened.tensor(name).dtype == tensor.dtype
    assert sorted(name for names in opened.shards.values() for name in names) == sorted(expected)


@pytest.mark.parametrize(
    ("files", "kind", "config"),
    [
        (PLAIN, "transformers", BERT),
        ({"config.json": BERT, "pytorch_model.bin": None}, "transformers", BERT),
        ({"config.json": {"hidden_size": 4}, "model.safetensors": None}, "transformers", {"hidden_size": 4}),
        (PLAIN_TIMM, "timm", TIMM),
        ({"config.json": TIMM, "pytorch_model.bin": None}, "timm", TIMM),
        ({"open_clip_config.json": CLIP, "open_clip_model.safetensors": None}, "open_clip", CLIP),
        ({"open_clip_config.json": CLIP, "open_clip_pytorch_model.bin": None}, "open_clip", CLIP),
        ({"model.safetensors": None}, "state_dict", {}),
        # Twice in one folder: transformers is preferred, then open_clip.
        ({"open_clip_config.json": CLIP, "open_clip_model.safetensors": None, **PLAIN}, "transformers", BERT),
        ({"open_clip_config.json": CLIP, "open_clip_model.safetensors": None, **PLAIN_TIMM}, "open_clip", CLIP),
    ],
)
def test_folders(tmp_path: Path, files: dict, kind: str, config: dict) -> None:
    for name, content in files.items():
        store(tmp_path / name, tensors()) if content is None else folder(tmp_path, content, name)
    opened = open_checkpoint(tmp_path)
    same(opened, tensors())
    assert (opened.kind, opened.config, opened.root, opened.location) == (kind, config, tmp_path, str(tmp_path))
    assert opened.companions == (None if kind == "state_dict" else tmp_path)
    assert opened.headers["steps"] == TensorInfo((), torch.int64, next(iter(opened.shards)))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path: Path, suffix: str) -> None:
    opened = open_checkpoint(str(sharded(tmp_path, suffix)))
    same(opened, tensors())
    torch.save({"old": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert len(open_checkpoint(tmp_path)) == (4 if suffix == "safetensors" else 1)
    assert [set(names) for names in opened.shards.values()] == [{"b.weight", "steps"}, {"a.bias", "none"}]
    assert opened.headers["a.bias"].file == list(opened.shards)[1]


def test_transformers_model(tmp_path: Path) -> None:
    model = BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                 vocab_size=30, max_position_embeddings=8))  # fmt: skip
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="3KB")
    one, many = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "many")
    assert len(many.shards) > 1 and one.config["model_type"] == "bert"
    same(many, {name: one.tensor(name) for name in one})
    assert one.fingerprint() == many.fingerprint()


@pytest.mark.parametrize("file", ["x.safetensors", "x.pt", "x.pth", "x.bin"])
def test_single_files(tmp_path: Path, file: str) -> None:
    opened = open_checkpoint(store(tmp_path / file, tensors()))
    same(opened, tensors())
    assert (opened.kind, opened.root, opened.config, opened.companions) == ("state_dict", tmp_path, {}, None)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_unwrapping_and_other_entries(tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.pt"
    torch.save({key: {**tensors(), "epoch": 3, "note": "hello"}, "optimizer": {"lr": torch.ones(1)}, "step": 5}, path)
    same(open_checkpoint(path), tensors())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_wrapper_prefixes(tmp_path: Path, prefix: str) -> None:
    wrapped = {prefix + name: tensor for name, tensor in tensors().items()}
    opened = open_checkpoint(store(tmp_path / "x.safetensors", wrapped))
    same(opened, tensors())
    assert opened.fingerprint() == open_checkpoint(tensors()).fingerprint()
    kept = {**wrapped, "other": torch.zeros(1)}
    same(open_checkpoint(kept), kept)


def test_in_memory() -> None:
    opened = open_checkpoint(tensors(), config=BERT)
    same(opened, tensors())
    assert (opened.kind, opened.root, opened.config, opened.headers["steps"].file) == ("state_dict", None, BERT, "")
    assert open_checkpoint(opened) is opened
    assert open_checkpoint(opened, config={"x": 1}).config == {**BERT, "x": 1}


def test_config_forms(tmp_path: Path) -> None:
    store(folder(tmp_path / "m", BERT) / "model.safetensors", tensors())
    (tmp_path / "c.json").write_text('{"hidden_size": 8}')
    for given in ({"hidden_size": 8}, tmp_path / "c.json", str(tmp_path / "c.json"), ' {"hidden_size": 8}'):
        assert open_checkpoint(tmp_path / "m", config=given).config == {**BERT, "hidden_size": 8}
    for given in ("{oops", "no-such.json", tmp_path):
        with pytest.raises(InputError, match=f"config text|{given}"):
            open_checkpoint(tensors(), config=given)


def test_fingerprint_differs() -> None:
    base = open_checkpoint(tensors()).fingerprint()
    assert len(base) == 64 and base == open_checkpoint(dict(reversed(tensors().items()))).fingerprint()
    changed = tensors()
    changed["b.weight"][1, 1] += 1
    views = {**tensors(), "b.weight": tensors()["b.weight"].view(3, 4)}
    renamed = {name.replace("steps", "step"): tensor for name, tensor in tensors().items()}
    typed = {**tensors(), "b.weight": tensors()["b.weight"].view(torch.int32)}
    assert len({base, *(open_checkpoint(other).fingerprint() for other in (changed, views, renamed, typed))}) == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    bad = torch.zeros(2, 3, dtype=dtype)
    bad[1, 2] = value
    path = store(tmp_path / "x.safetensors", {"bad": bad, "scalar": torch.tensor(value), "ok": torch.ones(2)})
    opened = open_checkpoint(path)
    for _ in range(2):
        with pytest.raises(InputError, match=r"x\.safetensors.*'bad' holds .* at index \(1, 2\)"):
            opened.tensor("bad")
    with pytest.raises(InputError, match=r"'scalar' holds .* at index \(\)"):
        opened.tensor("scalar")
    assert opened.fingerprint() and torch.equal(opened.tensor("ok"), torch.ones(2))


def test_finite_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(checkpoint, "_first_not_finite", lambda tensor: seen.append(1))
    opened = open_checkpoint(tensors())
    for _ in range(3):
        opened.tensor("b.weight")
    assert len(seen) == 1


def test_missing_tensor_and_vanished_file(tmp_path: Path) -> None:
    place = store(tmp_path / "x.safetensors", tensors())
    opened, other = open_checkpoint(place), open_checkpoint(place)
    with pytest.raises(InputError, match="no tensor 'zzz'"):
        opened.tensor("zzz")
    os.truncate(place, place.stat().st_size - 1)
    with pytest.raises(InputError, match=r"x\.safetensors: .*shorter"):
        [opened.tensor(name) for name in opened]
    place.unlink()  # an open file stays readable
    assert torch.equal(other.tensor("steps"), tensors()["steps"])
    with pytest.raises(InputError, match=r"x\.safetensors"):
        open_checkpoint(place)


def test_one_open_file_for_all_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []
    open_file = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: (seen.append(path), open_file(path, *rest))[1])
    opened = open_checkpoint(sharded(tmp_path, "safetensors"))
    for _ in range(3):
        same(opened, tensors())
        opened.fingerprint()
    assert sorted(path.name for path in seen) == sorted(opened.shards)
    held = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()}
    mapped = Path("/proc/self/maps").read_text()
    assert {str(path) for path in seen} <= held and str(tmp_path) not in mapped
    again = pickle.loads(pickle.dumps(opened))
    same(again, tensors())
    assert len(pickle.dumps(opened)) < 4000 and len(seen) == 4
    del opened, again
    gc.collect()
    held = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()}
    assert not any(str(tmp_path) in place for place in held)


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_blocks_are_the_tensor(tmp_path: Path, count: int, dtype: torch.dtype) -> None:
    held = {"a": torch.zeros(3, dtype=torch.uint8), "x": (torch.arange(count) % 251).to(dtype)}
    for opened in (open_checkpoint(store(tmp_path / "x.safetensors", held)), open_checkpoint(held)):
        blocks = [block.clone() for block in opened.blocks("x")]
        assert torch.equal(torch.cat([torch.zeros(0, dtype=dtype), *blocks]), held["x"])
        assert all(len(block) <= BLOCK for block in blocks) and opened.known.reads == {"x": 1}


def test_blocks_refuse_what_is_not_finite(tmp_path: Path) -> None:
    bad = torch.zeros(3, BLOCK)
    bad[2, 7] = math.nan
    opened = open_checkpoint(store(tmp_path / "x.safetensors", {"bad": bad}))
    with pytest.raises(InputError, match=r"'bad' holds nan at index \(2, 7\)"):
        list(opened.blocks("bad"))
    assert len(list(opened.raw_blocks("bad"))) == 3


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
# Headers with how many bytes of tensors behind them.
HEADERS: list[tuple[object, int]] = [
    ({"a": ENTRY}, 7),
    ({"a": ENTRY}, 9),
    ({"a": {**ENTRY, "data_offsets": [1, 9]}}, 9),
    ({"a": {**ENTRY, "data_offsets": [8, 0]}}, 8),
    ({"a": {**ENTRY, "data_offsets": [0, 8, 8]}}, 8),
    ({"a": {**ENTRY, "shape": [3]}}, 8),
    ({"a": {**ENTRY, "shape": [-1, -2]}}, 8),
    ({"a": {**ENTRY, "shape": [2**62, 2**62]}}, 8),
    ({"a": {**ENTRY, "shape": [2.0]}}, 8),
    ({"a": {**ENTRY, "shape": 2}}, 8),
    ({"a": {**ENTRY, "dtype": "F33"}}, 8),
    ({"a": {**ENTRY, "dtype": "F64"}}, 8),
    ({"a": {"dtype": "F32", "shape": [2]}}, 8),
    ({"a": ENTRY, "b": ENTRY}, 8),
    ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, 12),
    ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [16, 24]}}, 24),
    ({"a": None}, 0),
    ([ENTRY], 8),
    ("a", 8),
]


@pytest.mark.parametrize(("header", "size"), HEADERS)
def test_headers_that_safetensors_refuses(tmp_path: Path, header: object, size: int) -> None:
    raw, path = json.dumps(header).encode(), tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(size))
    with pytest.raises(SafetensorError), safe_open(path, "pt"):
        pass
    with pytest.raises(InputError, match=r"x\.safetensors"):
        open_checkpoint(path)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space are those of Linux")
def test_no_room_for_a_tensor_is_an_input_error(tmp_path: Path) -> None:
    path = store(tmp_path / "x.safetensors", {"x": torch.zeros(2**26)})  # 256 MB
    code = f"""
import resource, torch
from transfuse.files.opening import open_checkpoint
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, -1))
opened = open_checkpoint({str(path)!r})
assert len(opened.fingerprint()) == 64
opened.tensor("x")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "InputError" in found.stderr and "no memory for tensor 'x'" in found.stderr


def model(content: dict, config: object = BERT) -> Callable[[Path], Path]:
    return lambda path: store(folder(path, config) / "model.safetensors", content).parent


def bare(file: str, content: object) -> Callable[[Path], Path]:
    def build(path: Path) -> Path:
        place = folder(path) / file
        place.write_bytes(content) if isinstance(content, bytes) else torch.save(content, place)
        return place

    return build


def damaged(content: bytes) -> Callable[[Path], Path]:
    return lambda path: bare("model.safetensors", content)(folder(path, BERT)).parent


def spoilt(held: dict | None = None, index: str = "") -> Callable[[Path], Path]:
    def build(path: Path) -> Path:
        sharded(path, held=held)
        if index:
            (path / "model.safetensors.index.json").write_text(index)
        return path

    return build


RAW = save(tensors())
SECOND = "model-00002-of-00002.safetensors"
ONE = {"x": torch.zeros(2)}
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no weights": (lambda path: folder(path, BERT), r"no weights.*model\.safetensors, .*pytorch_model\.bin"),
    "no clip weights": (lambda path: folder(path, CLIP, "open_clip_config.json"), "open_clip_model.safetensors"),
    "adapter": (lambda path: folder(path, {"peft_type": "LORA"}, "adapter_config.json"), "adapter.*merge_and_unload"),
    "lora only": (model({"a.lora_A.weight": torch.zeros(2, 2)}), "LoRA.*'a.lora_A.weight'.*merge_and_unload"),
    "quantisation config": (model(ONE, {**BERT, "quantization_config": {"bits": 4}}), "'quantization_config'"),
    **{
        name: (model({f"l.{name}": torch.zeros(2, dtype=torch.int32)}), f"'l.{name}' is quantised")
        for name in ("qweight", "qzeros", "SCB", "weight.absmax", "weight.quant_state.bitsandbytes__nf4")
    },
    **{
        str(dtype): (model({"l.weight": torch.zeros(2, dtype=dtype)}), rf"model\.safetensors.*'l.weight'.*{dtype}")
        for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2)
    },
    "empty file": (damaged(b""), r"model\.safetensors.*the file is empty"),
    "header too long": (damaged(struct.pack("<Q", 10**6) + RAW[8:]), "not a valid safetensors"),
    "header absurd": (damaged(struct.pack("<Q", 2**60) + RAW[8:]), "not a valid safetensors"),
    "bad header": (damaged(struct.pack("<Q", 8) + b"{not js}"), "not a valid safetensors.*JSON"),
    "short": (damaged(RAW[:-3]), r"model\.safetensors.*cut off"),
    "git lfs": (damaged(b"version https://git-lfs.github.com/spec/v1\noid"), "Git LFS pointer"),
    "config text": (model(ONE, "{oops"), r"config\.json: not valid JSON"),
    "config list": (model(ONE, [1]), r"config\.json: a JSON object was expected, not list"),
    "config deep": (model(ONE, "[" * 200_000), r"config\.json"),
    "shard missing": (lambda path: (sharded(path) / SECOND).unlink() or path, f"{SECOND}: missing"),
    "tensor not in shard": (spoilt({"none": torch.zeros(0, 2)}), f"{SECOND}.*'a.bias' is not in it"),
    "tensor not in index": (
        spoilt({"none": torch.zeros(0, 2), "a.bias": torch.zeros(3), "zz": torch.zeros(1)}),
        f"{SECOND}.*'zz' is in it",
    ),
    "index without map": (spoilt(index="{}"), "no 'weight_map'"),
    "index not JSON": (spoilt(index="{"), r"index\.json: not valid JSON"),
    "index outside": (spoilt(index='{"weight_map": {"a": "../x.bin"}}'), "not a file of this folder"),
    "index number": (spoilt(index='{"weight_map": {"a": 3}}'), "not a file of this folder"),
    "no tensors": (bare("x.pt", {"epoch": 3}), r"x\.pt: no tensors"),
    "a tensor alone": (bare("x.pt", torch.zeros(2)), r"x\.pt: no tensors"),
    "no tensors, safetensors": (bare("x.safetensors", save({})), "no tensors"),
    "not a torch file": (bare("x.bin", b"hello, this is text"), r"x\.bin"),
    "empty pickle": (bare("x.bin", b""), r"x\.bin: the file is empty"),
    "damaged archive": (bare("x.pth", b"PK\x03\x04" + b"\0" * 200), r"x\.pth"),
    "sparse": (bare("x.pt", {"s": torch.eye(3).to_sparse()}), "'s' .*sparse"),
    "meta": (bare("x.pt", {"m": torch.zeros(2, device="meta")}), "'m' .*without data"),
    "other suffix": (bare("x.h5", b"x"), "not a weight file"),
    "missing path": (lambda path: path / "nothing", "no such file or folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    build, message = REFUSED[case]
    path = build(tmp_path / "given")
    with pytest.raises(InputError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_formats(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.bin"
    torch.save(tensors(), path, _use_new_zipfile_serialization=zipped)
    same(open_checkpoint(path), tensors())
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(InputError, match=r"x\.bin"):
        open_checkpoint(path)


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("file", ["x.pt", "pytorch_model.bin"])
def test_code_is_not_run(tmp_path: Path, file: str, zipped: bool) -> None:
    marker, path = tmp_path / "marker", tmp_path / file
    torch.save({"w": torch.zeros(2), "x": _Hostile(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"can run code.*safetensors\.torch\.save_file"):
        open_checkpoint(path if file == "x.pt" else tmp_path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the test's own file: it would have run
    assert marker.exists()


def hub(patch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, bytes], error: Exception | None = None) -> list:
    """A hub with one model of these files, or one that fails; gives the calls that are made."""
    calls: list[SimpleNamespace] = []

    def snapshot_download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append(SimpleNamespace(repo=repo_id, revision=revision))
        if error is not None:
            raise error
        for name, content in files.items():
            if any(Path(name).match(pattern) for pattern in allow_patterns):
                (folder(tmp_path / "cache") / name).write_bytes(content)
        return str(folder(tmp_path / "cache"))

    patch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize(
    ("weights", "fetched", "kind"),
    [
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5"], ["model.safetensors"], "transformers"),
        (["pytorch_model.bin", "flax_model.msgpack"], ["pytorch_model.bin"], "transformers"),
        (["open_clip_model.safetensors", "open_clip_pytorch_model.bin"], ["open_clip_model.safetensors"], "open_clip"),
    ],
)
def test_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, weights: list[str], fetched: list, kind: str) -> None:
    torch.save(tensors(), tmp_path / "x.bin")
    raw = {".safetensors": save(tensors()), ".bin": (tmp_path / "x.bin").read_bytes()}
    files = {name: raw.get(Path(name).suffix, b"x") for name in weights}
    config = "open_clip_config.json" if kind == "open_clip" else "config.json"
    calls = hub(monkeypatch, tmp_path, {**files, config: json.dumps(BERT).encode(), "vocab.txt": b"a"})
    opened = open_checkpoint("org/name@refs/pr/1")
    same(opened, tensors())
    assert (opened.location, opened.kind) == ("org/name@refs/pr/1", kind)
    assert {(call.repo, call.revision) for call in calls} == {("org/name", "refs/pr/1")}
    assert sorted(os.listdir(tmp_path / "cache")) == sorted([*fetched, config, "vocab.txt"])


def test_hub_shards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = sharded(tmp_path / "source")
    hub(monkeypatch, tmp_path, {**{f.name: f.read_bytes() for f in source.iterdir()}, "pytorch_model.bin": b"x"})
    same(open_checkpoint("org/name"), tensors())
    assert not (tmp_path / "cache" / "pytorch_model.bin").exists()


HTTP_ERROR = hub_errors.HfHubHTTPError.__bases__[0]("connection refused")


@pytest.mark.parametrize(
    "error", [hub_errors.LocalEntryNotFoundError("offline"), HTTP_ERROR, hub_errors.HFValidationError("bad name")]
)
def test_hub_failures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception) -> None:
    hub(monkeypatch, tmp_path, {}, error)
    with pytest.raises(InputError, match=r"'org/name'.*no such file or folder here.*hub model 'org/name'.*network"):
        open_checkpoint("org/name")


def test_hub_incomplete_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store(folder(tmp_path, BERT) / "model.safetensors", tensors())
    hub(monkeypatch, tmp_path, {}, hub_errors.IncompleteSnapshotError("README missing", str(tmp_path)))
    same(open_checkpoint("org/name"), tensors())


def test_hub_without_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub(monkeypatch, tmp_path, {"adapter_config.json": b"{}", "adapter_model.safetensors": save(ONE)})
    with pytest.raises(InputError, match="org/name: an adapter"):
        open_checkpoint("org/name")


@pytest.mark.parametrize("text", ["", "./a/b", "../a", "~/no/such", "/no/such", "a/b/c", "one", "a/x.bin", "a b/c"])
def test_local_paths_do_not_reach_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    calls = hub(monkeypatch, tmp_path, {})
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")  # what lies beside a clone is not the test's
    with pytest.raises(InputError, match=r"no such file or folder"):
        open_checkpoint(text)
    with pytest.raises(InputError, match=r"no such file or folder"):
        open_checkpoint(Path("org/name"))
    assert not calls


def test_a_state_dict_is_copied_once() -> None:
    """The caller goes on with the model: what was opened stays what it was, also where numpy shares the memory."""
    given = tensors()
    given["tied"], given["flat"] = given["b.weight"], given["b.weight"].view(-1)
    given["numpy"] = torch.from_numpy(array := np.ones((2, 2), dtype=np.float32))
    config = {"model_type": "bert", "id2label": {"0": "A"}}
    opened = open_checkpoint(given, config=config)
    before = {name: tensor.clone() for name, tensor in given.items()}
    for tensor in given.values():
        tensor.zero_()
    array[:] = 7
    config["id2label"]["0"] = "B"
    assert all(torch.equal(opened.tensor(name), tensor) for name, tensor in before.items())
    assert opened.tensor("tied").data_ptr() == opened.tensor("b.weight").data_ptr()
    assert opened.fingerprint() == open_checkpoint(before).fingerprint()
    assert opened.config["id2label"] == {"0": "A"}


@pytest.mark.parametrize("name", ["__metadata__", "half \ud800"])
def test_names_that_no_file_can_hold(tmp_path: Path, name: str) -> None:
    """What is read under such a name could not be written, or not be read again."""
    with pytest.raises(InputError, match="is no name for a tensor"):
        open_checkpoint({name: torch.zeros(2), "b": torch.zeros(2)})
    raw = json.dumps({name: ENTRY, "b": {**ENTRY, "data_offsets": [8, 16]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(16))
    with pytest.raises(InputError):
        open_checkpoint(tmp_path / "x.safetensors")


def test_dimensions_beyond_any_memory(tmp_path: Path) -> None:
    raw = json.dumps({"a": {"dtype": "F32", "shape": [0, 2**70], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    with pytest.raises(InputError, match="no sound shape"):
        open_checkpoint(tmp_path / "x.safetensors")
