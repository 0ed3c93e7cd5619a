from __future__ import annotations

import hashlib
import json
import os
import sys
from typing import TYPE_CHECKING

import click

from searchengine.cli.options import filter_options, index_option, open_for_reading, settings_from
from searchengine.cli.output import notice, progress_bar, styled
from searchengine.cli.results import FOUND, NOTHING_FOUND
from searchengine.errors import SearchEngineError, UsageError
from searchengine.stores import LOCAL, KnownStores
from searchengine.text import printable

if TYPE_CHECKING:
    from searchengine.duplicates import DuplicateGroup
    from searchengine.filters import Filters
    from searchengine.index.photos import ImageRow
    from searchengine.index.protocol import PhotoIndex


@click.command(
    "duplicates",
    epilog="Example:  searchengine duplicates --exact -0 | xargs -0 mv --backup=numbered -t ~/copies",
)
@click.option("--exact", is_flag=True, help="Only copies to the byte.")
@click.option(
    "--threshold",
    metavar="auto|X",
    help="Near copies: what stands out in this library, or a similarity of at least X [default: auto].",
)
@click.option("--format", "format_", type=click.Choice(["table", "paths", "json"]), help="Shape of the result.")
@click.option("-0", "null", is_flag=True, help="As --format paths, each path ending in a NUL byte, for xargs -0.")
@click.option("--json", "as_json", is_flag=True, help="The same as --format json: one group a line.")
@filter_options
@index_option
def command(
    exact: bool,
    threshold: str | None,
    format_: str | None,
    null: bool,
    as_json: bool,
    filters: Filters,
    index: str | None,
) -> int:
    """Find groups of the same photo: copies, and copies that were resized, recompressed, cropped or edited a little.

    The best of each group comes first, marked *: that of most pixels, then the largest file, then the oldest. Nothing
    is ever deleted. For scripts, `--format paths` and -0 print all but the best; say with --exact or --threshold which
    copies you mean. A path is printed only if it is that of a file on disk as it was indexed, and its group's best,
    wherever it is, is what was indexed and not the same file; each best is read again for that. Exit code 1 means that
    there are none.
    """
    from searchengine.duplicates import exact_duplicates, near_duplicates

    if len({name for name in (format_, "json" if as_json else None, "paths" if null else None) if name}) > 1:
        raise click.UsageError("--format, --json and -0 ask for different shapes; give one")
    chosen = format_ or ("json" if as_json else "paths" if null else "table")
    if exact and threshold is not None:
        raise UsageError("--exact and --threshold contradict each other; give one")
    if chosen == "paths" and not exact and threshold is None:
        raise UsageError("paths are for scripts, so say which copies: --exact, --threshold X, or --threshold auto")
    least = _parse_threshold(threshold)
    settings = settings_from(index=index)
    with open_for_reading(settings) as opened, progress_bar("comparing") as advance:
        if exact:
            groups = exact_duplicates(opened, filters=filters)
        else:
            groups = near_duplicates(opened, threshold=least, filters=filters, on_progress=advance)
        if chosen == "paths":
            end = b"\0" if null else b"\n"
            return _print_paths(groups, opened, max_file_bytes=settings.max_file_bytes, end=end)
    if not groups:
        if chosen == "table":
            notice("no duplicates")
        return NOTHING_FOUND
    if chosen == "json":
        for group in groups:
            click.echo(json.dumps(_as_dict(group)))
    else:
        _print_table(groups)
    return FOUND


def _parse_threshold(text: str | None) -> float | None:
    if text in (None, "auto"):
        return None
    try:
        least = float(text)
    except ValueError:
        least = 0.0
    if not 0 < least <= 1:
        raise UsageError(
            f"--threshold is {text!r}, but must be auto or a similarity above 0 and at most 1, such as 0.95"
        )
    return least


def _as_dict(group: DuplicateGroup) -> dict[str, object]:
    return {
        "similarity": group.similarity,
        "paths": [photo.key for photo in group.photos],
        "similarities": list(group.similarities),
        "ids": [photo.id for photo in group.photos],
        "widths": [photo.width for photo in group.photos],
        "heights": [photo.height for photo in group.photos],
        "sizes_bytes": [photo.size_bytes for photo in group.photos],
    }


def _print_table(groups: list[DuplicateGroup]) -> None:
    click.echo(styled("similarity       pixels       bytes    path", bold=True))
    for number, group in enumerate(groups):
        if number:
            click.echo()
        for place, (photo, similarity) in enumerate(zip(group.photos, group.similarities, strict=True)):
            pixels = f"{photo.width}x{photo.height}"
            line = f"{similarity:>10.3f}  {pixels:>11}  {photo.size_bytes:>10,}  "
            click.echo(styled(f"{line}{' ' if place else '*'} {printable(photo.key)}", bold=not place))
    others = [photo for group in groups for photo in group.photos[1:]]
    size = sum(photo.size_bytes for photo in others)
    notice(f"{len(groups):,} groups; {len(others):,} photos besides the best of each, {size / 2**20:,.1f} MiB")


def _print_paths(groups: list[DuplicateGroup], index: PhotoIndex, *, max_file_bytes: int, end: bytes) -> int:
    """The very bytes of the paths of all but the best of each group, unless a script could lose a photo by them."""
    paths: list[str] = []
    stores = KnownStores()
    for group in groups:
        best, *others = group.photos
        there = _status(best)
        is_as_listed = there is not None or best.store != LOCAL
        if not is_as_listed or not _is_intact(best, index, stores, max_file_bytes=max_file_bytes):
            notice(f"left out all copies of {printable(best.key)}, which is no longer as it was indexed; index again")
            continue
        for photo in others:
            found = _status(photo)
            if photo.store != LOCAL:
                notice(f"left out {printable(photo.key)}, which is no file of its own on this machine; --json lists it")
            elif found is None:
                notice(f"left out {printable(photo.key)}, which is no longer as it was indexed; index again")
            elif there is not None and os.path.samestat(there, found):
                notice(f"left out {printable(photo.key)}, which is the same file as {printable(best.key)}")
            elif end == b"\n" and "\n" in photo.key:
                notice(f"left out {printable(photo.key)}, whose newline would make two paths of it; use -0")
            else:
                paths.append(photo.key)
    sys.stdout.flush()
    sys.stdout.buffer.write(b"".join(os.fsencode(path) + end for path in paths))
    sys.stdout.buffer.flush()
    return FOUND if paths else NOTHING_FOUND


def _is_intact(photo: ImageRow, index: PhotoIndex, stores: KnownStores, *, max_file_bytes: int) -> bool:
    """Whether the file can be read, and holds what was indexed: a disk that fails changes neither size nor time."""
    try:
        content = stores.read(photo.store, photo.key, max_bytes=max_file_bytes)
    except SearchEngineError:
        return False
    return index.vector_id_by_content(hashlib.sha256(content).digest()) == photo.vector_id


def _status(photo: ImageRow) -> os.stat_result | None:
    """None where the file is gone, has another size or time than the index knows, or is none of this machine's."""
    if photo.store != LOCAL:
        return None
    try:
        found = os.stat(photo.key, follow_symlinks=False)
    except OSError:
        return None
    return found if (found.st_size, found.st_mtime_ns) == (photo.size_bytes, photo.mtime_ns) else None
