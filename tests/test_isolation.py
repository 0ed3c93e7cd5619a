"""Decoding in a process of its own: what crashes, hangs or eats memory costs one photo, whatever the child does."""

from __future__ import annotations

import hashlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from conftest import painted
from hostile import SITECUSTOMIZE, children, is_alive, large_png, needs_proc, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from indexer.crawl import Change
from indexer.reading import Decoded, Failed, Known, PhotoReader
from searchengine.decode import DEFAULT_LIMITS, DecodeLimits, Photo, decode_bytes, inspect_bytes
from searchengine.decoder_process import ANSWER
from searchengine.errors import ImageError, SearchEngineError
from searchengine.formats import EXTENSIONS
from searchengine.isolation import IsolatedDecoder
from searchengine.shared_memory import SHARED_BYTES
from searchengine.stores import StoredPhoto

pytestmark = needs_proc

SIZE = 32


@pytest.fixture(scope="module")
def hostile_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On PYTHONPATH, it gives children decoders with holes in them."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    return folder


@pytest.fixture
def hostile(hostile_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(hostile_path))


@pytest.fixture
def open_decoder() -> Iterator[Callable[..., IsolatedDecoder]]:
    opened: list[IsolatedDecoder] = []

    def open_(**limits: float) -> IsolatedDecoder:
        opened.append(IsolatedDecoder(limits=DecodeLimits(**limits)))  # type: ignore[arg-type]
        return opened[-1]

    yield open_
    for decoder in opened:
        decoder.close()
    assert not children()


