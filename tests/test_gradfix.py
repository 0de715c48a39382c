"""GradFix: votes of single examples' gradients, masks made of them, which examples vote, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor
from torch.nn import functional
from transformers import BertForMaskedLM, BertForSequenceClassification, CLIPModel, ViTModel

import digits
import tiny
from tiny_data import bert_spec, plain_data, write_texts
from transfuse import InputError, TransfuseError, port
from transfuse.cli.common import app
from transfuse.data.splits import load_split
from transfuse.data.tasks import TaskSpec
from transfuse.files.opening import open_checkpoint
from transfuse.maps.random import tensor_generator
from transfuse.options.studies import Mask
from transfuse.running.inputs import Prepared, prepare
from transfuse.running.live import LiveModel, load_live, with_state
from transfuse.running.scores import evaluate, score_dict
from transfuse.study.gradfix import fold_positions, mask_task_vector, refine, validated_alpha
from transfuse.study.initial import initialise
from transfuse.study.masks import MaskRule, mask_of, masked, vote_signs
from transfuse.study.selection import SELECTIONS, Shots, choose_shots, coreset, herding, k_medoid, pooled_features
from transfuse.study.votes import Tally, tally
from transfuse.update.live import live_of
from transfuse.update.objects import Dense, Masked
from transfuse.update.ported import Ported

CLASSES = ("a", "b", "c")
TINY = 1e-6  # of a tensor's largest gradient: CLIP's plain attention has its softmax in float32 whatever the weights


class Rows:
    """Made-up rows, with three labels in turn."""

    def __init__(self, count: int, **tensors: Tensor):
        self.tensors = {**tensors, "labels": torch.arange(count) % 3}

    def __len__(self) -> int:
        return len(self.tensors["labels"])

    def read(self, index: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        return {name: one[index] for name, one in self.tensors.items()}


class Setting:
    """A fine-tune on a target (naive), in float64, and seven examples."""

    def __init__(self, folder: Path, models: tuple[tiny.Model, ...], kind: str, rows: Rows, **extra: Tensor):
        places = [folder / name for name in ("source", "tuned", "target")]
        for model, place in zip(models, places, strict=True):
            tiny.save(model, place)
        result = port(*places, method="naive", null_trials=0)
        self.ported: Ported = result.tensors.held()
        self.live: LiveModel = live_of(self.ported, self.ported.at(0.0).state(), dtype=torch.float64)
        self.task = TaskSpec.model_validate({"kind": kind, "data": {"path": "none", "classes": list(CLASSES)}})
        self.rows = Prepared(rows, torch.arange(len(rows)), CLASSES, len(rows), extra)
        self.names = tuple(out for out in self.ported.added if self.ported.change(out).any())

    @property
    def shots(self) -> Shots:
        labels = torch.arange(len(self.rows)) % 3
        groups = {name: (labels == number).nonzero().flatten() for number, name in enumerate(CLASSES)}
        return Shots(self.rows, groups, {name: group.tolist() for name, group in groups.items()})

    def votes(self, **options: Any) -> Tally:
        return tally(self.live, self.task, self.rows, self.names, **options)

    def loss(self, state: dict[str, Tensor]) -> float:
        return score_dict(evaluate(with_state(self.live, state), self.task, self.rows))["loss"]


def clip_setting(folder: Path, *, text_moves: bool) -> Setting:
    base = tiny.clip(CLIPModel)
    tuned = tiny.fine_tuned(base, size=0.1)
    for name, one in tuned.named_parameters():
        if name == "logit_scale":  # one number has no spread to scale noise by
            one.data.copy_(base.logit_scale.data + 0.1)
        elif name.startswith("text_") and not text_moves:
            one.data.copy_(base.get_parameter(name))
    pixels = torch.randn(7, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2], [1, 9, 10, 2]])
    extra = {"prompt_input_ids": ids, "prompt_attention_mask": torch.ones_like(ids)}
    rows = Rows(7, pixel_values=pixels)
    models = (base, tuned, tiny.clip(CLIPModel, seed=7))
    return Setting(folder, models, "zero-shot-image-classification", rows, **extra)


def bert_setting(folder: Path) -> Setting:
    labels = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    base, target = (tiny.bert(BertForSequenceClassification, seed, **labels) for seed in (0, 7))
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(6) < torch.randint(2, 7, (7, 1), generator=generator)).long()
    ids = torch.randint(5, 30, (7, 6), generator=generator) * mask
    rows = Rows(7, input_ids=ids, attention_mask=mask)
    return Setting(folder, (base, tiny.fine_tuned(base, size=0.1), target), "text-classification", rows)


@pytest.fixture(scope="module", params=["clip", "clip-both", "bert"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bert":
        return bert_setting(folder)
    return clip_setting(folder, text_moves=request.param == "clip-both")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return clip_setting(tmp_path_factory.mktemp("clip"), text_moves=False)


# --- votes ------------------------------------------------------------------------------------------------------------


def logits_of(setting: Setting, model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the class gives, written out."""
    if setting.task.kind == "text-classification":
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    prompts = {name.removeprefix("prompt_"): x for name, x in setting.rows.extra.items()}
    return model(pixel_values=batch["pixel_values"], **prompts).logits_per_image


