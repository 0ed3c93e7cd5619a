"""Filters inside a query, joined by AND, OR and NOT: taken out of it where all its photos must pass; and as SQL."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import sqlalchemy as sa

from searchengine.filters import Filters
from searchengine.index.filters import condition_of
from searchengine.query_logic import is_filter
from searchengine.query_tree import And, Condition, Not, Or, Query


@dataclass(frozen=True)
class Joined:
    """Conditions joined, as `Filters.where`: SQLAlchemy takes it for SQL, and Milvus reads the `query`."""

    query: Query

    def __clause_element__(self) -> sa.ColumnElement[bool]:
        return _sql(self.query)

    @property
    def as_sql(self) -> sa.ColumnElement[bool]:
        """Itself, for SQLAlchemy asks it for SQL where that is needed."""
        return cast("sa.ColumnElement[bool]", self)

    @property
    def filters(self) -> Filters:
        return Filters(where=self.as_sql)


def narrowed(query: Query, filters: Filters | None) -> tuple[Query | None, Filters | None]:
    """A query less the filters that all its photos must pass, None where nothing else is left; and all such filters."""
    parts = query.parts if isinstance(query, And) else (query,)
    given = filters or Filters()
    joined: list[Query] = []
    for part in parts:
        if isinstance(part, Condition) and getattr(given, part.field) is None:
            given = replace(given, **{part.field: getattr(part.filters, part.field)})
        elif is_filter(part):
            joined.append(part)
    if joined:
        where = Joined(And(tuple(joined)) if len(joined) > 1 else joined[0]).as_sql
        given = replace(given, where=where if given.where is None else sa.and_(given.where, where))
    others = tuple(part for part in parts if not is_filter(part))
    rest = And(others) if len(others) > 1 else others[0] if others else None
    return rest, given if given else None


def _sql(query: Query) -> sa.ColumnElement[bool]:
    """A filter as a condition on `images`."""
    match query:
        case Condition():
            return condition_of(query.filters)
        case Not(part):
            # A photo whose facts are not known passes no filter, so it passes the opposite.
            return sa.func.coalesce(_sql(part), sa.false()) == sa.false()
        case And(parts):
            return sa.and_(*map(_sql, parts))
        case Or(parts):
            return sa.or_(*map(_sql, parts))
    raise AssertionError(query)