@pytest.fixture
def pipes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where processes cannot share memory."""
    monkeypatch.delattr(os, "memfd_create", raising=False)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    painted(seed).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def assert_same(one: Photo, other: Photo) -> None:
    assert one.metadata == other.metadata
    assert one.pixels.dtype == other.pixels.dtype == np.uint8
    np.testing.assert_array_equal(one.pixels, other.pixels)


def reason_of(decoder: IsolatedDecoder, data: bytes) -> str:
    with pytest.raises(ImageError) as error:
        decoder.decode_bytes(data, image_size=SIZE)
    return str(error.value)


# -- what it decodes -------------------------------------------------------------------------------------------------


def test_a_thousand_photos_are_decoded_bit_for_bit_as_in_this_process(
    open_decoder: Callable[..., IsolatedDecoder], data: Path
) -> None:
    files = sorted((data / "flickr8k_dev").rglob("*.jpg"))[:900] + sorted((data / "coco_cc").rglob("*.jpg"))[:100]
    assert len(files) == 1000
    decoder = open_decoder()
    for file in files:
        content = file.read_bytes()
        assert_same(decoder.decode_bytes(content, image_size=224), decode_bytes(content, image_size=224))
    assert len(children()) == 1


def test_nasty_files_fail_for_the_same_reasons_and_tell_the_same(
    open_decoder: Callable[..., IsolatedDecoder], data: Path
) -> None:
    decoder = open_decoder()
    files = [file for file in sorted((data / "nasty").rglob("*")) if file.suffix.lower() in EXTENSIONS]
    for file in [file for file in files if file.stat().st_size < 100_000][::6]:
        content = file.read_bytes()
        try:
            expected = decode_bytes(content, image_size=SIZE)
        except ImageError as error:
            assert reason_of(decoder, content) == str(error), file
        else:
            assert_same(decoder.decode_bytes(content, image_size=SIZE), expected)
        try:
            assert decoder.inspect_bytes(content) == inspect_bytes(content), file
        except ImageError as error:
            with pytest.raises(ImageError) as other:
                inspect_bytes(content)
            assert str(other.value) == str(error)


def test_no_process_is_started_before_there_is_a_photo(open_decoder: Callable[..., IsolatedDecoder]) -> None:
    decoder = open_decoder()
    assert not children()
    assert decoder.inspect_bytes(png(1)).width == 60
    assert len(children()) == 1


def check_files_of_all_sizes(decoder: IsolatedDecoder) -> None:
    expected = decode_bytes(png(1), image_size=SIZE)
    for size in (len(png(1)), 2**20, SHARED_BYTES, SHARED_BYTES + 1, 30 * 2**20, len(png(1))):
        assert_same(decoder.decode_bytes(png(1).ljust(size, b"."), image_size=SIZE), expected)
    large = decoder.thumbnail(large_png(2000), max_side_px=2000)  # more than the memory takes
    assert large.shape == (2000, 2000, 3)
    assert not large.any()


def test_files_of_all_sizes_pass_through_shared_memory_or_past_it(
    open_decoder: Callable[..., IsolatedDecoder],
) -> None:
    check_files_of_all_sizes(open_decoder())


@pytest.mark.usefixtures("pipes_only")
def test_files_of_all_sizes_pass_through_pipes(open_decoder: Callable[..., IsolatedDecoder]) -> None:
    check_files_of_all_sizes(open_decoder())


def test_a_program_whose_standard_streams_are_closed_decodes_too(tmp_path: Path) -> None:
    """What it opens then may have the number that one of the process's own streams gets."""
    (tmp_path / "a.png").write_bytes(png(1))
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from searchengine.decode import DecodeLimits
        from searchengine.isolation import IsolatedDecoder
        decoder = IsolatedDecoder(limits=DecodeLimits())
        print(decoder.inspect_bytes(Path(sys.argv[1]).read_bytes()).width)
        decoder.close()
    """)
    command = ["sh", "-c", '"$@" <&- 2>&-', "sh", sys.executable, "-c", program, tmp_path / "a.png"]
    assert subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=60).stdout == b"60\n"


def shared_memory_of(pid: int) -> list[Path]:
    return [link for link in Path(f"/proc/{pid}/fd").iterdir() if "memfd:" in os.readlink(link)]


def test_the_process_cannot_cut_off_the_memory_that_it_shares(open_decoder: Callable[..., IsolatedDecoder]) -> None:
    first, second = open_decoder(), open_decoder()
    for decoder in (first, second):
        decoder.inspect_bytes(png(1))
    for child in children():
        (memory,) = shared_memory_of(child)  # its own, not that of the other
        with memory.open("r+b") as file:
            for size in (0, SHARED_BYTES - 1, SHARED_BYTES + 1):
                with pytest.raises(PermissionError):
                    os.ftruncate(file.fileno(), size)


def test_the_process_holds_the_decoders_and_nothing_heavy(open_decoder: Callable[..., IsolatedDecoder]) -> None:
    open_decoder().decode_bytes(png(1), image_size=SIZE)
    (child,) = children()
    mapped = Path(f"/proc/{child}/maps").read_text()
    assert "_imaging" in mapped
    for heavy in ("numpy", "torch", "faiss"):
        assert heavy not in mapped


# -- what a photo may do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"ABORT:", "crashes its decoder (SIGABRT)"),
        (b"SEGFAULT:", "crashes its decoder (SIGSEGV)"),
        (b"EXIT:", "crashes its decoder (exit code 5)"),
    ],
)
@pytest.mark.usefixtures("hostile")
def test_a_crash_costs_one_photo_and_is_named(
    content: bytes, reason: str, open_decoder: Callable[..., IsolatedDecoder]
) -> None:
    decoder = open_decoder()
    expected = decode_bytes(png(1), image_size=SIZE)
    descriptors = len(os.listdir("/proc/self/fd"))
    assert reason_of(decoder, content) == reason
    assert not children()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert reason_of(decoder, content + bytes(8 * 2**20)) == reason  # it ends with much of the photo yet to be sent
    assert_same(decoder.decode_bytes(png(1), image_size=SIZE), expected)
    assert reason_of(decoder, content) == reason
    assert_same(decoder.decode_bytes(png(1), image_size=SIZE), expected)


@pytest.mark.usefixtures("hostile")
def test_a_photo_is_not_blamed_for_a_process_that_came_to_harm_before(
    open_decoder: Callable[..., IsolatedDecoder], tmp_path: Path
) -> None:
    decoder = open_decoder()
    content = b"ONCE:" + bytes(tmp_path / "mark") + b":" + png(2)
    decoder.inspect_bytes(png(1))
    assert_same(decoder.decode_bytes(content, image_size=SIZE), decode_bytes(png(2), image_size=SIZE))
    assert (tmp_path / "mark").exists()


def test_a_process_that_was_killed_between_two_photos_is_replaced(open_decoder: Callable[..., IsolatedDecoder]) -> None:
    decoder = open_decoder()
    decoder.inspect_bytes(png(1))
    (child,) = children()
    os.kill(child, signal.SIGKILL)
    for seed in (2, 3):
        assert_same(decoder.decode_bytes(png(seed), image_size=SIZE), decode_bytes(png(seed), image_size=SIZE))
    assert children() != [child]


@pytest.mark.usefixtures("hostile")
def test_a_process_that_is_killed_at_work_costs_the_photo_at_most(
    open_decoder: Callable[..., IsolatedDecoder], tmp_path: Path
) -> None:
    decoder = open_decoder()
    mark = tmp_path / "mark"

    def kill() -> None:
        wait_until(mark.exists)
        os.kill(children()[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    assert reason_of(decoder, b"SLEEP:" + bytes(mark)) == "its decoder was killed, as happens when memory runs out"
    thread.join()
    assert decoder.inspect_bytes(png(1)).width == 60


@pytest.mark.parametrize("content", [b"HANG:", b"SLEEP:"])
@pytest.mark.usefixtures("hostile")
def test_a_hang_ends_in_time_even_in_c_code(content: bytes, open_decoder: Callable[..., IsolatedDecoder]) -> None:
    decoder = open_decoder(max_seconds=1)
    started = time.monotonic()
    assert reason_of(decoder, content) == "takes longer than 1 s to decode (setting max_decode_seconds)"
    assert time.monotonic() - started < 4
    assert decoder.inspect_bytes(png(1)).width == 60


def test_a_large_but_legal_picture_that_takes_too_long_is_given_up(
    open_decoder: Callable[..., IsolatedDecoder],
) -> None:
    content = large_png(6000, filter_type=4)
    reason = reason_of(open_decoder(max_seconds=0.1), content)
    assert reason == "takes longer than 0.1 s to decode (setting max_decode_seconds)"
    assert open_decoder(max_seconds=60).inspect_bytes(content).width == 6000


@pytest.mark.usefixtures("hostile")
def test_the_time_is_up_even_where_the_parent_ignores_and_blocks_the_alarm(
    open_decoder: Callable[..., IsolatedDecoder],
) -> None:
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        decoder = open_decoder(max_seconds=0.5)
        decoder.inspect_bytes(png(1))
        (child,) = children()
        thread = threading.Thread(target=reason_of, args=(decoder, b"HANG:"))
        thread.start()
        wait_until(lambda: not is_alive(child), seconds=4)  # the parent itself would wait 5.5 s
        thread.join()
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def test_a_hundred_megapixels_are_refused_where_memory_is_limited(open_decoder: Callable[..., IsolatedDecoder]) -> None:
    content = large_png(10_000)
    decoder = open_decoder(max_memory_bytes=128 * 2**20)
    reason = "needs more than 128 MiB of memory to decode (setting max_decode_memory_bytes)"
    assert reason_of(decoder, content) == reason
    assert_same(decoder.decode_bytes(png(1), image_size=SIZE), decode_bytes(png(1), image_size=SIZE))
    assert reason_of(decoder, content) == reason
    assert open_decoder().decode_bytes(content, image_size=SIZE).metadata.width == 10_000


def test_a_file_that_alone_is_larger_than_the_memory_is_refused(open_decoder: Callable[..., IsolatedDecoder]) -> None:
    decoder = open_decoder(max_memory_bytes=64 * 2**20)
    assert "needs more than 64 MiB" in reason_of(decoder, png(1) + bytes(100 * 2**20))
    assert decoder.inspect_bytes(png(1)).width == 60


def test_a_deep_grey_picture_whose_memory_leaves_none_for_numpy_is_refused_for_that(
    open_decoder: Callable[..., IsolatedDecoder],
) -> None:
    decoder = open_decoder(max_memory_bytes=64 * 2**20)
    assert "needs more than 64 MiB" in reason_of(decoder, deep_grey_png(4000))
    assert decoder.decode_bytes(deep_grey_png(40), image_size=SIZE).metadata.width == 40


def deep_grey_png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("I;16", (side, side)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def test_what_a_photo_leaves_behind_does_not_count_against_the_next(
    open_decoder: Callable[..., IsolatedDecoder],
) -> None:
    decoder = open_decoder(max_memory_bytes=100 * 2**20)
    for side in (4600, 50, 4600, 3000, 4600):  # 85 MB of pixels at most
        assert decoder.decode_bytes(large_png(side), image_size=SIZE).metadata.width == side


# -- what a hijacked child may say -----------------------------------------------------------------------------------

METADATA = {"width": 60, "height": 40, "taken_at": None, "camera": None, "latitude": None, "longitude": None}


def answer(content: object, *, pixels: bytes = b"", length: int | None = None, number: int = 1) -> bytes:
    encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
    return ANSWER.pack(number, len(encoded) if length is None else length) + encoded + pixels


LIES = {
    "an enormous length": answer(METADATA, length=2**32 - 1) + bytes(20_000),
    "the answer to another": answer(METADATA, pixels=bytes(3 * SIZE * SIZE), number=2),
    "no JSON": answer(b"\x80\x04K\x01."),
    "deep JSON": answer(b"[" * 16_000),
    "no object": answer([1, 2]),
    "nothing": answer({}),
    "a key too many": answer({**METADATA, "id": 1}),
    "an enormous picture": answer({**METADATA, "width": 2**31, "height": 2**31}),
    "no pixels": answer({**METADATA, "width": 0}),
    "negative sides": answer({**METADATA, "width": -60, "height": -40}),
    "a width that is true": answer({**METADATA, "width": True}),
    "a width that is text": answer({**METADATA, "width": "60"}),
    "a camera that is a list": answer({**METADATA, "camera": ["x"]}),
    "a camera with control characters": answer({**METADATA, "camera": "\x1b[2J"}),
    "a time that is none": answer({**METADATA, "taken_at": "yesterday"}),
    "a place off the Earth": answer({**METADATA, "latitude": 91.0, "longitude": 0.0}),
    "a place that is no number": answer(
        b'{"width":1,"height":1,"taken_at":null,"camera":null,"latitude":NaN,"longitude":0.5}'
    ),
    "a reason that is no text": answer({"reason": ["x"]}),
    "a reason with control characters": answer({"reason": "\x1b]0;\x07"}),
}


@pytest.mark.usefixtures("hostile")
def test_the_memory_of_a_child_that_lies_is_not_kept(open_decoder: Callable[..., IsolatedDecoder]) -> None:
    decoder = open_decoder(max_seconds=1)
    twice = answer(METADATA) * 2
    decoder.decode_bytes(b"LIE:" + twice, image_size=SIZE)  # what it says of the photo itself has to be believed
    assert_same(decoder.decode_bytes(png(1), image_size=SIZE), decode_bytes(png(1), image_size=SIZE))


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.usefixtures("hostile")
def test_nonsense_from_the_child_is_not_believed(lie: str, open_decoder: Callable[..., IsolatedDecoder]) -> None:
    decoder = open_decoder(max_seconds=1)
    assert reason_of(decoder, b"LIE:" + LIES[lie]) == "crashes its decoder (which answers nonsense)"
    assert not children()


@pytest.mark.parametrize("said", [b"", answer(METADATA, length=300), answer(METADATA, pixels=bytes(100))])
@pytest.mark.usefixtures("hostile", "pipes_only")
def test_a_child_that_stops_in_mid_answer_and_its_own_clock_is_killed(
    said: bytes, open_decoder: Callable[..., IsolatedDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("searchengine.isolation.GRACE_SECONDS", 0.5)
    decoder = open_decoder(max_seconds=0.5)
    assert "takes longer than 0.5 s" in reason_of(decoder, b"LIE:" + said)
    assert not children()


@pytest.mark.usefixtures("hostile", "pipes_only")
def test_an_answer_too_much_does_not_become_the_next_photos(open_decoder: Callable[..., IsolatedDecoder]) -> None:
    decoder = open_decoder(max_seconds=1)
    pixels = bytes(3 * SIZE * SIZE)
    lie = answer(METADATA, pixels=pixels)
    photo = decoder.decode_bytes(b"LIE:" + lie + lie, image_size=SIZE)
    assert not photo.pixels.any()  # what it says of the photo itself has to be believed
    assert_same(decoder.decode_bytes(png(1), image_size=SIZE), decode_bytes(png(1), image_size=SIZE))


# -- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hostile")
def test_closing_ends_what_is_under_way_in_another_thread(
    open_decoder: Callable[..., IsolatedDecoder], tmp_path: Path
) -> None:
    decoder = open_decoder()
    reasons: list[str] = []
    mark = tmp_path / "mark"
    thread = threading.Thread(target=lambda: reasons.append(reason_of(decoder, b"SLEEP:" + bytes(mark))))
    thread.start()
    wait_until(mark.exists)
    started = time.monotonic()
    decoder.close()
    thread.join()
    assert time.monotonic() - started < 3
    assert len(reasons) == 1
    assert not children()
    assert "interrupted" in reason_of(decoder, png(1))


PARENT = """
    import signal, sys
    from pathlib import Path
    from searchengine.decode import DecodeLimits
    from searchengine.isolation import IsolatedDecoder
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which who runs the tests may have told to ignore
    decoder = IsolatedDecoder(limits=DecodeLimits(max_seconds=1))
    decoder.inspect_bytes(Path(sys.argv[1]).read_bytes())
    print("ready", flush=True)
    decoder.inspect_bytes(sys.argv[2].encode()) if sys.argv[2] else sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("number", "work"),
    [
        (signal.SIGKILL, ""),
        (signal.SIGTERM, ""),
        (signal.SIGINT, ""),
        (signal.SIGKILL, "HANG:"),
        (signal.SIGINT, "HANG:"),
        (signal.SIGKILL, "SLEEP:"),
    ],
)
@pytest.mark.usefixtures("hostile")
def test_no_process_is_left_whatever_ends_the_parent(work: str, number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), tmp_path / "a.png", work],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        (child,) = children(parent.pid)
        time.sleep(0.1)
        parent.send_signal(number)
        wait_until(lambda: not is_alive(child), seconds=6)


