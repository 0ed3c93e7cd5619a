"""What `search` and `similar` ask: as values that travel, as a light process, and end to end with the encoder mini."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import Cli, Outcome
from conftest import painted
from fakes import FakeEncoder
from hypothesis import given
from hypothesis import strategies as st

from indexer.pipeline import build
from searchengine import Searcher, open_index
from searchengine.cli.queries import SearchRequest, answer, asked_by, names_a_picture, picture
from searchengine.errors import QueryError, UsageError
from searchengine.filters import ORIENTATIONS, Filters
from searchengine.index.schema import images
from searchengine.query import MAX_CHARACTERS

ROOT = Path(__file__).parent.parent

# -- values that travel ----------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=()), max_size=8)  # file names hold lone surrogates (PEP 383)
FILTERS = st.builds(
    Filters,
    after=st.none() | st.just("2024-05"),
    under=st.none() | st.just("/photos/\udcff"),
    camera=st.none() | TEXTS,
    near=st.none() | st.tuples(st.floats(-90, 90), st.floats(-180, 180), st.floats(0, 1e5)),
    min_side=st.none() | st.integers(0, 10_000),
    orientation=st.none() | st.sampled_from(ORIENTATIONS),
    max_size_bytes=st.none() | st.integers(0, 2**62),
)
REQUESTS = st.builds(
    SearchRequest,
    texts=st.lists(TEXTS, max_size=2).map(tuple),
    pictures=st.lists(TEXTS | st.integers(0, 10**30), max_size=3).map(tuple),
    unwanted=st.lists(TEXTS, max_size=2).map(tuple),
    filters=FILTERS,
    k=st.integers(1, 10**9),
    offset=st.integers(0, 10**9),
)


@given(REQUESTS)
def test_a_request_comes_out_of_json_as_it_went_in(request: SearchRequest) -> None:
    assert SearchRequest.from_dict(json.loads(json.dumps(request.as_dict()))) == request


def test_an_expression_may_be_longer_in_a_request_than_as_it_was_written(searcher: Searcher) -> None:
    text = '"' + "\\x" * 150 + '"'
    request = asked_by(" OR ".join([text] * 31 + ["image:/none.jpg"]))
    assert len(request.expression or "") > MAX_CHARACTERS
    assert request.files() == ["/none.jpg"]
    with pytest.raises(QueryError, match=r"/none\.jpg cannot be a query"):
        answer(request, searcher)


def test_a_condition_in_sql_stays_in_its_process() -> None:
    with pytest.raises(UsageError, match="another process"):
        SearchRequest(filters=Filters(where=images.c.width > 1)).as_dict()


# -- the answer ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen pictures and a copy of the first; tests only read it."""
    folder = tmp_path_factory.mktemp("library") / "photos"
    folder.mkdir()
    for number in range(12):
        painted(number, width=60 + 10 * number).save(folder / f"{number:02}.png")
    shutil.copy2(folder / "00.png", folder / "copy.png")
    return folder


@pytest.fixture(scope="module")
def searcher(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Searcher]:
    index_folder = tmp_path_factory.mktemp("fake") / "index"
    encoder = FakeEncoder()
    build(index_folder, [library], encoder=encoder, isolated=False)
    with open_index(index_folder) as index:
        yield Searcher(index, encoder)


def test_a_request_is_answered_as_the_library_does(searcher: Searcher, library: Path) -> None:
    first, second = str(library / "00.png"), str(library / "01.png")
    filters = Filters(min_side=40, orientation="landscape")
    row = searcher.index.image_by_key("local", second)
    assert row is not None
    for request, hits in (
        (SearchRequest(texts=("blue",), k=3, offset=2), searcher.search("blue", k=3, offset=2)),
        (SearchRequest(pictures=(first,), filters=filters), searcher.search_image(first, filters=filters)),
        (SearchRequest(pictures=(row.id,)), searcher.similar(row.id)),
        (SearchRequest(pictures=(first, row.id), k=4), searcher.search_images([first, second], k=4)),
        (
            SearchRequest(texts=("blue",), pictures=(first,), unwanted=("red",)),
            searcher.search_combined(texts=["blue"], images=[first], without=["red"]),
        ),
    ):
        assert answer(request, searcher) == hits
        assert hits


