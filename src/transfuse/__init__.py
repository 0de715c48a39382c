"""transfuse: carry a fine-tune over to a new release of its base model, without retraining.

The names below are the public interface. Each is imported when it is first used, so that `import transfuse` and the
command line's help cost next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import InputError, TransfuseError, VerificationError

if TYPE_CHECKING:
    from .maps.collection import Maps
    from .methods.match import MatchOptions, match
    from .methods.table import METHODS
    from .porting.port import port
    from .porting.run import PortResult

_HOMES = {
    "METHODS": ".methods.table",
    "Maps": ".maps.collection",
    "MatchOptions": ".methods.match",
    "PortResult": ".porting.run",
    "match": ".methods.match",
    "port": ".porting.port",
}

__all__ = [
    "METHODS",
    "InputError",
    "Maps",
    "MatchOptions",
    "PortResult",
    "TransfuseError",
    "VerificationError",
    "__version__",
    "match",
    "port",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
