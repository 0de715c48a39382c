"""The command line: exit codes, what goes to stdout and what to stderr, and that a failure leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from transformers import BertForMaskedLM, BertForSequenceClassification

from tiny import bert, fine_tuned, planted, save
from transfuse import Maps, TransfuseError, __version__
from transfuse.cli.common import app
from transfuse.maps.algebra import Dense
from transfuse.matching.ascent import Climb
from transfuse.methods.table import METHODS
from transfuse.porting.verify import Equivalence
from transfuse.update.ported import Ported

FAST = ("--null-trials", "0")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of a base, two fine-tunes of it, and a release with its units in another order."""
    folder = tmp_path_factory.mktemp("models")
    source = bert(BertForMaskedLM)
    made = {
        "source": source,
        "tuned": fine_tuned(source),
        "classifier": fine_tuned(source, BertForSequenceClassification, num_labels=3),
        "target": planted(source, 1, noise=0.2)[0],
    }
    return {name: str(save(model, folder / name)) for name, model in made.items()}


@pytest.fixture
def three(models: dict[str, str]) -> tuple[str, str, str]:
    return models["source"], models["tuned"], models["target"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments: object) -> Result:
    """Runs a command that must succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def failed(code: int, *arguments: object) -> str:
    """Runs a command that must fail so, with nothing on stdout; what it says."""
    result = run(*arguments)
    assert result.exit_code == code and isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert result.stdout == "" and "Traceback" not in result.stderr
    return result.stderr


def strict_json(text: str) -> Any:
    """JSON without NaN and Infinity, which are none."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def as_json(*arguments: object) -> dict[str, Any]:
    """The one JSON object on stdout."""
    report = strict_json(ok(*arguments, "--json").stdout)
    assert isinstance(report, dict)
    return report


# --- the keys of --json, which scripts rely on ------------------------------------------------------------------------

# Dictionaries whose keys are names of layers, spaces, files or tensors; "*" stands for those.
BY_NAME = ("towers", "facts", "spaces", "parts", "fixed_points", "heads", "layers", "dtypes", "tied", "plan", "tensors")


def paths(value: Any, at: str = "") -> set[str]:
    """Every key of a report as a dotted path."""
    if not isinstance(value, dict) or not value:
        return {at}
    inner = value.items()
    if at.rpartition(".")[2] in BY_NAME:
        inner = [("*", one) for one in value.values()]
    return {path for key, one in inner for path in paths(one, f"{at}.{key}".lstrip("."))}


def under(root: str, *names: str) -> set[str]:
    return {f"{root}.{name}" if root else name for group in names for name in group.split()}


NULL_KEYS = under("null.model", "entries excess identity layers.* matched orders z") | under(
    "null.model.shared", "layers units numbered p_numbered paired p_paired"
)
RELATION_KEYS = {"cosines.model", "text", "towers.*", "verdict"} | NULL_KEYS
MATCH_KEYS = {
    "converged", "identity_is_as_good", "objective", "similarity_identity", "similarity_matched", "sweeps",
    "fixed_points.*", "heads.*.order", "heads.*.spectral", "layers.*.identity", "layers.*.matched",
}  # fmt: skip
DELTA_KEYS = {"changed", "relative_norm", "verdict", "parts.*"}
EQUIVALENCE_KEYS = {"checked", "dtype", "error", "outputs", "passed", "reason", "stock"}
FACT_KEYS = {"*.activation", "*.heads", "*.layers", "*.norm"}
OPTION_KEYS = {"device", "keep_embeddings", "max_sweeps", "paper_form", "restarts", "ridge", "seed", "tie_qkv"}
MODEL_KEYS = {"architectures", "dtypes.*", "files", "kind", "location", "parameters", "tensors", "tied", "vocabulary"}
ABOUT_KEYS = (
    {"alpha", "carried", "dropped", "family", "method", "out", "summary", "tensors.*", "transfuse", "warnings"}
    | {"resized.inputs", "resized.shapes"}
    | under("delta", *DELTA_KEYS)
    | under("facts", *FACT_KEYS)
    | {f"models.{role}.{key}" for role in ("source", "tuned", "target") for key in ("location", "fingerprint")}
)
METHOD_KEYS = {
    "control", "evidence", "exact", "exportable", "group", "heads", "name", "paper", "skips", "solver", "start",
    "streams", "summary", "tie_qkv", "transport",
}  # fmt: skip


