"""Packages of the extra `bench`, imported only where they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import InputError


def need(module: str) -> Any:
    """A module of an optional package.

    Raises:
        InputError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(
            f"{package} cannot be imported ({error}); install what evaluation needs: pip install 'transfuse[bench]'"
        ) from error
