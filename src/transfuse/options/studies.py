"""The groups of what goes on from a port, or measures: merge, sweep, scale, mask, line, training, conversion,
benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .declare import REQUIRED, Group, option

ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Merge(Group):
    """How several task vectors become one.

    Attributes:
        how: "sum", "mean", "ties" or "dare".
        density: share of entries that stay in "ties" and "dare"; None for that of the paper.
    """

    how: str = option("sum", "Ways of merging.", choices=("sum", "mean", "ties", "dare"))
    density: float | None = option(
        None, "Share of entries that ties and dare keep; default 0.2 and 0.1.", kind=float, above=0, maximum=1
    )

    def check(self) -> None:
        """A density is for the ways that drop entries."""
        if self.how in ("sum", "mean") and self.density not in (None, 1):
            raise InputError(f"a density is for ties and dare; {self.how!r} keeps every entry")


@dataclass(frozen=True)
class Sweep(Group):
    """Which scales are tried, and where the best is chosen.

    Attributes:
        support: another task, whose score says what the task vector destroys: on target with its own head.
        alphas: scales to try.
        choose_on: split that alpha is chosen on.
        allow_test: choose on the test split; the test score is then not an estimate of anything.
    """

    support: Any = option(None, "Another task: what the task vector does to it.", kind=object, metavar="TASK")
    alphas: tuple[float, ...] = option(
        ALPHAS, "Scales to try; default 0.1 to 1 in tenths.", kind=float, many="commas", metavar="A,B,..."
    )
    choose_on: str = option("validation", "Which rows alpha is chosen on.", choices=("validation", "test"))
    allow_test: bool = option(False, "Choose on test data all the same; the test score then says nothing.", expert=True)

    def check(self) -> None:
        """Test data are not for choosing."""
        if self.choose_on == "test" and not self.allow_test:
            raise InputError(
                "alpha is to be chosen on the test split: the test score would be the best of many and say nothing "
                "about new data. Choose on validation (a share of the training data is held out if there is no such "
                "split), or allow it explicitly (allow_test, --allow-test)"
            )


@dataclass(frozen=True)
class Scale(Group):
    """How scales are learned from a few labelled examples.

    Attributes:
        shots: examples of each class.
        per: an alpha for each "layer" (embeddings and heads are parts of their own) or "tensor".
        steps: of Adam with learning rate `lr`.
        lr: learning rate of the alphas.
        init: where every alpha starts. 0, aTLAS's choice, is the target itself: what is not learned is not added.
        baseline_lr: if given, all weights of the target are trained on the same examples too, and scored.
    """

    shots: int = option(REQUIRED, "Labelled examples of each class.", kind=int, minimum=1)
    per: str = option("layer", "What has an alpha of its own.", choices=("layer", "tensor"))
    steps: int = option(100, "Steps of the descent.", minimum=1)
    lr: float = option(0.05, "Learning rate of the alphas.", above=0)
    init: float = option(0.0, "Where the alphas start; 0: at the target.", expert=True)
    baseline_lr: float | None = option(
        None,
        "Fine-tune the target on the same examples too, with this learning rate.",
        kind=float,
        above=0,
        expert=True,
    )


@dataclass(frozen=True)
class Mask(Group):
    """How a task vector is masked by the gradients of a few labelled examples (GradFix), and scaled.

    Attributes:
        per_class: examples of each class; of a language model blocks in all.
        select: which: "random", or by target's features.
        pool: at most so many training rows to choose from; None: all.
        vote: "majority" of the examples' signs, or sign of the "mean" gradient.
        ties: what becomes of an entry whose vote is 0: "mean": the other vote decides; "drop": it is left out; "keep":
            it is kept as it is.
        mode: which mask; "random" and "oracle" are controls.
        power: of mode "soft-share".
        temperature: of mode "soft-sigmoid".
        oracle: for mode "oracle": target's own fine-tune.
        alpha: scale of what the mask leaves, or "cv": the best on examples that the mask was made without.
        alphas: candidates for "cv", besides 0.
        folds: of "cv", at most `per_class`; every fold's votes are held, each of twice the model's size.
        micro_batch: gradients held at once; None: as many as there is room for.
    """

    per_class: int = option(REQUIRED, "Labelled examples of each class (blocks in all).", kind=int, minimum=1)
    alpha: float | str = option(
        1.0, "Scale of the rest, or cv: by cross-validation.", kind=float, words=("cv",), metavar="A|cv"
    )
    alphas: tuple[float, ...] = option(
        ALPHAS,
        "Candidates of alpha cv, besides 0; default 0.1 to 1 in tenths.",
        kind=float,
        many="commas",
        metavar="A,B,...",
        expert=True,
    )
    folds: int = option(4, "Of alpha cv.", minimum=2, expert=True)
    select: str = option(
        "random",
        "Which examples; all but random go by TARGET's features.",
        choices=("random", "herding", "k-medoid", "coreset"),
    )
    pool: int | None = option(
        None, "At most so many training rows to choose from; default: all.", kind=int, minimum=1, expert=True
    )
    mode: str = option(
        "normal",
        "The mask; random and oracle are controls.",
        choices=("normal", "force", "soft-share", "soft-sigmoid", "random", "oracle"),
    )
    vote: str = option("majority", "How signs are found.", choices=("majority", "mean"), expert=True)
    ties: str = option(
        "mean",
        "Entries with as many votes for as against: the mean gradient decides, or they are left out, or kept.",
        choices=("mean", "drop", "keep"),
        expert=True,
    )
    power: float = option(2.0, "Of mode soft-share.", above=0, expert=True)
    temperature: float = option(0.25, "Of mode soft-sigmoid.", above=0, expert=True)
    oracle: Any = option(None, "TARGET's own fine-tune, for mode oracle.", kind=object, metavar="MODEL", expert=True)
    micro_batch: int | None = option(
        None, "Gradients held at once; default: up to 1 GB of them.", kind=int, minimum=1, expert=True
    )

    def check(self) -> None:
        """Soft modes weigh single votes, and an oracle is for its own mode."""
        if self.mode.startswith("soft") and self.vote != "majority":
            raise InputError(f"mode {self.mode} weighs by the votes of single examples; leave vote {self.vote!r} out")
        if (self.mode == "oracle") != (self.oracle is not None):
            raise InputError("mode 'oracle' needs the target's own fine-tune (oracle), and no other mode takes one")


@dataclass(frozen=True)
class Line(Group):
    """Where on the line between two models, and with which skips.

    Attributes:
        points: so many, evenly spaced.
        lambdas: the points themselves, in place of `points`; 0, 0.5 and 1 are added.
        skips: None for the forms that the method has: "linear" and "rounded" where its maps need permuted skips, else
            "identity". "identity" with such maps shows what becomes of them without.
    """

    points: int = option(11, "Points on the line.", minimum=2)
    lambdas: tuple[float, ...] | None = option(
        None, "The points themselves.", kind=float, many="commas", empty=True, minimum=0, maximum=1, flags=()
    )
    skips: str | None = option(
        None,
        "Form of permuted skips, for methods that need them; default: linear and rounded, a curve each.",
        kind=str,
        choices=("identity", "linear", "rounded"),
    )


@dataclass(frozen=True)
class Train(Group):
    """How a model is trained; the fields of `TrainSpec` that a command has.

    Attributes:
        epochs, steps: how long; one of them, or neither for 3 epochs.
        batch_size: rows of a step.
        lr: highest learning rate of AdamW.
        weight_decay: of matrices.
        warmup: share of the steps in which the learning rate rises from 0.
        schedule: how it goes on: "cosine" down to 0, or "constant".
        augment: "flip-crop", "shift" or "none".
        freeze: regular expressions; parameters whose name one of them finds are not trained.
        train_text: zero-shot tasks: train the text tower and the logit scale, too.
        shots: so many training rows of each class in place of all.
    """

    epochs: float | None = option(None, "How long; or --steps.  [default: 3 epochs]", kind=float, above=0)
    steps: int | None = option(None, "How many steps.", kind=int, minimum=1)
    batch_size: int = option(128, "Rows of a step.", minimum=1)
    lr: float = option(1e-3, "Highest learning rate.", above=0)
    weight_decay: float = option(0.05, "Of matrices.", minimum=0, expert=True)
    warmup: float = option(
        0.1, "Share of the steps in which the learning rate rises.", minimum=0, maximum=1, expert=True
    )
    schedule: str = option("cosine", "How it goes on.", choices=("cosine", "constant"), expert=True)
    augment: str = option("none", "What is done to images.", choices=("none", "flip-crop", "shift"))
    freeze: tuple[str, ...] = option(
        (), "Parameters that stay as they are; may be repeated.", kind=str, many="repeated", empty=True, metavar="REGEX"
    )
    train_text: bool = option(False, "Zero-shot tasks: train the text tower, too.")
    shots: int | None = option(None, "Rows of each class to train on.  [default: all]", kind=int, minimum=1)

    def check(self) -> None:
        """One length."""
        if self.epochs is not None and self.steps is not None:
            raise InputError("give epochs or steps, one of them")


@dataclass(frozen=True)
class Convert(Group):
    """What a CLIP becomes.

    Attributes:
        tokenizer: folder or hub id whose tokenizer is taken where the checkpoint has none.
        tower: "text" for the text tower with its projection alone.
    """

    tokenizer: str | None = option(None, "Whose tokenizer to take where MODEL has none.", kind=str, metavar="MODEL")
    tower: str | None = option(None, "This tower with its projection alone.", kind=str, choices=("text",))


SECTIONS = ("transport", "worth", "alpha", "fewshot", "interpolation")


@dataclass(frozen=True)
class Bench(Group):
    """How a recipe is run.

    Attributes:
        seeds: in place of the recipe's.
        quick: the recipe's short form.
        tiny: tiny random models of the same classes, data from the data folder.
        only: these sections; all if empty.
        cache: where models and measurements are kept, for all recipes; None: $TRANSFUSE_CACHE or ~/.cache/transfuse.
        workers: processes; None: one a core, four at most (one on another device than the CPU).
        threads: of torch in each process. Results depend on it in the last bits.
        override: changes of the recipe, KEY.PATH=VALUE.
    """

    seeds: tuple[int, ...] | None = option(None, "Instead of the recipe's.", kind=int, many="commas", metavar="0,1,...")
    quick: bool = option(False, "The recipe's short form.")
    tiny: bool = option(False, "Dry run: tiny random models of the same classes, data from --data-dir.")
    only: tuple[str, ...] = option(
        (), "These sections only; may be repeated.", kind=str, many="repeated", empty=True, choices=SECTIONS
    )
    cache: Path | None = option(
        None,
        "Where models and measurements are kept. [default: $TRANSFUSE_CACHE or ~/.cache/transfuse]",
        kind=Path,
        metavar="DIR",
    )
    workers: int | None = option(None, "Processes. [default: one a core, four at most]", kind=int, minimum=1)
    threads: int = option(1, "Of each process.", minimum=1)
    override: tuple[str, ...] = option(
        (),
        "Changes the recipe; may be repeated.",
        kind=str,
        many="repeated",
        empty=True,
        metavar="KEY.PATH=VALUE",
        expert=True,
    )
