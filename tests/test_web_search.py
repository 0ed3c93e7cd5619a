"""Searches and classifications over HTTP: what the library finds, in pages that neither repeat nor lose a photo."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
from conftest import painted
from fakes import FakeEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Answer, Server, serving_index

import indexer
import searchengine.web.opened
from indexer.lock import LockedIndex
from indexer.tags import TaggingRequest, write_tags
from searchengine import Filters, Searcher, open_index
from searchengine.errors import QueryError
from searchengine.hits import MATCH
from searchengine.index.status import status_of
from searchengine.pictures import Picture
from searchengine.query import Image, Sum, parse
from searchengine.web.cursors import Cursor
from searchengine.web.requests import Question
from searchengine.zeroshot import class_vectors, probabilities

PHOTOS = 40
ODD_NAME = os.fsdecode(b"caf\xe9.png")  # not UTF-8


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`photos` of two shapes in two folders, two of them copies of others, and their `index` by a fake encoder."""
    folder = tmp_path_factory.mktemp("library")
    for number in range(PHOTOS - 2):
        shape = {"width": 60, "height": 40} if number % 2 else {"width": 40, "height": 80}
        place = folder / "photos" / ("even" if number % 2 == 0 else "odd")
        place.mkdir(parents=True, exist_ok=True)
        painted(number, **shape).save(place / f"{number:02}.png")
    painted(1).save(folder / "photos" / "copy.png")
    painted(3).save(folder / "photos" / ODD_NAME)
    indexer.build(folder / "index", [folder / "photos"], encoder=FakeEncoder(), isolated=False)
    tags = TaggingRequest(labels=["cat", "dog"], templates=["{}"], top=1, min_probability=0.0)
    write_tags(folder / "index", tags, encoder=FakeEncoder())
    return folder


@pytest.fixture(scope="module")
def server(library: Path) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searchengine.web.opened, "load_encoder", lambda *_, **__: FakeEncoder())
        with serving_index(library / "index", home=library) as server:
            yield server


@pytest.fixture(scope="module")
def searcher(library: Path) -> Iterator[Searcher]:
    with open_index(library / "index") as index:
        yield Searcher(index, FakeEncoder())


def get(server: Server, path: str = "/api/search", **parameters: Any) -> Answer:
    named = {name.rstrip("_"): value for name, value in parameters.items()}
    return server.ask(f"{path}?{urlencode(named, doseq=True)}")


def post(server: Server, values: dict[str, Any], *, path: str = "/api/search") -> Answer:
    return server.ask(
        path, method="POST", headers=[("Content-Type", "application/json")], body=json.dumps(values).encode()
    )


def send(server: Server, *files: bytes, path: str = "/api/search", **fields: str) -> Answer:
    """A form with pictures."""
    parts = [f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()]
    head = b'Content-Disposition: form-data; name="image"; filename="p.png"\r\nContent-Type: image/png\r\n\r\n'
    parts += [head + file for file in files]
    body = b"".join(b"--limit\r\n" + part + b"\r\n" for part in parts) + b"--limit--\r\n"
    kind = "multipart/form-data; boundary=limit"
    return server.ask(path, method="POST", headers=[("Content-Type", kind)], body=body)


def hits_of(answer: Answer) -> list[dict[str, Any]]:
    assert answer.status == 200, answer.body
    assert set(answer.json) == {"hits", "cursor", "matches"}
    hits: list[dict[str, Any]] = answer.json["hits"]
    return hits


def ids_of(answer: Answer) -> list[int]:
    return [hit["id"] for hit in hits_of(answer)]


def assert_problem(answer: Answer, status: int, kind: str, *said: str) -> None:
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json
    assert {"type", "title", "status", "detail"} <= set(problem)
    assert problem["status"] == status
    assert problem["type"].rpartition(":")[2] == kind
    for words in said:
        assert words in problem["detail"]


# -- what is found


def test_a_text_finds_what_the_library_finds_with_the_keys_of_the_command_line(
    server: Server, searcher: Searcher
) -> None:
    found = hits_of(get(server, q="a dog", k=7))
    assert found == [vars(hit) for hit in searcher.search("a dog", k=7)]
    assert list(found[0]) == "rank score relevance id store path taken_at width height".split()
    assert len(hits_of(get(server, q="a dog"))) == PHOTOS, "50 unless k says otherwise"


