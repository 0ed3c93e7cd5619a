"""Photos on a web server: a page of links and what is below it, or single files by their addresses (RFC 9110).

A login comes from ~/.netrc, a proxy from HTTP_PROXY, HTTPS_PROXY and NO_PROXY.
"""

from __future__ import annotations

import email.utils
import re
from contextlib import suppress
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING
from urllib.parse import unquote, urldefrag, urljoin

from searchengine.stores import StoredPhoto
from searchengine.stores.background import wait_for
from searchengine.stores.local import MAX_INTEGER, is_skipped
from searchengine.stores.transfer import Page, Refused, check_before_body, check_length
from searchengine.stores.web_client import NoHead, WebClient, body, extent

if TYPE_CHECKING:
    import aiohttp

MAX_PAGE_BYTES = 64 * 2**20
MAX_UNTOLD_BYTES = 256 * 2**20
"""Of a file whose size the server does not tell."""
MAX_SKIPPED_BYTES = 64 * 2**20
"""Of a file of which the server gives no parts: so much is taken to get at what comes after it."""
UNTOLD = ""
"""The tag of a file of which the server tells neither tag nor time. What is read has none: it always differs."""
MAX_DEPTH = 64
"""Of folders in folders: a server may lead in circles."""


class HttpFiles:
    reads_at_once = 16
    lists_exactly = False

    def __init__(self) -> None:
        self._web = WebClient(remedy="a login for it belongs into ~/.netrc")

    def list_page(self, prefix: str, token: str | None) -> Page:
        """The links of a page to what lies directly below it. Links elsewhere, or with a query, are left out."""
        if prefix.count("/") > MAX_DEPTH:
            raise Refused(f"it is more than {MAX_DEPTH} folders deep")
        url, page = wait_for(self._page(prefix))
        if len(page) == MAX_PAGE_BYTES:
            raise Refused(f"the page of links has {MAX_PAGE_BYTES:,} bytes or more")
        names = _below(url, page)
        return Page(
            names=[prefix + name for name in names if not name.endswith("/")],
            folders=[prefix + name for name in names if name.endswith("/")],
        )

    def has_any(self, prefix: str) -> bool:
        wait_for(self._stat(prefix))
        return True

    def stat(self, key: str) -> StoredPhoto:
        return wait_for(self._stat(key))

    def get(
        self, key: str, start: int, stop: int, *, max_bytes: int, expected: StoredPhoto | None
    ) -> tuple[StoredPhoto, bytes]:
        return wait_for(self._get(key, start, stop, max_bytes=max_bytes, expected=expected))

    async def _page(self, prefix: str) -> tuple[str, bytes]:
        async with self._web.answer("GET", prefix) as answer:
            if answer.content_type not in ("text/html", "application/xhtml+xml"):
                raise Refused(f"it is {answer.content_type}, not a page of links")
            return str(answer.url), await body(answer, 0, MAX_PAGE_BYTES)

    async def _stat(self, key: str) -> StoredPhoto:
        try:
            async with self._web.answer("HEAD", key) as answer:
                photo = _stored(key, answer, answer.content_length or 0)
        except NoHead:
            # The first byte tells the same.
            photo, _ = await self._get(key, 0, 1, max_bytes=MAX_INTEGER, expected=None)
        return photo if photo.etag or photo.mtime_ns else replace(photo, etag=UNTOLD)

    async def _get(
        self, key: str, start: int, stop: int, *, max_bytes: int, expected: StoredPhoto | None
    ) -> tuple[StoredPhoto, bytes]:
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        if expected and (expected.etag or "").startswith('"'):  # weak ones must not be compared so
            headers["If-Match"] = str(expected.etag)
        async with self._web.answer("GET", key, headers) as answer:
            begins_at, size_bytes = extent(answer)
            if size_bytes is None:
                limit = min(max_bytes, MAX_UNTOLD_BYTES)
                data = await body(answer, 0, limit + 1)
                check_before_body(_stored(key, answer, len(data)), max_bytes=limit, expected=expected)
                return _stored(key, answer, len(data)), data[start:stop]
            photo = _stored(key, answer, size_bytes)
            check_before_body(photo, max_bytes=max_bytes, expected=expected)
            if begins_at > start or start - begins_at > MAX_SKIPPED_BYTES:
                raise Refused("the server does not give parts of it")
            end = min(stop, size_bytes)
            data = await body(answer, start - begins_at, end - begins_at) if end > start else b""
            check_length(data, size_bytes=size_bytes, start=start, stop=stop)
            return photo, data


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found += [value for name, value in attrs if name == "href" and value]


def _below(page_url: str, page: bytes) -> list[str]:
    """The names that a page links to directly below itself, as they are in addresses; those of folders end with /."""
    links = _Links()
    links.feed(page.decode("utf-8", "replace"))
    folder = urljoin(page_url, ".")
    urls = set()
    for link in links.found:
        with suppress(ValueError):  # an address that is none
            urls.add(urldefrag(urljoin(page_url, link)).url)
    names = (url.removeprefix(folder) for url in urls if url.startswith(folder))
    return sorted(name for name in names if re.fullmatch(r"[^/?]+/?", name) and not _is_skipped(unquote(name)))


def _is_skipped(name: str) -> bool:
    """Hidden, or the folder above, which a page may hide in %2e%2e, or a path in disguise."""
    return is_skipped(name.rstrip("/")) or "/" in name.removesuffix("/")


def _stored(key: str, answer: aiohttp.ClientResponse, size_bytes: int) -> StoredPhoto:
    try:
        modified = email.utils.parsedate_to_datetime(answer.headers["Last-Modified"])
        mtime_ns = int(modified.timestamp()) * 10**9
    except (KeyError, ValueError, OverflowError):
        mtime_ns = 0
    return StoredPhoto(key, size_bytes, mtime_ns, answer.headers.get("ETag"))
