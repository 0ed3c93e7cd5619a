"""Where things are in an index folder, and the immutable identity card ``index.json``.

photos.index/
  index.json               format version, encoder name, fingerprint and precision, dim, metric, checksum; written once
  metadata.sqlite          the only commit point (WAL)
  segments/00000001.faiss  immutable, IndexIDMap2 over IndexFlatIP
  lock                     the single writer's
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from searchengine.errors import IndexFormatError, IndexNotFound, IndexTooNew, IndexUnusable
from searchengine.text import printable

FORMAT_VERSION = 1
METRIC = "inner_product"
CHECKSUM = "checksum"  # in index.json, over all its other fields
PRECISIONS = ("fp32", "bf16", "fp16", "int8")

RESTORE = "restore it from a backup, or delete the index folder and index again"
REPAIR = "run `searchengine verify --repair`, then index again; or restore it from a backup"


@dataclass(frozen=True, kw_only=True)
class IndexIdentity:
    """What never changes in the life of an index. `precision` is that of the encoder's arithmetic."""

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

    def ann(self, file: str) -> Path:
        return self.anns / file

    def segment(self, file: str) -> Path:
        return self.segments / file


def index_folder(folder: str | os.PathLike[str]) -> Path:
    """The absolute path of an index. Raises IndexUnusable for a name that FAISS could not open."""
    path = Path(os.path.abspath(os.path.expanduser(folder)))
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise IndexUnusable(
            f"the index folder {printable(str(path))} has a name that is not UTF-8; rename it, or use another"
        ) from None
    return path


def read_identity(folder: Path) -> IndexIdentity:
    """Raises IndexNotFound where there is no index, IndexFormatError where it cannot be understood."""
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
