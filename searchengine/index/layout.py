"""Where things are in an index folder, and the immutable identity card ``index.json``.

photos.index/
  index.json               format version, encoder name, fingerprint and precision, dim, metric, checksum
  metadata.sqlite          the only commit point (WAL)
  segments/00000001.faiss  immutable, IndexIDMap2 over IndexFlatIP
  next/                    the vectors of another encoder on their way into this index: an index without photos
  lock                     the single writer's

index.json is written once, and anew when the model is changed: then `next/` has the new one. The tables tell since when
it holds, and it takes the place of the old one right after that commit, or, where the process was killed between the
two, with the next writer. So whoever asks what made an index asks `read_identity`.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from searchengine.errors import IndexFormatError, IndexNotFound, IndexTooNew, IndexUnusable, UsageError
from searchengine.milvus import is_milvus
from searchengine.text import printable

FORMAT_VERSION = 1
METRIC = "inner_product"
CHECKSUM = "checksum"  # in index.json, over all its other fields
PRECISIONS = ("fp32", "bf16", "fp16", "int8")

RESTORE = "restore it from a backup, or delete the index folder and index again"
REPAIR = "run `searchengine verify --repair`, then index again; or restore it from a backup"


@dataclass(frozen=True, kw_only=True)
class IndexIdentity:
    """What made the vectors of an index. `precision` is that of the encoder's arithmetic."""

    format_version: int = FORMAT_VERSION
    encoder: str
    fingerprint: str
    dim: int
    metric: str = METRIC
    precision: str = "fp32"


@dataclass(frozen=True)
class IndexPaths:
    folder: Path

    @property
    def identity(self) -> Path:
        return self.folder / "index.json"

    @property
    def database(self) -> Path:
        return self.folder / "metadata.sqlite"

    @property
    def new_database(self) -> Path:
        """Where a repair puts together what it could save."""
        return self.folder / "metadata.sqlite.tmp"

    @property
    def damaged_database(self) -> Path:
        """What a repair keeps of tables that it had to put together anew."""
        return self.folder / "metadata.sqlite.damaged"

    @property
    def segments(self) -> Path:
        return self.folder / "segments"

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    @property
    def anns(self) -> Path:
        return self.folder / "ann"

    @property
    def next(self) -> IndexPaths:
        """The vectors of another encoder, until they take the place of this index's own (indexer/reencode.py)."""
        return IndexPaths(self.folder / "next")

    @property
    def discarded(self) -> Path:
        """What `next` is called while it is being deleted."""
        return self.folder / "next.tmp"

    def ann(self, file: str) -> Path:
        return self.anns / file

    def segment(self, file: str) -> Path:
        return self.segments / file


def index_folder(folder: str | os.PathLike[str]) -> Path:
    """The absolute path of an index. Raises IndexUnusable for a name that FAISS cannot open, UsageError for Milvus."""
    if is_milvus(folder):
        raise UsageError(
            f"{printable(os.fspath(folder))} is in Milvus; write it in a folder, by indexer.staged, which publishes it"
        )
    path = Path(os.path.abspath(os.path.expanduser(folder)))
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise IndexUnusable(
            f"the index folder {printable(str(path))} has a name that is not UTF-8; rename it, or use another"
        ) from None
    return path


def read_identity(folder: Path) -> IndexIdentity:
    """What made the vectors of an index.

    Raises IndexNotFound where there is no index, IndexFormatError where its index.json cannot be understood.
    """
    try:  # before the card, whose place it may take meanwhile
        next_card = read_card(IndexPaths(folder).next.folder)
    except IndexUnusable:
        return read_card(folder)
    card = read_card(folder)
    return next_card if next_card.fingerprint == _fingerprint_in_tables(IndexPaths(folder).database) else card


def read_card(folder: Path) -> IndexIdentity:
    """What index.json says. Raises as `read_identity` does."""
    paths, shown = IndexPaths(folder), printable(str(folder))
    try:
        fields = json.loads(paths.identity.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise IndexNotFound(f"there is no index at {shown}; make one with: searchengine index FOLDER") from None
    except OSError as error:
        raise IndexUnusable(f"the index at {shown} cannot be read: {error.strerror}; check its permissions") from None
    except (ValueError, RecursionError) as error:
        raise IndexFormatError(f"{shown}/index.json is damaged ({error}); {RESTORE}") from None
    checksum = fields.pop(CHECKSUM, None) if isinstance(fields, dict) else None
    version = fields.get("format_version") if isinstance(fields, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise IndexTooNew(
            f"the index at {shown} has format {version}, this program knows up to {FORMAT_VERSION}; "
            "upgrade searchengine, or index into another folder"
        )
    try:
        identity = IndexIdentity(**fields)
    except TypeError as error:
        raise IndexFormatError(f"{shown}/index.json is incomplete ({error}); {RESTORE}") from None
    if identity.metric != METRIC or type(identity.dim) is not int or identity.dim < 1:
        raise IndexFormatError(f"{shown}/index.json names an unknown metric or dimension; {RESTORE}")
    if identity.precision not in PRECISIONS:
        raise IndexFormatError(f"{shown}/index.json names an unknown precision; {RESTORE}")
    if (
        type(version) is not int
        or version < 1
        or not all(isinstance(text, str) for text in (identity.encoder, identity.fingerprint))
    ):
        raise IndexFormatError(f"{shown}/index.json has no valid version or encoder; {RESTORE}")
    if checksum not in (None, _checksum(fields)):  # the first indexes had none
        raise IndexFormatError(f"{shown}/index.json is damaged: it does not say what was written; {RESTORE}")
    return identity


def _fingerprint_in_tables(database: Path) -> str | None:
    """None where the model was never changed, and where the tables cannot be read, which whoever needs them meets."""
    import sqlite3
    from contextlib import closing

    from searchengine.index.schema import open_read_only

    try:
        with closing(open_read_only(database)) as connection:
            row = connection.execute("SELECT fingerprint FROM encoders").fetchone()
    except sqlite3.Error:
        return None
    return str(row[0]) if row else None


def write_identity(folder: Path, identity: IndexIdentity) -> None:
    fields = asdict(identity)
    fields[CHECKSUM] = _checksum(fields)
    write_durably(IndexPaths(folder).identity, (json.dumps(fields, indent=2) + "\n").encode())


def _checksum(fields: dict[str, Any]) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def write_durably(path: Path, data: bytes) -> None:
    """Give `path` the content `data`, whole or not at all, whenever the power fails."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
    publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished file to its final name so that both name and content survive a crash."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, so that they survive a crash."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