def test_keys_of_inspect(models: dict[str, str]) -> None:
    alone = {"family", "spaces.*"} | under("towers", *FACT_KEYS)
    one = as_json("inspect", models["source"])
    keys = MODEL_KEYS - {"tied"} | {"tied.*"}
    assert paths(one) == alone | under("models.source", *keys)
    assert one["family"] == "bert" and one["towers"][""] == {
        "activation": "gelu",
        "heads": 4,
        "layers": 2,
        "norm": "post",
    }
    assert one["models"]["source"]["vocabulary"] == 31
    assert one["models"]["source"]["tied"]["cls.predictions.decoder.weight"] == "embeddings.word_embeddings.weight"
    three = as_json("inspect", models["source"], "--tuned", models["classifier"], "--target", models["target"])
    assert paths(three) == alone | {
        *under("models.source", *keys), *under("models.target", *keys), *under("models.tuned", *MODEL_KEYS),
        *under("delta", *DELTA_KEYS), *under("relation", *RELATION_KEYS), *under("relation.match", *MATCH_KEYS),
        *under("resized", "inputs shapes"),
        "plan.*",
    }  # fmt: skip
    assert three["plan"].keys() == {"add", "carry", "drop"}
    assert "classifier.weight" in three["plan"]["carry"]


def test_keys_of_match(models: dict[str, str], tmp_path: Path) -> None:
    report = as_json("match", models["source"], models["target"], "-o", tmp_path / "maps")
    assert paths(report) == {"out", "method"} | MATCH_KEYS | NULL_KEYS | under("relation", *RELATION_KEYS)
    assert report["out"] == str(tmp_path / "maps") and report["relation"]["verdict"] == "related-coordinates"
    naive = as_json("match", models["source"], models["target"], "-o", tmp_path / "naive", "--method", "naive")
    assert paths(naive) == {"out", "method"} | under("relation", "cosines.model text towers.* verdict null")


def test_keys_of_port(three: tuple[str, str, str], tmp_path: Path) -> None:
    report = as_json("port", *three, "-o", tmp_path / "out")
    assert paths(report) == ABOUT_KEYS | {"exportable", "loads", "lost_updates"} | {
        *under("options", *OPTION_KEYS), *under("match", *MATCH_KEYS), *under("relation", *RELATION_KEYS),
        *under("equivalence", *EQUIVALENCE_KEYS), *under("choice", "because method null_tests.tied.*"),
    }  # fmt: skip
    assert report.pop("out") == str(tmp_path / "out")
    assert report == strict_json((tmp_path / "out" / "result.json").read_text())
    dry = as_json("port", *three, "--dry-run")
    assert paths(dry) == ABOUT_KEYS | {"dry_run"} and dry["out"] is None


def test_keys_of_verify_and_methods(models: dict[str, str], tmp_path: Path) -> None:
    ok("match", models["source"], models["target"], "-o", tmp_path / "maps", *FAST)
    assert paths(as_json("verify", models["source"], tmp_path / "maps")) == EQUIVALENCE_KEYS
    rows = as_json("methods")
    assert list(rows) == sorted(METHODS)
    assert all(paths(row) == METHOD_KEYS for row in rows.values())


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(app.commands))
def test_help_shows_examples(name: str) -> None:
    text = ok(name, "--help").stdout
    examples = text.partition("Examples:")[2].split("\n")
    shown = [line.strip() for line in examples if line.strip()]
    assert shown and all(line.startswith(f"transfuse {name}") for line in shown)
    assert text == ok(name, "-h").stdout


