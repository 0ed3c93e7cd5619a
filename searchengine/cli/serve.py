from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from searchengine.cli.options import device_option, index_option, json_option, settings_from
from searchengine.cli.output import notice
from searchengine.errors import UsageError
from searchengine.text import printable

if TYPE_CHECKING:
    from searchengine.settings import Settings
    from searchengine.web.security import Access

INTERRUPTED = 130
BACKLOG = 2048
GRACE_SECONDS = 30
KEEP_ALIVE_SECONDS = 30


@click.command("serve", epilog="Example:  searchengine serve   and open the address that it prints")
@index_option
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--token", envvar="SEARCHENGINE_TOKEN", help="Who asks must know it [default: SEARCHENGINE_TOKEN].")
@click.option("--insecure", is_flag=True, help="Listen for other machines without a token.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="A name that browsers reach it by; repeatable.")
@device_option
@json_option
def command(
    index: str | None,
    host: str,
    port: int,
    token: str | None,
    insecure: bool,
    allow_host: tuple[str, ...],
    device: str | None,
    as_json: bool,
) -> int:
    """Serve the page and the HTTP API.

    It listens on this machine alone unless --host says otherwise; then a token is required, or --insecure. Programs
    send it as `Authorization: Bearer TOKEN`, and the page asks for it once. New photos are found as soon as they are
    committed, and a change of the model or `compact` need not stop it. Ctrl-C ends it when what it was asked is
    answered; once more ends it at once. docs/api.md tells what programs can ask.
    """
    from searchengine.web.security import Access

    access = Access(host=host, allowed_hosts=allow_host, token=token or None)
    if not access.is_local and access.token is None and not insecure:
        raise UsageError(
            f"on {printable(host)} other machines could see the photos; set --token (or SEARCHENGINE_TOKEN), or say "
            "--insecure"
        )
    with closing(_listener(host, port)) as listener:
        return _serve(settings_from(index=index, device=device), access, listener, as_json=as_json)


def _serve(settings: Settings, access: Access, listener: socket.socket, *, as_json: bool) -> int:
    import uvicorn

    from searchengine.web.app import create_app
    from searchengine.web.service import Service

    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # a client that has gone must not end the service
    caught: list[int] = []
    url = _url(access.host, listener.getsockname()[1])

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if as_json:
                click.echo(json.dumps({"url": url, "pid": os.getpid()}))
            else:
                notice(f"serving {printable(settings.index_place)} at {url}; Ctrl-C ends this")

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """As uvicorn does, but that a signal is not raised again once everything is answered."""

            def on_signal(number: int, frame: FrameType | None) -> None:
                caught.append(number)
                self.handle_exit(number, frame)

            before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    with closing(Service(settings)) as service:
        service.open()
        config = uvicorn.Config(
            create_app(service, access),
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        Server(config).run([listener])
    return INTERRUPTED if signal.SIGINT in caught else 0


def _listener(host: str, port: int) -> socket.socket:
    """Bound before anything is loaded, so that a port which is taken is told at once. Raises UsageError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, proto=socket.IPPROTO_TCP)[0]
        # With the protocol named, asyncio sends small answers at once (TCP_NODELAY); else the last part of one waits
        # 40 ms for the client.
        listener = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except BaseException:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise UsageError(
            f"{printable(host)} port {port} cannot be listened on: {error.strerror}; choose another --host or --port"
        ) from None


def _url(host: str, port: int) -> str:
    shown: Any = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/"
