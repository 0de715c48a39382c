"""Source and tuned seen with target's inputs: vocabularies, image sizes, patches, positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CLIPModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    RobertaConfig,
    RobertaModel,
    ViTForImageClassification,
)

import transfuse
from test_resizing import DRAWN
from tiny import Model, bert, clip, fine_tuned, randomise, save, state_of, vit
from transfuse import InputError
from transfuse.files.opening import open_checkpoint
from transfuse.files.vocabulary import read_vocabulary
from transfuse.models.model import Models
from transfuse.models.opening import open_models
from transfuse.running.building import load_transformers
from vision_families import VISION_CASES, VisionCase

WORDS = [f"word{i}" for i in range(26)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def with_vocabulary(place: Path, tokens: list[str]) -> Path:
    (place / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens))
    return place


def seen(models: Models, role: str = "source") -> Model:
    """A model as it is seen, in its real class."""
    checkpoint = getattr(models, role).checkpoint
    model, loading = load_transformers(checkpoint.config, {name: checkpoint.tensor(name) for name in checkpoint})
    assert not loading.mismatched and not loading.missing - {"cls.predictions.decoder.weight"}, loading
    return model


# --- vocabularies -----------------------------------------------------------------------------------------------------


def two_vocabularies(folder: Path) -> tuple[list[Path], list[str], list[str]]:
    old = SPECIAL + WORDS
    new = [*SPECIAL, "added", *reversed(WORDS[:20]), "other"]  # some are gone, two are new, all have other ids
    source = bert(BertForMaskedLM, 0)
    target = bert(BertForMaskedLM, 1, vocab_size=len(new))
    places = [
        save(source, folder / "source"),
        save(fine_tuned(source), folder / "tuned"),
        save(target, folder / "target"),
    ]
    for place, tokens in zip(places, (old, old, new), strict=True):
        with_vocabulary(place, tokens)
    return places, old, new


def test_tokens_go_by_name(tmp_path: Path) -> None:
    """Source, as it is seen, gives for target's ids what it gives for its own ids of the same tokens."""
    places, old, new = two_vocabularies(tmp_path)
    models = open_models(places[0], places[2], places[1])
    shared = [token for token in new if token in old]
    text = torch.randint(len(shared), (4, 9), generator=torch.Generator().manual_seed(0))
    ids = [torch.tensor([[tokens.index(shared[i]) for i in row] for row in text.tolist()]) for tokens in (old, new)]
    for role, place in zip(("source", "tuned"), places[:2], strict=True):
        plain: Any = BertForMaskedLM.from_pretrained(place, dtype=torch.float64)
        with torch.no_grad():
            wanted, found = plain(ids[0]).logits, seen(models, role)(ids[1]).logits
        columns = [[tokens.index(token) for token in shared] for tokens in (old, new)]
        torch.testing.assert_close(found[..., columns[1]], wanted[..., columns[0]])
    assert any(note.startswith("vocabulary: 25 of target's 27 tokens are in source") for note in models.notes)
    table = models.source.tensor("embeddings.word_embeddings.weight")
    own = state_of(bert(BertForMaskedLM, 0))["bert.embeddings.word_embeddings.weight"]
    torch.testing.assert_close(table[new.index("added")], own.mean(0), rtol=0, atol=1e-6)


def test_naive_adds_by_token(tmp_path: Path) -> None:
    places, old, new = two_vocabularies(tmp_path)
    result = transfuse.port(*places, method="naive")
    name = "bert.embeddings.word_embeddings.weight"
    base, tuned, target = (state_of(BertForMaskedLM.from_pretrained(one, dtype=torch.float64))[name] for one in places)
    change = result.tensor(name) - target
    for token in (one for one in new if one in old):
        expected = (tuned - base)[old.index(token)]
        torch.testing.assert_close(change[new.index(token)], expected, rtol=0, atol=1e-6)


def test_the_same_tokens_stay_what_they_are(tmp_path: Path) -> None:
    places = [save(bert(BertForMaskedLM, seed), tmp_path / str(seed)) for seed in (0, 1)]
    for place in places:
        with_vocabulary(place, SPECIAL + WORDS)
    assert open_models(*places).notes == ()


