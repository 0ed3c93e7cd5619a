"""Classes of a whole library from its stored vectors; tags in its tables, what makes them stale, searches by them."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import Cli
from conftest import painted
from fakes import FakeEncoder
from hypothesis import given
from hypothesis import strategies as st

from indexer.compact import compact
from indexer.pipeline import build
from indexer.tags import TaggingRequest, remove_tags, write_tags
from indexer.verify import verify
from searchengine import zeroshot
from searchengine.cli.queries import SearchRequest
from searchengine.errors import IndexLocked, IndexNotFound, ModelMismatch, UsageError
from searchengine.filters import MAX_TAGS, Filters
from searchengine.index.reader import Index
from searchengine.models import registry
from searchengine.search import Searcher
from searchengine.vectors import FloatMatrix, normalise

Paint = Callable[..., Path]
LABELS = ["dog", "cat", "sea lion, Steller's", "żółw"]
TEMPLATES = ["a {}", "the {}"]


def request(labels: list[str] | None = None, *, top: int = 2, min_probability: float = 0.2) -> TaggingRequest:
    return TaggingRequest(labels=labels or LABELS, templates=TEMPLATES, top=top, min_probability=min_probability)


def expected(index: Path, wanted: TaggingRequest) -> dict[str, set[str]]:
    """label -> names of the photos that must have it, photo by photo."""
    encoder = FakeEncoder()
    classes = zeroshot.class_vectors(encoder, wanted.labels, templates=wanted.templates)
    found: dict[str, set[str]] = {label: set() for label in wanted.labels}
    with Index(index) as opened:
        for path, vector in vectors_by_path(opened).items():
            (shares,) = zeroshot.probabilities(vector[None], classes, logit_scale=encoder.logit_scale)
            for place in (-shares).argsort(kind="stable")[: wanted.top]:
                if shares[place] >= wanted.min_probability:
                    found[wanted.labels[place]].add(Path(path).name)
    return found


def vectors_by_path(opened: Index) -> dict[str, FloatMatrix]:
    table = opened.snapshot().table
    photos = opened.keys_of(table.ids)
    return {path: opened.vector(vector) for vector, rows in photos.items() for _, path in rows}


def tagged(index: Path) -> dict[str, set[str]]:
    """label -> names of the photos that a search by the tag finds."""
    with Index(index) as opened:
        searcher = Searcher(opened, FakeEncoder())
        hits = {label: searcher.search("x", k=100, filters=Filters(tag=label)) for label, _ in opened.tags()}
        assert {label: len(found) for label, found in hits.items()} == dict(opened.tags())
        return {label: {Path(hit.path).name for hit in found} for label, found in hits.items()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index of eight pictures, one of them there twice."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "photos").mkdir()
    for number in range(8):
        painted(number).save(folder / "photos" / f"{number}.png")
    shutil.copyfile(folder / "photos" / "3.png", folder / "photos" / "copy.png")
    build(folder / "index", [folder / "photos"], encoder=FakeEncoder(), isolated=False)
    return folder


@pytest.fixture
def library(built: Path, tmp_path: Path) -> Path:
    """A copy of the index; its photos stay where they are."""
    return Path(shutil.copytree(built / "index", tmp_path / "index"))


# -- classification of stored vectors ----------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 99),
    images=st.integers(1, 7),
    labels=st.sampled_from([1, 2, 5, 33, 40]),
    top=st.integers(1, 45),
    scale=st.sampled_from([0.0, 1.0, 30.0, 100.0]),
)
def test_the_likeliest_labels_are_the_first_of_all_probabilities(
    seed: int, images: int, labels: int, top: int, scale: float
) -> None:
    random = np.random.default_rng(seed)
    photos, classes = (normalise(random.standard_normal((rows, 16))) for rows in (images, labels))
    all_of_them = zeroshot.probabilities(photos, classes, logit_scale=scale)
    found = zeroshot.likeliest(photos, classes, logit_scale=scale, top=top)
    assert found.labels.shape == found.probabilities.shape == (images, min(top, labels))
    chosen = np.take_along_axis(all_of_them, found.labels, axis=1)
    np.testing.assert_allclose(found.probabilities, chosen, rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(chosen, -np.sort(-all_of_them, axis=1)[:, :top], rtol=1e-4, atol=1e-12)
    assert all(len(set(row)) == len(row) for row in found.labels.tolist())
    if scale == 0:
        assert found.labels[0].tolist() == list(range(min(top, labels))), "equal ones come as they were named"


def test_stored_vectors_are_classified_in_blocks_as_at_once(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = zeroshot.class_vectors(FakeEncoder(), LABELS, templates=TEMPLATES)
    with Index(library) as opened:
        table = opened.snapshot().table
        whole = list(zeroshot.classify_stored(table, table.living_rows, class_vectors=classes, logit_scale=9, top=3))
        monkeypatch.setattr(zeroshot, "SCORES_PER_BLOCK", 1)
        monkeypatch.setattr(zeroshot, "ROWS_PER_BLOCK_AT_LEAST", 3)
        parts = list(zeroshot.classify_stored(table, table.living_rows, class_vectors=classes, logit_scale=9, top=3))
    assert (len(whole), len(parts)) == (1, 3)
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in parts]), whole[0][0])
    np.testing.assert_array_equal(np.concatenate([found.labels for _, found in parts]), whole[0][1].labels)


# -- tags --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top", "least"), [(1, 0.0), (2, 0.2), (4, 0.0), (1, 0.99)])
def test_a_search_by_tag_finds_the_photos_that_have_the_label_copies_too(library: Path, top: int, least: float) -> None:
    wanted = request(top=top, min_probability=least)
    assert write_tags(library, wanted, encoder=FakeEncoder()).classified == 8
    assert tagged(library) == expected(library, wanted)
    found = tagged(library)
    assert all(("3.png" in names) == ("copy.png" in names) for names in found.values())
    assert verify(library).ok


def test_several_tags_must_all_be_there_and_other_filters_hold_too(library: Path, built: Path) -> None:
    write_tags(library, request(top=2, min_probability=0.0), encoder=FakeEncoder())
    found = tagged(library)
    with Index(library) as opened:
        searcher = Searcher(opened, FakeEncoder())
        both = searcher.search("x", k=100, filters=Filters(tag=["dog", "cat"]))
        assert {Path(hit.path).name for hit in both} == found["dog"] & found["cat"]
        assert both
        under = Filters(tag="dog", under=str(built / "photos"))
        assert len(searcher.search("x", k=100, filters=under)) == len(found["dog"])
        assert not searcher.search("x", filters=Filters(tag="dog", under=str(built / "elsewhere")))
        assert not searcher.search("x", filters=Filters(tag="no such label"))
        again = searcher.search("x", k=100, filters=Filters(tag=["cat", "dog", "cat"]))
        assert again == both


@pytest.mark.usefixtures("fake")
def test_thousands_of_tags_can_be_asked_for_at_once(cli: Cli, library: Path) -> None:
    many = [f"label {number}" for number in range(MAX_TAGS)]
    write_tags(library, request(many, top=MAX_TAGS, min_probability=0.0), encoder=FakeEncoder())
    with Index(library) as opened:
        everything = opened.vector_ids(Filters(under="/"))
        assert opened.vector_ids(Filters(tag=many)).tolist() == everything.tolist()
        assert not len(opened.vector_ids(Filters(tag=[*many[1:], "none"])))
    options = [word for label in many[:1500] for word in ("--tag", label)]
    found = cli("search", "x", *options, "--index", library, "--json")
    assert (found.code, len(found.lines)) == (0, 9), found.err
    with pytest.raises(UsageError, match="10,001 tags"):
        Filters(tag=[*many, "one more"])


def test_the_same_again_looks_only_at_new_photos(library: Path, built: Path, paint: Paint) -> None:
    wanted = request(top=4, min_probability=0.0)
    write_tags(library, wanted, encoder=FakeEncoder())
    assert write_tags(library, wanted, encoder=FakeEncoder()).classified == 0
    new = paint("more/new.png", 77)
    build(library, [built / "photos", new.parent], encoder=FakeEncoder(), isolated=False)
    assert not any("new.png" in names for names in tagged(library).values())
    assert write_tags(library, request(LABELS[::-1], top=4, min_probability=0.0), encoder=FakeEncoder()).classified == 1
    assert all(len(names) == 10 for names in tagged(library).values())


def test_a_run_that_was_ended_goes_on_where_it_was(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = request(top=4, min_probability=0.0)
    monkeypatch.setattr("indexer.tags.VECTORS_PER_COMMIT", 3)

    def interrupt(done: int, total: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tags(library, wanted, encoder=FakeEncoder(), on_progress=interrupt)
    assert {len(names) for names in tagged(library).values()} <= {6, 7}
    assert write_tags(library, wanted, encoder=FakeEncoder()).classified == 2
    assert tagged(library) == expected(library, wanted)


def test_a_label_belongs_to_the_newest_tagging_that_has_it(library: Path) -> None:
    first, second = request(["dog", "cat"], top=2, min_probability=0.0), request(["dog", "horse"], top=1)
    write_tags(library, first, encoder=FakeEncoder())
    assert write_tags(library, second, encoder=FakeEncoder()).classified == 8
    assert tagged(library) == expected(library, second) | {"cat": expected(library, first)["cat"]}
    assert write_tags(library, first, encoder=FakeEncoder()).classified == 8, "it lost a label, so it begins anew"
    assert tagged(library) == expected(library, first) | {"horse": expected(library, second)["horse"]}
    assert verify(library).ok


@pytest.mark.parametrize("changed", [request(top=1), request(min_probability=0.9), request([*LABELS, "ox"])])
def test_another_request_begins_anew(library: Path, changed: TaggingRequest) -> None:
    write_tags(library, request(), encoder=FakeEncoder())
    assert write_tags(library, changed, encoder=FakeEncoder()).classified == 8
    assert tagged(library) == expected(library, changed)


def test_labels_can_be_forgotten(library: Path) -> None:
    write_tags(library, request(), encoder=FakeEncoder())
    assert remove_tags(library, ["dog", "unheard of"]) == 1
    assert set(tagged(library)) == set(LABELS[1:])
    assert remove_tags(library, LABELS) == 3
    assert tagged(library) == {}
    with closing(sqlite3.connect(library / "metadata.sqlite")) as connection:
        for table in ("tags", "labels", "taggings"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)


def test_tags_go_with_their_photo_stay_with_a_moved_one_and_never_outlive_a_change_of_content(
    tmp_path: Path, paint: Paint
) -> None:
    gone, moved, changed = (paint(f"photos/{name}.png", seed) for seed, name in enumerate(("gone", "moved", "changed")))
    index, photos = tmp_path / "index", gone.parent
    build(index, [photos], encoder=FakeEncoder(), isolated=False)
    wanted = request(top=4, min_probability=0.0)
    write_tags(index, wanted, encoder=FakeEncoder())
    gone.unlink()
    moved.rename(photos / "elsewhere.png")
    painted(50).save(changed)
    build(index, [photos], encoder=FakeEncoder(), isolated=False)
    assert all(names == {"elsewhere.png"} for names in tagged(index).values())
    assert compact(index).dropped == 2
    with closing(sqlite3.connect(index / "metadata.sqlite")) as connection:
        assert connection.execute("SELECT count(*) FROM tags").fetchone() == (len(LABELS),)
    assert verify(index).ok
    assert write_tags(index, wanted, encoder=FakeEncoder()).classified == 1
    assert all(names == {"elsewhere.png", "changed.png"} for names in tagged(index).values())


def test_an_open_reader_sees_new_tags_and_the_request_travels_to_another_process(library: Path) -> None:
    asked = SearchRequest(texts=("x",), filters=Filters(tag=("dog", "cat")))
    assert SearchRequest.from_dict(json.loads(json.dumps(asked.as_dict()))) == asked
    with Index(library) as opened:
        searcher = Searcher(opened, FakeEncoder())
        assert searcher.search("x", filters=Filters(tag="dog")) == []
        write_tags(library, request(top=4, min_probability=0.0), encoder=FakeEncoder())
        assert len(searcher.search("x", filters=Filters(tag="dog"))) == 9


# -- what is refused, and what is damaged ------------------------------------------------------------------------------


def test_another_encoder_a_held_lock_and_an_index_that_is_not_there_are_refused(library: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelMismatch):
        write_tags(library, request(), encoder=FakeEncoder(name="other"))
    with pytest.raises(IndexNotFound):
        write_tags(tmp_path / "nowhere", request(), encoder=FakeEncoder())
    assert not (tmp_path / "nowhere").exists()
    from indexer.lock import LockedIndex

    with LockedIndex(library), pytest.raises(IndexLocked):
        remove_tags(library, ["dog"])


@pytest.mark.parametrize(
    "wanted",
    [request(["dog", "dog"]), request(["dog", "\udcff"]), request(top=0), request(min_probability=1.5)],
    ids=["twice", "not UTF-8", "top", "probability"],
)
def test_a_request_that_makes_no_sense_is_refused(library: Path, wanted: TaggingRequest) -> None:
    with pytest.raises(UsageError):
        write_tags(library, wanted, encoder=FakeEncoder())


@pytest.mark.parametrize("tag", [7, ("dog", 7), "\udcff"])
def test_a_filter_by_what_is_no_label_is_refused(tag: object) -> None:
    with pytest.raises(UsageError, match="tag is"):
        Filters(tag=tag)  # type: ignore[arg-type]


DAMAGE = {
    "a tag of no vector": "UPDATE tags SET vector_id = 99 WHERE rowid = 1",
    "a tag of no label": "UPDATE tags SET label_id = 99 WHERE rowid = 1",
    "a probability above 1": "UPDATE tags SET probability = 7 WHERE rowid = 1",
    "a label of no tagging": "UPDATE labels SET tagging_id = 99 WHERE id = 1",
    "a tagging with no list of labels": "UPDATE taggings SET labels = '7'",
    "a tagging of the future": "UPDATE taggings SET through_id = 1000000",
}


@pytest.mark.parametrize("statement", DAMAGE.values(), ids=DAMAGE)
def test_verify_tells_damaged_tags_and_after_a_repair_the_same_request_makes_them_whole(
    library: Path, statement: str
) -> None:
    wanted = request(top=4, min_probability=0.0)
    write_tags(library, wanted, encoder=FakeEncoder())
    whole = tagged(library)
    with closing(sqlite3.connect(library / "metadata.sqlite")) as connection, connection:
        connection.execute(statement)
    problems = verify(library).problems
    assert problems
    assert all("--write-tags" in problem.remedy for problem in problems)
    assert verify(library, repair=True).ok
    write_tags(library, wanted, encoder=FakeEncoder())
    assert tagged(library) == whole
    with Index(library) as opened:
        assert opened.count_images() == 9


@pytest.mark.parametrize(
    "damaged", ["labels = '{'", "labels = '7'", "labels = '[[1], 2]'", "templates = x'ff'", "through_id = 'x'"]
)
def test_a_damaged_tagging_is_made_anew_by_the_next_request(library: Path, damaged: str) -> None:
    wanted = request(top=4, min_probability=0.0)
    write_tags(library, wanted, encoder=FakeEncoder())
    whole = tagged(library)
    with closing(sqlite3.connect(library / "metadata.sqlite")) as connection, connection:
        connection.execute(f"UPDATE taggings SET {damaged}")
    assert write_tags(library, wanted, encoder=FakeEncoder()).classified == 8
    assert tagged(library) == whole
    assert verify(library).ok


def test_tags_survive_a_repair_of_damaged_tables_and_are_then_completed(library: Path) -> None:
    wanted = request(top=4, min_probability=0.0)
    write_tags(library, wanted, encoder=FakeEncoder())
    whole = tagged(library)
    with closing(sqlite3.connect(library / "metadata.sqlite")) as connection, connection:
        connection.execute("DROP INDEX ix_tags_label_id")
    assert verify(library, repair=True).ok
    assert tagged(library) == whole
    assert write_tags(library, wanted, encoder=FakeEncoder()).classified == 8
    assert tagged(library) == whole


def test_an_index_of_an_earlier_version_has_no_tags_until_the_first_are_written(tmp_path: Path) -> None:
    stored = Path(__file__).parent / "indexes" / "v3" / "index"
    index = Path(shutil.copytree(stored, tmp_path / "index"))
    with Index(index) as opened:
        assert opened.tags() == []
        searcher = Searcher(opened, FakeEncoder())
        assert searcher.search("x", filters=Filters(tag="dog")) == []
        assert opened.count_images(Filters(tag="dog")) == 0
    assert verify(index).ok
    write_tags(index, request(top=4, min_probability=0.0), encoder=FakeEncoder())
    assert {len(names) for names in tagged(index).values()} == {7}


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(own_home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHENGINE_WARM", "off")
    monkeypatch.setattr(registry, "load_encoder", lambda *_, **__: FakeEncoder())


@pytest.mark.usefixtures("fake")
def test_classify_of_an_index_gives_what_its_files_would(cli: Cli, library: Path, built: Path) -> None:
    options = ["--index", library, "--labels", "dog,cat,ox", "--json"]
    from_index = {line["path"]: line for line in cli("classify", *options).lines}
    from_files = {line["path"]: line for line in cli("classify", built / "photos", *options[2:]).lines}
    assert set(from_index) == set(from_files)
    for path, line in from_index.items():
        assert line["id"] > 0
        assert line["probabilities"] == pytest.approx(from_files[path]["probabilities"], rel=1e-4)
    assert list(from_index[path]["probabilities"]) == list(from_files[path]["probabilities"])


@pytest.mark.usefixtures("fake")
def test_min_probability_leaves_out_labels_and_photos(cli: Cli, library: Path) -> None:
    options = ["--index", library, "--labels", "dog,cat,ox"]
    every = cli("classify", *options, "--json").lines
    some = cli("classify", *options, "--json", "--min-probability", "0.6").lines
    assert {line["path"]: line["probabilities"] for line in some} == {
        line["path"]: sure
        for line in every
        if (sure := {label: p for label, p in line["probabilities"].items() if p >= 0.6})
    }
    assert 0 < len(some) < len(every)
    table = cli("classify", *options, "--min-probability", "0.6").out.splitlines()
    assert len(table) == len(some) + 1
    assert len({line.rindex(str(Path(some[0]["path"]).parent)) for line in table[1:]}) == 1, "paths in one column"
    assert cli("classify", *options, "--min-probability", "1").code == 1


@pytest.mark.usefixtures("fake")
def test_tags_are_written_listed_searched_by_and_removed_from_the_command_line(cli: Cli, library: Path) -> None:
    options = ["--labels", "dog,cat", "--index", library]
    written = cli("classify", *options, "--write-tags", "--json")
    (line,) = written.lines
    assert (line["classified"], sum(line["labels"].values())) == (8, 9), "one of two is at least 0.5 probable"
    assert "nothing to do" in cli("classify", *options, "--write-tags").out
    listed = {line["label"]: line["photos"] for line in cli("tags", "--index", library, "--json").lines}
    assert listed == line["labels"]
    for label, count in listed.items():
        assert len(cli("search", "x", "--tag", label, "--index", library, "--json").lines) == count
    neither = cli("search", "x", "--tag", "dog", "--tag", "cat", "--index", library)
    assert (neither.code, neither.out) == (1, "")
    assert cli("tags", "--remove", "dog,cat", "--index", library).out == "forgot 2 labels\n"
    assert cli("tags", "--index", library).code == 1


@pytest.mark.usefixtures("fake")
def test_tags_are_for_the_whole_index(cli: Cli, library: Path, built: Path) -> None:
    options = ["--labels", "a,b", "--write-tags", "--index", library]
    for more in ([built / "photos"], ["--after", "2024"]):
        done = cli("classify", *more, *options)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "leave out IMAGE and filters" in done.err


@pytest.mark.usefixtures("fake")
def test_filters_narrow_an_index_and_do_not_go_with_files(
    cli: Cli, library: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEARCHENGINE_INDEX", str(library))
    options = ["--labels", "dog,cat", "--json"]
    size_bytes = (built / "photos" / "3.png").stat().st_size
    largest = [f for f in (built / "photos").iterdir() if f.stat().st_size >= size_bytes]
    found = cli("classify", "--index", *options, "--min-size", str(size_bytes))
    assert {line["path"] for line in found.lines} == {str(file) for file in largest}
    assert cli("classify", "--index", *options, "--after", "2024").code == 1
    assert cli("classify", built / "photos", *options, "--after", "2024").code == 2


@pytest.mark.usefixtures("own_home")
def test_without_an_image_and_without_an_index_it_is_exit_3(cli: Cli) -> None:
    for more in ("--index", "--write-tags"):
        done = cli("classify", "--labels", "dog,cat", more)
        assert (done.code, done.out) == (3, "")
        assert "there is no index" in done.err


def test_a_model_that_the_index_is_not_of_is_refused(cli: Cli, library: Path, fake: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(registry, "load_encoder", lambda *_, **__: FakeEncoder(name="other"))
    for more in ([], ["--write-tags"]):
        assert cli("classify", "--labels", "dog,cat", "--index", library, *more).code == 4
