"""A worker: takes up leased photos with the same readers, decoders and encoder as a run of one process.

Leases follow each other without a gap: while the photos of one are encoded, those of the next are decoded. What is
found goes back batch by batch, so that a worker that is lost takes no more with it than what it had under way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from indexer.crawl import Change
from indexer.encoding import Batch, EncoderThreads
from indexer.engines.messages import (
    Answer,
    Embedded,
    Finding,
    Findings,
    Lease,
    Lost,
    Question,
    Ready,
    Recognised,
    Refused,
    Setup,
    ToRun,
    ToWorker,
    Unusable,
)
from indexer.reading import Decoded, Failed, Known, PhotoReader
from indexer.report import Stage, StageClock
from searchengine.errors import ModelMismatch, SearchEngineError
from searchengine.stores import KnownStores
from searchengine.vectors import Encoder

Send = Callable[[ToRun], None]


@dataclass(frozen=True, kw_only=True)
class LeasedChange(Change):
    """A photo of a lease, and its place there."""

    lease: int
    position: int


class Worker:
    """`run` in a thread of its own works until `end`; `hear` takes what the run says, and `send` what it is told."""

    def __init__(self, setup: Setup, *, send: Send) -> None:
        self._setup = setup
        self._send = send
        self._asked = AskedContent(send)
        self._leases: SimpleQueue[Lease | None] = SimpleQueue()
        self._stores = KnownStores()
        self._stop = threading.Event()

    def hear(self, message: ToWorker) -> None:
        match message:
            case Lease():
                self._leases.put(message)
            case Answer():
                self._asked.answer(message)

    def end(self) -> None:
        """Nobody listens any more."""
        self._stop.set()
        self._asked.end()
        self._leases.put(None)

    def run(self) -> None:
        try:
            encoder = self._setup.source.load(self._setup.device)
            self._check(encoder)
            self._send(Ready())
            self._work(encoder)
        except SearchEngineError as error:
            # One of no kind of its own is this machine's trouble, such as a process to decode in that does not start.
            self._send(Lost(str(error)) if type(error) is SearchEngineError else Refused(error))
        except Exception as error:
            # Another process may do better: a device that failed, a want of memory. Or it is that nobody listens.
            with suppress(OSError):
                self._send(Lost(f"{type(error).__name__}: {error}".partition("\n")[0]))

    def _check(self, encoder: Encoder) -> None:
        if encoder.fingerprint != self._setup.fingerprint:
            raise ModelMismatch(
                f"the encoder {encoder.name} is another one here ({encoder.fingerprint[:12]}) than where the run was "
                f"started ({self._setup.fingerprint[:12]}); install the same version and the same weights"
            )

    def _work(self, encoder: Encoder) -> None:
        clock = StageClock(workers=self._setup.decoders)
        batch_size = max(self._setup.batch_size, _suitable_batch(self._setup.device))
        reader = PhotoReader(
            known=self._asked,
            image_size=encoder.image_size,
            limits=self._setup.limits,
            workers=self._setup.decoders,
            ahead=batch_size + self._setup.decoders,
            isolated=self._setup.isolated,
            clock=clock,
        )
        with closing(EncoderThreads(encoder, clock=clock)) as encoding:
            outbox = Outbox(encoding, clock=clock, batch_size=batch_size, send=self._send)
            while lease := self._leases.get():
                with closing(reader.read_all(self._photos_from(lease), stop=self._stop)) as outcomes:
                    for outcome in outcomes:
                        outbox.take(outcome)
                outbox.flush()

    def _photos_from(self, lease: Lease | None) -> Iterator[LeasedChange]:
        """Those of this lease and of those after it, as long as the next one is there already."""
        while lease is not None:
            for position, photo in lease.photos.items():
                store = self._stores.of(photo.store, photo.listed.key)
                yield LeasedChange(
                    store=store, listed=photo.listed, known=photo.known, lease=lease.number, position=position
                )
            try:
                lease = self._leases.get_nowait()
            except Empty:
                return
        self._leases.put(None)


class Outbox:
    """Encodes what was decoded, and sends what was found, in batches."""

    def __init__(self, encoding: EncoderThreads, *, clock: StageClock, batch_size: int, send: Send) -> None:
        self._encoding = encoding
        self._clock = clock
        self._batch_size = batch_size
        self._send = send
        self._told: dict[Stage, float] = clock.seconds()
        self._to_encode: list[Decoded] = []
        self._known: list[Known] = []
        self._failed: list[Failed] = []

    def take(self, outcome: Decoded | Known | Failed) -> None:
        match outcome:
            case Failed():
                self._failed.append(outcome)
            case Known():
                self._known.append(outcome)
            case Decoded(content_hash=content_hash) if content_hash in self._under_way():
                metadata = outcome.photo.metadata
                self._known.append(Known(change=outcome.change, content_hash=content_hash, metadata=metadata))
            case Decoded():
                self._to_encode.append(outcome)
        if max(len(self._to_encode), len(self._known)) >= self._batch_size:
            self._hand_over()
        self._tell(self._encoding.take_back(wait=False))

    def flush(self) -> None:
        """Send all that is left, once it is encoded."""
        self._hand_over()
        self._tell(self._encoding.take_back())

    def _under_way(self) -> set[bytes]:
        return {*Batch(decoded=self._to_encode).hashes, *self._encoding.hashes_under_way}

    def _hand_over(self) -> None:
        # Those that are known wait for the photos before them, which may be what made them known.
        batch = Batch(decoded=self._to_encode, waiting=self._known)
        self._to_encode, self._known = [], []
        self._tell(self._encoding.hand_over(batch))

    def _tell(self, batches: Sequence[Batch]) -> None:
        for batch in batches or [Batch()]:  # failures are told at once
            self._tell_of(batch)

    def _tell_of(self, batch: Batch) -> None:
        findings = [_finding(change, Embedded(content_hash, metadata)) for change, content_hash, metadata in batch.new]
        findings += [_finding(found.change, Recognised(found.content_hash, found.metadata)) for found in batch.waiting]
        findings += [_finding(failed.change, Unusable(failed.reason, failed.damaged)) for failed in self._failed]
        if not findings:
            return
        self._failed = []
        now, before = self._clock.seconds(), self._told
        self._told = now
        seconds = {stage: now[stage] - before[stage] for stage in now}
        self._send(Findings(findings=findings, embeddings=batch.embeddings, seconds=seconds))


class AskedContent:
    """`content_hash in asked`: whether the run knows that content. Threads that ask at once share a question."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._answers: SimpleQueue[Answer] = SimpleQueue()
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._waiting: list[tuple[bytes, Future[bool]]] = []
        self._ended = False

    def __contains__(self, content_hash: object) -> bool:
        assert isinstance(content_hash, bytes)
        is_known: Future[bool] = Future()
        with self._lock:
            self._waiting.append((content_hash, is_known))
        with self._asking:
            if not is_known.done():
                self._ask()
        return is_known.result()

    def answer(self, answer: Answer) -> None:
        self._answers.put(answer)

    def end(self) -> None:
        """Nobody answers any more."""
        self._ended = True
        self._answers.put(Answer(frozenset()))

    def _ask(self) -> None:
        with self._lock:
            asked, self._waiting = self._waiting, []
        known: frozenset[bytes] = frozenset()
        try:
            if not self._ended:
                self._send(Question(tuple(content_hash for content_hash, _ in asked)))
                known = self._answers.get().known
        finally:
            for content_hash, is_known in asked:
                is_known.set_result(content_hash in known)


def _suitable_batch(device: str) -> int:
    if device == "cpu":
        return 1  # any suits it, and torch may not be needed
    from searchengine.models.devices import suitable_batch

    return suitable_batch(device)


def _finding(change: Change, what: Embedded | Recognised | Unusable) -> Finding:
    assert isinstance(change, LeasedChange)
    return Finding(lease=change.lease, position=change.position, listed=change.listed, what=what)
