"""What a warm process and those who ask it say to each other, over a Unix-domain socket.

A message is its length in bytes, 4 of them, big-endian, and then a JSON object in ASCII. The server speaks first: it
says who it is, the `key` of its place, so that nobody is answered by the wrong one. Then come one request and one
answer, and that is all:

    {"do": "answer", "search": {...}, "files": {...}}   {"hits": [...]}
                                                        {"declined": true}       find out for yourself
    {"do": "status"}                                    {"status": {...}}
    {"do": "stop"}                                      {"stopping": true}

`files` names the files that the search is about, each with its device and inode, for a path need not mean the same
to another process (/dev/stdin).
"""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any

LENGTH = struct.Struct("!I")

MAX_GREETING_BYTES = 64 * 2**10
# A text may have 100,000 characters, each of them up to 12 bytes here.
MAX_REQUEST_BYTES = 4 * 2**20
MAX_ANSWER_BYTES = 64 * 2**20

Message = dict[str, Any]


def send(connection: socket.socket, message: Mapping[str, Any], *, max_bytes: int, seconds: float) -> None:
    """Raises ValueError for a message beyond `max_bytes`, OSError where the other side does not take it in time."""
    data = json.dumps(message).encode("ascii")
    if len(data) > max_bytes:
        raise ValueError(f"a message of {len(data):,} bytes, more than {max_bytes:,}")
    connection.settimeout(seconds)
    connection.sendall(LENGTH.pack(len(data)) + data, socket.MSG_NOSIGNAL)  # SIGPIPE would end this process


def receive(connection: socket.socket, *, max_bytes: int, seconds: float) -> Message:
    """Raises ValueError for what is no message, OSError for one that is not whole after `seconds`."""
    deadline = time.monotonic() + seconds
    (length,) = LENGTH.unpack(_read(connection, LENGTH.size, deadline))
    if length > max_bytes:
        raise ValueError(f"a message of {length:,} bytes, more than {max_bytes:,}")
    try:
        message = json.loads(_read(connection, length, deadline))
    except RecursionError:
        raise ValueError("a message of too many levels") from None
    if not isinstance(message, dict):
        raise ValueError("a message that is no object")
    return message


def peer(connection: socket.socket) -> tuple[int, int] | None:
    """(process id, user id) of the other side, where the system tells (unix(7), SO_PEERCRED)."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None
    fields = struct.Struct("3i")
    process, user, _ = fields.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, fields.size))
    return process, user


def is_ours(connection: socket.socket) -> bool:
    """Whether the other side is of the same user, as far as the system tells."""
    other = peer(connection)
    return other is None or other[1] == os.geteuid()


def _read(connection: socket.socket, length: int, deadline: float) -> bytes:
    pieces = bytearray()
    while len(pieces) < length:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the message is not whole in time")
        connection.settimeout(left)
        piece = connection.recv(min(length - len(pieces), 2**20))
        if not piece:
            raise ConnectionError("the other side is gone")
        pieces += piece
    return bytes(pieces)
