"""What clients send: bodies within limits that hold while they arrive, and pictures that the isolated decoder opens."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from searchengine.errors import ImageError, OverloadError
from searchengine.text import printable
from searchengine.vectors import PixelBatch
from searchengine.web.decoders import DecoderPool

MULTIPART = "multipart/form-data"
MAX_UPLOAD_BYTES = 64 * 2**20
MAX_OTHER_BYTES = 2**20  # JSON and plain forms: parsed in memory, at many times their size
MAX_BYTES_TOGETHER = 512 * 2**20
MAX_IMAGES = 16
MAX_FIELDS = 128
MAX_FIELD_BYTES = 64 * 2**10


class BodyLimit:
    """ASGI middleware: a request's body is read up to its limit in bytes, and in time.

    A body is refused by what it says of its size before a byte of it is read, and as it arrives by what it is. One that
    stops for `idle_seconds`, or takes `total_seconds` altogether, is not waited for. What reads the body meets
    HTTPException 413 or 408, or OverloadError where the bodies of all requests under way come to more than
    `max_bytes_together`.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_upload_bytes: int = MAX_UPLOAD_BYTES,
        max_other_bytes: int = MAX_OTHER_BYTES,
        max_bytes_together: int = MAX_BYTES_TOGETHER,
        idle_seconds: float = 15,
        total_seconds: float = 180,
    ) -> None:
        self._app = app
        self._max_upload_bytes = max_upload_bytes
        self._max_other_bytes = max_other_bytes
        self._max_bytes_together = max_bytes_together
        self._held_bytes = 0
        self._idle_seconds = idle_seconds
        self._total_seconds = total_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        is_upload = media_type_of(headers) == MULTIPART
        max_bytes = self._max_upload_bytes if is_upload else self._max_other_bytes
        declared = headers.get("content-length", "")
        too_large = HTTPException(413, f"the body of the request is larger than the limit of {max_bytes:,} bytes")
        too_slow = HTTPException(408, "the body of the request did not arrive in time; send it again")
        loop = asyncio.get_running_loop()
        last_moment = loop.time() + self._total_seconds
        received_bytes = 0
        is_complete = False

        async def limited() -> Message:
            nonlocal received_bytes, is_complete
            if is_complete:
                return await receive()
            if declared.isdecimal() and int(declared[:20]) > max_bytes:
                raise too_large
            try:
                async with asyncio.timeout_at(min(last_moment, loop.time() + self._idle_seconds)):
                    message = await receive()
            except TimeoutError:
                raise too_slow from None
            size_bytes = len(message.get("body", b""))
            received_bytes += size_bytes
            self._held_bytes += size_bytes
            if received_bytes > max_bytes:
                raise too_large
            if self._held_bytes > self._max_bytes_together:
                raise OverloadError("the service has as much to read as it takes at a time; send it again in a second")
            is_complete = not message.get("more_body", False)
            return message

        try:
            await self._app(scope, limited, send)
        finally:
            self._held_bytes -= received_bytes


@dataclass(frozen=True, kw_only=True)
class UploadedImage:
    """The encoded bytes of a picture, not looked at yet, and their sha256.

    `name` is what the client calls it: for messages only.
    """

    name: str
    data: bytes = field(compare=False)
    content_hash: bytes


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A multipart body: its text fields, each with all its values in order, and its files."""

    fields: dict[str, list[str]]
    images: list[UploadedImage]


def media_type_of(headers: Headers) -> str:
    """Of the body, without its parameters; empty if it has none."""
    return headers.get("content-type", "").split(";")[0].strip().lower()


def is_upload(request: Request) -> bool:
    """Whether the body is a multipart form."""
    return media_type_of(request.headers) == MULTIPART


async def read_upload(request: Request) -> Upload:
    """Read a multipart body to its end. Files are those of the field `image`.

    Raises HTTPException: 400 for one that is ill-formed, or of too many or too large parts; 415 for another type; 422
    for files under another name. Raises what `BodyLimit` does.
    """
    if not is_upload(request):
        raise HTTPException(415, f"the body is no form with files; send it as {MULTIPART}")
    fields: dict[str, list[str]] = {}
    images = []
    try:
        async with request.form(max_files=MAX_IMAGES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
            for part, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if part != "image":
                        raise HTTPException(422, f"a file comes as {printable(part[:80])!r}; send it as 'image'")
                    name, data = printable(value.filename or "")[:255], await value.read()
                    # A large one takes too long for the event loop.
                    content_hash = (await asyncio.to_thread(hashlib.sha256, data)).digest()
                    images.append(UploadedImage(name=name, data=data, content_hash=content_hash))
                else:
                    value.encode()  # the client names the charset, and some yield what is no text
                    fields.setdefault(part, []).append(value)
    except (HTTPException, ClientDisconnect, OverloadError):
        raise
    except Exception:  # of a parser that was given nonsense
        raise HTTPException(400, "the form cannot be parsed; check its boundary, and send text as UTF-8") from None
    return Upload(fields=fields, images=images)


def crops_of(images: Sequence[UploadedImage], *, decoders: DecoderPool, image_size: int) -> PixelBatch:
    """The crops that an encoder takes: uint8 RGB (n, image_size, image_size, 3).

    Raises ImageError that names the image.
    """
    crops = np.empty((len(images), image_size, image_size, 3), np.uint8)
    for number, image in enumerate(images):
        try:
            crops[number] = decoders.decode_bytes(image.data, image_size=image_size).pixels
        except ImageError as error:
            raise ImageError(f"{image.name or 'the image'}: {error}") from None
    return crops
