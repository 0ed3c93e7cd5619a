"""Disks come and go: the file systems that a listing passed through are recorded with the index.

A place on another file system than last time, without a single photo that was known there, is where a disk used to be
mounted, and says nothing about the photos that are on it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import sqlalchemy as sa

from indexer.scope import Part
from searchengine.index.filters import starts_with
from searchengine.index.schema import mounts
from searchengine.stores import device_of


def recorded_device(connection: sa.Connection, store: str, key: str) -> int | None:
    """The device recorded for the innermost mount that `key` is below, if any."""
    above = [key[: position + 1] for position, character in enumerate(key) if character == os.sep]
    query = sa.select(mounts.c.device).where(mounts.c.store == store, mounts.c.prefix.in_(above))
    device: int | None = connection.execute(
        query.order_by(sa.func.length(mounts.c.prefix).desc()).limit(1)
    ).scalar_one_or_none()
    return device


def changed_mounts(connection: sa.Connection, part: Part) -> list[tuple[str, list[str]]]:
    """Prefixes in `part` that are on another file system now than when they were recorded, each with those below it."""
    recorded: dict[str, int | None] = dict(_recorded(connection, part))
    if part.prefix not in recorded:
        # None in an index of an older version: what is not known is taken for changed.
        recorded[part.prefix] = recorded_device(connection, part.store.name, part.prefix)
    return [
        (prefix, [other for other in recorded if other != prefix and other.startswith(prefix)])
        for prefix, device in recorded.items()
        if device != device_of(part.store.name, prefix)
    ]


def record_mounts(connection: sa.Connection, part: Part, *, found: Mapping[str, int], keep: set[str]) -> None:
    """Record, for what is in `part`, what a listing `found`: prefix -> device. What is in `keep` stays as it was."""
    found = {prefix: device for prefix, device in found.items() if prefix not in keep}
    outside = recorded_device(connection, part.store.name, part.prefix.rstrip(os.sep))
    if part.prefix != part.store.prefix and found.get(part.prefix) == outside:
        found.pop(part.prefix, None)  # a folder like any other
    before = {prefix: device for prefix, device in _recorded(connection, part).items() if prefix not in keep}
    for prefix in before.keys() - found.keys():
        named = (mounts.c.store == part.store.name, mounts.c.prefix == prefix)
        connection.execute(sa.delete(mounts).where(*named))
    for prefix, device in found.items() - before.items():
        row = {"store": part.store.name, "prefix": prefix, "device": device}
        connection.execute(sa.insert(mounts).prefix_with("OR REPLACE").values(row))


def _recorded(connection: sa.Connection, part: Part) -> dict[str, int]:
    query = sa.select(mounts.c.prefix, mounts.c.device)
    query = query.where(mounts.c.store == part.store.name, starts_with(mounts.c.prefix, part.prefix))
    return {row.prefix: row.device for row in connection.execute(query)}
