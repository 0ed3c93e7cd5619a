"""What an index must hold, worked out without it: from the folders by os.walk, and from an index made anew."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from searchengine.formats import EXTENSIONS, looks_like_photo
from searchengine.stores import HEAD_BYTES

# photos: path -> facts, failures: path -> facts, vectors: content hash -> id.
Dump = dict[str, dict[str, Any]]


def dump(index: Path) -> Dump:
    """All that an index says, read past the product's own reader. Raises AssertionError where it contradicts itself."""
    with sqlite3.connect(f"file:{index}/metadata.sqlite?mode=ro", uri=True) as connection:
        photos = connection.execute(
            "SELECT key, id, vector_id, size_bytes, mtime_ns, width, height, taken_at, camera, latitude, longitude, "
            "store FROM images"
        ).fetchall()
        failures = connection.execute("SELECT key, size_bytes, mtime_ns, reason, store FROM failures").fetchall()
        contents = {id_: (content, segment) for id_, content, segment in connection.execute("SELECT * FROM vectors")}
        segments = connection.execute("SELECT id, file, count, sha256 FROM segments").fetchall()
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)], "SQLite finds damage"
    connection.close()
    stored = _vectors_of(index, segments)
    for id_, (_, segment) in contents.items():
        assert stored.get(id_, (None, None))[0] == segment, f"vector {id_} is not in its segment {segment}"
    return {
        "photos": {
            os.fsdecode(key): {
                "id": id_,
                "vector_id": vector_id,
                "segment": contents[vector_id][1],
                "content": contents[vector_id][0].hex(),
                "vector": stored[vector_id][1],
                "facts": facts,
            }
            for key, id_, vector_id, *facts in ((*row[:-1], row[-1].decode()) for row in photos)
        },
        "failures": {os.fsdecode(key): [*facts, store.decode()] for key, *facts, store in failures},
        "vectors": {content.hex(): id_ for id_, (content, _) in contents.items()},
    }


def _vectors_of(index: Path, segments: Sequence[tuple[int, str, int, str]]) -> dict[int, tuple[int, str]]:
    """vector id -> (segment, the vector's bytes in hex)"""
    found: dict[int, tuple[int, str]] = {}
    for number, file, count, sha256 in segments:
        path = index / "segments" / file
        assert path.exists(), f"the segment {file} is missing"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256, f"the segment {file} has another sha256"
        loaded = faiss.read_index(str(path))
        ids = faiss.vector_to_array(loaded.id_map)
        rows = faiss.rev_swig_ptr(faiss.downcast_index(loaded.index).get_xb(), loaded.ntotal * loaded.d)
        matrix = rows.reshape(loaded.ntotal, loaded.d)
        assert len(ids) == count, f"the segment {file} has {len(ids)} vectors, not {count}"
        assert np.allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-3), (
            f"the segment {file} has rows that are not unit"
        )
        for id_, row in zip(ids.tolist(), matrix, strict=True):
            assert id_ not in found, f"vector {id_} is in two segments"
            found[id_] = (number, row.tobytes().hex())
    return found


def leftovers(index: Path) -> list[str]:
    """Files in the folder of an index that nobody writes, which do not belong there."""
    with sqlite3.connect(f"file:{index}/metadata.sqlite?mode=ro", uri=True) as connection:
        named = {f"segments/{file}" for (file,) in connection.execute("SELECT file FROM segments")}
    connection.close()
    expected = named | {"index.json", "lock", "metadata.sqlite", "metadata.sqlite-wal", "metadata.sqlite-shm"}
    files = {str(file.relative_to(index)) for file in index.rglob("*") if not file.is_dir()}
    return sorted(files - expected)


def photos_in(stores: Sequence[Path]) -> dict[str, list[Any]]:
    """path -> [sha256 of its content, size, mtime] of every file that an index of `stores` must know of."""
    found: dict[str, list[Any]] = {}
    for store in map(os.path.realpath, stores):
        for folder, folders, files in os.walk(store):
            folders[:] = [
                name for name in folders if not name.startswith(".") and name not in ("@eaDir", "node_modules")
            ]
            for name in files:
                path = os.path.join(folder, name)
                within = os.path.realpath(path).startswith(store + os.sep)
                if name.startswith(".") or not within or not os.path.isfile(path):
                    continue
                data, status = Path(path).read_bytes(), os.stat(path)
                extension = os.path.splitext(name)[1].lower()
                if extension in EXTENSIONS or (not extension and looks_like_photo(data[:HEAD_BYTES])):
                    found[path] = [hashlib.sha256(data).hexdigest(), status.st_size, status.st_mtime_ns]
    return found


