"""Transport by fitting: every module of target is made to do on inputs what the tuned one does, layer after layer.

Maps between the activations of the two bases say what "the same" is: T, per space, orthogonal, heads matched whole.
Module after module, in the order of the run, its weight is the ridge regression

    min_W  sum over inputs  |W h - (T z - c)|^2  +  ridge * |W - W_target|^2

of what it should give, T z, on what it now gets, h: z is tuned's activation centred on source's and carried to
target's mean, c what a residual sum has before the module adds to it. Since h comes from the modules fitted before,
each one also makes up for what those could not do. No gradient, no label, no step size: cross-moments and one linear
solve a module. Ours; the nearest relatives are layer-wise reconstruction in compression (Frantar & Alistarh 2022,
2208.11580) and Theseus (2602.12952), whose maps are contracted with the task vector instead.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from ..evidence.activations import collect, scores_of
from ..maps.collection import Maps
from ..maps.transport import part_slices
from ..matching.procrustes import best_rotation
from ..models.plan import output_config
from ..running.given import Unlabelled
from ..running.inputs import Prepared
from ..running.instances import idle_of, let_go, probe_of
from ..running.probes import Probe, Replay, batches, mask_of, probe_of_live, rows_of
from ..running.taps import Seen, Site
from ..spaces.layout import Layout, is_embedding
from .live import live_of
from .ported import Ported
from .regression import Fit, chosen_ridge
from .transported import Fitted, Without


@dataclass(frozen=True)
class FitOptions:
    """How modules are fitted.

    Attributes:
        ridge: pull toward target's own weight, as a share of the mean square of the module's inputs; None: for each
            module the one (of `RIDGES`) by which one half of the inputs predicts the other best.
        first: weight of the first token of every input, which classifiers read, where the others count 1.
    """

    ridge: float | None = None
    first: float = 8.0


@dataclass(frozen=True)
class Teachers:
    """What a fit goes by.

    Attributes:
        source, target: the two bases, for the means of their activations.
        tuned: the model to be carried over.
        maps: between the activations of the bases (streams at every junction).
        public: site whose output users see -> matrix (target's, tuned's) that takes the one to the other; a public
            output that is not there is the same for both (logits).
        own: weights of heads that only tuned has, or has for other labels: target has nothing to say about them.
    """

    source: Probe
    target: Probe
    tuned: Probe
    maps: Maps
    public: Mapping[str, Tensor] = field(default_factory=dict)
    own: Collection[str] = ()


def fit(
    student: Probe,
    teachers: Teachers,
    form: Layout,
    inputs: Unlabelled,
    options: FitOptions,
    *,
    after_bases: Callable[[], None] = lambda: None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Fits the linear modules of a model, one after the other.

    Args:
        student: starts as target, in the class of the output; it is changed.
        teachers: what it is to do.
        form: the layout of the maps.
        inputs: unlabelled. On those to keep a module shall give what target's gives, though what it gets has changed.
        options: see there.
        after_bases: called when source is not run any more.
        progress: a bar on stderr.

    Returns:
        Canonical name -> weight or bias of every module that the inputs reach, float32 or float64, in the shape stored.

    Raises:
        InputError: the inputs to keep reach none of them.
    """
    task, keep = inputs.task, inputs.keep if inputs.keep_weight > 0 else None
    assert task is not None
    stages = [_fittable(student, teachers, form, group) for group in student.order(next(batches(task)))]
    means = _means(teachers, form, [name for stage in stages for name in stage], task)
    after_bases()

    def carried(name: str, wanted: Seen) -> Tensor:
        return _goal(student.sites[name], teachers, form, wanted, means.get(name))

    sums = [_Sums(student, teachers.tuned, task, carried, options.first)]
    if keep is not None:
        sums.append(_Sums(student, teachers.target, keep, lambda _, wanted: wanted.y, options.first, teachers.own))
    found: dict[str, Tensor] = {}
    for stage in tqdm([one for one in stages if one], desc="fitting", unit="stage", disable=not progress):
        mine, *held = (one.of(stage) for one in sums)
        for name in stage:
            halves = mine[name] if not held else _beside(mine[name], held[0][name], inputs.keep_weight)
            found |= _solved(student, student.sites[name], halves, options.ridge)
    if keep is not None and not sums[1].rows:
        raise InputError("the inputs to keep reach none of the modules that are fitted: do they go to another tower?")
    return found


