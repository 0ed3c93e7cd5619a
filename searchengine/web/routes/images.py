"""Photos by id: the file itself, small copies of it, what the index knows of it. No path comes from a client."""

from __future__ import annotations

import asyncio
import os
import re
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from searchengine.errors import PhotoNotFound
from searchengine.index.photos import ImageRow
from searchengine.stores import LOCAL
from searchengine.web.answers import Json, problems
from searchengine.web.opened import Opened
from searchengine.web.originals import SIGNATURES, Original, prove
from searchengine.web.service import Service, service_of
from searchengine.web.thumbnails import MEDIA_TYPE, SIZES_PX, name_of, size_for

router = APIRouter(prefix="/api/images", tags=["images"], responses=problems(404, 422))

UNKNOWN_TYPE = "application/octet-stream"
# A file that is opened as a document of its own runs nothing, whatever is in it.
LONE_IMAGE = "default-src 'none'; img-src 'self'; style-src 'unsafe-inline'; sandbox; frame-ancestors 'none'"
# By id, so not for ever: an edited photo keeps its id. Shown at once from the browser's cache, checked behind.
THUMBNAIL_CACHING = "private, max-age=600, stale-while-revalidate=604800"
ONE_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})", re.IGNORECASE)

BINARY = {"schema": {"type": "string", "format": "binary"}}
ORIGINAL_TYPES = dict.fromkeys([kind for _, kind in SIGNATURES] + [UNKNOWN_TYPE], BINARY)
UNCHANGED: dict[int | str, dict[str, Any]] = {
    304: {"description": "What the client has (If-None-Match) is still right"}
}
ORIGINAL_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The whole file", "content": ORIGINAL_TYPES},
    206: {"description": "One range of bytes of the file", "content": ORIGINAL_TYPES},
    **UNCHANGED,
    **problems(409, 416),
}
THUMBNAIL_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The whole photo, upright, small", "content": {MEDIA_TYPE: BINARY}},
    **UNCHANGED,
    **problems(409, 429),
}

ImageId = Annotated[int, Path(alias="id", ge=1, lt=2**63, description="The id of a photo, as hits have it.")]
Served = Annotated[Service, Depends(service_of)]


class DetailsModel(BaseModel):
    """What the index knows of a photo. `mtime` and `taken_at` are ISO 8601, the latter the camera's local time."""

    id: int
    store: str
    path: str
    size_bytes: int
    mtime: str
    width: int
    height: int
    taken_at: str | None
    latitude: float | None
    longitude: float | None
    camera: str | None
    tags: list[str]


@router.head("/{id}", include_in_schema=False)
@router.get("/{id}", summary="The file of a photo", response_class=Response, responses=ORIGINAL_ANSWERS)
async def original(
    request: Request,
    image_id: ImageId,
    service: Served,
    asked_range: Annotated[str | None, Header(alias="Range")] = None,
    if_range: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """As it was indexed. 404: there is no such photo, or its file is away; 409: its file has changed since."""

    def open_file(opened: Opened) -> tuple[ImageRow, Original | None]:
        row = _row(image_id, opened)
        return row, service.originals.open(row, index=opened.index) if row.store == LOCAL else None

    row, file = await service.run(open_file)
    if file is None:
        file = await _fetched(row, service)
    etag = f'"{file.content_hash.hex()}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
        "Content-Disposition": _disposition(row.key, is_shown=file.media_type is not None),
        "Content-Security-Policy": LONE_IMAGE,
    }
    if file.mtime_ns:  # 0 where its store tells no time
        headers["Last-Modified"] = formatdate(file.mtime_ns / 1e9, usegmt=True)
    try:
        if _matches(if_none_match, etag):
            file.close()
            return Response(status_code=304, headers=headers)
        part = None if if_range not in (None, etag) else _range(asked_range, size_bytes=file.size_bytes)
    except BaseException:
        file.close()
        raise
    start, end = part or (0, file.size_bytes)
    headers["Content-Length"] = str(end - start)
    if part:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size_bytes}"
    status, media_type = 206 if part else 200, file.media_type or UNKNOWN_TYPE
    if request.method == "HEAD":
        file.close()
        return Response(status_code=status, media_type=media_type, headers=headers)
    return _Streamed(file, start, end, status_code=status, media_type=media_type, headers=headers)