def differences(index: Dump, fresh: Dump, files: dict[str, list[Any]], *, same_bits: bool) -> list[str]:
    """How an index differs from a new one of the same files, and from the files themselves.

    Without `same_bits`, vectors may differ by rounding: some encoders compute a photo not quite alike in any batch.
    """
    wrong = []
    for kind in ("photos", "failures"):
        for name in sorted(index[kind].keys() | fresh[kind].keys()):
            ours, theirs = (_without_ids(each[kind].get(name)) for each in (index, fresh))
            if ours != theirs and (same_bits or not _nearly_same(ours, theirs)):
                wrong.append(f"{kind}: {name!r} is {_short(ours)}, in a new index {_short(theirs)}")
    for name in sorted(files.keys() | index["photos"].keys() | index["failures"].keys()):
        known = index["photos"].get(name)
        if name not in files:
            wrong.append(f"{name!r} is in the index, but is no file")
        elif known is None and name not in index["failures"]:
            wrong.append(f"{name!r} is a file, but not in the index")
        elif known and [known["content"], *known["facts"][:2]] != files[name]:
            wrong.append(f"{name!r} is {files[name]}, in the index {known['content']} {known['facts'][:2]}")
        elif known and name in index["failures"]:
            wrong.append(f"{name!r} is both a photo and a failure")
    return wrong


def instabilities(before: Dump, now: Dump, files: dict[str, list[Any]], *, ids: bool, vectors: bool) -> list[str]:
    """Ids that should have stayed: of photos that did not change or just moved, and of vectors."""
    wrong = []
    if vectors:
        for content, id_ in before["vectors"].items():
            if now["vectors"].get(content) != id_:
                wrong.append(f"the vector of content {content[:12]} was {id_}, is {now['vectors'].get(content)}")
    if ids:
        homes = _by_content(before), _by_content(now)
        for name, photo in before["photos"].items():
            content = photo["content"]
            after = now["photos"].get(name)
            if after and after["content"] == content:
                ids_before, ids_after = ([each["id"], each["vector_id"]] for each in (photo, after))
                if ids_before != ids_after:
                    wrong.append(f"{name!r} did not change; its ids were {ids_before}, are {ids_after}")
            if name in files or [len(home.get(content, ())) for home in homes] != [1, 1]:
                continue
            (new_name,) = homes[1][content]
            if new_name not in before["photos"] and now["photos"][new_name]["id"] != photo["id"]:
                moved_id = now["photos"][new_name]["id"]
                wrong.append(f"{name!r} moved to {new_name!r}; its id was {photo['id']}, is {moved_id}")
    known = Counter(photo["id"] for photo in now["photos"].values())
    wrong += [f"the id {id_} is given {count} times" for id_, count in known.items() if count > 1]
    return wrong


def _by_content(index: Dump) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, photo in index["photos"].items():
        names.setdefault(photo["content"], []).append(name)
    return names


def _without_ids(entry: Any) -> Any:
    return (
        {k: v for k, v in entry.items() if k not in ("id", "vector_id", "segment")}
        if isinstance(entry, dict)
        else entry
    )


def _nearly_same(one: Any, two: Any) -> bool:
    if not (isinstance(one, dict) and isinstance(two, dict)):
        return False
    first, second = (np.frombuffer(bytes.fromhex(each["vector"]), np.float32) for each in (one, two))
    return one | {"vector": ""} == two | {"vector": ""} and bool(np.allclose(first, second, atol=1e-4))


def _short(entry: Any) -> str:
    if isinstance(entry, dict):
        return f"{entry['content'][:12]} {entry['facts']} vector {entry['vector'][:12]}"
    return "not there" if entry is None else str(entry)
