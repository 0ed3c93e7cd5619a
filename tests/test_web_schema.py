"""The API held against its own description: it is asked what fits the OpenAPI document, and what does not.

Whatever is sent, no answer is an error of the service's own, and each has a status, a type and a body that the document
tells of.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from conftest import painted
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving import opened_service

from indexer import build
from searchengine.models.registry import load_encoder
from searchengine.web.app import create_app
from searchengine.web.security import Access

PHOTOS = 6
PICTURE = io.BytesIO()
painted(0).save(PICTURE, "PNG")
# What is asked in place of random values that can only be refused; other fields of no such form may stay.
ANSWERABLE = {"q": "a dog on a beach", "ids": [1, PHOTOS], "image": [PICTURE.getvalue()]}
PLAIN = ANSWERABLE.keys() | {"not", "k", "min_side", "size", "labels", "token"}

CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    home = tmp_path_factory.mktemp("described")
    (home / "photos").mkdir()
    for number in range(PHOTOS):
        painted(number).save(home / "photos" / f"{number}.png")
    build(home / "index", [home / "photos"], encoder=load_encoder("mini"))
    with opened_service(home / "index", home=home) as service:
        # Not through a socket: how long an address may be, and the like, is the server's affair.
        yield schemathesis.openapi.from_asgi(
            "/openapi.json", create_app(service, Access(allowed_hosts=("testserver",)))
        )


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.name.lower())
def test_whatever_is_asked_the_answer_is_as_the_document_says(api: Any, mode: GenerationMode) -> None:
    for operation in [found.ok() for found in api.get_all_operations()]:
        statuses = statuses_of(operation, mode)
        if mode is GenerationMode.POSITIVE and operation.path != "/login":  # for that, nobody need know a token
            assert min(statuses) < 400, f"{operation.label} was never asked anything that it could answer"


def statuses_of(operation: Any, mode: GenerationMode) -> set[int]:
    """What a number of requests were answered with; some of the fitting ones are made so that they can be answered."""
    statuses = set()

    @settings(max_examples=10, phases=[Phase.generate])
    @given(case=operation.as_strategy(generation_mode=mode), is_plain=st.booleans())
    def ask(case: Any, is_plain: bool) -> None:
        if mode is GenerationMode.POSITIVE and is_plain:
            make_plain(case)
        # In a form everything is text: `false` for one is a word to search for.
        is_form = (case.media_type or "").endswith(("form-data", "urlencoded"))
        checks = CHECKS if is_form else [*CHECKS, negative_data_rejection]
        statuses.add(int(case.call_and_validate(checks=checks).status_code))

    with suppress(Unsatisfiable):  # of what takes nothing, nothing can be wrong
        ask()
    return statuses


def make_plain(case: Any) -> None:
    """Turn what fits the document into what the service has an answer to, too."""
    if "id" in case.path_parameters:
        case.path_parameters["id"] = case.path_parameters["id"] % PHOTOS + 1
    for part in (case.query, case.body):
        if isinstance(part, dict):
            for name in part.keys() - PLAIN:
                del part[name]
            part.update({name: value for name, value in ANSWERABLE.items() if name in part})
            if case.path == "/api/search" and "image" not in part:
                part["q"] = "a dog on a beach"
