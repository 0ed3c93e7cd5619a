from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import click

from searchengine.cli.options import (
    choose_model,
    device_option,
    encoder_for,
    identity_of,
    index_option,
    json_option,
    model_option,
    precision_option,
    settings_from,
)
from searchengine.cli.output import notice, notice_from_signal, progress_bar, silent_decoders
from searchengine.errors import ModelMismatch
from searchengine.text import printable

if TYPE_CHECKING:
    from searchengine.settings import Settings


@click.command("index", epilog="Example:  searchengine index ~/Pictures /mnt/nas/photos --exclude '*/screenshots/*'")
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@index_option
@model_option
@precision_option
@click.option("--workers", type=int, help="Threads that read and decode [default: one a processor].")
@click.option("--batch-size", type=int, help="Photos that the encoder takes at once [default: 32].")
@device_option
@click.option("--include", multiple=True, metavar="GLOB", help="Look only at files whose name or path matches.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these out of the index. Both repeatable.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be done; photos are not read.")
@json_option
def command(
    stores: tuple[str, ...],
    index: str | None,
    model: str | None,
    precision: str | None,
    workers: int | None,
    batch_size: int | None,
    device: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Crawl photo folders and bring the index up to date.

    New and changed photos are embedded, moved ones keep their vector, deleted ones disappear from results. Files that
    cannot be used are skipped with a warning and listed by `searchengine status --failures`. Running it again goes on
    from where the last run ended.
    """
    from indexer.pipeline import Progress, build, plan
    from searchengine.decode import DecodeLimits
    from searchengine.index.layout import IndexPaths

    settings = settings_from(
        index=index, model=model, precision=precision, workers=workers, batch_size=batch_size, device=device
    )
    if dry_run:
        report = plan(settings.index_folder, stores, include=include, exclude=exclude)
        report.model = choose_model(settings)
    else:
        _refuse_useless_download(settings)
        encoder = encoder_for(settings)
        if settings.model == "auto" and not IndexPaths(settings.index_folder).identity.exists():
            notice(f"a new index, with the encoder {encoder.name}; `searchengine models` lists what --model can choose")
        with _ctrl_c_stops() as stop, silent_decoders(), progress_bar("indexing") as advance:

            def on_progress(progress: Progress) -> None:
                advance(progress.done, progress.total)

            report = build(
                settings.index_folder,
                stores,
                encoder=encoder,
                include=include,
                exclude=exclude,
                workers=settings.workers or None,
                batch_size=settings.batch_size,
                limits=DecodeLimits(max_pixels=settings.max_pixels, max_file_bytes=settings.max_file_bytes),
                on_progress=on_progress,
                on_skip=lambda key, reason: notice(f"skipped {printable(key)}: {reason}"),
                stop=stop,
            )
    if as_json:
        click.echo(json.dumps(report.as_dict()))
        return
    changes = [
        f"{count:,} {name}"
        for name, count in (
            ("added", report.added),
            ("updated", report.updated),
            ("moved", report.moved),
            ("deleted", report.deleted),
        )
        if count
    ]
    done = ", ".join(changes) or "nothing to do"
    click.echo(f"{done}{' (dry run: nothing was written)' if dry_run else ''}; {report.unchanged:,} unchanged")
    if not report.scanned:
        click.echo("no photos were found there", err=True)
    if report.duplicates:
        click.echo(f"{report.duplicates:,} of them are exact copies of others and share their vectors")
    if report.failed:
        click.echo(f"{report.failed:,} files could not be used: searchengine status --failures lists them")
    if report.images_per_second:
        click.echo(f"{report.seconds:.1f} s, {report.images_per_second:.1f} images a second, encoder {report.model}")


def _refuse_useless_download(settings: Settings) -> None:
    """Another encoder than the index's is refused in the end, so its hundreds of megabytes are not fetched first."""
    from searchengine.models.published import PUBLISHED

    wanted, known = PUBLISHED.get(settings.model), identity_of(settings)
    if wanted and known and known.encoder != wanted.name and not wanted.is_in(settings.models_folder):
        raise ModelMismatch(
            f"the index at {printable(str(settings.index_folder))} was made by encoder {printable(known.encoder)}, not "
            f"by {wanted.name}; leave --model away, or index into another folder with --index"
        )


@contextmanager
def _ctrl_c_stops() -> Iterator[threading.Event]:
    """The first Ctrl-C, or a request to terminate, ends the run after a commit; the second ends it at once."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        notice_from_signal("stopping after a commit; once more stops at once")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
