"""Pictures in the terminal: two pixels a character, by 24-bit colour, which nearly every terminal shows."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import click

from searchengine.cli.thumbnails import thumbnails_of
from searchengine.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from searchengine.hits import Hit

MAX_WIDTH_CHARACTERS = 48


def print_previews(hits: Sequence[Hit]) -> None:
    if os.environ.get("NO_COLOR"):
        click.echo("--preview draws with colours, which NO_COLOR forbids", err=True)
        return
    width = min(MAX_WIDTH_CHARACTERS, shutil.get_terminal_size().columns)
    for hit, photo in zip(hits, thumbnails_of(hits, max_side_px=width), strict=True):
        click.echo(f"{hit.rank}  {hit.score:.3f}  {printable(os.path.basename(hit.path))}")
        click.echo("(not readable now)" if photo is None else _half_blocks(photo), color=True)


def _half_blocks(photo: Image.Image) -> str:
    """Each character is an upper half block: its colour is the upper pixel, its background the lower one."""
    pixels = photo.crop((0, 0, photo.width, photo.height // 2 * 2)).load()
    assert pixels is not None
    lines = []
    for y in range(0, photo.height // 2 * 2, 2):
        cells = []
        for x in range(photo.width):
            (r, g, b), (r2, g2, b2) = pixels[x, y], pixels[x, y + 1]  # type: ignore[misc]
            cells.append(f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{r2};{g2};{b2}m▀")
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)