Halves = tuple[Fit, Fit]


class _Sums:
    """What some inputs say about modules of the student, which is run again for every stage.

    Args:
        student, teacher: the models.
        inputs: unlabelled.
        goal: what a site is to give, from what the teacher's sees.
        first: see `FitOptions`.
        without: sites about which the teacher says nothing.
    """

    def __init__(
        self,
        student: Probe,
        teacher: Probe,
        inputs: Prepared,
        goal: Callable[[str, Seen], Tensor],
        first: float,
        without: Collection[str] = (),
    ):
        self.replays, self.inputs, self.goal, self.first = (Replay(student), Replay(teacher)), inputs, goal, first
        self.sites = {name: site for name, site in student.sites.items() if name not in without}
        self.rows = 0

    def of(self, stage: list[str]) -> dict[str, Halves]:
        """Sums for the sites of a stage, of every other input either."""
        fits, done = {name: (Fit(), Fit()) for name in stage}, 0
        for number, batch in enumerate(batches(self.inputs)):
            seen, wanted = (one.see(number, batch, [n for n in stage if n in one.probe.sites]) for one in self.replays)
            for name in (one for one in stage if one in seen and one in wanted and one in self.sites):
                self.rows += len(seen[name].x)
                mask = mask_of(batch, self.sites[name])
                _add(fits[name], seen[name], self.goal(name, wanted[name]), mask, self.first, done)
            done += len(next(iter(batch.values())))
        return fits


def _beside(task: Halves, keep: Halves, weight: float) -> Halves:
    """Both kinds of rows, those to keep weighing `weight` times as much as all of the task's."""
    if not keep[0].weight:
        return task
    share = weight * (task[0].weight + task[1].weight) / (keep[0].weight + keep[1].weight)
    return task[0] + keep[0].times(share), task[1] + keep[1].times(share)


def _fittable(student: Probe, teachers: Teachers, form: Layout, group: list[str]) -> list[str]:
    """The sites of a stage that can be fitted: tuned has them, and it is no table of tokens."""
    return [
        name
        for name in group
        if name in teachers.tuned.sites and not _is_vocabulary(form, name) and _has_goal(student, teachers, form, name)
    ]


def _has_goal(student: Probe, teachers: Teachers, form: Layout, name: str) -> bool:
    """Whether what tuned gives there can be told in target's coordinates: a map, or the same number of units."""
    mine, its = student.sites[name], teachers.tuned.sites[name]
    dim = _output_dim(form, name)
    axis = form.params[name].dims[dim]  # type: ignore[index]
    mapped = all(part.space in teachers.maps.spaces for part in axis.parts)
    return mine.widths[dim] == its.widths[dim] or mapped or name in teachers.public


def _output_dim(form: Layout, name: str) -> int:
    return next(dim for dim in range(2) if dim not in form.params[name].inputs)


def _is_vocabulary(form: Layout, name: str) -> bool:
    return any(space.split(".")[-1] == "vocab" for space in form.params[name].spaces)


def _means(teachers: Teachers, form: Layout, names: list[str], inputs: Prepared) -> dict[str, tuple[Tensor, Tensor]]:
    """Site -> mean activation of source and of target, over all tokens, where both bases have it."""
    sums: dict[str, list[Tensor]] = {}
    rows: dict[str, int] = {}
    for batch in batches(inputs, teachers.target.size_of(inputs, names)):
        seen = [probe.see(batch, names) for probe in (teachers.source, teachers.target)]
        for name in names:
            if all(name in one for one in seen):
                found = [rows_of(one[name].y, mask_of(batch, teachers.target.sites[name])) for one in seen]
                old = sums.get(name, [torch.zeros(()), torch.zeros(())])
                news = [one.sum(0, dtype=torch.float64) for one in found]
                sums[name] = [total.to(new) + new for total, new in zip(old, news, strict=True)]
                rows[name] = rows.get(name, 0) + len(found[0])
    return {name: (left / rows[name], right / rows[name]) for name, (left, right) in sums.items()}


def _goal(site: Site, teachers: Teachers, form: Layout, wanted: Seen, means: tuple[Tensor, Tensor] | None) -> Tensor:
    """What a site of target should give for what tuned gives, of the same leading dimensions."""
    z = wanted.y
    if site.name in teachers.public:
        return z @ teachers.public[site.name].to(z).T
    dim = _output_dim(form, site.name)
    axis = form.params[site.name].dims[dim]  # type: ignore[index]
    width = site.widths[dim]
    pieces, its_start = [], 0
    for part, start, length in part_slices(axis, width, {n: s.size for n, s in form.spaces.items()}):
        found = teachers.maps[part.space] if part.space else None
        its_length = length if found is None else found.source_size
        piece = z.narrow(-1, its_start, its_length)
        if found is not None:
            left, right = (None, None) if means is None else means
            piece = piece if left is None else piece - left.narrow(-1, its_start, its_length).to(z)
            piece = found.apply(piece, -1)
            piece = piece if right is None else piece + right.narrow(-1, start, length).to(z)
        pieces.append(piece)
        its_start += its_length
    return torch.cat(pieces, -1)


def _add(halves: Halves, seen: Seen, goal: Tensor, mask: Tensor | None, first: float, done: int) -> None:
    """Adds what one batch says, `done` inputs after the first: every other input to either half."""
    wanted = goal if seen.carry is None else goal - seen.carry
    weights = seen.x.new_ones(*seen.x.shape[:-1], 1)
    if weights.ndim > 2:
        weights[:, 0] = first
    for start, half in ((done % 2, halves[0]), (1 - done % 2, halves[1])):
        rows = [rows_of(x[start::2], None if mask is None else mask[start::2]) for x in (seen.x, wanted, weights)]
        half.add(rows[0], rows[1], rows[2][:, 0])


def _solved(student: Probe, site: Site, halves: Halves, ridge: float | None) -> dict[str, Tensor]:
    """Solves for one module and sets it in the student; the tensors by canonical name."""
    parameter = student.module.get_parameter(site.weight)
    scale = parameter.new_ones(1) if site.scale is None else student.module.get_parameter(site.scale).detach()
    scale = scale.double()
    prior = scale[:, None] * (parameter.T if site.transposed else parameter).detach().double()
    has_bias = site.bias is not None
    ridge = chosen_ridge(halves, prior, bias=has_bias) if ridge is None else ridge
    weight, bias = (halves[0] + halves[1]).solve(prior, ridge, bias=has_bias)
    weight, bias = weight / scale[:, None], None if bias is None else bias / scale
    found = {site.name: (weight.T if site.transposed else weight).to(parameter.dtype).contiguous()}
    if bias is not None and site.bias is not None:
        found[site.bias] = bias.to(parameter.dtype)
    with torch.no_grad():
        for name, value in found.items():
            student.module.get_parameter(student.names[name]).copy_(value)
    return {name: value.cpu() for name, value in found.items()}


# --- a port -------------------------------------------------------------------------------------------------------


