"""A real server on loopback for an ASGI app or an index, and requests that no well-behaved client would send."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from searchengine.settings import load_settings
from searchengine.web.app import create_app
from searchengine.web.security import Access
from searchengine.web.service import Service

SECONDS = 30


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Server:
    """Where it listens."""

    port: int

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def address(self) -> str:
        return f"http://{self.host}"

    def ask(
        self,
        target: str,
        *,
        method: str = "GET",
        headers: Iterable[tuple[str, str | bytes]] = (),
        body: bytes | Iterable[bytes] | None = None,
    ) -> Answer:
        """Sends the target and the headers as they are, and Host unless it is among them. Iterables go in chunks."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            given = list(headers)
            names = {name.lower() for name, _ in given}
            connection.putrequest(method, target, skip_host="host" in names, skip_accept_encoding=True)
            for name, value in given:
                connection.putheader(name, value)
            in_chunks = body is not None and not isinstance(body, bytes)
            if in_chunks:
                connection.putheader("Transfer-Encoding", "chunked")
            elif isinstance(body, bytes) and "content-length" not in names:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body, encode_chunked=in_chunks)
            answer = connection.getresponse()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def say(self, request: bytes, *, seconds: float = SECONDS) -> bytes:
        """What comes back on a bare connection, until the server closes it or `seconds` have passed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            connection.sendall(request)
            received = b""
            try:
                while data := connection.recv(65536):
                    received += data
            except TimeoutError:
                pass
            return received


@contextmanager
def serving(app: Any) -> Iterator[Server]:
    """`app` on a free port, as `searchengine serve` runs it."""
    config = uvicorn.Config(app, port=0, log_level="critical", server_header=False, ws="none", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + SECONDS
    while not server.started:
        assert thread.is_alive(), "the server has ended"
        assert time.monotonic() < deadline, "the server does not start"
        time.sleep(0.005)
    try:
        yield Server(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(SECONDS)


@contextmanager
def opened_service(index: Path, *, home: Path) -> Iterator[Service]:
    """A service of the index; its cache and settings are below `home`, not those of whoever runs this."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"):
            patch.setenv(name, str(home / name))
        with closing(Service(load_settings({"index": str(index)}))) as service:
            service.open()
            yield service


@contextmanager
def serving_index(index: Path, *, home: Path, token: str | None = None) -> Iterator[Server]:
    with opened_service(index, home=home) as service, serving(create_app(service, Access(token=token))) as server:
        yield server
