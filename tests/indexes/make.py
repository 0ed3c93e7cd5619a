"""Make the stored index of the current format version, by which tests/test_schema.py tests later programs.

    PYTHONPATH=.:tests python tests/indexes/make.py tests/indexes/vN

Its photos are made in /photos, which must not exist and is removed again: a stored index names no path of the machine
that made it. `vN/index` is the index; `vN/photos` holds the photos' bytes, under percent-encoded names.
"""

import os
import shutil
import sys
from pathlib import Path
from unittest.mock import patch
from urllib.parse import quote

from conftest import painted
from fakes import FakeEncoder
from PIL import Image
from PIL.ExifTags import GPS, IFD, Base

from indexer.pipeline import build

PHOTOS = Path("/photos")
FIRST_TIME = 1_700_000_000


def make(destination: Path) -> None:
    PHOTOS.mkdir()
    try:
        with patch("socket.gethostname", return_value="host"):
            _two_runs(destination / "index")
        (destination / "photos").mkdir()
        for file in sorted(PHOTOS.rglob("*.*")):
            name = quote(os.fsencode(file.relative_to(PHOTOS)), safe="")
            shutil.copyfile(file, destination / "photos" / name)
    finally:
        shutil.rmtree(PHOTOS)
    (destination / "index" / "lock").unlink(missing_ok=True)


def _two_runs(index: Path) -> None:
    """New photos; then one that changed, one that moved, one that is gone: two segments, a dead vector, a failure."""
    _paint("beach.jpg", 1, exif=_facts())
    for seed, name in enumerate(("2024/red.png", "2024/gone.png", "2024/old name.png", "grün.webp", "\udcff.png"), 2):
        _paint(name, seed)
    shutil.copyfile(PHOTOS / "2024/red.png", PHOTOS / "2024/copy.png")
    (PHOTOS / "broken.jpg").write_bytes((PHOTOS / "beach.jpg").read_bytes()[:200])
    _run(index)
    (PHOTOS / "2024/gone.png").unlink()
    (PHOTOS / "moved").mkdir()
    (PHOTOS / "2024/old name.png").rename(PHOTOS / "moved/new name.png")
    _paint("grün.webp", 20)
    _paint("new.png", 21)
    _run(index)


def _run(index: Path) -> None:
    """File times are made certain, so that a photo's time tells in which order they were written."""
    for number, file in enumerate(sorted(PHOTOS.rglob("*.*"))):
        if file.stat().st_mtime > FIRST_TIME + 10**6:
            os.utime(file, (FIRST_TIME + number, FIRST_TIME + number))
    build(index, [PHOTOS], encoder=FakeEncoder())


def _paint(name: str, seed: int, **options: object) -> None:
    path = PHOTOS / name
    path.parent.mkdir(exist_ok=True)
    painted(seed).save(path, **options)


def _facts() -> Image.Exif:
    exif = Image.Exif()
    exif[Base.Make], exif[Base.Model] = "Leica", "M6"
    exif.get_ifd(IFD.Exif)[Base.DateTimeOriginal] = "2023:05:06 07:08:09"
    place = {GPS.GPSLatitudeRef: "N", GPS.GPSLatitude: (48.0, 30.0, 0.0)}
    exif.get_ifd(IFD.GPSInfo).update(place | {GPS.GPSLongitudeRef: "W", GPS.GPSLongitude: (2.0, 15.0, 0.0)})
    return exif


if __name__ == "__main__":
    make(Path(sys.argv[1]))
