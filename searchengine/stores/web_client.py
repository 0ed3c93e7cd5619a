"""Requests over http that are waited for on the event loop, and what their answers mean (RFC 9110)."""

from __future__ import annotations

import asyncio
import re
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING

from searchengine import __version__
from searchengine.stores.retry import retry_after_seconds
from searchengine.stores.transfer import (
    CONNECTIONS,
    LONGEST_REQUEST_SECONDS,
    TIMEOUT_SECONDS,
    Refused,
    TransferFailure,
    network_failure,
    status_failure,
)

if TYPE_CHECKING:
    import aiohttp

# What servers answer to HEAD that give the file.
NO_HEAD = frozenset({400, 403, 405, 501})
RANGE_BEYOND = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
# A picture packed again on its way would have another length than the one that is told.
HEADERS = {"User-Agent": f"searchengine/{__version__}", "Accept-Encoding": "identity"}


class WebClient:
    """Its connections are kept open for what comes next. `remedy` is told where a login is wanted."""

    def __init__(self, *, remedy: str) -> None:
        self._remedy = remedy
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def answer(
        self, method: str, url: str, headers: dict[str, str] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        import aiohttp
        import yarl

        try:
            # An address that is one already goes out as it is: servers tell apart what is equal by the standard.
            target = yarl.URL(url, encoded=url.isascii() and " " not in url)
            async with self._opened().request(method, target, headers=headers) as answer:
                if url.startswith("https:") and answer.url.scheme != "https":
                    raise Refused("it leads from https to http")
                if method == "HEAD" and answer.status in NO_HEAD:
                    raise NoHead
                if answer.status >= HTTPStatus.BAD_REQUEST and answer.status != RANGE_BEYOND:
                    wait_seconds = retry_after_seconds(answer.headers.get("Retry-After"))
                    raise status_failure(
                        answer.status, answer.reason or "", wait_seconds=wait_seconds, remedy=self._remedy
                    )
                yield answer
        except (TransferFailure, NoHead):
            raise
        except (aiohttp.InvalidURL, aiohttp.TooManyRedirects, ValueError) as error:
            raise Refused(f"its address is of no use: {type(error).__name__}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise network_failure(error) from None

    def _opened(self) -> aiohttp.ClientSession:
        """Made on the event loop, which alone uses it."""
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=CONNECTIONS),
                timeout=aiohttp.ClientTimeout(
                    total=LONGEST_REQUEST_SECONDS, sock_connect=TIMEOUT_SECONDS, sock_read=TIMEOUT_SECONDS
                ),
                headers=HEADERS,
                trust_env=True,
                auto_decompress=False,
            )
            weakref.finalize(self, _close, asyncio.get_running_loop(), self._session)
        return self._session


class NoHead(Exception):
    """The server does not answer HEAD."""


def extent(answer: aiohttp.ClientResponse) -> tuple[int, int | None]:
    """Where the body begins in the file, and how large that is; None where it is not told."""
    told = re.fullmatch(r"bytes (?:(\d{1,18})-\d+|\*)/(\d{1,18})", answer.headers.get("Content-Range", ""), re.ASCII)
    if answer.status == HTTPStatus.PARTIAL_CONTENT and told and told[1]:
        return int(told[1]), int(told[2])
    if answer.status == RANGE_BEYOND:
        return 0, int(told[2]) if told else 0
    if answer.status == HTTPStatus.OK:
        return 0, answer.content_length
    raise Refused(f"the answer {answer.status} is none to what was asked")


async def body(answer: aiohttp.ClientResponse, start: int, stop: int) -> bytes:
    """Bytes `start` to `stop` of a body; what comes after them is not taken."""
    chunks = []
    position = 0
    async for chunk in answer.content.iter_any():
        chunks.append(chunk[max(0, start - position) : stop - position])
        position += len(chunk)
        if position >= stop:
            break
    return b"".join(chunks)


def _close(loop: asyncio.AbstractEventLoop, session: aiohttp.ClientSession) -> None:
    if loop.is_running():
        asyncio.run_coroutine_threadsafe(session.close(), loop)
