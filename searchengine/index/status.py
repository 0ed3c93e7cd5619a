"""What is in an index, and what is being done to it: as `status`, `compact` and the service tell it."""

from __future__ import annotations

import json
import os
import sqlite3
from contextlib import closing
from dataclasses import asdict
from typing import Any

from searchengine.index.layout import IndexPaths
from searchengine.index.model_change import model_change
from searchengine.index.protocol import PhotoIndex
from searchengine.index.reader import Index
from searchengine.index.schema import open_read_only

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

COUNTERS = ("scanned", "added", "updated", "moved", "deleted", "unchanged", "failed", "images_per_second")


def status_of(index: PhotoIndex) -> dict[str, Any]:
    """What `status --json` and `compact --json` print."""
    return {
        "images": index.count_images(),
        "vectors": len(index.snapshot()),
        "segments": 0,
        "failures": index.count_failures(),
        "model": index.identity.encoder,
        "fingerprint": index.identity.fingerprint,
        "dim": index.dim,
        "precision": index.identity.precision,
        "index_kind": "milvus",
        "recall_at_10": None,
        "size_bytes": index.size_bytes(),
        "last_run": index.last_run(),
        "vectors_not_in_ann": 0,
        "resident_bytes_per_vector": None,
        "model_change": None,
        **(_of_folder(index) if isinstance(index, Index) else {}),
    }


def _of_folder(index: Index) -> dict[str, Any]:
    """What Milvus keeps to itself: how the vectors lie, and how they are searched."""
    snapshot = index.snapshot()
    change = model_change(index.folder)
    ann = snapshot.ann.parameters if snapshot.ann else None
    return {
        "segments": len(snapshot.segments),
        "index_kind": ann.kind if ann else "flat",
        "recall_at_10": ann.recall_at_10 if ann else 1.0,
        "vectors_not_in_ann": len(snapshot.fresh) if ann else 0,
        "resident_bytes_per_vector": snapshot.resident_bytes_per_vector,
        "model_change": change and asdict(change),
    }


def run_under_way(index: PhotoIndex) -> dict[str, Any] | None:
    """The run that writes the index at this moment: when it started, and its counters up to its last commit.

    None where nobody writes. A run that has committed nothing yet, as each is at first, has no counters. Of an index in
    Milvus only the machine knows that writes it.
    """
    if not isinstance(index, Index):
        return None
    paths = IndexPaths(index.folder)
    try:
        with closing(open_read_only(paths.database)) as connection:
            newest = "SELECT started_at, finished_at, report FROM runs ORDER BY id DESC LIMIT 1"
            started_at, finished_at, report = connection.execute(newest).fetchone() or (None, None, None)
        if started_at is None or finished_at is not None or not _is_held(paths):
            return None
        counted = json.loads(report) if report else {}
    except (sqlite3.Error, ValueError):  # damage, of which `verify` tells
        return None
    return {"started_at": started_at} | {name: counted[name] for name in COUNTERS if name in (counted or {})}


def _is_held(paths: IndexPaths) -> bool:
    """Whether a process holds the writer's lock: one that was killed leaves its run unfinished, but no lock.

    To look takes a shared lock for an instant, which a writer that just comes waits for.
    """
    if fcntl is None:
        return True
    try:
        with open(paths.lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none, or it cannot be opened
        return not os.access(paths.lock, os.R_OK) and paths.lock.exists()
    return False
