"""Lists of photos as their makers write them: CSV with a header, Parquet, or text with a place a line."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from searchengine.errors import UsageError
from searchengine.stores.contents import CutShort, Malformed
from searchengine.stores.local import MAX_INTEGER
from searchengine.stores.ranged import RangedFile, RangedStream
from searchengine.text import printable

if TYPE_CHECKING:
    import pyarrow as pa

# Names of columns, in any case; of several, the first here counts.
PLACES = tuple(
    "key path url uri location file file_name filename file_path filepath image image_path image_url".split()
)
SIZES = ("size_bytes", "size")
TAGS = ("etag", "e_tag")
TIMES = ("mtime_ns", "mtime", "last_modified")

DELIMITERS = ",;\t"
BUFFER_BYTES = 2**18
ROWS_PER_BATCH = 10_000


class Row(NamedTuple):
    """What a list says of one photo: its place, and the rest as far as there is a column for it and a value in it."""

    place: str
    size: object = None
    tag: object = None
    time: object = None
    time_is_ns: bool = False


class _Columns(NamedTuple):
    """Where they are among the columns of a list."""

    place: int
    size: int | None
    tag: int | None
    time: int | None
    time_is_ns: bool


def rows_of(file: RangedFile, *, place: str) -> Iterator[Row]:
    """The rows of a list, by the kind that its name tells. Those without a place are left out.

    Raises Malformed, CutShort, ImageError, OSError, UsageError where Parquet's extra is missing.
    """
    extension = os.path.splitext(place)[1].lower()
    if extension == ".parquet":
        return _of_parquet(file)
    buffered = io.BufferedReader(RangedStream(file), BUFFER_BYTES)
    # Names of files may not be UTF-8.
    text = io.TextIOWrapper(buffered, encoding="utf-8-sig", errors="surrogateescape", newline="")
    return _of_csv(text) if extension == ".csv" else (Row(line) for line in _lines(text))


def size_of(row: Row) -> int | None:
    """Bytes. Raises ValueError."""
    return None if row.size is None else _whole_number(row.size, "size")


def tag_of(row: Row) -> str | None:
    return None if row.tag is None else str(row.tag)


def time_ns_of(row: Row) -> int | None:
    """Since 1970, of a number of seconds, or of a date in ISO 8601, UTC if it does not say. Raises ValueError."""
    if row.time is None:
        return None
    if row.time_is_ns:
        return _whole_number(row.time, "time")
    text = str(row.time).strip()
    with suppress(ValueError, OverflowError):
        return _bounded(float(text))
    try:
        moment = datetime.fromisoformat(text)
        return _bounded((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        raise ValueError(f"its time in the list is {printable(repr(text))}, no date of ISO 8601") from None


def _bounded(seconds: float) -> int:
    """As nanoseconds, as far as a table holds them."""
    return max(-MAX_INTEGER, min(round(seconds * 1e9), MAX_INTEGER))


def _whole_number(value: object, what: str) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = -1
    if not 0 <= number <= MAX_INTEGER:
        raise ValueError(f"its {what} in the list is {printable(repr(value))}, no whole number, 0 or more")
    return number


def _of_csv(text: io.TextIOWrapper) -> Iterator[Row]:
    header = text.readline(2**16)
    columns, delimiter = None, DELIMITERS[0]
    for delimiter in DELIMITERS:
        columns = _columns(next(csv.reader([header], delimiter=delimiter), []))
        if columns is not None:
            break
    if columns is None:
        raise Malformed(
            f"its first line names none of the columns {', '.join(PLACES)}; give the photos' column such a name"
        )
    reader = csv.reader(text, delimiter=delimiter)
    try:
        for cells in reader:
            row = _row(columns, cells)
            if row is not None:
                yield row
    except csv.Error as error:
        raise CutShort(f"line {reader.line_num + 1:,} is no CSV: {error}") from None


def _lines(text: Iterable[str]) -> Iterator[str]:
    for line in text:
        place = line.rstrip("\r\n")
        if place.strip():
            yield place


def _of_parquet(file: RangedFile) -> Iterator[Row]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            "lists in Parquet need the extra parquet; install it with: pip install 'searchengine[parquet]'"
        ) from None
    try:
        table = parquet.ParquetFile(io.BufferedReader(RangedStream(file), BUFFER_BYTES))
        names = table.schema_arrow.names
        columns = _columns(names)
        if columns is None:
            shown = printable(", ".join(names[:20]))
            raise Malformed(f"it has the columns {shown}, but none of {', '.join(PLACES)}; rename the photos' one")
        wanted = [number for number in columns[:4] if number is not None]
        for batch in table.iter_batches(batch_size=ROWS_PER_BATCH, columns=[names[number] for number in wanted]):
            by_name = {name: _values(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
            cells: Sequence[Any] = [by_name.get(name, [None] * len(batch)) for name in names]
            is_time = columns.time is not None and pa.types.is_temporal(table.schema_arrow.types[columns.time])
            for row in zip(*cells, strict=True):
                found = _row(columns, row)
                if found is not None:
                    yield found._replace(time_is_ns=found.time_is_ns or is_time)
    except pa.ArrowException as error:
        raise Malformed(f"it is no whole Parquet file: {printable(str(error))}") from None


def _values(column: pa.Array) -> list[Any]:
    """Of a time, nanoseconds since 1970, which Python's own do not hold."""
    import pyarrow as pa

    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("ns", tz=column.type.tz)).cast(pa.int64())
    values: list[Any] = column.to_pylist()
    return values


def _columns(names: Sequence[str]) -> _Columns | None:
    places = {name.strip().lower(): number for number, name in reversed(list(enumerate(names)))}

    def first(known: Sequence[str]) -> int | None:
        return next((places[name] for name in known if name in places), None)

    place, time = first(PLACES), first(TIMES)
    if place is None:
        return None
    return _Columns(place, first(SIZES), first(TAGS), time, time is not None and time == places.get(TIMES[0]))


def _row(columns: _Columns, cells: Sequence[Any]) -> Row | None:
    def cell(number: int | None) -> Any:
        value = cells[number] if number is not None and number < len(cells) else None
        return None if value == "" else value

    place = cell(columns.place)
    if isinstance(place, bytes):
        place = os.fsdecode(place)
    if not isinstance(place, str) or not place.strip():
        return None
    return Row(place, cell(columns.size), cell(columns.tag), cell(columns.time), columns.time_is_ns)
