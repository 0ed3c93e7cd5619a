"""What `search` and `similar` ask of an index, as plain values, and the answer: here, or in another process."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from searchengine.errors import QueryError, UsageError
from searchengine.filters import Filters
from searchengine.text import printable

if TYPE_CHECKING:
    from searchengine.hits import Hit
    from searchengine.search import Searcher
    from searchengine.settings import Settings


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """Photos that `texts` describe and that look like `pictures`, less what `unwanted` describes.

    A picture is an absolute path, or the id of an indexed photo. Paths may hold bytes that are not UTF-8 (PEP 383).
    """

    texts: tuple[str, ...] = ()
    pictures: tuple[str | int, ...] = ()
    unwanted: tuple[str, ...] = ()
    filters: Filters = field(default_factory=Filters)
    k: int = 10
    offset: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Values that `json` can carry. Raises UsageError for a filter with `where`, which no text can be."""
        if self.filters.where is not None:
            raise UsageError("a filter with `where` cannot be sent to another process; search in this one")
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SearchRequest:
        """What `as_dict` gave, through JSON or not."""
        sequences = {name: tuple(values[name]) for name in ("texts", "pictures", "unwanted")}
        return cls(**{**values, **sequences, "filters": Filters(**values["filters"])})


def find(request: SearchRequest, settings: Settings) -> list[Hit]:
    """The answer, by a warm process if there is one, else here."""
    from searchengine.warm.client import ask, start_for_the_next

    files = [name for name in request.pictures if isinstance(name, str)]
    hits = ask(request.as_dict(), settings, files=files)
    if hits is None:
        hits = _find_here(request, settings)
        start_for_the_next(settings)
    return hits


def _find_here(request: SearchRequest, settings: Settings) -> list[Hit]:
    from searchengine.cli.options import encoder_of, open_for_reading
    from searchengine.search import Searcher

    with open_for_reading(settings) as index:
        return answer(request, Searcher(index, encoder_of(index, settings)))


def answer(request: SearchRequest, searcher: Searcher) -> list[Hit]:
    """The photos that `request` asks for, best first. Raises QueryError."""
    return searcher.search_combined(
        texts=request.texts,
        images=request.pictures,
        without=request.unwanted,
        k=request.k,
        offset=request.offset,
        filters=request.filters,
    )


def picture(name: str) -> str:
    """The absolute path of a picture named on the command line."""
    return os.path.abspath(os.path.expanduser(name))


def names_a_picture(query: str) -> bool:
    """Whether a query is written as a path, and a file is there.

    Raises QueryError where a path to a picture leads to no file: nobody describes a photo that way, and a search for
    the words would find something, too.
    """
    path = os.path.expanduser(query)
    if not os.path.isabs(path) and not query.startswith((f".{os.sep}", f"..{os.sep}", "./", "../")):
        return False
    if os.path.isfile(path):
        return True
    from searchengine.formats import EXTENSIONS

    if os.path.splitext(path)[1].lower() in EXTENSIONS:
        raise QueryError(f"there is no picture {printable(query)}; check the path, or describe the photo in words")
    return False
