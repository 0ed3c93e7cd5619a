"""A CUDA device as `models/cuda.py` sees it: what is put on streams is done only once the host waits for it.

So whoever forgets to wait reads what is not there yet. Memory is counted in rows, and holds -1 until it is written to.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch

Task = Callable[[], object]
NOTHING_YET = -1


class Stream:
    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self._done = 0

    @property
    def is_idle(self) -> bool:
        return self._done == len(self.tasks)

    def wait_stream(self, other: Stream) -> None:
        so_far = len(other.tasks)
        self.tasks.append(lambda: other.do(so_far))

    def do(self, number: int) -> None:
        """The first `number` tasks, those that are done already aside."""
        while self._done < number:
            self._done += 1
            self.tasks[self._done - 1]()


class There:
    """A tensor on the device, in memory of the stream on which it was made."""

    def __init__(self, device: FakeCuda, values: torch.Tensor, stream: Stream | None = None) -> None:
        self.device, self.values, self.stream = device, values, stream or device.current

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> There:
        return There(self.device, self.values[rows], self.stream)

    def copy_(self, source: There | torch.Tensor, *, non_blocking: bool = False) -> None:
        if isinstance(source, There):
            self.device.enqueue(lambda: self.values.copy_(source.values))
        else:
            assert non_blocking, "a copy for which the host waits"
            assert self.stream is self.device.current, "kernels of another stream may still read what was there"
            self.device.log.append(f"send {int(source[0, 0])}")
            self.device.sent_on.append(self.device.current)
            self.device.enqueue(lambda: self.values.copy_(source))

    def clone(self) -> There:
        return self.device.launch(lambda: self.values, like=self.values)

    def cpu(self) -> torch.Tensor:
        self.device.synchronize()
        return self.values.clone()


class FakeCuda:
    """Stands in for the module `torch` within `cuda.py`. `room`: of how many rows the device has the memory."""

    OutOfMemoryError = torch.OutOfMemoryError
    inference_mode = torch.inference_mode

    def __init__(self, *, room: int = 1000, records: bool = True) -> None:
        self.room, self.records = room, records
        self.log: list[str] = []
        self.computed: list[int] = []  # rows of each call of `compute`
        self.sent_on: list[Stream] = []
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.recorded: list[Task] | None = None
        self.pools: set[int] = set()  # of recordings that the allocator holds to be under way
        self.streams: list[Stream] = []
        self.current = self.stream()
        self._C = SimpleNamespace(
            _cuda_endAllocateToPool=lambda device, pool: self.pools.remove(pool),
            _cuda_releasePool=lambda device, pool: None,
        )
        self.cuda = SimpleNamespace(
            device=lambda device: nullcontext(),
            Stream=self.stream,
            stream=self.on,
            current_stream=lambda: self.current,
            synchronize=self.synchronize,
            empty_cache=lambda: None,
            current_device=lambda: 0,
            graph_pool_handle=lambda: 7,
            Event=lambda blocking: Event(self),
            CUDAGraph=lambda: Graph(self),
            graph=self.record,
        )

    def compute(self, rows: There) -> There:
        """Twice each row, and 1: enqueued, if there is room beside what graphs hold."""
        self.computed.append(len(rows))
        if len(rows) > self.room - sum(graph.rows for graph in self.graphs):
            raise torch.OutOfMemoryError("CUDA out of memory")

        def kernel() -> torch.Tensor:
            if self.recorded is None:
                self.log.append(f"compute {int(rows.values[0, 0])}")
            return rows.values * 2 + 1

        return self.launch(kernel, like=rows.values)

    def launch(self, kernel: Callable[[], torch.Tensor], *, like: torch.Tensor) -> There:
        result = There(self, torch.full_like(like, NOTHING_YET))
        self.enqueue(lambda: result.values.copy_(kernel()))
        return result

    def enqueue(self, task: Task) -> None:
        (self.current.tasks if self.recorded is None else self.recorded).append(task)

    def synchronize(self) -> None:
        for stream in self.streams:
            stream.do(len(stream.tasks))

    def stream(self) -> Stream:
        self.streams.append(Stream())
        return self.streams[-1]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def record(self, graph: Graph, *, pool: int, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        """As with torch, a failure at the end leaves the stream the current one and the recording under way."""
        assert capture_error_mode == "thread_local"
        self.synchronize()
        before, self.current, self.recorded = self.current, stream, []
        self.pools.add(pool)
        try:
            yield
        finally:
            graph.tasks, self.recorded = self.recorded, None
            if not self.records:
                raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
            self.current = before
            self.pools.remove(pool)
        graph.rows = self.computed[-1]
        self.graphs.add(graph)

    def empty(
        self, shape: tuple[int, ...], *, dtype: torch.dtype, pin_memory: bool = False, device: object = None
    ) -> Any:
        assert all(stream.is_idle for stream in self.streams), (
            "memory that was freed may be given out while it is in use"
        )
        values = torch.full(shape, NOTHING_YET, dtype=dtype)
        return values if pin_memory else There(self, values)

    def cat(self, parts: Sequence[There]) -> There:
        whole = torch.cat([part.values for part in parts])
        return self.launch(lambda: torch.cat([part.values for part in parts]), like=whole)


class Event:
    def __init__(self, device: FakeCuda) -> None:
        self._device = device
        self._when: tuple[Stream, int] | None = None

    def record(self) -> None:
        self._when = self._device.current, len(self._device.current.tasks)

    def synchronize(self) -> None:
        if self._when is not None:
            stream, number = self._when
            stream.do(number)


class Graph:
    rows = 0

    def __init__(self, device: FakeCuda) -> None:
        self._device = device
        self.tasks: list[Task] = []

    def replay(self) -> None:
        for task in self.tasks:
            self._device.enqueue(task)
