"""What writes an index, in a folder or in Milvus."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from searchengine.cli.output import notice
from searchengine.milvus import is_milvus
from searchengine.settings import Settings, user_data


@contextmanager
def writable(settings: Settings, *, repair: bool = False) -> Iterator[Settings]:
    """Settings whose index is in a folder and may be written.

    For an index in Milvus that is its staging index, which is published meanwhile and in the end (indexer/staging.py),
    with `repair` in place of what is damaged there, too. Raises IndexLocked, IndexUnusable, UsageError.
    """
    if not is_milvus(settings.index):
        yield settings
        return
    from indexer.staging import staged

    with staged(settings.index, root=user_data() / "milvus", on_notice=notice, repair=repair) as folder:
        yield replace(settings, index=str(folder))