def test_names_that_are_not_utf_8_are_told_as_they_are(server: Server, library: Path) -> None:
    answer = get(server, q="a dog")
    assert str(library / "photos" / ODD_NAME) in [hit["path"] for hit in hits_of(answer)]
    assert answer.body.isascii()


def test_expressions_photos_and_unwanted_texts_combine_as_in_the_library(server: Server, searcher: Searcher) -> None:
    found = hits_of(get(server, q="2:dog - cat", like=[3, 4], not_=["snow", "rain"], k=9))
    tree = parse("2:dog - cat")
    assert isinstance(tree, Sum)
    expected = searcher.search_query(tree, images=[3, 4], without=["snow", "rain"], k=9)
    assert found == [vars(hit) for hit in expected]
    assert not {3, 4} & {hit["id"] for hit in found}
    query = "(dog OR NOT cat) AND orientation:portrait"
    assert hits_of(get(server, q=query, k=9)) == [vars(hit) for hit in searcher.search_query(query, k=9)]
    assert_problem(get(server, q=query, not_="snow"), 400, "QueryError", "AND NOT")
    assert ids_of(get(server, like=[3, 4])) == [hit.id for hit in searcher.search_images([3, 4], k=50)]


def test_a_photo_is_similar_to_others_but_not_to_itself_and_its_copies(server: Server, searcher: Searcher) -> None:
    copies = [hit["id"] for hit in hits_of(get(server, q="a dog")) if hit["path"].endswith(("copy.png", "odd/01.png"))]
    assert len(copies) == 2
    found = get(server, f"/api/images/{copies[0]}/similar", k=5, orientation="portrait")
    expected = searcher.similar(copies[0], k=5, filters=Filters(orientation="portrait"))
    assert hits_of(found) == [vars(hit) for hit in expected]
    assert not set(copies) & set(ids_of(get(server, f"/api/images/{copies[0]}/similar", k=1000)))


@pytest.mark.parametrize("target", ["/api/images/999/similar", "/api/search?like=999", "/api/search?q=id:999"])
def test_a_photo_that_is_not_known_is_not_found(target: str, server: Server) -> None:
    assert_problem(server.ask(target), 404, "PhotoNotFound", "999")


@pytest.mark.parametrize(
    ("parameters", "filters"),
    [
        ({"orientation": "landscape"}, Filters(orientation="landscape")),
        ({"min_side": 60}, Filters(min_side=60)),
        ({"tag": ["cat"]}, Filters(tag="cat")),
        ({"tag": ["cat", "dog"]}, Filters(tag=("cat", "dog"))),
        ({"after": "2023"}, Filters(after="2023")),
        ({"before": "2023-05", "camera": "X"}, Filters(before="2023-05", camera="X")),
        ({"near": "48.86,2.35,10"}, Filters(near=(48.86, 2.35, 10))),
        ({"min_size": "300", "max_size": "1K"}, Filters(min_size_bytes=300, max_size_bytes=1024)),
    ],
)
def test_a_filter_narrows_as_in_the_library(
    parameters: dict[str, Any], filters: Filters, server: Server, searcher: Searcher
) -> None:
    assert ids_of(get(server, q="a dog", **parameters)) == [
        hit.id for hit in searcher.search("a dog", k=50, filters=filters)
    ]


def test_photos_below_a_folder_are_found_alone(server: Server, library: Path) -> None:
    found = hits_of(get(server, q="a dog", under=library / "photos" / "even"))
    assert len(found) == (PHOTOS - 2) / 2
    assert all("/even/" in hit["path"] for hit in found)


# -- pages

QUESTIONS: list[dict[str, Any]] = [
    {"q": "a dog"},
    {"q": "dog AND NOT cat"},
    {"like": [5]},
    {"q": "dog", "orientation": "portrait"},
    {"q": "dog", "threshold": "auto"},
    {"q": "dog", "threshold": "0.05"},
    {"q": "dog OR cat", "threshold": "0.05"},
]


@settings(max_examples=25)
@given(question=st.sampled_from(QUESTIONS), sizes=st.lists(st.integers(1, 17), min_size=1, max_size=5))
def test_pages_neither_repeat_nor_lose_a_photo(question: dict[str, Any], sizes: list[int], server: Server) -> None:
    whole = get(server, **question, k=1000)
    assert whole.json["cursor"] is None
    hits: list[dict[str, Any]] = []
    cursor: dict[str, str] = {}
    for number in range(PHOTOS + 1):
        page = get(server, **question, k=sizes[number % len(sizes)], **cursor)
        hits += hits_of(page)
        assert page.json["matches"] == whole.json["matches"]
        if page.json["cursor"] is None:
            break
        cursor = {"cursor": page.json["cursor"]}
    assert hits == hits_of(whole)


