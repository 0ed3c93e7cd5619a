"""Cursors: where the next page of an answer begins, for this question and no other.

A cursor is opaque to who gets it. It is not secret, and not signed: all that one can do with another offset is to ask
for another page.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from dataclasses import dataclass

from searchengine.errors import QueryError

FORM = struct.Struct(">QQ8s12s")
MAX_OFFSET = 2**40
REMEDY = "leave it out to begin anew, or send the query that it came with"


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """`offset` photos have been shown, and `matches` of all match. `state`: of the index that they were ranked in."""

    offset: int
    matches: int
    state: bytes

    def text(self, question: object) -> str:
        packed = FORM.pack(self.offset, self.matches, self.state, _digest(question))
        return base64.urlsafe_b64encode(packed).decode().rstrip("=")

    @classmethod
    def read(cls, text: str, question: object) -> Cursor:
        """Raises QueryError for what is no cursor, or one of another question."""
        try:
            packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
            offset, matches, state, digest = FORM.unpack(packed)
            if offset > MAX_OFFSET:
                raise ValueError
        except (binascii.Error, struct.error, ValueError):
            raise QueryError(f"this is no cursor of this service; {REMEDY}") from None
        if digest != _digest(question):
            raise QueryError(f"the cursor is of another query; {REMEDY}")
        return cls(offset=offset, matches=matches, state=state)


def _digest(question: object) -> bytes:
    """A question is a plain value, so that its `repr` tells it from all others."""
    return hashlib.sha256(repr(question).encode()).digest()[:12]
