"""Options are declared once: groups check themselves, requests take flat names, commands have the same options."""

from __future__ import annotations

import pickle
import re
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner

from transfuse import InputError
from transfuse.bench.recipes.sections import SECTIONS
from transfuse.cli.common import app
from transfuse.cli.options import options_of
from transfuse.options import requests, studies
from transfuse.options.declare import REQUIRED, Group, Request, group, option
from transfuse.options.groups import Change, Check, Data, Inputs, Match, Output, Run
from transfuse.options.requests import InspectRequest, PortRequest, RefineRequest, ScaleRequest, SweepRequest
from transfuse.options.studies import Mask, Scale, Sweep
from transfuse.study.gradfix import rule_of
from transfuse.study.masks import MaskRule
from transfuse.study.train import TrainSpec

REQUESTS = [one for one in vars(requests).values() if isinstance(one, type) and issubclass(one, Request)][1:]
# What each command is made from; `--task`, and what it works on, are its arguments.
COMMANDS = {
    "inspect": InspectRequest,
    "match": requests.MatchRequest,
    "moments": requests.MomentsRequest,
    "port": PortRequest,
    "verify": requests.VerifyRequest,
    "merge": requests.MergeRequest,
    "sweep": SweepRequest,
    "scale": ScaleRequest,
    "refine": RefineRequest,
    "interpolate": requests.InterpolateRequest,
    "eval": requests.EvaluateRequest,
    "finetune": requests.FinetuneRequest,
    "convert": requests.ConvertRequest,
    "bench": requests.BenchRequest,
}


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (Change, {"alpha": float("nan")}, "alpha is nan; a finite number is needed"),
        (Change, {"alpha": float("inf")}, "alpha is inf; a finite number is needed"),
        (Change, {"alpha": "1"}, "alpha is '1'; a finite number is needed"),
        (Change, {"alpha": None}, "alpha is None; a finite number is needed"),
        (Change, {"alpha": True}, "alpha is True; a finite number is needed"),
        (Change, {"ridge": -1.0}, "ridge is -1.0; a finite number of at least 0 is needed"),
        (Change, {"keep_embeddings": 1}, "keep_embeddings is 1; True or False is needed"),
        (Match, {"max_sweeps": 0}, "max_sweeps is 0; a whole number of at least 1 is needed"),
        (Match, {"max_sweeps": 2.0}, "max_sweeps is 2.0; a whole number of at least 1 is needed"),
        (Match, {"method": 3}, "method is 3; a text is needed"),
        (Run, {"seed": -1}, "seed is -1; a whole number of at least 0 up to 4611686018427387904 is needed"),
        (Data, {"split": "all"}, "split is 'all'; one of train, validation, test is needed"),
        (Inputs, {"task": "x", "count": 1}, "inputs_count is 1; a whole number of at least 2 is needed"),
        (Output, {"out": 3}, "out is 3; a path is needed"),
        (Sweep, {"alphas": []}, "alphas are []; numbers, all finite and at least one, are needed"),
        (Sweep, {"alphas": [1, float("nan")]}, "alphas are [1, nan]; numbers, all finite and at least one, are needed"),
        (Sweep, {"alphas": "1,2"}, "alphas are '1,2'; numbers, all finite and at least one, are needed"),
        (Sweep, {"choose_on": "test"}, "best of many"),
        (Scale, {"shots": 1, "lr": 0.0}, "lr is 0.0; a finite number above 0 is needed"),
        (Mask, {"per_class": 1, "alpha": "best"}, "alpha is 'best'; a finite number, or 'cv', is needed"),
        (Mask, {"per_class": 1, "mode": "soft-share", "vote": "mean"}, "weighs by the votes of single examples"),
        (Mask, {"per_class": 1, "mode": "oracle"}, "needs the target's own fine-tune"),
        (
            studies.Line,
            {"lambdas": [0.5, 1.5]},
            "numbers of at least 0 up to 1, all finite, are needed",
        ),
        (studies.Merge, {"how": "ties", "density": 0.0}, "density is 0.0; a finite number above 0 up to 1 is needed"),
        (studies.Merge, {"density": 0.5}, "'sum' keeps every entry"),
        (studies.Train, {"epochs": 1, "steps": 1}, "epochs or steps"),
    ],
)
def test_a_group_names_the_option_the_value_and_what_is_allowed(cls: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        cls(**given)


def test_values_are_held_in_one_form() -> None:
    change = Change(alpha=2)
    assert change.alpha == 2.0 and isinstance(change.alpha, float)
    assert isinstance(Change(alpha=np.float32(0.5)).alpha, float)  # pyright: ignore
    assert type(Match(max_sweeps=np.int64(3)).max_sweeps) is int  # pyright: ignore
    assert Output(out="folder").out == Path("folder")  # pyright: ignore
    assert Sweep(alphas=[1, 0.5]).alphas == (1.0, 0.5)  # pyright: ignore
    assert Match(tie_qkv=None).tie_qkv is None and Mask(per_class=1, alpha="cv").alpha == "cv"
    with pytest.raises(FrozenInstanceError):
        change.alpha = 1.0  # pyright: ignore


# --- requests ---------------------------------------------------------------------------------------------------------


def test_a_request_takes_flat_names_and_whole_groups() -> None:
    request = PortRequest.of(alpha=0.5, inputs=Inputs("task.yaml", count=8), null_trials=0, seed=3)
    assert request.change.alpha == 0.5 and request.run == Run(seed=3) and request.check == Check(null_trials=0)
    assert request.inputs == Inputs("task.yaml", 8)
    assert PortRequest.of(inputs="task.yaml", inputs_count=8).inputs == request.inputs
    assert PortRequest.of(inputs=Inputs("task.yaml"), inputs_count=8).inputs == request.inputs
    assert PortRequest.of() == PortRequest()


def test_a_request_is_changed_over_what_it_has() -> None:
    first = PortRequest.of(alpha=0.5, seed=3)
    second = first.changed(alpha=0.25, inputs=Inputs("task.yaml"), device="cuda")
    assert second == PortRequest.of(alpha=0.25, seed=3, inputs="task.yaml", device="cuda")
    assert first == PortRequest.of(alpha=0.5, seed=3) and first.changed() is first
    with pytest.raises(InputError, match="no option 'restart'"):
        first.changed(restart=1)


@pytest.mark.parametrize("cls", REQUESTS)
def test_flat_names_are_unique_and_rebuild_the_request(cls: type[Request]) -> None:
    needed = {"shots": 4, "per_class": 5, "out": "folder", "inputs": "task.yaml"}
    required = {n: needed[n] for n, (_, _, one) in cls.declared().items() if one.default is REQUIRED}
    request = cls.of(**required)
    names = [name for _, asked in cls.groups().values() for name in asked]
    assert len(set(names)) == len(names) and set(request.flat()) == set(names)
    assert cls.of(**request.flat()) == request
    assert pickle.loads(pickle.dumps(request)) == request and len(pickle.dumps(request)) < 4000


def test_two_options_of_one_name_are_refused() -> None:
    @dataclass(frozen=True)
    class Other(Group):
        alpha: float = option(1.0, "Something else.")

    @dataclass(frozen=True, kw_only=True)
    class Both(Request):
        change: Change = group(Change)
        other: Other = group(Other)

    with pytest.raises(TypeError, match="option 'alpha' is in 'change' and in 'other'"):
        Both.of()


def test_options_go_from_one_request_to_another() -> None:
    sweep = SweepRequest.of(limit=9, data_dir="folder", seed=3, method="naive", ridge=0.5, alphas=[1])
    asked = sweep.shared(PortRequest, output=Output(out="out"))  # pyright: ignore
    assert asked == PortRequest.of(data_dir="folder", seed=3, method="naive", ridge=0.5, out="out")


def test_mistakes_name_what_is_near() -> None:
    with pytest.raises(InputError, match=r"^no option 'restart'; near: restarts$"):
        PortRequest.of(restart=3)
    with pytest.raises(InputError, match="no option 'zzz'; known: out, force, "):
        PortRequest.of(zzz=3)
    with pytest.raises(InputError, match=r"^shots is needed: Labelled examples of each class\.$"):
        ScaleRequest.of()
    with pytest.raises(InputError, match="check is 3; a Check is needed"):
        PortRequest(check=3)  # pyright: ignore


def test_a_request_refuses_what_it_leaves_out() -> None:
    assert InspectRequest().check.null_trials == 3
    for given in ({"verify": False}, {"check": Check(verify=False)}, {"match": Match(maps="file")}):
        with pytest.raises(InputError, match=r"no option '(verify|maps)'"):
            InspectRequest.of(**given)


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_options_of_its_request(name: str) -> None:
    found = {one.name: one for one in app.commands[name].params if isinstance(one, click.Option)}
    declared = {key: one for key, (_, _, one) in COMMANDS[name].declared().items() if one.flags != ()}
    assert {*declared, "as_json", "quiet", "verbose"} == found.keys() - {"task", "tuned", "target", "list_them"}
    for key, one in declared.items():
        assert found[key].help == one.help
        assert found[key].required or found[key].default == one.default or one.default in (None, ())
    assert {*app.commands} - {*COMMANDS} == {"methods", "demo"}


def test_help_lists_expert_options_apart() -> None:
    everyday, _, expert = CliRunner().invoke(app, ["port", "--help"]).stdout.partition("\nExpert options:")
    options, expert = everyday.partition("\nOptions:")[2], expert.partition("\nExamples:")[0]
    options, expert = (re.sub(r"[\s,/]", " ", one) for one in (options, expert))
    for name, (_, _, one) in PortRequest.declared().items():
        flag = f"--{name.replace('_', '-')} "
        if name != "progress" and one.flags != ():
            assert (flag in expert, flag in options) == (one.expert, not one.expert), name


def test_a_command_is_handed_the_request_that_python_makes() -> None:
    handed: list[Any] = []

    @click.command()
    @options_of(RefineRequest, required=("out",))
    def command(request: RefineRequest, as_json: bool) -> None:
        handed.extend([request, as_json])

    given = "--per-class 3 --alpha cv --alphas 0.5,1 -o folder --split-qkv --no-verify --ridge 0 --json --limit 9"
    result = CliRunner().invoke(command, given.split())
    assert result.exit_code == 0, result.output
    how = {"alpha": "cv", "alphas": (0.5, 1), "tie_qkv": False, "verify": False, "ridge": 0, "limit": 9}
    assert handed == [RefineRequest.of(per_class=3, out="folder", **how), True]
    for wrong, said in (
        ("", "'-o' / '--out'"),
        ("-o a", "'--per-class'"),
        ("-o a --per-class 0", "x>=1"),
        ("-o a --per-class 1 --alpha x", "a number, or cv, is needed"),
        ("-o a --per-class 1 --alphas 1,x", "numbers with commas between them are needed"),
        ("-o a --per-class 1 --mode odd", "'odd' is not one of"),
        ("-o a --per-class 1 --power 0", "x>0"),
    ):
        result = CliRunner().invoke(command, wrong.split())
        assert result.exit_code == 2 and said in result.stderr, result.output


def test_sections_are_those_of_a_recipe() -> None:
    assert studies.SECTIONS == SECTIONS


def test_the_rule_of_a_mask_has_the_defaults_that_are_declared() -> None:
    assert rule_of(Mask(per_class=1), Run()) == MaskRule()
    given: dict[str, Any] = {"vote": "mean", "ties": "drop", "mode": "force", "power": 3.0, "temperature": 0.5}
    assert rule_of(Mask(per_class=1, **given), Run(seed=4)) == MaskRule(**given, seed=4)


def test_what_training_takes_is_what_its_command_says() -> None:
    declared = {key: one.default for key, (_, _, one) in requests.FinetuneRequest.declared().items()}
    for name, one in TrainSpec.model_fields.items():
        if name not in ("task", "clip_norm"):
            assert declared[name] == (tuple(one.default) if isinstance(one.default, list) else one.default), name


@pytest.mark.parametrize(
    "request_", [{"alpha": 1.0}, "tied", ScaleRequest.of(shots=1)], ids=["dict", "text", "another"]
)
def test_a_request_is_that_of_the_function(request_: Any) -> None:
    with pytest.raises(InputError, match="a PortRequest is needed"):
        PortRequest.asked(request_, {})


def test_a_number_beyond_float_is_refused() -> None:
    with pytest.raises(InputError, match="alpha is 1000"):
        PortRequest.of(alpha=10**400)