def test_a_table_padded_to_more_rows(tmp_path: Path) -> None:
    """The same tokenizer, rows that no token has: as hub models have for speed."""
    places = [save(bert(BertModel, 0), tmp_path / "0"), save(bert(BertModel, 1, vocab_size=40), tmp_path / "1")]
    models = open_models(*places)
    table, own = models.source.tensor("embeddings.word_embeddings.weight"), state_of(bert(BertModel, 0))
    assert table.shape == (40, 16)
    torch.testing.assert_close(table[:31], own["embeddings.word_embeddings.weight"])
    models = open_models(*reversed(places))
    assert models.source.tensor("embeddings.word_embeddings.weight").shape == (31, 16)


def test_another_language_is_refused(tmp_path: Path) -> None:
    places = [save(bert(BertModel, seed), tmp_path / str(seed)) for seed in (0, 1)]
    with_vocabulary(places[0], SPECIAL + WORDS)
    with_vocabulary(places[1], SPECIAL + [f"mot{i}" for i in range(26)])
    with pytest.raises(InputError, match=r"of its 31 tokens source .* knows 5; .* nothing can be carried over"):
        open_models(*places)


def test_a_fine_tune_with_tokens_of_its_own_is_refused(tmp_path: Path) -> None:
    places = [save(bert(BertModel, seed), tmp_path / str(seed)) for seed in (0, 1, 2)]
    for place, tokens in zip(places, (WORDS, WORDS, WORDS[::-1]), strict=True):
        with_vocabulary(place, SPECIAL + tokens)
    with pytest.raises(InputError, match=r"tuned .* has another vocabulary than source.*Is it a fine-tune"):
        open_models(places[0], places[1], places[2])


# --- images -----------------------------------------------------------------------------------------------------------


def pixels(size: int, channels: int = 1) -> Tensor:
    return torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_another_resolution_is_that_of_transformers(tmp_path: Path) -> None:
    """The position table is resized as transformers does it for larger images."""
    source, target = vit(0), vit(1, image_size=16)
    places = [save(source, tmp_path / "0"), save(target, tmp_path / "1")]
    models = open_models(*places)
    with torch.no_grad():
        wanted = source(pixels(16), interpolate_pos_encoding=True).logits
        torch.testing.assert_close(seen(models)(pixels(16)).logits, wanted, rtol=0, atol=1e-6)
    assert any("position_embeddings (1, 5, 16) is seen as (1, 17, 16)" in note for note in models.notes)


@pytest.mark.parametrize(("mine", "its"), [(2, 4), (4, 2), (4, 4)])
def test_other_patches_are_resized_patches(tmp_path: Path, mine: int, its: int) -> None:
    """Source sees every patch of target's resized to what it expects."""
    size = 4 * mine
    source, target = vit(0, patch_size=its, image_size=4 * its), vit(1, patch_size=mine, image_size=size)
    models = open_models(save(source, tmp_path / "0"), save(target, tmp_path / "1"))
    x = pixels(size)
    patches = x.unfold(2, mine, mine).unfold(3, mine, mine)  # (n, 1, rows, columns, mine, mine)
    flat = functional.interpolate(patches.reshape(-1, 1, mine, mine), size=(its, its), mode="bilinear", antialias=True)
    large = flat.view(3, 1, 4, 4, its, its).permute(0, 1, 2, 4, 3, 5).reshape(3, 1, 4 * its, 4 * its)
    with torch.no_grad():
        torch.testing.assert_close(seen(models)(x).logits, source(large).logits, rtol=0, atol=1e-5)


def test_special_positions_stay(tmp_path: Path) -> None:
    places = [save(vit(0), tmp_path / "0"), save(vit(1, image_size=12), tmp_path / "1")]
    table = open_models(*places).source.tensor("embeddings.position_embeddings")
    own = state_of(vit(0))["vit.embeddings.position_embeddings"]
    torch.testing.assert_close(table[:, 0], own[:, 0])
    assert table.shape == (1, 10, 16)


