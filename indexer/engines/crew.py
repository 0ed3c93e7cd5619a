"""The run's side of several workers: hires them, leases photos to them, hears what they find.

Workers ask which contents are known before they decode, so that a photo that moved, or a copy of one, costs no more
than reading it. Two copies that are under way at the same time may both be encoded; the run keeps the first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Container, Generator, Iterator
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue

from indexer.crawl import Change
from indexer.encoding import Encoded
from indexer.engines import Engine, Link, Place
from indexer.engines.leases import LEASES_OF_A_WORKER, Leased, Leases
from indexer.engines.messages import (
    Answer,
    Embedded,
    Findings,
    Lost,
    Question,
    Ready,
    Recognised,
    Refused,
    Setup,
    ToRun,
    Unusable,
)
from indexer.reading import STOP_IS_SEEN_SECONDS, Failed, Known
from indexer.report import StageClock
from searchengine.decode import DecodeLimits
from searchengine.errors import ImageError, SearchEngineError, StoreUnusable
from searchengine.text import printable
from searchengine.vectors import Encoder

# A place where so many workers are lost, one after the other and before they found anything, gets no more of them.
LOSSES_OF_A_PLACE = 6
# Much longer than a photo may take to be read and decoded, or an encoder to be loaded.
SILENT_SECONDS = 900.0


@dataclass(kw_only=True, eq=False)
class Hired:
    """A worker, the number of its place, and its leases by their numbers."""

    place: int
    ready: bool = False
    heard: float = field(default_factory=time.monotonic)
    leases: dict[int, Leased] = field(default_factory=dict)

    @property
    def has_room(self) -> bool:
        alone = any(lease.alone for lease in self.leases.values())
        return self.ready and not alone and len(self.leases) < LEASES_OF_A_WORKER


class Crew:
    """Reads as `PhotoReader` does and encodes as well, by the workers of an engine.

    `workers`: processes that decode, on each machine; None: one a processor.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        encoder: Encoder,
        known: Container[bytes],
        workers: int | None,
        batch_size: int,
        limits: DecodeLimits,
        isolated: bool,
        clock: StageClock,
    ) -> None:
        self._engine = engine
        self._setup = Setup(
            source=engine.source,
            fingerprint=encoder.fingerprint,
            device="",
            decoders=0,
            batch_size=batch_size,
            limits=limits,
            isolated=isolated,
        )
        self._known = known
        self._workers = workers
        self._clock = clock
        self._heard: SimpleQueue[tuple[Link, ToRun] | SearchEngineError] = SimpleQueue()
        self._closing = threading.Event()
        self._places: list[Place] = []
        self._losses: dict[int, int] = {}  # by place, since the last finding there
        self._hired: dict[Link, Hired] = {}

    def read_all(
        self, changes: Iterator[Change], *, total: int, stop: threading.Event
    ) -> Generator[Encoded | Known | Failed, None, None]:
        """One outcome for each of about `total` changes, in any order, until `stop` is set.

        Raises SearchEngineError where no worker can be had any more, or none can do this work; StoreUnusable where a
        store does not answer, or a worker cannot see what this process can.

        Closing the generator ends the workers at once, with what they are doing.
        """
        if not total:
            return
        self._leases = Leases(changes, total=total)
        listener = threading.Thread(target=self._listen, name="listen", daemon=True)
        try:
            self._hire_all()
            listener.start()
            while self._lease_out() and not stop.is_set():
                yield from self._next_outcomes()
        finally:
            self._closing.set()
            if listener.ident:
                listener.join()
            self._engine.close()

    # -- hiring and leasing ------------------------------------------------------------------------------------

    def _hire_all(self) -> None:
        self._places = self._engine.places()
        decoders = [self._decoders_at(place) for place in self._places]
        self._clock.workers, self._clock.encoders = sum(decoders), len(decoders)
        for number in range(len(self._places)):
            self._hire(number)

    def _hire(self, number: int) -> None:
        place = self._places[number]
        setup = replace(self._setup, device=place.device, decoders=self._decoders_at(place))
        self._hired[self._engine.start(place, setup)] = Hired(place=number)

    def _decoders_at(self, place: Place) -> int:
        return max(1, round(self._workers * place.share)) if self._workers else place.cores

    def _lease_out(self) -> bool:
        """Give every worker what it has room for; whether anything is left or under way."""
        for least in range(LEASES_OF_A_WORKER):  # so that nobody has two while another has none
            for link, worker in self._hired.items():
                if not worker.has_room or len(worker.leases) > least:
                    continue
                lease = self._leases.next(workers=len(self._hired), alone=not worker.leases)
                if lease:
                    if not worker.leases:
                        worker.heard = time.monotonic()  # until now it had nothing to say
                    worker.leases[lease.number] = lease
                    link.send(lease.message())
                    fetchers = max(change.store.reads_at_once for change in lease.photos.values())
                    self._clock.fetchers = max(self._clock.fetchers, fetchers * len(self._places))
        return not self._leases.all_given or any(worker.leases for worker in self._hired.values())

    # -- listening ---------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Answers questions at once, also while the run commits; all else waits for the run."""
        try:
            while not self._closing.is_set():
                for link, message in self._engine.hear(STOP_IS_SEEN_SECONDS):
                    if worker := self._hired.get(link):
                        worker.heard = time.monotonic()
                    if isinstance(message, Question):
                        link.send(Answer(frozenset(asked for asked in message.hashes if asked in self._known)))
                    else:
                        self._heard.put((link, message))
        except Exception as error:  # whatever it is, the run must not wait for ever
            self._heard.put(SearchEngineError(f"the workers cannot be heard any more: {error}"))

    def _next_outcomes(self) -> Iterator[Encoded | Known | Failed]:
        try:
            heard = self._heard.get(timeout=STOP_IS_SEEN_SECONDS)
        except Empty:
            yield from self._end_the_silent()
            return
        if isinstance(heard, SearchEngineError):
            raise heard
        link, message = heard
        worker = self._hired.get(link)
        if worker is None:  # it was given up before
            return
        match message:
            case Ready():
                worker.ready = True
            case Findings():
                yield from self._found(worker, message)
            case Refused(error=error):
                raise type(error)(f"{self._name(worker)}: {error}")
            case Lost(reason=reason):
                yield from self._lost(link, worker, reason)

    def _end_the_silent(self) -> Iterator[Failed]:
        long_ago = time.monotonic() - SILENT_SECONDS
        for link, worker in list(self._hired.items()):
            if worker.leases and worker.heard < long_ago:
                link.end()
                yield from self._lost(link, worker, f"it said nothing for {SILENT_SECONDS:.0f} s")
        if not any(worker.ready or worker.heard > long_ago for worker in self._hired.values()):
            raise SearchEngineError(
                f"no worker has started within {SILENT_SECONDS:.0f} s; see whether other work takes up the machines"
            )

    def _name(self, worker: Hired) -> str:
        return self._places[worker.place].name

    # -- what is found, and what is lost -----------------------------------------------------------------------

    def _found(self, worker: Hired, told: Findings) -> Iterator[Encoded | Known | Failed]:
        self._losses[worker.place] = 0
        for stage, seconds in told.seconds.items():
            self._clock.add(stage, seconds)
        rows = iter(told.embeddings)
        for finding in told.findings:
            lease = worker.leases[finding.lease]
            change = replace(lease.photos[finding.position], listed=finding.listed)
            match finding.what:
                case Unusable(reason=reason, damaged=damaged):
                    failed = Failed(change=change, reason=reason, damaged=damaged)
                    lease.read |= damaged
                    if not lease.read:
                        lease.unread[finding.position] = failed
                        continue
                    yield failed
                case Embedded(content_hash=content_hash, metadata=metadata):
                    lease.read = True
                    yield Encoded(change=change, content_hash=content_hash, metadata=metadata, embedding=next(rows))
                case Recognised(content_hash=content_hash, metadata=metadata):
                    lease.read = True
                    yield Known(change=change, content_hash=content_hash, metadata=metadata)
            del lease.photos[finding.position]
        for lease in [lease for lease in worker.leases.values() if lease.is_done]:
            del worker.leases[lease.number]
            if lease.read or not self._can_be_read_here(failed := next(iter(lease.unread.values()))):
                yield from lease.unread.values()
            elif not lease.doubted:
                self._leases.doubt(lease)
            else:
                raise StoreUnusable(
                    f"{self._name(worker)} cannot read {printable(failed.change.listed.key)} ({failed.reason}), which "
                    "can be read here; photos must be had under the same name on every machine: mount the folder "
                    "there, or give it the rights or credentials that it lacks"
                )

    def _can_be_read_here(self, failed: Failed) -> bool:
        """Whether this process can read a photo of which a worker says that it cannot, nor others beside it."""
        try:
            failed.change.store.read(failed.change.listed.key, max_bytes=self._setup.limits.max_file_bytes)
        except (ImageError, StoreUnusable):
            return False
        return True

    def _lost(self, link: Link, worker: Hired, reason: str) -> Iterator[Failed]:
        del self._hired[link]
        for lease in reversed(worker.leases.values()):
            for change in self._leases.give_again(lease):
                ended = f"each process that took it up ended ({reason})"
                yield Failed(change=change, reason=ended, damaged=False)
        # One that did not even start will hardly do so next time.
        losses = self._losses.get(worker.place, 0) + (1 if worker.ready else LOSSES_OF_A_PLACE // 2)
        self._losses[worker.place] = losses
        if losses < LOSSES_OF_A_PLACE:
            self._hire(worker.place)
        elif not self._hired:
            raise SearchEngineError(f"no worker is left; the last one, on {self._name(worker)}, ended: {reason}")