@pytest.mark.parametrize("depths", [(2, 5), (3, 3)])
def test_pages_are_the_same_however_deep_a_ranking_goes_at_first(
    depths: tuple[int, int], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("searchengine.web.paging.DEPTHS", depths)
    for question in QUESTIONS:
        another = question | {"min_side": depths[0]}  # which all photos pass, and no ranking is known of
        page = get(server, **another, k=3)
        hits = hits_of(page)
        while page.json["cursor"]:
            page = get(server, **another, k=3, cursor=page.json["cursor"])
            hits += hits_of(page)
        assert page.json["matches"] <= len(get(server, **question, k=1000).json["hits"])
        assert hits == hits_of(get(server, **question, k=1000))


def test_a_threshold_keeps_matches_or_scores_and_ranks_stay(server: Server) -> None:
    every = hits_of(get(server, q="dog"))
    matches = [hit for hit in every if hit["relevance"] >= MATCH]
    answer = get(server, q="dog", threshold="auto")
    assert hits_of(answer) == matches
    assert answer.json["matches"] == len(matches)
    good = [hit for hit in every if hit["score"] >= 0.1]
    assert hits_of(get(server, q="dog", threshold="0.1")) == good
    assert 0 < len(good) < len(every)
    query = "dog OR cat"  # in the order of probabilities, not of scores
    good = [hit for hit in hits_of(get(server, q=query)) if hit["score"] >= 0.1]
    assert hits_of(get(server, q=query, threshold="0.1")) == good


def test_a_cursor_belongs_to_its_query(server: Server) -> None:
    cursor = get(server, q="a dog", k=3).json["cursor"]
    assert len(hits_of(get(server, q="a dog", k=5, cursor=cursor))) == 5, "k may change"
    for other in ({"q": "a cat"}, {"q": "a dog", "threshold": "auto"}, {"q": "a dog", "not_": "x"}, {"like": [1]}):
        assert_problem(get(server, **other, cursor=cursor), 400, "QueryError", "another query")
    assert_problem(get(server, "/api/images/1/similar", cursor=cursor), 400, "QueryError", "another query")


@given(text=st.text(st.characters(codec="utf-8"), max_size=60) | st.binary(max_size=48).map(lambda data: data.hex()))
def test_what_is_no_cursor_is_refused(text: str) -> None:
    with pytest.raises(QueryError):
        Cursor.read(text, "a question")


@given(offset=st.integers(0, 2**40), matches=st.integers(0, 1000), state=st.binary(min_size=8, max_size=8))
def test_a_cursor_is_read_as_it_was_written(offset: int, matches: int, state: bytes) -> None:
    cursor = Cursor(offset=offset, matches=matches, state=state)
    assert Cursor.read(cursor.text("a question"), "a question") == cursor


def test_a_cursor_far_beyond_the_end_leads_to_an_empty_page(server: Server) -> None:
    far = Cursor(offset=2**40, matches=0, state=bytes(8)).text(Question(q="a dog"))
    answer = get(server, q="a dog", cursor=far)
    assert (hits_of(answer), answer.json["cursor"]) == ([], None)


# -- what is refused


def test_no_query_names_a_file_of_the_server_nor_learns_whether_there_is_one(server: Server, library: Path) -> None:
    there, not_there = library / "photos" / "copy.png", library / "photos" / "none.png"
    assert isinstance(parse(str(there)), Image), "on the command line it is a picture"
    for form in ("{}", "{} + dog", "2:{}", "dog AND {}", "({})"):
        for path in (there, not_there, "/etc/passwd", "~/.bashrc", "./x.png"):
            assert get(server, q=form.format(path)).status == 200, "plain text"
    for path in (there, not_there):
        assert_problem(get(server, q=f'image:"{path}"'), 400, "QueryError", "column 1", "no file is read here")
        assert_problem(get(server, q=f"dog AND image:{path}"), 400, "QueryError", "column 9")


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"q": "dog", "after": "soon"}, "after: 'soon' is no date"),
        ({"q": "dog", "near": "here"}, "near: 'here' is not LAT,LON,KM"),
        ({"q": "dog", "min_size": "big"}, "min_size: 'big' is no size"),
        ({"q": "dog AND"}, "column 5"),
        ({"q": "orientation:portrait"}, "nothing but filters"),
        ({"q": " "}, "the query is empty"),
        ({}, "the query is empty"),
        ({"not_": "dog"}, "the query is empty"),
    ],
)
def test_a_query_that_makes_no_sense_is_refused_with_the_reason(
    parameters: dict[str, Any], said: str, server: Server
) -> None:
    assert_problem(get(server, **parameters), 400, "QueryError", said)