def fit_port(
    ported: Ported, inputs: Unlabelled, options: FitOptions, *, device: str = "cpu", progress: bool = False
) -> Fitted:
    """The modules of a port, fitted.

    Args:
        ported: the same port by contraction; of it the embeddings that maps reach stay, and the heads to start with.
        inputs: unlabelled.
        options: see there.

    Raises:
        InputError: a model cannot be run here.
    """
    models, passage = ported.models, ported.heads.passage
    start = _unfitted(ported)
    source, target = (probe_of(models, role, device) for role in ("source", "target"))
    student, tuned = student_and_tuned(start, device)
    teachers = Teachers(source, target, tuned, replace(passage.maps, spaces=passage.spaces))
    assert inputs.task is not None
    teachers = replace(
        teachers,
        public=_public_maps(teachers, passage.layout, inputs.task),
        own=frozenset(ported.carried.values()),
    )
    found = fit(
        student,
        teachers,
        passage.layout,
        inputs,
        options,
        after_bases=lambda: let_go(models, *(("source", "target") if inputs.keep is None else ("source",))),
        progress=progress,
    )
    let_go_of_student(start, student)
    return Fitted(models.target, found, start.update)


def _unfitted(ported: Ported) -> Ported:
    """Where a fit starts: target, with embeddings and heads as maps carry them."""
    passage, models = ported.heads.passage, ported.models
    carried = (n for n in ported.update.names if is_embedding(n, passage.layout) and passage.reaches(n))
    still = frozenset(ported.update.names).difference(n for n in carried if models.source_name(n) is not None)
    return ported.with_update(Without(ported.update, still, models.target)).at(1.0)


def student_and_tuned(start: Ported, device: str) -> tuple[Probe, Probe]:
    """The output of a port as a model that runs, which may be changed, and the model that is carried over."""
    models = start.models
    assert models.tuned is not None
    state = {out: start.read(out).clone() for out in start.steps}  # the student changes, the checkpoints must not
    dtype = torch.promote_types(start.plan.dtype, torch.float32)
    live = live_of(start, state, device=device, dtype=dtype)
    return probe_of_live(live, models.layout), probe_of(models, "tuned", device)


def let_go_of_student(start: Ported, student: Probe) -> None:
    """Frees the weights of both; the student's class stays for the check of what is written."""
    _, config = output_config(start.plan, start.models)
    idle_of(start.models).give(config, student.module)
    let_go(start.models)


def _public_maps(teachers: Teachers, form: Layout, inputs: Prepared) -> dict[str, Tensor]:
    """For the joint embedding of a model of two towers: what takes tuned's to target's, (target's, tuned's).

    What users see is how near an embedding is to those of their prompts. So M is the best rotation between the
    embeddings of the bases on the inputs (the identity where the other tower of both is the same), and what it leaves
    wrong at the prompts P is made good there: E = M + P_target^+ (P_tuned - P_target M).
    """
    names = [name for name in teachers.target.sites if name in form.embeddings]
    evidence = collect(teachers.source, teachers.target, form, inputs, names=names)
    found = {}
    for name in (one for one in names if one in evidence):
        scores = scores_of({name: evidence[name]})[name]
        same = same_other_tower(teachers.source, teachers.target, "text" if name.startswith("text") else "vi")
        first = torch.eye(len(scores), dtype=torch.float64) if same else best_rotation(scores)
        found[name] = _through_prompts(first, teachers, inputs)
    return found


def _through_prompts(first: Tensor, teachers: Teachers, inputs: Prepared) -> Tensor:
    target, tuned = teachers.target.prompt_features(inputs), teachers.tuned.prompt_features(inputs)
    if target is None or tuned is None:
        return first
    target, tuned = target.double().cpu(), tuned.double().cpu()
    return first + torch.linalg.pinv(target, rtol=1e-6) @ (tuned - target @ first)


def same_other_tower(source: Probe, target: Probe, mine: str) -> bool:
    """Whether the tower that the embeddings of one are compared with is the same in both bases.

    Args:
        mine: how the names of the tensors of that one begin ("vi", "text").
    """
    pairs = [(n, target.names.get(n)) for n in source.names if not n.startswith(mine) and n != "logit_scale"]
    return all(
        there is not None
        and torch.equal(source.module.get_parameter(source.names[n]), target.module.get_parameter(there))
        for n, there in pairs
    )
