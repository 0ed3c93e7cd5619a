"""Photos in a zip archive, by PKWARE's APPNOTE.TXT 6.3.10: its directory is read once, members by their ranges.

Not by the standard library's zipfile, which keeps all of the directory in memory, reads one member at a time, and gives
up an archive for one name that is not what it claims to be.
"""

from __future__ import annotations

import bz2
import stat
import struct
import zlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

from searchengine.errors import ImageError
from searchengine.stores import HEAD_BYTES
from searchengine.stores.archive import ArchiveStore, is_hidden
from searchengine.stores.contents import CutShort, Entry, Malformed
from searchengine.stores.ranged import RangedFile

STORED, DEFLATED, BZIP2 = 0, 8, 12
ENCRYPTED = 1 << 0
UTF_8 = 1 << 11
UNIX = 3
ZIP64, TIMES = 0x0001, 0x5455  # kinds of extra fields

END = struct.Struct("<4s4H2LH")
LOCATOR = struct.Struct("<4sLQL")
END_64 = struct.Struct("<4sQ2H2L4Q")
IN_DIRECTORY = struct.Struct("<4s2B3HL3L5H2L")
BEFORE_MEMBER = struct.Struct("<4s5H3L2H")

MAX_COMMENT_BYTES = 2**16 - 1
# What most often lies between a member's header and its bytes: fields with its times and owner.
USUAL_EXTRA_BYTES = 256
PAGE_BYTES = 2**20
PACKED_HEAD_BYTES = 4096


class _Directory(NamedTuple):
    start: int
    size_bytes: int
    entries: int
    """By its end, which many packers write modulo 2**16."""
    shift: int
    """By how much all offsets are off: what was put before the archive, such as a program that unpacks it."""


class ZipStore(ArchiveStore):
    name = "zip"

    def _check(self, file: RangedFile) -> None:
        _directory(file)

    def _entries(self, file: RangedFile, state: str) -> Iterator[Entry]:
        """A member's tag is its checksum, so one that stays the same survives a change of its archive."""
        directory = _directory(file)
        page, at, entries = b"", 0, 0
        place, end = directory.start, directory.start + directory.size_bytes
        while at < len(page) or place < end:
            size_bytes = _size_in_directory(page, at)
            if size_bytes is None or at + size_bytes > len(page):
                more = file.read_at(place, min(PAGE_BYTES, end - place))
                if not more:
                    raise CutShort("its directory breaks off; repair it with `zip -FF`")
                page, at, place = page[at:] + more, 0, place + len(more)
                continue
            if not page.startswith(b"PK\1\2", at):
                raise CutShort("its directory is damaged; repair it with `zip -FF`")
            entry = _entry(page[at : at + size_bytes], shift=directory.shift)
            if entry is not None and not is_hidden(entry.name):
                yield entry
            at += size_bytes
            entries += 1
        if (entries - directory.entries) % 2**16:
            raise CutShort(
                f"its directory has {entries:,} names instead of {directory.entries:,}; repair it with `zip -FF`"
            )

    def _unpacked(self, file: RangedFile, entry: Entry) -> bytes:
        packed = self._packed(file, entry, entry.stored_bytes)
        size_bytes = entry.size_bytes or 0
        data = _unpack(packed, entry.method, at_most=size_bytes + 1)
        if len(packed) < entry.stored_bytes or len(data) != size_bytes or zlib.crc32(data) != entry.crc:
            raise ImageError("is damaged: its checksum in the archive is another")
        return data

    def _head(self, file: RangedFile, entry: Entry) -> bytes:
        packed = self._packed(file, entry, min(PACKED_HEAD_BYTES, entry.stored_bytes))
        return _unpack(packed, entry.method, at_most=HEAD_BYTES)

    def _packed(self, file: RangedFile, entry: Entry, length: int) -> bytes:
        """The first `length` bytes of a member, in one read where its header is of the usual size."""
        usual = BEFORE_MEMBER.size + len(entry.name.encode("utf-8", "surrogateescape")) + USUAL_EXTRA_BYTES
        data = file.read_at(entry.offset, usual + length)
        if len(data) < BEFORE_MEMBER.size or not data.startswith(b"PK\3\4"):
            raise ImageError("is damaged: it is not where the directory of its archive says")
        *_, name_bytes, extra_bytes = BEFORE_MEMBER.unpack_from(data)
        start = BEFORE_MEMBER.size + name_bytes + extra_bytes
        if start + length > len(data):
            return file.read_at(entry.offset + start, length)
        return data[start : start + length]


def _unpack(packed: bytes, method: int, *, at_most: int) -> bytes:
    """The first `at_most` bytes of what was packed. Raises ImageError."""
    try:
        if method == STORED:
            return packed[:at_most]
        if method == DEFLATED:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, at_most)
        return bz2.BZ2Decompressor().decompress(packed, at_most)
    except (zlib.error, OSError):
        raise ImageError("is damaged: it cannot be unpacked") from None


