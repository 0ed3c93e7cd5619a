"""What a query asks for, as a tree of plain values. `str` of a tree is a query that `parse` turns into an equal one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from searchengine.conditions import CONDITIONS, filters_of
from searchengine.filters import Filters
from searchengine.pictures import absolute
from searchengine.query_tokens import quoted

MAX_WEIGHT, WEIGHT_DECIMALS = 1000, 6

PLAIN_VALUE = re.compile(r'[^\s"()]+')


@dataclass(frozen=True)
class Text:
    """Photos that `text` describes."""

    text: str

    def __str__(self) -> str:
        return quoted(self.text)


@dataclass(frozen=True)
class Image:
    """Photos like the picture in a file, or at a URL; a `path` is made absolute at once."""

    path: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", absolute(self.path))

    def __str__(self) -> str:
        return f"image:{_value(self.path)}"


@dataclass(frozen=True)
class Photo:
    """Photos like the indexed one with this id."""

    id: int

    def __str__(self) -> str:
        return f"id:{self.id}"


@dataclass(frozen=True)
class Term:
    """A part of a sum, and how much it counts; below 0, how much it counts against."""

    weight: float
    part: Vector

    def __str__(self) -> str:
        number = f"{self.weight:.{WEIGHT_DECIMALS}f}".rstrip("0").rstrip(".")
        return f"{'' if self.weight == 1 else f'{number}:'}{_grouped(self.part, Sum)}"


@dataclass(frozen=True)
class Sum:
    """Photos near the weighted sum of the unit vectors of its terms, which is made a unit vector again."""

    terms: tuple[Term, ...]

    def __str__(self) -> str:
        first, *others = self.terms
        signed = (f" {'-' if term.weight < 0 else '+'} {Term(abs(term.weight), term.part)}" for term in others)
        return f"{first}{''.join(signed)}"


@dataclass(frozen=True)
class Condition:
    """Photos that pass a filter, by its name in `CONDITIONS`. Dates and folders become absolute at once.

    Raises UsageError for a value that makes no sense.
    """

    name: str
    value: str

    def __post_init__(self) -> None:
        found = getattr(self.filters, self.field)
        if isinstance(found, str):
            object.__setattr__(self, "value", found)

    @property
    def field(self) -> str:
        """Its name in `Filters`."""
        return CONDITIONS[self.name][0]

    @property
    def filters(self) -> Filters:
        return filters_of(self.name, self.value)

    def __str__(self) -> str:
        return f"{self.name}:{_value(self.value)}"


@dataclass(frozen=True)
class Not:
    part: Query

    def __str__(self) -> str:
        return f"NOT {_grouped(self.part, And, Or)}"


@dataclass(frozen=True)
class And:
    parts: tuple[Query, ...]

    def __str__(self) -> str:
        return " AND ".join(_grouped(part, And, Or) for part in self.parts)


@dataclass(frozen=True)
class Or:
    parts: tuple[Query, ...]

    def __str__(self) -> str:
        return " OR ".join(_grouped(part, Or) for part in self.parts)


Vector = Text | Image | Photo | Sum
Query = Vector | Condition | Not | And | Or


def leaves_of(query: Query) -> Iterator[Text | Image | Photo | Condition]:
    """The texts, pictures and filters of a query, from left to right."""
    match query:
        case Sum(terms):
            for term in terms:
                yield from leaves_of(term.part)
        case Not(part):
            yield from leaves_of(part)
        case And(parts) | Or(parts):
            for part in parts:
                yield from leaves_of(part)
        case _:
            yield query


def shows_pictures(query: Query) -> bool:
    """Whether a picture is part of it."""
    return any(isinstance(leaf, Image | Photo) for leaf in leaves_of(query))


def _value(text: str) -> str:
    return text if PLAIN_VALUE.fullmatch(text) else quoted(text)


def _grouped(query: Query, *kinds: type) -> str:
    return f"({query})" if isinstance(query, kinds) else str(query)
