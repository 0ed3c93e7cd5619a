"""Filling `next/`: the contents that it lacks are read, decoded and embedded, each from one photo that has it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import closing

from indexer.encoding import Batch, EncoderThreads
from indexer.lacking import KnownPhoto, Lacking
from indexer.pipeline import COMMIT_EVERY_PHOTOS, COMMIT_EVERY_SECONDS
from indexer.reading import Decoded, Failed, Known, KnownContent, PhotoReader
from indexer.report import OnProgress, Progress, ReencodeReport, StageClock
from indexer.writer import IndexWriter, NewPhoto
from searchengine.decode import DecodeLimits
from searchengine.index.layout import IndexPaths
from searchengine.vectors import Encoder


class Filling:
    """The state of one run: what is on its way into `next/`, and the photos that are not what they were."""

    def __init__(
        self,
        *,
        writer: IndexWriter,
        lacking: Lacking,
        encoder: Encoder,
        report: ReencodeReport,
        workers: int,
        batch_size: int,
        limits: DecodeLimits,
        isolated: bool,
        on_progress: OnProgress,
        stop: threading.Event,
    ) -> None:
        self.writer = writer
        self.lacking = lacking
        self.encoder = encoder
        self.report = report
        self.batch_size = batch_size
        self.on_progress = on_progress
        self.stop = stop
        self.clock = StageClock(workers=workers)
        self.encoding = EncoderThreads(encoder, clock=self.clock)
        self.known = KnownContent(IndexPaths(writer.folder).database)
        self.reader = PhotoReader(
            known=self.known,
            image_size=encoder.image_size,
            limits=limits,
            workers=workers,
            ahead=batch_size + workers,
            isolated=isolated,
            clock=self.clock,
        )
        self.to_encode: list[Decoded] = []
        self.uncommitted = 0
        # What became of a photo, by its `KnownPhoto.name`.
        self.changed: dict[tuple[int, int, str], NewPhoto] = {}
        self.unusable: dict[tuple[int, int, str], Failed] = {}
        self.started = self.last_commit = time.monotonic()
        self.report.vectors, self.report.resumed = lacking.count()

    def close(self) -> None:
        self.encoding.close()
        self.known.close()

    def fill(self) -> None:
        """Until nothing is lacking but what no photo has any more. Raises KeyboardInterrupt once `stop` is set."""
        self._tell()
        while self._tries_once():
            pass

    def _tries_once(self) -> bool:
        """Of each content that is lacking one photo, while there is one that was not tried."""
        done = 0
        with closing(self.reader.read_all(self.lacking.photos(), stop=self.stop)) as outcomes:
            for done, outcome in enumerate(outcomes, start=1):
                self._take(outcome)
                if self.stop.is_set():
                    break
                if done % self.batch_size == 0:
                    self._tell()
        self._encode()
        self._record(self.encoding.take_back())
        self._commit()
        self._tell()
        if self.stop.is_set():
            self.writer.commit(report={}, finished=True)
            raise KeyboardInterrupt
        return done > 0

    def _tell(self) -> None:
        made = self.report.resumed + self.report.embedded
        self.report.vectors = max(self.report.vectors, made)  # more came meanwhile
        self.on_progress(Progress(done=made, total=self.report.vectors, busiest=self.clock.busiest()))

    def _take(self, outcome: Decoded | Known | Failed) -> None:
        photo = outcome.change
        assert isinstance(photo, KnownPhoto)
        if isinstance(outcome, Failed):
            self.lacking.note_tried(photo)
            self.unusable[photo.name] = outcome
            return
        if outcome.content_hash != photo.content_hash:
            self.lacking.note_tried(photo)
            metadata = outcome.photo.metadata if isinstance(outcome, Decoded) else outcome.metadata
            self.changed[photo.name] = NewPhoto(
                store=photo.store.name, listed=photo.listed, content_hash=outcome.content_hash, metadata=metadata
            )
        if isinstance(outcome, Decoded) and outcome.content_hash not in self.known:
            self.known.add(outcome.content_hash)
            self.to_encode.append(outcome)
        if len(self.to_encode) >= self.batch_size:
            self._encode()
        self._record(self.encoding.take_back(wait=False))
        due = time.monotonic() - self.last_commit > COMMIT_EVERY_SECONDS
        if self.uncommitted >= COMMIT_EVERY_PHOTOS or (due and self.uncommitted):
            self._commit()

    def _encode(self) -> None:
        batch, self.to_encode = Batch(decoded=self.to_encode), []
        self._record(self.encoding.hand_over(batch))

    def _record(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            if batch.decoded:
                self.writer.add_vectors(batch.hashes, batch.embeddings)
                self.report.embedded += len(batch.decoded)
                self.uncommitted += len(batch.decoded)

    def _commit(self) -> None:
        with self.clock.working("write"):
            self.writer.commit(report={})
        self.known.keep_pending({*Batch(decoded=self.to_encode).hashes, *self.encoding.hashes_under_way})
        self.uncommitted = 0
        self.last_commit = time.monotonic()
        self.report.seconds = self.last_commit - self.started
        self.report.images_per_second = self.report.embedded / max(self.report.seconds, 1e-9)
