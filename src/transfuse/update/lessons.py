"""A port by training: who teaches what, on which inputs."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from ..running.given import Unlabelled
from ..running.inputs import Prepared
from ..running.instances import probe_of
from ..running.probes import Probe
from ..running.scores import has_two_towers
from .functional import let_go_of_student, same_other_tower, student_and_tuned
from .ported import Ported
from .teachers import answers, mixed, need_alike
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
    start: Ported,
    inputs: Unlabelled,
    options: TeachOptions,
    *,
    still: Collection[str] = (),
    device: str = "cpu",
    progress: bool = False,
) -> Fitted:
    """The tensors of a port, trained from where it is.

    Args:
        start: where training starts, heads included.
        inputs: unlabelled; on those to keep target is the teacher.
        options: see there.
        still: canonical names of what is not trained.

    Raises:
        InputError: the models say nothing that can be learned; see `train_on`; or a model cannot be run here.
    """
    student, tuned = student_and_tuned(start, device)
    task, keep = inputs.task, inputs.keep
    assert task is not None
    if options.bases:
        source, target = (probe_of(start.models, role, device) for role in ("source", "target"))
        # A head that comes along answers other questions than those of the bases, as many as they may be.
        speak = has_two_towers(student.module) or not start.carried
        lessons = [_change(task, options, student, (source, target, tuned), speak=speak)]
    else:
        mine, its = (answers(one, task) for one in (student, tuned))
        lessons = [Lesson(task, mine, its, views=options.views, mix=options.views)]
    need_alike(lessons[0].student, lessons[0].teacher, task, "inputs of the task")
    if keep is not None:
        target = probe_of(start.models, "target", device)
        lessons.append(kept(keep, student, target, weight=inputs.keep_weight, views=options.views))
    found = train_on(student, lessons, options, still=still, progress=progress)
    let_go_of_student(start, student)
    return Fitted(start.models.target, found, start.update)


def _change(
    task: Prepared, options: TeachOptions, student: Probe, others: tuple[Probe, Probe, Probe], *, speak: bool
) -> Lesson:
    """What tuned teaches, beside what target says where the bases speak; `speak`: whether they can."""
    source, target, _ = others
    tower = "vi" if task.has_images else "text"
    alike = options.features and has_two_towers(student.module) and same_other_tower(source, target, tower)
    features = "embedding" if alike else "none"
    mine, old, new, its = (answers(one, task, features=features) for one in (student, *others))
    teacher, share = mixed(old, new, its, task) if speak else (its, 0.0)
    log.info("the bases speak on the task: %.2f of what tuned says is target's word instead of source's", share)
    return Lesson(task, mine, teacher, views=options.views, mix=options.views)


def kept(inputs: Prepared, student: Probe, target: Probe, *, weight: float, views: bool) -> Lesson:
    """What a model teaches that shall stay: what its users see or, where the student has another head, its body.

    Args:
        inputs: generic ones.
        student, target: the model that is trained, and the one as it was.
        weight, views: see `Lesson`.

    Raises:
        InputError: the two say nothing on them that could be compared.
    """
    towers = has_two_towers(student.module) and has_two_towers(target.module)
    features = "embedding" if towers else "body"
    mine, its = (answers(one, inputs, scores=towers, features=features) for one in (student, target))
    need_alike(mine, its, inputs, "inputs to keep")
    return Lesson(inputs, mine, its, weight, views=views)
