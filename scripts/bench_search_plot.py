"""Recall against latency, drawn with Pillow alone: a panel for each size and kind of query."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 620, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 40, 50
RECALLS = (0.5, 0.9, 0.99, 0.999, 1.0)
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f")
TARGET = 0.99
LEAST_MISSED, MOST_MISSED = 0.0002, 0.5


@dataclass(frozen=True)
class Point:
    """`label` tells which point of its line it is, such as ef=64; empty where there is one only."""

    panel: str
    line: str
    label: str
    recall: float
    milliseconds: float


def draw(points: Sequence[Point], path: Path, *, title: str, columns: int) -> None:
    """Panels in the order of their first points, `columns` in a row. Raises OSError."""
    panels = list(dict.fromkeys(point.panel for point in points))
    lines = list(dict.fromkeys(point.line for point in points))
    columns = min(columns, len(panels))
    image = Image.new("RGB", (columns * WIDTH, 60 + -(-len(panels) // columns) * HEIGHT), "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    canvas.text((10, 8), title, "black", font)
    x = 10.0
    for line in lines:
        canvas.rectangle((x, 34, x + 12, 46), colour(line, lines))
        canvas.text((x + 17, 32), line, "black", font)
        x += 35 + canvas.textlength(line, font)
    for number, panel in enumerate(panels):
        own = [point for point in points if point.panel == panel]
        corner = (number % columns * WIDTH, 60 + number // columns * HEIGHT)
        _draw_panel(canvas, corner, panel, own, lines)
    image.save(path, "PNG")


def colour(line: str, lines: list[str]) -> str:
    return COLOURS[lines.index(line) % len(COLOURS)]


def _draw_panel(
    canvas: ImageDraw.ImageDraw, corner: tuple[int, int], title: str, points: list[Point], lines: list[str]
) -> None:
    font = ImageFont.load_default(12)
    low = math.floor(math.log10(min(point.milliseconds for point in points)))
    high = max(low + 1, math.ceil(math.log10(max(point.milliseconds for point in points))))
    left, right = corner[0] + LEFT, corner[0] + WIDTH - RIGHT
    top, bottom = corner[1] + TOP, corner[1] + HEIGHT - BOTTOM

    def place(recall: float, milliseconds: float) -> tuple[float, float]:
        across = (math.log10(milliseconds) - low) / (high - low)
        return left + across * (right - left), bottom - height(recall) * (bottom - top)

    canvas.text((left, top - 22), title, "black", ImageFont.load_default(14))
    for recall in RECALLS:
        y = place(recall, 10.0**low)[1]
        canvas.line((left, y, right, y), "black" if recall == TARGET else "#dddddd")
        canvas.text((left - 8, y), f"{recall:g}", "black", font, anchor="rm")
    for power in range(low, high + 1):
        x = place(1, 10.0**power)[0]
        canvas.line((x, top, x, bottom), "#dddddd")
        canvas.text((x, bottom + 6), f"{10.0**power:g}", "black", font, anchor="mt")
    canvas.text(((left + right) / 2, bottom + 24), "p50 of one query, ms", "black", font, anchor="mt")
    canvas.text((corner[0] + 8, top - 20), "recall@10", "black", font)
    for line in lines:
        own = [point for point in points if point.line == line and point.recall >= RECALLS[0]]
        # The first setting that finds all is enough; slower ones would lie on top of each other.
        last = next((number for number, point in enumerate(own) if point.recall > 1 - LEAST_MISSED), len(own))
        own = own[: last + 1]
        spots = [place(point.recall, point.milliseconds) for point in own]
        canvas.line(spots, colour(line, lines), width=2)
        for (x, y), point in zip(spots, own, strict=True):
            half = 4 if point.label else 6
            canvas.ellipse((x - half, y - half, x + half, y + half), colour(line, lines), "black")
            canvas.text((x + 7, y + 2), point.label, colour(line, lines), font)


def height(recall: float) -> float:
    """0 to 1, from a recall of 0.5 to one that cannot be told from 1: each halving of what is missed is as high."""
    missed = min(max(1 - recall, LEAST_MISSED), MOST_MISSED)
    return math.log(MOST_MISSED / missed) / math.log(MOST_MISSED / LEAST_MISSED)
