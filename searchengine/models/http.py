"""One request over http or https, and what can go wrong with it as a reason that a person can read.

Proxies come from HTTP_PROXY, HTTPS_PROXY and NO_PROXY, as urllib reads them.
"""

from __future__ import annotations

import email.utils
import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPMessage
from typing import IO

from searchengine import __version__
from searchengine.text import printable

# The answers below 500 that another time may be different: time-out, range, too early, too many requests.
PASSING = {408, 416, 425, 429}
LONGEST_WAIT_SECONDS = 60.0


class TransferFailed(Exception):
    """Why a try did not bring the file. `final`: asking this URL again is of no use. `anew`: what came is useless."""

    def __init__(self, reason: str, *, final: bool = False, anew: bool = False, wait_seconds: float = 0.0) -> None:
        super().__init__(printable(reason))
        self.final = final
        self.anew = anew
        self.wait_seconds = wait_seconds


def open_range(
    url: str, *, size_bytes: int, byte_range: str, stall_seconds: float
) -> tuple[http.client.HTTPResponse, int]:
    """The answer to a request for `byte_range` ("5-", "" for all) of a file, and the position where its body begins.

    A server may begin elsewhere, as one does that knows no ranges. Raises TransferFailed, also for a file of another
    size than `size_bytes`.
    """
    headers = {"User-Agent": f"searchengine/{__version__}"}
    if byte_range:
        headers["Range"] = f"bytes={byte_range}"
    with network_errors():
        request = urllib.request.Request(url, headers=headers)
        response: http.client.HTTPResponse = _opener().open(request, timeout=stall_seconds)
    try:
        begins_at, offered = _extent(response)
        if offered not in (None, size_bytes):
            raise TransferFailed(f"offers a file of {offered:,} bytes, expected {size_bytes:,}", final=True)
    except BaseException:
        response.close()
        raise
    return response, begins_at


def _extent(response: http.client.HTTPResponse) -> tuple[int, int | None]:
    """Where the body begins in the file, and how large the file is, if the server says so. Raises TransferFailed."""
    if response.status == http.HTTPStatus.OK:
        length = re.fullmatch(r"\d{1,18}", response.headers.get("Content-Length", ""), re.ASCII)
        return 0, int(length[0]) if length else None
    extent = re.fullmatch(r"bytes (\d{1,18})-\d+/(\d{1,18}|\*)", response.headers.get("Content-Range", ""), re.ASCII)
    if response.status != http.HTTPStatus.PARTIAL_CONTENT or extent is None:
        raise TransferFailed(f"answers {response.status} {response.reason} without what was asked for", anew=True)
    return int(extent[1]), None if extent[2] == "*" else int(extent[2])


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect, but never from https to plain http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        if req.type == "https" and not newurl.lower().startswith("https:"):
            raise urllib.error.URLError(f"it leads from https to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """http and https alone: with urllib's usual handlers, a redirect could lead to ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


@contextmanager
def network_errors() -> Iterator[None]:
    """Turns what the network does wrong into TransferFailed, so that an OSError is always the disk's."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        passing = error.code in PASSING or error.code >= http.HTTPStatus.INTERNAL_SERVER_ERROR
        raise TransferFailed(
            f"answers {error.code} {error.reason}",
            final=not passing,
            anew=error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
            wait_seconds=_retry_after_seconds(error.headers.get("Retry-After", "")),
        ) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        final = isinstance(reason, ssl.SSLCertVerificationError)
        told = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise TransferFailed(f"fails: {told}", final=final) from None


def _retry_after_seconds(text: str) -> float:
    """Retry-After, a number of seconds or a date (RFC 9110, section 10.2.3), within bounds; 0 where it says nothing."""
    try:
        seconds = float(text) if text.isdecimal() else email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, OverflowError):
        return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT_SECONDS)
