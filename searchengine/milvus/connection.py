"""Where an index in Milvus is, and the way there.

milvus://HOST:PORT/NAME      a server or cluster; milvus+tls:// where it speaks TLS
milvus:///folder/photos.db   Milvus Lite in a file, which one process at a time can open

A token comes from MILVUS_TOKEN only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from searchengine.errors import IndexNotFound, IndexUnusable, UsageError
from searchengine.text import printable

if TYPE_CHECKING:
    from pymilvus import MilvusClient

TOKEN = "MILVUS_TOKEN"
NAME_IN_FILE = "photos"
DEFAULT_PORT = 19530

# What is asked is answered in milliseconds, and one that has not been by then is given up. What is written may have to
# wait until Milvus has put away what came before.
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 30.0
REQUEST_SECONDS = 300.0

# Every request has its deadline. Pings beside them would be taken amiss by servers that allow few, such as Milvus Lite.
GRPC_OPTIONS = {"grpc.keepalive_time_ms": 600_000, "grpc.keepalive_permit_without_calls": 0}

SCHEMES = {"milvus": "http", "milvus+tls": "https"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")


@dataclass(frozen=True)
class MilvusPlace:
    """`uri` is what pymilvus connects to: an http(s) address, or the path of a .db file. `name` begins collections'."""

    shown: str
    uri: str
    name: str

    @property
    def is_file(self) -> bool:
        return not self.uri.startswith("http")

    @classmethod
    def parse(cls, place: str) -> MilvusPlace:
        """Raises UsageError."""
        shown = printable(place)
        try:
            parts = urlsplit(place)
            port = parts.port or DEFAULT_PORT
        except ValueError as error:
            raise UsageError(f"{shown} is no address ({error}); write milvus://HOST:PORT/NAME") from None
        if parts.username is not None or parts.password is not None:
            host = f"{parts.hostname}:{port}"
            raise UsageError(
                f"the address of {printable(host)} holds a user or a password; leave it out and set {TOKEN}"
            )
        if parts.scheme not in SCHEMES or parts.query or parts.fragment:
            shown = shown.partition("?")[0]  # there could be a token behind it
            raise UsageError(f"{shown} is no address; write milvus://HOST:PORT/NAME, or milvus:///folder/photos.db")
        if not parts.netloc:
            if not parts.path.endswith(".db") or parts.scheme != "milvus":
                raise UsageError(
                    f"{shown} names no host, and no file that ends in .db; write milvus:///folder/photos.db"
                )
            file = os.path.abspath(parts.path)
            return cls(f"milvus://{printable(file)}", file, NAME_IN_FILE)
        name = parts.path.strip("/")
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{shown} has no name that Milvus takes after its port; write milvus://HOST:PORT/NAME, with letters, "
                "digits and _ in NAME; a file is milvus:///folder/photos.db"
            )
        name_or_number = parts.hostname or ""
        host = f"[{name_or_number}]" if ":" in name_or_number else name_or_number
        return cls(f"{parts.scheme}://{host}:{port}/{name}", f"{SCHEMES[parts.scheme]}://{host}:{port}", name)


