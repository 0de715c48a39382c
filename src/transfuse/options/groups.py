"""The groups of a port: opening, matching, inputs, labelled examples, data, the change, checks, output, the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .declare import Group, option

AUTO = "auto"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Opening(Group):
    """How models are read.

    Attributes:
        family: layout family, if the config does not say it.
        config: added to the models' configs: a mapping, JSON text or a file.
    """

    family: str | None = option(None, "Layout family, if the config does not say it.", kind=str, metavar="NAME")
    config: Any = option(
        None,
        "Added to the models' configs (head counts, axes of extra tensors).",
        kind=object,
        metavar="JSON|FILE",
    )


@dataclass(frozen=True)
class Match(Group):
    """How maps are sought, or those that were found before.

    Attributes:
        method: a row of `transfuse.METHODS`, or "auto".
        maps: maps, or their file, from an earlier `match` of the same two bases; they bring their method along, so that
            "auto" is that one and another is an error.
        tie_qkv: one inner map for q, k and v of a head; None for the method's own choice.
        paper_form: heads and the units inside them are matched by q, k and v alone, as the equations of Rinaldi et al.
            2025 say (7 to 9); else the output projection counts in both, as in the authors' code.
        max_sweeps: sweeps at most.
        restarts: further climbs, each from the best maps so far, in part drawn anew; the best by objective is taken.
    """

    method: str = option(AUTO, "See `transfuse methods`; auto looks at models and inputs, takes one and says why.")
    maps: Any = option(None, "Maps from `transfuse match` of the same two bases.", kind=object, metavar="FILE")
    tie_qkv: bool | None = option(
        None,
        "One inner map for q, k, v of a head; default: the method's.",
        kind=bool,
        flags="--tie-qkv/--split-qkv",
        expert=True,
    )
    paper_form: bool = option(False, "Match heads by q, k, v alone, as the paper's eq. 7 to 9 say.", expert=True)
    max_sweeps: int = option(100, "Sweeps of the ascent at most.", minimum=1, expert=True)
    restarts: int = option(0, "Further climbs from maps in part drawn anew; the best is taken.", minimum=0, expert=True)


@dataclass(frozen=True)
class Inputs(Group):
    """Unlabelled inputs, for methods that go by activations.

    Attributes:
        task: a task (spec, file or JSON text) whose data are used, "synthetic" (drawn), or "generated" (texts that the
            new base writes as a masked language model); None: no inputs.
        count: so many, or all there are.
        split: of the data.
        classes: a zero-shot task whose classes make prompts, for synthetic inputs of a model of two towers.
    """

    task: Any = option(
        None,
        "Unlabelled inputs, for methods that go by activations: the data of a task (YAML or JSON), drawn ones, or "
        "texts that the new base writes.",
        kind=object,
        name="inputs",
        metavar="TASK|synthetic|generated",
    )
    count: int = option(512, "So many of them at most.", name="inputs_count", minimum=2)
    split: str = option("train", "Which rows they are.", name="inputs_split", choices=SPLITS, flags=())
    classes: Any = option(
        None,
        "With synthetic inputs of a CLIP: the zero-shot task whose classes make prompts; its data are not needed.",
        kind=object,
        name="inputs_classes",
        metavar="TASK",
        expert=True,
    )

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return self.task is not None


@dataclass(frozen=True)
class Keep(Group):
    """Generic unlabelled inputs on which target shall stay as it is.

    Attributes:
        task: a task (spec, file or JSON text) whose data are used; moments (or their file, .safetensors) of such data,
            from which inputs are drawn; "synthetic" or "generated" (see `Inputs`); None: nothing is held on to.
        count: so many, or all there are.
        split: of the data.
        weight: beside the inputs of the task.
    """

    task: Any = option(
        None,
        "Generic unlabelled inputs on which the new base shall stay as it is, for methods that fit or train; or their "
        "moments, from `transfuse moments`.",
        kind=object,
        name="keep",
        metavar="TASK|MOMENTS|synthetic|generated",
    )
    count: int = option(2048, "So many of them at most.", name="keep_count", minimum=2)
    split: str = option("train", "Which rows they are.", name="keep_split", choices=SPLITS, flags=())
    weight: float = option(1.0, "Their weight beside the task's.", name="keep_weight", minimum=0, expert=True)

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return self.task is not None


@dataclass(frozen=True)
class Labelled(Group):
    """A few labelled examples.

    Attributes:
        task: whose training split they come from (spec, file or JSON text); None: no examples.
        per_class: so many of every class.
    """

    task: Any = option(
        None,
        "Labelled examples, by which auto takes method and scale.",
        kind=object,
        name="labelled",
        metavar="TASK",
    )
    per_class: int = option(5, "So many of a class.", minimum=1)

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return self.task is not None


@dataclass(frozen=True)
class Data(Group):
    """Which data of a task.

    Attributes:
        data_dir: folder in which data sets with a key `local` are looked for; None: nowhere.
        limit: at most so many rows of a split, chosen by the seed; None: all.
        split: which rows.
    """

    data_dir: Path | None = option(None, "Where local data sets lie.", kind=Path, exists=True)
    limit: int | None = option(None, "At most so many rows of a split, chosen by the seed.", kind=int, minimum=1)
    split: str = option("test", "Which rows.", choices=SPLITS)


@dataclass(frozen=True)
class Change(Group):
    """What is added to target.

    Attributes:
        alpha: scale of the task vector.
        ridge: of methods that fit: pull toward target's own weights; None: chosen on the inputs.
        train_steps: of methods that train: so many.
        polish: of methods that fit: steps of training (that of two-teachers) after the fit.
        keep_embeddings: no task vector for tables, positions and patches, as in Theseus (2602.12952).
    """

    alpha: float = option(1.0, "Scale of the task vector.")
    ridge: float | None = option(
        None,
        "Of method functional: pull toward target's own weights; default: chosen on the inputs.",
        kind=float,
        minimum=0,
        expert=True,
    )
    train_steps: int = option(300, "Of methods that train: steps.", minimum=1, expert=True)
    polish: int = option(0, "Of method functional: steps of training after the fit.", minimum=0)
    keep_embeddings: bool = option(False, "No task vector for tables, positions and patches (Theseus).", expert=True)


@dataclass(frozen=True)
class Check(Group):
    """What is checked.

    Attributes:
        null_trials: shuffled targets of each kind in the null test; 0 leaves it out.
        verify: run the mapped source against source, and load what was written.
        double: do that in float64.
    """

    null_trials: int = option(1, "Shuffled targets of each kind in the null test; 0: none.", minimum=0, expert=True)
    verify: bool = option(True, "Check the maps, and what is written.", flags="--verify/--no-verify", expert=True)
    double: bool = option(False, "Check in float64.", expert=True)


@dataclass(frozen=True)
class Output(Group):
    """What is written.

    Attributes:
        out: folder to write; None keeps the result in memory.
        force: replace an existing one.
        dry_run: stop after planning: nothing is matched or written.
    """

    out: Path | None = option(None, "The folder to write.", kind=Path, flags=("-o", "--out"))
    force: bool = option(False, "Replace an existing output.")
    dry_run: bool = option(False, "Say what would be done; match and write nothing.")


@dataclass(frozen=True)
class Run(Group):
    """The run itself.

    Attributes:
        seed: of every random choice.
        device: where products are computed and models run; whether it is there is found when the run starts.
        progress: bars on stderr.
    """

    seed: int = option(0, "Of every random choice.", minimum=0, maximum=2**62)
    device: str = option("cpu", "Where products are computed and models run.")
    progress: bool = option(False, "Bars on stderr.", flags=())