def plain_gradients(setting: Setting) -> list[dict[str, Tensor]]:
    """One backward an example, by output name."""
    model: Any = with_state(setting.live, setting.ported.at(0.0).state()).model
    found: list[dict[str, Tensor]] = []
    for i in range(len(setting.rows)):
        model.zero_grad(set_to_none=True)
        batch = setting.rows.batch(torch.tensor([i]))
        functional.cross_entropy(logits_of(setting, model, batch), batch["labels"]).backward()
        own = {out: model.get_parameter(name).grad for name, out in setting.live.stored_names.items()}
        found.append({out: torch.zeros(()) if own[out] is None else own[out].clone() for out in setting.names})
    return found


def test_votes_are_those_of_a_plain_loop(setting: Setting) -> None:
    found, plain = setting.votes(), plain_gradients(setting)
    assert found.how == ("loop" if setting.task.kind == "text-classification" else "vmap") and found.count == 7
    assert set(found.votes) == set(setting.names) and all(one.dtype == torch.int32 for one in found.votes.values())
    checked = 0
    for out in setting.names:
        gradients = torch.stack([one[out].expand(setting.live.shapes[out]) for one in plain])
        scale = max(gradients.abs().max().item(), 1e-2)  # the bias of attention keys has no gradient but rounding
        clear = (gradients.abs() > TINY * scale).all(0)
        torch.testing.assert_close(found.sums[out], gradients.sum(0), rtol=TINY, atol=TINY * scale)
        assert torch.equal(found.votes[out][clear], (-gradients).sign().sum(0).int()[clear])
        tau = setting.ported.change(out)
        majority = (-gradients).sign().sum(0).sign() == tau.sign()
        mean = (-gradients.sum(0)).sign() == tau.sign()
        sure = clear & (gradients.sum(0).abs() > TINY * scale)
        for vote, kept in (("majority", majority), ("mean", mean)):
            made = left(found, out, tau, MaskRule(vote=vote, ties="drop"), name=out)
            assert torch.equal(made[sure], (tau * kept)[sure])
        checked += int(sure.sum())
    assert checked > 2000


@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_size_of_micro_batches_changes_nothing(clip: Setting, size: int) -> None:
    one, other = clip.votes(), clip.votes(micro_batch=size)
    for out in clip.names:
        torch.testing.assert_close(one.sums[out], other.sums[out], rtol=1e-9, atol=1e-12)
        if one.sums[out].abs().max() > 1e-9:
            assert torch.equal(one.votes[out], other.votes[out]), out


def test_tallies_add_up(clip: Setting) -> None:
    whole = clip.votes()
    parts = [votes_of(clip, torch.arange(7)[start::2]) for start in (0, 1)]
    added = parts[0] + parts[1]
    assert added.count == 7
    for out in clip.names:
        torch.testing.assert_close(whole.sums[out], added.sums[out], rtol=1e-9, atol=1e-12)


def votes_of(setting: Setting, index: Tensor) -> Tally:
    return tally(setting.live, setting.task, setting.rows.select(index), setting.names)


def test_gradients_leave_the_model_alone(setting: Setting) -> None:
    before = {name: x.clone() for name, x in setting.live.model.state_dict().items()}
    config: Any = setting.live.model.config
    attention = config._attn_implementation
    one, two = setting.votes(), setting.votes()
    assert all(
        torch.equal(x, two.sums[out]) and torch.equal(one.votes[out], two.votes[out]) for out, x in one.sums.items()
    )
    assert all(torch.equal(x, before[name]) for name, x in setting.live.model.state_dict().items())
    assert all(p.grad is None for p in setting.live.model.parameters())
    assert config._attn_implementation == attention


