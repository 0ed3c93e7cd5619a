"""What `search` and `similar` share: how many hits, which of them, and in what shape they are shown."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from searchengine.cli.output import notice, print_json_lines, print_paths, print_table
from searchengine.errors import UsageError
from searchengine.hits import MATCH
from searchengine.text import printable

if TYPE_CHECKING:
    from searchengine.hits import Hit

FOUND, NOTHING_FOUND = 0, 1


@dataclass(frozen=True, kw_only=True)
class Presentation:
    k: int
    offset: int
    threshold: float | str
    format: str
    null: bool
    html: str | None
    sheet: str | None
    preview: bool


def result_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of both commands and hands them on as one `presentation`."""

    @click.option("-k", type=click.IntRange(min=1), default=10, show_default=True, help="How many photos.")
    @click.option("--offset", type=click.IntRange(min=0), default=0, help="Skip the first N photos.")
    @click.option(
        "--threshold",
        metavar="auto|none|X",
        help="Which hits to keep: matches, all, or a score of at least X [default: auto for paths, else none].",
    )
    @click.option("--format", "format_", type=click.Choice(["table", "paths", "json"]), help="Shape of the result.")
    @click.option("-0", "null", is_flag=True, help="Paths that end in a NUL byte, for xargs -0.")
    @click.option("--html", help="Also write a self-contained page of the hits.")
    @click.option("--sheet", help="Also draw a contact sheet (PNG) of the hits.")
    @click.option("--preview", is_flag=True, help="Show the pictures in the terminal.")
    @click.option("--json", "as_json", is_flag=True, help="The same as --format json: one object a line.")
    @functools.wraps(command)
    def wrapper(
        *args: Any,
        k: int,
        offset: int,
        threshold: str | None,
        format_: str | None,
        null: bool,
        html: str | None,
        sheet: str | None,
        preview: bool,
        as_json: bool,
        **kwargs: Any,
    ) -> Any:
        if len({name for name in (format_, "json" if as_json else None, "paths" if null else None) if name}) > 1:
            raise click.UsageError("--format, --json and -0 ask for different shapes; give one")
        chosen = format_ or ("json" if as_json else "paths" if null else "table")
        if preview and chosen != "table":
            raise click.UsageError("--preview goes with a table, not with paths or JSON")
        presentation = Presentation(
            k=k,
            offset=offset,
            threshold=parse_threshold(threshold or ("auto" if chosen == "paths" else "none")),
            format=chosen,
            null=null,
            html=html,
            sheet=sheet,
            preview=preview,
        )
        return command(*args, presentation=presentation, **kwargs)

    return wrapper


def parse_threshold(text: str) -> float | str:
    """``auto``, ``none`` or a score. Raises UsageError."""
    if text in ("auto", "none"):
        return text
    try:
        score = float(text)
        if not math.isfinite(score):
            raise ValueError
        return score
    except ValueError:
        raise UsageError(f"--threshold is {text!r}, but must be auto, none or a score such as 0.25") from None


def present(hits: list[Hit], presentation: Presentation, *, title: str) -> int:
    """Show the hits that pass the threshold; returns the exit code."""
    threshold = presentation.threshold
    if threshold == "auto":
        hits = [hit for hit in hits if hit.relevance >= MATCH]
    elif isinstance(threshold, float):
        hits = [hit for hit in hits if hit.score >= threshold]
    if presentation.sheet:
        from searchengine.cli.sheet import draw_sheet

        draw_sheet(hits, title=title, match=MATCH).save(writable(presentation.sheet, ".png"), format="PNG")
        notice(f"wrote {printable(presentation.sheet)}")
    if presentation.html:
        from searchengine.cli.page import render_page

        writable(presentation.html, ".html", ".htm").write_text(render_page(hits, title=title, match=MATCH), "utf-8")
        notice(f"wrote {printable(presentation.html)}")
    if not hits:
        if presentation.format == "table":
            notice("nothing found")
        return NOTHING_FOUND
    if presentation.format == "json":
        print_json_lines(hits)
    elif presentation.format == "paths":
        print_paths(hits, end=b"\0" if presentation.null else b"\n")
    else:
        print_table(hits, match=MATCH)
    if presentation.preview:
        from searchengine.cli.preview import print_previews

        print_previews(hits)
    return FOUND


def writable(path: str, *suffixes: str) -> Path:
    """The path, proven writable before work is put into it, and left as it was. Raises UsageError.

    The name must say what it will hold, so that a slip of the hand cannot put a page in place of a photo.
    """
    if not path.lower().endswith(suffixes):
        raise UsageError(f"{printable(path)} must end in {suffixes[0]}; choose another name")
    try:
        with suppress(FileExistsError), open(path, "xb"):
            os.unlink(path)
            return Path(path)
        with open(path, "ab"):
            return Path(path)
    except OSError as error:
        raise UsageError(f"{printable(path)} cannot be written: {error.strerror}; choose another place") from None