def test_clip_with_larger_images(tmp_path: Path) -> None:
    source = clip(CLIPModel, 0)
    target = clip(CLIPModel, 1)
    larger = _larger_clip(target, 16)
    models = open_models(save(source, tmp_path / "0"), save(larger, tmp_path / "1"))
    with torch.no_grad():
        wanted = source.get_image_features(pixels(16, 3), interpolate_pos_encoding=True)
        found = seen(models).get_image_features(pixels(16, 3))
    first, second = (one if isinstance(one, Tensor) else one.pooler_output for one in (found, wanted))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


def _larger_clip(model: Model, size: int) -> Model:
    config = type(model.config).from_dict(model.config.to_dict())
    config.vision_config.image_size = size
    return randomise(type(model)(config).double(), 3)


def test_dinov2_with_other_sizes(tmp_path: Path) -> None:
    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4}
    made = [randomise(Dinov2Model(Dinov2Config(**small, image_size=size)).double(), size) for size in (8, 16)]
    models = open_models(*(save(one, tmp_path / str(i)) for i, one in enumerate(made)))
    with torch.no_grad():
        found, wanted = (one(pixels(16, 3)).last_hidden_state for one in (seen(models), made[0]))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["naive", "tied", "orthogonal", "functional"])
def test_every_method_carries_to_another_resolution(tmp_path: Path, method: str) -> None:
    """The body has one shape, so weights can be matched as ever."""
    source = vit(0)
    target = vit(0, image_size=16)
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((source, fine_tuned(source, size=0.2), target))]
    inputs = DRAWN if method == "functional" else None
    result = transfuse.port(*places, method=method, inputs=inputs, null_trials=0, out=tmp_path / "out")
    assert result.report["resized"]["shapes"] is None and result.report["resized"]["inputs"]
    found: Any = ViTForImageClassification.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert found.config.image_size == 16 and found(pixels(16)).logits.shape == (3, 7)


def test_grids_that_are_not_square_are_refused(tmp_path: Path) -> None:
    places = [save(vit(0), tmp_path / "0"), save(vit(1, image_size=(8, 12)), tmp_path / "1")]
    with pytest.raises(InputError, match=r"5 and 7 positions are not those of two square grids of patches"):
        open_models(*places)


def test_other_channels_are_refused(tmp_path: Path) -> None:
    places = [save(vit(0), tmp_path / "0"), save(vit(1, num_channels=3), tmp_path / "1")]
    with pytest.raises(InputError, match=r"images have 1 channels in source and 3 in target"):
        open_models(*places)


# --- positions of texts -----------------------------------------------------------------------------------------------


def test_positions_of_texts_are_cut_or_filled(tmp_path: Path) -> None:
    places = [
        save(bert(BertModel, 0), tmp_path / "0"),
        save(bert(BertModel, 1, max_position_embeddings=20), tmp_path / "1"),
    ]
    name, own = "embeddings.position_embeddings.weight", state_of(bert(BertModel, 0))
    longer = open_models(*places).source.tensor(name)
    assert longer.shape == (20, 16) and torch.equal(longer[:14], own[name]) and not longer[14:].any()
    assert open_models(*reversed(places)).source.tensor(name).shape == (14, 16)


def test_fingerprints_tell_the_forms_apart(tmp_path: Path) -> None:
    """Maps made for one target are refused for source as another target sees it."""
    places = [save(vit(0), tmp_path / "0"), save(vit(1), tmp_path / "1"), save(vit(1, image_size=16), tmp_path / "2")]
    prints = {open_models(places[0], one).source.checkpoint.fingerprint() for one in places[1:]}
    assert len(prints) == 2


def test_a_model_is_seen_as_it_is_by_its_like() -> None:
    state, config = state_of(bert(BertForMaskedLM, 0)), bert(BertForMaskedLM, 0).config.to_dict()
    models = open_models(state, state, config=json.loads(json.dumps(config)))
    assert models.notes == () and models.source.checkpoint.origin is None


# --- what else a release can change -----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"vocab_size": 40}, {"max_position_embeddings": 20}])
@pytest.mark.parametrize("method", ["naive", "functional"])
def test_a_classifier_to_a_bare_base_with_other_inputs(tmp_path: Path, changes: dict[str, int], method: str) -> None:
    source = bert(BertModel, 0)
    tuned = fine_tuned(source, BertForSequenceClassification, num_labels=3)
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((source, tuned, bert(BertModel, 1, **changes)))]
    inputs = DRAWN if method == "functional" else None
    result = transfuse.port(*places, method=method, inputs=inputs, null_trials=0, out=tmp_path / "out")
    assert result.report["loads"] == "BertForSequenceClassification"