class Connection:
    """One client, for as many threads as like. Each request ends within its time, by IndexUnusable if need be.

    `client` is pymilvus's own, for what is not below; call it within `errors_named` and with a `timeout`.
    """

    def __init__(self, place: MilvusPlace, *, create: bool = False) -> None:
        """Raises UsageError without the extra or the folder of a file, IndexNotFound without the file unless `create`,
        IndexUnusable."""
        self.place = place
        if place.is_file and not create and not os.path.exists(place.uri):
            raise IndexNotFound(f"there is no index at {place.shown}; copy one there with: searchengine copy")
        folder = os.path.dirname(place.uri)
        if place.is_file and not os.path.isdir(folder):
            raise UsageError(f"there is no folder {printable(folder)}; make it, or write another place for the file")
        self.client = self._connect()

    @property
    def name(self) -> str:
        return self.place.name

    @cached_property
    def is_lite(self) -> bool:
        """Whether Milvus Lite answers, from a file or as a server."""
        with self.errors_named():
            return "lite" in str(self.client.get_server_version(timeout=ANSWER_SECONDS)).lower()

    def close(self) -> None:
        with self.errors_named():
            self.client.close()

    def exists(self, collection: str) -> bool:
        with self.errors_named():
            return bool(self.client.has_collection(collection, timeout=ANSWER_SECONDS))

    def load(self, collection: str) -> None:
        """Make it ready for searches: Milvus Lite forgets that when it ends, a server keeps it."""
        with self.errors_named():
            self.client.load_collection(collection, timeout=REQUEST_SECONDS)

    def count(self, collection: str, expression: str, *, strong: bool = False) -> int:
        """How many entities fulfil it."""
        (row,) = self.query(collection, expression, ("count(*)",), strong=strong)
        return int(row["count(*)"])

    def query(
        self,
        collection: str,
        expression: str,
        output_fields: Sequence[str],
        *,
        limit: int | None = None,
        strong: bool = False,
    ) -> list[dict[str, Any]]:
        """The entities that fulfil it, `limit` at most: for so few as one message holds; `iterate` gives more.

        `strong`: with all that was written before; else what is a few seconds old may be lacking.
        """
        options: dict[str, Any] = {"consistency_level": "Strong"} if strong else {}
        if limit is not None:
            options["limit"] = limit
        with self.errors_named():
            found: list[dict[str, Any]] = list(
                self.client.query(
                    collection, expression, output_fields=list(output_fields), timeout=ANSWER_SECONDS, **options
                )
            )
        return found

    def iterate(
        self, collection: str, expression: str, output_fields: Sequence[str], *, batch_size: int
    ) -> Iterator[list[dict[str, Any]]]:
        """All entities that fulfil it, with all that was written before, by batches.

        One query tells whether there is more than a batch; only then does Milvus's iterator walk through them.
        """
        first = self.query(collection, expression, output_fields, limit=batch_size, strong=True)
        if len(first) < batch_size:
            yield first
            return
        with self.errors_named():
            pages = self.client.query_iterator(
                collection,
                batch_size=batch_size,
                filter=expression,
                output_fields=list(output_fields),
                timeout=ANSWER_SECONDS,
                consistency_level="Strong",
            )
        try:
            while True:
                with self.errors_named():
                    page = pages.next()
                if not page:
                    break
                yield list(page)
        finally:
            pages.close()

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        """What pymilvus raises becomes IndexUnusable that names the place, without a traceback in the log."""
        from grpc import RpcError
        from pymilvus.exceptions import MilvusException

        try:
            yield
        except (MilvusException, RpcError, OSError) as error:
            raise IndexUnusable(
                f"the index at {self.place.shown} does not answer ({_reason(error)}); check that Milvus runs there and "
                f"that {TOKEN} is right"
            ) from None

    def _connect(self) -> MilvusClient:
        try:
            from pymilvus import MilvusClient
            from pymilvus.exceptions import MilvusException

            if self.place.is_file:
                import milvus_lite  # noqa: F401
        except ImportError as error:
            if error.name not in ("pymilvus", "milvus_lite"):
                raise
            raise UsageError(
                f"{self.place.shown} needs the extra milvus; install it with: pip install 'searchengine[milvus]'"
            ) from None
        import logging

        for library in ("pymilvus", "milvus_lite"):  # they log every error with its traceback, and then raise it
            logging.getLogger(library).setLevel(logging.CRITICAL + 1)
        try:
            return MilvusClient(
                self.place.uri,
                token=os.environ.get(TOKEN, ""),
                timeout=CONNECT_SECONDS,
                dedicated=True,
                grpc_options=GRPC_OPTIONS,
            )
        except (MilvusException, OSError) as error:
            remedy = (
                "another process has it open, or it was not made by this version of Milvus Lite; end that process, or "
                "run a server: milvus-lite server"
                if self.place.is_file
                else f"check that Milvus runs there and that {TOKEN} is right"
            )
            raise IndexUnusable(
                f"the index at {self.place.shown} cannot be opened ({_reason(error)}); {remedy}"
            ) from None


def _reason(error: Exception) -> str:
    """Its first line, as it can be shown, without a token."""
    details = getattr(error, "details", None)  # of gRPC's own errors
    text = str(getattr(error, "message", None) or (details() if callable(details) else error))
    first, token = text.strip().partition("\n")[0], os.environ.get(TOKEN)
    return printable(first.replace(token, "***") if token else first)[:300]
