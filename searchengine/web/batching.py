"""Texts that several requests ask for at the same time share one call of the encoder.

Nobody waits for company: who comes while the encoder is idle is served at once, and who comes while it is busy shares
the next call with all others that came meanwhile. So the more there is to do, the larger the batches.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import islice

import numpy as np

from searchengine.vectors import FloatMatrix
from searchengine.web.caches import BoundedCache
from searchengine.web.metrics import Metrics

# Among up to so many, CLIP's vector of a text has the same bits whatever is beside it (models/clip/encoder.py).
MAX_BATCH_TEXTS = 16

REMEMBERED_BYTES = 16 * 2**20


class TextBatcher:
    """Vectors of query texts by `encode`, which takes some texts and gives one unit row each, float32 (n, dim)."""

    def __init__(self, encode: Callable[[Sequence[str]], FloatMatrix], *, metrics: Metrics) -> None:
        self._encode = encode
        self._metrics = metrics
        self._lock = threading.Lock()
        self._encoder_is_busy = threading.Lock()
        self._waiting: dict[str, Future[FloatMatrix]] = {}
        self._known: BoundedCache[str, FloatMatrix] = BoundedCache(max_bytes=REMEMBERED_BYTES)

    def __call__(self, texts: Sequence[str]) -> FloatMatrix:
        """Unit rows, float32 (n, dim). Raises QueryError for a text that the encoder refuses."""
        if not texts:
            return self._encode(texts)
        looked_up = {text: self._known.get(text) for text in texts}
        known = {text: vector for text, vector in looked_up.items() if vector is not None}
        missing = [text for text in looked_up if text not in known]
        self._metrics.count_lookups("vectors", hits=len(known), misses=len(missing))
        if missing:
            with self._metrics.timed("encode"):
                known |= zip(missing, self._encoded(missing), strict=True)
        return np.stack([known[text] for text in texts])

    def _encoded(self, texts: Sequence[str]) -> list[FloatMatrix]:
        with self._lock:
            futures = [self._waiting.setdefault(text, Future()) for text in texts]
        while not all(future.done() for future in futures):
            with self._encoder_is_busy:
                self._encode_some()
        return [future.result() for future in futures]

    def _encode_some(self) -> None:
        """Some of the texts that wait by now; those of who is here only if nobody did it for him meanwhile."""
        with self._lock:
            batch = {text: self._waiting.pop(text) for text in list(islice(self._waiting, MAX_BATCH_TEXTS))}
        if not batch:
            return
        self._metrics.batch_texts.observe(len(batch))
        try:
            self._keep(batch, self._encode(list(batch)))
        except Exception as error:
            if len(batch) == 1:
                for future in batch.values():
                    future.set_exception(error)
                return
            for text, future in batch.items():  # one of them is to blame; the others shall not suffer
                try:
                    self._keep({text: future}, self._encode([text]))
                except Exception as own_error:
                    future.set_exception(own_error)

    def _keep(self, batch: dict[str, Future[FloatMatrix]], vectors: FloatMatrix) -> None:
        for (text, future), vector in zip(batch.items(), vectors, strict=True):
            self._known.put(text, vector.copy(), size_bytes=vector.nbytes + 4 * len(text))
            future.set_result(vector)
