"""What `search` and `similar` ask of an index, as plain values, and the answer: here, or in another process."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from searchengine.errors import ModelMismatch, UsageError
from searchengine.filters import Filters
from searchengine.pictures import absolute
from searchengine.pictures import names_a_picture as names_a_picture

if TYPE_CHECKING:
    from searchengine.hits import Hit
    from searchengine.query_tree import Query
    from searchengine.search import Searcher
    from searchengine.settings import Settings


# A query that has none of these anywhere, and none of the signs as a word, is no expression: its grammar is not loaded.
MARKS = ("AND", "OR", "NOT", '"', ":")
SIGNS = {"+", "-"}


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """Photos that `texts` describe and that look like `pictures`, less what `unwanted` describes.

    A picture is an absolute path, a URL, or the id of an indexed photo. Paths may hold bytes that are not UTF-8
    (PEP 383). An `expression` (docs/query.md) takes the place of `texts`; its paths are absolute, too.
    """

    expression: str | None = None
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

    def query(self) -> Query | None:
        """What the `expression` asks for. With its paths absolute it may be longer than one that people write."""
        if self.expression is None:
            return None
        from searchengine.query import parse

        return parse(self.expression, max_characters=len(self.expression))

    def files(self) -> list[str]:
        """The paths of all pictures that are asked for."""
        files = [name for name in self.pictures if isinstance(name, str)]
        if query := self.query():
            from searchengine.query_tree import Image, leaves_of

            files += [leaf.path for leaf in leaves_of(query) if isinstance(leaf, Image)]
        return files

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SearchRequest:
        """What `as_dict` gave, through JSON or not."""
        sequences = {name: tuple(values[name]) for name in ("texts", "pictures", "unwanted")}
        return cls(**{**values, **sequences, "filters": Filters(**values["filters"])})


def find(request: SearchRequest, settings: Settings) -> list[Hit]:
    """The answer, by a warm process if there is one, else here; Milvus keeps itself warm."""
    from searchengine.milvus import is_milvus
    from searchengine.warm.client import ask, start_for_the_next

    if is_milvus(settings.index):
        return _find_here(request, settings)
    hits = ask(request.as_dict(), settings, files=request.files())
    if hits is None:
        hits = _find_here(request, settings)
        start_for_the_next(settings)
    return hits


def _find_here(request: SearchRequest, settings: Settings) -> list[Hit]:
    from searchengine.cli.options import encoder_of, identity_of, open_for_reading
    from searchengine.search import Searcher

    while True:
        with open_for_reading(settings) as index:
            try:
                return answer(request, Searcher(index, encoder_of(index, settings)))
            except ModelMismatch:
                if identity_of(settings) == index.identity:
                    raise
        # The model of the index was changed since it was opened: now it is to be searched with the other.


def answer(request: SearchRequest, searcher: Searcher) -> list[Hit]:
    """The photos that `request` asks for, best first. Raises QueryError."""
    if query := request.query():
        return searcher.search_query(
            query,
            images=request.pictures,
            without=request.unwanted,
            k=request.k,
            offset=request.offset,
            filters=request.filters,
        )
    return searcher.search_combined(
        texts=request.texts,
        images=request.pictures,
        without=request.unwanted,
        k=request.k,
        offset=request.offset,
        filters=request.filters,
    )


def asked_by(query: str) -> SearchRequest:
    """What a query as it is written asks for. Raises QueryError."""
    if not any(mark in query for mark in MARKS) and SIGNS.isdisjoint(query.split()):
        if names_a_picture(query):
            return SearchRequest(pictures=(picture(query),))
        return SearchRequest(texts=(query,) if query else ())
    from searchengine.query import Image, Photo, Text, parse

    match parse(query):
        case Text(text):
            return SearchRequest(texts=(text,))
        case Image(name) | Photo(name):
            return SearchRequest(pictures=(name,))
        case expression:
            return SearchRequest(expression=str(expression))


def picture(name: str) -> str:
    """What a picture named on the command line is called wherever the question travels."""
    return absolute(name)