def test_gradients_that_are_not_finite(clip: Setting) -> None:
    broken = replace(clip.rows, source=Rows(7, pixel_values=torch.full((7, 3, 8, 8), torch.nan, dtype=torch.float64)))
    with pytest.raises(TransfuseError, match="is not finite"):
        tally(clip.live, clip.task, broken, clip.names)
    with pytest.raises(InputError, match="at least one"):
        clip.votes(micro_batch=0)


# --- masks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_up() -> tuple[Tally, Tensor]:
    """Votes of four examples on a thousand entries, some tied, some silent; a task vector with zeros in it."""
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(4, 1000, generator=generator).double()
    gradients[:, :50] = 0
    tau = torch.randn(1000, generator=generator).double()
    tau[40:100] = 0
    return Tally({"w": (-gradients).sign().sum(0).int()}, {"w": gradients.sum(0)}, 4, "vmap"), tau


def left(found: Tally, out: str, tau: Tensor, rule: MaskRule, *, name: str, truth: Tensor | None = None) -> Tensor:
    """What a mask leaves of one tensor."""
    mask = mask_of(found, out, tau, rule, name=name, truth=truth)
    return Masked(Dense({"w": tau}), {"w": mask}).of("w")


def made(made_up: tuple[Tally, Tensor], truth: Tensor | None = None, **rule: Any) -> Tensor:
    return left(made_up[0], "w", made_up[1], MaskRule(**rule), name="w", truth=truth)


def test_rules_for_ties(made_up: tuple[Tally, Tensor]) -> None:
    found, tau = made_up
    votes, mean = found.votes["w"].sign(), -found.sums["w"].sign()
    tied = votes == 0
    assert 0.2 < tied.double().mean() < 0.6
    signs = {ties: vote_signs(found, "w", tau, MaskRule(ties=ties)) for ties in ("mean", "drop", "keep")}
    for one in signs.values():
        assert torch.equal(one[~tied], votes[~tied].double())
    assert not signs["drop"][tied].any()
    assert torch.equal(signs["mean"][tied], mean[tied])
    assert torch.equal(signs["keep"][tied], tau.sign()[tied])
    kept = {ties: made(made_up, ties=ties) for ties in signs}
    assert not kept["drop"][tied].any() and torch.equal(kept["keep"][tied], tau[tied])
    assert not kept["mean"][:50].any(), "no gradient at all: nothing says that it helps"
    counts = [int((kept[ties] != 0).sum()) for ties in ("drop", "mean", "keep")]
    assert counts == sorted(counts) and len(set(counts)) == 3
    assert torch.equal(vote_signs(found, "w", tau, MaskRule(vote="mean")), mean)


def test_of_two_examples_the_mean_settles_all_ties() -> None:
    gradients = torch.randn(2, 4000, generator=torch.Generator().manual_seed(1)).double()
    found = Tally({"w": (-gradients).sign().sum(0).int()}, {"w": gradients.sum(0)}, 2, "vmap")
    tau = torch.randn(4000, generator=torch.Generator().manual_seed(2)).double()
    shares = {
        ties: (left(found, "w", tau, MaskRule(ties=ties), name="w") != 0).double().mean() for ties in ("drop", "mean")
    }
    assert shares["drop"] == pytest.approx(0.25, abs=0.03) and shares["mean"] == pytest.approx(0.5, abs=0.03)
    by_vote = [vote_signs(found, "w", tau, MaskRule(vote=vote)) for vote in ("majority", "mean")]
    assert torch.equal(*by_vote)


def test_the_mask_descends_and_force_descends_more(made_up: tuple[Tally, Tensor]) -> None:
    found, tau = made_up
    slopes = {mode: (found.sums["w"] * made(made_up, mode=mode, vote="mean")).sum() for mode in ("normal", "force")}
    assert slopes["force"] < slopes["normal"] < 0
    kept, forced = made(made_up, vote="mean"), made(made_up, mode="force", vote="mean")
    assert torch.equal(kept[kept != 0], tau[kept != 0])
    moved = found.sums["w"] != 0
    assert torch.equal(forced.abs()[moved], tau.abs()[moved]) and not forced[~moved].any()
    agreeing = forced.sign() == tau.sign()
    assert torch.equal(forced * agreeing, kept), "what agrees is the same in both"


