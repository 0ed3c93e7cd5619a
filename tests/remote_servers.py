"""Servers on loopback for tests of remote stores: a real S3 server, one that comes between and fails, web, ssh."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ACCESS_KEY, SECRET_KEY = "tester", "a-secret-of-the-tests"
BUCKET = "photos"
START_SECONDS = 60.0


class SeaweedServer:
    """SeaweedFS with an S3 gateway and a bucket; it can be killed and started again on the same ports."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        master, volume, filer, self.port = _free_ports(4)
        identity = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
        actions = ["Admin", "Read", "Write", "List"]
        (folder / "data").mkdir(parents=True)
        (folder / "s3.json").write_text(
            json.dumps({"identities": [{"name": "tester", "credentials": [identity], "actions": actions}]})
        )
        self._command = [
            str(Path(sys.executable).with_name("weed")),
            "server",
            f"-dir={folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-master.port={master}",
            "-master.volumeSizeLimitMB=64",
            "-master.electionTimeout=1s",  # by itself, it takes ten seconds to begin again after it was killed
            "-master.heartbeatInterval=100ms",
            f"-volume.port={volume}",
            f"-filer.port={filer}",
            "-s3",
            f"-s3.port={self.port}",
            "-s3.port.iceberg=0",  # else all servers of a machine want the same two ports
            "-s3.port.lance=0",
            f"-s3.config={folder / 's3.json'}",
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it takes and gives files."""
        with open(self._folder / "log", "ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=self._folder)
        deadline = time.monotonic() + START_SECONDS
        files = self.client()
        while True:
            try:
                if not files.exists(BUCKET):
                    files.mkdir(BUCKET)
                files.pipe_file(f"{BUCKET}/ready", b"ready")
                files.rm_file(f"{BUCKET}/ready")
                return
            except Exception:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise
                time.sleep(0.1)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def client(self) -> Any:
        """An s3fs file system that talks to it, past all settings."""
        import s3fs

        return s3fs.S3FileSystem(
            key=ACCESS_KEY,
            secret=SECRET_KEY,
            endpoint_url=f"http://127.0.0.1:{self.port}",
            client_kwargs={"region_name": "us-east-1"},
            config_kwargs={"connect_timeout": START_SECONDS, "read_timeout": START_SECONDS},
            use_listings_cache=False,
            skip_instance_cache=True,
        )


@contextmanager
def seaweed(folder: Path) -> Iterator[SeaweedServer]:
    server = SeaweedServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@dataclass(frozen=True)
class Fault:
    """What a proxy does instead of passing an answer on: an answer of its own, half of a body, silence."""

    status: int = 0
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    silent: bool = False


Faults = Callable[[str, str], Fault | None]
"""Asked with method and target of each request; None: pass it on."""


class Proxy:
    """Comes between a client and a server on loopback. `requests` are those that came, as (method, target)."""

    def __init__(self, port: int) -> None:
        self.upstream_port = port
        self.requests: list[tuple[str, str]] = []
        self.faults: Faults = lambda method, target: None
        self.released = threading.Event()
        self.port = 0

    def reset(self, faults: Faults | None = None) -> None:
        self.requests.clear()
        self.faults = faults or (lambda method, target: None)

    def count(self, method: str, part: str = "") -> int:
        return sum(asked == method and part in target for asked, target in self.requests)


class _ProxyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: Proxy

    def do_GET(self) -> None:
        self._pass_on()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.proxy.requests.append((self.command, self.path))
        fault = self.proxy.faults(self.command, self.path) or Fault()
        if fault.silent:
            self.proxy.released.wait(START_SECONDS)
            self.close_connection = True
            return
        if fault.status:
            text = f"<Error><Code>{fault.code}</Code><Message>No.</Message></Error>".encode()
            self._answer(fault.status, {"Content-Type": "application/xml", **fault.headers}, text)
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.proxy.upstream_port, timeout=START_SECONDS)
        try:
            connection.request(self.command, self.path, body=body or None, headers=dict(self.headers))
            response = connection.getresponse()
            data = response.read()
        except OSError:
            self.close_connection = True  # as if there were nobody
            return
        finally:
            connection.close()
        headers = {name: value for name, value in response.getheaders() if name.lower() not in HOP_BY_HOP}
        self._answer(response.status, headers, data, cut=fault.cut)

    def _answer(self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if not (self.command == "HEAD" and "Content-Length" in headers) and "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            with suppress(OSError):
                self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut


HOP_BY_HOP = frozenset({"connection", "transfer-encoding", "keep-alive"})


@contextmanager
def proxy_to(port: int) -> Iterator[Proxy]:
    proxy = Proxy(port)
    handler = type("Handler", (_ProxyHandler,), {"proxy": proxy})
    with serving(handler) as proxy.port:
        try:
            yield proxy
        finally:
            proxy.released.set()


@contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[int]:
    """A web server on loopback; gives its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)  # type: ignore[arg-type]
    server.daemon_threads = True
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def sftp_server(root: Path, home: Path) -> Iterator[int]:
    """An ssh server on loopback that gives out `root`, and lets in who has the key in `home`/.ssh; gives its port."""
    import asyncssh

    host_key, user_key = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    (home / ".ssh").mkdir(parents=True, exist_ok=True)
    user_key.write_private_key(home / ".ssh" / "id_ed25519")
    user_key.write_public_key(home / ".ssh" / "authorized_keys")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def listen() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[host_key],
            authorized_client_keys=str(home / ".ssh" / "authorized_keys"),
            sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=str(root).encode()),
        )

    async def stop(acceptor: asyncssh.SSHAcceptor) -> None:
        acceptor.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.wait(rest or [asyncio.create_task(acceptor.wait_closed())], timeout=START_SECONDS)

    acceptor = asyncio.run_coroutine_threadsafe(listen(), loop).result(START_SECONDS)
    port = acceptor.get_port()
    public = host_key.export_public_key().decode().strip()
    (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}\n")
    try:
        yield port
    finally:
        asyncio.run_coroutine_threadsafe(stop(acceptor), loop).result(START_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(START_SECONDS)
        loop.close()


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, nor on those 10,000 beyond them, which SeaweedFS takes for gRPC.

    All are below those that systems give out by themselves, so that they are free again after a restart.
    """
    found: set[int] = set()
    while len(found) < count:
        port = random.randrange(12_000, 22_000)
        with suppress(OSError), socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 10_000))
            found.add(port)
    return sorted(found)
