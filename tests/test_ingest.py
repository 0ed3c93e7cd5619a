"""Indexing at speed: the stages work at once, tell who sets the pace, and give back what one after the other would."""

from __future__ import annotations

import errno
import io
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeEncoder
from torch import Tensor

import indexer.crawl
import indexer.pipeline
import indexer.reading
import indexer.report
import indexer.writer
import searchengine.cli.output
from indexer.encoding import BATCHES_AT_ONCE, Batch, EncoderThreads
from indexer.pipeline import build
from indexer.reading import Decoded
from indexer.reencode import reencode
from indexer.report import STAGES, Progress, StageClock
from searchengine.cli.output import pace, progress_bar
from searchengine.decode import Photo
from searchengine.errors import IndexUnusable, ModelUnusable
from searchengine.index.reader import Index
from searchengine.metadata import PhotoMetadata
from searchengine.models.devices import LargestBatch
from searchengine.vectors import FloatMatrix, PixelBatch

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.append(str(SCRIPTS))

import bench_ingest  # noqa: E402
import bench_ingest_photos  # noqa: E402
import bench_ingest_plot  # noqa: E402

Paint = Callable[..., Path]


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        self.now = 100.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch, indexer.report)


def work(stages: StageClock, clock: Clock, **seconds: float) -> None:
    """One after the other; the clock does not go on while other threads would work at the same time."""
    started = clock.now
    for stage, took in seconds.items():
        with stages.working(stage):  # type: ignore[arg-type]
            clock.now += took
        clock.now = started


@pytest.mark.parametrize(
    ("seconds", "busiest"),
    [
        ({"read": 1, "decode": 4, "encode": 9.5, "write": 0.5}, ("encode", 0.95)),
        ({"read": 2, "hash": 1, "decode": 16, "encode": 8}, ("decode", 0.95)),
        ({"read": 14, "decode": 4, "encode": 8}, ("read", 0.9)),
        ({"read": 1, "decode": 2, "encode": 2, "write": 7}, ("write", 0.7)),
    ],
)
def test_the_stage_that_works_most_of_its_time_sets_the_pace(
    clock: Clock, seconds: dict[str, float], busiest: tuple[str, float]
) -> None:
    stages = StageClock(workers=2)
    work(stages, clock, **seconds)
    clock.now += 10
    assert stages.busiest() == (busiest[0], pytest.approx(busiest[1]))


def test_what_came_before_the_photos_does_not_count_for_the_pace(clock: Clock) -> None:
    stages = StageClock(workers=1)
    work(stages, clock, list=50, write=40)
    clock.now += 50
    stages.restart()
    assert stages.busiest() is None
    work(stages, clock, encode=1)
    clock.now += 2
    assert stages.busiest() == ("encode", 0.5)
    assert stages.seconds() == dict.fromkeys(STAGES, 0.0) | {"list": 50, "write": 40, "encode": 1}


def test_a_stage_counts_though_it_fails(clock: Clock) -> None:
    stages = StageClock()
    with pytest.raises(OSError, match="gone"), stages.working("read"):
        clock.now += 3
        raise OSError("gone")
    assert stages.seconds()["read"] == 3


