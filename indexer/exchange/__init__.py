"""Photos with their vectors as files that other programs read and write: out of an index (`export.py`), and into one
(`importing.py`). docs/exchange.md describes the formats.

Each format is a module with a `Writer` and a `Source`; all of them hold the same facts of a photo (`records.py`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, get_args

from indexer.exchange.records import Record
from indexer.replicas.rows import PhotoRow
from searchengine.errors import UsageError
from searchengine.index.layout import IndexIdentity
from searchengine.text import printable
from searchengine.vectors import FloatMatrix

Format = Literal["parquet", "npy", "clip-retrieval"]
FORMATS: tuple[Format, ...] = get_args(Format)

Dtype = Literal["float32", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


class Writer(Protocol):
    """Writes into a folder that is there and empty."""

    def write(self, photos: Sequence[PhotoRow], vectors: FloatMatrix) -> None:
        """Row i of `vectors`, float32 (n, dim), is that of photo i."""

    def close(self) -> None:
        """Finish the files. Without it they are not whole."""


class Source(Protocol):
    """What a folder holds. The files are read as they are asked for."""

    @property
    def identity(self) -> IndexIdentity | None:
        """What made the vectors, where the files say so."""

    @property
    def photos(self) -> int: ...

    def chunks(self) -> Iterator[tuple[list[Record], FloatMatrix]]:
        """At most PHOTOS_AT_ONCE photos at a time, and row by row their vectors, float (n, dim), as they are written.

        Raises UsageError where the files are damaged, or do not belong together.
        """


def make_writer(format_: Format, folder: Path, *, identity: IndexIdentity, photos: int, dtype: Dtype) -> Writer:
    """Raises UsageError where the format needs an extra that is not installed."""
    module = importlib.import_module(_module_of(format_))
    writer: Writer = module.Writer(folder, identity=identity, photos=photos, dtype=dtype)
    return writer


def open_source(folder: Path) -> Source:
    """Of the format that the files in `folder` have. Raises UsageError where it is none of FORMATS, or damaged."""
    if (folder / "img_emb").is_dir():
        format_: Format = "clip-retrieval"
    elif (folder / "embeddings.npy").is_file():
        format_ = "npy"
    elif any(folder.glob("*.parquet")):
        format_ = "parquet"
    else:
        raise UsageError(
            f"{printable(str(folder))} holds no photos with vectors; it should have *.parquet, or embeddings.npy and "
            "photos.jsonl, or img_emb/ and metadata/ (docs/exchange.md)"
        )
    source: Source = importlib.import_module(_module_of(format_)).Source(folder)
    return source


def _module_of(format_: Format) -> str:
    return f"indexer.exchange.{format_.replace('-', '_')}"
