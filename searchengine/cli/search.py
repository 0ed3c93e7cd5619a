from __future__ import annotations

from typing import TYPE_CHECKING

import click

from searchengine.cli.options import device_option, filter_options, index_option, settings_from
from searchengine.cli.queries import SearchRequest, asked_by, find, picture
from searchengine.cli.results import present, result_options

if TYPE_CHECKING:
    from searchengine.cli.results import Presentation
    from searchengine.filters import Filters


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
    compare with; plain words never are. An indexed picture does not return itself. Exit code 1 means that nothing was
    found.

    Parts are weighted and combined with + and -: '2:"golden retriever" + ./pool.jpg - fruit'. AND, OR, NOT and
    parentheses join conditions: 'dog AND (beach OR "a pool") AND NOT leash AND after:2023'. Conditions like after:2023
    have the names of the options below; id:4711 is an indexed photo. Signs stand between blanks, words are in capitals,
    "quotes" keep a text as it is.
    """
    query = " ".join(words)
    asked = asked_by(query)
    request = SearchRequest(
        expression=asked.expression,
        texts=asked.texts,
        pictures=(*asked.pictures, *map(picture, like)),
        unwanted=without,
        filters=filters,
        k=presentation.k,
        offset=presentation.offset,
    )
    hits = find(request, settings_from(index=index, device=device))
    return present(hits, presentation, title=query or "like the given pictures")
