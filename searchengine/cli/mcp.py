from __future__ import annotations

import asyncio
import json
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from searchengine.cli.options import device_option, index_option, json_option, settings_from
from searchengine.errors import UsageError

if TYPE_CHECKING:
    from searchengine.settings import Settings

LOCAL = "http://localhost"


@click.command("mcp", epilog='Example:  "command": "searchengine", "args": ["mcp", "--index", "/home/me/photos.index"]')
@index_option
@device_option
@click.option("--url", help="Ask a running `searchengine serve` there, instead of opening the index.")
@click.option("--token", envvar="SEARCHENGINE_TOKEN", help="What that service wants [default: SEARCHENGINE_TOKEN].")
@click.option("--list", "list_tools", is_flag=True, help="Show the tools, and end.")
@json_option
def command(
    index: str | None, device: str | None, url: str | None, token: str | None, list_tools: bool, as_json: bool
) -> int:
    """Let assistants search the library: a server of the Model Context Protocol on standard input and output.

    Name it in the settings of your assistant as in the example, and it starts `searchengine mcp` by itself. Its tools
    search by description, find similar photos, classify, and look at a photo; none changes anything. It opens the index
    itself, and sees new photos as soon as they are committed; or it asks the service at --url. It ends with its input.

    What it writes is the protocol's JSON; with --list, --json gives one tool a line. It needs an extra:
    pip install 'searchengine[mcp]'.
    """
    if url is not None and (index is not None or device is not None):
        raise UsageError("--url asks a service, which has its own index and device; leave these out, or --url")
    try:
        import mcp.server  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is not installed; pip install 'searchengine[mcp]' brings it") from None
    if list_tools:
        _list_tools(as_json=as_json)
        return 0
    if url is None:
        _serve_index(settings_from(index=index, device=device))
    else:
        _ask_service(url, token)
    return 0


def _serve_index(settings: Settings) -> None:
    """With a service in this process that listens nowhere."""
    import httpx

    from searchengine.client import Client
    from searchengine.mcp_server import InProcess, make_server
    from searchengine.web.app import create_app
    from searchengine.web.security import Access
    from searchengine.web.service import Service

    with closing(Service(settings)) as service:
        service.open()
        app = create_app(service, Access())
        with Client(LOCAL, http=httpx.Client(transport=InProcess(app))) as client:
            make_server(client).run()


def _ask_service(url: str, token: str | None) -> None:
    from searchengine.client import Client
    from searchengine.mcp_server import make_server

    with Client(url, token=token or None) as client:
        make_server(client).run()


def _list_tools(*, as_json: bool) -> None:
    from searchengine.client import Client
    from searchengine.mcp_server import make_server

    with Client(LOCAL) as client:
        tools: list[Any] = asyncio.run(make_server(client).list_tools())
    for tool in tools:
        shown = {"name": tool.name, "description": tool.description, "input": tool.input_schema}
        click.echo(json.dumps(shown) if as_json else f"{tool.name:<10} {tool.description.splitlines()[0]}")
