from __future__ import annotations

import json

import click

from searchengine.cli.options import index_option, json_option, open_for_reading, settings_from
from searchengine.cli.results import FOUND, NOTHING_FOUND
from searchengine.cli.writing import writable
from searchengine.text import printable


@click.command("tags", epilog="Example:  searchengine tags --remove dog,cat")
@click.option("--remove", metavar="A,B,C", help="Forget these labels; the photos stay.")
@index_option
@json_option
def command(remove: str | None, index: str | None, as_json: bool) -> int:
    """List the labels that `classify --write-tags` kept in the index, each with the number of photos that have it.

    `searchengine search --tag LABEL` finds only those. Exit code 1 means that there is none.
    """
    settings = settings_from(index=index)
    if remove is not None:
        from indexer.tags import remove_tags
        from searchengine.zeroshot import split_labels

        with writable(settings) as written:
            removed = remove_tags(written.index_folder, split_labels(remove))
        click.echo(json.dumps({"removed": removed}) if as_json else f"forgot {removed:,} labels")
        return FOUND if removed else NOTHING_FOUND
    with open_for_reading(settings) as opened:
        tags = opened.tags()
    for label, photos in tags:
        click.echo(json.dumps({"label": label, "photos": photos}) if as_json else f"{photos:>9,}  {printable(label)}")
    return FOUND if tags else NOTHING_FOUND
