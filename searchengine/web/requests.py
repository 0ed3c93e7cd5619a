"""What can be asked for, as parameters of a URL, fields of a form or JSON, and the question that they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from searchengine.conditions import CONDITIONS
from searchengine.errors import QueryError, UsageError
from searchengine.filters import Filters, Orientation
from searchengine.vectors import FloatMatrix

MAX_K = 1000
MAX_PARTS = 32
MAX_CHARACTERS = 10_000
MAX_LABELS = 1000
MAX_TEMPLATES = 100
MAX_CLASSIFIED = 1000

PhotoId = Annotated[int, Field(ge=1, lt=2**63)]
Words = Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS)]
Threshold = Literal["auto", "none"] | FiniteFloat


class Narrowing(BaseModel):
    """The filters, and which part of the answer is wanted."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    after: Words | None = Field(None, description="Taken then or later: 2024, 2024-05, 2024-05-31, today.")
    before: Words | None = Field(None, description="Taken before then.")
    under: Words | None = Field(None, description="Only photos below this folder.")
    camera: Words | None = Field(None, description="A part of the camera's name.")
    near: Words | None = Field(None, description="LAT,LON,KM: taken at most so far from a place.")
    min_side: Annotated[int, Field(ge=1, le=10**9)] | None = Field(None, description="Pixels of the shorter side.")
    orientation: Orientation | None = None
    min_size: Words | None = Field(None, description="Files of so many bytes or more; 300K, 2M, 1G will do.")
    max_size: Words | None = Field(None, description="Files of so many bytes or less.")
    tag: list[Words] = Field(default=[], max_length=MAX_PARTS, description="Tags, all of which a photo must have.")
    k: int = Field(50, ge=1, le=MAX_K, description="How many photos.")
    cursor: Annotated[str, Field(max_length=200)] | None = Field(None, description="From the page before.")
    threshold: Threshold = Field(
        "none", description="Which photos to tell of: auto: only matches; a number: only scores of at least that."
    )

    def conditions(self) -> tuple[tuple[str, str], ...]:
        """Names of filters and their values as they are written in a query."""
        single = ("after", "before", "under", "camera", "near", "min_side", "orientation", "min_size", "max_size")
        given = [(name.replace("_", "-"), getattr(self, name)) for name in single]
        return (
            *((name, str(value)) for name, value in given if value is not None),
            *(("tag", tag) for tag in self.tag),
        )


class SearchParameters(Narrowing):
    """What to look for: `q`, `like`, or both."""

    q: Words | None = Field(None, description="A description, or an expression of the query language.")
    like: list[PhotoId] = Field(default=[], max_length=MAX_PARTS, description="Ids of photos to be like.")
    unwanted: list[Words] = Field(
        default=[], alias="not", max_length=MAX_PARTS, description="Descriptions of what to avoid."
    )

    def question(self, *, pictures: Sequence[bytes] = (), vector: FloatMatrix | None = None) -> Question:
        """`pictures` are the sha256 of those that were sent, `vector` is (dim,)."""
        return Question(
            q=self.q,
            like=tuple(self.like),
            unwanted=tuple(self.unwanted),
            conditions=self.conditions(),
            threshold=self.threshold,
            pictures=tuple(pictures),
            vector=None if vector is None else vector.tobytes(),
        )


class VectorSearch(SearchParameters):
    """The body of a search by a vector of the index's own encoder."""

    vector: list[FiniteFloat] | None = Field(
        None, min_length=1, max_length=65_536, fail_fast=True, description="Of length 1."
    )

    def question(self, *, pictures: Sequence[bytes] = (), vector: FloatMatrix | None = None) -> Question:
        """What is asked for, with the vector."""
        with np.errstate(over="ignore"):  # infinity, which is refused as no unit vector
            own = None if self.vector is None else np.array(self.vector, np.float32)
        return super().question(pictures=pictures, vector=own if vector is None else vector)


class Classifying(BaseModel):
    """The labels to choose from."""

    model_config = ConfigDict(extra="forbid")

    labels: list[Words] = Field(min_length=1, max_length=MAX_LABELS)
    templates: list[Words] = Field(default=[], max_length=MAX_TEMPLATES, description="Prompts, with {} for the label.")


class Classification(Classifying):
    """Photos of the index, and the labels to choose from."""

    ids: list[PhotoId] = Field(min_length=1, max_length=MAX_CLASSIFIED)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked for, whichever part of the answer is wanted: equal questions have equal answers.

    `like` are ids of photos, `pictures` sha256 of what was sent, `vector` float32 numbers.
    """

    q: str | None = None
    like: tuple[int, ...] = ()
    unwanted: tuple[str, ...] = ()
    conditions: tuple[tuple[str, str], ...] = ()
    threshold: str | float = "none"
    pictures: tuple[bytes, ...] = ()
    vector: bytes | None = None

    @property
    def is_vector(self) -> bool:
        """Whether a vector alone is asked for."""
        return self.vector is not None and self.q is None and not (self.like or self.pictures or self.unwanted)

    @property
    def size_bytes(self) -> int:
        """At least what it takes in memory, for those who keep it: a character may take four bytes."""
        said = (self.q, self.like, self.unwanted, self.conditions, self.pictures)
        return 4 * len(repr(said)) + len(self.vector or b"")

    def filters(self) -> Filters | None:
        """Raises QueryError for a value that makes no sense. It looks at the disk: not for the event loop."""
        values: dict[str, Any] = {}
        for name, value in self.conditions:
            field, read = CONDITIONS[name]
            try:
                values[field] = (*values.get("tag", ()), value) if name == "tag" else read(value)
            except UsageError as error:
                raise QueryError(f"{name.replace('-', '_')}: {error}") from None
        return Filters(**values) if values else None