def _directory(file: RangedFile) -> _Directory:
    """Where the central directory is (4.3.14 to 4.3.16). Raises Malformed, ImageError."""
    start = max(0, file.size_bytes - END.size - MAX_COMMENT_BYTES - LOCATOR.size - END_64.size)
    tail = file.read_at(start, file.size_bytes - start)
    at = len(tail)
    while (at := tail.rfind(b"PK\5\6", 0, at)) >= 0:
        if at + END.size <= len(tail) and at + END.size + END.unpack_from(tail, at)[-1] <= len(tail):
            break
    else:
        raise Malformed("it is no whole zip archive: its directory is missing at the end; get or pack it again")
    _, disk, first_disk, _, entries, size_bytes, offset, _ = END.unpack_from(tail, at)
    locator = at - LOCATOR.size
    if locator >= 0 and tail.startswith(b"PK\6\7", locator):
        # Where it says it is, counts from the archive's own start; nearly always it is right before its locator.
        for place in (locator - END_64.size, LOCATOR.unpack_from(tail, locator)[2] - start):
            if place >= 0 and place + END_64.size <= len(tail) and tail.startswith(b"PK\6\6", place):
                *_, disk, first_disk, _, entries, size_bytes, offset = END_64.unpack_from(tail, place)
                at = place
                break
    if disk or first_disk:
        raise Malformed("it is one part of a split zip archive; join the parts with `zip -s 0`")
    shift = start + at - size_bytes - offset
    if shift < 0:
        raise Malformed("it is damaged: its directory is not where its end says; repair it with `zip -FF`")
    return _Directory(start + at - size_bytes, size_bytes, entries, shift)


def _size_in_directory(page: bytes, at: int) -> int | None:
    """Of the entry that begins at `at`; None where not even that is all there."""
    if len(page) < at + IN_DIRECTORY.size:
        return None
    name_bytes, extra_bytes, comment_bytes = struct.unpack_from("<3H", page, at + 28)
    return int(IN_DIRECTORY.size + name_bytes + extra_bytes + comment_bytes)


def _entry(header: bytes, *, shift: int) -> Entry | None:
    """None for what is no regular file."""
    (_, _, system, _, flags, method, dos_moment, crc, stored_bytes, size_bytes, name_bytes, extra_bytes, _, _, _,
     attributes, offset) = IN_DIRECTORY.unpack_from(header)  # fmt: skip
    name = _name(header[IN_DIRECTORY.size : IN_DIRECTORY.size + name_bytes], is_utf_8=bool(flags & UTF_8))
    kind = stat.S_IFMT(attributes >> 16) if system == UNIX else 0
    if not name or name.endswith("/") or kind not in (0, stat.S_IFREG):
        return None
    extra = _fields(header[IN_DIRECTORY.size + name_bytes :][:extra_bytes])
    wide = extra.get(ZIP64, b"")
    # Only those that do not fit are there, in this order (4.5.3).
    numbers = iter(struct.unpack_from(f"<{len(wide) // 8}Q", wide))
    size_bytes, stored_bytes, offset = (
        next(numbers, number) if number == 2**32 - 1 else number for number in (size_bytes, stored_bytes, offset)
    )
    trouble = None
    if flags & ENCRYPTED:
        trouble = "is encrypted in its archive; unpack it"
    elif method not in (STORED, DEFLATED, BZIP2):
        trouble = f"is packed by method {method}, which is not read here; pack it anew with `zip`"
    return Entry(
        name=name,
        size_bytes=size_bytes,
        mtime_ns=_time_ns(extra.get(TIMES, b""), dos_moment),
        etag=f"{crc:08x}",
        offset=offset + shift,
        stored_bytes=stored_bytes,
        method=method,
        crc=crc,
        trouble=trouble,
    )


def _name(raw: bytes, *, is_utf_8: bool) -> str:
    """By the specification (appendix D) it is code page 437 unless marked; but many write UTF-8 and mark nothing."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("utf-8", "surrogateescape") if is_utf_8 else raw.decode("cp437")


def _fields(extra: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    at = 0
    while at + 4 <= len(extra):
        kind, size_bytes = struct.unpack_from("<2H", extra, at)
        found.setdefault(kind, extra[at + 4 : at + 4 + size_bytes])
        at += 4 + size_bytes
    return found


def _time_ns(times: bytes, dos_moment: int) -> int:
    """Since 1970, where that is given; else by the packer's clock, as if in UTC: the same wherever it is read."""
    if len(times) >= 5 and times[0] & 1:
        return int(struct.unpack_from("<l", times, 1)[0]) * 10**9
    date, clock = dos_moment >> 16, dos_moment & 0xFFFF
    try:
        moment = datetime(
            1980 + (date >> 9), date >> 5 & 15, date & 31, clock >> 11, clock >> 5 & 63, (clock & 31) * 2, tzinfo=UTC
        )
    except ValueError:
        return 0
    return int(moment.timestamp()) * 10**9
