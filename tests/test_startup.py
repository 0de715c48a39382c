"""What is loaded, and when: help and `import transfuse` load nothing heavy, and names stay what they are."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from typing import Any

import pytest

import transfuse
from transfuse.cli.common import app

HEAVY = {"torch", "transformers", "scipy", "pydantic", "numpy", "tqdm", "yaml", "safetensors", "huggingface_hub"}


def loaded(code: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after some code."""
    program = f"import json, sys\n{code}\nprint(json.dumps([n for n in sys.modules if '.' not in n]), file=sys.stderr)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return HEAVY & set(json.loads(found.stderr.splitlines()[-1]))


def command(*arguments: str) -> str:
    return f"from transfuse.cli import app\ntry: app({list(arguments)})\nexcept SystemExit as end: assert not end.code"


def test_import_loads_nothing_heavy() -> None:
    assert not loaded("import transfuse\ndir(transfuse)\ntransfuse.InputError, transfuse.__version__")
    assert loaded("import transfuse\ntransfuse.port") >= {"torch"}  # and the check would see it


def test_help_of_every_command_loads_nothing_heavy() -> None:
    assert not loaded("\n".join(command(*one, "--help") for one in ((), *((name,) for name in app.commands))))
    assert not loaded(command("--version"))


def test_the_list_of_methods_loads_nothing_heavy() -> None:
    assert not loaded(command("methods"))
    assert not loaded(command("methods", "--json"))


def test_wrong_use_loads_nothing_heavy() -> None:
    wrong = "from transfuse.cli import app\ntry: app(['port', 'a', 'b', 'c', '--alpha', 'x'])\nexcept SystemExit: pass"
    assert not loaded(wrong)


def test_every_public_name_stays_what_it_is_when_all_modules_are_loaded() -> None:
    """A submodule sets an attribute of its name on its package when it is imported, over whatever is there."""
    before = {name: getattr(transfuse, name) for name in transfuse.__all__}
    for one in pkgutil.walk_packages(transfuse.__path__, "transfuse."):
        if one.name != "transfuse.__main__":
            importlib.import_module(one.name)
    after = {name: getattr(transfuse, name) for name in transfuse.__all__}
    assert before == after
    assert {name for name in transfuse.__all__ if isinstance(after[name], type(transfuse))} == set()
    assert callable(transfuse.match) and callable(transfuse.port)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _: Any = transfuse.nothing  # pyright: ignore
