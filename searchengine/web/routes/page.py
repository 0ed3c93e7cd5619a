"""The page: the files of searchengine/web/page, exactly those, small enough to be kept in memory."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from fastapi import APIRouter, HTTPException, Request, Response

MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
}

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class PageFile:
    """One file of the page. `etag` is that of its bytes as they are; compressed ones have another."""

    media_type: str
    plain: bytes
    compressed: bytes
    etag: str


@cache
def page_files() -> dict[str, PageFile]:
    """File name -> file, of all that the page consists of."""
    found = {}
    for file in files("searchengine.web").joinpath("page").iterdir():
        media_type = MEDIA_TYPES.get(file.name.rpartition(".")[2])
        if media_type is not None:
            content = file.read_bytes()
            etag = hashlib.sha256(content).hexdigest()[:32]
            found[file.name] = PageFile(media_type, content, gzip.compress(content, mtime=0), etag)
    return found


@router.api_route("/", methods=["GET", "HEAD"])
def index(request: Request) -> Response:
    return _answer(request, page_files()["index.html"])


@router.api_route("/page/{name}", methods=["GET", "HEAD"])
def part(request: Request, name: str) -> Response:
    file = page_files().get(name)
    if file is None:
        raise HTTPException(404, "the page has no file of that name")
    return _answer(request, file)


def _answer(request: Request, file: PageFile) -> Response:
    """Always asked for anew, so that a newer version of the program never meets parts of an older page."""
    compressed = "gzip" in request.headers.get("accept-encoding", "")
    etag = f'"{file.etag}{"-gzip" if compressed else ""}"'
    headers = {"ETag": etag, "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if compressed:
        headers["Content-Encoding"] = "gzip"
    return Response(file.compressed if compressed else file.plain, media_type=file.media_type, headers=headers)