@router.head("/{id}/thumbnail", include_in_schema=False)
@router.get("/{id}/thumbnail", summary="A small copy", response_class=Response, responses=THUMBNAIL_ANSWERS)
async def thumbnail(
    image_id: ImageId,
    service: Served,
    size: Annotated[
        int, Query(ge=1, le=100_000, description=f"Longer side in pixels: the next larger of {SIZES_PX}.")
    ] = 320,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Also of a photo whose file is away, where it was made before. 404, 409: as for the file itself."""

    def look(opened: Opened) -> tuple[ImageRow, int, str, bytes | None]:
        row = _row(image_id, opened)
        max_side_px = size_for(min(size, max(row.width, row.height)))  # a small photo is not made larger
        name = name_of(row, max_side_px=max_side_px)
        return row, max_side_px, name, service.thumbnails.cached(name)

    row, max_side_px, name, jpeg = await service.run(look)
    headers = {"ETag": f'"{name}"', "Cache-Control": THUMBNAIL_CACHING, "Content-Security-Policy": LONE_IMAGE}
    if _matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    if jpeg is None:
        made = service.thumbnails.make(
            name, max_side_px=max_side_px, read=lambda: service.originals.read(row, index=service.index)
        )
        # Others may wait for the same one, so who goes away does not take it along.
        jpeg = await asyncio.shield(asyncio.wrap_future(made))
    return Response(jpeg, media_type=MEDIA_TYPE, headers=headers)


@router.get("/{id}/details", summary="What the index knows of a photo", response_model=DetailsModel)
async def details(image_id: ImageId, service: Served) -> Response:
    def look(opened: Opened) -> tuple[ImageRow, list[str]]:
        row = _row(image_id, opened)
        return row, [label for label, _ in opened.index.tags(vector_id=row.vector_id)]

    row, tags = await service.run(look)
    return Json(
        {
            "id": row.id,
            "store": row.store,
            "path": row.key,
            "size_bytes": row.size_bytes,
            "mtime": datetime.fromtimestamp(row.mtime_ns / 1e9, tz=UTC).isoformat(timespec="seconds"),
            "width": row.width,
            "height": row.height,
            "taken_at": row.taken_at,
            "latitude": row.latitude,
            "longitude": row.longitude,
            "camera": row.camera,
            "tags": tags,
        }
    )


class _Streamed(StreamingResponse):
    """A part of a file, which is closed in the end, also where its client goes away before."""

    def __init__(
        self, file: Original, start: int, end: int, *, status_code: int, media_type: str, headers: dict[str, str]
    ) -> None:
        super().__init__(file.chunks(start, end), status_code=status_code, media_type=media_type, headers=headers)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._file.close()


async def _fetched(row: ImageRow, service: Service) -> Original:
    """A photo that is not a file of this machine."""
    file = await service.originals.fetch(row)
    try:
        await service.run(lambda opened: prove(file, row, index=opened.index))
    except BaseException:
        file.close()
        raise
    return file


def _row(image_id: int, opened: Opened) -> ImageRow:
    row = opened.index.image(image_id)
    if row is None:
        raise PhotoNotFound.by_id(image_id)
    return row


def _matches(if_none_match: str | None, etag: str) -> bool:
    """RFC 9110, 13.1.2: weak comparison, and * for whatever there is."""
    tags = [tag.strip().removeprefix("W/") for tag in (if_none_match or "").split(",")]
    return etag in tags or tags == ["*"]


def _range(asked: str | None, *, size_bytes: int) -> tuple[int, int] | None:
    """First byte, and the one after the last. None, for the whole, where several are asked for, or what makes no sense.

    RFC 9110, 14.2 lets a server ignore those: many small ranges cost it more than the file. Raises HTTPException 416.
    """
    match = ONE_RANGE.fullmatch(asked or "")
    if match is None or match.group(1, 2) == ("", ""):
        return None
    first, last = match.group(1, 2)
    start = int(first) if first else max(0, size_bytes - int(last))
    end = min(size_bytes, int(last) + 1) if first and last else size_bytes
    if first and last and int(last) < start:
        return None
    if start >= size_bytes:
        raise HTTPException(
            416, f"the file has {size_bytes:,} bytes", headers={"Content-Range": f"bytes */{size_bytes}"}
        )
    return start, end


def _disposition(key: str, *, is_shown: bool) -> str:
    """RFC 6266: the name in UTF-8, and in ASCII for those who know no better. Nothing in a name ends the header."""
    name = os.fsencode(os.path.basename(key)).decode("utf-8", "replace")
    plain = re.sub(r"[^A-Za-z0-9 ._()+-]", "_", name)
    tame = "".join(c if c.isprintable() and c not in '/\\"' else "_" for c in name)
    return f"{'inline' if is_shown else 'attachment'}; filename=\"{plain}\"; filename*=UTF-8''{quote(tame, safe='')}"
