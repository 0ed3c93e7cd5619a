"""What several test files share: where the test data is, and a folder of real pictures."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from commandline import Cli, Outcome
from fakes import FakeEncoder
from hypothesis import HealthCheck, settings
from PIL import Image

# The machines that run this differ in speed, and a slow example is no failure.
settings.register_profile("house", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
settings.load_profile("house")

DATA = Path(os.environ.get("SEARCHENGINE_DATA") or Path(__file__).parent.parent.parent / "shared" / "data")

# Where examples by the hundred make their indexes: in memory, for an index waits for the disk at each commit.
QUICK = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@pytest.fixture(scope="session")
def data() -> Path:
    """The shared test data: captioned photos and nasty files. Tests that need it are skipped where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"the test data is not at {DATA}; SEARCHENGINE_DATA names another folder")
    return DATA


def painted(seed: int, *, width: int = 60, height: int = 40) -> Image.Image:
    """A small picture of coloured blocks; each seed gives a clearly different one."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


@pytest.fixture
def paint(tmp_path: Path) -> Callable[..., Path]:
    """paint("folder/name.png", seed): writes a picture below the test's own folder, and returns its path."""

    def write(name: str | Path, seed: int = 0) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        painted(seed).save(path)
        return path

    return write


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of a dozen distinct pictures in several formats and subfolders; four are photos if there are any."""
    folder = tmp_path / "photos"
    (folder / "2023" / "beach").mkdir(parents=True)
    (folder / "2024").mkdir()
    names = "red.png 2023/a.jpg 2023/b.jpg 2023/beach/c.webp 2023/beach/d.png 2024/e.bmp 2024/f.tif g.gif"
    for number, name in enumerate(names.split()):
        painted(100 + number).save(folder / name)
    real = sorted((DATA / "coco_cc").rglob("*.jpg"))[:4]
    for number in range(4):
        if real:
            shutil.copyfile(real[number], folder / "2024" / f"real-{number}.jpg")
        else:
            painted(200 + number, width=320, height=240).save(folder / "2024" / f"real-{number}.jpg")
    return folder


@pytest.fixture
def encoder() -> FakeEncoder:
    return FakeEncoder()


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the settings and data of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("SEARCHENGINE_") and name != "SEARCHENGINE_DATA"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data-home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config-home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache-home"))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Runs the command line in this process, with its real error handling."""
    from searchengine.cli import main

    before = signal.getsignal(signal.SIGPIPE)

    def run(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["searchengine", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capfd.readouterr()
        return Outcome(code=int(exit_.value.code or 0), out=captured.out, err=captured.err)

    yield run
    signal.signal(signal.SIGPIPE, before)
