"""CLIPs of open_clip as models of transformers: the same function, the same inputs, nothing lost without a word."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModelWithProjection

import plain_open_clip
from tiny_data import clip_spec
from transfuse.cli.common import app
from transfuse.errors import InputError
from transfuse.porting.convert import convert
from transfuse.running.building import seeded_inputs
from transfuse.running.live import load_live
from transfuse.study.initial import InitSpec, TokenizerSpec, initialise
from vision_families import OPEN_CLIP_FILES, VISION_CASES, Table

TABLES: dict[str, Any] = {
    case.name: case.from_table().source for case in VISION_CASES if case.name.startswith("open_clip-")
}
CONFIG, WEIGHTS = OPEN_CLIP_FILES
EXACT = 1e-9


def saved(folder: Path, name: str = "open_clip-plain", **changes: Any) -> Path:
    """A random checkpoint of one of the tables, with keys of its model_cfg changed."""
    table = TABLES[name]
    assert isinstance(table, Table)
    Table({**table.config, "model_cfg": {**table.config["model_cfg"], **changes}}, table.shapes, table.files).save(
        folder, 0
    )
    return folder


def edited(folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], object]) -> Path:
    """The checkpoint with its config and tensors changed."""
    config, state = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    change(config, state)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
    return folder


def load(kind: Any, folder: Path) -> Any:
    return kind.from_pretrained(folder, dtype=torch.float64).eval()


def largest(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected - found).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", ["open_clip-plain", "open_clip-quick-gelu", "open_clip-custom"])
def test_the_converted_model_computes_what_the_tensors_say(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "open", name)
    state, about = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())["model_cfg"]
    report = convert(folder, tmp_path / "out")
    assert report["class"] == "CLIPModel" and report["tokenizer"] is None
    model = load(CLIPModel, tmp_path / "out")
    inputs = seeded_inputs("open_clip", {"model_cfg": about}, 3, torch.float64)
    with torch.no_grad():
        found = model(input_ids=inputs["text"], pixel_values=inputs["image"])
        images, texts = (
            model.visual_projection(model.vision_model(inputs["image"]).pooler_output),
            model.text_projection(model.text_model(inputs["text"]).pooler_output),
        )
    expected = torch.stack([plain_open_clip.image_features(state, about, one) for one in inputs["image"]])
    assert largest(expected, images) < EXACT
    expected = torch.stack([plain_open_clip.text_features(state, about, one) for one in inputs["text"]])
    assert largest(expected, texts) < EXACT
    cosines = torch.nn.functional.normalize(images, dim=-1) @ torch.nn.functional.normalize(texts, dim=-1).T
    assert largest(state["logit_scale"].exp() * cosines, found.logits_per_image) < EXACT


def test_pooling_at_an_end_token_of_its_own(tmp_path: Path) -> None:
    text = {**TABLES["open_clip-plain"].config["model_cfg"]["text_cfg"], "pool_type": "eos", "eos_id": 7}
    folder = saved(tmp_path / "open", text_cfg=text)
    convert(folder, tmp_path / "out")
    ids = torch.tensor([[5, 39, 7, 3, 7, 1, 0, 0]])
    state, about = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())["model_cfg"]
    model = load(CLIPTextModelWithProjection, tmp_path / "out")
    with torch.no_grad():
        found = model(ids).text_embeds[0]
    assert largest(plain_open_clip.text_features(state, about, ids[0]), found) < EXACT
    at_highest = {**about, "text_cfg": {**about["text_cfg"], "pool_type": "argmax"}}
    assert largest(plain_open_clip.text_features(state, at_highest, ids[0]), found) > 0.1


def test_the_text_tower_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path / "open")
    convert(folder, tmp_path / "whole")
    convert(folder, tmp_path / "tower", tower="text")
    # A CLIPModel of transformers has the same tower; its projection size stands in the config of the whole alone.
    whole = json.loads((tmp_path / "whole" / "config.json").read_text())
    del whole["text_config"]["projection_dim"]
    (tmp_path / "whole" / "config.json").write_text(json.dumps(whole))
    convert(tmp_path / "whole", tmp_path / "tower-of-whole", tower="text")
    config = json.loads((tmp_path / "tower" / "config.json").read_text())
    assert (config["model_type"], config["projection_dim"]) == ("clip_text_model", 8)
    ids = torch.tensor([[1, 5, 39, 0]])
    with torch.no_grad():
        expected = load(CLIPModel, tmp_path / "whole").get_text_features(ids)
        expected = getattr(expected, "pooler_output", expected)
        for name in ("tower", "tower-of-whole"):
            assert largest(expected, load(CLIPTextModelWithProjection, tmp_path / name)(ids).text_embeds) < EXACT


def test_the_image_processor_says_what_open_clip_does(tmp_path: Path) -> None:
    folder = edited(saved(tmp_path / "open"), lambda c, _: c.update(preprocess_cfg={"mean": [0.1, 0.2, 0.3]}))
    convert(folder, tmp_path / "out")
    found = load_live(tmp_path / "out").image_processor.to_dict()
    assert list(found["image_mean"]) == [0.1, 0.2, 0.3] and found["image_std"][0] == pytest.approx(0.26862954)
    assert dict(found["size"]) == {"shortest_edge": 8} and found["do_center_crop"]
    edited(folder, lambda c, _: c["preprocess_cfg"].update(resize_mode="squash", interpolation="bilinear"))
    convert(folder, tmp_path / "squashed")
    found = load_live(tmp_path / "squashed").image_processor.to_dict()
    assert dict(found["size"]) == {"height": 8, "width": 8} and not found["do_center_crop"] and found["resample"] == 2


VISION, TEXT = ("model_cfg", "vision_cfg"), ("model_cfg", "text_cfg")


@pytest.mark.parametrize(
    ("at", "key", "value", "said"),
    [
        (VISION, "attentional_pool", True, "vision_cfg has attentional_pool = true"),
        (VISION, "no_ln_pre", True, "vision_cfg has no_ln_pre = true"),
        (VISION, "ls_init_value", 0.1, "vision_cfg has ls_init_value = 0.1"),
        (VISION, "pool_type", "avg", 'vision_cfg has pool_type = "avg"'),
        (VISION, "timm_model_name", "vit_base", 'vision_cfg has timm_model_name = "vit_base"'),
        (VISION, "layers", [3, 4, 6, 3], "a ResNet"),
        (VISION, "layers", 3, "3 layers"),
        (VISION, "image_size", 16, "images of 16 pixels have 16 patches"),
        (VISION, "image_size", [8, 16], "square"),
        (VISION, "patch_merging", 2, "vision_cfg has patch_merging = 2"),
        (TEXT, "hf_model_name", "roberta-base", 'text_cfg has hf_model_name = "roberta-base"'),
        (TEXT, "no_causal_mask", True, "text_cfg has no_causal_mask = true"),
        (TEXT, "pool_type", "last", 'text_cfg has pool_type = "last"'),
        (TEXT, "pool_type", "eos", "eos_id = 2"),
        (TEXT, "qk_norm", True, "text_cfg has qk_norm = true"),
        (TEXT, "act_kwargs", {"approximate": "tanh"}, "text_cfg has act_kwargs"),
        (("model_cfg",), "multimodal_cfg", {"width": 8}, "model_cfg has multimodal_cfg"),
        ((), "preprocess_cfg", {"resize_mode": "longest"}, "resizes by 'longest'"),
    ],
)
def test_what_clip_model_cannot_hold_is_refused_by_name(
    at: tuple[str, ...], key: str, value: Any, said: str, tmp_path: Path
) -> None:
    def change(config: dict[str, Any], state: Any) -> None:
        for part in at:
            config = config[part]
        config[key] = value

    folder = edited(saved(tmp_path / "open"), change)
    with pytest.raises(InputError, match=said) as caught:
        convert(folder, tmp_path / "out")
    assert str(folder) in str(caught.value) and not (tmp_path / "out").exists()


def test_tensors_decide_where_a_config_says_nothing(tmp_path: Path) -> None:
    def scale(config: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
        state["visual.transformer.resblocks.0.ls_1.gamma"] = torch.ones(16)

    with pytest.raises(InputError, match=r"no place for tensor 'visual\.transformer\.resblocks\.0\.ls_1\.gamma'"):
        convert(edited(saved(tmp_path / "scaled"), scale), tmp_path / "out")
    with pytest.raises(InputError, match=r"lacks what CLIPModel has as 'vision_model\.pre_layrnorm\.weight'"):
        folder = edited(
            saved(tmp_path / "bare"), lambda _, s: [s.pop(f"visual.ln_pre.{n}") for n in ("weight", "bias")]
        )
        convert(folder, tmp_path / "out")
    with pytest.raises(InputError, match="in the format of transformers already"):
        initialise(clip_spec(), tmp_path / "clip")
        convert(tmp_path / "clip", tmp_path / "out")
    harmless = edited(saved(tmp_path / "mask"), lambda _, s: s.update(attn_mask=torch.zeros(8, 8)))
    assert convert(harmless, tmp_path / "out")["tensors"] == 78


def test_dtype_and_a_scale_stored_as_a_vector(tmp_path: Path) -> None:
    def narrow(config: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
        state.update({name: tensor.half() for name, tensor in state.items()})
        state["logit_scale"] = state["logit_scale"].reshape(1)

    convert(edited(saved(tmp_path / "open"), narrow), tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16} and state["logit_scale"].shape == ()


OPEN_CLIP: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
        "text_cfg": {"context_length": 12, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
    }
}


def test_random_models_in_the_format_of_open_clip(tmp_path: Path) -> None:
    """As full-size recipes get theirs: tokenizer beside the weights."""
    spec = InitSpec(config=OPEN_CLIP, seed=3, tokenizer=TokenizerSpec(vocab_size=60, texts=["a photo of a cat."]))
    for name in ("one", "two"):
        initialise(spec, tmp_path / name)
        convert(tmp_path / name, tmp_path / f"{name}-out")
    for file in sorted((tmp_path / "one-out").iterdir()):
        assert file.read_bytes() == (tmp_path / "two-out" / file.name).read_bytes(), file.name
    assert (tmp_path / "one-out" / "tokenizer.json").is_file()
    other = copy.deepcopy(OPEN_CLIP)
    del other["model_cfg"]["text_cfg"]["width"]
    with pytest.raises(InputError, match="lacks 'width'"):
        initialise(InitSpec(config=other), tmp_path / "other")


def test_the_command(tmp_path: Path) -> None:
    initialise(clip_spec(), tmp_path / "clip")
    folder = saved(tmp_path / "open")
    run = CliRunner().invoke(app, ["convert", str(folder), "-o", str(tmp_path / "out"), "--json"])
    assert run.exit_code == 0 and json.loads(run.stdout)["tokenizer"] is None
    arguments = ["convert", str(folder), "-o", str(tmp_path / "more"), "--tokenizer"]
    run = CliRunner().invoke(app, [*arguments, str(tmp_path / "clip"), "--tower", "text"])
    assert run.exit_code == 0 and "CLIPTextModelWithProjection, 37 tensors, the tokenizer of" in run.stdout
    assert (tmp_path / "more" / "tokenizer.json").read_bytes() == (tmp_path / "clip" / "tokenizer.json").read_bytes()
    for given, said in ((tmp_path / "open", "no tokenizer there"), (tmp_path / "none", "no such folder")):
        run = CliRunner().invoke(app, [*arguments, str(given), "--force"])
        assert run.exit_code == 2 and said in run.stderr