def test_a_query_is_a_picture_only_where_it_is_a_path_to_one(
    library: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(library)
    for query in ("./00.png", f"../{library.name}/00.png", str(library / "00.png")):
        assert names_a_picture(query)
        assert picture(query) == str(library / "00.png")
    for query in ("00.png", "a dog on a beach", "dogs/cats", "", "./none", "/", ".", "/a holiday in 2023."):
        assert not names_a_picture(query)
    for query in ("./none.jpg", "../none.HEIC", "/none.png", "~/none.webp"):
        with pytest.raises(QueryError, match="there is no picture"):
            names_a_picture(query)


HEAVY = {"numpy", "sqlalchemy", "faiss", "torch", "PIL"}


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "a dog", "--after", "2023", "--min-side", "100", "--under", "/x"),
        ("search", "./00.png", "--like", "01.png"),
        ("similar", "01.png", "7"),
    ],
)
def test_a_command_that_another_process_answers_loads_nothing_heavy(
    library: Path, own_home: None, arguments: tuple[str, ...]
) -> None:
    script = f"""
        import atexit, sys
        from searchengine.hits import Hit
        from searchengine.warm import client
        asked = []
        def ask(search, settings, *, files):
            asked.append((search, files))
            return [Hit(rank=1, score=0.5, relevance=0.9, id=1, store="local", path="/x.jpg", taken_at=None,
                        width=1, height=1)]
        client.ask = ask
        client.start_for_the_next = lambda settings: None
        atexit.register(lambda: print(asked, sorted({HEAVY!r} & set(sys.modules)), sep="\\n"))
        from searchengine.cli import main
        sys.argv = ["searchengine", *{arguments!r}, "--json"]
        main()
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=library, capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stderr) == (0, "")
    hit, asked, loaded = done.stdout.splitlines()
    assert json.loads(hit)["path"] == "/x.jpg"
    assert loaded == "[]"
    ((search, files),) = ast.literal_eval(asked)
    assert search["pictures"] == (*files, *((7,) if arguments[0] == "similar" else ()))
    assert all(os.path.isabs(file) for file in files)


# -- end to end ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def indexed(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of `library` by mini."""
    from searchengine import load_encoder

    index = tmp_path_factory.mktemp("mini") / "index"
    build(index, [library], encoder=load_encoder("mini"), isolated=False)
    return index


@pytest.fixture
def run(cli: Cli, indexed: Path, own_home: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("SEARCHENGINE_OFFLINE", "1")

    def with_index(*arguments: str | Path) -> Outcome:
        return cli(*arguments, "--index", indexed, "--json", "-k", "50")

    return with_index


def names(outcome: Outcome) -> set[str]:
    assert outcome.code == 0, outcome.err
    return {os.path.basename(line["path"]) for line in outcome.lines}


def test_pictures_of_a_query_are_never_in_its_answer(run: Any, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(library)
    everything = names(run("search", "coloured blocks"))
    assert len(everything) == 13
    row_id = next(line["id"] for line in run("search", "x").lines if line["path"].endswith("03.png"))
    assert names(run("similar", "00.png")) == everything - {"00.png", "copy.png"}
    assert names(run("similar", "copy.png", row_id)) == everything - {"00.png", "copy.png", "03.png"}
    assert names(run("search", "./00.png")) == everything - {"00.png", "copy.png"}
    assert names(run("search", "blue", "--like", "05.png", "--like", "06.png")) == everything - {"05.png", "06.png"}
    assert names(run("search", "./00.png", "--like", "05.png", "--not", "red")) == everything - {
        "00.png",
        "copy.png",
        "05.png",
    }


def test_photos_are_narrowed_by_shape_and_size(run: Any, library: Path) -> None:
    sizes = {file.name: file.stat().st_size for file in library.iterdir()}
    middle = sorted(sizes.values())[6]
    assert names(run("search", "x", "--max-size", str(middle))) == {
        name for name, size_bytes in sizes.items() if size_bytes <= middle
    }
    assert len(names(run("search", "x", "--min-side", "40", "--orientation", "landscape"))) == 13
    for options in (("--min-side", "41"), ("--orientation", "portrait"), ("--min-size", "1G")):
        assert run("search", "x", *options).code == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "./none.jpg"), "there is no picture ./none.jpg"),
        (("search",), "the query is empty"),
        (("search", "--not", "red"), "the query is empty"),
        (("search", "x", "--like", "none.jpg"), "none.jpg"),
        (("similar",), "IMAGE|ID"),
        (("similar", "9" * 90), "no photo with id"),
        (("similar", "9" * 5000), "cannot be a query"),
        (("similar", "1", "none.jpg"), "none.jpg"),
    ],
)
def test_a_query_that_cannot_be_asked_is_wrong_usage(run: Any, arguments: tuple[str, ...], message: str) -> None:
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
