"""Whether tables, index.json and `next/` agree on which encoder made the vectors, after a change of the model too."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator

from indexer.checks.problems import REPAIR_ALONE, DropRows, FinishChange, Problem
from indexer.leftovers import CANCEL, is_taken_over
from searchengine.index.layout import RESTORE, IndexIdentity, IndexPaths, read_card
from searchengine.index.schema import ENCODERS_VERSION

DROP = f"run `{CANCEL}`"
GO_ON = "run `searchengine verify --repair`, then `searchengine reencode` again"


def check_change(connection: sqlite3.Connection, paths: IndexPaths, identity: IndexIdentity) -> Iterator[Problem]:
    """`identity` is what `read_identity` gives. Raises sqlite3.DatabaseError."""
    if connection.execute("PRAGMA user_version").fetchone()[0] < ENCODERS_VERSION:
        return
    rows = connection.execute("SELECT rowid, fingerprint FROM encoders ORDER BY rowid").fetchall()
    broken = [rowid for rowid, text in rows if not re.fullmatch("[0-9a-f]{64}", text if isinstance(text, str) else "")]
    if broken:
        yield Problem(
            kind="encoders",
            object="the table encoders",
            message=f"{len(broken):,} of its rows name no fingerprint",
            remedy=REPAIR_ALONE,
            fix=DropRows("encoders", broken),
        )
    elif {text for _, text in rows} - {identity.fingerprint}:
        yield Problem(
            kind="encoders",
            object="index.json",
            message="names another encoder than the tables: one of the two is of another time",
            remedy=RESTORE,
        )
    elif read_card(paths.folder) != identity or is_taken_over(paths, identity) or paths.discarded.is_dir():
        yield Problem(
            kind="change",
            object="next",
            message="was left by a process that was killed just after it had changed the model",
            remedy=REPAIR_ALONE,
            fix=FinishChange(),
        )
