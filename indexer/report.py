"""What a run counts and tells while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(kw_only=True)
class Report:
    """What a run did: scanned = added + updated + moved + unchanged + failed.

    `duplicates` counts those of the added and updated photos that are exact copies of other photos in the index.
    `ignored` counts files that are no photos, by their names or, where these have no extension, their content.
    `unlistable` counts folders that could not be listed, from which nothing was deleted.
    `images_per_second` is the rate at which photos were embedded.
    """

    scanned: int = 0
    added: int = 0
    updated: int = 0
    moved: int = 0
    deleted: int = 0
    unchanged: int = 0
    duplicates: int = 0
    failed: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0
    model: str = ""
    unlistable: int = 0
    ignored: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(kw_only=True)
class ReencodeReport:
    """`vectors` that the index needs; `embedded` of them by this run, `resumed` ones were there before it.

    Of photos whose indexed content nobody has any more: `updated` ones were embedded as they are now, `deleted` ones
    are gone and `failed` ones could not be used, and both left the index; `unreadable` ones could just not be read.
    `swapped`: whether the index is of the new model now.
    """

    model: str
    fingerprint: str
    vectors: int = 0
    embedded: int = 0
    resumed: int = 0
    updated: int = 0
    deleted: int = 0
    failed: int = 0
    unreadable: int = 0
    swapped: bool = False
    seconds: float = 0.0
    images_per_second: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is: `done` of `total` files that are new or changed."""

    done: int
    total: int


OnProgress = Callable[[Progress], None]
OnSkip = Callable[[str, str], None]  # (key, reason)