def test_soft_weights(made_up: tuple[Tally, Tensor]) -> None:
    found, tau = made_up
    margin = tau.sign() * found.votes["w"] / 4
    share = (1 + margin) / 2
    torch.testing.assert_close(made(made_up, mode="soft-share", power=3.0), tau * share**3)
    torch.testing.assert_close(made(made_up, mode="soft-sigmoid", temperature=0.5), tau * torch.sigmoid(margin / 0.5))
    sharp, hard = made(made_up, mode="soft-sigmoid", temperature=1e-6), made(made_up, ties="drop")
    untied = found.votes["w"] != 0
    torch.testing.assert_close(sharp[untied], hard[untied])
    torch.testing.assert_close(sharp[~untied], tau[~untied] / 2)
    alone = Tally({"w": found.votes["w"].sign()}, found.sums, 1, "vmap")
    unanimous = left(alone, "w", tau, MaskRule(mode="soft-share"), name="w")
    torch.testing.assert_close(unanimous[untied], hard[untied])  # of one example it is the mask


def test_the_random_mask_has_the_density_and_a_seed(made_up: tuple[Tally, Tensor]) -> None:
    _, tau = made_up
    normal, one, two = made(made_up), made(made_up, mode="random", seed=1), made(made_up, mode="random", seed=2)
    assert len({int((x != 0).sum()) for x in (normal, one, two)}) == 1
    assert torch.equal(one, made(made_up, mode="random", seed=1)) and not torch.equal(one, two)
    assert torch.equal(one[one != 0], tau[one != 0]) and not torch.equal(one, normal)
    other = left(made_up[0], "w", tau, MaskRule(mode="random", seed=1), name="other")
    assert not torch.equal(one, other), "every tensor draws by its own name"
    order = torch.randperm(int((tau != 0).sum()), generator=tensor_generator(1, "w"))
    places = (tau != 0).nonzero().flatten()[order[: int((normal != 0).sum())]]
    assert set(places.tolist()) == set((one != 0).nonzero().flatten().tolist())


