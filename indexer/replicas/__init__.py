"""Indexes as `copy` sees them, wherever they are: photos with their vectors, each with a digest, and what else belongs
to an index, as named values."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from indexer.replicas.rows import PhotoRow
from searchengine.index.layout import IndexIdentity, index_folder
from searchengine.milvus import is_milvus
from searchengine.vectors import FloatMatrix

Value = dict[str, Any]
Values = Mapping[str, Value]
"""What an index knows beside its photos, each under a name; a value is an object of JSON.

failure/HASH   a row of `failures`, HASH of its store and key
label/ID       a row of `labels`, and the number of `photos` that have it
tagging/ID     a row of `taggings`
mount/HASH     a row of `mounts`, HASH of its store and prefix
counters       the highest ids of `images` and `vectors` that were ever given out
last_run       the newest run that committed: when, by whom, and its report
"""


@dataclass(kw_only=True)
class Differences:
    """Ids of photos that an index lacks, has otherwise, alone has, or has the same, beside another one."""

    added: array[int] = field(default_factory=lambda: array("q"))
    updated: array[int] = field(default_factory=lambda: array("q"))
    surplus: array[int] = field(default_factory=lambda: array("q"))
    same: array[int] = field(default_factory=lambda: array("q"))

    def __len__(self) -> int:
        """How many differ."""
        return len(self.added) + len(self.updated) + len(self.surplus)


class Replica(Protocol):
    """Open for reading: one state of an index."""

    @property
    def shown(self) -> str:
        """What messages call it."""

    @property
    def identity(self) -> IndexIdentity:
        """What made its vectors."""

    def count(self) -> int:
        """How many photos there are."""

    def count_vectors(self) -> int:
        """How many vectors these have; copies of a photo share one."""

    def ids(self) -> Iterator[Sequence[int]]:
        """The ids of all photos, rising, in pages."""

    def digests(self) -> Iterator[Sequence[tuple[int, str]]]:
        """The id and the digest of each photo, by id, in pages."""

    def photos(self, ids: Sequence[int]) -> tuple[list[PhotoRow], FloatMatrix]:
        """These photos by id, without those that are gone, and the vector of each: float32 (n, dim)."""

    def values(self) -> Values: ...

    def has_changed(self) -> bool:
        """Whether another process has written it since it was opened, so that what was read may not fit together."""


class WritableReplica(Protocol):
    """Held by this process alone, and made if there was none."""

    photos_per_write: int

    def view(self) -> AbstractContextManager[Replica]:
        """What is in it now."""

    def write(self, photos: Sequence[PhotoRow], matrix: FloatMatrix) -> None:
        """Put photos, each whole or not at all, in place of what is known under their ids and names.

        Row i of `matrix`, float32 (n, dim), is the vector of photo i.
        """

    def remove(self, ids: Sequence[int]) -> None: ...

    def write_values(self, values: Values, *, forgotten: Values) -> None:
        """Set `values`, and drop those `forgotten`; counters never go down."""

    def finish(self, *, vectors: int) -> None:
        """Make all that was written durable and visible; the source has so many `vectors`."""


def replica_at(place: str | os.PathLike[str], *, whole: bool = False) -> AbstractContextManager[Replica]:
    """An index in a folder or in Milvus. `whole` refuses damaged segments and a publication that has not ended.

    Raises IndexNotFound, IndexUnusable and its kin.
    """
    if is_milvus(place):
        from indexer.replicas.milvus import open_replica

        return open_replica(os.fspath(place), whole=whole)
    from indexer.replicas.local import LocalReplica

    return LocalReplica(index_folder(place), checked=whole)


def kind_of(name: str) -> str:
    """What the name of a value begins with."""
    return name.partition("/")[0]
