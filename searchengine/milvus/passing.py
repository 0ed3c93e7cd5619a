"""Which of some photos pass a filter that Milvus cannot express: SQLite is asked, as for an index on disk."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.pool import StaticPool

from searchengine.filters import Filters
from searchengine.index.filters import condition_of
from searchengine.index.schema import images, labels, tags
from searchengine.milvus.schema import ESCAPED_FIELDS, ROW_FIELDS, unescaped

# What must be known of photos for it.
FIELDS = (*ROW_FIELDS, "etag", "tags")


class Passing:
    """Tables in memory, which hold the photos in question while one filter is asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engine = sa.create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
        with self._engine.begin() as connection:
            for table in (images, labels, tags):
                names = ", ".join(f'"{column.name}"' for column in table.columns)
                connection.exec_driver_sql(f"CREATE TABLE {table.name} ({names})")

    def close(self) -> None:
        self._engine.dispose()

    def among(self, entities: Sequence[dict[str, Any]], filters: Filters) -> set[int]:
        """The ids of those of some photos, all different, that pass; each with `FIELDS`."""
        if not entities:
            return set()
        numbers = {label: number for number, label in enumerate({tag for one in entities for tag in one["tags"]}, 1)}
        tagged = {(one["vector_id"], numbers[tag]) for one in entities for tag in one["tags"]}
        with self._lock, self._engine.connect() as connection:
            connection.execute(images.insert(), [plain(entity, (*ROW_FIELDS, "etag")) for entity in entities])
            if tagged:
                named = [{"id": number, "label": unescaped(tag), "tagging_id": 0} for tag, number in numbers.items()]
                connection.execute(labels.insert(), named)
                rows = [{"vector_id": vector, "label_id": label, "probability": 0.0} for vector, label in tagged]
                connection.execute(tags.insert(), rows)
            found = set(connection.execute(sa.select(images.c.id).where(condition_of(filters))).scalars())
            connection.rollback()
        return found


def plain(entity: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Some fields of an entity, with texts as they were before they were escaped."""
    return {
        name: unescaped(entity[name]) if name in ESCAPED_FIELDS and entity[name] is not None else entity[name]
        for name in names
    }