def test_the_oracle_knows_the_signs(made_up: tuple[Tally, Tensor]) -> None:
    tau = made_up[1]
    truth = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    assert torch.equal(made(made_up, truth, mode="oracle"), tau * (truth.sign() == tau.sign()))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"vote": "max"}, "vote is 'max'"),
        ({"ties": "toss"}, "ties is 'toss'"),
        ({"mode": "soft"}, "mode is 'soft'"),
        ({"power": 0.0}, "power is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"mode": "soft-share", "vote": "mean"}, "votes of single examples"),
    ],
)
def test_refused_rules(rule: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MaskRule(**rule)


# --- a masked task vector ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vote", ["majority", "mean"])
def test_the_loss_falls_at_first_order(setting: Setting, vote: str) -> None:
    alpha = 1e-4
    how = Mask(per_class=8, vote=vote, alpha=alpha)
    found = mask_task_vector(setting.live, setting.ported, setting.task, setting.shots, how)
    mask = found.report["mask"]
    assert found.report["after"] < found.report["before"] == pytest.approx(setting.loss(setting.ported.at(0.0).state()))
    assert (found.report["after"] - found.report["before"]) / alpha == pytest.approx(mask["slope"], rel=0.02)
    whole = (setting.loss(setting.ported.at(alpha).state()) - found.report["before"]) / alpha
    assert whole == pytest.approx(mask["whole_slope"], rel=0.02, abs=1e-3)
    assert mask["slope"] < min(0.0, mask["whole_slope"])


def test_the_report_counts_what_is_there(setting: Setting) -> None:
    found = mask_task_vector(setting.live, setting.ported, setting.task, setting.shots, Mask(per_class=8, alpha=0.5))
    mask, votes = found.report["mask"], setting.votes()
    tau = torch.cat([setting.ported.change(out).flatten() for out in setting.names])
    left = torch.cat([found.ported.change(out).flatten() for out in setting.names])
    cast = torch.cat([votes.votes[out].flatten() for out in setting.names])
    moving = tau != 0
    assert mask["entries"] == int(moving.sum()) == sum(one["entries"] for one in mask["parts"].values())
    assert mask["density"] == pytest.approx((left != 0)[moving].double().mean().item())
    assert mask["ties"] == pytest.approx((cast == 0)[moving].double().mean().item())
    assert 0 <= mask["silent"] <= mask["ties"]
    decided = moving & (cast != 0)
    assert mask["agreement"] == pytest.approx((cast.sign() == tau.sign())[decided].double().mean().item())
    assert set(mask["tensors"]) == {setting.ported.added[out] for out in setting.names}
    assert found.ported.alpha == 0.5 and found.report["validation"] is None
    fixed, state = setting.ported.steps.keys() - setting.ported.added.keys(), found.ported.state()
    assert all(torch.equal(state[out], setting.ported.read(out)) for out in fixed)


def test_a_zero_task_vector_is_refused(clip: Setting) -> None:
    still = clip.ported.with_update(clip.ported.update.scaled(0.0))
    with pytest.raises(InputError, match="task vector is zero"):
        mask_task_vector(clip.live, still, clip.task, clip.shots, Mask(per_class=2))


# --- alpha ------------------------------------------------------------------------------------------------------------


def test_folds_share_out_every_class(clip: Setting) -> None:
    folds = fold_positions(clip.shots, 4)  # the smallest class has two
    assert [fold.tolist() for fold in folds] == [[0, 1, 2, 6], [3, 4, 5]]
    with pytest.raises(InputError, match="1 examples of a class"):
        fold_positions(Shots(clip.rows, {"a": torch.tensor([0])}, {}), 4)


def test_alpha_is_validated_on_examples_that_did_not_vote(clip: Setting) -> None:
    how = Mask(per_class=2, alpha="cv", alphas=(0.1, 1.0))
    found = mask_task_vector(clip.live, clip.ported, clip.task, clip.shots, how)
    checked = found.report["validation"]
    assert checked["alphas"] == [0.0, 0.1, 1.0] and checked["folds"] == 2
    assert found.ported.alpha == checked["alphas"][min(range(3), key=lambda i: checked["losses"][i])]
    folds = fold_positions(clip.shots, 4)
    for i, alpha in enumerate(checked["alphas"]):
        total = 0.0
        for held, voting in ((folds[0], folds[1]), (folds[1], folds[0])):
            kept = masked(clip.ported, votes_of(clip, voting), MaskRule())
            model = with_state(clip.live, kept.at(alpha).state())
            total += len(held) * score_dict(evaluate(model, clip.task, clip.rows.select(held)))["loss"]
        assert checked["losses"][i] == pytest.approx(total / 7, abs=1e-9)
    whole = masked(clip.ported, clip.votes(), MaskRule())
    agree = [torch.equal(whole.change(out), found.ported.change(out)) for out in clip.names]
    assert sum(agree) > 0.9 * len(agree), "the mask itself is that of all examples, but for rounding"


def test_alpha_can_be_zero(clip: Setting) -> None:
    harmful = clip.ported.with_update(clip.ported.update.scaled(100.0))
    votes = [(clip.rows.select(index), votes_of(clip, index)) for index in fold_positions(clip.shots, 2)]
    alpha, _ = validated_alpha(clip.live, harmful, clip.task, votes, MaskRule(), [0.5, 1.0])
    assert alpha == 0.0


# --- which examples ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def points() -> Tensor:
    return torch.randn(40, 3, generator=torch.Generator().manual_seed(4)).double()


def test_herding_follows_the_mean(points: Tensor) -> None:
    chosen: list[int] = []
    for _ in range(6):
        rest = [i for i in range(40) if i not in chosen]
        chosen.append(min(rest, key=lambda i: (points[[*chosen, i]].mean(0) - points.mean(0)).norm().item()))
    assert herding(points, 6).tolist() == chosen


def test_coreset_goes_where_it_is_farthest(points: Tensor) -> None:
    chosen = [min(range(40), key=lambda i: (points[i] - points.mean(0)).norm().item())]
    while len(chosen) < 6:
        chosen.append(max(range(40), key=lambda i: min((points[i] - points[j]).norm().item() for j in chosen)))
    assert coreset(points, 6).tolist() == chosen

    def radius(index: list[int]) -> float:
        return torch.cdist(points, points[index]).min(1).values.max().item()

    others = (torch.randperm(40, generator=torch.Generator().manual_seed(s))[:6].tolist() for s in range(20))
    assert radius(chosen) < min(radius(index) for index in others), "it covers, which the authors' code does not"


def cost(points: Tensor, medoids: list[int]) -> float:
    return sum(min((x - points[j]).norm().item() for j in medoids) for x in points)


def plain_k_medoid(points: Tensor, k: int) -> list[int]:
    found: list[int] = []
    for _ in range(k):
        found.append(min((i for i in range(len(points)) if i not in found), key=lambda i: cost(points, [*found, i])))
    while True:
        groups: list[list[int]] = [[] for _ in found]
        for i, x in enumerate(points):
            groups[min(range(k), key=lambda g: (x - points[found[g]]).norm().item())].append(i)
        better = [min(group, key=lambda i: cost(points[group], [group.index(i)])) for group in groups]
        if better == found:
            return found
        found = better


@pytest.mark.parametrize("k", [1, 3, 6])
def test_medoids(points: Tensor, k: int) -> None:
    found = k_medoid(points, k).tolist()
    assert found == plain_k_medoid(points, k)
    others = (torch.randperm(40, generator=torch.Generator().manual_seed(s))[:k].tolist() for s in range(20))
    assert cost(points, found) <= min(cost(points, index) for index in others)


@pytest.mark.parametrize("name", list(SELECTIONS))
def test_equal_examples_are_still_chosen_once_each(name: str) -> None:
    for points in (torch.ones(5, 2).double(), torch.tensor([[0.0], [0.0], [1.0], [1.0], [1.0]]).double()):
        for k in range(1, 6):
            assert len(set(SELECTIONS[name](points, k).tolist())) == k


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits, a reader of them, a re-ordered target and its own fine-tune; the bodies of both bases; a task file."""
    place = tmp_path_factory.mktemp("gradfix")
    digits.write_data(place / "data")
    source = digits.trained(digits.vit(), 25)
    digits.save(source, place / "source")
    digits.save(digits.trained(source, 60, seed=1), place / "tuned")
    target = tiny.planted(source, 3, noise=0.05)[0]
    digits.save(target, place / "target")
    digits.save(digits.trained(target, 60, seed=2), place / "true")
    for name, model in (("source", source), ("target", target)):
        body = ViTModel(model.config, add_pooling_layer=False)
        body.load_state_dict(model.vit.state_dict())
        digits.save(body, place / f"{name}-body")
    about = {"kind": "image-classification", "data": {"path": "nowhere/digits", "local": "data"}}
    (place / "task.yaml").write_text(json.dumps(about))
    return place


@pytest.fixture(scope="module")
def task(folder: Path) -> TaskSpec:
    return digits.task(folder / "data")


@pytest.fixture(scope="module")
def target(folder: Path) -> LiveModel:
    return load_live(folder / "target")


@pytest.mark.parametrize("select", ["random", *SELECTIONS])
def test_so_many_of_each_class(task: TaskSpec, target: LiveModel, select: str) -> None:
    shots = choose_shots(task, target, 3, select=select, pool=300, seed=5)
    labels = torch.cat([batch["labels"] for batch in shots.rows.batches()])
    assert len(shots.rows) == 30 and set(shots.groups) == {str(i) for i in range(10)}
    rows = load_split(task.data, "train", limit=300, seed=5)
    for number, (name, group) in enumerate(shots.groups.items()):
        assert labels[group].tolist() == [number] * 3
        assert [rows[i]["label"] for i in shots.numbers[name]] == [number] * 3
    again = choose_shots(task, target, 3, select=select, pool=300, seed=5)
    assert again.numbers == shots.numbers
    other = choose_shots(task, target, 3, select=select, pool=300, seed=6)
    assert other.numbers != shots.numbers, "the pool and random draws have a seed"
    chosen = prepare(task, "train", target, shots=3, seed=5)
    if select == "random":
        plain = choose_shots(task, target, 3, seed=5)
        assert torch.equal(
            torch.cat([batch["pixel_values"] for batch in plain.rows.batches()]),
            torch.cat([batch["pixel_values"] for batch in chosen.batches()]),
        )


def test_selections_see_the_features_of_their_class(task: TaskSpec, target: LiveModel) -> None:
    rows = prepare(task, "train", target, limit=300)
    features = pooled_features(target, task, rows)
    pixels = torch.cat([batch["pixel_values"] for batch in rows.batches()])
    labels = torch.cat([batch["labels"] for batch in rows.batches()])
    model: Any = target.model
    with torch.no_grad():
        plain = functional.normalize(model.vit(pixel_values=pixels).last_hidden_state[:, 0], dim=-1)
    torch.testing.assert_close(features, plain.double(), atol=1e-5, rtol=0)
    shots = choose_shots(task, target, 2, select="coreset", pool=300)
    for number, chosen in enumerate(shots.numbers.values()):
        own = (labels == number).nonzero().flatten()
        assert chosen == sorted(own[coreset(features[own], 2)].tolist())


def test_features_of_clip_and_of_language_models(clip: Setting, tmp_path: Path) -> None:
    model: Any = clip.live.model
    with torch.no_grad():
        plain = model(pixel_values=clip.rows.source.read(torch.arange(7), None)["pixel_values"], **{
            name.removeprefix("prompt_"): x for name, x in clip.rows.extra.items()
        }).image_embeds  # fmt: skip
    torch.testing.assert_close(pooled_features(clip.live, clip.task, clip.rows), plain)
    texts = write_texts(tmp_path / "texts")
    initialise(bert_spec(plain_data(texts)), tmp_path / "bert")
    task = TaskSpec(kind="masked-lm", data=plain_data(texts), max_length=12)
    live = load_live(tmp_path / "bert")
    shots = choose_shots(task, live, 4, select="herding")
    assert len(shots.rows) == 4 and list(shots.groups) == ["blocks"]
    assert isinstance(live.model, BertForMaskedLM)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_class": 0}, "0 examples"),
        ({"select": "medoid"}, "'medoid'"),
        ({"per_class": 500}, "data.*class '0' has only"),
        ({"per_class": 500, "select": "herding"}, "data.*class '0' has only"),
    ],
)
def test_refused_selections(task: TaskSpec, target: LiveModel, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        choose_shots(task, target, **{"per_class": 1, **options})


# --- the whole run ----------------------------------------------------------------------------------------------------


def three(folder: Path, suffix: str = "") -> tuple[Path, Path, Path]:
    return folder / f"source{suffix}", folder / "tuned", folder / f"target{suffix}"


def test_refine_writes_what_it_found(folder: Path, task: TaskSpec, tmp_path: Path) -> None:
    options: dict[str, Any] = {"per_class": 3, "null_trials": 0, "limit": 80, "alpha": 0.05, "seed": 4}
    result = refine(*three(folder), task, out=tmp_path / "one", **options)
    again = refine(*three(folder), task, out=tmp_path / "two", **options)
    assert again.report["refine"] == result.report["refine"]
    for name in ("model.safetensors", "result.json", "README.md", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    found = result.report["refine"]
    assert found == json.loads((tmp_path / "one" / "result.json").read_text())["refine"]
    assert found["examples"] == 30 and found["gradients"] == "vmap" and found["alpha"] == 0.05
    assert set(found["test"]) == {"zero-shot", "alpha-1", "refined"} and len(found["selected"]["7"]) == 3
    assert "masked by the gradients of 30 examples" in (tmp_path / "one" / "README.md").read_text()
    written, old = open_checkpoint(tmp_path / "one"), open_checkpoint(folder / "target")
    update_of = port(*three(folder), null_trials=0).tensors.change
    moved = kept = 0
    for name in old:
        update = update_of(name)
        change = (written.tensor(name) - old.tensor(name)).double()
        zero = change == 0
        torch.testing.assert_close(change[~zero], 0.05 * update[~zero].double(), rtol=0, atol=1e-7)
        moved, kept = moved + update.numel(), kept + int((~zero).sum())
    assert kept / moved == pytest.approx(found["mask"]["density"], abs=0.02)
    scored = score_dict(
        evaluate(
            load_live(tmp_path / "one"), task, prepare(task, "test", load_live(tmp_path / "one"), limit=80, seed=4)
        )
    )
    assert scored == pytest.approx(found["test"]["refined"], abs=1e-5)


def test_a_carried_head_comes_along_untouched(folder: Path, task: TaskSpec) -> None:
    options: dict[str, Any] = {"null_trials": 0, "limit": 80}
    whole = port(*three(folder, "-body"), null_trials=0)
    result = refine(*three(folder, "-body"), task, per_class=2, alpha=0.05, **options)
    assert set(whole.report["carried"]) == {"classifier.weight", "classifier.bias"}
    for name in whole.report["carried"]:
        assert torch.equal(result.tensor(name), whole.tensor(name))
    assert not any(name.startswith("classifier") for name in result.report["refine"]["mask"]["tensors"])
    held = whole.tensors.held()
    start = live_of(held, held.at(0.0).state())
    assert not torch.equal(held.read("classifier.weight"), held.zero_shot()["classifier.weight"])
    shots = prepare(task, "train", start, shots=2)
    found = result.report["refine"]
    assert found["before"] == pytest.approx(score_dict(evaluate(start, task, shots))["loss"], abs=1e-6)
    assert found["after"] < found["before"]
    kept = masked(held, tally(start, task, shots, tuple(held.added)), MaskRule())
    for name, one in kept.at(0.05).state().items():
        assert torch.equal(result.tensor(name), one), "the gradients are those under the head that is written"


def test_the_oracle_is_the_targets_own_fine_tune(folder: Path, task: TaskSpec) -> None:
    options: dict[str, Any] = {"per_class": 2, "null_trials": 0, "limit": 80, "method": "naive", "mode": "oracle"}
    result = refine(*three(folder), task, oracle=folder / "true", **options)
    whole = port(*three(folder), method="naive", null_trials=0).tensors
    own, true = open_checkpoint(folder / "target"), open_checkpoint(folder / "true")
    for name in whole.added:
        update = whole.change(name)
        kept = (true.tensor(name) - own.tensor(name)).sign() == update.sign()
        torch.testing.assert_close(result.tensor(name), own.tensor(name) + update * kept, rtol=0, atol=1e-7)
    assert 0.5 < result.report["refine"]["mask"]["oracle_agreement"] < 1, "gradients say more than chance"
    for oracle, message in ((None, "needs the target's own"), (folder / "target", "has the weights of the target")):
        with pytest.raises(InputError, match=message):
            refine(*three(folder), task, oracle=oracle, **options)
    with pytest.raises(InputError, match="no other mode takes one"):
        refine(*three(folder), task, oracle=folder / "true", **{**options, "mode": "normal"})


@pytest.mark.parametrize("kind", ["masked-lm", "text-classification"])
def test_texts(kind: Any, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    data = (
        plain_data(texts)
        if kind == "masked-lm"
        else plain_data(texts).model_copy(update={"train": "train", "test": "dev"})
    )
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    name = "BertForMaskedLM" if kind == "masked-lm" else "BertForSequenceClassification"
    for seed, place in enumerate(("source", "tuned", "target")):
        initialise(bert_spec(plain_data(texts), seed=seed, kind=name, **labels), tmp_path / place)
    task = TaskSpec(kind=kind, data=data, max_length=12)
    options: dict[str, Any] = {"method": "naive", "null_trials": 0, "verify": False}
    source, tuned, target = (tmp_path / one for one in ("source", "tuned", "target"))
    result = refine(source, tuned, target, task, per_class=2, alpha=0.01, **options)
    found = result.report["refine"]
    assert found["gradients"] == "loop" and found["examples"] == (2 if kind == "masked-lm" else 4)
    assert found["after"] < found["before"]
    assert found["mask"]["silent"] > 0, "tokens that no example has"
    assert list(found["selected"]) == (["blocks"] if kind == "masked-lm" else ["bad", "good"])


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command(folder: Path, tmp_path: Path) -> None:
    about = ("--task", folder / "task.yaml", "--data-dir", folder, "--limit", 60, "-q", "--null-trials", 0)
    options = (*about, "--per-class", 2, "--alpha", "cv", "--alphas", "0.02,0.1", "--select", "k-medoid", "--pool", 200)
    result = run("refine", *three(folder), *options, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["out"] == str(tmp_path / "out") and found["refine"]["validation"]["alphas"] == [0, 0.02, 0.1]
    assert found["refine"]["select"] == "k-medoid" and found["refine"]["pool"] == 200
    assert json.loads((tmp_path / "out" / "result.json").read_text())["refine"] == found["refine"]
    text = run("refine", *three(folder), *options).stdout
    assert "density" in text and "refined" in text and "2-fold cross-validation" in text and "output" not in text
    soft = run("refine", *three(folder), *about, "--per-class", 1, "--mode", "soft-share", "--power", 3, "--alpha", 0.1)
    assert soft.exit_code == 0 and "mask       soft-share" in soft.stdout
    shown = run("refine", "--help").stdout
    assert "transfuse refine " in shown.partition("Examples")[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--per-class", 0), "--per-class"),
        (("--per-class", 1000), "class '0' has only"),
        (("--per-class", 1, "--alpha", "cv"), "cannot be cross-validated"),
        (("--per-class", 1, "--alpha", "best"), "a number, or cv"),
        (("--per-class", 1, "--alpha", "nan"), "a finite number"),
        (("--per-class", 1, "--mode", "oracle"), "needs the target's own fine-tune"),
        (("--per-class", 1, "--mode", "oracle", "--oracle", "/nowhere"), "nowhere"),
        (("--per-class", 1, "--mode", "soft-share", "--vote", "mean"), "votes of single examples"),
        ((), "--per-class"),
    ],
)
def test_bad_use_is_2_and_leaves_nothing(
    folder: Path, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    about = ("--task", folder / "task.yaml", "--data-dir", folder, "-q", "--null-trials", 0, "--method", "naive")
    result = run("refine", *three(folder), *about, *arguments, "-o", tmp_path / "out")
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert not list(tmp_path.iterdir())


def test_inputs_are_never_replaced(folder: Path) -> None:
    before = (folder / "tuned" / "model.safetensors").read_bytes()
    about = ("--task", folder / "task.yaml", "--data-dir", folder, "-q", "--per-class", 1)
    result = run("refine", *three(folder), *about, "-o", folder / "tuned", "--force")
    assert result.exit_code == 2 and "where the tuned lies" in result.stderr
    assert (folder / "tuned" / "model.safetensors").read_bytes() == before