class Paced(FakeEncoder):
    """Waits in its first batch for the run to go on, which it never does if it waits for the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = threading.Event()
        self.waited_for_nothing = False

    def encode_pixels(self, pixels: PixelBatch) -> FloatMatrix:
        if not self.may_go_on.wait(timeout=20):
            self.waited_for_nothing = True
        return super().encode_pixels(pixels)


def test_photos_are_decoded_and_recorded_while_the_encoder_works(tmp_path: Path, paint: Paint) -> None:
    for number in range(12):
        paint(f"photos/{number:02}.png", number)
    encoder = Paced()

    def on_progress(progress: Progress) -> None:
        if progress.done >= 3:  # taken from the readers, though the first batch cannot be done
            encoder.may_go_on.set()

    report = build(
        tmp_path / "index",
        [tmp_path / "photos"],
        encoder=encoder,
        batch_size=3,
        workers=1,
        isolated=False,
        on_progress=on_progress,
    )
    assert not encoder.waited_for_nothing
    assert report.added == 12
    assert encoder.batches == [3, 3, 3, 3]


def test_a_batch_is_committed_when_it_is_encoded_however_slow_the_next_photos_are(
    tmp_path: Path, paint: Paint, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        paint(f"photos/{number}.png", number)
    monkeypatch.setattr(indexer.pipeline, "COMMIT_EVERY_SECONDS", 0)
    decode, encode = indexer.reading.decode_bytes, encoder.encode_pixels
    committed: list[int] = []
    encoded = threading.Event()

    def told(pixels: PixelBatch) -> FloatMatrix:
        embeddings = encode(pixels)
        encoded.set()
        return embeddings

    def slow(data: bytes, **options: Any) -> Any:
        if data == (tmp_path / "photos/5.png").read_bytes():  # the second batch is not full without it
            deadline = time.monotonic() + 3
            while not (photos := photos_in(tmp_path / "index")) and time.monotonic() < deadline:
                time.sleep(0.02)
            committed.append(photos)
        elif data == (tmp_path / "photos/4.png").read_bytes():
            assert encoded.wait(timeout=20)
            time.sleep(0.1)  # for the encoder's thread to say so
        return decode(data, **options)

    monkeypatch.setattr(encoder, "encode_pixels", told)
    monkeypatch.setattr(indexer.reading, "decode_bytes", slow)
    report = build(tmp_path / "index", [tmp_path / "photos"], encoder=encoder, batch_size=3, workers=1, isolated=False)
    assert committed == [3]
    assert report.added == 6


def photos_in(index: Path) -> int:
    with Index(index) as opened:
        return opened.count_images()


class Failing(FakeEncoder):
    def encode_pixels(self, pixels: PixelBatch) -> FloatMatrix:
        raise ModelUnusable("the device is gone")


def test_what_the_encoder_raises_ends_the_run_with_that(tmp_path: Path, paint: Paint) -> None:
    paint("photos/a.png")
    with pytest.raises(ModelUnusable, match="the device is gone"):
        build(tmp_path / "index", [tmp_path / "photos"], encoder=Failing(), isolated=False)
    assert not encoder_threads(), "its thread still waits for work"


def encoder_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("encode")]


class Slow(FakeEncoder):
    def encode_pixels(self, pixels: PixelBatch) -> FloatMatrix:
        time.sleep(0.2)
        return super().encode_pixels(pixels)


def test_a_disk_that_fills_while_the_encoder_works_ends_the_run_and_its_threads(
    tmp_path: Path, paint: Paint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(9):
        paint(f"photos/{number}.png", number)

    def is_full(*arguments: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(indexer.pipeline, "COMMIT_EVERY_PHOTOS", 2)
        full.setattr(indexer.writer, "write_segment", is_full)
        with pytest.raises(IndexUnusable, match="No space left"):
            build(tmp_path / "index", [tmp_path / "photos"], encoder=Slow(), batch_size=3, isolated=False)
        assert not encoder_threads(), "the encoder still works for a run that is over"
    assert build(tmp_path / "index", [tmp_path / "photos"], encoder=Slow(), isolated=False).added == 9


def test_a_run_keeps_nothing_of_photos_that_are_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(1000):
        (tmp_path / "photos" / f"{number}.png").write_bytes(number.to_bytes(2, "big"))
    photo = Photo(pixels=np.zeros((32, 32, 3), dtype=np.uint8), metadata=PhotoMetadata(width=1, height=1))
    commit, held_bytes = indexer.writer.IndexWriter.commit, []

    def weigh(*arguments: Any, **options: Any) -> None:
        commit(*arguments, **options)
        held_bytes.append(tracemalloc.get_traced_memory()[0])

    monkeypatch.setattr(indexer.reading.InProcessDecoder, "decode_bytes", lambda *_, **__: photo)
    monkeypatch.setattr(indexer.writer.IndexWriter, "commit", weigh)
    monkeypatch.setattr(indexer.pipeline, "COMMIT_EVERY_PHOTOS", 50)
    monkeypatch.setattr(indexer.crawl, "ROWS_PER_PAGE", 50)
    tracemalloc.start()
    try:
        report = build(
            tmp_path / "index", [tmp_path / "photos"], encoder=FakeEncoder(), batch_size=10, workers=1, isolated=False
        )
    finally:
        tracemalloc.stop()
    assert report.added == 1000
    early, late = min(held_bytes[3:6]), min(held_bytes[15:18])
    # A set of the hashes alone would take 100 bytes a photo.
    assert late - early < 40 * 12 * 50, f"{(late - early) / (12 * 50):.0f} bytes are kept of each photo"


def test_a_change_of_the_model_tells_its_pace_too_once_there_is_one(
    tmp_path: Path, photos: Path, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "index", [photos], encoder=encoder, isolated=False)
    commit = indexer.writer.IndexWriter.commit

    def slow(*arguments: Any, **options: Any) -> None:
        time.sleep(0.5)
        commit(*arguments, **options)

    monkeypatch.setattr(indexer.writer.IndexWriter, "commit", slow)
    seen: list[Progress] = []
    reencode(tmp_path / "index", encoder=FakeEncoder(name="new"), isolated=False, on_progress=seen.append)
    assert seen[0].busiest is None
    assert seen[-1].busiest is not None
    assert seen[-1].busiest[0] == "write"


@pytest.fixture
def encoding(encoder: FakeEncoder) -> Iterator[EncoderThreads]:
    threads = EncoderThreads(encoder, clock=StageClock())
    yield threads
    threads.close()


def decoded(seed: int) -> Decoded:
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    photo: Any = SimpleNamespace(pixels=pixels)
    change: Any = None
    return Decoded(change=change, content_hash=bytes([seed]), photo=photo)


def test_batches_come_back_in_their_order_with_their_own_vectors(
    encoding: EncoderThreads, encoder: FakeEncoder
) -> None:
    batches = [Batch(decoded=[decoded(seed), decoded(seed + 1)]) for seed in range(0, 10, 2)]
    batches.insert(3, Batch())
    back = [done for batch in batches for done in encoding.hand_over(batch)]
    assert len(back) == len(batches) - BATCHES_AT_ONCE
    assert encoding.hashes_under_way == {photo.content_hash for batch in batches[-2:] for photo in batch.decoded}
    back += encoding.take_back()
    assert all(one is other for one, other in zip(back, batches, strict=True))
    assert not encoding.take_back()
    for batch in filter(lambda batch: batch.decoded, batches):
        expected = encoder.encode_pixels(np.stack([photo.photo.pixels for photo in batch.decoded]))
        np.testing.assert_array_equal(batch.embeddings, expected)


def test_after_the_first_batch_which_may_load_the_encoder_two_are_encoded_at_once(
    encoding: EncoderThreads, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, at_once, together = encoder.encode_pixels, [0], threading.Barrier(2)
    seen: list[int] = []

    def told(pixels: PixelBatch) -> FloatMatrix:
        at_once[0] += 1
        seen.append(at_once[0])
        if len(seen) > 1:
            together.wait(timeout=20)  # the second and the third meet here
        at_once[0] -= 1
        return encode(pixels)

    monkeypatch.setattr(encoder, "encode_pixels", told)
    first, second, third = (Batch(decoded=[decoded(seed)]) for seed in range(3))
    assert not encoding.hand_over(first)
    assert encoding.hand_over(second) == [first]  # waits for it
    assert not encoding.hand_over(third)
    assert encoding.take_back() == [second, third]
    assert sorted(seen) == [1, 1, 2]


def test_what_the_encoder_raises_is_raised_whenever_its_batch_is_taken_back(
    encoding: EncoderThreads, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(pixels: PixelBatch) -> FloatMatrix:
        raise ModelUnusable("it broke")

    monkeypatch.setattr(encoder, "encode_pixels", fail)
    encoding.hand_over(Batch(decoded=[decoded(0)]))
    for _ in range(2):
        with pytest.raises(ModelUnusable, match="it broke"):
            encoding.take_back()


def test_time_in_which_two_batches_were_encoded_counts_once(
    encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, encode = StageClock(), encoder.encode_pixels
    monkeypatch.setattr(encoder, "encode_pixels", lambda pixels: (time.sleep(0.03), encode(pixels))[1])
    encoding = EncoderThreads(encoder, clock=clock)
    started = time.monotonic()
    for seed in range(12):
        encoding.hand_over(Batch(decoded=[decoded(seed)]))
    encoding.take_back()
    encoding.close()
    assert 0 < clock.seconds()["encode"] <= time.monotonic() - started


def test_time_in_which_one_batch_was_encoded_counts_though_another_began_and_ended_meanwhile(
    encoding: EncoderThreads, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    monkeypatch.setattr("indexer.encoding.time", indexer.report.time)
    encode, long_began, short_ended = encoder.encode_pixels, threading.Event(), threading.Event()

    def take(pixels: PixelBatch) -> FloatMatrix:
        clock.now += len(pixels)
        if len(pixels) == 4:
            long_began.set()
            assert short_ended.wait(timeout=20)
            clock.now += 8
        return encode(pixels)

    encoding.hand_over(Batch(decoded=[decoded(0)]))
    encoding.take_back()
    monkeypatch.setattr(encoder, "encode_pixels", take)
    before, started = encoding._clock.seconds()["encode"], clock.now
    encoding.hand_over(Batch(decoded=[decoded(seed) for seed in range(4)]))
    assert long_began.wait(timeout=20)
    encoding.hand_over(Batch(decoded=[decoded(5), decoded(6)]))
    _, short = encoding._under_way[-1]
    assert short is not None
    short.result(timeout=20)
    short_ended.set()
    encoding.take_back()
    assert encoding._clock.seconds()["encode"] - before == clock.now - started == 14


def test_a_run_tells_how_long_each_stage_worked(tmp_path: Path, photos: Path, encoder: FakeEncoder) -> None:
    seen: list[Progress] = []
    report = build(tmp_path / "index", [photos], encoder=encoder, isolated=False, on_progress=seen.append)
    assert list(report.as_dict()["seconds_by_stage"]) == list(STAGES)
    assert report.seconds_by_stage["decode"] > 0
    assert seen[0].busiest is None
    assert seen[-1].busiest is not None
    assert 0 < seen[-1].busiest[1] <= 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_names_the_stage_that_sets_the_pace_and_stays_in_its_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch, searchengine.cli.output)
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("indexing") as advance:
        advance(0, 400)
        clock.now += 2
        advance(100, 400, pace(("encode", 0.978)))
        line = shown.getvalue().split("\r\x1b[K")[-1]
        assert line.endswith("100/400, 50.0/s, 6 s left, limit: encode, at 98 %")
        monkeypatch.setenv("COLUMNS", "40")
        clock.now += 1
        advance(200, 400, pace(("encode", 0.978)))
        assert len(shown.getvalue().split("\r\x1b[K")[-1]) == 39


def test_where_there_is_no_terminal_nothing_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("indexing") as advance:
        advance(1, 2, pace(("decode", 1.0)))
    assert capsys.readouterr() == ("", "")
    assert pace(None) == ""


class Memory:
    """Work on a device that holds `room` rows at once."""

    def __init__(self, room: int) -> None:
        self.room, self.tried = room, []  # type: tuple[int, list[int]]

    def __call__(self, rows: Tensor) -> Tensor:
        self.tried.append(len(rows))
        if len(rows) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows * 2


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_that_is_remembered() -> None:
    inputs, memory, largest = torch.arange(40), Memory(room=6), LargestBatch(32)
    assert torch.equal(torch.cat(list(largest.run(memory, inputs))), inputs * 2)
    assert memory.tried == [32, 16, 8, 4, *[4] * 9]
    memory.tried.clear()
    list(largest.run(memory, inputs[:6]))
    assert memory.tried == [4, 2]


def test_a_device_without_room_for_one_photo_is_an_error_that_says_so() -> None:
    with pytest.raises(ModelUnusable, match="--device cpu"):
        list(LargestBatch(8).run(Memory(room=0), torch.arange(3)))


# -- scripts/bench_ingest.py ------------------------------------------------------------------------------------


def result(rates: list[float], *, encode: float = 0, decode: float = 0) -> bench_ingest.Result:
    limits = ([encode] * len(rates), [decode] * len(rates)) if encode else ([], [])
    return bench_ingest.Result(rates=rates, cpu_ms=rates, encode_limits=limits[0], decode_limits=limits[1])


def test_goals_compare_within_a_round_and_with_the_best_peer() -> None:
    small = {
        "script 1": result([9, 4]),
        "clip-retrieval": result([17, 8]),
        "rclip fp32": result([18, 9]),
        "rclip int8": result([40, 20]),  # no peer at fp32
        "ours fp32": result([22, 11], encode=24, decode=300),
        "ours int8": result([54, 18], encode=60, decode=300),
    }
    large = {  # the fastest of those that decode all and encode one after the other
        "script 32": result([2, 2]),
        "rclip fp32": result([2.5, 2.5]),
        "clip-retrieval": result([3, 3]),
        "ours int8": result([14, 14], encode=20, decode=80),
    }
    results = {"500 x 375": small, "12 MP": large}
    goals = {goal: (found, met) for goal, found, met in bench_ingest.goals(results, {1000: 50, 5000: 60})}
    in_sequence = "at least 6: ours, int8, 12 MP, times as fast as rclip's way, batch 8: all decoded, fp32, in sequence"
    assert goals[in_sequence] == (pytest.approx(5.6), False)
    best = "at least 1.15: ours, fp32, times as fast as rclip's way, batch 8"
    assert goals[best] == (pytest.approx(11 / 9), True)
    assert goals["at least 2.5: ours, int8, times as fast as rclip's way, batch 8"] == (pytest.approx(2.5), True)
    share = statistics_of([54 * (1 / 60 + 1 / 300), 18 * (1 / 60 + 1 / 300)])
    assert goals["at least 0.9: ours, int8, 500 x 375, of 1/(1/E + 1/D)"] == (pytest.approx(share), False)
    assert goals["at most 1.1: memory at 5,000 photos to that at 1,000"] == (pytest.approx(1.2), False)


def statistics_of(values: list[float]) -> float:
    return sum(values) / len(values)  # the median of two


def test_the_photos_of_the_benchmark_are_distinct_and_of_the_size_that_is_said(tmp_path: Path, paint: Paint) -> None:
    for number in range(2):
        paint(f"source/{number}.png", number)
    files = bench_ingest_photos.make(tmp_path / "source", tmp_path / "made", size="500 x 375", count=6)
    assert len({file.read_bytes() for file in files}) == 6
    assert {bench_ingest_photos.Image.open(file).size for file in files} == {(500, 375)}


def test_the_plot_has_a_bar_for_each_contender(tmp_path: Path) -> None:
    bench_ingest_plot.draw({"12 MP": {"ours": 20.0, "rclip's way": 4.0}}, tmp_path / "plot.png", title="here")
    image = np.asarray(bench_ingest_photos.Image.open(tmp_path / "plot.png").convert("RGB"))
    reds, greys = ((image == colour).all(2).sum() for colour in ((214, 39, 40), (127, 127, 127)))
    assert reds > 4 * greys > 0
