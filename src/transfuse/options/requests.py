"""What each public function, and each command, takes beside the models and the task it works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import groups, studies
from .declare import REQUIRED, Request, group

# Without a fine-tune, or where maps are needed whatever the models are, there is nothing that auto could choose by.
_MAPS: dict[str, Any] = {"method": {"help": "See `transfuse methods`; auto, where maps are needed, is tied."}}
_WRITTEN: dict[str, Any] = {"leave": ("dry_run",), "out": {"default": REQUIRED}}


@dataclass(frozen=True, kw_only=True)
class InspectRequest(Request):
    """Of `inspect`."""

    opening: groups.Opening = group(groups.Opening)
    match: groups.Match = group(groups.Match, leave=("maps",), **_MAPS)
    check: groups.Check = group(groups.Check, leave=("verify", "double"), null_trials={"default": 3})
    run: groups.Run = group(groups.Run)


@dataclass(frozen=True, kw_only=True)
class MatchRequest(Request):
    """Of `match`."""

    output: groups.Output = group(groups.Output, leave=("dry_run",), out={"help": "The maps file to write."})
    match: groups.Match = group(groups.Match, leave=("maps",), **_MAPS)
    inputs: groups.Inputs = group(groups.Inputs)
    data: groups.Data = group(groups.Data, leave=("limit", "split"))
    change: groups.Change = group(groups.Change, leave=("alpha", "train_steps", "polish"))
    check: groups.Check = group(groups.Check, leave=("verify", "double"))
    opening: groups.Opening = group(groups.Opening)
    run: groups.Run = group(groups.Run)


@dataclass(frozen=True, kw_only=True)
class MomentsRequest(Request):
    """Of `moments`."""

    output: groups.Output = group(groups.Output, leave=("dry_run",), out={"help": "The file to write."})
    inputs: groups.Inputs = group(
        groups.Inputs,
        leave=("classes",),
        inputs={
            "default": REQUIRED,
            "help": "Generic unlabelled inputs: the data of a task (YAML or JSON).",
            "metavar": "TASK",
        },
        inputs_count={"default": 2048},
    )
    data: groups.Data = group(groups.Data, leave=("limit", "split"))
    run: groups.Run = group(groups.Run, leave=("device",))


@dataclass(frozen=True, kw_only=True)
class PortRequest(Request):
    """Of `port`."""

    output: groups.Output = group(groups.Output)
    match: groups.Match = group(groups.Match)
    inputs: groups.Inputs = group(groups.Inputs)
    keep: groups.Keep = group(groups.Keep)
    labelled: groups.Labelled = group(groups.Labelled)
    data: groups.Data = group(groups.Data, leave=("limit", "split"))
    change: groups.Change = group(groups.Change)
    check: groups.Check = group(groups.Check)
    opening: groups.Opening = group(groups.Opening)
    run: groups.Run = group(groups.Run)


@dataclass(frozen=True, kw_only=True)
class MethodRequest(Request):
    """Of a method in a recipe, which names it beside."""

    match: groups.Match = group(groups.Match, leave=("method", "maps"))
    change: groups.Change = group(groups.Change, leave=("alpha",))


@dataclass(frozen=True, kw_only=True)
class MergeRequest(Request):
    """Of `merge`."""

    output: groups.Output = group(groups.Output, leave=("dry_run",))
    merge: studies.Merge = group(studies.Merge)
    match: groups.Match = group(groups.Match, **_MAPS)
    inputs: groups.Inputs = group(groups.Inputs)
    keep: groups.Keep = group(groups.Keep)
    data: groups.Data = group(groups.Data, leave=("limit", "split"))
    change: groups.Change = group(groups.Change, alpha={"help": "Scale of the merged task vector."})
    check: groups.Check = group(groups.Check)
    opening: groups.Opening = group(groups.Opening)
    run: groups.Run = group(groups.Run)


@dataclass(frozen=True, kw_only=True)
class VerifyRequest(Request):
    """Of `verify`."""

    opening: groups.Opening = group(groups.Opening)
    check: groups.Check = group(groups.Check, leave=("null_trials", "verify"), double={"expert": False})
    run: groups.Run = group(groups.Run, leave=("device",))


@dataclass(frozen=True, kw_only=True)
class SweepRequest(Request):
    """Of `sweep`."""

    data: groups.Data = group(groups.Data, leave=("split",))
    sweep: studies.Sweep = group(studies.Sweep)
    match: groups.Match = group(groups.Match)
    inputs: groups.Inputs = group(groups.Inputs)
    keep: groups.Keep = group(groups.Keep)
    change: groups.Change = group(groups.Change, leave=("alpha",))
    check: groups.Check = group(groups.Check)
    opening: groups.Opening = group(groups.Opening)
    run: groups.Run = group(groups.Run)


@dataclass(frozen=True, kw_only=True)
class ScaleRequest(Request):
    """Of `scale`."""

    output: groups.Output = group(groups.Output, leave=("dry_run",))
    data: groups.Data = group(groups.Data, leave=("split",))
    scale: studies.Scale = group(studies.Scale)
    match: groups.Match = group(groups.Match)
    inputs: groups.Inputs = group(groups.Inputs)
    keep: groups.Keep = group(groups.Keep)
    change: groups.Change = group(groups.Change, leave=("alpha",))
    check: groups.Check = group(groups.Check)
    opening: groups.Opening = group(groups.Opening)
    run: groups.Run = group(groups.Run)


@dataclass(frozen=True, kw_only=True)
class RefineRequest(Request):
    """Of `refine`."""

    output: groups.Output = group(groups.Output, leave=("dry_run",))
    data: groups.Data = group(groups.Data, leave=("split",))
    mask: studies.Mask = group(studies.Mask)
    match: groups.Match = group(groups.Match)
    inputs: groups.Inputs = group(groups.Inputs)
    keep: groups.Keep = group(groups.Keep)
    change: groups.Change = group(groups.Change, leave=("alpha",))
    check: groups.Check = group(groups.Check)
    opening: groups.Opening = group(groups.Opening)
    run: groups.Run = group(groups.Run)


@dataclass(frozen=True, kw_only=True)
class InterpolateRequest(Request):
    """Of `interpolate`."""

    data: groups.Data = group(groups.Data)
    line: studies.Line = group(studies.Line)
    check: groups.Check = group(groups.Check, leave=("null_trials", "verify"), double={"help": "Run in float64."})
    match: groups.Match = group(groups.Match, **_MAPS)
    inputs: groups.Inputs = group(groups.Inputs)
    change: groups.Change = group(groups.Change, leave=("alpha", "train_steps", "polish"))
    opening: groups.Opening = group(groups.Opening)
    run: groups.Run = group(groups.Run)


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(Request):
    """Of `evaluate`."""

    data: groups.Data = group(groups.Data)
    run: groups.Run = group(groups.Run)


@dataclass(frozen=True, kw_only=True)
class FinetuneRequest(Request):
    """Of `finetune`."""

    output: groups.Output = group(groups.Output, **_WRITTEN)
    data: groups.Data = group(groups.Data, leave=("split",))
    train: studies.Train = group(studies.Train)
    keep: groups.Keep = group(
        groups.Keep, leave=("split",), keep={"help": "Generic unlabelled inputs on which BASE shall stay as it is."}
    )
    run: groups.Run = group(groups.Run)


@dataclass(frozen=True, kw_only=True)
class ConvertRequest(Request):
    """Of `convert`."""

    output: groups.Output = group(groups.Output, **_WRITTEN)
    convert: studies.Convert = group(studies.Convert)


@dataclass(frozen=True, kw_only=True)
class BenchRequest(Request):
    """Of `bench`."""

    output: groups.Output = group(groups.Output, leave=("force", "dry_run"), out={"help": "Folder for the results."})
    data: groups.Data = group(
        groups.Data,
        leave=("split",),
        data_dir={"help": "Folder with local data sets."},
        limit={"help": "Rows at most of every data set, trainings included."},
    )
    bench: studies.Bench = group(studies.Bench)
    run: groups.Run = group(groups.Run, leave=("seed",), device={"help": "Where models run."})
