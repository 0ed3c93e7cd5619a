"""Filters as expressions of Milvus, which lets through all photos that pass, and as a rule no others.

Milvus knows neither great circles nor SQL; there more is let through than passes, and `passing.py` tells which.

A comparison with null is neither true nor false, and `not` of it is not true either. So `not` is never written before
a comparison: the opposite one is, and `is null` beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

from searchengine.filters import Filters, prefixes_under
from searchengine.index.circles import box_around
from searchengine.milvus.schema import escaped, folded
from searchengine.query_filters import Joined
from searchengine.query_tree import And, Condition, Not, Or, Query

EVERY, NONE = "", "id < 0"

_WILDCARDS = str.maketrans("%_\\", "___")


class Expression(NamedTuple):
    """`is_exact`: whether what it lets through passes for certain."""

    text: str
    is_exact: bool

    def and_(self, other: str) -> Expression:
        return self if other == EVERY else Expression(_all((self.text, other)), self.is_exact)


def expression_of(filters: Filters | None) -> Expression:
    """Lets through every photo that passes `filters`."""
    return _of_filters(filters, negated=False) if filters else Expression(EVERY, True)


def among(field: str, values: Iterable[int], *, negated: bool = False) -> str:
    """Whether a field is one of some numbers."""
    return f"{field} {'not in' if negated else 'in'} [{', '.join(map(str, values))}]"


def literal(text: str) -> str:
    """A text in an expression. It must be `escaped` where it could hold control characters."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _of_filters(filters: Filters, *, negated: bool) -> Expression:
    given = {field.name: getattr(filters, field.name) for field in fields(filters)}
    parts = [_of_one(name, value, negated) for name, value in given.items() if value is not None]
    return _joined(parts, all_of=not negated)


def _joined(parts: Sequence[Expression], *, all_of: bool) -> Expression:
    text = (_all if all_of else _any)([part.text for part in parts])
    return Expression(text, all(part.is_exact for part in parts))


def _all(texts: Iterable[str]) -> str:
    kept = list(dict.fromkeys(text for text in texts if text != EVERY))
    return EVERY if not kept else NONE if NONE in kept else kept[0] if len(kept) == 1 else f"({' and '.join(kept)})"


def _any(texts: Iterable[str]) -> str:
    kept = list(dict.fromkeys(text for text in texts if text != NONE))
    return NONE if not kept else EVERY if EVERY in kept else kept[0] if len(kept) == 1 else f"({' or '.join(kept)})"


def _of_query(query: Query, negated: bool) -> Expression:
    """A filter inside a query, or its opposite."""
    match query:
        case Not(part):
            return _of_query(part, not negated)
        case And(parts) | Or(parts):
            return _joined([_of_query(part, negated) for part in parts], all_of=isinstance(query, And) != negated)
        case Condition():
            return _of_filters(query.filters, negated=negated)
    raise AssertionError(query)


def _of_one(name: str, value: Any, negated: bool) -> Expression:
    """One field of `Filters`, or its opposite; a photo of which the fact is not known passes the opposite."""
    match name:
        case "after":
            return _comparison("taken_at", "<" if negated else ">=", literal(value), or_null=negated)
        case "before":
            return _comparison("taken_at", ">=" if negated else "<", literal(value), or_null=negated)
        case "under":
            return _under(value, negated)
        case "camera":
            return _camera(value, negated)
        case "near":
            return _near(value, negated)
        case "min_side":
            sides = [_comparison(side, "<" if negated else ">=", str(value)) for side in ("width", "height")]
            return _joined(sides, all_of=not negated)
        case "orientation":
            return _comparison("orientation", "!=" if negated else "==", literal(value))
        case "min_size_bytes":
            return _comparison("size_bytes", "<" if negated else ">=", str(value))
        case "max_size_bytes":
            return _comparison("size_bytes", ">" if negated else "<=", str(value))
        case "tag":
            return _tagged(value, negated)
        case "where" if isinstance(value, Joined):
            return _of_query(value.query, negated)
        case "where":
            return Expression(EVERY, False)
    raise AssertionError(name)


def _under(place: str, negated: bool) -> Expression:
    """As ranges, which an index on the keys serves: LIKE would take some of their characters for wildcards."""
    parts = []
    for prefix in map(escaped, prefixes_under(place)):
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        ends = (
            _comparison("key", "<" if negated else ">=", literal(prefix)),
            _comparison("key", ">=" if negated else "<", literal(end)),
        )
        parts.append(_joined(ends, all_of=not negated))
    return _joined(parts, all_of=negated)


def _comparison(field: str, operator: str, value: str, *, or_null: bool = False) -> Expression:
    text = f"{field} {operator} {value}"
    return Expression(_any((text, f"{field} is null")) if or_null else text, True)


def _camera(part: str, negated: bool) -> Expression:
    """A `%`, `_` or backslash in the name is any character to LIKE, for how to escape it differs between versions."""
    known = escaped(folded(part))
    pattern = known.translate(_WILDCARDS)
    is_exact = pattern == known
    if not part:
        return Expression(f"camera_folded is {'' if negated else 'not '}null", True)
    if negated:
        unlike = _any((f"not (camera_folded like {literal(f'%{pattern}%')})", "camera_folded is null"))
        return Expression(unlike if is_exact else EVERY, is_exact)
    return Expression(f"camera_folded like {literal(f'%{pattern}%')}", is_exact)


def _near(circle: tuple[float, float, float], negated: bool) -> Expression:
    """The box around a circle; outside of it nothing is within the circle, inside nearly all."""
    if negated:
        return Expression(EVERY, False)
    south, north, meridians = box_around(*circle)
    latitude = _all((f"latitude >= {south:.9f}", f"latitude <= {north:.9f}"))
    if meridians is None:
        return Expression(latitude, False)
    longitude = _any(
        _all((f"longitude >= {max(west, -1000):.9f}", f"longitude <= {min(east, 1000):.9f}"))
        for west, east in meridians
    )
    return Expression(_all((latitude, longitude)), False)


def _tagged(labels: tuple[str, ...], negated: bool) -> Expression:
    listed = ", ".join(literal(escaped(label)) for label in dict.fromkeys(labels))
    text = f"array_contains_all(tags, [{listed}])"
    return Expression(f"not {text}" if negated else text, True)
