"""The mechanism: an option is declared once, with its default, limits and help, as a field of a frozen group.

    @dataclass(frozen=True)
    class Check(Group):
        null_trials: int = option(1, "Shuffled targets of each kind in the null test; 0: none.", minimum=0)

    @dataclass(frozen=True, kw_only=True)
    class PortRequest(Request):
        check: Check = group(Check)

    PortRequest.of(null_trials=3)  # flat names, as keywords of a function and as options of a command

A group checks itself when it is made, wherever it is made. A request is made of groups whose options have names of
their own, so that they can be given flat; of a group it can have some options only, or with another default or help.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self, TypeVar

from ..errors import InputError

REQUIRED: Any = type("Required", (), {"__repr__": lambda _: "REQUIRED"})()
_OPTION, _GROUP = "option", "group"
Other = TypeVar("Other", bound="Request")


@dataclass(frozen=True)
class Option:
    """A declaration.

    Attributes:
        default: the value when none is given; where it is None, None may be given too. `REQUIRED`: there is none.
        help: one line for people.
        kind: `bool`, `int`, `float`, `str`, `Path`, or `object` for what is checked where it is opened.
        name: how it is called in a request and, with dashes, on the command line; None: as the field.
        choices: the only values of a `str`.
        minimum, maximum, above: limits of a number; `above` is not allowed itself.
        words: given in place of a number ("cv").
        many: a sequence of values; the command line takes them with commas between ("commas"), or one by one
            ("repeated").
        empty: whether such a sequence can be of none.
        exists: of a path: the command line insists that the folder is there.
        metavar: how the command line's help calls the value.
        flags: on the command line, if not `--name`; none at all for what only Python can give.
        expert: listed apart from the everyday options.
    """

    default: Any
    help: str
    kind: type
    name: str | None = None
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    words: tuple[str, ...] = ()
    many: str | None = None
    empty: bool = False
    exists: bool = False
    metavar: str | None = None
    flags: tuple[str, ...] | None = None
    expert: bool = False

    def checked(self, name: str, value: Any) -> Any:
        """The value as the option holds it: whole numbers of a `float` as floats, paths as `Path`, lists as tuples.

        Raises:
            InputError: it is none that is allowed.
        """
        if value is None and self.default is None:
            return None
        if self.many is None:
            if (found := self._one(value)) is not None:
                return found[0]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            each = [self._one(one) for one in value]
            if all(each) and (each or self.empty):
                return tuple(one[0] for one in each if one)
        raise InputError(f"{name} {'are' if self.many else 'is'} {_shown(value)}; {self.allowed()} needed")

    def _one(self, value: Any) -> tuple[Any] | None:
        """The value in a tuple, or None if it is not allowed."""
        if self.kind is object or (isinstance(value, str) and value in self.words):
            return (value,)
        if self.kind is Path:
            return (Path(value),) if isinstance(value, str | os.PathLike) else None
        if self.kind in (int, float):
            return self._number(value)
        fits = isinstance(value, self.kind) and (not self.choices or value in self.choices)
        return (value,) if fits else None

    def _number(self, value: Any) -> tuple[Any] | None:
        whole = self.kind is int
        if isinstance(value, bool) or not isinstance(value, Integral if whole else Real):
            return None
        try:
            number = self.kind(value)
        except OverflowError:
            return None
        if not (whole or math.isfinite(number)):
            return None
        low = (self.minimum is None or number >= self.minimum) and (self.above is None or number > self.above)
        return (number,) if low and (self.maximum is None or number <= self.maximum) else None

    def allowed(self) -> str:
        """What may be given, in words that " needed" can follow."""
        if self.choices:
            return f"one of {', '.join(self.choices)} is"
        if self.kind not in (int, float):
            said = {bool: "True or False", str: "a text", Path: "a path"}[self.kind]
            return f"a list of such is ({said})" if self.many else f"{said} is"
        words = "".join(f", or {word!r}," for word in self.words)
        if self.many:
            rest = filter(None, ["all finite" * (self.kind is float), "at least one" * (not self.empty)])
            return f"{self._numbers('numbers')}, {' and '.join(rest)}{words}, are"
        return f"{self._numbers('a whole number' if self.kind is int else 'a finite number')}{words} is"

    def _numbers(self, what: str) -> str:
        limits = (("of at least", self.minimum), ("above", self.above), ("up to", self.maximum))
        return " ".join([what, *(f"{word} {limit}" for word, limit in limits if limit is not None)])


def _shown(value: Any) -> str:
    return repr(list(value)) if isinstance(value, tuple) else repr(value)


def option(
    default: Any, help: str, *, kind: type | None = None, flags: str | Sequence[str] | None = None, **rest: Any
) -> Any:
    """A field of a group, with its declaration.

    Args:
        default, help: see `Option`.
        kind: see `Option`; by default that of `default`.
        flags: see `Option`; one, or several.
        **rest: further attributes of `Option`.
    """
    given = (flags,) if isinstance(flags, str) else None if flags is None else tuple(flags)
    declared = Option(default, help, kind or type(default), flags=given, **rest)
    if default is REQUIRED:
        return field(metadata={_OPTION: declared})
    return field(default=default, metadata={_OPTION: declared})


@dataclass(frozen=True)
class Group:
    """Options that belong together; a subclass has fields made by `option`.

    Raises:
        InputError: a value is not what its declaration allows; the message names the option, the value and what is.
    """

    def __post_init__(self) -> None:
        for name, (key, declared) in self.declared().items():
            object.__setattr__(self, key, declared.checked(name, getattr(self, key)))
        self.check()

    def check(self) -> None:
        """Raises InputError if values do not go together."""

    @classmethod
    def declared(cls) -> dict[str, tuple[str, Option]]:
        """Name of an option in a request -> its field and its declaration."""
        return {_name(one): (one.name, one.metadata[_OPTION]) for one in fields(cls)}


def _name(one: Any) -> str:
    return one.metadata[_OPTION].name or one.name


def group(cls: type[Group], *, leave: Sequence[str] = (), **changes: dict[str, Any]) -> Any:
    """A field of a request: a group, by default with the defaults of its options.

    Args:
        cls: the group.
        leave: names of options that the request does not have; they keep their defaults.
        **changes: name of an option -> attributes of its declaration that are others in this request.
    """
    asked = {
        name: (key, replace(declared, **changes.get(name, {})))
        for name, (key, declared) in cls.declared().items()
        if name not in leave
    }
    metadata = {_GROUP: (cls, asked)}
    defaults = {key: declared.default for key, declared in asked.values()}
    if any(default is REQUIRED for default in defaults.values()):
        return field(metadata=metadata)
    return field(default_factory=lambda: cls(**defaults), metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that can be asked of one function beside what it works on; a subclass has fields made by `group`.

    Raises:
        InputError: a group is of another class, or asks for what the request does not have.
    """

    def __post_init__(self) -> None:
        for place, (cls, asked) in self.groups().items():
            given = getattr(self, place)
            if not isinstance(given, cls):
                raise InputError(f"{place} is {given!r}; a {cls.__name__} is needed")
            for name, (key, declared) in cls.declared().items():
                if name not in asked and getattr(given, key) != declared.default:
                    raise InputError(_unknown(name, list(self.declared())))

    @classmethod
    def groups(cls) -> dict[str, tuple[type[Group], dict[str, tuple[str, Option]]]]:
        """Field -> class of the group, and of its options those that can be asked for (see `Group.declared`)."""
        return {one.name: one.metadata[_GROUP] for one in fields(cls)}

    @classmethod
    def declared(cls) -> dict[str, tuple[str, str, Option]]:
        """Name of an option -> its group, its field there and its declaration.

        Raises:
            TypeError: two groups have an option of one name.
        """
        found: dict[str, tuple[str, str, Option]] = {}
        for place, (_, asked) in cls.groups().items():
            for name, (key, declared) in asked.items():
                if name in found:
                    raise TypeError(f"{cls.__name__}: option {name!r} is in {found[name][0]!r} and in {place!r}")
                found[name] = (place, key, declared)
        return found

    @classmethod
    def asked(cls, request: Self | None, options: Mapping[str, Any]) -> Self:
        """What a function is asked for: its request, or none, and options over it; see `of`.

        Raises:
            InputError: as `of`, or the request of another function.
        """
        if request is None:
            return cls.of(**options)
        if not isinstance(request, cls):
            raise InputError(f"request is {request!r}; a {cls.__name__} is needed")
        return request.changed(**options)

    @classmethod
    def of(cls, **options: Any) -> Self:
        """A request from options by their names, and from whole groups by theirs.

        Raises:
            InputError: there is no such option, its value is not allowed, or a required one is missing.
        """
        found, flat = cls._sorted(options)
        for place, (inside, asked) in cls.groups().items():
            for name, (_, declared) in asked.items():
                if place not in found and declared.default is REQUIRED and name not in flat:
                    raise InputError(f"{name} is needed: {declared.help}")
            defaults = {key: declared.default for key, declared in asked.values()}
            changes = {key: flat[name] for name, (key, _) in asked.items() if name in flat}
            found[place] = replace(found[place], **changes) if place in found else inside(**{**defaults, **changes})
        return cls(**found)

    def changed(self, **options: Any) -> Self:
        """The same with some options, or whole groups, changed; see `of`."""
        found, flat = self._sorted(options)
        for place, (_, asked) in self.groups().items():
            if changes := {key: flat[name] for name, (key, _) in asked.items() if name in flat}:
                found[place] = replace(found.get(place, getattr(self, place)), **changes)
        return replace(self, **found) if found else self

    @classmethod
    def _sorted(cls, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Whole groups, and options by their names."""
        known, groups = cls.declared(), cls.groups()
        whole = {name: one for name, one in options.items() if name in groups and isinstance(one, Group)}
        flat = {name: one for name, one in options.items() if name not in whole}
        for name in flat:
            if name not in known:
                raise InputError(_unknown(name, list(known)))
        return whole, flat

    def shared(self, cls: type[Other], **groups: Group) -> Other:
        """Another request with all options that both have, and these groups in place of their own."""
        found = dict(groups)
        for place, (inside, asked) in cls.groups().items():
            if place not in found and place in self.groups():
                mine, own = self.groups()[place][1], getattr(self, place)
                found[place] = inside(**{key: getattr(own, key) for name, (key, _) in asked.items() if name in mine})
        return cls(**found)

    def flat(self) -> dict[str, Any]:
        """All options by their names."""
        return {name: getattr(getattr(self, place), key) for name, (place, key, _) in self.declared().items()}


def _unknown(name: str, known: Sequence[str]) -> str:
    return f"no option {name!r}; {near_or_known(name, known)}"


def near_or_known(name: str, known: Sequence[str]) -> str:
    """For a message on a name that is not known: those that are near, or all."""
    from difflib import get_close_matches  # only a mistake needs it

    near = get_close_matches(name, known, n=3)
    return f"{'near' if near else 'known'}: {', '.join(near or known)}"
