"""Export and import: what leaves an index as files comes back as it was; what others wrote is not believed blindly."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commandline import Cli
from conftest import QUICK, painted
from fakes import FakeEncoder
from hypothesis import given, settings
from hypothesis import strategies as st

import indexer
import searchengine
from indexer.copy import copy
from indexer.exchange import FORMATS, Format, open_source, parts
from indexer.exchange.arrivals import Moved, arrival_of
from indexer.exchange.export import export
from indexer.exchange.importing import import_photos
from indexer.replicas.local import LocalReplica
from indexer.replicas.local_writing import WritableLocalReplica
from indexer.replicas.rows import PhotoRow
from indexer.verify import verify
from indexer.writable import identity_of
from searchengine.errors import IndexUnusable, ModelMismatch, StoreUnusable, UsageError
from searchengine.stores import ImageStore, KnownStores
from searchengine.stores.remote import RemoteStore
from searchengine.vectors import FloatMatrix, normalise

ENCODER = FakeEncoder()
IDENTITY = identity_of(ENCODER)


def held(index: Path) -> list[tuple[dict[str, Any], bytes]]:
    """All that an index knows of its photos, in the order of their ids, and their vectors; the ids left out."""
    with LocalReplica(index) as replica:
        rows, vectors = replica.photos([photo for page in replica.ids() for photo in page])
    facts = [{name: value for name, value in asdict(row).items() if name not in ("id", "vector_id")} for row in rows]
    return [(fact, vector.tobytes()) for fact, vector in zip(facts, vectors, strict=True)]


def built(folder: Path, rows: Sequence[PhotoRow], vectors: FloatMatrix) -> Path:
    """An index of these photos."""
    labels = sorted({label for row in rows for label, _ in row.tags})
    tagging = {
        "id": 1,
        "made_at": "2026-11-21T00:00:00+00:00",
        "fingerprint": IDENTITY.fingerprint,
        "labels": labels,
        "templates": [],
        "top": 1,
        "min_probability": 0.0,
        "through_id": 0,
    }
    values = {f"label/{number}": {"id": number, "label": label, "tagging_id": 1} for number, label in enumerate(labels)}
    with WritableLocalReplica(folder, identity=IDENTITY) as replica:
        replica.write_values({"tagging/1": tagging, **values} if labels else {}, forgotten={})
        if rows:
            replica.write(rows, vectors)
    return folder


def made_library(home: Path) -> Path:
    """Nine photos, of which two are copies and one has a name that is not UTF-8, and beside them `library.index`."""
    folder = home / "library"
    folder.mkdir()
    for seed in range(8):
        painted(seed).save(folder / f"{seed}.png")
    shutil.copy(folder / "0.png", folder / "copy of 0.png")
    os.rename(folder / "7.png", os.path.join(os.fsencode(folder), b"caf\xe9.png"))
    indexer.build(home / "library.index", [folder], encoder=FakeEncoder(), isolated=False)
    return folder


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tests only read it."""
    return made_library(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def index(library: Path) -> Path:
    return library.parent / "library.index"


@pytest.fixture
def own_library(tmp_path: Path) -> Path:
    """Beside `tmp_path / "library.index"`."""
    return made_library(tmp_path)


# -- out and back ------------------------------------------------------------------------------------------------------

names = st.binary(min_size=1, max_size=20).map(
    lambda name: "/p/" + name.replace(b"\0", b"/").decode("utf-8", "surrogateescape")
)
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=10)
whole = st.integers(0, 2**63 - 1)


@st.composite
def libraries(draw: st.DrawFn) -> tuple[list[PhotoRow], FloatMatrix]:
    keys = draw(st.lists(names, min_size=1, max_size=8, unique=True))
    contents = draw(st.lists(st.integers(0, 3), min_size=len(keys), max_size=len(keys)))
    vectors = normalise(np.random.default_rng(draw(st.integers(0, 99))).standard_normal((4, IDENTITY.dim)))
    shares = st.floats(0, 1)
    tags = {content: draw(st.dictionaries(words, shares, max_size=2)) for content in sorted(set(contents))}
    rows = [
        PhotoRow(
            id=number + 1,
            vector_id=content + 1,
            content_hash=bytes([content]) * 32,
            store=draw(st.sampled_from(["local", "zip", "s3", "manifest:/lists/café.csv"])),
            key=key,
            size_bytes=draw(whole),
            mtime_ns=draw(whole),
            etag=draw(st.none() | words),
            width=draw(st.integers(0, 2**31)),
            height=draw(st.integers(0, 2**31)),
            taken_at=draw(st.none() | st.datetimes().map(lambda moment: moment.replace(microsecond=0).isoformat())),
            latitude=draw(st.none() | st.floats(-90, 90)),
            longitude=draw(st.none() | st.floats(-180, 180)),
            camera=draw(st.none() | words),
            tags=tuple(sorted(tags[content].items())),
        )
        for number, (key, content) in enumerate(zip(keys, contents, strict=True))
    ]
    return rows, vectors[contents]


