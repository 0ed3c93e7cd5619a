"""Photos in a tar archive, or in a shard of webdataset, which is one: where each lies is recorded once.

The headers are the standard library's business; the photos are read by their ranges, as they lie there.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator

from searchengine.errors import ImageError
from searchengine.stores import HEAD_BYTES
from searchengine.stores.archive import ArchiveStore, is_hidden
from searchengine.stores.contents import CutShort, Entry, Malformed
from searchengine.stores.local import MAX_INTEGER
from searchengine.stores.ranged import LocalFile, RangedFile, RangedStream

# From header to header on a disk; over a network in strides so long that several ranges are fetched at once.
BUFFER_BYTES, REMOTE_BUFFER_BYTES = 4096, 32 * 2**20
MAX_HEADER_BYTES = 2**20
MAX_PADDING_BYTES = 2**20
"""Of zeros after the end mark: usual are 10 KiB. What is longer may be a file that has not all come yet."""
# What the library says of headers that make no sense; the last where one announces another by the thousand.
FAULTS = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError)
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarStore(ArchiveStore):
    name = "tar"

    def _check(self, file: RangedFile) -> None:
        block = file.read_at(0, tarfile.BLOCKSIZE)
        packer = next((name for start, name in COMPRESSED.items() if block.startswith(start)), None)
        if packer:
            raise Malformed(f"it is compressed, so that no photo in it can be read by itself; use {packer} -d")
        try:
            if any(block):
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            elif not block:
                raise Malformed("it is empty; get or pack it again")
        except tarfile.HeaderError:
            raise Malformed("it is no tar archive; check the file") from None

    def _entries(self, file: RangedFile, state: str) -> Iterator[Entry]:
        """A member's tag is the archive's: nothing in a tar tells of a member's content."""
        self._check(file)
        stream = _Headers(RangedStream(file), BUFFER_BYTES if isinstance(file, LocalFile) else REMOTE_BUFFER_BYTES)
        last = -1
        try:
            archive = tarfile.TarFile(fileobj=stream, encoding="utf-8", errors="surrogateescape")
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # which would keep them all
                if member.offset_data <= last or member.size < 0:
                    raise CutShort("it is damaged: a header leads back to where it came from")
                last = member.offset_data
                name = _name(member.name)
                if member.isreg() and not member.issparse() and name and not is_hidden(name):
                    yield Entry(
                        name=name,
                        size_bytes=member.size,
                        mtime_ns=_time_ns(member),
                        etag=state,
                        offset=member.offset_data,
                        stored_bytes=member.size,
                    )
            # The library ends at whatever is no header.
            stream.seek(archive.offset)
            end = stream.read(tarfile.BLOCKSIZE)
        except FAULTS as error:
            raise CutShort(f"it breaks off, or is damaged: {error}") from None
        if any(end):
            raise CutShort(f"it is damaged after {archive.offset:,} bytes")
        if not end:
            raise CutShort("it has no end mark, so it may break off here; get or pack it again")
        rest_bytes = file.size_bytes - archive.offset
        if rest_bytes > MAX_PADDING_BYTES or file.read_at(archive.offset, rest_bytes).strip(b"\0"):
            raise CutShort("it goes on after its end mark: it is not whole, or several archives in one; pack it again")

    def _unpacked(self, file: RangedFile, entry: Entry) -> bytes:
        data = file.read_at(entry.offset, entry.stored_bytes)
        if len(data) < entry.stored_bytes:
            raise ImageError("is cut off: its archive ends before it does")
        return data

    def _head(self, file: RangedFile, entry: Entry) -> bytes:
        return file.read_at(entry.offset, min(HEAD_BYTES, entry.stored_bytes))


class _Headers(io.BufferedReader):
    """Refuses a read that no honest header asks for: a name of gigabytes would take as much memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims to be of more than {MAX_HEADER_BYTES:,} bytes")
        return super().read(size)


def _name(name: str) -> str:
    """`tar c .` writes ./beach/a.jpg."""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def _time_ns(member: tarfile.TarInfo) -> int:
    """Of a header that gives a fraction, whole seconds."""
    try:
        return max(-MAX_INTEGER, min(int(member.mtime) * 10**9, MAX_INTEGER))
    except (ValueError, OverflowError):  # not a number, or infinite: a header may say so
        return 0
