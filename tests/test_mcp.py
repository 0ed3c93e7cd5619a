"""Assistants: the MCP server as a process of its own, asked by the official client over standard input and output."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import painted
from mcp import Client as McpClient
from mcp import StdioServerParameters
from mcp_types import CallToolResult, ImageContent, TextContent
from PIL import Image
from serving import serving_index

import indexer
import searchengine
from searchengine.search import Searcher
from searchengine.vectors import Encoder

TOKEN = "a-token-for-tests"
SECONDS = 60
Session = Callable[[McpClient], Awaitable[None]]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return searchengine.load_encoder("mini")


@pytest.fixture(scope="module")
def library(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    (folder / "photos").mkdir()
    for seed in range(6):
        painted(seed, width=300, height=200).save(folder / "photos" / f"{seed}.jpg")
    indexer.build(folder / "index", [folder / "photos"], encoder=encoder)
    return folder


def with_assistant(session: Session, *arguments: str | Path, mode: str = "auto", token: str = "") -> None:
    """`session` with an assistant's client that has started `searchengine mcp`, as assistants do."""
    server = StdioServerParameters(
        command=sys.executable,
        args=["-m", "searchengine", "mcp", *map(str, arguments)],
        env={"XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", ""), "SEARCHENGINE_TOKEN": token},
    )

    async def run() -> None:
        async with asyncio.timeout(SECONDS), McpClient(server, mode=mode) as client:
            await session(client)

    asyncio.run(run())


def told(answer: CallToolResult) -> Any:
    assert not answer.is_error, answer.content
    return answer.structured_content["result"]


def complaint(answer: CallToolResult) -> str:
    assert answer.is_error
    (content,) = answer.content
    assert isinstance(content, TextContent)
    return content.text


def test_an_assistant_searches_an_index_that_the_server_opens(
    library: Path, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with searchengine.open_index(library / "index") as index:
        searcher = Searcher(index, encoder)
        expected = [vars(hit) for hit in searcher.search("a red pattern", k=3)]
        alike = [vars(hit) for hit in searcher.similar(2, k=2)]

    async def session(client: McpClient) -> None:
        assert {tool.name for tool in (await client.list_tools()).tools} == {
            "search", "similar", "classify", "get_image",
        }  # fmt: skip
        assert all(tool.annotations and tool.annotations.read_only_hint for tool in (await client.list_tools()).tools)
        assert told(await client.call_tool("search", {"query": "a red pattern", "k": 3})) == expected
        assert told(await client.call_tool("similar", {"id": 2, "k": 2})) == alike
        (photo,) = told(await client.call_tool("classify", {"ids": [1], "labels": ["red", "blue"]}))
        assert sum(photo["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        assert not told(await client.call_tool("search", {"query": "a red pattern", "after": "2100"}))
        assert not told(await client.call_tool("search", {"query": "a red pattern", "near": "48.86,2.35,20"}))

        image, known = (await client.call_tool("get_image", {"id": 1, "size": 160})).content
        assert isinstance(image, ImageContent)
        assert isinstance(known, TextContent)
        assert image.mime_type == "image/jpeg"
        with Image.open(io.BytesIO(base64.b64decode(image.data))) as shown:
            assert shown.size == (160, 107)
        assert json.loads(known.text)["path"] == str(library / "photos" / "0.jpg")

        # What is wrong is told to the assistant, who can mend it.
        assert "soon" in complaint(await client.call_tool("search", {"query": "a dog", "after": "soon"}))
        assert "999" in complaint(await client.call_tool("get_image", {"id": 999}))
        assert "k" in complaint(await client.call_tool("search", {"query": "a dog", "k": 0}))
        # A query of an assistant reads no file of the machine.
        assert complaint(await client.call_tool("search", {"query": f"image:{library / 'photos' / '0.jpg'}"}))

        # Photos that come in meanwhile are found.
        painted(77, width=300, height=200).save(library / "photos" / "later.jpg")
        await asyncio.to_thread(indexer.build, library / "index", [library / "photos"], encoder=encoder)
        paths = [hit["path"] for hit in told(await client.call_tool("search", {"query": "a red pattern", "k": 50}))]
        assert str(library / "photos" / "later.jpg") in paths

    with_assistant(session, "--index", library / "index", mode="legacy")


def test_an_assistant_asks_a_service_that_runs(library: Path, tmp_path: Path) -> None:
    async def session(client: McpClient) -> None:
        assert len(told(await client.call_tool("search", {"query": "a red pattern", "k": 4}))) == 4

    async def refused(client: McpClient) -> None:
        assert "token" in complaint(await client.call_tool("search", {"query": "a red pattern"}))

    with serving_index(library / "index", home=tmp_path, token=TOKEN) as server:
        with_assistant(session, "--url", server.address, token=TOKEN)
        with_assistant(refused, "--url", server.address, token="another")


def test_it_ends_with_its_input_and_says_nothing_but_the_protocol(library: Path) -> None:
    asked = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
        "protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "test", "version": "1"},
    }}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "searchengine", "mcp", "--index", library / "index"],
        input=json.dumps(asked) + "\n",
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["result"]["serverInfo"]["name"] == "searchengine"
    assert done.stderr == ""


WITHOUT_MCP = (
    "import sys\n"
    "class Absent:\n"
    "    def find_spec(self, name, *_):\n"
    "        if name.split('.')[0] == 'mcp': raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
    "sys.meta_path.insert(0, Absent())\n"
    "sys.argv = ['searchengine', 'mcp']\n"
    "from searchengine.cli import main\nmain()\n"
)


def test_without_the_extra_one_line_tells_how_to_get_it() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_MCP], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "pip install 'searchengine[mcp]'" in line


@pytest.mark.parametrize(("arguments", "code"), [
    (["--url", "http://127.0.0.1:9", "--index", "x"], 2),
    (["--url", "not an address"], 2),
    (["--index", "/no/such/index"], 3),
])  # fmt: skip
def test_what_cannot_serve_ends_with_one_line(cli: Any, own_home: None, arguments: list[str], code: int) -> None:
    done = cli("mcp", *arguments)
    assert (done.code, done.out, len(done.err.splitlines())) == (code, "", 1)


def test_the_tools_are_listed(cli: Any) -> None:
    assert [tool["name"] for tool in cli("mcp", "--list", "--json").lines] == [
        "search", "similar", "classify", "get_image",
    ]  # fmt: skip
    assert "similar" in cli("mcp", "--list").out