@pytest.mark.parametrize(
    "parameters",
    [
        *({"k": k} for k in (0, 1001, "x", ["1", "2"])),
        *({"like": like} for like in ("x", 0, 2**63, [1] * 33)),
        *({"threshold": threshold} for threshold in ("nan", "some")),
        {"limit": 5},
        {"orientation": "round"},
        {"min_side": 0},
        {"q": "x" * 10_001},
    ],
    ids=lambda parameters: str(parameters)[:30],
)
def test_a_value_of_the_wrong_form_is_refused_by_the_name_of_its_field(
    parameters: dict[str, Any], server: Server
) -> None:
    answer = get(server, **{"q": "dog"} | parameters)
    assert_problem(answer, 422, "blank")
    assert {one["field"].split(".")[0] for one in answer.json["errors"]} == set(parameters)


# -- pictures and vectors


def test_a_picture_that_is_sent_finds_what_is_like_it(server: Server, searcher: Searcher, library: Path) -> None:
    known = library / "photos" / "even" / "08.png"
    found = send(server, known.read_bytes(), k="5")
    assert hits_of(found) == [vars(hit) for hit in searcher.search_image(known, k=5)]
    following = send(server, known.read_bytes(), k="5", cursor=found.json["cursor"])
    assert [hit["rank"] for hit in hits_of(following)] == [6, 7, 8, 9, 10]
    other = (library / "photos" / "even" / "10.png").read_bytes()
    assert_problem(send(server, other, cursor=found.json["cursor"]), 400, "QueryError", "another query")
    both = send(server, known.read_bytes(), other)
    paths = [known, library / "photos" / "even" / "10.png"]
    assert hits_of(both) == [vars(hit) for hit in searcher.search_images(paths, k=50)]


def test_a_picture_that_is_not_indexed_joins_texts_and_filters(
    server: Server, searcher: Searcher, tmp_path: Path
) -> None:
    painted(4711).save(tmp_path / "new.png")
    data = (tmp_path / "new.png").read_bytes()
    found = send(server, data, q="a dog", orientation="portrait", k="4")
    expected = searcher.search_combined(
        texts=["a dog"], images=[tmp_path / "new.png"], k=4, filters=Filters(orientation="portrait")
    )
    assert [hit["id"] for hit in hits_of(found)] == [hit.id for hit in expected]
    np.testing.assert_allclose([hit["score"] for hit in hits_of(found)], [hit.score for hit in expected], atol=1e-6)


def test_a_vector_finds_what_is_near_it(server: Server, searcher: Searcher) -> None:
    vector = searcher.image_vector(7)
    found = post(server, {"vector": vector.tolist(), "k": 5})
    assert hits_of(found) == [vars(hit) for hit in searcher.search_vector(vector, k=5)]
    following = post(server, {"vector": vector.tolist(), "k": 5, "cursor": found.json["cursor"]})
    assert [hit["rank"] for hit in hits_of(following)] == [6, 7, 8, 9, 10]
    joined = post(server, {"vector": vector.tolist(), "q": "a dog", "not": ["snow"], "like": [9]})
    expected = searcher.ranker.rank_query(
        parse("a dog"), images=[9, Picture(vector, None)], without=["snow"], count=PHOTOS
    )
    assert ids_of(joined) == expected.photos.tolist()
    assert_problem(post(server, {"vector": [1.0, 0.0]}), 400, "UsageError", "(n, 16)")
    assert_problem(post(server, {"vector": (2 * vector).tolist()}), 400, "UsageError", "length")
    assert_problem(post(server, {"vector": [1e300] * 16}), 400, "UsageError", "finite")
    assert_problem(post(server, {"vector": [1.0, 0.0], "q": "a dog"}), 400, "UsageError", "(n, 16)")
    assert_problem(post(server, {"vector": "x"}), 422, "blank")
    assert_problem(post(server, {}), 400, "QueryError", "empty")


