"""Rows of the host through a network on a CUDA device: sent beside the computing, its kernels recorded once.

The patterns are those of PyTorch's notes on CUDA semantics (https://pytorch.org/docs/stable/notes/cuda.html): copies
from pinned memory on a stream of their own ("Use pinned memory buffers", "CUDA streams"), and a whole network recorded
after a warm-up on a side stream ("CUDA Graphs").
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from searchengine.models.devices import LargestBatch

# From rows on the device to rows there.
Compute = Callable[[Tensor], Tensor]

# As few as fill a large GPU: of 128 photos ViT-B/32 has 6,400 tokens, so its smallest product (768 x 768) is 300 tiles
# of 128 x 128, two and more for each of the 132 multiprocessors of an H100. What is sent while others are computed is
# then all but the first 128 of a call.
ROWS_PER_PART = 128
# One is filled while the other is computed.
SLOTS = 2
# As many as PyTorch's notes take: libraries choose kernels and take workspaces in the first runs, and no graph may hold
# that.
WARM_UPS = 3


class CudaRows:
    """`compute` over any number of rows; one call at a time, whatever the threads that ask.

    compute: from (n, ...) on `device` to (n, ...) there. It must launch kernels only: what waits for the device, or
    copies from the host, cannot be recorded, and then everything is launched as it comes.

    Parts of the full size are a recording that is played; what remains is launched. Both are the same kernels, but
    libraries choose theirs by the size of a part, so that a row's last bits depend on how many rows come with it.
    """

    def __init__(self, compute: Compute, *, device: torch.device, rows_per_part: int = ROWS_PER_PART) -> None:
        self._compute, self._device = compute, device
        self._largest = LargestBatch(rows_per_part)
        self._slots: deque[Slot] = deque()
        self._recording: Recording | None = None
        self._can_record = True
        self._turn = threading.Lock()
        with torch.cuda.device(device):
            self._sending = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def run(self, rows: Tensor) -> Tensor:
        """rows: (n, ...), n > 0, on the host. Returns compute(rows), on the host.

        Raises ModelUnusable where the device lacks the memory for even one row.
        """
        with self._turn, torch.inference_mode(), torch.cuda.device(self._device):
            results = list(self._largest.run(self._part, rows))
            for slot in self._slots:
                slot.computed.synchronize()
            return torch.cat(results).cpu()

    def _part(self, rows: Tensor) -> Tensor:
        try:
            return self._enqueue(rows)
        except torch.OutOfMemoryError:
            recording_held = self._recording is not None
            # Whatever is held for parts of this size goes, once the device is done with it.
            torch.cuda.synchronize()
            self._slots.clear()
            self._recording = None
            if not recording_held:
                raise
        # There is no room beside the recording; there may be in its place.
        self._can_record = False
        torch.cuda.empty_cache()
        return self._part(rows)

    def _enqueue(self, rows: Tensor) -> Tensor:
        """The device may be at it long after this has returned."""
        slot = self._next_slot(rows)
        there = slot.send(rows)
        result = self._whole(there) if len(rows) == self._largest.rows else self._compute(there)
        slot.computed.record()
        return result

    def _next_slot(self, rows: Tensor) -> Slot:
        while len(self._slots) < SLOTS:
            self._slots.append(Slot(self._largest.rows, like=rows, device=self._device, sending=self._sending))
        self._slots.rotate(-1)
        return self._slots[0]

    def _whole(self, there: Tensor) -> Tensor:
        if self._recording is None and self._can_record:
            self._record(there)
        return self._recording(there) if self._recording else self._compute(there)

    def _record(self, there: Tensor) -> None:
        pool = torch.cuda.graph_pool_handle()
        try:
            self._recording = Recording(self._compute, there, pool=pool)
            return
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # of what cannot be recorded; if it is anything else, it comes again
            self._can_record = False
        # Where a recording fails at its end, torch's allocator holds it to be still under way, and refuses to empty its
        # cache, which `LargestBatch` may ask of it. Not before the graph is gone, which some versions have tell it.
        with suppress(RuntimeError, AttributeError):
            device = torch.cuda.current_device()
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)


class Slot:
    """A place for a part in pinned memory and one on the device.

    They are never given back between parts, and so neither has to be kept alive for a copy or a kernel that is under
    way: whoever takes a slot waits until the part that was in it has been computed.
    """

    def __init__(self, rows: int, *, like: Tensor, device: torch.device, sending: torch.cuda.Stream) -> None:
        shape = (rows, *like.shape[1:])
        self._sending = sending
        self._here = torch.empty(shape, dtype=like.dtype, pin_memory=True)
        # Of that stream's memory: in what was freed on another, kernels that are under way there may still read.
        with torch.cuda.stream(sending):
            self._there = torch.empty(shape, dtype=like.dtype, device=device)
        # Who waits for it sleeps, and leaves the core to the decoders.
        self.computed = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def send(self, rows: Tensor) -> Tensor:
        """The rows on the device, for whatever the current stream does next."""
        self.computed.synchronize()
        here, there = self._here[: len(rows)], self._there[: len(rows)]
        here.copy_(rows)
        with torch.cuda.stream(self._sending):
            there.copy_(here, non_blocking=True)
        torch.cuda.current_stream().wait_stream(self._sending)
        return there


class Recording:
    """The kernels of compute(rows), for rows of one shape: launched by one call, not by some 150 from Python.

    Raises torch.OutOfMemoryError, and RuntimeError if `compute` does what cannot be recorded.
    """

    def __init__(self, compute: Compute, rows: Tensor, *, pool: Any) -> None:
        self._rows = rows.clone()
        self._graph = torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        # Around the recording too: where that fails, torch.cuda.graph leaves its own stream the current one.
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                compute(self._rows)
            # Other threads may allocate meanwhile. On one stream with the warm-up, whose libraries' handles it needs.
            with torch.cuda.graph(self._graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                self._result = compute(self._rows)
        torch.cuda.current_stream().wait_stream(aside)

    def __call__(self, rows: Tensor) -> Tensor:
        self._rows.copy_(rows)
        self._graph.replay()
        return self._result.clone()  # the next replay writes there again