def test_help_and_version() -> None:
    text = ok("--help").stdout
    assert all(f"\n  {name} " in text for name in app.commands)
    assert ok("--version").stdout.strip().endswith(__version__)


def test_text_of_every_command(models: dict[str, str], three: tuple[str, str, str], tmp_path: Path) -> None:
    text = ok("inspect", three[0], "--tuned", models["classifier"], "--target", three[2]).stdout
    assert (
        "family     bert" in text
        and "shared: cls.predictions.decoder.weight = embeddings.word_embeddings.weight" in text
    )
    assert "tuned is a fine-tune of source" in text and "relation   related-coordinates" in text
    assert "carry      " in text and "classifier.weight" in text
    text = ok("match", three[0], three[2], "-o", tmp_path / "maps", *FAST).stdout
    assert f"maps       {tmp_path / 'maps'}" in text and "sweeps, similarity" in text
    assert "verified   ok" in ok("verify", three[0], tmp_path / "maps").stdout
    text = ok("port", *three, "-o", tmp_path / "out", *FAST).stdout
    assert "method     tied, alpha 1.0" in text and "loads      BertForMaskedLM" in text
    assert f"output     {tmp_path / 'out'}" in text and "rounding   0.00% of the updates lost" in text
    assert "nothing written (dry run)" in ok("port", *three, "--dry-run").stdout
    text = ok("methods").stdout
    assert all(f"\n{name} " in text for name in METHODS)


def test_quiet_says_nothing(three: tuple[str, str, str], tmp_path: Path) -> None:
    assert ok("port", *three, "-o", tmp_path / "out", "-q", *FAST).stderr == ""


# --- match, verify, port ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tied", "transfusion", "naive"])
def test_match_then_verify_then_port(models: dict[str, str], tmp_path: Path, method: str) -> None:
    source, target, maps = models["source"], models["target"], tmp_path / "maps.safetensors"
    ok("match", source, target, "-o", maps, "--method", method, *FAST)
    report = as_json("verify", source, maps, "--double")
    assert report["passed"] and report["error"] < 1e-9
    for tuned in ("tuned", "classifier"):
        given = as_json("port", source, models[tuned], target, "-o", tmp_path / f"{tuned}-maps", "--maps", maps, *FAST)
        anew = as_json("port", source, models[tuned], target, "-o", tmp_path / tuned, "--method", method, *FAST)
        assert given["method"] == method and given.pop("out") != anew.pop("out") and given == anew
        files = [(tmp_path / name / "model.safetensors").read_bytes() for name in (f"{tuned}-maps", tuned)]
        assert files[0] == files[1]
    message = failed(2, "verify", target, maps)
    assert f"{maps} was made for another source than {target} (fingerprints differ)" in message


