from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from glob import glob
from typing import TYPE_CHECKING, Any

import click

from searchengine.cli.interrupts import ctrl_c_stops
from searchengine.cli.options import (
    choose_model,
    encoder_for,
    identity_of,
    index_option,
    json_option,
    limits_from,
    model_option,
    precision_option,
    settings_from,
)
from searchengine.cli.output import notice, pace, progress_bar
from searchengine.cli.writing import writable
from searchengine.errors import ModelMismatch
from searchengine.text import printable

if TYPE_CHECKING:
    from indexer.engines import Engine
    from searchengine.settings import Settings
    from searchengine.vectors import Encoder


# Of Linux: NVIDIA's, AMD's, and those of a Windows around it.
GPUS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")


@click.command("index", epilog="Example:  searchengine index ~/Pictures /mnt/nas/photos --exclude '*/screenshots/*'")
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@index_option
@model_option
@precision_option
@click.option("--workers", type=int, help="Processes a machine that read and decode [default: one a processor].")
@click.option("--batch-size", type=int, help="Photos that the encoder takes at once [default: 32; on a GPU 256].")
@click.option("--device", help="Where the encoder runs: auto, cpu, cuda, cuda:1, mps; several: cuda:0,cuda:1.")
@click.option(
    "--engine",
    default="local",
    metavar="local|ray|ray://HOST:PORT",
    help="Who encodes: this machine, or the machines of a Ray cluster [default: local].",
)
@click.option("--include", multiple=True, metavar="GLOB", help="Look only at files whose name or path matches.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave these out of the index. Both repeatable.")
@click.option("--retry-failed", is_flag=True, help="Read files that failed before again, though they did not change.")
@click.option("--dry-run", is_flag=True, help="Only tell what would be done; photos are not read.")
@click.option("--watch", is_flag=True, help="Then go on: take up changes within seconds, until Ctrl-C.")
@click.option(
    "--scan-every",
    type=click.FloatRange(min=1),
    metavar="SECONDS",
    help="With --watch: how often all is listed again, for what no event told [default: 600].",
)
@json_option
def command(
    stores: tuple[str, ...],
    index: str | None,
    model: str | None,
    precision: str | None,
    workers: int | None,
    batch_size: int | None,
    device: str | None,
    engine: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    retry_failed: bool,
    dry_run: bool,
    watch: bool,
    scan_every: float | None,
    as_json: bool,
) -> None:
    """Crawl photo stores and bring the index up to date.

    New and changed photos are embedded, moved ones keep their vector, deleted ones disappear from results. Files that
    cannot be used are skipped with a warning and listed by `searchengine status --failures`. Running it again goes on
    from where the last run ended.
    """
    if dry_run and watch:
        raise click.UsageError("--dry-run tells what would be done now, --watch does it and goes on; give one of them")
    if scan_every is not None and not watch:
        raise click.UsageError("--scan-every is for --watch; give both, or neither")
    if watch and engine != "local":
        raise click.UsageError("--watch is for --engine local; give one of them")
    if engine not in ("local", "ray") and not engine.startswith("ray://"):
        raise click.BadParameter(f"{engine!r} is neither local nor ray nor ray://HOST:PORT", param_hint="--engine")
    given = settings_from(
        index=index, model=model, precision=precision, workers=workers, batch_size=batch_size, device=device
    )
    with writable(given) as settings:
        if dry_run:
            from indexer.plan import plan

            report = plan(settings.index_folder, stores, include=include, exclude=exclude, retry_failed=retry_failed)
            report.model = choose_model(settings)
            _print_counters(report.as_dict(), as_json=as_json, remark=" (dry run: nothing was written)")
            return
        _refuse_useless_download(settings)
        encoder = encoder_for(settings)
        if encoder.precision == "int8" and settings.device == "auto":
            settings = replace(settings, device="cpu")  # where integers are, however many GPUs there are
        if settings.model == "auto" and identity_of(settings) is None:
            notice(f"a new index, with the encoder {encoder.name}; `searchengine models` lists what --model can choose")
        with ctrl_c_stops() as stop, progress_bar("indexing") as advance:
            options: dict[str, Any] = {
                "encoder": encoder,
                "include": include,
                "exclude": exclude,
                "workers": settings.workers or None,
                "batch_size": _batch_size(settings),
                "limits": limits_from(settings),
                "engine": _engine(engine, encoder, settings),
                "retry_failed": retry_failed,
                "on_progress": lambda progress: advance(progress.done, progress.total, pace(progress.busiest)),
                "on_skip": lambda key, reason: notice(f"skipped {printable(key)}: {reason}"),
                "stop": stop,
            }
            if watch:
                _watch(settings, stores, scan_every=scan_every, tell=_printer(as_json), options=options)
                raise KeyboardInterrupt
            from indexer.pipeline import build

            report = build(settings.index_folder, stores, **options)
        _print_counters(report.as_dict(), as_json=as_json)
        if report.added:
            _recommend_compaction(settings)


