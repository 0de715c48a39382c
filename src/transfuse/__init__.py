"""transfuse: carry a fine-tune over to a new release of its base model, without retraining."""

__version__ = "0.1.0"

from .errors import InputError, TransfuseError, VerificationError
from .maps import Maps
from .match import MatchOptions, match
from .methods import METHODS
from .port import PortResult, port

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
