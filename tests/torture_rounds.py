"""One round of torture: an index, its photos, and those who are killed while they write it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fakes import FakeEncoder
from torture_faults import Calls, Child, Kill, orphans
from torture_model import Dump, differences, dump, instabilities, leftovers, photos_in
from torture_photos import Library

import indexer.compact
import indexer.pipeline
import indexer.verify
import searchengine.cli
import searchengine.cli.index
from searchengine.errors import IndexNotFound
from searchengine.index.reader import Index
from searchengine.vectors import Encoder

RUN_SECONDS = 120.0
EMPTY: Dump = {"photos": {}, "failures": {}, "vectors": {}}


class Divergence(Exception):
    """The index is not what it should be, or somebody did what they should not."""


def load(name: str) -> Encoder:
    if name == "fake":
        return FakeEncoder()
    import torch

    from searchengine.models.registry import load_encoder

    torch.set_num_threads(1)
    return load_encoder(name, device="cpu")


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a run works: small batches and commits put many of them into one run."""

    workers: int
    batch_size: int
    commit_every: int
    isolated: bool


class Round:
    def __init__(self, folder: Path, *, seed: int, sources: Sequence[Path], encoder: Encoder) -> None:
        # Two sources of chance, for what is killed depends on how fast this machine is, and what changes must not.
        self._chance = random.Random(seed)
        self._kill_chance = random.Random(f"kills of {seed}")
        chosen = self._chance.sample(list(sources), min(len(sources), 40))
        self._library = Library(folder / "photos", chosen, chance=self._chance)
        self._folder = folder
        self._index = folder / "index"
        self._log = folder / "log"
        self._temporary = folder / "tmp"
        self._embedded = folder / "embedded"
        self._encoder = encoder
        self._temporary.mkdir()
        self._story: list[str] = []
        self._started = time.monotonic()
        self._last = EMPTY
        self.kills = 0
        self.changes = 0

    def told(self) -> str:
        return f"{'; '.join(self._story)} ({time.monotonic() - self._started:.1f} s)"

    def play(self) -> None:
        self._library.fill(self._chance.randrange(5, 30))
        for _ in range(self._chance.randrange(1, 5)):
            self._change(self._chance.randrange(0, 20))
            self._chapter()
            if self._kill_chance.random() < 0.2:
                self._damage_and_repair()

    def _change(self, count: int) -> None:
        for _ in range(count):
            self._library.change()
        self.changes += count

    def _chapter(self) -> None:
        """Some runs that are killed, and one that is not; then the index is held against a new one."""
        calls, seconds = self._like_run()
        reader = Child(partial(read_along, self._index), log=self._log) if self._kill_chance.random() < 0.3 else None
        disturbed = compacted = False
        for _ in range(self._kill_chance.choice((0, 1, 1, 2, 2, 3, 4))):
            if self._committed() is not EMPTY and self._kill_chance.random() < 0.2:
                self._killed_compaction()
                compacted = True
            else:
                disturbed |= self._killed_run(calls, seconds)
        self._finish()
        if reader:
            reader.send(signal.SIGTERM)
            status, _ = reader.wait(seconds=10)
            self._expect(status == 0, f"a reader ended with {status}: {self._end_of_log()}")
        self._hold_against_model(ids=not disturbed, vectors=not compacted)

    def _like_run(self) -> tuple[Counter[str], float]:
        """What calls a run makes that is not killed, and how long it takes; on a copy of the index."""
        like = self._folder / "like"
        self._copy_index(like)
        answer, seconds = self._run(self._build(like, self._manner()))
        return Counter(answer["calls"]), seconds

    def _killed_compaction(self) -> None:
        """Whether it is killed or not, no photo may change, nor its vector."""
        before = self._committed()
        like = self._folder / "like"
        self._copy_index(like)
        calls = Counter(self._run(self._watched(partial(compact, like), self._manner()))[0]["calls"])
        job = partial(self._watched, partial(compact, self._index), self._manner())
        told = f"compact {self._kill_at_a_call(calls, job)}"
        self._story.append(told)
        now = self._committed()
        for photo in (*before["photos"].values(), *now["photos"].values()):
            del photo["segment"]
        same = all(now[kind] == before[kind] for kind in ("photos", "failures"))
        self._expect(same, f"{told}: the photos are not what they were")

    def _damage_and_repair(self) -> None:
        """Spoil some files; what a repair that is killed and one that is not leave must be made whole by a run."""
        if not self._last["photos"]:
            return
        spoiled = self._spoil()
        for _ in range(self._kill_chance.randrange(3)):
            like = self._folder / "like"
            self._copy_index(like)
            calls = Counter(self._run(self._watched(partial(verify, like, repair=True), self._manner()))[0]["calls"])
            job = partial(self._watched, partial(verify, self._index, repair=True), self._manner())
            self._story.append(f"repair {self._kill_at_a_call(calls, job)}")
        self._run(lambda: verify(self._index, repair=True))
        left = self._run(lambda: verify(self._index))[0]
        self._expect(not left, f"after a repair verify found {left}")
        kept = {name: photo for name, photo in self._last["photos"].items() if photo["segment"] not in spoiled}
        self._last = {"photos": kept, "failures": {}, "vectors": {}}
        self._finish()
        self._hold_against_model(ids=True, vectors=False)

    def _spoil(self) -> list[int]:
        """The segments that are no longer what they were."""
        chance = self._kill_chance
        files = sorted((self._index / "segments").glob("*.faiss"))
        some = chance.sample(files, min(len(files), chance.randrange(3)))
        for file in some:
            how = chance.choice(("delete", "truncate", "damage"))
            self._story.append(f"{how} {file.name}")
            if how == "delete":
                file.unlink()
            elif how == "truncate":
                os.truncate(file, chance.randrange(file.stat().st_size))
            else:
                data = bytearray(file.read_bytes())
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
                file.write_bytes(data)
        (self._index / "segments" / f"{chance.randrange(10**8):08}.faiss.tmp").write_bytes(b"left by someone")
        return [int(file.stem) for file in some]

    def _killed_run(self, calls: Counter[str], seconds: float) -> bool:
        """Returns whether the photos changed meanwhile."""
        before = self._committed()
        manner = self._manner()
        ways = (
            self._kill_run_at_a_call,
            self._kill_run_at_a_call,
            self._kill_at_a_time,
            self._interrupt,
            self._disturb,
        )
        how = self._kill_chance.choice(ways)
        self._embedded.unlink(missing_ok=True)
        told = how(manner, calls, seconds)
        self._story.append(told)
        now = self._committed()
        for content, id_ in before["vectors"].items():
            self._expect(now["vectors"].get(content) == id_, f"{told}: the committed vector {id_} is lost")
        lost = self._count_embedded() - (len(now["vectors"]) - len(before["vectors"]))
        # What was about to be committed, and the batches that were encoded meanwhile.
        allowed = manner.commit_every + 3 * manner.batch_size if "killed" in told else 0
        self._expect(0 <= lost <= allowed, f"{told}: {lost} photos embedded in vain, with {manner}")
        return how == self._disturb

    def _kill_run_at_a_call(self, manner: Manner, calls: Counter[str], seconds: float) -> str:
        return self._kill_at_a_call(calls, partial(self._build, self._index, manner))

    def _kill_at_a_call(self, calls: Counter[str], job: Callable[..., Callable[[], Any]]) -> str:
        """Any call, or any of a kind of which each is as likely: most calls open a photo or write a row."""
        chance = self._kill_chance
        name = sorted(calls)[int(chance.random() * len(calls))] if chance.random() < 0.5 else None
        count = calls[name] if name else calls.total()
        kill = Kill(1 + int(chance.random() * count), name)
        note = self._folder / "killed at"
        note.unlink(missing_ok=True)
        status, _ = self._start(job(kill=kill)).wait(seconds=RUN_SECONDS)
        if self._was_killed(status):
            return f"killed at {note.read_text()!r}, {kill.number} of {count}"
        return f"ended before {name or 'call'} {kill.number} of {count}"

    def _kill_at_a_time(self, manner: Manner, calls: Counter[str], seconds: float) -> str:
        pause = self._kill_chance.random() * 1.1 * seconds
        child = self._start(self._build(self._index, manner))
        time.sleep(pause)
        child.send(signal.SIGKILL)
        status, _ = child.wait(seconds=RUN_SECONDS)
        return f"{'killed' if self._was_killed(status) else 'ended'} after {pause:.3f} s"

    def _interrupt(self, manner: Manner, calls: Counter[str], seconds: float) -> str:
        """Ctrl-C or a request to terminate, from the command line: what is done is committed."""
        number = self._kill_chance.choice((signal.SIGINT, signal.SIGTERM))
        pause = self._kill_chance.random() * 1.5 * seconds
        stores = [str(store) for store in self._library.stores]
        flags = ["--index", str(self._index), "--model", "mini", "--workers", str(manner.workers), "--batch-size"]
        child = self._start(self._command("index", *stores, *flags, str(manner.batch_size), manner=manner))
        ready = self._folder / "ready"
        while not ready.exists() and child.is_alive():
            time.sleep(0.001)
        time.sleep(pause)
        child.send(number)
        status, _ = child.wait(seconds=RUN_SECONDS)
        self._expect(
            status in (0, 130), f"after {signal.Signals(number).name} it ended with {status}: {self._end_of_log()}"
        )
        return f"{signal.Signals(number).name} after {pause:.3f} s: {status}"

    def _disturb(self, manner: Manner, calls: Counter[str], seconds: float) -> str:
        """Photos change while they are read; the run ends as if nothing were."""
        child = self._start(self._build(self._index, manner))
        count = self._kill_chance.randrange(1, 10)
        for _ in range(count):
            time.sleep(self._kill_chance.random() * seconds / count)
            self._change(1)
        status, _ = child.wait(seconds=RUN_SECONDS)
        self._expect(status == 0, f"while photos changed, a run ended with {status}: {self._end_of_log()}")
        return f"{count} changes meanwhile"

    def _finish(self) -> None:
        """Run to the end, and once more: then there must be nothing to do."""
        before = len(self._committed()["vectors"])
        self._embedded.unlink(missing_ok=True)
        answer, _ = self._run(self._build(self._index, self._manner()))
        report = answer["result"]
        parts = ("added", "updated", "moved", "unchanged", "failed")
        self._expect(report["scanned"] == sum(report[part] for part in parts), f"the counters do not add up: {report}")
        new, embedded = len(self._committed()["vectors"]) - before, self._count_embedded()
        self._expect(embedded == new, f"{embedded} photos were embedded for {new} new vectors")
        report = self._run(self._build(self._index, self._manner()))[0]["result"]
        to_do = [report[part] for part in ("added", "updated", "moved", "deleted")]
        self._expect(not any(to_do) and self._count_embedded() == embedded, f"a second run found something: {report}")

    def _hold_against_model(self, *, ids: bool, vectors: bool) -> None:
        fresh = self._folder / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        self._run(self._build(fresh, self._manner()))
        now, new, files = self._dump(self._index), self._dump(fresh), photos_in(self._library.stores)
        wrong = differences(now, new, files, same_bits=isinstance(self._encoder, FakeEncoder))
        wrong += instabilities(self._last, now, files, ids=ids, vectors=vectors)
        wrong += self._run(lambda: verify(self._index, stores=True))[0]
        wrong += [f"{name} was left in the index" for name in leftovers(self._index)]
        wrong += [f"{path.name} was left among temporary files" for path in self._temporary.iterdir()]
        wrong += [f"process {process} was left" for process in orphans(seconds=10)]
        self._expect(not wrong, "\n  ".join(["", *wrong[:20]]))
        self._last = now
        self._story.append(f"{len(now['photos'])} photos, {len(now['failures'])} failures")

    # -- those who run -----------------------------------------------------------------------------------------

    def _manner(self) -> Manner:
        chance = self._kill_chance
        return Manner(
            workers=chance.randrange(1, 4),
            batch_size=chance.choice((1, 3, 8, 32)),
            commit_every=chance.choice((2, 7, 30)),
            isolated=chance.random() < 0.1,  # it takes longer to start
        )

    def _build(self, index: Path, manner: Manner, *, kill: Kill | None = None) -> Callable[[], Any]:
        def run() -> dict[str, Any]:
            return indexer.pipeline.build(
                index,
                self._library.stores,
                encoder=self._encoder,
                workers=manner.workers,
                batch_size=manner.batch_size,
                isolated=manner.isolated,
            ).as_dict()

        return self._watched(run, manner, kill=kill)

    def _watched(self, job: Callable[[], Any], manner: Manner, *, kill: Kill | None = None) -> Callable[[], Any]:
        """`job` for a child: what it returns, and the calls that it makes; killed at one of them."""

        def run() -> dict[str, Any]:
            self._prepare(manner)
            calls = Calls(self._folder / "killed at", kill)
            calls.watch()
            return {"result": job(), "calls": dict(calls.names)}

        return run

    def _command(self, *arguments: str, manner: Manner) -> Callable[[], Any]:
        (self._folder / "ready").unlink(missing_ok=True)

        def run() -> None:
            self._prepare(manner)
            searchengine.cli.index.encoder_for = lambda _: self._encoder
            build = indexer.pipeline.build

            def announced(*args: Any, **options: Any) -> Any:
                (self._folder / "ready").touch()
                return build(*args, **options)

            indexer.pipeline.build = announced
            sys.argv = ["searchengine", *arguments]
            os.environ["SEARCHENGINE_DEBUG"] = "1"
            searchengine.cli.main()

        return run

    def _prepare(self, manner: Manner) -> None:
        """In the child: temporary files have a folder of their own, commits come often, embedded photos are counted."""
        os.environ["TMPDIR"] = str(self._temporary)
        indexer.pipeline.COMMIT_EVERY_PHOTOS = manner.commit_every
        encode = self._encoder.encode_pixels
        counted = os.open(self._embedded, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def encode_pixels(pixels: Any) -> Any:
            os.write(counted, b"." * len(pixels))
            return encode(pixels)

        self._encoder.encode_pixels = encode_pixels  # type: ignore[method-assign]

    def _start(self, function: Callable[[], Any]) -> Child:
        return Child(function, log=self._log)

    def _run(self, function: Callable[[], Any]) -> tuple[Any, float]:
        """What a child that must succeed returns, and the seconds it took."""
        child = self._start(function)
        status, answer = child.wait(seconds=RUN_SECONDS)
        self._expect(status == 0, f"a run ended with {status}: {self._end_of_log()}")
        return answer, time.monotonic() - child.started

    def _was_killed(self, status: int) -> bool:
        self._expect(status in (0, -signal.SIGKILL), f"a run ended with {status}: {self._end_of_log()}")
        self.kills += status != 0
        return status != 0

    # -- what there is -----------------------------------------------------------------------------------------

    def _dump(self, index: Path) -> Dump:
        result: Dump = self._run(lambda: dump(index))[0]
        return result

    def _committed(self) -> Dump:
        """What the index says now, read from a copy: reading may repair what the next writer must."""
        copy = self._folder / "copy"
        self._copy_index(copy)
        return self._dump(copy) if (copy / "index.json").exists() else EMPTY

    def _copy_index(self, to: Path) -> None:
        shutil.rmtree(to, ignore_errors=True)
        if self._index.exists():
            shutil.copytree(self._index, to)

    def _count_embedded(self) -> int:
        return self._embedded.stat().st_size if self._embedded.exists() else 0

    def _end_of_log(self) -> str:
        return "\n" + self._log.read_text("utf-8", "replace")[-3000:]

    def _expect(self, condition: bool, message: str) -> None:
        if not condition:
            raise Divergence(message)


def compact(index: Path) -> None:
    indexer.compact.compact(index)


def verify(index: Path, *, stores: bool = False, repair: bool = False) -> list[str]:
    """The problems that are left."""
    verification = indexer.verify.verify(index, stores=stores, repair=repair)
    return [f"verify: {problem.kind} {problem.object}: {problem.message}" for problem in verification.problems]


def read_along(folder: Path) -> None:
    """Search until asked to end. Whatever the writer does, each search finds one whole commit."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    query = np.full((1, 1), 1.0, np.float32)
    there = False
    while not asked:
        try:
            with Index(folder) as index:
                there = True
                query = np.zeros((1, index.dim), np.float32)
                query[0, 0] = 1
                for _ in range(5):
                    _, ids = index.search(query, k=10)
                    found = [int(id_) for id_ in ids[0] if id_ >= 0]
                    index.images_of(found)
                    index.count_images()
                    time.sleep(0.005)
        except IndexNotFound:
            if there:
                raise
            time.sleep(0.005)
