from __future__ import annotations

import json
from pathlib import Path
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
from searchengine.cli.output import notice, pace, progress_bar
from searchengine.cli.writing import writable
from searchengine.settings import Settings
from searchengine.text import printable

PROBLEMS_FOUND = 1


@click.command("reencode", epilog="Example:  searchengine reencode --model clip-vit-b-32")
@click.option("--model", help="The new encoder: a name from `searchengine models`, or a file, as for `index`.")
@precision_option
@index_option
@click.option("--workers", type=int, help="Processes that read and decode [default: one a processor].")
@click.option("--batch-size", type=int, help="Photos that the encoder takes at once [default: 32].")
@device_option
@click.option(
    "--drop-unreadable", is_flag=True, help="Let photos go that cannot be read now, rather than wait for them."
)
@click.option("--cancel", is_flag=True, help="Drop what was done towards a new model; the index stays as it is.")
@json_option
def command(
    model: str | None,
    precision: str | None,
    index: str | None,
    workers: int | None,
    batch_size: int | None,
    device: str | None,
    drop_unreadable: bool,
    cancel: bool,
    as_json: bool,
) -> int:
    """Change the model of an index without a gap.

    Every photo is embedded anew, beside the index, which serves as before: searches and runs of `index` go on. Then
    one commit changes the model. Searches see that within a second; `searchengine warm` ends and starts again with the
    new model. Photos keep their ids. Ctrl-C, a crash or a power cut costs seconds of work: run the same again to go on.

    Photos that changed since they were indexed are embedded as they are now; broken and deleted ones leave the index
    and are listed by `searchengine status --failures`. A photo that cannot be read, as when its disk is away, holds the
    change up (exit code 1) until it can be, or until --drop-unreadable.

    Until it is over, the new vectors take disk twice beside the old ones: 2 KB a photo each at 512 dimensions.
    """
    given = settings_from(
        index=index, model=model, precision=precision, workers=workers, batch_size=batch_size, device=device
    )
    if cancel and model:
        raise click.UsageError("--cancel drops what was begun, --model goes on with it; give one of them")
    if not cancel and (not model or model == "auto"):
        raise click.UsageError("give --model, the encoder that the index is to be of; `searchengine models` lists them")
    with writable(given) as settings:
        if cancel:
            _cancel(settings.index_folder, as_json=as_json)
            return 0
        return _change(settings, drop_unreadable=drop_unreadable, as_json=as_json)


def _change(settings: Settings, *, drop_unreadable: bool, as_json: bool) -> int:
    from indexer.reencode import reencode
    from searchengine.index.layout import read_identity

    read_identity(settings.index_folder)  # before weights are downloaded for nothing
    encoder = encoder_for(settings)
    with ctrl_c_stops() as stop, progress_bar("embedding") as advance:
        report = reencode(
            settings.index_folder,
            encoder=encoder,
            workers=settings.workers or None,
            batch_size=settings.batch_size,
            limits=limits_from(settings),
            drop_unreadable=drop_unreadable,
            on_progress=lambda progress: advance(progress.done, progress.total, pace(progress.busiest)),
            on_skip=lambda key, reason: notice(f"{printable(key)}: {reason}"),
            stop=stop,
        )
    _print(report.as_dict(), precision=encoder.precision, as_json=as_json)
    return PROBLEMS_FOUND if report.unreadable else 0


def _print(counters: dict[str, Any], *, precision: str, as_json: bool) -> None:
    """What a run did, as `indexer.report.ReencodeReport` counts it."""
    encoder = f"{printable(counters['model'])} in {precision}"
    if as_json:
        click.echo(json.dumps(counters))
    elif counters["swapped"]:
        click.echo(
            f"the index is of the encoder {encoder} now, with {counters['vectors']:,} vectors; "
            f"{counters['embedded']:,} of them were made in {counters['seconds']:.1f} s"
        )
        changes = (f"{_photos(counters[name])} {name}" for name in ("updated", "deleted", "failed") if counters[name])
        if told := ", ".join(changes):
            click.echo(f"{told} (status --failures lists those that left the index)")
    elif not counters["unreadable"]:
        click.echo(f"nothing to do: the index is of the encoder {encoder}")
    if counters["unreadable"]:
        notice(
            f"{_photos(counters['unreadable'])} cannot be read now, so the index stays as it is; mount the disk, fix "
            "permissions, or run `searchengine index` on the folder they are in now, and run this again; or give "
            "--drop-unreadable (see above for which)"
        )


def _photos(number: int) -> str:
    return f"{number:,} photo{'s' * (number != 1)}"


def _cancel(index_folder: Path, *, as_json: bool) -> None:
    from indexer.reencode import cancel

    cancelled = cancel(index_folder)
    if as_json:
        click.echo(json.dumps({"cancelled": cancelled}))
    else:
        click.echo("what was done towards a new model is gone" if cancelled else "no change of the model is under way")
