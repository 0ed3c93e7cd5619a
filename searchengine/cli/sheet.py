"""A contact sheet: the hits as one picture, with rank, score and name below each."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from searchengine.cli.output import divided, line_after_matches, percent
from searchengine.cli.thumbnails import thumbnails_of
from searchengine.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from searchengine.hits import Hit

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MAX_COLUMNS = 5
TILE_PX = 240
CAPTION_PX = 46
GAP_PX = 16
TITLE_PX = 56
LINE_PX = 30
ROW_PX = TILE_PX + CAPTION_PX + GAP_PX

PAPER, INK, FAINT, EMPTY, GREEN, AMBER = "#ffffff", "#1f2328", "#6e7781", "#eceff2", "#1a7f37", "#b35900"


def draw_sheet(hits: Sequence[Hit], *, title: str, match: float) -> Image.Image:
    """The hits in reading order, matches first; a line tells where these end, or that there are none."""
    matches, others = divided(hits, match=match)
    line = line_after_matches(matches, others)
    columns = min(MAX_COLUMNS, max(len(hits), 3))
    rows = -(-len(matches) // columns) - (-len(others) // columns)
    width = columns * TILE_PX + (columns + 1) * GAP_PX
    height = TITLE_PX + rows * ROW_PX + (LINE_PX if line else 0) + GAP_PX
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(24), ImageFont.load_default(14)
    heading = printable(title if hits else f"{title}: nothing found")
    draw.text((GAP_PX, GAP_PX), _fit(draw, heading, large, width - 2 * GAP_PX), fill=INK, font=large)
    top = _draw_rows(sheet, draw, matches, TITLE_PX, columns=columns, colour=GREEN, font=small)
    if line:
        draw.text((GAP_PX, top), line, fill=AMBER, font=small)
        start = GAP_PX * 2 + int(draw.textlength(line, font=small))
        draw.rectangle((start, top + 8, width - GAP_PX, top + 9), fill=AMBER)
        top += LINE_PX
    _draw_rows(sheet, draw, others, top, columns=columns, colour=AMBER, font=small)
    return sheet


def _draw_rows(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    hits: Sequence[Hit],
    top: int,
    *,
    columns: int,
    colour: str,
    font: Font,
) -> int:
    """Draws the hits from `top` on, their figures in `colour`; returns where there is room again."""
    for position, (hit, photo) in enumerate(zip(hits, thumbnails_of(hits, max_side_px=TILE_PX), strict=True)):
        left = GAP_PX + position % columns * (TILE_PX + GAP_PX)
        above = top + position // columns * ROW_PX
        _draw_photo(sheet, draw, photo, left, above, font)
        bar = (left, above + TILE_PX + 3, left + TILE_PX, above + TILE_PX + 6)
        draw.rectangle(bar, fill=colour if colour == GREEN else EMPTY)
        figures = f"{hit.rank}   {hit.score:.3f}   {percent(hit.relevance)}"
        draw.text((left, above + TILE_PX + 10), figures, fill=colour, font=font)
        name = _fit(draw, printable(os.path.basename(hit.path)), font, TILE_PX)
        draw.text((left, above + TILE_PX + 27), name, fill=FAINT, font=font)
    return top - (-len(hits) // columns) * ROW_PX


def _draw_photo(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, photo: Image.Image | None, left: int, top: int, font: Font
) -> None:
    draw.rectangle((left, top, left + TILE_PX, top + TILE_PX), fill=EMPTY)
    if photo is None:
        draw.text((left + TILE_PX // 2, top + TILE_PX // 2), "not readable now", fill=FAINT, font=font, anchor="mm")
    else:
        sheet.paste(photo, (left + (TILE_PX - photo.width) // 2, top + (TILE_PX - photo.height) // 2))


def _fit(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> str:
    """The text, shortened in its middle until it is at most `width` pixels wide."""
    # The built-in font has no glyph for most of Unicode; a question mark is more honest than an empty box.
    text = text.encode("latin-1", "replace").decode("latin-1")
    if draw.textlength(text[:500], font=font) <= width:
        return text[:500]
    for kept in range(min(len(text), 250), 1, -1):
        short = f"{text[: (kept + 1) // 2]}...{text[-(kept // 2) :]}"
        if draw.textlength(short, font=font) <= width:
            return short
    return "..."
