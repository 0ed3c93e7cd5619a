"""An index, or some of its photos, as files for others: streamed, whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from indexer.exchange import DTYPES, FORMATS, Dtype, Format, make_writer
from indexer.exchange.records import PHOTOS_AT_ONCE
from indexer.replicas import Replica, replica_at
from searchengine.errors import IndexUnusable, UsageError
from searchengine.filters import Filters
from searchengine.index.layout import sync_folder
from searchengine.index.segments import Ids
from searchengine.text import printable

OnProgress = Callable[[int, int], None]


@dataclass(kw_only=True)
class ExportReport:
    """How many photos were written, in which files, and what made their vectors."""

    photos: int
    files: int
    size_bytes: int
    format: str
    dtype: str
    model: str
    fingerprint: str
    dim: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def export(
    index: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    format: Format = "parquet",  # noqa: A002
    dtype: Dtype = "float32",
    filters: Filters | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> ExportReport:
    """Write the photos of `index` that pass `filters`, by their ids, with their vectors into the new folder `folder`.

    The files are those of one state of the index, and appear together, when all of them are written; those of an index
    in Milvus are of its newest state photo by photo. In memory are a few thousand photos with their vectors, and where
    there are filters the ids of those that pass. Where no photo does, nothing is written.

    Raises UsageError for a folder that is not empty, another format or dtype, or one that needs an extra;
    IndexNotFound, IndexFormatError, IndexUnusable where the index or the disk is.
    """
    if format not in FORMATS or dtype not in DTYPES:
        raise UsageError(
            f"format is {printable(str(format))} and dtype {printable(str(dtype))}; they must be one of "
            f"{', '.join(FORMATS)}, and of {', '.join(DTYPES)}"
        )
    target = Path(os.path.realpath(os.path.expanduser(folder)))
    if target.is_mount():
        raise UsageError(f"{printable(str(target))} is a disk of its own; name a new folder on it")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{printable(str(target))} is there already; name a folder that is new, or empty")
    started = time.monotonic()
    passing = _passing(index, filters) if filters else None
    with replica_at(index) as replica:
        identity = replica.identity
        assert identity is not None
        total = replica.count() if passing is None else len(passing)
        done = 0
        files: list[Path] = []
        if total:
            with _appearing(target) as unfinished:
                writer = make_writer(format, unfinished, identity=identity, photos=total, dtype=dtype)
                for ids in _pages(replica, passing):
                    photos, vectors = replica.photos(ids)
                    writer.write(photos, vectors)
                    done += len(photos)
                    on_progress(done, max(done, total))
                writer.close()
            files = [file for file in target.rglob("*") if file.is_file()]
    return ExportReport(
        photos=done,
        files=len(files),
        size_bytes=sum(file.stat().st_size for file in files),
        format=format,
        dtype=dtype,
        model=identity.encoder,
        fingerprint=identity.fingerprint,
        dim=identity.dim,
        seconds=time.monotonic() - started,
    )


def _passing(index: str | os.PathLike[str], filters: Filters) -> Ids:
    """The ids of the photos that pass, rising."""
    from searchengine import open_index

    with open_index(index) as opened:
        found, _ = opened.photos_of(opened.vector_ids(filters), filters=filters)
    return np.sort(found)


def _pages(replica: Replica, passing: Ids | None) -> Iterator[Sequence[int]]:
    if passing is None:
        yield from replica.ids()
        return
    for start in range(0, len(passing), PHOTOS_AT_ONCE):
        yield passing[start : start + PHOTOS_AT_ONCE].tolist()


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `target` when the block is left, and vanishes where that is by an error."""
    try:
        unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            for file in unfinished.rglob("*"):
                if file.is_file():
                    with file.open("rb+") as written:
                        os.fsync(written.fileno())
            if target.exists():
                target.rmdir()  # an empty one; not every system renames over it
            os.replace(unfinished, target)
            sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
    except OSError as error:
        raise IndexUnusable(
            f"the export to {printable(str(target))} cannot be written ({error.strerror or error}); "
            "nothing is left of it, so make room or name another folder"
        ) from None
