"""What assistants can do with a library of photos: an MCP server (Model Context Protocol) of four tools that only read.

Each tool asks a `Client`, be it of a service elsewhere or of one in this process (`InProcess`), so that an assistant
gets what everyone else gets. An error is told to the assistant as it would be to a person: it can often mend its
question.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import anyio.from_thread
import httpx
from mcp.server import MCPServer
from mcp.server.mcpserver import Image
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import Field

from searchengine import __version__
from searchengine.client import Classification, Client
from searchengine.conditions import circle_of
from searchengine.errors import SearchEngineError
from searchengine.filters import Filters, Orientation
from searchengine.hits import Hit
from searchengine.text import printable

if TYPE_CHECKING:
    from starlette.types import ASGIApp

MAX_PHOTOS = 50
INSTRUCTIONS = """\
A personal library of photos that can be searched by what they show. Describe a photo in English, in a few words, as a
caption would ("a dog on a beach"); AND, OR and NOT in capitals join conditions ("a dog AND NOT a leash"). Every photo
found has an id, which the other tools take, and a relevance: the probability that it is a match; below 0.5 it probably
is not, and the library may well hold no such photo. Look at photos with get_image before you tell what they show."""

PhotoId = Annotated[int, Field(ge=1, description="The id of a photo, as search and similar tell it.")]
Count = Annotated[int, Field(ge=1, le=MAX_PHOTOS, description="How many photos at most.")]
Moment = Annotated[str | None, Field(description="A date: 2024, 2024-05 or 2024-05-31.")]
READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)


class PhotoTools:
    """The tools, as methods; their docstrings are what the assistant reads."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def search(
        self,
        query: Annotated[str, Field(min_length=1, description="What the photos show, as a caption would say it.")],
        k: Count = 10,
        after: Moment = None,
        before: Moment = None,
        under: Annotated[str | None, Field(description="Only photos below this folder.")] = None,
        camera: Annotated[str | None, Field(description="Only by cameras whose name contains this.")] = None,
        near: Annotated[
            str | None, Field(description="Only taken near a place: LATITUDE,LONGITUDE,KILOMETRES.")
        ] = None,
        orientation: Annotated[Orientation | None, Field(description="Only photos of this shape.")] = None,
        tag: Annotated[str | None, Field(description="Only photos with this tag.")] = None,
        only_matches: Annotated[bool, Field(description="Leave out what is probably no match.")] = False,
    ) -> list[Hit]:
        """Find photos by a description, best first. after <= the time they were taken < before."""
        with _told():
            filters = Filters(
                after=after,
                before=before,
                under=under,
                camera=camera,
                near=None if near is None else circle_of(near),
                orientation=orientation,
                tag=tag,
            )
            threshold: Literal["auto", "none"] = "auto" if only_matches else "none"
            return _shown(self._client.search(query, k=k, filters=filters, threshold=threshold))

    def similar(self, id: PhotoId, k: Count = 10) -> list[Hit]:  # noqa: A002
        """Find photos that look like the photo `id`, best first; itself and its copies are left out."""
        with _told():
            return _shown(self._client.similar(id, k=k))

    def classify(
        self,
        ids: Annotated[list[PhotoId], Field(min_length=1, max_length=MAX_PHOTOS)],
        labels: Annotated[list[str], Field(min_length=2, description="Classes to choose from, a word or a few each.")],
    ) -> list[Classification]:
        """How probably each photo is of each label. They add up to 1, so add "something else" where none may fit."""
        with _told():
            found = self._client.classify(labels, ids=ids)
            return [replace(one, path=one.path and printable(one.path)) for one in found]

    def get_image(
        self,
        id: PhotoId,  # noqa: A002
        size: Annotated[int, Field(ge=160, le=1280, description="Its longer side in pixels, about.")] = 640,
    ) -> list[Any]:
        """Look at a photo: a JPEG of it, upright, and what is known of it (path, time, place, camera, tags)."""
        with _told():
            details = self._client.details(id)
            known = {name: printable(value) if isinstance(value, str) else value for name, value in details.items()}
            return [Image(data=self._client.thumbnail(id, size=size), format="jpeg"), known]


class InProcess(httpx.BaseTransport):
    """Hands the requests of a client to an ASGI app in this process, over no socket.

    For the worker threads of the event loop that the app runs on, as those are in which MCPServer calls its tools.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._transport = httpx.ASGITransport(app)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return anyio.from_thread.run(self._answer, request)

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        asked = httpx.Request(request.method, request.url, headers=request.headers, content=request.read())
        answer = await self._transport.handle_async_request(asked)
        return httpx.Response(answer.status_code, headers=answer.headers, content=await answer.aread())


def make_server(client: Client) -> MCPServer:
    """The server, to be run on standard input and output."""
    server = MCPServer(
        "searchengine",
        title="Photos",
        instructions=INSTRUCTIONS,
        version=__version__,
        log_level="ERROR",
        subscriptions=False,
    )
    tools = PhotoTools(client)
    for tool in (tools.search, tools.similar, tools.classify):
        server.add_tool(tool, annotations=READS)
    server.add_tool(tools.get_image, annotations=READS, structured_output=False)
    return server


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except SearchEngineError as error:
        raise ToolError(str(error)) from error


def _shown(hits: list[Hit]) -> list[Hit]:
    """File names may hold bytes that are no text, which JSON cannot carry."""
    return [replace(hit, path=printable(hit.path), store=printable(hit.store)) for hit in hits]
