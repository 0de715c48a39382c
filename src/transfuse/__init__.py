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
    from .methods.match import match
    from .methods.table import METHODS
    from .options.groups import Inputs, Labelled
    from .options.requests import (
        EvaluateRequest,
        FinetuneRequest,
        InspectRequest,
        InterpolateRequest,
        MatchRequest,
        MergeRequest,
        MomentsRequest,
        PortRequest,
        RefineRequest,
        ScaleRequest,
        SweepRequest,
    )
    from .porting.convert import convert
    from .porting.inspection import inspect_models
    from .porting.merge import merge
    from .porting.moments import moments
    from .porting.port import port
    from .porting.run import PortResult
    from .study.evaluation import evaluate, finetune
    from .study.gradfix import refine
    from .study.interpolate import interpolate
    from .study.scale import scale
    from .study.sweep import sweep

_HOMES = {
    "EvaluateRequest": ".options.requests",
    "FinetuneRequest": ".options.requests",
    "Inputs": ".options.groups",
    "InspectRequest": ".options.requests",
    "InterpolateRequest": ".options.requests",
    "Labelled": ".options.groups",
    "METHODS": ".methods.table",
    "Maps": ".maps.collection",
    "MatchRequest": ".options.requests",
    "MergeRequest": ".options.requests",
    "MomentsRequest": ".options.requests",
    "PortRequest": ".options.requests",
    "PortResult": ".porting.run",
    "RefineRequest": ".options.requests",
    "ScaleRequest": ".options.requests",
    "SweepRequest": ".options.requests",
    "convert": ".porting.convert",
    "evaluate": ".study.evaluation",
    "finetune": ".study.evaluation",
    "inspect_models": ".porting.inspection",
    "interpolate": ".study.interpolate",
    "match": ".methods.match",
    "merge": ".porting.merge",
    "moments": ".porting.moments",
    "port": ".porting.port",
    "refine": ".study.gradfix",
    "scale": ".study.scale",
    "sweep": ".study.sweep",
}

__all__ = [
    "METHODS",
    "EvaluateRequest",
    "FinetuneRequest",
    "InputError",
    "Inputs",
    "InspectRequest",
    "InterpolateRequest",
    "Labelled",
    "Maps",
    "MatchRequest",
    "MergeRequest",
    "MomentsRequest",
    "PortRequest",
    "PortResult",
    "RefineRequest",
    "ScaleRequest",
    "SweepRequest",
    "TransfuseError",
    "VerificationError",
    "__version__",
    "convert",
    "evaluate",
    "finetune",
    "inspect_models",
    "interpolate",
    "match",
    "merge",
    "moments",
    "port",
    "refine",
    "scale",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