@settings(max_examples=15)
@given(library=libraries(), format_=st.sampled_from(FORMATS))
def test_what_was_exported_and_imported_is_the_same_index(
    library: tuple[list[PhotoRow], FloatMatrix], format_: Format
) -> None:
    with tempfile.TemporaryDirectory(dir=QUICK) as name:
        folder = Path(name)
        before = built(folder / "before.index", *library)
        export(before, folder / "files", format=format_)
        report = import_photos(folder / "after.index", folder / "files", isolated=False)
        assert held(folder / "after.index") == held(before)
        assert (report.photos, report.added, report.known, report.read, report.unread) == (len(library[0]),) * 2 + (
            0,
        ) * 3
        with LocalReplica(folder / "after.index") as replica:
            assert replica.identity == IDENTITY
        assert verify(folder / "after.index").problems == []


@pytest.mark.parametrize("format_", FORMATS)
def test_an_index_of_real_files_comes_back_and_the_next_run_takes_nothing_up(
    library: Path, index: Path, tmp_path: Path, format_: Format
) -> None:
    export(index, tmp_path / "files", format=format_)
    import_photos(tmp_path / "new.index", tmp_path / "files")
    assert held(tmp_path / "new.index") == held(index)
    encoder = FakeEncoder()
    report = indexer.build(tmp_path / "new.index", [library], encoder=encoder, isolated=False)
    assert (report.unchanged, report.added, report.updated) == (9, 0, 0)
    assert encoder.batches == []


def test_photos_that_lie_elsewhere_on_the_new_machine_are_named_by_where_they_are(
    own_library: Path, tmp_path: Path
) -> None:
    export(tmp_path / "library.index", tmp_path / "files")
    new = own_library.rename(tmp_path / "elsewhere")
    import_photos(tmp_path / "new.index", tmp_path / "files", moved=Moved(str(own_library), str(new)))
    encoder = FakeEncoder()
    report = indexer.build(tmp_path / "new.index", [new], encoder=encoder, isolated=False)
    assert report.unchanged == 9
    # Without a word of that, the photos are read, and not embedded.
    import_photos(tmp_path / "newer.index", tmp_path / "files")
    report = indexer.build(tmp_path / "newer.index", [new], encoder=encoder, isolated=False)
    assert report.added == 9
    assert encoder.batches == []


@pytest.mark.parametrize(
    ("place", "store", "key"),
    [
        ("/old/a.jpg", "s3", "s3://bucket/new/a.jpg"),
        ("/old!/a.jpg", "s3", "s3://bucket/new!/a.jpg"),
        ("/older/a.jpg", "local", "/older/a.jpg"),
        ("/archives/2023.ZIP!/a.jpg", "zip", "/archives/2023.ZIP!/a.jpg"),
        ("s3://b/shard-0.tar!/a.jpg", "tar", "s3://b/shard-0.tar!/a.jpg"),
        ("HTTPS://example.org/a.zip/a.jpg", "https", "https://example.org/a.zip/a.jpg"),
    ],
)
def test_a_place_alone_tells_the_store(place: str, store: str, key: str) -> None:
    arrival = arrival_of({"path": place}, root=Path("/root"), moved=Moved("/old", "s3://bucket/new/"))
    assert (arrival.store, arrival.key) == (store, key)