def test_bodies_of_other_kinds_are_refused(server: Server) -> None:
    form = [("Content-Type", "application/x-www-form-urlencoded")]
    assert_problem(server.ask("/api/search", method="POST", headers=form, body=b"q=dog"), 415, "blank")
    json_type = [("Content-Type", "application/json")]
    for body in (b"", b"{", b"[]", b"\xff", b'{"q": "\\ud800"}'):
        assert_problem(server.ask("/api/search", method="POST", headers=json_type, body=body), 422, "blank")
    assert_problem(send(server, q="a dog"), 400, "QueryError", "no picture")
    assert_problem(send(server, b"<svg/>"), 422, "ImageError", "p.png: not a picture")
    assert_problem(send(server, b"", k="many"), 422, "blank", "k:")


# -- classification


def test_photos_of_the_index_are_classified_by_their_vectors(server: Server, searcher: Searcher) -> None:
    labels = ["dog", "cat", "a, b"]
    answer = post(server, {"labels": labels, "ids": [3, 1], "templates": ["a {}.", "the {}."]}, path="/api/classify")
    assert answer.status == 200
    classes = class_vectors(FakeEncoder(), labels, templates=["a {}.", "the {}."])
    vectors = np.stack([searcher.image_vector(3), searcher.image_vector(1)])
    expected = probabilities(vectors, classes, logit_scale=FakeEncoder().logit_scale)
    for photo, result, shares in zip([3, 1], answer.json["results"], expected, strict=True):
        assert (result["id"], set(result)) == (photo, {"id", "path", "probabilities"})
        np.testing.assert_allclose(list(result["probabilities"].values()), shares, rtol=1e-5)
        assert list(result["probabilities"]) == labels
    assert_problem(post(server, {"labels": ["a"], "ids": [1, 999]}, path="/api/classify"), 404, "PhotoNotFound", "999")
    assert_problem(post(server, {"labels": ["a", "a"], "ids": [1]}, path="/api/classify"), 400, "UsageError", "once")
    assert_problem(post(server, {"labels": [], "ids": [1]}, path="/api/classify"), 422, "blank", "labels")


def test_pictures_that_are_sent_are_classified_by_the_same_rule(server: Server, library: Path) -> None:
    picture = library / "photos" / "even" / "08.png"
    (by_picture,) = send(server, picture.read_bytes(), path="/api/classify", labels="dog").json["results"]
    assert by_picture == {"name": "p.png", "probabilities": {"dog": 1.0}}
    assert_problem(send(server, path="/api/classify", labels="dog"), 422, "blank", "no picture")


# -- what runs the service is told


def test_status_tells_what_the_command_line_does_and_whether_a_run_writes(
    server: Server, searcher: Searcher, library: Path
) -> None:
    told = server.ask("/api/status").json
    assert told.pop("indexing") is None
    assert told == json.loads(json.dumps(status_of(searcher.index)))
    with LockedIndex(library / "index") as locked:
        locked.begin_run()
        assert set(server.ask("/api/status").json["indexing"]) == {"started_at"}
    assert server.ask("/api/status").json["indexing"] is None, "it ended without a word, and lost its lock"


def test_health_metrics_and_the_description_of_the_api(server: Server) -> None:
    assert server.ask("/healthz").status == server.ask("/readyz").status == 200
    get(server, q="a word that nobody asked for yet")
    metrics = server.ask("/metrics").body.decode()
    for stage in ("queue", "encode", "search", "rows"):
        assert f'searchengine_stage_seconds_count{{stage="{stage}"}}' in metrics
    assert f"searchengine_index_vectors {float(PHOTOS - 2)}" in metrics
    assert 'route="/api/images/{id}/similar",status="404"' in metrics, "templates, not what was asked"
    assert "searchengine_queue_depth 0.0" in metrics
    document = server.ask("/openapi.json").json
    assert {"/api/search", "/api/images/{id}/similar", "/api/classify", "/api/status"} <= set(document["paths"])
    assert_problem(server.ask("/no/such/place"), 404, "blank")
    assert_problem(server.ask("/api/search", method="DELETE"), 405, "blank")