def _engine(name: str, encoder: Encoder, settings: Settings) -> Engine | None:
    """Who reads and encodes, if it is not this process. Raises UsageError."""
    from indexer.engines.messages import EncoderSource

    source = EncoderSource(name=encoder.name, precision=encoder.precision, models_folder=settings.models_folder)
    if name != "local":
        from indexer.engines.ray import RayEngine

        return RayEngine(source, address=None if name == "ray" else name, device=settings.device)
    devices = _devices(settings)
    if len(devices) == 1:
        return None
    from indexer.engines.processes import ProcessEngine

    return ProcessEngine(source, devices=devices)


def _devices(settings: Settings) -> list[str]:
    if not _may_have_gpus(settings.device):
        return settings.device.split(",")
    from searchengine.models.devices import devices_of

    return devices_of(settings.device)


def _batch_size(settings: Settings) -> int:
    if settings.origins["batch_size"] != "default" or not _may_have_gpus(settings.device):
        return settings.batch_size
    from searchengine.models.devices import suitable_batch

    return suitable_batch(settings.device)


def _may_have_gpus(device: str) -> bool:
    """Told without torch, which takes seconds to load, and a run that finds nothing to do never needs it."""
    if device == "auto":
        return sys.platform == "win32" or any(glob(pattern) for pattern in GPUS)
    return device.startswith("cuda")


def _recommend_compaction(settings: Settings) -> None:
    from indexer.ann import SCAN_FROM, compared_one_by_one

    compared = compared_one_by_one(settings.index_folder)
    if compared >= SCAN_FROM:
        notice(f"each search compares {compared:,} vectors one by one; `searchengine compact` makes that much faster")


def _watch(
    settings: Settings,
    stores: tuple[str, ...],
    *,
    scan_every: float | None,
    tell: Callable[[dict[str, Any]], None],
    options: dict[str, Any],
) -> None:
    from indexer.watch import SCAN_EVERY_SECONDS, watch

    watch(
        settings.index_folder,
        stores,
        scan_every_seconds=scan_every or SCAN_EVERY_SECONDS,
        on_update=lambda report: tell(report.as_dict()),
        on_notice=notice,
        **options,
    )


def _printer(as_json: bool) -> Callable[[dict[str, Any]], None]:
    """Prints the first run's counters as any run's, and the later ones, of what changed since, as a line each."""
    first = True

    def tell(counters: dict[str, Any]) -> None:
        nonlocal first
        if first or as_json:
            _print_counters(counters, as_json=as_json)
        else:
            click.echo(f"{datetime.now():%H:%M:%S}  {_changes(counters)}")
        if first:
            notice("watching for changes; Ctrl-C ends it")
        first = False

    return tell


def _print_counters(counters: dict[str, Any], *, as_json: bool, remark: str = "") -> None:
    """What a run did, as `indexer.report.Report` counts it."""
    if as_json:
        click.echo(json.dumps(counters))
        return
    click.echo(f"{_changes(counters) or 'nothing to do'}{remark}; {counters['unchanged']:,} unchanged")
    if not counters["scanned"]:
        click.echo("no photos were found there", err=True)
    if counters["duplicates"]:
        click.echo(f"exact copies, which share a vector with another: {counters['duplicates']:,}")
    if counters["failed"]:
        files = _counted(counters["failed"], "file")
        click.echo(f"{files} could not be used: searchengine status --failures lists them")
    if counters["ignored"]:
        click.echo(f"left out: {_counted(counters['ignored'], 'other file')}, no photo by name or content")
    if counters["unlistable"]:
        folders = _counted(counters["unlistable"], "folder")
        click.echo(f"{folders} could not be listed, and nothing there was taken for deleted")
    if counters["images_per_second"]:
        rate = f"{counters['images_per_second']:.1f} images a second"
        click.echo(f"{counters['seconds']:.1f} s, {rate}, encoder {counters['model']}")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _changes(counters: dict[str, Any]) -> str:
    names = ("added", "updated", "moved", "deleted")
    return ", ".join(f"{counters[name]:,} {name}" for name in names if counters[name])


def _refuse_useless_download(settings: Settings) -> None:
    """Another encoder than the index's is refused in the end, so its hundreds of megabytes are not fetched first."""
    from searchengine.models.published import PUBLISHED

    wanted, known = PUBLISHED.get(settings.model), identity_of(settings)
    if wanted and known and known.encoder != wanted.name and not wanted.is_in(settings.models_folder):
        raise ModelMismatch(
            f"the index at {printable(str(settings.index_folder))} was made by encoder {printable(known.encoder)}, not "
            f"by {wanted.name}; leave --model away, index into another folder with --index, or change the model of "
            f"this index with: searchengine reencode --model {wanted.name}"
        )
