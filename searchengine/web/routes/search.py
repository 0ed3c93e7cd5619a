"""Searches: by words, by photos of the index, by pictures that are sent, by vectors."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request
from starlette.responses import Response

from searchengine.errors import QueryError
from searchengine.web.answers import HitsModel, Json, problems
from searchengine.web.bodies import described, described_query, form_of, json_of, query_of
from searchengine.web.requests import Narrowing, PhotoId, Question, SearchParameters, VectorSearch
from searchengine.web.service import Service, service_of
from searchengine.web.uploads import is_upload, read_upload

router = APIRouter(tags=["search"])
Serving = Annotated[Service, Depends(service_of)]

ANSWERS: dict[str, Any] = {"response_model": HitsModel, "responses": problems(400, 404, 422, 429, 503)}
UPLOAD_ANSWERS = ANSWERS | {"responses": ANSWERS["responses"] | problems(408, 413, 415)}


@router.get("/api/search", **ANSWERS, openapi_extra=described_query(SearchParameters))
async def search(request: Request, service: Serving) -> Response:
    """The photos that a description, photos of the index, or both ask for, best first."""
    asked = query_of(request, SearchParameters)
    return Json(await service.answer(asked.question(), k=asked.k, cursor=asked.cursor))


@router.post("/api/search", **UPLOAD_ANSWERS, openapi_extra=described(form=SearchParameters, json=VectorSearch))
async def search_by_picture(request: Request, service: Serving) -> Response:
    """The photos most like pictures that are sent, or nearest to a vector; the other fields are those of GET."""
    if not is_upload(request):
        asked = await json_of(request, VectorSearch)
        return Json(await service.answer(asked.question(), k=asked.k, cursor=asked.cursor))
    upload = await read_upload(request)
    form = form_of(upload.fields, SearchParameters)
    if not upload.images:
        raise QueryError("the form has no picture; send it as the file `image`, or search without one by GET")
    question = form.question(pictures=[image.content_hash for image in upload.images])
    return Json(await service.answer(question, k=form.k, cursor=form.cursor, images=upload.images))


@router.get("/api/images/{id}/similar", **ANSWERS, openapi_extra=described_query(Narrowing))
async def similar(image_id: Annotated[PhotoId, Path(alias="id")], request: Request, service: Serving) -> Response:
    """The photos most like one of the index, less that and its copies."""
    asked = query_of(request, Narrowing)
    question = Question(like=(image_id,), conditions=asked.conditions(), threshold=asked.threshold)
    return Json(await service.answer(question, k=asked.k, cursor=asked.cursor))
