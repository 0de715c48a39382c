"""A port by training: who teaches what, on which inputs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from ..running.given import Unlabelled
from ..running.inputs import Prepared
from ..running.instances import probe_of
from ..running.probes import Probe
from .functional import let_go_of_student, same_other_tower, student_and_tuned
from .ported import Ported
from .teachers import answers, has_two_towers, mixed
from .training import Lesson, TrainOptions, train_on
from .transported import Fitted

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeachOptions(TrainOptions):
    """How a port is trained.

    Attributes:
        views: whether inputs are seen anew in every step.
        features: whether embeddings count beside scores, where they mean the same in both models.
        bases: whether what tuned took over from source is replaced by what target says.
    """

    views: bool = False
    features: bool = False
    bases: bool = False


# As it is commonly done, and as it served best (docs/benchmarks.md).
PLAIN = TeachOptions()
TWO_TEACHERS = TeachOptions(optimizer="muon", lr=0.005, views=True, features=True, bases=True)


def train_port(
    start: Ported, inputs: Unlabelled, options: TeachOptions, *, device: str = "cpu", progress: bool = False
) -> Fitted:
    """The tensors of a port, trained from where it is.

    Args:
        start: where training starts, heads included.
        inputs: unlabelled; on those to keep target is the teacher.
        options: see there.

    Raises:
        InputError: see `train_on`; or a model cannot be run here.
    """
    student, tuned = student_and_tuned(start, device)
    assert inputs.task is not None
    if options.bases:
        source, target = (probe_of(start.models, role, device) for role in ("source", "target"))
        lessons = [_change(inputs.task, options, student, (source, target, tuned))]
    else:
        mine, its = (answers(one, inputs.task) for one in (student, tuned))
        lessons = [Lesson(inputs.task, mine, its, views=options.views, mix=options.views)]
    if inputs.keep is not None and inputs.keep_weight > 0:
        lessons.append(_kept(inputs.keep, options, student, probe_of(start.models, "target", device)))
        lessons[-1] = replace(lessons[-1], weight=inputs.keep_weight)
    found = train_on(student, lessons, options, progress=progress)
    let_go_of_student(start, student)
    return Fitted(start.models.target, found, start.update)


def _change(task: Prepared, options: TeachOptions, student: Probe, others: tuple[Probe, Probe, Probe]) -> Lesson:
    """What tuned teaches, beside what target says where the bases speak."""
    source, target, _ = others
    tower = "vi" if "pixel_values" in task.batch(torch.tensor([0])) else "text"
    features = options.features and has_two_towers(student) and same_other_tower(source, target, tower)
    mine, old, new, its = (answers(one, task, features=features) for one in (student, *others))
    teacher, share = mixed(old, new, its, task)
    log.info("the bases speak on the task: %.2f of what tuned says is target's word instead of source's", share)
    return Lesson(task, mine, teacher, views=options.views, mix=options.views)


def _kept(keep: Prepared, options: TeachOptions, student: Probe, target: Probe) -> Lesson:
    """What target teaches: what its body gives, whose head the student may lack."""
    scores = has_two_towers(student)
    mine, its = (answers(one, keep, scores=scores, features=True) for one in (student, target))
    return Lesson(keep, mine, its, views=options.views)