def test_an_export_in_several_parts_comes_back_whole(
    library: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PHOTOS_A_PART", 4)
    monkeypatch.setattr("indexer.exchange.clip_retrieval.PHOTOS_A_PART", 4)
    monkeypatch.setattr("indexer.exchange.tables.PHOTOS_AT_ONCE", 2)
    monkeypatch.setattr("indexer.replicas.local.PHOTOS_PER_PAGE", 2)
    for format_, count in (("parquet", 3), ("clip-retrieval", 6)):
        report = export(index, tmp_path / format_, format=format_)
        assert report.files == count
        import_photos(tmp_path / f"{format_}.index", tmp_path / format_)
        assert held(tmp_path / f"{format_}.index") == held(index)


def test_half_precision_takes_half_the_room_and_comes_back_as_unit_vectors(
    library: Path, index: Path, tmp_path: Path
) -> None:
    export(index, tmp_path / "half", format="npy", dtype="float16")
    matrix = np.load(tmp_path / "half" / "embeddings.npy")
    assert (matrix.dtype, matrix.shape) == (np.float16, (9, IDENTITY.dim))
    import_photos(tmp_path / "new.index", tmp_path / "half")
    for (fact, exact), (same, rounded) in zip(held(index), held(tmp_path / "new.index"), strict=True):
        assert fact == same
        difference = np.frombuffer(exact, np.float32) - np.frombuffer(rounded, np.float32)
        assert 0 < np.abs(difference).max() < 1e-3
        assert np.linalg.norm(np.frombuffer(rounded, np.float32)) == pytest.approx(1, abs=1e-6)


# -- what others find in the files -------------------------------------------------------------------------------------


def test_parquet_has_the_facts_as_columns_and_the_vectors_as_lists_of_fixed_size(
    library: Path, index: Path, tmp_path: Path
) -> None:
    export(index, tmp_path / "files")
    table = pq.read_table(tmp_path / "files" / "photos-00000.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), IDENTITY.dim)
    card = json.loads(table.schema.metadata[b"searchengine"])
    assert (card["encoder"], card["fingerprint"], card["dim"]) == ("fake", IDENTITY.fingerprint, IDENTITY.dim)
    frame = table.to_pandas()
    before = held(index)
    assert np.stack(list(frame["embedding"])).tobytes() == b"".join(vector for _, vector in before)
    assert list(frame["content_hash"]) == [fact["content_hash"].hex() for fact, _ in before]
    own = frame[frame["path_bytes"].notna()]
    assert [(row.path, row.path_bytes) for row in own.itertuples()] == [
        (f"{library}/caf\\xe9.png", os.fsencode(library) + b"/caf\xe9.png")
    ]


def test_the_plain_pair_is_a_matrix_and_a_line_of_json_for_each_row(library: Path, index: Path, tmp_path: Path) -> None:
    export(index, tmp_path / "files", format="npy")
    lines = [json.loads(line) for line in (tmp_path / "files" / "photos.jsonl").read_text("ascii").splitlines()]
    matrix = np.load(tmp_path / "files" / "embeddings.npy", allow_pickle=False)
    with searchengine.open_index(index) as opened:
        for line, vector in zip(lines, matrix, strict=True):
            row = opened.image_by_key("local", line["path"])
            assert row is not None
            assert row.id == line["id"]
            assert np.array_equal(opened.vector(row.vector_id), vector)


def test_clip_retrieval_finds_its_folders_with_as_many_rows_as_vectors(
    library: Path, index: Path, tmp_path: Path
) -> None:
    export(index, tmp_path / "files", format="clip-retrieval")
    matrix = np.load(tmp_path / "files" / "img_emb" / "img_emb_0.npy")
    frame = pd.read_parquet(tmp_path / "files" / "metadata" / "metadata_0.parquet")
    assert len(frame) == len(matrix) == 9
    assert sorted(frame["image_path"])[:2] == [f"{library}/0.png", f"{library}/1.png"]
    assert [vector.tobytes() for vector in matrix] == [vector for _, vector in held(index)]


def test_filters_choose_what_is_exported(own_library: Path, tmp_path: Path) -> None:
    (own_library / "sub").mkdir()
    shutil.copy(own_library / "3.png", own_library / "sub" / "3.png")
    indexer.build(tmp_path / "library.index", [own_library], encoder=FakeEncoder(), isolated=False)
    only = searchengine.Filters(under=str(own_library / "sub"))
    assert export(tmp_path / "library.index", tmp_path / "files", format="npy", filters=only).photos == 1
    [line] = (tmp_path / "files" / "photos.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == str(own_library / "sub" / "3.png")


def test_an_index_of_an_earlier_version_can_be_exported(tmp_path: Path) -> None:
    for version in sorted((Path(__file__).parent / "indexes").glob("v*")):
        index = tmp_path / version.name
        shutil.copytree(version / "index", index)
        report = export(index, tmp_path / f"{version.name} files")
        import_photos(tmp_path / f"{version.name} new", tmp_path / f"{version.name} files")
        assert held(tmp_path / f"{version.name} new") == held(index)
        assert report.photos > 0


def test_an_index_in_milvus_is_exported_as_the_one_in_a_folder_that_it_is_a_copy_of(
    library: Path, index: Path, tmp_path: Path
) -> None:
    place = f"milvus://{tmp_path}/photos.db"
    copy(index, place)
    export(index, tmp_path / "files", format="npy")
    export(place, tmp_path / "from milvus", format="npy")
    for file in (tmp_path / "files").iterdir():
        assert (tmp_path / "from milvus" / file.name).read_bytes() == file.read_bytes()
    only = searchengine.Filters(under=str(library), max_size_bytes=10)
    assert export(place, tmp_path / "none", filters=only).photos == 0


def test_an_import_goes_into_milvus_too(own_home: None, index: Path, tmp_path: Path, cli: Cli) -> None:
    export(index, tmp_path / "files", format="npy")
    place = f"milvus://{tmp_path}/new.db"
    assert cli("import", tmp_path / "files", "--index", place).code == 0
    export(place, tmp_path / "again", format="npy")
    for file in (tmp_path / "files").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


# -- whole or not at all -----------------------------------------------------------------------------------------------


def test_nothing_is_left_of_an_export_that_fails(
    library: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("indexer.exchange.npy.Writer.close", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(IndexUnusable, match="No space left on device"):
        export(index, tmp_path / "files", format="npy")
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_holds_something_is_not_written_into(library: Path, index: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is there already"):
        export(index, library)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert export(index, tmp_path / "link").photos == 9
    assert any((tmp_path / "empty").iterdir())
    with pytest.raises(UsageError, match="is a disk of its own"):
        export(index, "/proc/..")


def test_an_import_that_is_stopped_keeps_what_it_has_and_goes_on_from_there(
    library: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexer.exchange.npy.PHOTOS_AT_ONCE", 2)
    export(index, tmp_path / "files", format="npy")
    stop = threading.Event()

    def after_three(done: int, total: int) -> None:
        if done >= 3:
            stop.set()

    with pytest.raises(KeyboardInterrupt):
        import_photos(tmp_path / "new.index", tmp_path / "files", on_progress=after_three, stop=stop)
    kept = len(held(tmp_path / "new.index"))
    assert 3 <= kept < 9
    report = import_photos(tmp_path / "new.index", tmp_path / "files")
    assert (report.known, report.added) == (kept, 9 - kept)
    assert held(tmp_path / "new.index") == held(index)


def test_what_the_index_knows_already_stays_as_it_is(own_library: Path, tmp_path: Path) -> None:
    export(tmp_path / "library.index", tmp_path / "files")
    painted(50).save(own_library / "1.png")
    painted(51).save(own_library / "new.png")
    indexer.build(tmp_path / "library.index", [own_library], encoder=FakeEncoder(), isolated=False)
    before = held(tmp_path / "library.index")
    report = import_photos(tmp_path / "library.index", tmp_path / "files")
    assert (report.added, report.known) == (0, 9)
    assert held(tmp_path / "library.index") == before


def test_imported_tags_are_searched_by_and_do_not_change_those_of_the_index(tmp_path: Path) -> None:
    base = PhotoRow(
        id=1, vector_id=1, content_hash=bytes(32), store="local", key="/p/1", size_bytes=1, mtime_ns=1, etag=None,
        width=1, height=1, taken_at=None, latitude=None, longitude=None, camera=None, tags=(("dog", 0.25),),
    )  # fmt: skip
    vectors = normalise(np.random.default_rng(0).standard_normal((2, IDENTITY.dim)))
    other = replace(base, id=2, vector_id=2, key="/p/2", content_hash=b"2" * 32, tags=(("cat", 0.5), ("dog", 1.0)))
    built(tmp_path / "own.index", [base], vectors[:1])
    built(tmp_path / "others.index", [replace(base, key="/p/copy", tags=(("dog", 0.75),)), other], vectors)
    export(tmp_path / "others.index", tmp_path / "files")
    import_photos(tmp_path / "own.index", tmp_path / "files")
    tags = {fact["key"]: fact["tags"] for fact, _ in held(tmp_path / "own.index")}
    assert tags == {"/p/1": (("dog", 0.25),), "/p/copy": (("dog", 0.25),), "/p/2": (("cat", 0.5), ("dog", 1.0))}
    with searchengine.open_index(tmp_path / "own.index") as index:
        assert index.tags() == [("dog", 3), ("cat", 1)]
        assert index.count_images(searchengine.Filters(tag="cat")) == 1
    assert verify(tmp_path / "own.index").problems == []


def test_a_killed_import_leaves_no_photo_without_its_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"dog": 0.75}
    folder = plain_pair(tmp_path / "files", ENCODER.encode_texts(["one"]), [{**GOOD, "tags": tags}])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("indexer.exchange.imported_tags.ImportedTags.record", killed)
        with pytest.raises(KeyboardInterrupt):
            import_photos(tmp_path / "new.index", folder, encoder=FakeEncoder())
    import_photos(tmp_path / "new.index", folder, encoder=FakeEncoder())
    assert [dict(fact["tags"]) for fact, _ in held(tmp_path / "new.index")] == [tags]


def test_of_rows_with_one_name_the_first_counts(tmp_path: Path) -> None:
    vectors = ENCODER.encode_texts(["one", "two"])
    folder = plain_pair(tmp_path / "files", vectors, [GOOD, {**GOOD, "content_hash": "1" * 64}])
    report = import_photos(tmp_path / "new.index", folder, encoder=FakeEncoder())
    assert (report.photos, report.added, report.known, report.vectors) == (2, 1, 1, 1)
    [(fact, vector)] = held(tmp_path / "new.index")
    assert (fact["content_hash"], vector) == (bytes(32), vectors[0].tobytes())
    assert verify(tmp_path / "new.index").problems == []


# -- files of other programs -------------------------------------------------------------------------------------------


def as_clip_retrieval_writes(folder: Path, vectors: FloatMatrix, **columns: list[Any]) -> Path:
    """Its writer: float16 by np.save, and a frame of pandas; it tells nothing else."""
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    np.save(folder / "img_emb" / "img_emb_0.npy", vectors.astype(np.float16))
    pd.DataFrame(columns).to_parquet(folder / "metadata" / "metadata_0.parquet")
    return folder


@pytest.fixture
def foreign(own_library: Path, tmp_path: Path) -> Path:
    """What clip-retrieval would have made of four photos, one of which is gone."""
    files = [own_library / f"{seed}.png" for seed in range(4)]
    vectors = ENCODER.encode_images([str(file) for file in files])
    files[3].unlink()
    captions = [f"blocks {seed}" for seed in range(4)]
    return as_clip_retrieval_writes(
        tmp_path / "foreign", vectors, image_path=[str(file) for file in files], caption=captions
    )


def test_photos_that_others_embedded_are_hashed_so_that_the_next_run_embeds_nothing(
    foreign: Path, own_library: Path, tmp_path: Path
) -> None:
    skipped: list[str] = []
    encoder = FakeEncoder()
    report = import_photos(
        tmp_path / "new.index", foreign, encoder=encoder, on_skip=lambda key, reason: skipped.append(key)
    )
    assert (report.added, report.read, report.unread, report.compared) == (4, 3, 1, 3)
    assert skipped == [str(own_library / "3.png")]
    for seed in range(4, 7):
        (own_library / f"{seed}.png").unlink()
    embedded = sum(encoder.batches)
    run = indexer.build(tmp_path / "new.index", [own_library], encoder=encoder, isolated=False)
    assert (run.unchanged, run.added, run.deleted) == (3, 2, 1)
    assert sum(encoder.batches) - embedded == 1  # one is a copy


def test_a_photo_that_could_not_be_read_is_found_by_its_vector_and_read_when_it_is_there(
    foreign: Path, own_library: Path, tmp_path: Path
) -> None:
    import_photos(tmp_path / "new.index", foreign, encoder=FakeEncoder(), read=False)
    lost = painted(3)
    with searchengine.open_index(tmp_path / "new.index") as index:
        [hit] = searchengine.Searcher(index, FakeEncoder()).search_image(lost, k=1)
        assert (hit.path, hit.width) == (str(own_library / "3.png"), 0)
    lost.save(own_library / "3.png")
    report = import_photos(tmp_path / "new.index", foreign, encoder=FakeEncoder())
    assert (report.added, report.read, report.unread) == (4, 4, 0)
    assert {fact["width"] for fact, _ in held(tmp_path / "new.index")} == {60}
    run = indexer.build(tmp_path / "new.index", [own_library], encoder=FakeEncoder(), isolated=False)
    assert run.unchanged == 4


def test_relative_paths_begin_where_the_user_says_and_urls_serve_where_a_path_leads_nowhere(
    library: Path, tmp_path: Path
) -> None:
    vectors = ENCODER.encode_images([str(library / f"{seed}.png") for seed in range(3)])
    folder = as_clip_retrieval_writes(
        tmp_path / "foreign",
        vectors,
        image_path=["0.png", "../library/1.png", "000000002"],
        url=[None, "http://127.0.0.1:9/unused.jpg", "https://example.org/2.png"],
    )
    import_photos(tmp_path / "new.index", folder, encoder=FakeEncoder(), root=library, read=False)
    assert [(fact["store"], fact["key"]) for fact, _ in held(tmp_path / "new.index")] == [
        ("local", str(library / "0.png")),
        ("local", str(library / "1.png")),
        ("https", "https://example.org/2.png"),
    ]


def test_columns_of_others_that_mean_something_else_are_no_hindrance(tmp_path: Path) -> None:
    record = {"path": "/p/1.jpg", "store": "a shop", "tags": ["sale"], "width": "wide", "camera": 7}
    folder = plain_pair(tmp_path / "files", ENCODER.encode_texts(["one"]), [record])
    import_photos(tmp_path / "new.index", folder, encoder=FakeEncoder(), read=False)
    [(fact, _)] = held(tmp_path / "new.index")
    assert (fact["store"], fact["key"], fact["tags"], fact["width"], fact["camera"]) == (
        "local",
        "/p/1.jpg",
        (),
        0,
        None,
    )


def test_vectors_that_another_encoder_made_are_refused(foreign: Path, tmp_path: Path) -> None:
    class Other(FakeEncoder):
        def encode_pixels(self, pixels: Any) -> FloatMatrix:
            return np.roll(super().encode_pixels(pixels), 1, axis=1)

    with pytest.raises(UsageError, match="does not say which encoder made its vectors; name it with --model"):
        import_photos(tmp_path / "new.index", foreign)
    with pytest.raises(ModelMismatch, match="of 3 photos that could be read"):
        import_photos(tmp_path / "new.index", foreign, encoder=Other(name="other"))
    with pytest.raises(ModelMismatch, match="16 dimensions, those of encoder wide 32"):
        import_photos(tmp_path / "wide.index", foreign, encoder=FakeEncoder(name="wide", dim=32))


def test_an_export_is_refused_for_another_encoder_and_by_the_index_of_another(
    library: Path, index: Path, tmp_path: Path
) -> None:
    export(index, tmp_path / "files")
    with pytest.raises(ModelMismatch, match="were made by encoder fake .* not by other"):
        import_photos(tmp_path / "new.index", tmp_path / "files", encoder=FakeEncoder(name="other"))
    indexer.build(tmp_path / "other.index", [library], encoder=FakeEncoder(name="other"), isolated=False)
    with pytest.raises(ModelMismatch, match="was made by encoder other"):
        import_photos(tmp_path / "other.index", tmp_path / "files")


def test_an_import_commits_what_it_has_when_a_store_stops_answering(
    foreign: Path, own_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, reads = KnownStores.of, list[str]()

    class Dead:
        def __init__(self, store: ImageStore) -> None:
            self.store = store

        def __getattr__(self, name: str) -> Any:
            return getattr(self.store, name)

        def read(self, key: str, *, max_bytes: int) -> Any:
            reads.append(key)
            if key.endswith("2.png") and reads.count(key) == 2:  # the first time it is compared
                raise StoreUnusable("the bucket does not answer")
            return self.store.read(key, max_bytes=max_bytes)

    with monkeypatch.context() as patched:
        patched.setattr(KnownStores, "of", lambda stores, name, key: Dead(real(stores, name, key)))
        with pytest.raises(StoreUnusable, match="does not answer"):
            import_photos(tmp_path / "new.index", foreign, encoder=FakeEncoder(), workers=1)
    assert [Path(fact["key"]).name for fact, _ in held(tmp_path / "new.index")] == ["0.png", "1.png"]
    assert import_photos(tmp_path / "new.index", foreign, encoder=FakeEncoder()).known == 2


def test_a_host_of_the_web_that_does_not_answer_costs_its_own_photos_alone(
    own_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def dead(store: RemoteStore, key: str, *, max_bytes: int) -> Any:
        asked.append(key)
        raise StoreUnusable("the connection failed")

    monkeypatch.setattr(RemoteStore, "read", dead)
    photo = str(own_library / "0.png")
    folder = plain_pair(
        tmp_path / "files",
        ENCODER.encode_images([photo] * 3),
        [{"path": "https://gone.test/1.jpg"}, {"path": photo}, {"path": "https://gone.test/2.jpg"}],
    )
    skipped: list[str] = []
    report = import_photos(
        tmp_path / "new.index", folder, encoder=FakeEncoder(), on_skip=lambda key, reason: skipped.append(reason)
    )
    assert (report.added, report.read, report.unread) == (3, 1, 2)
    assert skipped == ["cannot be read: the connection failed"] * 2
    assert import_photos(tmp_path / "new.index", folder, encoder=FakeEncoder()).known == 1


# -- files that are damaged, or hostile --------------------------------------------------------------------------------


class Trap:
    """Its pickle would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def plain_pair(folder: Path, vectors: np.ndarray[Any, Any], lines: list[Any]) -> Path:
    folder.mkdir()
    np.save(folder / "embeddings.npy", vectors)
    (folder / "photos.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04 no archive",
        *(
            b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
            for header in (
                b"{'descr': (",
                b"{" * 90 + b"}" * 90,
                b"-" * 5000 + b"1",
                b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 8)}",
                b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999999, 8)}",
            )
        ),
    ],
)
def test_a_matrix_whose_header_lies_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = plain_pair(tmp_path / "files", np.zeros((1, 8)), [GOOD])
    (folder / "embeddings.npy").write_bytes(content)
    with pytest.raises(UsageError, match="is no matrix of numbers"):
        import_photos(tmp_path / "new.index", folder, encoder=FakeEncoder())


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    folder = plain_pair(tmp_path / "files", ENCODER.encode_texts(["one"]), [GOOD])
    (folder / "photos.jsonl").unlink()
    (folder / "photos.jsonl").mkdir()
    with pytest.raises(UsageError, match=r"photos.jsonl cannot be read \(Is a directory\)"):
        import_photos(tmp_path / "new.index", folder, encoder=FakeEncoder())


def test_no_pickle_is_executed(tmp_path: Path) -> None:
    folder = plain_pair(tmp_path / "files", np.array([Trap(tmp_path / "mark")]), [{"path": "/p/1.jpg"}])
    with pytest.raises(UsageError, match="is no matrix of numbers"):
        import_photos(tmp_path / "new.index", folder, encoder=FakeEncoder())
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "new.index").exists()


GOOD = {
    "path": "/p/1.jpg",
    "store": "local",
    "content_hash": "0" * 64,
    "size_bytes": 1,
    "mtime_ns": 1,
    "width": 1,
    "height": 1,
}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "path is None"),
        ({"path": "/a\0b"}, "it must be the path of a photo"),
        ({"path": "/p/\ud800"}, "it must be the path of a photo"),
        ({"image_path": 7, "url": "https://example.org/1.jpg"}, "path is 7"),
        ({**GOOD, "path": "1.jpg"}, "must be absolute"),
        ({**GOOD, "store": 7}, "store is 7"),
        ({**GOOD, "content_hash": "00"}, "content_hash is '00'; it must be a sha256"),
        ({**GOOD, "size_bytes": -1}, "size_bytes is -1"),
        ({**GOOD, "mtime_ns": 2**63}, "mtime_ns is 9223372036854775808"),
        ({**GOOD, "width": True}, "width is True"),
        ({**GOOD, "taken_at": "yesterday"}, "taken_at is 'yesterday'"),
        ({**GOOD, "latitude": 90.5}, "latitude is 90.5"),
        ({**GOOD, "latitude": 10**400}, "latitude is 1000"),
        ({**GOOD, "longitude": float("nan")}, "longitude is nan"),
        ({**GOOD, "camera": "\ud800"}, "it must be a text"),
        ({**GOOD, "tags": {"dog": 1.5}}, "tags is 1.5"),
        ({**GOOD, "tags": ["dog"]}, "tags is"),
        ([1], "is no object of JSON"),
    ],
)
def test_facts_that_cannot_be_are_refused_with_their_photo(tmp_path: Path, record: Any, message: str) -> None:
    vectors = ENCODER.encode_texts(["one", "two"])
    folder = plain_pair(tmp_path / "files", vectors, [GOOD, record])
    with pytest.raises(UsageError, match=message) as raised:
        import_photos(tmp_path / "new.index", folder, encoder=FakeEncoder(), read=False)
    assert "photo 2" in str(raised.value) or "line 2" in str(raised.value)


def test_times_are_kept_in_the_way_that_filters_compare(tmp_path: Path) -> None:
    times = ["20230705T060708", "2023-07-05T06:07:08+02:00", "2023-07-05 06:07:08", "2023-07-05T06:07:08"]
    records = [{**GOOD, "path": f"/p/{number}.jpg", "taken_at": time} for number, time in enumerate(times)]
    folder = plain_pair(tmp_path / "files", ENCODER.encode_texts(times), records)
    import_photos(tmp_path / "new.index", folder, encoder=FakeEncoder())
    assert {fact["taken_at"] for fact, _ in held(tmp_path / "new.index")} == {"2023-07-05T06:07:08"}


@pytest.mark.parametrize(
    "secret", ["https://me:hunter2@example.org/1.jpg", "https://b.s3.amazonaws.com/1.jpg?X-Amz-Signature=hunter2"]
)
def test_a_url_with_a_secret_is_refused_and_the_secret_not_shown(tmp_path: Path, secret: str) -> None:
    for number, record in enumerate(({"path": secret}, {**GOOD, "store": "https", "path": secret})):
        folder = plain_pair(tmp_path / f"files{number}", ENCODER.encode_texts(["one"]), [record])
        with pytest.raises(UsageError) as raised:
            import_photos(tmp_path / "new.index", folder, encoder=FakeEncoder(), read=False)
        assert "hunter2" not in str(raised.value)


def test_vectors_that_are_no_unit_vectors_are_refused(tmp_path: Path) -> None:
    good = ENCODER.encode_texts(["one", "two"])
    for number, wrong in enumerate((3 * good, 0 * good, np.full_like(good, np.nan))):
        folder = plain_pair(
            tmp_path / f"files{number}", np.vstack([good[:1], wrong[1:]]), [GOOD, {**GOOD, "path": "/p/2"}]
        )
        with pytest.raises(UsageError, match="vector 2 in .* has length"):
            import_photos(tmp_path / f"{number}.index", folder, encoder=FakeEncoder())


def test_files_that_do_not_belong_together_are_refused(library: Path, index: Path, tmp_path: Path) -> None:
    for format_ in FORMATS:
        export(index, tmp_path / format_, format=format_)
    pair = tmp_path / "npy" / "photos.jsonl"
    lines = pair.read_text().splitlines(keepends=True)
    for wrong, message in ((lines[:-1], "has 8 lines for 9 vectors"), ([*lines, lines[0]], "at least 10 lines for 9")):
        pair.write_text("".join(wrong))
        with pytest.raises(UsageError, match=message):
            import_photos(tmp_path / "new.index", tmp_path / "npy")
    matrix = tmp_path / "clip-retrieval" / "img_emb" / "img_emb_0.npy"
    np.save(matrix, np.load(matrix)[:5])
    with pytest.raises(UsageError, match="has 5 vectors, and .* 9 rows"):
        import_photos(tmp_path / "new.index", tmp_path / "clip-retrieval")
    table = tmp_path / "parquet" / "photos-00000.parquet"
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(UsageError, match="cannot be read as Parquet"):
        import_photos(tmp_path / "new.index", tmp_path / "parquet")
    with pytest.raises(UsageError, match="holds no photos with vectors"):
        import_photos(tmp_path / "new.index", library)


def test_parquet_of_others_may_have_vectors_in_lists_of_any_kind_but_not_of_any_length(tmp_path: Path) -> None:
    vectors = ENCODER.encode_texts(["one", "two"])
    (tmp_path / "files").mkdir()
    file = tmp_path / "files" / "theirs.parquet"
    for kind in (pa.list_(pa.float64()), pa.large_list(pa.float32())):
        pq.write_table(pa.table({"path": ["/p/1", "/p/2"], "embedding": pa.array(vectors.tolist(), kind)}), file)
        [(records, matrix)] = open_source(tmp_path / "files").chunks()
        assert np.allclose(matrix, vectors)
        assert [record["path"] for record in records] == ["/p/1", "/p/2"]
    for wrong in ([[1.0, 0.0], [1.0]], [[1.0, 0.0], None], [[1.0, 0.0], [None, 1.0]]):
        pq.write_table(pa.table({"path": ["/p/1", "/p/2"], "embedding": wrong}), file)
        with pytest.raises(UsageError, match="a vector is missing, or is shorter than another"):
            import_photos(tmp_path / "new.index", tmp_path / "files", encoder=FakeEncoder())
    embeddings = pa.array(vectors.tolist())
    no_text = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 4, 8], "<i4")), pa.py_buffer(b"/p/\xff/p/\xfe"))
    labels = pa.array([[{"label": {"of": "another"}, "probability": 0.5}]] * 2)
    for hostile in (
        pa.table({"path": no_text, "embedding": embeddings}),
        pa.table({"path": ["/p/1", "/p/2"], "tags": labels, "embedding": embeddings}),
        pa.table([pa.array(["/p/1", "/p/2"])] * 2 + [embeddings], names=["path", "path", "embedding"]),
    ):
        pq.write_table(hostile, file)
        with pytest.raises(UsageError, match="cannot be read as Parquet"):
            import_photos(tmp_path / "new.index", tmp_path / "files", encoder=FakeEncoder())
    pq.write_table(pa.table({"path_bytes": [b"/p/\xff", b"/p/2"], "embedding": embeddings}), file)
    assert [record["path"] for records, _ in open_source(tmp_path / "files").chunks() for record in records] == [
        "/p/\udcff",
        "/p/2",
    ]
    pq.write_table(pa.table({"path": ["/p/1"], "embedding": ["no vector"]}), file)
    with pytest.raises(UsageError, match="it must be a list of floats"):
        import_photos(tmp_path / "new.index", tmp_path / "files", encoder=FakeEncoder())


def test_without_pyarrow_the_message_names_the_extra(
    library: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        UsageError, match=r"needs the extra parquet; install it with: pip install 'searchengine\[parquet\]'"
    ):
        export(index, tmp_path / "files")
    assert not (tmp_path / "files").exists()
    assert export(index, tmp_path / "files", format="npy").photos == 9


# -- the command line --------------------------------------------------------------------------------------------------


def test_where_photos_are_now_is_told_from_the_current_folder(
    own_home: None, library: Path, index: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(index, tmp_path / "files", format="npy")
    monkeypatch.chdir(tmp_path)
    done = cli("import", "files", "--index", tmp_path / "new.index", "--moved", library, "photos/now")
    assert done.code == 0
    now = os.path.join(os.path.realpath(tmp_path), "photos", "now")
    assert {os.path.dirname(fact["key"]) for fact, _ in held(tmp_path / "new.index")} == {now}


def test_the_commands_tell_what_they_did(own_home: None, library: Path, index: Path, tmp_path: Path, cli: Cli) -> None:
    files = tmp_path / "files"
    done = cli("export", files, "--index", index, "--format", "clip-retrieval", "--dtype", "float16", "--json")
    assert done.code == 0
    [report] = done.lines
    assert (report["photos"], report["format"], report["dtype"], report["model"]) == (
        9,
        "clip-retrieval",
        "float16",
        "fake",
    )
    done = cli("import", files, "--index", tmp_path / "new.index", "--json")
    assert done.code == 0
    [report] = done.lines
    assert (report["photos"], report["added"], report["vectors"], report["model"]) == (9, 9, 8, "fake")
    assert cli("status", "--index", tmp_path / "new.index", "--json").lines[0]["images"] == 9
    assert "9 were known" in cli("import", files, "--index", tmp_path / "new.index").out
    done = cli("export", tmp_path / "none", "--index", index, "--after", "2024")
    assert (done.code, done.out) == (1, "")
    assert not (tmp_path / "none").exists()
    done = cli("import", files, "--index", tmp_path / "new.index", "--model", "mini")
    assert done.code == 4
    assert "leave --model away" in done.err
    assert cli("import", tmp_path / "nowhere", "--index", tmp_path / "new.index").code == 2
