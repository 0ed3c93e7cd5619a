from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from searchengine.cli.options import device_option, filter_options, index_option, settings_from
from searchengine.cli.queries import SearchRequest, find, picture
from searchengine.cli.results import present, result_options

if TYPE_CHECKING:
    from searchengine.cli.results import Presentation
    from searchengine.filters import Filters

ID = re.compile(r"\d{1,100}", re.ASCII)


@click.command("similar", epilog="Example:  searchengine similar ~/Pictures/beach.jpg -k 20")
@click.argument("images", metavar="IMAGE|ID...", nargs=-1, required=True)
@filter_options
@result_options
@index_option
@device_option
def command(
    images: tuple[str, ...], filters: Filters, presentation: Presentation, index: str | None, device: str | None
) -> int:
    """Find photos that look like a picture, or like the indexed photo with the given id.

    With several, photos that look like all of them together. A photo that is indexed does not return itself. Exit code
    1 means that nothing was found.
    """
    request = SearchRequest(
        pictures=tuple(int(name) if ID.fullmatch(name) else picture(name) for name in images),
        filters=filters,
        k=presentation.k,
        offset=presentation.offset,
    )
    hits = find(request, settings_from(index=index, device=device))
    return present(hits, presentation, title=f"similar to {', '.join(images)}")