def test_maps_bring_their_method(three: tuple[str, str, str], tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    ok("match", three[0], three[2], "-o", maps, "--null-trials", "1")
    said = failed(2, "port", *three, "-o", tmp_path / "out", "--maps", maps, "--method", "transfusion")
    assert "the maps were made by method 'tied' and method 'transfusion' is asked for: maps bring their method" in said
    report = as_json("port", *three, "-o", tmp_path / "out", "--maps", maps)
    assert report["method"] == "tied" and len(report["relation"]["null"]["model"]["entries"]) == 1


def test_options_reach_the_library(three: tuple[str, str, str], tmp_path: Path) -> None:
    report = as_json(
        "port", *three, "-o", tmp_path / "out", "--method", "tied", "--alpha", "0.25", "--seed", "3", "--restarts", "1",
        "--max-sweeps", "7", "--tie-qkv", "--paper-form", "--no-verify", "--null-trials", "1",
    )  # fmt: skip
    assert report["alpha"] == 0.25 and report["equivalence"] is None and "loads" not in report
    assert report["options"] == {
        "device": "cpu", "keep_embeddings": False, "max_sweeps": 7, "restarts": 1, "ridge": None, "seed": 3,
        "paper_form": True, "tie_qkv": True,
    }  # fmt: skip
    assert len(report["relation"]["null"]["model"]["entries"]) == 1


def test_family_and_config(tmp_path: Path) -> None:
    encoder = torch.nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    stack = torch.nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
    state = {f"text.{name}": tensor.contiguous() for name, tensor in stack.state_dict().items()}
    save_file(state, tmp_path / "encoder.safetensors")
    given = (tmp_path / "encoder.safetensors", "--family", "torch_encoder", "--config")
    (tmp_path / "config.json").write_text('{"nhead": 4}')
    for config in ('{"nhead": 4}', tmp_path / "config.json"):
        assert as_json("inspect", *given, config)["towers"][""]["heads"] == 4
    assert "does not say how many attention heads" in failed(2, "inspect", *given, "{}")
    assert "5 heads" in failed(2, "inspect", *given, '{"nhead": 5}')
    assert "not valid JSON" in failed(2, "inspect", *given, '{"nhead": ')
    unknown = as_json("inspect", tmp_path / "encoder.safetensors")
    assert unknown["family"] is None and unknown["spaces"] == {}


def test_force(three: tuple[str, str, str], tmp_path: Path) -> None:
    out, maps = tmp_path / "out", tmp_path / "maps"
    for command in (("match", three[0], three[2], "-o", maps), ("port", *three, "-o", out)):
        place = Path(command[-1])
        ok(*command, *FAST)
        before = place.stat().st_mtime_ns
        assert "force" in failed(2, *command, *FAST)
        assert place.stat().st_mtime_ns == before
        ok(*command, *FAST, "--force")
        assert place.stat().st_mtime_ns != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps", "out"]


def test_a_dry_run_writes_nothing(three: tuple[str, str, str], tmp_path: Path) -> None:
    for place in ((), ("-o", tmp_path / "out"), ("-o", tmp_path / "missing" / "out")):
        ok("port", *three, *place, "--dry-run")
    assert not list(tmp_path.iterdir())


# --- exit codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("port",),
        ("port", "a", "b", "c"),
        ("port", "a", "b", "c", "-o", "d", "--alpha", "much"),
        ("port", "a", "b", "c", "-o", "d", "--max-sweeps", "0"),
        ("port", "a", "b", "c", "-o", "d", "--null-trials", "-1"),
        ("port", "a", "b", "c", "-o", "d", "--restarts", "-1"),
        ("match", "a", "b"),
        ("match", "a", "b", "-o", "c", "--seed", "x"),
        ("verify", "a"),
        ("inspect",),
        ("inspect", "a", "--frobnicate"),
        ("methods", "extra"),
        ("frobnicate",),
    ],
)
def test_usage_errors_are_2(arguments: tuple[str, ...]) -> None:
    assert "Usage:" in failed(2, *arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": "nan"}, "alpha is nan"),
        ({"alpha": "inf"}, "alpha is inf"),
        ({"method": "best"}, "unknown method 'best'; known: naive, random, git-rebasin, "),
        ({"family": "gpt9"}, "unknown family 'gpt9'"),
        ({"device": "abacus"}, "device 'abacus'"),
        ({"device": "cuda:99"}, "device 'cuda:99'"),
        ({"maps": "nowhere.safetensors"}, "nowhere.safetensors: not a maps file of transfuse"),
    ],
)
def test_bad_options_are_2(three: tuple[str, str, str], tmp_path: Path, change: dict[str, str], message: str) -> None:
    options = [piece for name, value in change.items() for piece in (f"--{name}", value)]
    said = failed(2, "port", *three, "-o", tmp_path / "out", *FAST, "--json", *options)
    assert said.startswith("transfuse: ") and message in said
    assert not list(tmp_path.iterdir())


