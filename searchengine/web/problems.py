"""Errors as problem details (RFC 9457): one body for whatever goes wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from searchengine.errors import (
    AccessError,
    ImageError,
    IndexUnusable,
    ModelUnusable,
    OverloadError,
    PhotoNotFound,
    SearchEngineError,
    UsageError,
)
from searchengine.web.answers import Json

# The first class that an error is of decides.
STATUSES: Sequence[tuple[type[SearchEngineError], HTTPStatus]] = (
    (PhotoNotFound, HTTPStatus.NOT_FOUND),
    (UsageError, HTTPStatus.BAD_REQUEST),
    (ImageError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (AccessError, HTTPStatus.UNAUTHORIZED),
    (OverloadError, HTTPStatus.TOO_MANY_REQUESTS),
    (IndexUnusable, HTTPStatus.SERVICE_UNAVAILABLE),
    (ModelUnusable, HTTPStatus.SERVICE_UNAVAILABLE),
    (SearchEngineError, HTTPStatus.INTERNAL_SERVER_ERROR),
)
INTERNAL = "the service made a mistake; its log tells which"


def problem(
    status: int,
    detail: str,
    *,
    kind: str = "about:blank",
    errors: Sequence[Mapping[str, Any]] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An answer that tells what is wrong. `kind` is a URI; `errors` are the fields that are."""
    content: dict[str, Any] = {"type": kind, "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    if errors:
        content["errors"] = list(errors)
    return Json(content, status_code=status, headers=headers, media_type="application/problem+json")


def problem_of(error: SearchEngineError) -> Response:
    """The answer for an error of errors.py; `type` names its class."""
    status = next(status for kind, status in STATUSES if isinstance(error, kind))
    headers = {"Retry-After": str(error.retry_after_seconds)} if isinstance(error, OverloadError) else None
    return problem(status, str(error), kind=f"urn:searchengine:problem:{type(error).__name__}", headers=headers)


def tell_problems(app: FastAPI) -> None:
    """Have `app` answer every error so."""

    async def known(_: Request, error: Exception) -> Response:
        assert isinstance(error, SearchEngineError)
        return problem_of(error)

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return problem(error.status_code, error.detail, headers=error.headers)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        fields = [{"field": _field(one["loc"]), "detail": one["msg"]} for one in error.errors()]
        detail = "; ".join(f"{one['field']}: {one['detail']}" for one in fields)
        return problem(HTTPStatus.UNPROCESSABLE_ENTITY, detail, errors=fields)

    async def unknown(_: Request, error: Exception) -> Response:
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, INTERNAL)  # the server logs it

    app.add_exception_handler(SearchEngineError, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, unknown)


def _field(location: Sequence[str | int]) -> str:
    """The name of a field, without where it was looked for: query, path or body."""
    return ".".join(str(part) for part in location[1:]) or "body"