def test_where_no_process_can_be_started_no_photo_is_blamed(
    open_decoder: Callable[..., IsolatedDecoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = open_decoder()
    for executable in ("/nowhere/python", "/bin/false", "/bin/true"):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(SearchEngineError, match="process to decode photos") as error:
            decoder.inspect_bytes(png(1))
        assert not isinstance(error.value, ImageError)
        assert not children()
    monkeypatch.undo()
    assert decoder.inspect_bytes(png(1)).width == 60


def test_without_the_means_of_unix_it_still_works_and_ends_in_time(
    open_decoder: Callable[..., IsolatedDecoder], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bare = "import signal, sys\nsys.modules['resource'] = None\ndel signal.setitimer, signal.SIGALRM\n"
    (tmp_path / "sitecustomize.py").write_text(bare + SITECUSTOMIZE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for module in ("isolation", "shared_memory"):
        monkeypatch.setattr(f"searchengine.{module}.fcntl", None)
    monkeypatch.delattr(select, "poll")
    decoder = open_decoder(max_seconds=1)
    expected = decode_bytes(png(1), image_size=SIZE)
    assert_same(decoder.decode_bytes(png(1), image_size=SIZE), expected)
    assert reason_of(decoder, b"HANG:") == "takes longer than 1 s to decode (setting max_decode_seconds)"
    assert reason_of(decoder, b"ABORT:" + bytes(2**22)) == "crashes its decoder (SIGABRT)"
    assert_same(decoder.decode_bytes(png(1) + bytes(2**22), image_size=SIZE), expected)


# -- many at once, in order ------------------------------------------------------------------------------------------


class Shelf:
    """A store of photos in memory."""

    name = "shelf"
    prefix = "/"
    reads_at_once = 0

    def __init__(self, contents: list[bytes]) -> None:
        self.contents = contents

    def read(self, key: str, *, max_bytes: int) -> tuple[StoredPhoto, bytes]:
        return StoredPhoto(key, 1, 1), self.contents[int(key)]


def reader(*, known: set[bytes] | None = None, workers: int = 2, limits: DecodeLimits = DEFAULT_LIMITS) -> PhotoReader:
    return PhotoReader(
        known=known or set(),  # type: ignore[arg-type]
        image_size=SIZE,
        limits=limits,
        workers=workers,
        ahead=5,
        isolated=True,
    )


def changes(contents: list[bytes]) -> list[Change]:
    shelf = Shelf(contents)
    return [
        Change(store=shelf, listed=StoredPhoto(str(number), 1, 1), known=False)  # type: ignore[arg-type]
        for number in range(len(contents))
    ]


EXPECTED = {seed: decode_bytes(png(seed), image_size=SIZE) for seed in range(8)}
BAD = {
    b"ABORT:": "crashes its decoder (SIGABRT)",
    b"HANG:": "takes longer than 0.3 s to decode (setting max_decode_seconds)",
    b"EXIT:": "crashes its decoder (exit code 5)",
    b"no picture": "not a picture in a supported format",
    png(1)[:200]: "damaged: the file is truncated",
}


@given(st.lists(st.one_of(st.integers(0, 7), st.integers(0, 7), st.sampled_from(list(BAD))), min_size=3, max_size=9))
@settings(max_examples=8)
@pytest.mark.usefixtures("hostile")
def test_restarts_neither_lose_nor_mix_answers(sequence: list[int | bytes]) -> None:
    contents = [png(item) if isinstance(item, int) else item for item in sequence]
    outcomes = list(reader(limits=DecodeLimits(max_seconds=0.3)).read_all(changes(contents), stop=threading.Event()))
    assert [outcome.change.listed.key for outcome in outcomes] == [str(number) for number in range(len(sequence))]
    for item, outcome in zip(sequence, outcomes, strict=True):
        if isinstance(item, int):
            assert isinstance(outcome, Decoded), outcome
            assert_same(outcome.photo, EXPECTED[item])
        else:
            assert isinstance(outcome, Failed)
            assert (outcome.reason, outcome.damaged) == (BAD[item], True)
    assert not children()


def test_where_one_process_is_enough_the_others_never_start() -> None:
    with closing(reader(workers=16).read_all(changes([png(1)]), stop=threading.Event())) as outcomes:
        assert isinstance(next(outcomes), Decoded)
        assert len(children()) == 1
    assert not children()


@pytest.mark.usefixtures("hostile")
def test_a_run_that_is_broken_off_leaves_no_process_and_does_not_wait_for_a_hang() -> None:
    outcomes = reader().read_all(
        changes([png(1), png(2), b"HANG:", b"HANG:", png(3), png(4), png(5)]), stop=threading.Event()
    )
    next(outcomes)
    time.sleep(0.5)
    started = time.monotonic()
    outcomes.close()
    assert time.monotonic() - started < 3
    assert not children()
    with (
        pytest.raises(RuntimeError, match="disk"),
        closing(reader().read_all(changes([png(1)] * 20), stop=threading.Event())) as outcomes,
    ):
        for _ in outcomes:
            raise RuntimeError("the disk is full")
    assert not children()


@pytest.mark.usefixtures("hostile")
def test_a_run_that_is_to_stop_does_not_wait_for_a_hang() -> None:
    stop = threading.Event()
    outcomes = reader().read_all(changes([png(1), b"HANG:", b"HANG:", png(2)]), stop=stop)
    assert isinstance(next(outcomes), Decoded)
    threading.Timer(0.5, stop.set).start()
    started = time.monotonic()
    assert list(outcomes) == []
    assert time.monotonic() - started < 3
    assert not children()


@pytest.mark.usefixtures("hostile")
def test_a_decoder_that_is_killed_from_outside_is_no_damage_to_the_photo(tmp_path: Path) -> None:
    """As the kernel does when memory runs out: what is known of the photo stays, and it is tried again."""
    mark = tmp_path / "mark"

    def kill() -> None:
        wait_until(mark.exists)
        os.kill(children()[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    (outcome,) = reader().read_all(changes([b"SLEEP:" + bytes(mark)]), stop=threading.Event())
    thread.join()
    assert isinstance(outcome, Failed)
    assert (outcome.reason, outcome.damaged) == ("its decoder was killed, as happens when memory runs out", False)


@pytest.mark.usefixtures("hostile")
def test_content_that_was_decoded_before_is_never_taken_for_damaged() -> None:
    known = {hashlib.sha256(b"ABORT:").digest()}
    (outcome,) = reader(known=known).read_all(changes([b"ABORT:"]), stop=threading.Event())
    assert isinstance(outcome, Failed)
    assert not outcome.damaged


def test_a_known_content_is_only_inspected() -> None:
    content = png(3)
    known = {hashlib.sha256(content).digest()}
    (outcome,) = reader(known=known).read_all(changes([content]), stop=threading.Event())
    assert isinstance(outcome, Known)
    assert outcome.metadata == inspect_bytes(content)


def test_a_reader_that_can_start_no_process_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(SearchEngineError, match="ulimit"):
        list(reader().read_all(changes([png(1)]), stop=threading.Event()))
