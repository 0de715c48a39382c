"""T5: its layout on tasks, and tasks whose answers are texts, against plain loops over tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.nn import functional

import transfuse
from families import CASES
from tiny_data import TEXTS, bert_spec, text_data, write_texts
from transfuse.cli.common import app
from transfuse.data.tasks import TaskSpec
from transfuse.errors import InputError
from transfuse.families.binding import bind
from transfuse.families.registry import FAMILIES
from transfuse.maps.algebra import PerHead
from transfuse.models.opening import open_models
from transfuse.porting.planted import plant
from transfuse.running.inputs import prepare
from transfuse.running.live import LiveModel, load_live, module_params
from transfuse.running.scores import class_logits, evaluate, loss_of, score_dict
from transfuse.running.written import written_texts
from transfuse.study.initial import InitSpec, TokenizerSpec
from transfuse.study.train import TrainSpec, initialise, train, train_spec

TARGETS = ["a very good film", "poor"]
SMALL: dict[str, Any] = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 16, "d_kv": 6, "d_ff": 24,
    "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8,
}  # fmt: skip


def t5_spec(folder: Path, seed: int = 0) -> InitSpec:
    tokenizer = TokenizerSpec(vocab_size=100, data=[text_data(folder / "texts")], texts=TARGETS)
    return InitSpec(config=SMALL, seed=seed, tokenizer=tokenizer)


def text_task(folder: Path, **changes: Any) -> TaskSpec:
    return TaskSpec(kind="seq2seq", data=text_data(folder / "texts"), max_length=12, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set `texts`, and the models `t5` and `bert`."""
    place = tmp_path_factory.mktemp("seq2seq")
    write_texts(place / "texts")
    initialise(t5_spec(place), place / "t5")
    initialise(bert_spec(text_data(place / "texts")), place / "bert")
    return place


@pytest.fixture
def live(folder: Path) -> LiveModel:
    return load_live(folder / "t5", dtype=torch.float64)


def model_of(live: LiveModel) -> Any:
    """Its class says too little of itself for a type checker."""
    return live.model


def tokens_of(live: LiveModel, text: str) -> torch.Tensor:
    return torch.tensor([live.tokenizer(text)["input_ids"]])


# --- inputs to keep -----------------------------------------------------------------------------------------------


def test_an_encoder_with_a_decoder_writes_nothing_and_auto_draws(folder: Path, live: LiveModel) -> None:
    """Its tokenizer has a mask, but it is no masked language model."""
    assert live.tokenizer.mask_token_id is not None
    with pytest.raises(InputError, match="it is no encoder alone"):
        written_texts(live, count=2)


def test_fine_tuning_is_held_to_what_the_decoder_gives(folder: Path, tmp_path: Path) -> None:
    def moved(name: str, **keep: Any) -> float:
        spec = TrainSpec(task=text_task(folder), steps=6, batch_size=8, lr=3e-3, **keep)
        train(folder / "t5", spec, tmp_path / name)
        before, after = (load_file(place / "model.safetensors") for place in (folder / "t5", tmp_path / name))
        return sum(float((after[n] - x).square().sum()) for n, x in before.items() if "decoder" in n)

    kept = {"task": text_task(folder), "count": 16, "weight": 100.0}
    assert moved("kept", keep=kept) < moved("free")


# --- random models ------------------------------------------------------------------------------------------------


def test_a_t5_is_complete(folder: Path, live: LiveModel) -> None:
    config = model_of(live).config
    tokenizer = live.tokenizer
    assert config.vocab_size == len(tokenizer) and config.dropout_rate == 0
    assert config.decoder_start_token_id == config.pad_token_id == tokenizer.pad_token_id
    assert tokens_of(live, "poor").tolist() == [[tokenizer.convert_tokens_to_ids("poor"), config.eos_token_id]]
    written = model_of(live).generate(tokens_of(live, "a fine film"), max_new_tokens=3)
    assert written[0, 0] == tokenizer.pad_token_id


# --- scores -------------------------------------------------------------------------------------------------------


def log_likelihood(live: LiveModel, text: str, target: str) -> tuple[float, int]:
    """Of one text and one target, a token at a time; and how many tokens these are."""
    wanted, seen, total = tokens_of(live, target)[0], [model_of(live).config.decoder_start_token_id], 0.0
    for token in wanted.tolist():
        inputs = {"input_ids": tokens_of(live, text), "decoder_input_ids": torch.tensor([seen])}
        with torch.no_grad():
            total += float(live.model(**inputs).logits[0, -1].log_softmax(-1)[token])
        seen.append(token)
    return total, len(wanted)


