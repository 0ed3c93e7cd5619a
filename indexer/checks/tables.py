"""Whether the tables of an index are whole, as this program makes them, and hold only what can be.

What is recorded once and derived from nothing else (EXIF facts, times, reasons) can be held against nothing, save that
it is of the right kind.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from indexer.checks.problems import INDEX_AGAIN, REPAIR_ALONE, TAG_AGAIN, DropRows, Problem, RebuildTables, SetCounter
from searchengine.index.layout import RESTORE
from searchengine.index.schema import MIGRATIONS, TAGS_VERSION, metadata

MAX_MESSAGES = 1_000_000
MAX_ID = 2**53  # far beyond any library, far below where SQLite's ids end
COUNTED = ("segments", "vectors", "images")


class Rule(NamedTuple):
    """No row of `table` may be `wrong`, a condition in SQL with the functions below."""

    table: str
    wrong: str
    message: str
    remedy: str = INDEX_AGAIN


def _text(column: str) -> str:
    return f"typeof({column}) <> 'text' OR NOT is_utf8(CAST({column} AS BLOB))"


def _text_or_null(column: str) -> str:
    return f"{column} IS NOT NULL AND ({_text(column)})"


def _degrees(column: str, limit: int) -> str:
    return f"{column} IS NOT NULL AND (typeof({column}) NOT IN ('real', 'integer') OR abs({column}) > {limit})"


def _share(column: str) -> str:
    return f"typeof({column}) NOT IN ('real', 'integer') OR {column} NOT BETWEEN 0 AND 1"


def _none(table: str, column: str, parent: str) -> str:
    return f"NOT EXISTS (SELECT 1 FROM {parent} WHERE {parent}.id = {table}.{column})"


NAME = "typeof(store) <> 'blob' OR typeof(key) <> 'blob' OR NOT is_utf8(store)"
CONTENT = "typeof(size_bytes) <> 'integer' OR typeof(mtime_ns) <> 'integer'"
SIZE = "typeof(width) <> 'integer' OR width < 0 OR typeof(height) <> 'integer' OR height < 0"
PLACE = f"{_degrees('latitude', 90)} OR {_degrees('longitude', 180)}"

RULES = (
    Rule(
        "segments",
        f"{_text('file')} OR NOT file GLOB '[0-9]*.faiss' OR instr(file, '/') OR typeof(count) <> 'integer'"
        f" OR {_text('sha256')} OR length(sha256) <> 64",
        "name no file, count or sha256 of a segment",
    ),
    Rule("vectors", "typeof(content_hash) <> 'blob' OR length(content_hash) <> 32", "have no sha256 of their content"),
    Rule("vectors", _none("vectors", "segment_id", "segments"), "name a segment that is not known"),
    Rule("images", _none("images", "vector_id", "vectors"), "have no vector"),
    Rule(
        "images",
        f"{NAME} OR {CONTENT} OR size_bytes < 0 OR {SIZE} OR {PLACE} OR {_text_or_null('camera')}"
        f" OR {_text_or_null('taken_at')} OR NOT is_time(CAST(taken_at AS BLOB))",
        "hold facts that cannot be",
    ),
    Rule("failures", f"{NAME} OR {CONTENT} OR {_text('reason')}", "hold facts that cannot be"),
    Rule(
        "runs",
        f"{_text('started_at')} OR {_text_or_null('finished_at')} OR {_text('process')}"
        " OR NOT is_report(CAST(report AS BLOB))",
        "hold facts that cannot be",
    ),
)

TAG_RULES = (
    Rule(
        "taggings",
        f"{_text('made_at')} OR NOT is_time(CAST(made_at AS BLOB)) OR {_text('fingerprint')}"
        " OR NOT is_list(CAST(labels AS BLOB)) OR NOT is_list(CAST(templates AS BLOB)) OR typeof(top) <> 'integer'"
        f" OR {_share('min_probability')} OR typeof(through_id) <> 'integer'"
        " OR through_id > (SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'vectors')",
        "hold facts that cannot be",
        TAG_AGAIN,
    ),
    Rule(
        "labels",
        f"{_text('label')} OR {_none('labels', 'tagging_id', 'taggings')}",
        "are no label, or of no tagging",
        TAG_AGAIN,
    ),
    Rule(
        "tags",
        f"{_none('tags', 'vector_id', 'vectors')} OR {_none('tags', 'label_id', 'labels')} OR {_share('probability')}",
        "have no vector, no label, or no probability",
        TAG_AGAIN,
    ),
)


def check_tables(connection: sqlite3.Connection) -> Iterator[Problem]:
    """What is wrong with the tables themselves; if anything, their rows are not worth a look."""
    messages, error = _integrity(connection)
    if messages or error:
        first, more = (error or messages[0]).split("\n")[0], len(messages) - 1
        yield damaged_tables(
            f"are damaged ({first}{f', and {more:,} more' if more > 0 else ''})", _untrusted(connection, messages)
        )
        return
    if _header(connection)[18:20] not in (b"\x01\x01", b"\x02\x02"):  # else SQLite only reads
        yield damaged_tables("are damaged (their file format)")
        return
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version == 0:
        yield damaged_tables("tell no version")
    elif missing := _differences(connection, version):
        yield damaged_tables(f"are not as this program makes them ({', '.join(missing)})")


def check_rows(connection: sqlite3.Connection) -> Iterator[Problem]:
    """Rows that hold what cannot be, or refer to nothing. Raises sqlite3.DatabaseError."""
    add_functions(connection)
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    for rule in RULES + (TAG_RULES if version >= TAGS_VERSION else ()):
        rowids = [row[0] for row in connection.execute(f"SELECT rowid FROM {rule.table} WHERE {rule.wrong}")]
        if rowids:
            yield Problem(
                kind=rule.table,
                object=f"the table {rule.table}",
                message=f"{len(rowids):,} of its rows {rule.message}",
                remedy=rule.remedy,
                fix=DropRows(rule.table, rowids),
            )
    for table in COUNTED:
        highest = connection.execute(f"SELECT max(id) FROM {table}").fetchone()[0]
        counters = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchall()
        counter = counters[0][0] if len(counters) == 1 else None
        if highest is not None and not (isinstance(counter, int) and highest <= counter <= MAX_ID):
            yield Problem(
                kind=table,
                object=f"the table {table}",
                message=f"its ids would go on from {counter}, though it has an id {highest:,}",
                remedy=REPAIR_ALONE,
                fix=SetCounter(table),
            )


def damaged_tables(message: str, untrusted: dict[str, frozenset[int]] | None = None) -> Problem:
    return Problem(
        kind="tables",
        object="metadata.sqlite",
        message=f"its tables {message}",
        remedy=f"{INDEX_AGAIN}; if that cannot mend it, {RESTORE}",
        fix=RebuildTables(untrusted or {}),
    )


def _header(connection: sqlite3.Connection) -> bytes:
    """The first bytes of the file (https://www.sqlite.org/fileformat2.html#the_database_header)."""
    with open(connection.execute("PRAGMA database_list").fetchone()[2], "rb") as stream:
        return stream.read(100)


def _integrity(connection: sqlite3.Connection) -> tuple[list[str], str]:
    """What SQLite finds wrong, and the error that kept it from looking on."""
    messages: list[str] = []
    try:
        for (message,) in connection.execute(f"PRAGMA integrity_check({MAX_MESSAGES})"):
            if message != "ok":
                messages.append(str(message))
    except sqlite3.DatabaseError as error:
        return messages, str(error)
    return messages, ""


def _untrusted(connection: sqlite3.Connection, messages: list[str]) -> dict[str, frozenset[int]]:
    """Rows that an index does not know as they are in their table: one of the two is wrong, and which is not known."""
    found: dict[str, set[int]] = {}
    try:
        table_of = dict(connection.execute("SELECT name, tbl_name FROM sqlite_schema WHERE type = 'index'").fetchall())
    except sqlite3.DatabaseError:
        return {}
    for message in messages:
        if match := re.search(r"row (\d+) missing from index (\S+)", message):
            found.setdefault(table_of.get(match[2], ""), set()).add(int(match[1]))
    return {table: frozenset(rowids) for table, rowids in found.items()}


def _differences(connection: sqlite3.Connection, version: int) -> list[str]:
    """Names of tables that are not as `version` has them, or that only a later one has."""
    engine = sa.create_engine("sqlite://")
    with engine.begin() as fresh:
        for step in MIGRATIONS[:version]:
            step(fresh)
        driver: Any = fresh.connection.driver_connection
        expected = _structure(driver)
    engine.dispose()
    found = _structure(connection)
    return [table for table in sorted(metadata.tables) if found.get(table) != expected.get(table)]


def _structure(connection: sqlite3.Connection) -> dict[str, Any]:
    """Columns, indexes and foreign keys of each table, however its definition is worded."""
    structure = {}
    for (table,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall():
        indexes = connection.execute('SELECT name, "unique", origin FROM pragma_index_list(?)', (table,)).fetchall()
        structure[table] = {
            "columns": connection.execute("SELECT * FROM pragma_table_info(?)", (table,)).fetchall(),
            "indexes": sorted(
                (unique, origin, connection.execute("SELECT name FROM pragma_index_info(?)", (name,)).fetchall())
                for name, unique, origin in indexes
            ),
            "references": connection.execute("SELECT * FROM pragma_foreign_key_list(?)", (table,)).fetchall(),
        }
    return structure


def add_functions(connection: sqlite3.Connection) -> None:
    """What RULES ask that SQLite cannot tell."""
    connection.create_function("is_utf8", 1, _is_utf8, deterministic=True)
    connection.create_function("is_time", 1, _is_time, deterministic=True)
    connection.create_function("is_report", 1, _is_report, deterministic=True)
    connection.create_function("is_list", 1, _is_list, deterministic=True)


def _is_utf8(value: bytes | None) -> bool:
    try:
        return value is None or value.decode() is not None
    except ValueError:
        return False


def _is_time(value: bytes | None) -> bool:
    try:
        return value is None or datetime.fromisoformat(value.decode()) is not None
    except ValueError:
        return False


def _is_report(value: bytes | None) -> bool:
    try:
        return value is None or isinstance(json.loads(value), dict)
    except (ValueError, RecursionError):
        return False


def _is_list(value: bytes | None) -> bool:
    try:
        return value is not None and isinstance(json.loads(value), list)
    except (ValueError, RecursionError):
        return False
