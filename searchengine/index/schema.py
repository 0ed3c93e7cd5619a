"""The tables of ``metadata.sqlite`` and their numbered migrations.

A vector's id is its id in the FAISS segments. Two copies of one photo are two rows of `images` and one of `vectors`.
A vector that no image names is dead: searches pass over it, and it comes back to life when its photo does.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.pool import NullPool, StaticPool

from searchengine.errors import IndexTooNew
from searchengine.text import printable

# How long a writer waits for another program that looks into the tables and holds them.
BUSY_SECONDS = 30.0
LISTING_CACHE_KIB = 512  # for temporary tables: what a run lists, which is read from its beginning to its end


class Key(sa.types.TypeDecorator[str]):
    """Text that may hold bytes which are not UTF-8 (PEP 383), stored as the bytes it stands for: exact and sortable."""

    impl = sa.LargeBinary
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> bytes | None:
        return None if value is None else encode_key(value)

    def process_result_value(self, value: bytes | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else value.decode("utf-8", "surrogateescape")


def encode_key(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _etag() -> sa.Column[str | None]:
    """What a store says changes with the content. `system` leaves it to the migration that adds it to the tables."""
    return sa.Column("etag", sa.Text, system=True)


metadata = sa.MetaData()

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("started_at", sa.Text, nullable=False),
    sa.Column("finished_at", sa.Text),
    sa.Column("process", sa.Text, nullable=False),
    sa.Column("report", sa.JSON),
)

segments = sa.Table(
    "segments",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("file", sa.Text, nullable=False, unique=True),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
    sqlite_autoincrement=True,
)

vectors = sa.Table(
    "vectors",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("content_hash", sa.LargeBinary, nullable=False, unique=True),
    sa.Column("segment_id", sa.Integer, sa.ForeignKey("segments.id"), nullable=False),
    sqlite_autoincrement=True,
)

images = sa.Table(
    "images",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("store", Key, nullable=False),
    sa.Column("key", Key, nullable=False),
    sa.Column("size_bytes", sa.Integer, nullable=False),
    sa.Column("mtime_ns", sa.Integer, nullable=False),
    sa.Column("width", sa.Integer, nullable=False),
    sa.Column("height", sa.Integer, nullable=False),
    sa.Column("taken_at", sa.Text),
    sa.Column("latitude", sa.Float),
    sa.Column("longitude", sa.Float),
    sa.Column("camera", sa.Text),
    sa.Column("vector_id", sa.Integer, sa.ForeignKey("vectors.id"), nullable=False, index=True),
    _etag(),
    sa.UniqueConstraint("store", "key"),
    sqlite_autoincrement=True,
)

# These answer a filter by themselves: they hold the vectors' ids too, so that no photo need be looked up.
COVERING = (
    sa.Index("ix_images_taken_at", images.c.taken_at, images.c.vector_id),
    sa.Index("ix_images_camera", images.c.camera, images.c.vector_id),
    sa.Index(
        "ix_images_place",
        images.c.latitude,
        images.c.longitude,
        images.c.vector_id,
        sqlite_where=images.c.latitude.is_not(None),
    ),
)

failures = sa.Table(
    "failures",
    metadata,
    sa.Column("store", Key, primary_key=True),
    sa.Column("key", Key, primary_key=True),
    sa.Column("size_bytes", sa.Integer, nullable=False),
    sa.Column("mtime_ns", sa.Integer, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    _etag(),
)

# The file systems that the last listing passed through (indexer/mounts.py).
mounts = sa.Table(
    "mounts",
    metadata,
    sa.Column("store", Key, primary_key=True),
    sa.Column("prefix", Key, primary_key=True),
    sa.Column("device", sa.Integer, nullable=False),
)

# The compacted index over most vectors (searchengine/index/ann.py): one row, or none while all are compared.
# `covariance` and `spread` are float32, as `Ann` has them.
ann = sa.Table(
    "ann",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("file", sa.Text, nullable=False, unique=True),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("built_at", sa.Text, nullable=False),
    sa.Column("parameters", sa.JSON, nullable=False),
    sa.Column("covariance", sa.LargeBinary, nullable=False),
    sa.Column("spread", sa.LargeBinary, nullable=False),
    sqlite_autoincrement=True,
)

# Its parameters as the text they are, for they may be damaged.
ANN_ROW = (
    ann.c.id,
    ann.c.file,
    ann.c.sha256,
    sa.type_coerce(ann.c.parameters, sa.Text).label("parameters"),
    ann.c.covariance,
    ann.c.spread,
)

# Tags that `classify --write-tags` gave (indexer/tags.py): what made them, its labels, and which vectors have them. A
# label belongs to the newest tagging that has it; `through_id`: that has seen every vector up to this id.
taggings = sa.Table(
    "taggings",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("made_at", sa.Text, nullable=False),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("labels", sa.JSON, nullable=False),
    sa.Column("templates", sa.JSON, nullable=False),
    sa.Column("top", sa.Integer, nullable=False),
    sa.Column("min_probability", sa.Float, nullable=False),
    sa.Column("through_id", sa.Integer, nullable=False),
)

labels = sa.Table(
    "labels",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("label", sa.Text, nullable=False, unique=True),
    sa.Column("tagging_id", sa.Integer, sa.ForeignKey("taggings.id"), nullable=False),
)

tags = sa.Table(
    "tags",
    metadata,
    sa.Column("vector_id", sa.Integer, sa.ForeignKey("vectors.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("label_id", sa.Integer, sa.ForeignKey("labels.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("probability", sa.Float, nullable=False),
    sa.Index("ix_tags_label_id", "label_id", "vector_id"),
)

# The fingerprint of what made the vectors, since the model was changed (indexer/reencode.py): one row, or none.
encoders = sa.Table(
    "encoders",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("fingerprint", sa.Text, nullable=False),
)


def _create_tables(connection: sa.Connection) -> None:
    for table in (runs, segments, vectors, images, failures):
        connection.execute(sa.schema.CreateTable(table))
    connection.exec_driver_sql("CREATE INDEX ix_images_taken_at ON images (taken_at)")
    connection.exec_driver_sql("CREATE INDEX ix_images_vector_id ON images (vector_id)")


def _add_mounts(connection: sa.Connection) -> None:
    metadata.create_all(connection, tables=[mounts], checkfirst=False)


def _add_ann(connection: sa.Connection) -> None:
    metadata.create_all(connection, tables=[ann], checkfirst=False)
    connection.exec_driver_sql("DROP INDEX ix_images_taken_at")
    for index in COVERING:
        index.create(connection)


def _add_tags_and_encoders(connection: sa.Connection) -> None:
    metadata.create_all(connection, tables=[taggings, labels, tags, encoders], checkfirst=False)


def _add_etags(connection: sa.Connection) -> None:
    for table in (images, failures):
        connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN etag TEXT")


# Entry n brings a database from version n to n + 1; SQLite's user_version records it in the same transaction.
MIGRATIONS: tuple[Callable[[sa.Connection], None], ...] = (
    _create_tables,
    _add_mounts,
    _add_ann,
    _add_tags_and_encoders,
    _add_etags,
)
ANN_VERSION = 3
TAGS_VERSION = 4
ENCODERS_VERSION = 4


def connect_for_writing(database: Path) -> sa.Engine:
    """One long-lived connection, WAL, every commit on disk before it returns."""
    # isolation_level None leaves transactions to the BEGIN below, so that migrations are transactions too.
    engine = sa.create_engine(
        "sqlite://",
        poolclass=StaticPool,
        creator=lambda: sqlite3.connect(database, isolation_level=None, check_same_thread=False, timeout=BUSY_SECONDS),
    )

    @sa.event.listens_for(engine, "connect")
    def configure(connection: Any, _: object) -> None:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA temp_store = FILE")
        connection.execute(f"PRAGMA temp.cache_size = -{LISTING_CACHE_KIB}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN")

    return engine


def connect_for_reading(database: Path, *, poolclass: type[sa.Pool] = NullPool) -> sa.Engine:
    """Connections that cannot write; as a rule a fresh one for each use, so that threads never share one."""
    return sa.create_engine("sqlite://", poolclass=poolclass, creator=lambda: open_read_only(database))


def open_read_only(database: Path) -> sqlite3.Connection:
    """One bare connection that cannot write. Threads may take turns on it."""
    address = f"file:{quote(os.fsencode(database))}?mode=ro{'&immutable=1' * is_frozen(database)}"
    return sqlite3.connect(address, uri=True, check_same_thread=False)


def is_frozen(database: Path) -> bool:
    """On a read-only disk SQLite cannot make the WAL's side files; without pending ones it need not."""
    return not os.access(database.parent, os.W_OK) and not database.with_name(database.name + "-wal").exists()


