"""A web server on loopback of files in memory, with tags and ranges, that remembers what it was asked."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from remote_servers import serving


class WebFiles:
    """`files`: path -> content; what is in `statuses` is answered so instead. `asked`: method and path of each request.

    `meeting`, once set, is a number of requests that are answered only when so many are under way at once.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.statuses: dict[str, int] = {}
        self.asked: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.address = ""
        self.meeting: threading.Barrier | None = None

    def put(self, name: str, data: bytes) -> str:
        """The URL of a file that there is from now on."""
        self.files[f"/{name}"] = data
        return f"{self.address}/{name}"


@contextmanager
def web_files() -> Iterator[WebFiles]:
    web = WebFiles()
    with serving(type("Handler", (_Handler,), {"web": web})) as port:
        web.address = f"http://127.0.0.1:{port}"
        yield web


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    web: WebFiles

    def do_GET(self) -> None:
        self.web.asked.append((self.command, self.path))
        self.web.headers.append(dict(self.headers))
        if self.web.meeting is not None:
            self.web.meeting.wait(timeout=30)
        data = self.web.files.get(self.path)
        status = self.web.statuses.get(self.path, 404 if data is None else 200)
        if data is None or status >= 400:
            self._send(status, b"", {})
            return
        tag = f'"{hashlib.sha256(data).hexdigest()}"'
        headers = {"ETag": tag, "Accept-Ranges": "bytes"}
        if self.headers.get("If-Match", tag) != tag:
            self._send(412, b"", {})
            return
        asked = self.headers.get("Range", "").removeprefix("bytes=")
        if asked:
            first, last = (int(number) if number else len(data) - 1 for number in asked.split("-"))
            part = data[first : last + 1]
            if not part:
                self._send(416, b"", headers | {"Content-Range": f"bytes */{len(data)}"})
                return
            headers["Content-Range"] = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
            data, status = part, 206
        self._send(status, data, headers)

    do_HEAD = do_GET  # noqa: N815

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass
