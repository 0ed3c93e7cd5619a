"""A client of a running service (`searchengine serve`): asks over HTTP what a `Searcher` answers in this process.

    with Client("http://127.0.0.1:8000") as client:
        hits = client.search("a dog on a beach", k=10)
        for hit in client.similar(hits[0].id).all_hits():
            ...

Hits are the library's own (searchengine/hits.py), and so are errors: what the service tells as a problem (RFC 9457) is
raised as the class of searchengine/errors.py that the service itself met. docs/api.md describes the HTTP side.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict

import httpx

from searchengine import __version__
from searchengine.errors import ImageError, ServiceUnusable, UsageError
from searchengine.filters import Filters
from searchengine.hits import Hit
from searchengine.text import printable
from searchengine.wire import Fields, Threshold, content_of, error_of, grouped, narrowing, record_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from searchengine.vectors import FloatMatrix

    Picture = bytes | str | os.PathLike[str] | Image.Image


PNG_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}


class Page(list[Hit]):
    """Some hits, best first, and the way to those that follow.

    `matches` is how many photos match, counted among the first 1,000; `cursor` is None on the last page.
    """

    def __init__(
        self, hits: Sequence[Hit], *, matches: int, cursor: str | None, following: Callable[[str], Page]
    ) -> None:
        super().__init__(hits)
        self.matches = matches
        self.cursor = cursor
        self._following = following

    def next_page(self) -> Page | None:
        """The page after this one, of the same size; None after the last. Raises what the search raised."""
        return None if self.cursor is None else self._following(self.cursor)

    def all_hits(self) -> Iterator[Hit]:
        """The hits of this page and of all that follow, each page asked for when it is reached."""
        page: Page | None = self
        while page is not None:
            yield from page
            page = page.next_page()


@dataclass(frozen=True, kw_only=True)
class Classification:
    """One photo's probability of each label; they add up to 1. `id` and `path` of an indexed photo, else `name`."""

    probabilities: dict[str, float]
    id: int | None = None
    path: str | None = None
    name: str | None = None


class Details(TypedDict):
    """What the index knows of a photo. `taken_at` is the camera's local time; angles in degrees, sides in pixels."""

    id: int
    store: str
    path: str
    size_bytes: int
    mtime: str
    width: int
    height: int
    taken_at: str | None
    latitude: float | None
    longitude: float | None
    camera: str | None
    tags: list[str]


class Client:
    """Asks the service at `url`. Close it, or use it as a context manager; calls from several threads are safe.

    `token` is what the service was started with, if it was. `http` is an httpx.Client of your own, for proxies or
    certificates, which you close; else the environment's proxies are not asked, so that a token for this machine never
    leaves it.

    Every method raises ServiceUnusable where the service cannot be reached or fails, AccessError for a wrong token or
    address, OverloadError (with `retry_after_seconds`) where it has too much to do, and else what `Searcher` raises.
    """

    def __init__(
        self, url: str, *, token: str | None = None, timeout_seconds: float = 60.0, http: httpx.Client | None = None
    ) -> None:
        try:
            self._url = httpx.URL(url if url.endswith("/") else f"{url}/")
        except httpx.InvalidURL as error:
            raise UsageError(f"the service's address {printable(repr(url))} is not a URL: {error}") from None
        if self._url.scheme not in {"http", "https"} or not self._url.host:
            raise UsageError(f"the service's address is {printable(repr(url))}; give one like http://127.0.0.1:8000")
        self._owns_http = http is None
        self._http = http or httpx.Client(timeout=timeout_seconds, trust_env=False)
        self._headers = {"User-Agent": f"searchengine/{__version__}"}
        if token is not None:
            if not (token.isascii() and token.isprintable() and token == token.strip() != ""):
                raise UsageError("the token is empty or has characters that no header can carry")
            self._headers["Authorization"] = f"Bearer {token}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._owns_http:
            self._http.close()

    def search(
        self,
        query: str = "",
        *,
        like: Sequence[int] = (),
        without: Sequence[str] = (),
        k: int = 10,
        filters: Filters | None = None,
        threshold: Threshold = "none",
    ) -> Page:
        """The k photos (at most 1,000 a page) that suit `query`, in the query language of docs/query.md.

        `like` holds ids of photos that the hits are to resemble too, `without` texts of which they are to have less.
        With threshold "auto" the pages end where the matches do, with a number at that score.
        """
        asked = _asked(query, without) + [("like", str(image_id)) for image_id in like]
        return self._get_page("api/search", asked + narrowing(k=k, filters=filters, threshold=threshold))

    def similar(
        self, image_id: int, *, k: int = 10, filters: Filters | None = None, threshold: Threshold = "none"
    ) -> Page:
        """The k photos most like the indexed photo `image_id`, less itself and its copies. Raises PhotoNotFound."""
        asked = narrowing(k=k, filters=filters, threshold=threshold)
        return self._get_page(f"api/images/{int(image_id)}/similar", asked)

    def search_image(
        self,
        image: Picture,
        *,
        query: str = "",
        without: Sequence[str] = (),
        k: int = 10,
        filters: Filters | None = None,
        threshold: Threshold = "none",
    ) -> Page:
        """The k photos most like `image`, which is sent: the bytes of a file, a path, or a PIL image; and like `query`.

        Raises ImageError for a picture that cannot be used.
        """
        files = [("image", ("image", _bytes_of(image)))]
        asked = _asked(query, without) + narrowing(k=k, filters=filters, threshold=threshold)

        def page(cursor: str | None) -> Page:
            form = grouped(asked) | ({} if cursor is None else {"cursor": [cursor]})
            return _page_of(self._ask("POST", "api/search", data=form, files=files), page)

        return page(None)

    def search_vector(
        self,
        vector: FloatMatrix | NDArray[Any] | Sequence[float],
        *,
        k: int = 10,
        filters: Filters | None = None,
        threshold: Threshold = "none",
    ) -> Page:
        """The k photos nearest to `vector` (dim,), of the index's own encoder."""
        narrowed = grouped(narrowing(k=k, filters=filters, threshold=threshold))
        asked: dict[str, Any] = {name: values if name == "tag" else values[0] for name, values in narrowed.items()}
        asked["vector"] = [float(part) for part in vector]
        if not all(map(math.isfinite, asked["vector"])):
            raise UsageError("the vector holds NaN or infinity")

        def page(cursor: str | None) -> Page:
            body = asked if cursor is None else asked | {"cursor": cursor}
            return _page_of(self._ask("POST", "api/search", json=body), page)

        return page(None)

    def classify(
        self,
        labels: Sequence[str],
        *,
        ids: Sequence[int] = (),
        images: Sequence[Picture] = (),
        templates: Sequence[str] = (),
    ) -> list[Classification]:
        """How probably each photo has each of `labels`: indexed photos by `ids`, or `images`, which are sent.

        `templates` are prompts in which {} is the label. Raises UsageError where both or neither are given.
        """
        if bool(ids) == bool(images):
            raise UsageError("give ids of indexed photos, or images to send; one of them")
        body: dict[str, Any] = {"labels": list(labels)} | ({"templates": list(templates)} if templates else {})
        if ids:
            answer = self._ask("POST", "api/classify", json=body | {"ids": [int(image_id) for image_id in ids]})
        else:
            files = [("image", (_name_of(image, n), _bytes_of(image))) for n, image in enumerate(images, start=1)]
            answer = self._ask("POST", "api/classify", data=body, files=files)
        return [record_of(Classification, result) for result in content_of(answer)["results"]]

    def image(self, image_id: int) -> bytes:
        """The original file of an indexed photo. Raises PhotoNotFound."""
        return self._ask("GET", f"api/images/{int(image_id)}").content

    def thumbnail(self, image_id: int, *, size: int = 320) -> bytes:
        """A JPEG of an indexed photo, upright, its longer side about `size` pixels. Raises PhotoNotFound."""
        return self._ask("GET", f"api/images/{int(image_id)}/thumbnail", params=[("size", str(size))]).content

    def details(self, image_id: int) -> Details:
        """What the index knows of a photo. Raises PhotoNotFound."""
        answer: Details = content_of(self._ask("GET", f"api/images/{int(image_id)}/details"))
        return answer

    def status(self) -> dict[str, Any]:
        """What `searchengine status --json` tells, and under "indexing" what a run that goes on has done so far."""
        answer: dict[str, Any] = content_of(self._ask("GET", "api/status"))
        return answer

    def _get_page(self, path: str, asked: Fields) -> Page:
        def page(cursor: str | None) -> Page:
            params = asked if cursor is None else [*asked, ("cursor", cursor)]
            return _page_of(self._ask("GET", path, params=params), page)

        return page(None)

    def _ask(self, method: str, path: str, **body: Any) -> httpx.Response:
        try:
            answer = self._http.request(method, self._url.join(path), headers=self._headers, **body)
        except httpx.HTTPError as error:
            raise ServiceUnusable(
                f"the service at {self._url} cannot be reached: {printable(str(error) or type(error).__name__)}; "
                "is `searchengine serve` running there?"
            ) from error
        except httpx.InvalidURL:
            raise UsageError("the question is too long for an address; ask with fewer words") from None
        except UnicodeEncodeError:
            raise UsageError(
                "a name that is no valid text cannot be sent to a service; search the index itself"
            ) from None
        if not answer.is_success:
            raise error_of(answer)
        return answer


def _asked(query: str, without: Sequence[str]) -> Fields:
    return [("q", query)] * bool(query) + [("not", text) for text in without]


def _page_of(answer: httpx.Response, page: Callable[[str], Page]) -> Page:
    content = content_of(answer)
    hits = [record_of(Hit, hit) for hit in content["hits"]]
    return Page(hits, matches=content["matches"], cursor=content["cursor"], following=page)


def _bytes_of(image: Picture) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        try:
            return Path(image).expanduser().read_bytes()
        except OSError as error:
            raise ImageError(f"{printable(os.fspath(image))} cannot be read: {error.strerror}") from error
    buffer = io.BytesIO()
    try:
        (image if image.mode in PNG_MODES else image.convert("RGB")).save(buffer, "PNG")
    except (OSError, ValueError) as error:
        raise ImageError(f"an image of mode {image.mode} cannot be sent: {error}") from error
    return buffer.getvalue()


def _name_of(image: Picture, number: int) -> str:
    return printable(os.path.basename(os.fspath(image))) if isinstance(image, str | os.PathLike) else f"image-{number}"
