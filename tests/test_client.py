"""The client against a real service on loopback: it gives what the library gives, and fails as the library fails."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import httpx
import numpy as np
import pytest
from conftest import painted
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from serving import serving_index

import indexer
import searchengine
from searchengine.client import Client
from searchengine.errors import (
    AccessError,
    ImageError,
    OverloadError,
    PhotoNotFound,
    QueryError,
    SearchEngineError,
    ServiceUnusable,
    UsageError,
)
from searchengine.filters import ORIENTATIONS, Filters
from searchengine.index.schema import images
from searchengine.search import Searcher
from searchengine.web.requests import SearchParameters
from searchengine.wire import grouped, narrowing

ROOT = Path(__file__).parent.parent
API = (ROOT / "docs" / "api.md").read_text("utf-8")
TOKEN = "a-token-for-tests"
PHOTOS = 24


@dataclass(frozen=True)
class Served:
    client: Client
    searcher: Searcher
    url: str
    folder: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(PHOTOS):
        width, height = ((90, 60), (60, 90), (64, 64))[seed % 3]
        below = folder / ("even" if seed % 2 == 0 else "odd")
        below.mkdir(exist_ok=True)
        painted(seed, width=width, height=height).save(below / f"{seed}.jpg")
    encoder = searchengine.load_encoder("mini")
    library = tmp_path_factory.mktemp("library")
    indexer.build(library / "index", [folder], encoder=encoder)
    with (
        serving_index(library / "index", home=library, token=TOKEN) as server,
        Client(server.address, token=TOKEN) as client,
        searchengine.open_index(library / "index") as index,
    ):
        yield Served(client, Searcher(index, encoder), server.address, folder)


def test_a_text_finds_what_the_library_finds(served: Served) -> None:
    assert served.client.search("a red pattern", k=7) == served.searcher.search("a red pattern", k=7)


def test_an_indexed_photo_finds_what_the_library_finds(served: Served) -> None:
    assert served.client.similar(3, k=5) == served.searcher.similar(3, k=5)


def test_a_vector_finds_what_the_library_finds(served: Served) -> None:
    vector = served.searcher.index.vector(1)
    assert served.client.search_vector(vector, k=5) == served.searcher.search_vector(vector, k=5)


def test_a_picture_finds_what_the_library_finds_however_it_is_given(served: Served, tmp_path: Path) -> None:
    picture = painted(1000)
    picture.save(tmp_path / "new.png")
    expected = served.searcher.search_image(tmp_path / "new.png", k=5)
    for given_as in (tmp_path / "new.png", str(tmp_path / "new.png"), (tmp_path / "new.png").read_bytes(), picture):
        found = served.client.search_image(given_as, k=5)
        assert [hit.id for hit in found] == [hit.id for hit in expected]
        assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-6)


@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "I", "CMYK", "YCbCr", "HSV", "LAB", "F"])
def test_an_image_of_any_mode_is_sent(served: Served, mode: str) -> None:
    assert len(served.client.search_image(painted(3).convert("L" if mode in "IF" else "RGB").convert(mode), k=3)) == 3


def test_a_file_whose_name_is_no_text_is_sent(served: Served, tmp_path: Path) -> None:
    photo = tmp_path / os.fsdecode(b"caf\xe9.png")
    painted(1).save(photo)
    (found,) = served.client.classify(["red", "blue"], images=[photo])
    assert found.name is not None
    assert found.name.startswith("caf")


def test_a_picture_that_is_indexed_does_not_find_itself(served: Served) -> None:
    own = served.searcher.index.image(5)
    assert own is not None
    assert 5 not in [hit.id for hit in served.client.search_image(own.key, k=PHOTOS)]


def test_texts_photos_and_what_is_unwanted_go_together(served: Served) -> None:
    found = served.client.search("a red pattern", like=[2, 3], without=["blue", "a dog"], k=6)
    expected = served.searcher.search_combined(texts=["a red pattern"], images=[2, 3], without=["blue", "a dog"], k=6)
    assert found == expected


@pytest.mark.parametrize("k", [1, 5, PHOTOS - 1, PHOTOS, 1000])
def test_pages_neither_repeat_nor_lose_a_photo(served: Served, k: int) -> None:
    paged = list(served.client.search("a red pattern", k=k).all_hits())
    assert paged == served.searcher.search("a red pattern", k=PHOTOS)


@pytest.mark.parametrize("ask", ["similar", "vector", "image"])
def test_every_kind_of_search_has_pages(served: Served, ask: str) -> None:
    vector = served.searcher.index.vector(1)
    page = {
        "similar": lambda k: served.client.similar(1, k=k),
        "vector": lambda k: served.client.search_vector(vector, k=k),
        "image": lambda k: served.client.search_image(painted(1000), k=k),
    }[ask]
    assert list(page(7).all_hits()) == list(page(1000))


def test_a_threshold_ends_the_pages(served: Served) -> None:
    every = served.searcher.search("a red pattern", k=PHOTOS)
    score = every[9].score
    assert list(served.client.search("a red pattern", k=4, threshold=score).all_hits()) == every[:10]
    matches = served.client.search("a red pattern", k=4, threshold="auto")
    assert list(matches.all_hits()) == [hit for hit in every if hit.relevance >= 0.5]
    assert matches.matches == len(list(matches.all_hits()))


@pytest.mark.parametrize("filters", [
    Filters(orientation="portrait"),
    Filters(min_side=64),
    Filters(max_size_bytes=1),
    Filters(after="2100"),
    Filters(near=(48.86, 2.35, 20.0)),
    Filters(tag=("dog", "cat")),
])  # fmt: skip
def test_filters_narrow_as_in_the_library(served: Served, filters: Filters) -> None:
    expected = served.searcher.search("a red pattern", k=PHOTOS, filters=filters)
    assert list(served.client.search("a red pattern", k=5, filters=filters).all_hits()) == expected


def test_a_folder_narrows_as_in_the_library(served: Served) -> None:
    found = served.client.search("a red pattern", k=PHOTOS, filters=Filters(under=str(served.folder / "odd")))
    assert len(found) == PHOTOS // 2
    assert all("/odd/" in hit.path for hit in found)


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30)
dates = st.dates().map(lambda day: f"{day.year:04}-{day.month:02}-{day.day:02}T00:00:00")
sizes = st.integers(0, 10**11)


@given(
    st.builds(
        Filters,
        after=st.none() | dates,
        before=st.none() | dates,
        camera=st.none() | words,
        near=st.none() | st.tuples(st.floats(-90, 90), st.floats(-180, 180), st.floats(0, 1e5, allow_nan=False)),
        min_side=st.none() | st.integers(1, 10**6),
        orientation=st.none() | st.sampled_from(ORIENTATIONS),
        min_size_bytes=st.none() | sizes,
        max_size_bytes=st.none() | sizes,
        tag=st.none() | st.lists(words, min_size=1, max_size=4).map(tuple),
    )
)
def test_filters_arrive_as_they_were_sent(filters: Filters) -> None:
    sent = grouped(narrowing(k=10, filters=filters, threshold="none"))
    fields = {name: values if name == "tag" else values[0] for name, values in sent.items()}
    arrived = SearchParameters.model_validate(fields | {"q": "x"}).question().filters()
    assert (arrived or Filters()) == filters


def test_a_condition_that_cannot_travel_is_refused(served: Served) -> None:
    with pytest.raises(UsageError, match="where"):
        served.client.search("a dog", filters=Filters(where=images.c.width > 100))


def test_photos_come_as_they_are_small_and_with_what_is_known(served: Served) -> None:
    row = served.searcher.index.image(7)
    assert row is not None
    assert served.client.image(7) == Path(row.key).read_bytes()
    with Image.open(io.BytesIO(served.client.thumbnail(7, size=160))) as small:
        assert max(small.size) <= 160
    details = served.client.details(7)
    assert (details["path"], details["width"], details["height"]) == (row.key, row.width, row.height)
    assert details["tags"] == []


def test_the_status_tells_what_the_command_line_tells(served: Served) -> None:
    status = served.client.status()
    assert (status["images"], status["vectors"], status["model"]) == (PHOTOS, PHOTOS, "mini")
    assert status["indexing"] is None


def test_indexed_and_sent_photos_are_classified_alike(served: Served) -> None:
    row = served.searcher.index.image(4)
    assert row is not None
    (indexed,) = served.client.classify(["red", "blue", "green"], ids=[4])
    (sent,) = served.client.classify(["red", "blue", "green"], images=[row.key])
    assert (indexed.id, indexed.path, sent.name) == (4, row.key, Path(row.key).name)
    assert sum(indexed.probabilities.values()) == pytest.approx(1.0, abs=1e-4)
    assert sent.probabilities == pytest.approx(indexed.probabilities, abs=1e-4)


def test_templates_are_prompts(served: Served) -> None:
    one, other = (
        served.client.classify(["red", "blue"], ids=[4], templates=[template])[0].probabilities
        for template in ("{}", "a drawing of something {}")
    )
    assert one != other


@pytest.mark.parametrize(("ask", "error", "message"), [
    (lambda client: client.search("after:soon"), QueryError, "soon"),
    (lambda client: client.search("image:/etc/passwd"), QueryError, None),
    (lambda client: client.search(""), UsageError, None),
    (lambda client: client.search("a dog", k=0), UsageError, "k"),
    (lambda client: client.similar(10**9), PhotoNotFound, None),
    (lambda client: client.details(10**9), PhotoNotFound, None),
    (lambda client: client.thumbnail(10**9), PhotoNotFound, None),
    (lambda client: client.image(10**9), PhotoNotFound, None),
    (lambda client: client.search_vector(np.zeros(3)), UsageError, None),
    (lambda client: client.search_image(b"GIF89a and no more"), ImageError, None),
    (lambda client: client.search_image("/no/such/file.jpg"), ImageError, "cannot be read"),
    (lambda client: client.classify([], ids=[1]), UsageError, None),
    (lambda client: client.classify(["a"]), UsageError, "one of them"),
    (lambda client: client.search("a \udc80 dog"), UsageError, "no valid text"),
    (lambda client: client.search("a dog", without=["w" * 5000] * 30), UsageError, "too long"),
    (lambda client: client.search_vector([float("nan")] * 512), UsageError, "NaN"),
    (lambda client: client.search_image(Image.new("RGB", (0, 0))), ImageError, "cannot be sent"),
])  # fmt: skip
def test_what_is_wrong_is_told_as_the_library_tells_it(
    served: Served, ask: object, error: type[SearchEngineError], message: str | None
) -> None:
    with pytest.raises(error, match=message):
        ask(served.client)  # type: ignore[operator]


def test_a_cursor_of_another_query_is_refused(served: Served) -> None:
    cursor = served.client.search("a red pattern", k=2).cursor
    page = served.client.search("a blue pattern", k=2)
    page.cursor = cursor
    with pytest.raises(UsageError, match="cursor"):
        page.next_page()


@pytest.mark.parametrize("token", [None, "another"])
def test_a_wrong_token_is_an_access_error(served: Served, token: str | None) -> None:
    with Client(served.url, token=token) as client, pytest.raises(AccessError, match="token"):
        client.search("a dog")


def test_a_token_never_goes_to_a_proxy_of_the_environment(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody listens
    with Client(served.url, token=TOKEN) as client:
        assert client.status()["images"] == PHOTOS


def test_nobody_answering_is_told_with_the_address() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(ServiceUnusable, match=r"127\.0\.0\.1:9.*serve"):
        client.status()


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://localhost", "http://", "http://[::1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(UsageError):
        Client(url)


@pytest.mark.parametrize("token", ["a\r\nHost: elsewhere", "", " ", "a-token "])
def test_a_token_that_no_header_can_carry_is_refused(token: str) -> None:
    with pytest.raises(UsageError, match="token"):
        Client("http://localhost", token=token)


def test_something_else_that_answers_is_no_service() -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if "status" in self.path else 502)
            self.end_headers()
            self.wfile.write(b"<html>")

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{server.server_port}") as client:
            with pytest.raises(ServiceUnusable, match="JSON"):
                client.status()
            with pytest.raises(ServiceUnusable, match="502"):
                client.search("a dog")
        server.shutdown()


def test_too_much_to_do_is_told_with_when_to_ask_again() -> None:
    problem = {"type": "urn:searchengine:problem:OverloadError", "status": 429, "detail": "too much"}

    def answer(request: httpx.Request) -> httpx.Response:
        headers = {"Retry-After": "7", "Content-Type": "application/problem+json"}
        return httpx.Response(429, json=problem, headers=headers)

    with Client("http://localhost", http=httpx.Client(transport=httpx.MockTransport(answer))) as client:
        with pytest.raises(OverloadError, match="too much") as raised:
            client.search("a dog")
    assert raised.value.retry_after_seconds == 7


def test_a_newer_service_may_tell_more_of_a_hit() -> None:
    hit = {"rank": 1, "score": 0.5, "relevance": 0.5, "id": 1, "store": "local", "path": "/a.jpg", "taken_at": None}
    hit |= {"width": 4, "height": 3, "colour": "red"}
    answer = httpx.Response(200, json={"hits": [hit], "cursor": None, "matches": 1, "took": 5})
    transport = httpx.MockTransport(lambda _: answer)
    with Client("http://localhost", http=httpx.Client(transport=transport)) as client:
        (found,) = client.search("a dog")
    assert (found.id, found.width) == (1, 4)


def test_the_document_names_every_route_and_none_that_is_not_there(served: Served) -> None:
    table = "\n".join(line for line in API.splitlines() if line.startswith("| `"))
    named = set()
    for method, paths in re.findall(r"^\| `(GET|POST) ([^|]*)\|", table, re.MULTILINE):
        named |= {(method, path.split("?")[0]) for path in re.findall(r"/[^`,\s]*", paths)}
    answer = httpx.get(f"{served.url}/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"})
    routes = {(method.upper(), path) for path, methods in answer.json()["paths"].items() for method in methods}
    assert named == routes


def test_the_python_example_of_the_document_runs(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    painted(1).save("holiday.jpg")
    (example,) = re.findall(r"```python\n(.*?)```", API, re.DOTALL)
    example = example.replace("http://127.0.0.1:8000", served.url).replace("token=None", f"token={TOKEN!r}")
    exec(compile(example, "docs/api.md", "exec"), {"vector": served.searcher.index.vector(1)})
