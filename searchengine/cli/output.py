"""How results reach people and programs: tables, paths, JSON on stdout; progress and notices on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol

import click

from searchengine.text import printable

if TYPE_CHECKING:
    from searchengine.hits import Hit

PROGRESS_INTERVAL_SECONDS = 0.1


CLEAR_LINE = "\r\x1b[K"


def notice(message: str) -> None:
    """One line on stderr, in place of a progress bar that may stand there; a full disk below it ends no run."""
    with contextlib.suppress(OSError):
        click.echo(f"{CLEAR_LINE if sys.stderr.isatty() else ''}{message}", err=True)


def notice_from_signal(message: str) -> None:
    """`notice` for a signal handler, which may run in the middle of a write to stderr, where no other can begin."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"{CLEAR_LINE if sys.stderr.isatty() else ''}{message}\n".encode())


def styled(text: str, **style: bool | str) -> str:
    """Colour for a terminal that wants it (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or not sys.stdout.isatty()
    return text if plain else click.style(text, **style)  # type: ignore[arg-type]


def print_json_lines(hits: Sequence[Hit]) -> None:
    for hit in hits:
        # Escaped to ASCII, so that a name with stray bytes survives as a lone surrogate.
        click.echo(json.dumps(asdict(hit)))


def print_paths(hits: Sequence[Hit], *, end: bytes) -> None:
    """The very bytes of each path, so that any name reaches the next program unharmed."""
    sys.stdout.flush()
    sys.stdout.buffer.write(b"".join(os.fsencode(hit.path) + end for hit in hits))
    sys.stdout.buffer.flush()


def line_after_matches(matches: Sequence[Hit], others: Sequence[Hit]) -> str | None:
    """What stands between the hits that are matches and those that are not; None where there is nothing to divide."""
    if not others:
        return None
    if matches:
        return "matches end here"
    return (
        "nothing here is surely a match; these come nearest" if others[0].rank == 1 else "all matches come before these"
    )


def print_table(hits: Sequence[Hit], *, match: float) -> None:
    """Rank, score, relevance, id and path of each hit, with a line where the matches end."""
    id_width = max(len(str(hit.id)) for hit in hits)
    click.echo(styled(f"{'rank':>4}  score  match  {'id':>{id_width}}  path", bold=True))
    matches, others = divided(hits, match=match)
    for some, dim in ((matches, False), (others, True)):
        if dim and (line := line_after_matches(matches, others)):
            click.echo(styled(f"---- {line}", fg="yellow"))
        for hit in some:
            figures = f"{hit.rank:>4}  {hit.score:.3f}  {percent(hit.relevance):>5}  {hit.id:>{id_width}}"
            click.echo(styled(f"{figures}  {printable(hit.path)}", dim=dim))


def percent(relevance: float) -> str:
    """Rounded down, so that what is shown as one half is a match."""
    return f"{int(100 * relevance)}%"


def divided(hits: Sequence[Hit], *, match: float) -> tuple[Sequence[Hit], Sequence[Hit]]:
    """The hits that are matches, and those that are not; relevance never rises from one to the next."""
    count = sum(hit.relevance >= match for hit in hits)
    return hits[:count], hits[count:]


class Advance(Protocol):
    def __call__(self, done: int, total: int, remark: str = "") -> None: ...


@contextmanager
def progress_bar(label: str) -> Iterator[Advance]:
    """Gives a function (done, total, remark) that draws a bar on a terminal and does nothing elsewhere.

    A bar begins with `done` 0 and is gone with `total`, so that one function does for one job after another.
    """
    if not sys.stderr.isatty():
        yield lambda done, total, remark="": None
        return
    started = time.monotonic()
    drawn = 0.0

    def advance(done: int, total: int, remark: str = "") -> None:
        nonlocal started, drawn
        now = time.monotonic()
        if not done:
            started = now
        if not total or (done < total and now - drawn < PROGRESS_INTERVAL_SECONDS):
            return
        drawn = now
        rate = done / max(now - started, 1e-9)
        left = f", {(total - done) / rate:,.0f} s left" if done else ""
        filled = round(24 * done / total)
        bar = "#" * filled + "-" * (24 - filled)
        line = f"{label} [{bar}] {done:,}/{total:,}, {rate:.1f}/s{left}{remark and ', '}{remark}"
        # What goes on in the next line could not be wiped out again.
        sys.stderr.write(CLEAR_LINE + line[: shutil.get_terminal_size().columns - 1])
        sys.stderr.flush()
        if done >= total:
            clear()

    def clear() -> None:
        nonlocal drawn
        if drawn:
            sys.stderr.write(CLEAR_LINE)
            sys.stderr.flush()
        drawn = 0.0

    try:
        yield advance
    finally:
        clear()


def pace(busiest: tuple[str, float] | None) -> str:
    """Which stage of a run sets its pace, and at what share of what that stage can (indexer.report.Progress)."""
    return f"limit: {busiest[0]}, at {100 * busiest[1]:.0f} %" if busiest else ""


@contextmanager
def silent_decoders() -> Iterator[None]:
    """libtiff and its like write complaints about photos straight to descriptor 2; ours go to a copy of it."""
    import logging

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
