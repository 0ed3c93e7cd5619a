"""What those who run the service ask."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.responses import Response

from searchengine.index.status import run_under_way, status_of
from searchengine.web.answers import Json, StatusModel, as_json, problems
from searchengine.web.opened import Opened
from searchengine.web.problems import problem_of
from searchengine.web.service import Service, service_of

router = APIRouter(tags=["operations"])
Serving = Annotated[Service, Depends(service_of)]


@router.get("/healthz")
async def healthz() -> Response:
    """The process lives."""
    return Json({"status": "alive"})


@router.get("/readyz", responses=problems(503))
async def readyz(service: Serving) -> Response:
    """Index and encoder are loaded, and the index can be searched."""
    return Json({"status": "ready"}) if service.trouble is None else problem_of(service.trouble)


@router.get("/api/status", response_model=StatusModel, responses=problems(429, 503))
async def status(service: Serving) -> Response:
    """What is in the index, and what is being done to it."""

    def look(opened: Opened) -> bytes:
        return as_json(status_of(opened.index) | {"indexing": run_under_way(opened.index)})

    return Json(await service.run(look))


@router.get("/metrics", response_class=Response)
async def metrics(service: Serving) -> Response:
    """Prometheus's text format."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