@pytest.mark.parametrize("case", VISION_CASES, ids=lambda case: case.name)
def test_grids_of_the_vision_libraries_are_resized(case: VisionCase) -> None:
    """Their position tables are named otherwise; no row is left empty."""
    family = "open_clip" if case.name.startswith("open_clip") else "timm_vit"
    name = next((n for n in case.shapes if n.endswith(("pos_embed", "visual.positional_embedding"))), None)
    if name is None:
        pytest.skip("it has no table of positions")
    *first, rows, width = case.shapes[name]
    generator = torch.Generator().manual_seed(0)
    states = [
        {
            n: torch.randn((*first, size, width) if n == name else shape, generator=generator)
            for n, shape in case.shapes.items()
        }
        for size in (rows, rows + 12)  # from 2 x 2 to 4 x 4 patches
    ]
    source = open_models(*states, family=family, config={"heads": 4, "num_heads": 4}).source
    table = source.tensor(source.disk.get(name, name))
    assert table.shape == (*first, rows + 12, width)
    assert table.flatten(0, -2).abs().sum(-1).min() > 0


def test_a_tower_alone_and_a_whole_clip(tmp_path: Path) -> None:
    """The config of one is inside that of the other."""
    whole = clip(CLIPModel, 0)
    larger = _larger_clip(clip(CLIPModel, 1), 16)
    alone = randomise(CLIPVisionModel(larger.config.vision_config).double(), 4)
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((whole, fine_tuned(whole), alone))]
    source = open_models(places[0], places[2]).source
    assert source.checkpoint.config["vision_config"]["image_size"] == 16
    table = source.tensor("vision_model.embeddings.position_embedding.weight")
    assert table.shape == (17, 16)


def test_padding_that_positions_are_counted_from(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 20,
    }  # fmt: skip
    made = [
        randomise(RobertaModel(RobertaConfig(**sizes, vocab_size=size, pad_token_id=pad)).double(), pad)
        for size, pad in ((31, 1), (33, 0))
    ]
    places = [save(one, tmp_path / str(i)) for i, one in enumerate(made)]
    with pytest.raises(InputError, match=r"padding token is 1, target's .* 0, and positions are counted"):
        open_models(*places)


def test_vocabularies_of_an_unknown_family_are_compared(tmp_path: Path) -> None:
    places = []
    for name, words in (("a", WORDS), ("b", WORDS[::-1])):
        places.append(tmp_path / name)
        places[-1].mkdir()
        save_file({"x.weight": torch.ones(3, 3)}, places[-1] / "model.safetensors")
        (places[-1] / "config.json").write_text('{"model_type": "gpt2"}')
        (places[-1] / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    with pytest.raises(InputError, match=r"target .* has another vocabulary than source"):
        open_models(*places, need_layout=False)


@pytest.mark.parametrize("index", ['"one"', "-1", "1000000000000000"])
def test_damaged_vocabularies_are_refused(tmp_path: Path, index: str) -> None:
    places = [save(bert(BertModel, seed), tmp_path / str(seed)) for seed in (0, 1)]
    for place in places:
        (place / "vocab.json").write_text(f'{{"word": {index}}}')
    with pytest.raises(InputError, match="token 'word' of its vocabulary has the id"):
        open_models(*places)


def test_added_tokens_count(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "[CLS]", "id": 1}]})
    )
    assert read_vocabulary("somewhere", tmp_path).tokens == {"a": 0, "[CLS]": 1}


def test_fingerprints_in_the_report_are_those_of_the_files(tmp_path: Path) -> None:
    source = vit(0)
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((source, fine_tuned(source), vit(1, image_size=16)))]
    report = transfuse.port(*places, method="naive").report
    for role, place in zip(("source", "tuned", "target"), places, strict=True):
        assert report["models"][role]["fingerprint"] == open_checkpoint(place).fingerprint()


# --- narrow dtypes ----------------------------------------------------------------------------------------------------


