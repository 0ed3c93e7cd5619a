"""Photos into classes that are only named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from searchengine.vectors import FloatMatrix
from searchengine.web.answers import ClassificationModel, Json, as_json, problems
from searchengine.web.bodies import described, form_of, json_of
from searchengine.web.opened import Opened
from searchengine.web.requests import Classification, Classifying
from searchengine.web.service import Service, service_of
from searchengine.web.uploads import is_upload, read_upload
from searchengine.zeroshot import probabilities, read_templates

router = APIRouter(tags=["classify"])


@router.post(
    "/api/classify",
    response_model=ClassificationModel,
    responses=problems(400, 404, 408, 413, 415, 422, 429, 503),
    openapi_extra=described(form=Classifying, json=Classification),
)
async def classify(request: Request, service: Annotated[Service, Depends(service_of)]) -> Response:
    """How probably photos of the index (`ids`), or pictures that are sent, are what each label says.

    The probabilities of a photo add up to 1: they tell which label fits best, not whether any does.
    """
    if not is_upload(request):
        asked = await json_of(request, Classification)

        def by_id(opened: Opened) -> bytes:
            rows, vectors = opened.photos(asked.ids)
            return _results(opened, asked, vectors, names=[{"id": row.id, "path": row.key} for row in rows])

        return Json(await service.run(by_id, is_long=True))
    upload = await read_upload(request)
    form = form_of(upload.fields, Classifying)
    if not upload.images:
        raise HTTPException(
            422, "the form has no picture; send it as the file `image`, or name photos by `ids` in JSON"
        )

    def by_picture(opened: Opened) -> bytes:
        vectors = opened.image_vectors(upload.images)
        return _results(opened, form, vectors, names=[{"name": image.name} for image in upload.images])

    return Json(await service.run(by_picture, is_long=True))


def _results(opened: Opened, asked: Classifying, vectors: FloatMatrix, *, names: Sequence[dict[str, Any]]) -> bytes:
    templates = asked.templates or read_templates("simple")
    classes = opened.class_vectors(asked.labels, templates)
    shares = probabilities(vectors, classes, logit_scale=opened.encoder.logit_scale)
    # Vectors are float32: more than six digits would promise what is not known.
    return as_json(
        {
            "results": [
                name | {"probabilities": {label: float(f"{p:.6g}") for label, p in zip(asked.labels, row, strict=True)}}
                for name, row in zip(names, shares.tolist(), strict=True)
            ]
        }
    )
