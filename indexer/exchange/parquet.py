"""Parquet alone: all facts, and the vectors as lists of a fixed size in the column `embedding`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from indexer.exchange.parts import Parts
from indexer.exchange.records import Record
from indexer.exchange.tables import TableReader, TableWriter, arrow, columns_of, matrix_of, values_of
from indexer.replicas.rows import PhotoRow
from searchengine.index.layout import IndexIdentity
from searchengine.vectors import FloatMatrix

EMBEDDING = "embedding"


class Writer(Parts):
    def __init__(self, folder: Path, *, identity: IndexIdentity, photos: int, dtype: str) -> None:
        super().__init__()
        arrow()
        self._folder = folder
        self._identity = identity
        self._dtype = dtype

    def open_part(self, number: int) -> PhotoTable:
        file = self._folder / f"photos-{number:05d}.parquet"
        return PhotoTable(file, identity=self._identity, dtype=self._dtype)


class PhotoTable:
    """One file."""

    def __init__(self, file: Path, *, identity: IndexIdentity, dtype: str) -> None:
        pa = arrow()
        self._dtype = dtype
        self._vector = pa.list_(pa.float16() if dtype == "float16" else pa.float32(), identity.dim)
        self._table = TableWriter(file, [*columns_of("path"), (EMBEDDING, self._vector)], identity=identity)

    def write(self, photos: Sequence[PhotoRow], vectors: FloatMatrix) -> None:
        values = arrow().array(vectors.astype(self._dtype).reshape(-1))
        embeddings = arrow().FixedSizeListArray.from_arrays(values, type=self._vector)
        self._table.write({**values_of(photos, path="path"), EMBEDDING: embeddings})

    def close(self) -> None:
        self._table.close()


class Source:
    def __init__(self, folder: Path) -> None:
        self._table = TableReader(sorted(folder.glob("*.parquet")))
        self.photos = self._table.rows
        self.identity = self._table.identity

    def chunks(self) -> Iterator[tuple[list[Record], FloatMatrix]]:
        for file, records, columns in self._table.batches(more=[EMBEDDING]):
            yield records, matrix_of(columns[EMBEDDING], file=file)
