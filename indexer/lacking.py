"""What the vectors in `next/` lack of an index: its contents, and the photos that may still have them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np

from indexer.crawl import Change
from searchengine.index.layout import IndexPaths
from searchengine.index.schema import encode_key, open_read_only
from searchengine.index.segments import Ids
from searchengine.stores import KnownStores, StoredPhoto

ROWS_PER_PAGE = 1000

PHOTOS = """
    SELECT {id}, images.vector_id, images.store, images.key, images.size_bytes, images.mtime_ns, known.content_hash
    FROM main.images JOIN main.vectors AS known ON known.id = images.vector_id
    WHERE images.vector_id > ?
      AND NOT EXISTS (SELECT 1 FROM next.vectors AS made WHERE made.content_hash = known.content_hash)
"""
UNTRIED = (
    PHOTOS.format(id="min(images.id)")
    + """
      AND NOT EXISTS (
        SELECT 1 FROM tried
        WHERE tried.image_id = images.id AND tried.vector_id = images.vector_id AND tried.key = images.key
      )
    GROUP BY images.vector_id ORDER BY images.vector_id LIMIT ?
"""
)
LACKING = PHOTOS.format(id="images.id")

# `wanted` holds what photos that changed have now; their contents may be new to the index.
PAIRS = """
    SELECT made.id, coalesce(wanted.vector_id, known.id)
    FROM next.vectors AS made
    LEFT JOIN main.vectors AS known ON known.content_hash = made.content_hash
    LEFT JOIN wanted ON wanted.content_hash = made.content_hash
    WHERE made.segment_id = ?
      AND (wanted.vector_id IS NOT NULL OR EXISTS (SELECT 1 FROM main.images WHERE images.vector_id = known.id))
    ORDER BY made.id
"""


@dataclass(frozen=True, kw_only=True)
class KnownPhoto(Change):
    """A photo of the index, as it was when it was indexed."""

    image_id: int
    vector_id: int
    content_hash: bytes

    @property
    def name(self) -> tuple[int, int, str]:
        """Another one as soon as the index has another content or another place of the photo."""
        return self.image_id, self.vector_id, self.listed.key


class Lacking:
    """Looks at an index and at its `next/`, on a connection that writes nothing but temporary tables. `close` it."""

    def __init__(self, paths: IndexPaths) -> None:
        self._stores = KnownStores()
        self._connection = open_read_only(paths.database)
        address = f"file:{quote(os.fsencode(paths.next.database))}?mode=ro"
        self._connection.isolation_level = None
        self._connection.execute("ATTACH ? AS next", (address,))
        self._connection.execute("PRAGMA temp_store = FILE")
        self._connection.execute(
            "CREATE TEMP TABLE tried (image_id, vector_id, key, PRIMARY KEY (image_id, vector_id, key))"
        )
        self._connection.execute("CREATE TEMP TABLE wanted (content_hash PRIMARY KEY, vector_id)")

    def close(self) -> None:
        self._connection.close()

    def count(self) -> tuple[int, int]:
        """How many contents photos of the index have, and how many of these `next/` has."""
        query = "SELECT count(DISTINCT vector_id) FROM main.images"
        (contents,) = self._connection.execute(query).fetchone()
        query = f"SELECT count(DISTINCT vector_id) FROM ({LACKING})"
        (lacking,) = self._connection.execute(query, (0,)).fetchone()
        return contents, contents - lacking

    def photos(self) -> Iterator[KnownPhoto]:
        """For each content that is lacking, one photo that had it when it was indexed and was not `tried` yet."""
        after = 0
        while page := self._connection.execute(UNTRIED, (after, ROWS_PER_PAGE)).fetchall():
            yield from map(self._photo, page)
            after = page[-1][1]

    def note_tried(self, photo: KnownPhoto) -> None:
        """It does not have that content any more, as far as can be told."""
        image_id, vector_id, key = photo.name
        self._connection.execute("INSERT OR IGNORE INTO tried VALUES (?, ?, ?)", (image_id, vector_id, encode_key(key)))

    def lost(self) -> Iterator[KnownPhoto]:
        """All photos whose content is lacking."""
        yield from map(self._photo, self._connection.execute(f"{LACKING} ORDER BY images.id", (0,)))

    def want(self, contents: Iterable[bytes], *, first_id: int) -> list[tuple[int, bytes]]:
        """Contents that photos have now. Those new to the index get ids from `first_id` on, and are returned."""
        new: list[tuple[int, bytes]] = []
        for content_hash in dict.fromkeys(contents):
            query = "SELECT id FROM main.vectors WHERE content_hash = ?"
            known = self._connection.execute(query, (content_hash,)).fetchone()
            vector_id = known[0] if known else first_id + len(new)
            if not known:
                new.append((vector_id, content_hash))
            self._connection.execute("INSERT INTO wanted VALUES (?, ?)", (content_hash, vector_id))
        return new

    def segments(self) -> list[tuple[int, str, int, str]]:
        """Of `next/`: id, file, count and sha256."""
        return self._connection.execute("SELECT id, file, count, sha256 FROM next.segments ORDER BY id").fetchall()

    def pairs(self, segment_id: int) -> tuple[Ids, Ids]:
        """Those vectors of a segment of `next/` that the index has a use for: their ids there, rising, and here."""
        rows = self._connection.execute(PAIRS, (segment_id,)).fetchall()
        both: Ids = np.array(rows, dtype=np.int64).reshape(-1, 2)
        return both[:, 0], both[:, 1]

    def _photo(self, row: tuple[int, int, bytes, bytes, int, int, bytes]) -> KnownPhoto:
        image_id, vector_id, store, key_bytes, size_bytes, mtime_ns, content_hash = row
        key = key_bytes.decode("utf-8", "surrogateescape")
        return KnownPhoto(
            store=self._stores.of(store.decode("utf-8", "surrogateescape"), key),
            listed=StoredPhoto(key, size_bytes, mtime_ns),
            known=True,
            image_id=image_id,
            vector_id=vector_id,
            content_hash=content_hash,
        )
