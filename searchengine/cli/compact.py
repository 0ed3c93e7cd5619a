from __future__ import annotations

import json

import click

from searchengine.cli.options import index_option, json_option, open_for_reading, settings_from
from searchengine.cli.status import status_of


@click.command("compact", epilog="Example:  searchengine compact")
@index_option
@json_option
def command(index: str | None, as_json: bool) -> None:
    """Merge segments and drop vectors of photos that are gone.

    Search finds what it found before, also while this runs. Worth it after many small runs of `searchengine index`, or
    after many photos were deleted.
    """
    from indexer.compact import compact

    settings = settings_from(index=index)
    done = compact(settings.index_folder)
    if as_json:
        with open_for_reading(settings) as opened:
            click.echo(json.dumps(status_of(opened)))
        return
    if done.merged:
        click.echo(
            f"{done.merged:,} segments became {done.written:,}, {done.dropped:,} vectors of no photo were dropped; "
            f"{done.freed_bytes / 2**20:,.1f} MiB freed"
        )
    elif done.freed_bytes > 0:
        click.echo(f"segments are as they should be; {done.freed_bytes / 2**20:,.1f} MiB freed in the tables")
    else:
        click.echo("nothing to do")
