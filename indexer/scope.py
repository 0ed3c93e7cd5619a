"""What a run looks at: which parts of its stores, and which names in them."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass

from searchengine.stores import LOCAL, ImageStore


@dataclass(frozen=True, kw_only=True)
class Globs:
    """Patterns over a file's name or its path below the folder, where ``*`` crosses folders; case does not matter.

    A path is matched with and without a slash before it, so that ``*/screenshots/*`` means the topmost folder too.

    With `include`, a run looks only at files that match one; the others stay in the index as they are.
    Files that match an `exclude` are left out of the index.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def excludes(self, path: str) -> bool:
        return _matches(path, self.exclude)

    def includes(self, path: str) -> bool:
        return not self.include or _matches(path, self.include)


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a run looks at in one store: all of it, or a folder."""

    store: ImageStore
    prefix: str


def parts_of(stores: Sequence[ImageStore], within: Sequence[str] | None) -> list[Part]:
    """The stores, or what of the folders `within` lies in them; none inside another."""
    if within is None:
        parts = [Part(store=store, prefix=store.prefix) for store in stores]
    else:
        folders = [os.path.join(os.path.abspath(folder), "") for folder in within]
        parts = [
            Part(store=store, prefix=max(store.prefix, folder, key=len))
            for store in stores
            for folder in folders
            if store.name == LOCAL and (folder.startswith(store.prefix) or store.prefix.startswith(folder))
        ]
    parts = list({(part.store.name, part.prefix): part for part in parts}.values())
    return [
        part
        for part in parts
        if not any(
            part.store.name == other.store.name and part.prefix != other.prefix and part.prefix.startswith(other.prefix)
            for other in parts
        )
    ]


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    lowered = path.lower()
    names = (os.path.basename(lowered), lowered, f"/{lowered}")
    return any(fnmatch.fnmatchcase(name, pattern.lower()) for name in names for pattern in patterns)
