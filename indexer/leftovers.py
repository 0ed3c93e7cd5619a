"""What a committed change of the model leaves to be done; a process that was killed leaves it to the next writer."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress

from searchengine.errors import IndexUnusable
from searchengine.index.layout import IndexIdentity, IndexPaths, read_card, read_identity, write_identity

CANCEL = "searchengine reencode --cancel"


def finish_change(paths: IndexPaths) -> None:
    """Let index.json say what the tables say, and delete a `next/` whose vectors are in the index.

    Only under the writer's lock. What cannot be done now does no harm, and is done by the next writer.
    """
    with suppress(OSError):
        identity = read_identity(paths.folder)
        if read_card(paths.folder) != identity:
            write_identity(paths.folder, identity)
        if is_taken_over(paths, identity):
            discard_next(paths)
        shutil.rmtree(paths.discarded, ignore_errors=True)


def is_taken_over(paths: IndexPaths, identity: IndexIdentity) -> bool:
    """Whether `next/` is of the encoder that made the index: then its vectors are those of the index."""
    try:
        return read_card(paths.next.folder).fingerprint == identity.fingerprint
    except IndexUnusable:
        return False


def discard_next(paths: IndexPaths) -> None:
    """Delete `next/`, by a new name, so that no half of it is ever taken for all. Raises OSError."""
    shutil.rmtree(paths.discarded, ignore_errors=True)
    os.replace(paths.next.folder, paths.discarded)
    shutil.rmtree(paths.discarded)
