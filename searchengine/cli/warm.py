from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from searchengine.cli.options import (
    device_option,
    encoder_of,
    index_option,
    json_option,
    open_for_reading,
    settings_from,
)
from searchengine.cli.output import notice
from searchengine.errors import SearchEngineError, UsageError
from searchengine.text import printable

if TYPE_CHECKING:
    from searchengine.settings import Settings
    from searchengine.warm.place import Place

INTERRUPTED = 130


@click.command("warm", epilog='Example:  searchengine warm &   or, in config.toml:  warm = "auto"')
@index_option
@device_option
@click.option(
    "--idle-seconds",
    type=int,
    help="End when no search has come for so long [default: the setting warm_idle_seconds, 600].",
)
@click.option("--status", is_flag=True, help="Show the warm processes that run.")
@click.option("--stop", is_flag=True, help="End all of them; one that is still loading ends when it has loaded.")
@json_option
def command(
    index: str | None, device: str | None, idle_seconds: int | None, status: bool, stop: bool, as_json: bool
) -> int:
    """Keep an index and its encoder loaded, so that searches answer at once.

    While it runs, `search` and `similar` find it and ask it by themselves. They get what they would have found
    themselves, in a fraction of the time: most of a search is loading. New photos are seen as soon as they are
    committed. It reads the index only, so nothing waits for it.

    It runs until no search has come for --idle-seconds, until Ctrl-C or --stop, or until the index is gone or the
    encoder's weights have changed. One process serves one index, on one device, for this version of the program; any
    other search does without it, as it does when the process hangs or died. It takes the memory of the encoder and of
    what it has read of the index.

    The setting `warm` (SEARCHENGINE_WARM, or config.toml) tells searches what to do: `use` (the default) asks a process
    that runs; `auto` also starts one in the background after the first search; `off` does neither.

    It listens on a socket in a folder that only you can enter: $XDG_RUNTIME_DIR/searchengine, or `warm` in
    your cache folder. Nothing is sent over a network.
    """
    if status and stop:
        raise click.UsageError("--status and --stop ask for different things; give one")
    if status:
        _print_status(as_json=as_json)
        return 0
    if stop:
        _stop(as_json=as_json)
        return 0
    return _serve(settings_from(index=index, device=device, warm_idle_seconds=idle_seconds), as_json=as_json)


def _serve(settings: Settings, *, as_json: bool) -> int:
    from searchengine.index.layout import read_identity
    from searchengine.warm.place import key_of, make_place, taken

    key = key_of(settings)
    if key is None:
        read_identity(settings.index_folder)  # tells what is wrong with it
        raise UsageError(f"the index at {printable(str(settings.index_folder))} is changing; try again")
    place = make_place(key)
    with taken(place) as is_still_ours:
        if is_still_ours is None:
            raise UsageError("a warm process for this index runs already; `searchengine warm --status` shows it")
        return _serve_at(place, settings, is_still_ours=is_still_ours, as_json=as_json)


def _serve_at(place: Place, settings: Settings, *, is_still_ours: Callable[[], bool], as_json: bool) -> int:
    from searchengine.cli.queries import SearchRequest, answer
    from searchengine.models.hashes import state_of
    from searchengine.models.registry import weights_files
    from searchengine.search import Searcher
    from searchengine.warm.place import key_of
    from searchengine.warm.server import WarmServer

    with open_for_reading(settings) as opened:
        weights = weights_files(opened.identity.encoder, models_folder=settings.models_folder)
        states = [state_of(file) for file in weights]  # before they are mapped
        searcher = Searcher(opened, encoder_of(opened, settings))
        # What is loaded on first use is used once, so that the first who asks need not wait for it.
        answer(SearchRequest(texts=("a photo",)), searcher)

        def hits_of(search: dict[str, Any]) -> list[dict[str, Any]]:
            return [vars(hit) for hit in answer(SearchRequest.from_dict(search), searcher)]

        def is_current() -> bool:
            # The newest state is taken even if nobody asks, for the files of the last one may be deleted, and take
            # their space on the disk as long as they are mapped.
            try:
                return (
                    key_of(settings) == place.key
                    and [state_of(file) for file in weights] == states
                    and opened.snapshot() is not None
                )
            except (OSError, SearchEngineError):
                return False

        if not is_still_ours():
            notice("it was told to end while it was loading")
            return 0
        server = WarmServer(
            place,
            answer=hits_of,
            is_current=is_current,
            idle_seconds=settings.warm_idle_seconds,
        )
        caught: list[int] = []

        def end(number: int, _: object) -> None:
            caught.append(number)
            server.stop()

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, end)
        if as_json:
            click.echo(json.dumps({"pid": os.getpid(), "index": place.key["index"], "socket": place.socket}))
        else:
            notice(f"searches of {printable(place.key['index'])} are answered at once; Ctrl-C ends this")
        server.run()
    return INTERRUPTED if signal.SIGINT in caught else 0


def _print_status(*, as_json: bool) -> None:
    from searchengine.warm.client import all_running

    running = list(all_running())
    for process in running:
        if as_json:
            click.echo(json.dumps(process))
        elif "index" in process:
            click.echo(
                f"process {process['pid']}: {printable(process['index'])} on {process['device']}, "
                f"{process['searches']:,} searches answered, ends in {process['ends_in_seconds']:,} s if none comes"
            )
        else:
            click.echo(f"process {process['pid']} does not answer; `searchengine warm --stop` tells it to end")
    if not running and not as_json:
        notice("no warm process runs")


def _stop(*, as_json: bool) -> None:
    from searchengine.warm.client import stop_all

    stopped = list(stop_all())
    for pid, answered in stopped:
        if as_json:
            click.echo(json.dumps({"pid": pid, "answered": answered}))
        elif pid is None:
            notice("one that does not tell its process id was told to end; if it is still loading, it first does that")
        else:
            notice(f"process {pid} ends" if answered else f"process {pid} does not answer; it was sent SIGTERM")
    if not stopped and not as_json:
        notice("no warm process runs")
