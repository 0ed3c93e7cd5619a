"""A change of the model that is under way, as `status` tells it (indexer/reencode.py makes it)."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from searchengine.errors import IndexUnusable
from searchengine.index.layout import IndexPaths, read_card, read_identity
from searchengine.index.schema import open_read_only


@dataclass(frozen=True, kw_only=True)
class ModelChange:
    """To which encoder an index is on its way, and how many `vectors` of that are made."""

    model: str
    precision: str
    fingerprint: str
    vectors: int


def model_change(folder: Path) -> ModelChange | None:
    """None where no change is under way, and where `next/` cannot be read, of which `verify` tells."""
    paths = IndexPaths(folder)
    try:
        card = read_card(paths.next.folder)
        if card.fingerprint == read_identity(folder).fingerprint:  # it is over
            return None
        with closing(open_read_only(paths.next.database)) as connection:
            (vectors,) = connection.execute("SELECT count(*) FROM vectors").fetchone()
    except (IndexUnusable, sqlite3.Error):
        return None
    return ModelChange(model=card.encoder, precision=card.precision, fingerprint=card.fingerprint, vectors=vectors)
