"""What a client and a service say to each other: questions as fields of the API, answers and problems as objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar

import httpx

from searchengine import errors
from searchengine.errors import (
    AccessError,
    ImageError,
    OverloadError,
    PhotoNotFound,
    SearchEngineError,
    ServiceUnusable,
    StoreUnusable,
    UsageError,
)
from searchengine.filters import Filters
from searchengine.text import printable

Threshold = float | Literal["auto", "none"]
Fields = list[tuple[str, str]]
Record = TypeVar("Record")

PROBLEM = "urn:searchengine:problem:"
# By status, where the type of a problem names no class, or a proxy answered.
BY_STATUS: dict[int, type[SearchEngineError]] = {
    401: AccessError,
    403: AccessError,
    404: PhotoNotFound,
    409: StoreUnusable,
    413: ImageError,
    415: ImageError,
    421: AccessError,
    429: OverloadError,
}


def narrowing(*, k: int, filters: Filters | None, threshold: Threshold) -> Fields:
    """What narrows and cuts an answer. Raises UsageError for a filter that only its own process understands."""
    found: Fields = [("k", str(k)), ("threshold", str(threshold))]
    for field in fields(filters) if filters else ():
        value = getattr(filters, field.name)
        if value is None:
            continue
        if field.name == "where":
            raise UsageError("Filters(where=...) is a condition of this process; a service takes the other filters")
        name = field.name.removesuffix("_bytes")
        if name == "near":
            found.append((name, ",".join(map(repr, value))))
        else:
            found += [(name, str(part)) for part in (value if isinstance(value, tuple) else (value,))]
    return found


def grouped(asked: Fields) -> dict[str, list[str]]:
    """The same, each name once with all its values: what a form or JSON takes."""
    found: dict[str, list[str]] = {}
    for name, value in asked:
        found.setdefault(name, []).append(value)
    return found


def content_of(answer: httpx.Response) -> Any:
    """The JSON of an answer. Raises ServiceUnusable for anything else."""
    try:
        return answer.json()
    except ValueError:
        raise ServiceUnusable(f"{answer.url} did not answer with JSON; is it a searchengine service?") from None


def record_of(kind: type[Record], content: Mapping[str, Any]) -> Record:
    """A dataclass of what was told, without what a newer service tells beyond it. Raises ServiceUnusable."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    try:
        return kind(**{name: value for name, value in content.items() if name in names})
    except TypeError as error:
        raise ServiceUnusable(f"the service did not tell all of a {kind.__name__}: {error}") from None


def error_of(answer: httpx.Response) -> SearchEngineError:
    """What the service met, as the class that it was there."""
    is_problem = answer.headers.get("Content-Type", "").startswith("application/problem+json")
    problem = content_of(answer) if is_problem else {}
    detail = printable(
        str(problem.get("detail") or f"the service answered {answer.status_code} {answer.reason_phrase}")
    )
    kind = getattr(errors, str(problem.get("type", "")).removeprefix(PROBLEM), None)
    if not (isinstance(kind, type) and issubclass(kind, SearchEngineError)):
        kind = BY_STATUS.get(answer.status_code, UsageError if answer.is_client_error else ServiceUnusable)
    if issubclass(kind, OverloadError):
        seconds = answer.headers.get("Retry-After", "")
        return kind(detail, retry_after_seconds=int(seconds) if seconds.isdecimal() else 1)
    return kind(detail)
