"""What may be wrong with an index, and what would mend it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPAIR_ALONE = "run `searchengine verify --repair`"
INDEX_AGAIN = "run `searchengine verify --repair`, then `searchengine index`"
TAG_AGAIN = "run `searchengine verify --repair`, then `searchengine classify` with --write-tags as before"


@dataclass(frozen=True)
class RebuildTables:
    """Copy all rows that can be read into new tables, less those, by table and rowid, of which an index disagrees."""

    untrusted: dict[str, frozenset[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class DropRows:
    """Delete rows, and what refers to them."""

    table: str
    rowids: Sequence[int]


@dataclass(frozen=True)
class SetCount:
    segment_id: int
    count: int


@dataclass(frozen=True)
class SetCounter:
    """Let the ids of a table go on from its highest one."""

    table: str


@dataclass(frozen=True)
class RewriteSegments:
    """Leave out vectors that no row names."""


@dataclass(frozen=True)
class DeleteFile:
    path: Path


@dataclass(frozen=True)
class FinishChange:
    """Do what a change of the model has left to be done."""


Fix = RebuildTables | DropRows | SetCount | SetCounter | RewriteSegments | DeleteFile | FinishChange


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong. `object` is a file, a photo, or a table; `fix` is None where a repair cannot help."""

    kind: str
    object: str
    message: str
    remedy: str
    fix: Fix | None = None

    def as_dict(self) -> dict[str, str]:
        return {"kind": self.kind, "object": self.object, "message": self.message, "remedy": self.remedy}


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A problem that is no more, and what was done about it."""

    problem: Problem
    done: str

    def as_dict(self) -> dict[str, str]:
        return {
            "kind": self.problem.kind,
            "object": self.problem.object,
            "message": self.problem.message,
            "done": self.done,
        }
