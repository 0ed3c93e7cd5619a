"""The folders of clip-retrieval (https://github.com/rom1504/clip-retrieval): `img_emb/img_emb_0.npy`, of whose rows
`metadata/metadata_0.parquet` tells, and so on. Photos are called by `image_path`, those of the web by `url`, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from indexer.exchange.matrices import MatrixWriter, open_matrix
from indexer.exchange.parts import PHOTOS_A_PART, Parts
from indexer.exchange.records import Record
from indexer.exchange.tables import TableReader, TableWriter, arrow, columns_of, values_of
from indexer.replicas.rows import PhotoRow
from searchengine.errors import UsageError
from searchengine.index.layout import IndexIdentity
from searchengine.text import printable
from searchengine.vectors import FloatMatrix

PATH, URL = "image_path", "url"


class Writer(Parts):
    def __init__(self, folder: Path, *, identity: IndexIdentity, photos: int, dtype: str) -> None:
        super().__init__()
        arrow()
        self._folder = folder
        self._identity = identity
        self._dtype = dtype
        # Programs go through the parts in the order of their names.
        self._digits = len(str(max(photos - 1, 0) // PHOTOS_A_PART))
        for name in ("img_emb", "metadata"):
            (folder / name).mkdir()

    def open_part(self, number: int) -> Pair:
        label = f"{number:0{self._digits}d}"
        return Pair(
            self._folder / "img_emb" / f"img_emb_{label}.npy",
            self._folder / "metadata" / f"metadata_{label}.parquet",
            identity=self._identity,
            dtype=self._dtype,
        )


class Pair:
    """A matrix, and the table of its rows."""

    def __init__(self, matrix: Path, table: Path, *, identity: IndexIdentity, dtype: str) -> None:
        self._matrix = MatrixWriter(matrix, dim=identity.dim, dtype=dtype)
        self._table = TableWriter(table, [*columns_of(PATH), (URL, arrow().string())], identity=identity)

    def write(self, photos: Sequence[PhotoRow], vectors: FloatMatrix) -> None:
        self._matrix.write(vectors)
        values = values_of(photos, path=PATH)
        self._table.write({**values, URL: [path if path.startswith("http") else None for path in values[PATH]]})

    def close(self) -> None:
        self._matrix.close()
        self._table.close()


class Source:
    def __init__(self, folder: Path) -> None:
        matrices = sorted((folder / "img_emb").glob("*.npy"))
        if not matrices:
            raise UsageError(f"{printable(str(folder / 'img_emb'))} holds no .npy files; it should have img_emb_0.npy")
        self._pairs = [(matrix, _table_of(folder, matrix)) for matrix in matrices]
        whole = TableReader([table for _, table in self._pairs])
        self.photos = whole.rows
        self.identity = whole.identity

    def chunks(self) -> Iterator[tuple[list[Record], FloatMatrix]]:
        for matrix_file, table_file in self._pairs:
            matrix, table = open_matrix(matrix_file), TableReader([table_file])
            if len(matrix) != table.rows:
                raise UsageError(
                    f"{printable(str(matrix_file))} has {len(matrix):,} vectors, and {printable(str(table_file))} "
                    f"{table.rows:,} rows; they do not belong together"
                )
            start = 0
            for _, records, _ in table.batches():
                yield records, matrix[start : start + len(records)]
                start += len(records)


def _table_of(folder: Path, matrix: Path) -> Path:
    return folder / "metadata" / f"{re.sub('^img_emb', 'metadata', matrix.stem)}.parquet"
