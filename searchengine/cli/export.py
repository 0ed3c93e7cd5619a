from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from searchengine.cli.options import filter_options, index_option, json_option, settings_from
from searchengine.cli.output import progress_bar
from searchengine.cli.results import FOUND, NOTHING_FOUND
from searchengine.text import printable

if TYPE_CHECKING:
    from searchengine.filters import Filters


@click.command("export", epilog="Example:  searchengine export ~/photos-export --format parquet --after 2023")
@click.argument("folder", metavar="DIR")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["parquet", "npy", "clip-retrieval"]),
    default="parquet",
    show_default=True,
    help="Parquet with the vectors in it; embeddings.npy and photos.jsonl; or the folders of clip-retrieval.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Of the vectors: as they are, or rounded to half the size.",
)
@index_option
@filter_options
@json_option
def command(folder: str, format_: str, dtype: str, index: str | None, filters: Filters, as_json: bool) -> int:
    """Write photos with their vectors, and all that is known of them, as files for other programs.

    DIR is new, and appears when all of it is written. `searchengine import` reads it back. Formats with Parquet need
    an extra: pip install 'searchengine[parquet]'. Exit code 1 means that no photo passes the filters.
    """
    from indexer.exchange.export import export

    settings = settings_from(index=index)
    with progress_bar("exporting") as advance:
        report = export(
            settings.index_place,
            folder,
            format=format_,  # type: ignore[arg-type]
            dtype=dtype,  # type: ignore[arg-type]
            filters=filters or None,
            on_progress=advance,
        )
    if as_json:
        click.echo(json.dumps(report.as_dict()))
    elif report.photos:
        size = f"{report.size_bytes / 2**20:,.1f} MiB in {report.files:,} files"
        click.echo(f"{report.photos:,} photos of encoder {printable(report.model)}: {size}")
    else:
        click.echo("no photo passes, so nothing was written", err=True)
    return FOUND if report.photos else NOTHING_FOUND
