"""Tags that come with photos, in one transaction with these.

A label that the index has already keeps what it says of the index's own photos.
"""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa

from indexer.lock import now
from searchengine.index.schema import labels, taggings

# No request of `classify --write-tags` is like this one, so none takes the imported tags for its own.
NO_REQUEST = {"templates": [], "top": 0, "min_probability": 0.0, "through_id": 0}

TAG = """
    INSERT OR IGNORE INTO tags
    SELECT vectors.id, labels.id, ? FROM vectors, labels WHERE vectors.content_hash = ? AND labels.label = ?
"""


class ImportedTags:
    """Keeps tags until their vectors are committed, which is when to `record` them."""

    def __init__(self, *, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        self._waiting: list[tuple[float, bytes, str]] = []

    def add(self, content_hash: bytes, tags: Mapping[str, float]) -> None:
        self._waiting += [(share, content_hash, label) for label, share in tags.items()]

    def record(self, connection: sa.Connection) -> None:
        if not self._waiting:
            return
        known = set(connection.execute(sa.select(labels.c.label)).scalars())
        if new := sorted({label for _, _, label in self._waiting} - known):
            tagging = {"made_at": now(), "fingerprint": self._fingerprint, "labels": new, **NO_REQUEST}
            made = connection.execute(sa.insert(taggings).values(tagging)).inserted_primary_key
            assert made is not None
            connection.execute(sa.insert(labels), [{"label": label, "tagging_id": made[0]} for label in new])
        connection.exec_driver_sql(TAG, self._waiting)
        self._waiting = []
