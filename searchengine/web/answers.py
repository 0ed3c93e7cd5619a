"""What the service answers: the models that the OpenAPI document describes, and JSON as it is sent."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response


class Json(Response):
    """Any plain value. Paths may hold bytes that are not UTF-8 (PEP 383), so whatever is not ASCII is escaped."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return content if isinstance(content, bytes) else as_json(content)


def as_json(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


class HitModel(BaseModel):
    """A photo that was found."""

    rank: int = Field(description="Counts from 1 for the best.")
    score: float = Field(description="Cosine to what was asked for.")
    relevance: float = Field(description="Probability in [0, 1] that the photo matches; from 0.5 on it counts as one.")
    id: int
    store: str
    path: str
    taken_at: str | None = Field(description="ISO 8601, the camera's local time.")
    width: int
    height: int


class HitsModel(BaseModel):
    """A page of hits."""

    hits: list[HitModel]
    cursor: str | None = Field(description="Send it with the same query for the next page; null: there is none.")
    matches: int = Field(description="How many photos match, of the best 1,000.")


class StatusModel(BaseModel):
    """What `searchengine status --json` tells; `indexing`: the run that writes the index now, null where none does."""

    model_config = ConfigDict(extra="allow")

    images: int
    vectors: int
    segments: int
    failures: int
    model: str
    fingerprint: str
    dim: int
    index_kind: str
    recall_at_10: float
    size_bytes: int
    last_run: dict[str, Any] | None
    indexing: dict[str, Any] | None


class ClassifiedModel(BaseModel):
    """A photo, by its id or the name it was sent with, and the probability of each label."""

    id: int | None = None
    path: str | None = None
    name: str | None = None
    probabilities: dict[str, float]


class ClassificationModel(BaseModel):
    results: list[ClassifiedModel]


class ProblemModel(BaseModel):
    """Problem details (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[dict[str, str]] | None = None


PROBLEM = {"application/problem+json": {"schema": ProblemModel.model_json_schema()}}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI document: with which statuses a route may tell what is wrong."""
    return {status: {"description": "What is wrong.", "content": PROBLEM} for status in statuses}
