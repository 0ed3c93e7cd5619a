from __future__ import annotations

import json
import os
from typing import Any

import click

from searchengine.cli.interrupts import ctrl_c_stops
from searchengine.cli.options import (
    device_option,
    encoder_for,
    index_option,
    json_option,
    limits_from,
    precision_option,
    settings_from,
)
from searchengine.cli.output import notice, progress_bar
from searchengine.text import printable


@click.command("import", epilog="Example:  searchengine import ~/photos-export --index new.index")
@click.argument("folder", metavar="DIR")
@index_option
@click.option("--model", help="The encoder that made the vectors, where the files do not say; as for `index`.")
@precision_option
@device_option
@click.option("--root", metavar="FOLDER", help="Where relative paths begin [default: DIR].")
@click.option("--moved", nargs=2, metavar="OLD NEW", help="What was below OLD is below NEW now, which may be a URL.")
@click.option(
    "--no-read", is_flag=True, help="Do not read photos of which the files tell too little; keep their place."
)
@click.option("--workers", type=int, help="Processes that read photos [default: one a processor].")
@json_option
def command(
    folder: str,
    index: str | None,
    model: str | None,
    precision: str | None,
    device: str | None,
    root: str | None,
    moved: tuple[str, str] | None,
    no_read: bool,
    workers: int | None,
    as_json: bool,
) -> None:
    """Take photos with their vectors from files into an index, without embedding anything.

    DIR is what `searchengine export` wrote, or other programs in the same formats: *.parquet with a column `embedding`,
    embeddings.npy with photos.jsonl, or clip-retrieval's img_emb/ and metadata/. What the index has already stays.

    Where the files do not tell content, size and time of a photo, it is read for that, so that the next `index` takes
    nothing up again. One that cannot be read is found by its vector all the same, until `index` looks for it.
    """
    settings = settings_from(index=index, model=model, precision=precision, device=device, workers=workers)
    from indexer.exchange.arrivals import Moved
    from indexer.exchange.importing import import_photos
    from searchengine.cli.writing import writable

    with writable(settings) as settings, ctrl_c_stops() as stop, progress_bar("importing") as advance:
        encoder = encoder_for(settings) if model is not None else None
        report = import_photos(
            settings.index_folder,
            folder,
            encoder=encoder,
            root=root,
            moved=Moved(moved[0], _from_here(moved[1])) if moved else None,
            read=not no_read,
            workers=settings.workers or None,
            limits=limits_from(settings),
            on_progress=advance,
            on_skip=lambda key, reason: notice(f"{printable(key)}: {reason}"),
            stop=stop,
        )
    _print(report.as_dict(), as_json=as_json)


def _from_here(place: str) -> str:
    from searchengine.stores import is_url

    return place if is_url(place) else os.path.abspath(place)


def _print(counters: dict[str, Any], *, as_json: bool) -> None:
    """What was done, as `indexer.exchange.importing.ImportReport` counts it."""
    if as_json:
        click.echo(json.dumps(counters))
        return
    model = printable(counters["model"])
    click.echo(
        f"{counters['added']:,} photos added, with {counters['vectors']:,} vectors of encoder {model}; "
        f"{counters['known']:,} were known"
    )
    if counters["unread"]:
        click.echo(
            f"{counters['unread']:,} of them were not read: they are found by their vectors, and `searchengine index` "
            "reads them when it finds them, or lets them go"
        )
