"""Images a second as bars, drawn with Pillow alone: a panel for each size of photos."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, ROW, LEFT, RIGHT, TOP = 900, 26, 230, 70, 36
OURS, PEERS = "#d62728", "#7f7f7f"


def draw(rates: dict[str, dict[str, float]], path: Path, *, title: str) -> None:
    """By size of the photos, then by contender. Raises OSError."""
    height = TOP + sum(TOP + ROW * len(by_name) for by_name in rates.values())
    image = Image.new("RGB", (WIDTH, height + 10), "white")
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    canvas.text((10, 10), title, "black", font)
    y = TOP
    for size, by_name in rates.items():
        canvas.text((10, y + 8), f"photos of {size}", "black", ImageFont.load_default(14))
        y += TOP
        longest = max(by_name.values())
        for name, rate in by_name.items():
            end = LEFT + (WIDTH - LEFT - RIGHT) * rate / longest
            canvas.text((LEFT - 8, y + ROW / 2), name, "black", font, anchor="rm")
            canvas.rectangle((LEFT, y + 4, end, y + ROW - 4), OURS if name.startswith("ours") else PEERS)
            canvas.text((end + 6, y + ROW / 2), f"{rate:.1f}", "black", font, anchor="lm")
            y += ROW
    image.save(path, "PNG")
