"""What NAME_state says: the newest commit, the last run, labels, failures. A fact is a row, and a long one several."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from searchengine.errors import IndexNotFound
from searchengine.milvus.connection import Connection
from searchengine.milvus.expressions import literal
from searchengine.milvus.schema import FAILURE, LABEL, LAST_RUN, PART, STATE, State, damaged, state_collection

ROWS_AT_A_TIME = 4096


class Facts:
    """Of one index. Each raises IndexUnusable where Milvus does not answer, IndexFormatError where a row is damaged."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._collection = state_collection(connection.name)
        self._place = connection.place.shown

    def open(self) -> State:
        """Make them ready to be read. Raises IndexNotFound."""
        if not self._connection.exists(self._collection):
            raise self._missing()
        self._connection.load(self._collection)
        return self.state()

    def state(self) -> State:
        """The newest committed state, as of a few seconds ago at worst. Raises IndexNotFound."""
        payload = self._payload(STATE)
        if payload is None:
            raise self._missing()
        return State.parse(payload, place=self._place)

    def _missing(self) -> IndexNotFound:
        return IndexNotFound(
            f"there is no index at {self._place}; copy one there with: searchengine copy FOLDER {self._place}"
        )

    def last_run(self) -> dict[str, Any] | None:
        payload = self._payload(LAST_RUN)
        if payload is None:
            return None
        run = self._parsed(LAST_RUN, payload)
        return {"started_at": run.get("started_at"), "finished_at": run.get("finished_at"), **(run.get("report") or {})}

    def labels(self) -> list[tuple[str, int]]:
        """Each label with the number of its photos."""
        return [(str(label["label"]), int(label["photos"])) for label in self._all(LABEL)]

    def failures(self) -> Iterator[tuple[str, str, str]]:
        """Store, key and reason of each photo that could not be used."""
        for failure in self._all(FAILURE):
            yield str(failure["store"]), str(failure["key"]), str(failure["reason"])

    def count_failures(self) -> int:
        return self._connection.count(self._collection, f'{_begins(FAILURE)} and not (name like "%{PART}%")')

    def _payload(self, name: str) -> str | None:
        rows = self._connection.query(self._collection, f"name == {literal(name)}", ("payload",))
        return str(rows[0]["payload"]) if rows else None

    def _all(self, kind: str) -> Iterator[dict[str, Any]]:
        pages = self._connection.iterate(
            self._collection, _begins(kind), ("name", "payload"), batch_size=ROWS_AT_A_TIME
        )
        for page in pages:
            for row in page:
                if PART not in row["name"]:
                    yield self._parsed(row["name"], row["payload"])

    def _parsed(self, name: str, payload: str) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads(payload)
            if "parts" in value:
                parts = [self._payload(f"{name}{PART}{number}") or "" for number in range(value["parts"])]
                value = json.loads("".join(parts))
        except (ValueError, TypeError, KeyError):
            raise damaged(self._place) from None
        return value


def _begins(kind: str) -> str:
    """Names that begin with `kind`, which ends in a slash."""
    return f"name >= {literal(kind)} and name < {literal(kind[:-1] + chr(ord(kind[-1]) + 1))}"
