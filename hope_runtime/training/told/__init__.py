"""Kinds of facts that people tell a chat model about themselves, in the words of many.

Each `*.toml` here holds kinds of one area of life: what the fact may be, seven ways or more to
tell it, two to say that it has changed, six to ask for it, and one to answer. A share of the kinds,
of the values and of the phrasings is kept from training, each by the hash of its text.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

from hope_runtime.training import facts
from hope_runtime.training.facts import held_out as held_out_value
from hope_runtime.training.told import names

__all__ = ["Kind", "held_out_kind", "held_out_phrase", "held_out_value", "kinds", "read"]

KINDS_HELD_OUT = 12  # of a hundred
PHRASES_HELD_OUT = 12


def held_out_kind(name: str) -> bool:
    """Tell whether no fact of this kind is ever trained on."""
    return crc32(b"kind " + name.encode()) % 100 < KINDS_HELD_OUT


def held_out_phrase(template: str) -> bool:
    """Tell whether a way to tell or to ask is kept from training."""
    return crc32(b"phrase " + template.encode()) % 100 < PHRASES_HELD_OUT


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fact; `{}` in a template stands for the value."""

    name: str
    values: tuple[str, ...]
    tells: tuple[str, ...]
    updates: tuple[str, ...]
    asks: tuple[str, ...]
    answers: tuple[str, ...]


@cache
def kinds() -> tuple[Kind, ...]:
    """Return all kinds that come with the package, ordered by name."""
    return read(Path(__file__).parent.glob("*.toml"))


def read(files: Iterable[Path]) -> tuple[Kind, ...]:
    """Return the kinds in some files, ordered by name; what several say of one is put together.

    Raises:
        ValueError: a file is not one of kinds.
    """
    found: dict[str, Kind] = {}
    for file in files:
        try:
            for fields in tomllib.loads(file.read_text(encoding="utf-8"))["kind"]:
                kind = _kind(fields)
                found[kind.name] = _together(found[kind.name], kind) if kind.name in found else kind
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file.name}: not a file of kinds of facts: {error}") from error
    return tuple(found[name] for name in sorted(found))


def _together(one: Kind, other: Kind) -> Kind:
    both = {
        field.name: tuple(dict.fromkeys((*getattr(one, field.name), *getattr(other, field.name))))
        for field in dataclass_fields(Kind)
        if field.name != "name"
    }
    return Kind(one.name, **both)


def _kind(fields: dict[str, Any]) -> Kind:
    values = fields["values"]
    return Kind(
        name=fields["name"],
        values=listed(values) if isinstance(values, str) else tuple(values),
        tells=tuple(fields["tells"]),
        updates=tuple(fields["updates"]),
        asks=tuple(fields["asks"]),
        answers=tuple(fields["answers"]),
    )


def listed(name: str) -> tuple[str, ...]:
    """Return a list of values by its name; "numbers 1 9" and "years 1950 2020" are made.

    >>> listed("numbers 2 4")
    ('2', '3', '4')
    """
    match name.split():
        case ["numbers" | "years", first, last]:
            return tuple(str(number) for number in range(int(first), int(last) + 1))
        case [one] if one in _LISTS:
            return _LISTS[one]
    raise ValueError(f"there is no list of values called {name!r}")


_LISTS = {
    "first_names": facts.NAMES,
    "full_names": names.FULL,
    "surnames": names.SURNAMES,
    "pet_names": facts.PETS,
    "made_up_names": names.MADE_UP,
    "cities": facts.CITIES,
    "countries": facts.COUNTRIES,
    "languages": facts.LANGUAGES,
    "colours": facts.COLOURS,
    "foods": facts.FOODS,
    "drinks": facts.DRINKS,
    "fruits": facts.FRUITS,
    "vegetables": facts.VEGETABLES,
    "animals": facts.ANIMALS,
    "flowers": facts.FLOWERS,
    "trees": facts.TREES,
    "sports": facts.SPORTS,
    "hobbies": facts.HOBBIES,
    "instruments": facts.INSTRUMENTS,
    "films": facts.FILMS,
    "books": facts.BOOKS,
    "music_styles": facts.MUSIC,
    "jobs": facts.JOBS,
    "months": facts.MONTHS,
    "weekdays": names.WEEKDAYS,
    "dates": facts.DAYS,
    "times": facts.TIMES,
}