def larger_grid(x: Tensor) -> Tensor:
    """(1, 1 + 4, d) -> (1, 1 + 16, d), in the dtype of x."""
    grid = x[:, 1:].transpose(1, 2).unflatten(2, (2, 2))
    wide = functional.interpolate(grid, size=(4, 4), mode="bicubic").flatten(2).transpose(1, 2)
    return torch.cat([x[:, :1], wide], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_changed_is_resized_before_it_is_rounded(tmp_path: Path, dtype: torch.dtype) -> None:
    """In a narrow dtype: of resized positions, patches and unknown tokens the difference is exact to float32."""
    source = vit(0)
    pair = [one.to(dtype) for one in (source, fine_tuned(source, size=0.02))]
    target = vit(1, image_size=16)
    result = transfuse.port(*(save(one, tmp_path / str(i)) for i, one in enumerate((*pair, target))), method="naive")
    name = "vit.embeddings.position_embeddings"
    old, new = (state_of(one)[name].double() for one in pair)
    found = result.tensor(name) - state_of(target)[name]
    assert found.dtype == torch.float64
    wanted = larger_grid(new - old)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()

    target = vit(1, patch_size=2)  # of as many patches again: 2 x 2 pixels in place of 4 x 4
    result = transfuse.port(tmp_path / "0", tmp_path / "1", save(target, tmp_path / "finer"), method="naive")
    name = "vit.embeddings.patch_embeddings.projection.weight"
    old, new = (state_of(one)[name].double() for one in pair)
    line = functional.interpolate(torch.eye(2)[None, None], size=(4, 2), mode="bilinear", antialias=True)[0, 0].double()
    wanted = torch.einsum("ockl,kp,lq->ocpq", new - old, line, line)
    found = result.tensor(name) - state_of(target)[name]
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unknown_tokens_change_by_the_mean_in_a_narrow_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    source = bert(BertForMaskedLM, 0)
    pair = [one.to(dtype) for one in (source, fine_tuned(source, size=0.02))]
    new = [*SPECIAL, "added", *WORDS[:25]]
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((*pair, bert(BertForMaskedLM, 1)))]
    for place, tokens in zip(places, (SPECIAL + WORDS, SPECIAL + WORDS, new), strict=True):
        with_vocabulary(place, tokens)
    name = "bert.embeddings.word_embeddings.weight"
    before, after = (state_of(one)[name].double() for one in pair)
    found = (transfuse.port(*places, method="naive").tensor(name) - state_of(bert(BertForMaskedLM, 1))[name])[5]
    wanted = (after - before).mean(0)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_rounding_of_a_resized_tensor_is_no_training(tmp_path: Path) -> None:
    """Tuned in bfloat16 whose positions and patches were not trained: source, rounded likewise, is the same."""
    source = vit(0).float()
    tuned = fine_tuned(source).to(torch.bfloat16)
    kept = ("vit.embeddings.position_embeddings", "vit.embeddings.patch_embeddings.projection.weight")
    state = state_of(tuned) | {name: state_of(source)[name].to(torch.bfloat16) for name in kept}
    target = vit(1, image_size=12, patch_size=2)
    config = vit(0).config.to_dict() | {"architectures": ["ViTForImageClassification"]}
    result = transfuse.port(
        open_checkpoint(state_of(source), config=config),
        open_checkpoint(state, config=config),
        save(target, tmp_path / "target"),
        method="naive",
    )
    assert all(torch.equal(result.tensor(name), state_of(target)[name]) for name in kept)


def test_a_target_in_float64_keeps_its_precision() -> None:
    """Also where the other two are in float32: what is added to a tensor does not round it."""
    source, target = vit(0).float(), vit(1)
    states = [state_of(one) for one in (source, fine_tuned(source), target)]
    result = transfuse.port(*states, config=vit(0).config.to_dict(), method="naive")
    for name in ("vit.layernorm.weight", "classifier.weight"):
        wanted = states[2][name] + (states[1][name] - states[0][name]).double()
        torch.testing.assert_close(result.tensor(name), wanted, rtol=0, atol=1e-14)
    assert torch.equal(result.tensors.state()["vit.layernorm.weight"], result.tensor("vit.layernorm.weight"))
