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


@click.command("similar", epilog="Example:  searchengine similar ~/Pictures/beach.jpg -k 20")
@click.argument("image", metavar="IMAGE|ID")
@filter_options
@result_options
@index_option
@device_option
def command(image: str, filters: Filters, presentation: Presentation, index: str | None, device: str | None) -> int:
    """Find photos that look like a picture, or like the indexed photo with the given id.

    A photo that is indexed does not return itself. Exit code 1 means that nothing was found.
    """
    from searchengine.search import Searcher

    settings = settings_from(index=index, device=device)
    with open_for_reading(settings) as opened:
        searcher = Searcher(opened, encoder_of(opened, settings))
        k, offset = presentation.k, presentation.offset
        if image.isascii() and image.isdecimal():
            hits = searcher.similar(int(image), k=k, offset=offset, filters=filters)
        else:
            hits = searcher.search_image(os.path.expanduser(image), k=k, offset=offset, filters=filters)
    return present(hits, presentation, title=f"similar to {image}")
