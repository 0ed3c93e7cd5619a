"""Where torch computes: the choice of a device, and threads that do not wait for each other."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from searchengine.errors import ModelUnusable, UsageError
from searchengine.index.layout import PRECISIONS

Share = TypeVar("Share")
Result = TypeVar("Result")

# Sets the calling thread's own number of helpers, not the process's as torch.set_num_threads does.
OMP_SET_NUM_THREADS: Any = getattr(ctypes.CDLL(torch._C.__file__), "omp_set_num_threads", None)


# Few photos at a time keep the processors' caches warm; a GPU starts for many what it would start for one.
PHOTOS_ON_A_CPU, PHOTOS_ON_A_GPU = 32, 256


def devices_of(name: str) -> list[str]:
    """The devices that `name` stands for, one or more: `auto` is every GPU, where there are several of them."""
    if name == "auto" and torch.cuda.device_count() > 1:
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return name.split(",")


def suitable_batch(name: str) -> int:
    """How many photos a run should hand to an encoder on this device at once."""
    is_gpu = name.startswith("cuda") or (name == "auto" and torch.cuda.is_available())
    return PHOTOS_ON_A_GPU if is_gpu else PHOTOS_ON_A_CPU


def pick_device(name: str) -> torch.device:
    """The first device of a list; `auto` is a GPU where there is one. Raises ModelUnusable where it cannot be used."""
    name = name.partition(",")[0]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise ModelUnusable(f"the device {name} cannot be used here ({reason}); use --device cpu") from None
    return torch.device(name)


def choose_device(name: str, precision: str) -> torch.device:
    """Integers are for the CPU. Raises UsageError, ModelUnusable."""
    if precision not in PRECISIONS:
        raise UsageError(f"the precision {precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    device = pick_device("cpu" if precision == "int8" and name == "auto" else name)
    if precision == "int8" and device.type != "cpu":
        raise UsageError(f"the precision int8 is for a CPU, not for {device}; use another there, or --device cpu")
    return device


def has_packed_products() -> bool:
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def has_fast_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in one instruction; emulated, it is five times slower than float32."""
    return has_packed_products() and torch.cpu._is_avx512_bf16_supported()


def has_fast_integers() -> bool:
    """Whether the processor multiplies 8-bit integers in one instruction, which keeps their sums from overflowing."""
    return has_packed_products() and hasattr(torch.ops, "onednn") and torch.cpu._is_vnni_supported()


class LoneThreads:
    """Threads that each run torch's operators alone; one, where they cannot be kept from sharing them.

    Threads that share an operator wait for the slowest of them at its end: 8 ms a layer when another program, such as
    the decoding of photos, keeps a core busy. Threads that each take photos of their own never wait.

    They stay as long as this object. A process that is forked off starts its own.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        self._start()

    def map(self, work: Callable[[Share], Result], shares: Iterable[Share]) -> Iterator[Result]:
        """work(share) for each share, in their order."""
        if os.getpid() != self._process_id:
            self._start()  # a fork takes no threads along, and what it copied would wait for them
        return self._pool.map(work, shares)

    def _start(self) -> None:
        def leave_the_team() -> None:
            torch.get_num_threads()  # has torch set the thread up first, which would undo the next line
            OMP_SET_NUM_THREADS(1)

        if OMP_SET_NUM_THREADS is None:
            self._pool = ThreadPoolExecutor(1)
        else:
            self._pool = ThreadPoolExecutor(self._number, initializer=leave_the_team)
        self._process_id = os.getpid()


class LargestBatch:
    """The most rows that fit into a device's memory at once: `most` at first, halved for good whenever they do not."""

    def __init__(self, most: int) -> None:
        self.rows = most

    def run(self, work: Callable[[Tensor], Tensor], inputs: Tensor) -> Iterator[Tensor]:
        """work(part) for one part of `inputs` after the other. Raises ModelUnusable where not even one row fits."""
        start = 0
        while start < len(inputs):
            part = inputs[start : start + self.rows]
            try:
                result = work(part)
            except torch.OutOfMemoryError:
                if len(part) == 1:
                    raise ModelUnusable(
                        "the device lacks memory for even one photo; end what else uses it, or use --device cpu"
                    ) from None
                self.rows = len(part) // 2
            else:
                yield result
                start += len(part)
                continue
            torch.cuda.empty_cache()  # after the error is gone, which kept what was computed alive
