"""The plain pair: `embeddings.npy`, and in `photos.jsonl` a line of JSON for each of its rows.

`encoder.json` beside them tells what made the vectors. A name that is not UTF-8 has its bytes as lone surrogates,
escaped, as everywhere in this program's JSON (PEP 383).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO

from indexer.exchange.matrices import MatrixWriter, open_matrix
from indexer.exchange.records import PHOTOS_AT_ONCE, Record, identity_as_json, identity_from_json, record_of
from indexer.replicas.rows import PhotoRow
from searchengine.errors import UsageError
from searchengine.index.layout import IndexIdentity
from searchengine.text import printable
from searchengine.vectors import FloatMatrix

EMBEDDINGS, PHOTOS, ENCODER = "embeddings.npy", "photos.jsonl", "encoder.json"
MAX_LINE_BYTES = 2**24


class Writer:
    def __init__(self, folder: Path, *, identity: IndexIdentity, photos: int, dtype: str) -> None:
        (folder / ENCODER).write_text(identity_as_json(identity) + "\n", "ascii")
        self._matrix = MatrixWriter(folder / EMBEDDINGS, dim=identity.dim, dtype=dtype)
        self._lines = (folder / PHOTOS).open("w", encoding="ascii", newline="\n")

    def write(self, photos: Sequence[PhotoRow], vectors: FloatMatrix) -> None:
        self._matrix.write(vectors)
        self._lines.writelines(f"{json.dumps(record_of(photo))}\n" for photo in photos)

    def close(self) -> None:
        self._matrix.close()
        self._lines.close()


class Source:
    def __init__(self, folder: Path) -> None:
        self._lines = folder / PHOTOS
        self._matrix = open_matrix(folder / EMBEDDINGS)
        self.photos = len(self._matrix)
        card = folder / ENCODER
        self.identity = identity_from_json(card.read_bytes(), place=str(card)) if card.is_file() else None

    def chunks(self) -> Iterator[tuple[list[Record], FloatMatrix]]:
        try:
            lines = self._lines.open("rb")
        except OSError as error:
            reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            raise UsageError(f"{printable(str(self._lines))} {reason}; it tells whose the vectors are") from None
        with lines:
            records = self._records(lines)
            for start in range(0, self.photos, PHOTOS_AT_ONCE):
                vectors = self._matrix[start : start + PHOTOS_AT_ONCE]
                some = list(islice(records, len(vectors)))
                if len(some) < len(vectors):
                    raise self._wrong_number(start + len(some))
                yield some, vectors
            if next(records, None) is not None:
                raise self._wrong_number(self.photos + 1)

    def _records(self, lines: IO[bytes]) -> Iterator[Record]:
        number = 0
        while line := lines.readline(MAX_LINE_BYTES):
            number += 1
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{printable(str(self._lines))}, line {number:,} is no JSON ({error})") from None
            if not isinstance(record, dict):
                raise UsageError(f"{printable(str(self._lines))}, line {number:,} is no object of JSON")
            yield record

    def _wrong_number(self, lines: int) -> UsageError:
        at_least = "at least " * (lines > self.photos)
        return UsageError(
            f"{printable(str(self._lines))} has {at_least}{lines:,} lines for {self.photos:,} vectors; export it again"
        )
