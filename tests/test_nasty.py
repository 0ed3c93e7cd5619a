"""The command line over other projects' collections of broken, hostile and odd pictures, and what it may take."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pillow_heif
import pytest
from clip_references import random_weights, small_config
from conftest import painted
from hostile import children, large_png, needs_proc
from PIL import Image
from safetensors.torch import save_file

from searchengine.decode import DEFAULT_LIMITS
from searchengine.formats import EXTENSIONS, looks_like_photo

pytestmark = needs_proc

MIB = 2**20
Run = Callable[..., "Watched"]


@dataclass
class Watched:
    """A finished run of the command line, and what was seen of it and its child processes."""

    code: int
    out: str
    err: str
    peak_bytes: int
    children_peak_bytes: dict[int, int] = field(default_factory=dict)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_home: None) -> Run:
    monkeypatch.setenv("SEARCHENGINE_INDEX", str(tmp_path / "photos.index"))
    monkeypatch.setenv("SEARCHENGINE_WORKERS", "2")

    def run(*arguments: str | Path, **variables: str) -> Watched:
        process = subprocess.Popen(
            [sys.executable, "-m", "searchengine", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables},
        )
        done = threading.Event()
        watched = Watched(code=0, out="", err="", peak_bytes=0)
        watcher = threading.Thread(target=watch, args=(process.pid, watched, done))
        watcher.start()
        try:
            watched.out, watched.err = process.communicate(timeout=300)
        finally:
            process.kill()
            done.set()
            watcher.join()
        watched.code = process.returncode
        return watched

    return run


def watch(pid: int, watched: Watched, done: threading.Event) -> None:
    while not done.wait(0.02):
        watched.peak_bytes = max(watched.peak_bytes, peak_bytes(pid))
        for child in filter(is_a_decoder, children(pid)):
            before = watched.children_peak_bytes.get(child, 0)
            watched.children_peak_bytes[child] = max(before, peak_bytes(child))


def is_a_decoder(pid: int) -> bool:
    """Until it is, a child that is being started has its parent's memory (vfork(2))."""
    try:
        return b"decoder_process" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def peak_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return 1024 * int(found[1]) if found else 0


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that takes no time over its photos, which are cropped to 224 pixels as for a large one."""
    file = tmp_path_factory.mktemp("weights") / "small-quickgelu.safetensors"
    config = small_config(image_width=64, side=14, patch_size=16, vocabulary=49408)
    save_file(random_weights(config), file)
    return file


def is_a_candidate(file: Path) -> bool:
    extension = os.path.splitext(file)[1].lower()
    if file.name.startswith(".") or not file.is_file():
        return False
    return extension in EXTENSIONS if extension else looks_like_photo(file.read_bytes()[:32])


def pillow_reads(file: Path) -> bool:
    try:
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("ignore")
            image.load()
            return image.width * image.height <= DEFAULT_LIMITS.max_pixels
    except Exception:
        return False


def is_understandable(reason: str) -> bool:
    """In words, one line of them, and none that only a programmer knows."""
    jargon = r"\wError|Exception|Plugin|error \W?\d|unknown error|None\b|\bint\b|[\\'\"{}\[\]_]|\b0x|-\d"
    told = re.sub(r"\((setting )?max_\w+\)", "", reason)
    return len(told.split()) >= 4 and len(told) < 150 and told.isprintable() and not re.search(jargon, told)


def test_every_nasty_file_is_indexed_or_has_a_reason(data: Path, run: Run, small_clip: Path) -> None:
    pillow_heif.register_heif_opener()
    folder = data / "nasty"
    done = run("index", "--json", "--model", small_clip, folder)
    assert done.code == 0
    assert "Traceback" not in done.err
    report = json.loads(done.out)

    listed = run("status", "--failures", "--json")
    failures = {row["path"]: row["reason"] for row in map(json.loads, listed.out.splitlines())}
    candidates = {str(file.resolve()) for file in folder.rglob("*") if is_a_candidate(file)}
    assert len(candidates) > 1500
    assert report["scanned"] == report["added"] + report["failed"] == len(candidates)
    assert report["failed"] == len(failures)
    assert failures.keys() <= candidates
    assert [reason for reason in set(failures.values()) if not is_understandable(reason)] == []
    assert [path for path in failures if pillow_reads(Path(path))] == []

    assert 2 <= len(done.children_peak_bytes) < 12
    assert not [child for child in done.children_peak_bytes if Path(f"/proc/{child}").exists()]
    # The largest is a TIFF of 151 megapixels, 4 bytes each.
    assert max(done.children_peak_bytes.values()) < 800 * MIB
    assert done.peak_bytes < 800 * MIB

    again = run("index", "--json", "--model", small_clip, folder)
    report = json.loads(again.out)
    assert (report["added"], report["updated"], report["failed"]) == (0, 0, len(failures))
    assert again.children_peak_bytes == {}  # there was nothing to decode


def test_the_settings_are_a_ceiling_on_what_decoding_takes(tmp_path: Path, run: Run, small_clip: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, side in enumerate((200, 9000, 300, 8000, 400, 3000)):
        Image.new("L", (side, side), number).save(folder / f"{number}-{side}.png", compress_level=1)
    painted(1).save(folder / "last.jpg")
    limits = {"SEARCHENGINE_MAX_DECODE_MEMORY_BYTES": str(64 * MIB)}
    done = run("index", "--json", "--model", small_clip, folder, **limits)
    assert done.code == 0
    assert json.loads(done.out)["added"] == 5
    refused = [line for line in done.err.splitlines() if "needs more than 64 MiB of memory" in line]
    assert len(refused) == 2
    assert max(done.children_peak_bytes.values()) < (64 + 64) * MIB
    assert not [child for child in done.children_peak_bytes if Path(f"/proc/{child}").exists()]

    retried = run("index", "--json", "--retry-failed", "--model", small_clip, folder)
    assert json.loads(retried.out)["added"] == 2


def test_a_photo_that_takes_too_long_is_skipped_by_its_setting(tmp_path: Path, run: Run, small_clip: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    painted(1).save(folder / "first.jpg")
    (folder / "slow.png").write_bytes(large_png(13_000, filter_type=4))
    done = run("index", "--json", "--model", small_clip, folder, SEARCHENGINE_MAX_DECODE_SECONDS="1")
    assert json.loads(done.out)["added"] == 1
    assert "slow.png: takes longer than 1 s to decode (setting max_decode_seconds)" in done.err