@pytest.mark.parametrize("targets", [None, TARGETS], ids=["names", "targets"])
def test_scores_against_a_plain_loop(folder: Path, live: LiveModel, targets: list[str] | None) -> None:
    """The classes of the data are in alphabetical order."""
    task = text_task(folder, targets=targets, batch_size=5)
    rows = prepare(task, "test", live)
    words, names = targets or ["bad", "good"], ["bad", "good"]
    right, losses, tokens = 0, 0.0, 0
    expected = {}
    texts = [(text, names.index(name)) for name, some in TEXTS.items() for text in some]  # each is there six times
    for text, label in texts:
        found = [log_likelihood(live, text, word) for word in words]
        right += max(range(2), key=lambda one: found[one][0]) == label
        losses, tokens = losses - found[label][0], tokens + found[label][1]
        expected[text] = [one for one, _ in found]
    scores = score_dict(evaluate(live, task, rows))
    assert scores["accuracy"] == right / len(texts)
    assert scores["loss"] == pytest.approx(losses / tokens, rel=1e-9)
    for batch in rows.batches():
        found = class_logits(live, task, batch)
        given = live.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
        assert found.tolist() == [pytest.approx(expected[text], rel=1e-9) for text in given]


def test_loss_is_that_of_the_class(folder: Path, live: LiveModel) -> None:
    task = text_task(folder, targets=TARGETS)
    rows = prepare(task, "train", live)
    batch = rows.batch(torch.arange(8, 16))
    texts = live.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    wanted = live.tokenizer([TARGETS[label] for label in batch["labels"]], padding=True, return_tensors="pt")
    inputs = live.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    labels = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, -100)
    assert (labels == -100).any() and (inputs["attention_mask"] == 0).any(), "texts and targets of unequal lengths"
    expected = live.model(**inputs, labels=labels).loss
    torch.testing.assert_close(loss_of(live, task, batch), expected)


def test_loss_with_other_weights(folder: Path, tmp_path: Path, live: LiveModel) -> None:
    """As learning scales needs it: other weights in the same model, and gradients to them."""
    task = text_task(folder)
    initialise(t5_spec(folder, 5), tmp_path / "other")
    state = {name: x.double().requires_grad_() for name, x in load_file(tmp_path / "other/model.safetensors").items()}
    batch = prepare(task, "train", live).batch(torch.arange(6))
    loss = loss_of(live, task, batch, params=module_params(live, state))
    torch.testing.assert_close(loss, loss_of(load_live(tmp_path / "other", dtype=torch.float64), task, batch))
    assert not torch.equal(loss, loss_of(live, task, batch))
    loss.backward()
    assert all(x.grad is not None and x.grad.any() for x in state.values())


