from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

from searchengine.cli.options import device_option, encoder_for, index_option, json_option, model_option, settings_from
from searchengine.cli.output import notice, notice_from_signal, progress_bar
from searchengine.text import printable


@click.command("index", epilog="Example:  searchengine index ~/Pictures /mnt/nas/photos --exclude '*/screenshots/*'")
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@index_option
@model_option
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

    settings = settings_from(index=index, model=model, workers=workers, batch_size=batch_size, device=device)
    encoder = encoder_for(settings)
    if dry_run:
        report = plan(settings.index_folder, stores, include=include, exclude=exclude)
        report.model = encoder.name
    else:
        if settings.model == "auto" and not IndexPaths(settings.index_folder).identity.exists():
            notice(f"a new index, with the encoder {encoder.name}; `searchengine models` lists what --model can choose")
        with _ctrl_c_stops() as stop, _silent_decoders(), progress_bar("indexing") as advance:

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


@contextmanager
def _silent_decoders() -> Iterator[None]:
    """libtiff and its like write complaints about photos straight to descriptor 2; ours go to a copy of it."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    sys.stderr.flush()
    copy = os.dup(2)
    ours = os.fdopen(copy, "w", encoding=sys.stderr.encoding, errors="backslashreplace", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    before, sys.stderr = sys.stderr, ours
    try:
        yield
    finally:
        sys.stderr = before
        ours.flush()
        os.dup2(copy, 2)
        ours.close()
