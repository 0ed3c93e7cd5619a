"""Folders on a machine that ssh reaches (draft-ietf-secsh-filexfer-02): sftp://USER@HOST:PORT/ABSOLUTE/PATH/

Keys come from where ssh looks for them: ~/.ssh/config, an agent, ~/.ssh/id_*. The host must be in ~/.ssh/known_hosts.
"""

from __future__ import annotations

import asyncio
import stat
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import unquote

from searchengine.stores import StoredPhoto
from searchengine.stores.background import wait_for
from searchengine.stores.local import MAX_INTEGER
from searchengine.stores.transfer import (
    LONGEST_REQUEST_SECONDS,
    TIMEOUT_SECONDS,
    Busy,
    Missing,
    Page,
    Refused,
    TransferFailure,
    check_before_body,
    check_length,
    network_failure,
)

if TYPE_CHECKING:
    import asyncssh

KEEPALIVE_SECONDS = 10


class SftpFiles:
    reads_at_once = 8
    lists_exactly = False

    def __init__(self, prefix: str) -> None:
        self._authority, _, path = prefix.removeprefix("sftp://").partition("/")
        self._root = f"/{path}"
        login, _, address = self._authority.rpartition("@")
        host, _, port = address.rpartition(":") if address[-1:] != "]" and ":" in address else (address, "", "")
        self._host = host.strip("[]")
        self._options = {"username": unquote(login) or None, "port": int(port) if port.isdecimal() else None}
        self._session: tuple[asyncssh.SSHClientConnection, asyncssh.SFTPClient] | None = None
        self._connecting = asyncio.Lock()

    def list_page(self, prefix: str, token: str | None) -> Page:
        """One folder. Links to files below the root of the store count as files, others are not followed."""
        return wait_for(self._list(prefix))

    def has_any(self, prefix: str) -> bool:
        wait_for(self._stat(prefix))
        return True

    def stat(self, key: str) -> StoredPhoto:
        attributes = wait_for(self._stat(key))
        if not stat.S_ISREG(attributes.permissions or 0):
            raise Refused("not a regular file")
        return _stored(key, attributes)

    def get(
        self, key: str, start: int, stop: int, *, max_bytes: int, expected: StoredPhoto | None
    ) -> tuple[StoredPhoto, bytes]:
        return wait_for(self._get(key, start, stop, max_bytes=max_bytes, expected=expected))

    async def _list(self, prefix: str) -> Page:
        photos, folders, links = [], [], []
        async with self._client() as client:
            async for entry in client.scandir(self._path(prefix)):
                key, mode = prefix + str(entry.filename), entry.attrs.permissions or 0
                if stat.S_ISREG(mode):
                    photos.append(_stored(key, entry.attrs))
                elif stat.S_ISDIR(mode) and entry.filename not in (".", ".."):
                    folders.append(key + "/")
                elif stat.S_ISLNK(mode):
                    links.append(key)
            names = [key for key in links if await self._leads_to_a_file(client, key)]
        return Page(photos=photos, folders=folders, names=names)

    async def _leads_to_a_file(self, client: asyncssh.SFTPClient, key: str) -> bool:
        import asyncssh

        try:
            target = str(await client.realpath(self._path(key)))
            inside = target.startswith(str(await client.realpath(self._root)).rstrip("/") + "/")
            return inside and stat.S_ISREG((await client.stat(target)).permissions or 0)
        except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPFailure):
            return False  # it dangles

    async def _stat(self, key: str) -> asyncssh.SFTPAttrs:
        async with self._client() as client:
            return await client.stat(self._path(key).rstrip("/") or "/")

    async def _get(
        self, key: str, start: int, stop: int, *, max_bytes: int, expected: StoredPhoto | None
    ) -> tuple[StoredPhoto, bytes]:
        path = self._path(key)
        async with self._client() as client:
            if not stat.S_ISREG((await client.stat(path)).permissions or 0):
                raise Refused("not a regular file")  # to open a fifo would wait for someone to write to it
            async with client.open(path, "rb", encoding=None) as file:
                photo = _stored(key, await file.stat())
                check_before_body(photo, max_bytes=max_bytes, expected=expected)
                data = await file.read(max(0, min(stop, photo.size_bytes) - start), start)
                assert isinstance(data, bytes)
                check_before_body(_stored(key, await file.stat()), max_bytes=max_bytes, expected=photo)
        check_length(data, size_bytes=photo.size_bytes, start=start, stop=stop)
        return photo, data

    def _path(self, key: str) -> str:
        return key.removeprefix(f"sftp://{self._authority}")

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[asyncssh.SFTPClient]:
        import asyncssh

        try:
            async with asyncio.timeout(LONGEST_REQUEST_SECONDS):
                yield await self._connected()
        except TransferFailure:
            raise
        except (asyncssh.SFTPNoSuchFile, asyncssh.SFTPNoSuchPath):
            raise Missing from None
        except asyncssh.SFTPPermissionDenied:
            raise Refused("permission denied") from None
        except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection, asyncssh.ConnectionLost) as error:
            raise Busy(f"the connection was lost ({type(error).__name__})") from None
        except asyncssh.SFTPError as error:
            raise Refused(f"the answer is {type(error).__name__}") from None
        except asyncssh.HostKeyNotVerifiable:
            raise Refused(
                f"the key of {self._host} is not in ~/.ssh/known_hosts, or another one; log in once with: "
                f"ssh {self._host}"
            ) from None
        except asyncssh.PermissionDenied:
            raise Refused("it lets nobody in with the keys of ~/.ssh, ~/.ssh/config or an agent") from None
        except (asyncssh.Error, OSError) as error:
            raise network_failure(error) from None

    async def _connected(self) -> asyncssh.SFTPClient:
        import asyncssh

        async with self._connecting:
            if self._session is None or self._session[0].is_closed():
                given = {name: value for name, value in self._options.items() if value is not None}
                connection = await asyncssh.connect(
                    self._host,
                    connect_timeout=TIMEOUT_SECONDS,
                    login_timeout=TIMEOUT_SECONDS,
                    keepalive_interval=KEEPALIVE_SECONDS,
                    **given,
                )
                client = await connection.start_sftp_client(path_errors="surrogateescape")
                self._session = connection, client
                weakref.finalize(self, _close, asyncio.get_running_loop(), connection)
            return self._session[1]


def _stored(key: str, attributes: asyncssh.SFTPAttrs) -> StoredPhoto:
    mtime_ns = (attributes.mtime or 0) * 10**9 + (attributes.mtime_ns or 0)
    return StoredPhoto(key, attributes.size or 0, min(mtime_ns, MAX_INTEGER))


def _close(loop: asyncio.AbstractEventLoop, connection: asyncssh.SSHClientConnection) -> None:
    if loop.is_running():
        loop.call_soon_threadsafe(connection.abort)
