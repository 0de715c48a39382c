"""What carries the units of one model onto the units of another: the algebra of maps, and maps for a whole model."""

from .algebra import Coupling, Dense, Identity, Map, Orthogonal, PerHead, Permutation, Rectangular, map_from_tensors
from .collection import FORMAT_VERSION, Maps, check_maps_output

__all__ = [
    "FORMAT_VERSION",
    "Coupling",
    "Dense",
    "Identity",
    "Map",
    "Maps",
    "Orthogonal",
    "PerHead",
    "Permutation",
    "Rectangular",
    "check_maps_output",
    "map_from_tensors",
]
