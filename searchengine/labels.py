"""Labelled photos: a CSV file with a header, one photo a line."""

from __future__ import annotations

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path

from searchengine.errors import UsageError
from searchengine.text import printable

PATH_COLUMNS = ("path", "file", "file_name")
LABEL_COLUMN = "label"
MAX_FILE_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class LabelledPhoto:
    """`line` is that of the CSV file, from 1, for messages."""

    path: str
    label: str
    line: int


def read_labels_csv(
    file: str | os.PathLike[str], *, images: str | os.PathLike[str] | None = None
) -> list[LabelledPhoto]:
    """Read a CSV file (RFC 4180, UTF-8) whose header names the columns `path` (or `file`, `file_name`) and `label`.

    Other columns do not count. Relative paths begin at `images`, else at the file's own folder. Blanks around a label
    do not count, empty lines neither. Whether the photos exist is not looked at. Raises UsageError, which names the
    line: for a column too few, an empty cell, and a path that comes a second time with another label.
    """
    shown = f"the labels file {printable(os.fspath(file))}"
    folder = os.fspath(images) if images is not None else os.path.dirname(os.path.abspath(os.fspath(file)))
    if not os.path.isdir(folder):
        raise UsageError(f"the folder of images {printable(folder)} does not exist; check --images")
    # strict: else an open quotation mark would swallow the rest of the file.
    rows = csv.reader(io.StringIO(_text_of(Path(file), shown), newline=""), strict=True)
    photos: dict[str, LabelledPhoto] = {}
    line = 1
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        path_column, label_column = _column(header, PATH_COLUMNS, shown), _column(header, (LABEL_COLUMN,), shown)
        line = rows.line_num + 1
        for row in rows:
            if any(cell.strip() for cell in row):
                if len(row) <= max(path_column, label_column):
                    raise UsageError(f"{shown}, line {line}: {len(row)} cells, but the header has {len(header)}")
                photo = LabelledPhoto(
                    path=os.path.join(folder, row[path_column]), label=row[label_column].strip(), line=line
                )
                _check(photo, row[path_column], photos.get(photo.path), f"{shown}, line {line}")
                photos.setdefault(photo.path, photo)
            line = rows.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{shown}, line {line}: {error}; check its quotation marks") from None
    if not photos:
        raise UsageError(f"{shown} names no photo; write a line for each, such as beach/1.jpg,dog")
    return list(photos.values())


def _check(photo: LabelledPhoto, path: str, before: LabelledPhoto | None, where: str) -> None:
    if not path or "\0" in path:
        raise UsageError(f"{where}: the path is empty or holds a NUL character; name the photo")
    if not photo.label:
        raise UsageError(f"{where}: {printable(path)} has no label; give it one, or take the line out")
    if before is not None and before.label != photo.label:
        raise UsageError(
            f"{where}: {printable(path)} is {printable(repr(photo.label))} here and {printable(repr(before.label))} in "
            f"line {before.line}; a photo has one label"
        )


def _column(header: list[str], names: tuple[str, ...], shown: str) -> int:
    found = [number for number, name in enumerate(header) if name in names]
    if len(found) != 1:
        raise UsageError(
            f"{shown}, line 1: the header must have one column {' or '.join(names)}, but is "
            f"{printable(','.join(header))!r}; begin the file with the line path,label"
        )
    return found[0]


def _text_of(file: Path, shown: str) -> str:
    try:
        with open(file, "rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{shown} cannot be read: {error.strerror}; check the path") from None
    if len(content) > MAX_FILE_BYTES:
        raise UsageError(f"{shown} is larger than {MAX_FILE_BYTES:,} bytes; give a CSV file with one photo a line")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UsageError(f"{shown} is not UTF-8 in line {line}; save it as UTF-8") from None
