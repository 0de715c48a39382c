"""The unlabelled inputs of a run: light to import, since most runs have none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .inputs import Prepared


@dataclass(frozen=True)
class Unlabelled:
    """The unlabelled inputs of a run, processed for target.

    Attributes:
        task: of what is carried over; None: there are none.
        keep: those on which target shall stay as it is; None: there are none.
        keep_weight: of these beside the others.
    """

    task: Prepared | None = None
    keep: Prepared | None = None
    keep_weight: float = 1.0
