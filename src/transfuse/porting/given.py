"""What a user gave, held against the models: maps of an earlier run, and the place for the output."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import InputError
from ..maps.algebra import PerHead, Rectangular
from ..maps.collection import Maps
from ..methods.table import METHODS, Method
from ..models.model import Models
from ..options.groups import AUTO, Match


def refuse_inputs(models: Models, out: Path, maps: Maps | str | os.PathLike[str] | None) -> None:
    """An output in the place of an input, or around one, would destroy what it is made of.

    Raises:
        InputError: it would.
    """
    places = [(model.role, model.checkpoint.root) for model in models.all() if model.checkpoint.root is not None]
    if isinstance(maps, str | os.PathLike):
        places.append(("maps file", Path(maps)))
    for role, place in places:
        if place.resolve().is_relative_to(out.resolve()):
            raise InputError(f"{out} is where the {role} lies ({place}); give another place for the output")


def method_of_maps(maps: Maps, asked: str = AUTO) -> Method:
    """The method that made some maps.

    Args:
        asked: the method that the caller named beside them, or auto.

    Raises:
        InputError: it is unknown here, or another one than was asked for.
    """
    if maps.method not in METHODS:
        raise InputError(f"the maps were made by method {maps.method!r}, which this version does not know")
    if asked not in (AUTO, maps.method):
        raise InputError(
            f"the maps were made by method {maps.method!r} and method {asked!r} is asked for: maps bring their method "
            "along, so leave it out, or match again with the other one"
        )
    return METHODS[maps.method]


def given_maps(match: Match) -> Maps | None:
    """The maps of an earlier run, read if they are in a file; None: they are to be found.

    Raises:
        InputError: the file cannot be read, or another method than theirs is asked for.
    """
    maps = Maps.load(match.maps) if isinstance(match.maps, str | os.PathLike) else match.maps
    if maps is not None:
        method_of_maps(maps, match.method)
    return maps


def check_maps(models: Models, maps: Maps) -> Maps:
    """The maps, if they were made for these bases.

    Raises:
        InputError: they were made for others.
    """
    for model, wanted in ((models.source, maps.source), (models.target, maps.target)):
        if wanted != model.checkpoint.fingerprint():
            raise InputError(
                f"the maps were made for another {model.role} than {model.checkpoint.location} (fingerprints differ): "
                "match these two bases again"
            )
    if maps.family != models.layout.family:
        raise InputError(f"the maps are of family {maps.family!r}, the models of {models.layout.family!r}")
    spaces = models.layout.with_ties(streams=maps.streams, tie_qkv=maps.tie_qkv).spaces
    for name, one in maps.spaces.items():
        heads = len(one.inner) if isinstance(one, PerHead) else None
        wanted = None if METHODS[maps.method].form.flattens_heads else spaces[name].heads if name in spaces else None
        sized = isinstance(one, Rectangular) and models.resizing is not None
        fits = name in spaces and one.size == spaces[name].size and (sized or heads == wanted)
        if not fits:
            raise InputError(f"the map of space {name!r} does not fit the models: the maps file is damaged")
    return maps