def test_likelihoods_can_be_differentiated(folder: Path, live: LiveModel) -> None:
    task = text_task(folder)
    batch = prepare(task, "train", live).batch(torch.arange(6))
    functional.cross_entropy(class_logits(live, task, batch), batch["labels"]).backward()
    assert all(x.grad is not None and x.grad.any() for x in live.model.parameters())


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["good"], "1 targets for 2 classes"), (["good", "Good"], "two classes have the same tokens")],
)
def test_targets_that_do_not_fit(folder: Path, live: LiveModel, targets: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(text_task(folder, targets=targets), "test", live)


def test_a_model_without_a_decoder(folder: Path) -> None:
    live, task = load_live(folder / "bert"), text_task(folder)
    with pytest.raises(InputError, match="BertForMaskedLM has no decoder that writes texts"):
        evaluate(live, task, prepare(task, "test", live))
    with pytest.raises(InputError, match="no seq2seq class for model_type 'bert'"):
        train(folder / "bert", train_spec(task=task, steps=1), folder / "no")


def test_a_model_that_does_not_say_where_its_decoder_starts(folder: Path, live: LiveModel) -> None:
    model_of(live).config.decoder_start_token_id = None
    task = text_task(folder)
    with pytest.raises(InputError, match="decoder_start_token_id has to be defined"):
        evaluate(live, task, prepare(task, "test", live))


# --- end to end ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(folder: Path) -> Path:
    """`t5` trained on the texts by the command."""
    data = f"data: {{path: {folder / 'texts'}, test: dev}}"
    (folder / "task.yaml").write_text(f"kind: seq2seq\n{data}\nmax_length: 12\ntargets: [poor, a very good film]\n")
    given = ["--task", str(folder / "task.yaml"), "--steps", "100", "--lr", "0.01", "--batch-size", "16"]
    run = CliRunner().invoke(app, ["finetune", str(folder / "t5"), *given, "-o", str(folder / "tuned"), "--json"])
    assert run.exit_code == 0, run.output
    return folder / "tuned"


def scores(model: Path) -> dict[str, float]:
    """What `transfuse eval` says."""
    given = ["eval", str(model), "--task", str(model.parent / "task.yaml"), "--json"]
    run = CliRunner().invoke(app, given)
    assert run.exit_code == 0, run.output
    return json.loads(run.stdout)["scores"]


def test_a_fine_tune_learns(folder: Path, tuned: Path) -> None:
    before, after = scores(folder / "t5"), scores(tuned)
    assert before["accuracy"] <= 0.75 and after["accuracy"] == 1
    assert after["loss"] < 0.2 < before["loss"]
    live = load_live(tuned)
    written = model_of(live).generate(tokens_of(live, "truly great work"), max_new_tokens=8)
    assert live.tokenizer.decode(written[0], skip_special_tokens=True) == "a very good film"


def test_ports_of_a_fine_tune(folder: Path, tuned: Path) -> None:
    """To a release that is the same model with its units re-ordered."""
    plant(folder / "t5", folder / "moved", tie_qkv=False, seed=3)
    for method in ("naive", "tied"):
        out = folder / f"ported-{method}"
        result = transfuse.port(folder / "t5", tuned, folder / "moved", method=method, out=out, double=True)
        assert (result.report["equivalence"] or {"passed": True})["passed"]
    expected, found = scores(tuned), scores(folder / "ported-tied")
    assert found["accuracy"] == 1 and found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert scores(folder / "ported-naive")["loss"] > 2 * expected["loss"]


# --- what T5 has that no other family has -------------------------------------------------------------------------


def test_towers_share_the_stream_and_layers_their_heads(folder: Path) -> None:
    layout = open_models(folder / "t5", folder / "t5").layout
    assert {tower: facts["layers"] for tower, facts in layout.facts.items()} == {"encoder": 3, "decoder": 2}
    assert {one for one in layout.with_ties().spaces if "stream" in one} == {"encoder.stream"}
    junctions = {one for one in layout.with_ties(streams="junction").spaces if "stream" in one}
    assert junctions == {f"encoder.stream.{j}" for j in range(7)} | {f"decoder.stream.{j}" for j in range(1, 6)}
    heads = {one.split("/")[0] for one in layout.spaces if "/" in one}
    assert heads == {"encoder.heads.0", "decoder.heads.0", *(f"decoder.heads.{layer}.cross" for layer in range(2))}


def test_heads_of_a_stack_are_matched_as_one(folder: Path) -> None:
    plant(folder / "t5", folder / "planted", tie_qkv=False, seed=5)
    found = transfuse.match(folder / "t5", folder / "planted", method="orthogonal", null_trials=0).spaces
    for group in ("encoder.heads.0", "decoder.heads.0"):
        orders = {tuple(one.heads.index.tolist()) for name, one in found.items() if name.startswith(f"{group}/")}  # type: ignore[union-attr]
        assert len(orders) == 1
        bias = found[f"{group}/bias.0"]
        assert isinstance(bias, PerHead) and bias.flat() is not None, "position biases have no signs to change"


def test_a_head_of_its_own_is_evidence(folder: Path, tmp_path: Path) -> None:
    """Of a T5 v1.1; newer versions of transformers write that its embeddings are tied."""
    case = next(case for case in CASES if case.name == "T5ForConditionalGeneration-v1.1")
    case.source.save(tmp_path / "model", 0)
    assert case.config(tmp_path / "model")["tie_word_embeddings"]
    assert "lm_head.weight" in open_models(tmp_path / "model", tmp_path / "model").shared()


def test_names_of_old_checkpoints(folder: Path) -> None:
    """They hold the one table four times, and a tensor that nothing reads."""
    state = load_file(folder / "t5" / "model.safetensors")
    table, config = state["shared.weight"], json.loads((folder / "t5" / "config.json").read_text())
    copies = {f"{one}.weight": table.clone() for one in ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens")}
    unread = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(8, 4)}
    maps = transfuse.match({**state, **copies, **unread}, state, config=config, null_trials=0)
    assert maps.is_identity
    shapes = {name: tuple(x.shape) for name, x in (copies | state).items()}
    layout = bind(FAMILIES["t5"], shapes, config).with_ties()
    assert {next(iter(layout.params[name].spaces - {"encoder.vocab"})) for name in copies} == {"encoder.stream"}
