from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from searchengine.cli.options import (
    device_option,
    encoder_of,
    filter_options,
    index_option,
    open_for_reading,
    settings_from,
)
from searchengine.cli.results import present, result_options

if TYPE_CHECKING:
    from searchengine.cli.results import Presentation
    from searchengine.index.filters import Filters


@click.command("search", epilog="Example:  searchengine search 'a man riding a wave' --after 2023 --sheet waves.png")
@click.argument("words", nargs=-1, metavar="QUERY")
@click.option("--like", multiple=True, metavar="IMAGE", help="Photos like this picture; repeatable, adds to QUERY.")
@click.option("--not", "without", multiple=True, metavar="TEXT", help="Less of what TEXT describes; repeatable.")
@filter_options
@result_options
@index_option
@device_option
def command(
    words: tuple[str, ...],
    like: tuple[str, ...],
    without: tuple[str, ...],
    filters: Filters,
    presentation: Presentation,
    index: str | None,
    device: str | None,
) -> int:
    """Find photos by describing them, or by another picture.

    QUERY is a description. An existing file written as a path (./x.jpg, /photos/x.jpg, ~/x.jpg) is a picture to
    compare with; plain words never are. Exit code 1 means that nothing was found.
    """
    from searchengine.search import Searcher

    settings = settings_from(index=index, device=device)
    query = " ".join(words)
    with open_for_reading(settings) as opened:
        searcher = Searcher(opened, encoder_of(opened, settings))
        k, offset = presentation.k, presentation.offset
        if is_image_query(query) and not like and not without:
            hits = searcher.search_image(os.path.expanduser(query), k=k, offset=offset, filters=filters)
        elif like or without:
            pictures = [os.path.expanduser(path) for path in like]
            texts = [query] if query else []
            if is_image_query(query):
                pictures, texts = [os.path.expanduser(query), *pictures], []
            vector = searcher.combine(texts=texts, images=pictures, without=without)
            hits = searcher.search_vector(vector, k=k, offset=offset, filters=filters)
        else:
            hits = searcher.search(query, k=k, offset=offset, filters=filters)
    return present(hits, presentation, title=query or "like the given pictures")


def is_image_query(query: str) -> bool:
    """Whether the query is written as a path, and a file is there."""
    path = os.path.expanduser(query)
    looks_like_path = os.path.isabs(path) or query.startswith((f".{os.sep}", f"..{os.sep}", "./", "../"))
    return looks_like_path and os.path.isfile(path)
