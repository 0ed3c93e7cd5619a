"""The service: an index kept open and current, and a bounded pool of threads that works with it.

Whatever touches the disk, the encoder or the vectors is a job on the pool, so the event loop never waits for it. A job
sees the newest commit. Where the model of the index has been changed, the index is opened anew with its new encoder and
the job done again, so whoever asked does not notice.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import date
from typing import TypeVar

import platformdirs
from starlette.requests import Request

from searchengine.decode import DecodeLimits
from searchengine.errors import IndexFormatError, IndexUnusable, ModelMismatch, OverloadError, SearchEngineError
from searchengine.index.commits import Commits
from searchengine.index.layout import IndexPaths
from searchengine.index.protocol import PhotoIndex
from searchengine.milvus import is_milvus
from searchengine.settings import Settings
from searchengine.web.caches import BoundedCache
from searchengine.web.decoders import DecoderPool
from searchengine.web.metrics import Metrics
from searchengine.web.opened import Opened
from searchengine.web.originals import Originals
from searchengine.web.paging import Pager
from searchengine.web.requests import Question
from searchengine.web.thumbnails import Thumbnails
from searchengine.web.uploads import UploadedImage

Result = TypeVar("Result")
AnswerKey = tuple[Hashable, date, Question, int, str | None]

# Most of them wait: for the encoder, for a turn to search, for a disk. What computes is bounded where it does.
THREADS = 32
# Pictures to decode and classes to encode can take seconds: who asks for these has threads apart.
THREADS_FOR_LONG = 4
MAX_PENDING = 256

CHECK_SECONDS = 1.0
ATTEMPTS = 5
ANSWERS_BYTES, OVERHEAD_BYTES = 32 * 2**20, 1000


class Service:
    """Answers questions from one index. `open` it before, and `close` it after."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._pending = 0
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="service")
        self._pool_for_long = ThreadPoolExecutor(THREADS_FOR_LONG, thread_name_prefix="service-long")
        # Of the event loop, which looks for a newer commit before it takes an answer from memory. In Milvus to look
        # takes a request; there what the keeper saw a moment ago must do.
        is_remote = is_milvus(settings.index)
        self._commits = None if is_remote else Commits(IndexPaths(settings.index_folder).database)
        self._version_seen: Hashable = None
        self._answers: BoundedCache[AnswerKey, bytes] = BoundedCache(max_bytes=ANSWERS_BYTES)
        self._under_way: dict[AnswerKey, asyncio.Task[bytes]] = {}
        self._pager = Pager(metrics=self.metrics)
        self._opened: Opened | None = None
        self.decoders = DecoderPool(limits=DecodeLimits.of(settings))
        cache = platformdirs.user_cache_path("searchengine", appauthor=False)
        self.thumbnails = Thumbnails(folder=cache / "thumbnails", decoders=self.decoders)
        self.originals = Originals()
        self.metrics.watch("searchengine_queue_depth", "Jobs that wait or run.", lambda: self._pending)
        self._seen = b""  # the state of the index that the metrics tell of
        self._closing = threading.Event()
        self._keeper = threading.Thread(target=self._keep_current, name="keeper", daemon=True)
        self.trouble: SearchEngineError | None = None

    def open(self) -> None:
        """Load index and encoder. Raises IndexUnusable, ModelUnusable and their kin."""
        self._opened = Opened(self.settings, metrics=self.metrics, decoders=self.decoders)
        self._keeper.start()

    def close(self) -> None:
        """Let go of everything. The server has answered all that it will, so what is under way is for nobody."""
        self._closing.set()
        pools = self._pool, self._pool_for_long
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        self.decoders.close()
        for pool in pools:
            pool.shutdown()
        if self._opened is not None:
            self._keeper.join()
            self._opened.retire()
        if self._commits is not None:
            self._commits.close()
        self.thumbnails.close()

    @property
    def index(self) -> PhotoIndex:
        """The index as it is open now; within a job, take that of the job instead."""
        return self._current().index

    async def run(self, job: Callable[[Opened], Result], *, is_long: bool = False) -> Result:
        """What `job` gives, on a thread of the pool; it may be called again, with another index.

        One that may take seconds, `is_long`, waits for others of its kind and holds up none else.
        Raises OverloadError at once where too much waits already, and what the job raises.
        """
        with self._lock:
            if self._pending >= MAX_PENDING:
                self.metrics.refused.inc()
                raise OverloadError(f"{self._pending} requests are waiting already; ask again in a second")
            self._pending += 1
        asked = time.perf_counter()

        def work() -> Result:
            self.metrics.observe("queue", time.perf_counter() - asked)
            return self._do(job)

        future = (self._pool_for_long if is_long else self._pool).submit(work)
        future.add_done_callback(lambda _: self._finished())
        return await asyncio.wrap_future(future)

    async def answer(
        self, question: Question, *, k: int, cursor: str | None, images: Sequence[UploadedImage] = ()
    ) -> bytes:
        """A page of hits as JSON; `images` are the pictures of the question. Raises QueryError.

        Who asks what has been asked since the last commit gets the same bytes; who asks what is just being looked for
        waits for that.
        """
        key = (self._version(), date.today(), question, k, cursor)
        known = self._answers.get(key)
        self.metrics.count_lookups("answers", hits=known is not None, misses=known is None)
        if known is not None:
            return known
        task = self._under_way.get(key)
        if task is None:
            task = self._under_way[key] = asyncio.ensure_future(self._find(key, question, images))
            task.add_done_callback(lambda _: self._under_way.pop(key))
        return await asyncio.shield(task)

    async def _find(self, key: AnswerKey, question: Question, images: Sequence[UploadedImage]) -> bytes:
        *_, k, cursor = key

        def find(opened: Opened) -> bytes:
            page = self._pager.page(opened, question, k=k, cursor=cursor, pictures=lambda it: it.pictures(images))
            return page.json()

        found = await self.run(find, is_long=bool(images))
        if key[0] is not None:
            size_bytes = len(found) + question.size_bytes + OVERHEAD_BYTES
            self._answers.put(key, found, size_bytes=size_bytes)
        return found

    def _version(self) -> Hashable:
        """Of the newest commit, by a look at two files; None where there is something wrong, for a job to tell."""
        if self._commits is None:
            return self._version_seen
        try:
            return self._commits.version()
        except (IndexFormatError, sqlite3.Error):
            return None

    def _finished(self) -> None:
        with self._lock:
            self._pending -= 1

    def _do(self, job: Callable[[Opened], Result]) -> Result:
        for attempt in range(ATTEMPTS):
            opened = self._current()
            try:
                with opened:
                    return job(opened)
            except ModelMismatch:
                if attempt == ATTEMPTS - 1:
                    raise
            with suppress(ModelMismatch):  # it has been changed once more meanwhile
                self._reopen(opened)
        raise AssertionError

    def _current(self) -> Opened:
        assert self._opened is not None, "open the service first"
        return self._opened

    def _reopen(self, stale: Opened) -> None:
        """With the encoder that the index is of now; by whichever thread comes first."""
        with self._opening:
            if self._opened is stale:
                self._opened = Opened(self.settings, metrics=self.metrics, decoders=self.decoders)
                stale.retire()

    def _keep_current(self) -> None:
        """Take the newest state also when nobody asks: the files of the last one may be deleted by now, and take their
        space on the disk for as long as they are mapped."""
        while True:
            try:
                self._do(self._look)
                self.trouble = None
            except SearchEngineError as error:
                self.trouble, self._version_seen = error, None
            except OSError as error:
                self.trouble = IndexUnusable(f"the index cannot be read: {error.strerror}; check its disk")
                self._version_seen = None
            if self._closing.wait(CHECK_SECONDS):
                return

    def _look(self, opened: Opened) -> None:
        snapshot, state = opened.index.snapshot(), opened.state()
        self._version_seen = state
        if state == self._seen:
            return
        self._seen = state
        self.metrics.photos.set(opened.index.count_images())
        self.metrics.vectors.set(len(snapshot))
        self.metrics.segments.set(len(snapshot.segments))


async def service_of(request: Request) -> Service:
    """The service that an app was made with, for routes: ``Depends(service_of)``."""
    service: Service = request.app.state.service
    return service