def test_bad_models_are_2(three: tuple[str, str, str], tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    for command in (
        ("inspect", missing),
        ("match", three[0], missing, "-o", tmp_path / "maps"),
        ("port", three[0], missing, three[2], "-o", tmp_path / "out"),
        ("verify", three[0], missing),
    ):
        assert str(missing) in failed(2, *command)
    assert "task vector is zero" in failed(2, "port", three[0], three[0], three[2], "-o", tmp_path / "out")
    assert "there is no folder" in failed(2, "match", three[0], three[2], "-o", tmp_path / "no" / "maps", *FAST)
    assert not list(tmp_path.iterdir())


def test_a_failed_verification_is_3(
    three: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Equivalence("BertForMaskedLM", 0.7, ("logits",), "torch.float32", True, False)
    monkeypatch.setattr("transfuse.porting.run.check_equivalence", lambda *_, **__: wrong)
    assert "differs from source by 7.0e-01" in failed(3, "port", *three, "-o", tmp_path / "out", *FAST, "--json")
    assert not list(tmp_path.iterdir())


def test_maps_that_do_not_keep_the_function_are_3(three: tuple[str, str, str], tmp_path: Path) -> None:
    maps = tmp_path / "maps"
    ok("match", three[0], three[2], "-o", maps, *FAST)
    held = Maps.load(maps)
    turn = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    replace(held, spaces={**held.spaces, "mlp.0": Dense(turn)}).save(maps)  # the activation does not commute with it
    result = run("verify", three[0], maps, "--json")
    assert result.exit_code == 3 and "the mapped model differs by" in result.stderr
    report = strict_json(result.stdout)
    assert report["passed"] is False and report["error"] > 1e-3
    assert "verified   FAILED" in run("verify", three[0], maps).stdout
    assert "the maps do not keep the function" in failed(
        3, "port", *three, "-o", tmp_path / "out", "--maps", maps, *FAST
    )
    assert [path.name for path in tmp_path.iterdir()] == ["maps"]


def test_our_own_failure_is_1(three: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fall(self: Climb) -> None:
        raise TransfuseError("the matching objective fell")

    monkeypatch.setattr(Climb, "record", fall)
    assert failed(1, "port", *three, "-o", tmp_path / "out") == "transfuse: the matching objective fell\n"
    assert not list(tmp_path.iterdir())


# --- interrupts and real processes ------------------------------------------------------------------------------------


def test_an_interrupted_port_leaves_nothing(
    three: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Ported.read

    def interrupted(self: Any, out: str) -> torch.Tensor:
        if "encoder.layer.1" in out:
            raise KeyboardInterrupt
        return read(self, out)

    monkeypatch.setattr(Ported, "read", interrupted)
    result = run("port", *three, "-o", tmp_path / "out", *FAST)
    assert result.exit_code == 1 and "Aborted!" in result.stderr and result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_an_interrupted_match_leaves_nothing(
    three: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Path.write_bytes

    def interrupted(path: Path, content: bytes) -> None:
        whole(path, b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    result = run("match", three[0], three[2], "-o", tmp_path / "maps", *FAST)
    assert result.exit_code == 1 and "Aborted!" in result.stderr
    assert not list(tmp_path.iterdir())


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A real run of the console script."""
    command = [str(Path(sys.executable).with_name("transfuse")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_real_process_keeps_stdout_clean(models: dict[str, str], tmp_path: Path) -> None:
    given = models["source"], models["classifier"], models["target"]
    found = process("port", *given, "-o", tmp_path / "out", "--json", *FAST)
    assert found.returncode == 0, found.stderr
    assert strict_json(found.stdout)["carried"] == [
        "bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"
    ]  # fmt: skip
    assert "{" not in found.stderr and "Traceback" not in found.stderr
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["README.md", "config.json", "model.safetensors", "result.json"]


def test_a_real_process_fails_in_one_line(tmp_path: Path) -> None:
    found = process("inspect", tmp_path / "missing", "--json")
    assert found.returncode == 2 and found.stdout == ""
    said = (
        f"transfuse: '{tmp_path / 'missing'}': no such file or folder, and not a hub id (org/name or org/name@revision)"
    )
    assert found.stderr.splitlines() == [said]