def migrate(engine: sa.Engine, database: Path) -> None:
    """Bring the tables up to this program's version. Raises IndexTooNew for those of a newer one."""
    with engine.begin() as connection:
        version = schema_version(connection, database)
    for number, step in enumerate(MIGRATIONS[version:], start=version + 1):
        with engine.begin() as connection:
            step(connection)
            connection.exec_driver_sql(f"PRAGMA user_version = {number}")


def schema_version(connection: sa.Connection, database: Path) -> int:
    """Raises IndexTooNew where the tables are newer than this program."""
    version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    refuse_newer_tables(version, database)
    return version


def stand_in_for_tags(connection: sa.Connection) -> None:
    """Where the tables are of a version before those of tags, empty temporary ones, so that nothing has a tag there."""
    if connection.exec_driver_sql("PRAGMA user_version").scalar_one() < TAGS_VERSION:
        for table in (labels, tags):
            connection.exec_driver_sql(f"CREATE TEMP TABLE {table.name} ({', '.join(table.columns.keys())})")


def refuse_newer_tables(version: int, database: Path) -> None:
    """Raises IndexTooNew."""
    if version > len(MIGRATIONS):
        raise IndexTooNew(
            f"{printable(str(database))} has tables of version {version}, this program knows up to "
            f"{len(MIGRATIONS)}; upgrade searchengine"
        )
