"""The command `transfuse`. Data goes to stdout, words and progress to stderr.

Exit codes: 0 ok, 1 failure, 2 usage or bad input, 3 a verification failed.
"""

from __future__ import annotations

import signal

from . import analysis as analysis
from . import bench as bench
from . import convert as convert
from . import evaluation as evaluation
from . import moments as moments
from . import porting as porting
from .common import app as app


def main() -> None:
    """Entry point of the console script."""
    # As Ctrl-C, so that half-written outputs are cleaned away.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
