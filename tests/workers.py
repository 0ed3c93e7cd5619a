"""Encoders for workers in processes of their own, which find them here by their names."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from fakes import FakeEncoder

from indexer.engines.messages import EncoderSource
from searchengine.errors import ImageError, ModelNotFound, SearchEngineError
from searchengine.stores import StoredPhoto
from searchengine.stores.local import LocalStore
from searchengine.vectors import FloatMatrix, PixelBatch


@dataclass(frozen=True, kw_only=True)
class FakeSource(EncoderSource):
    """Loads an encoder that leaves a line in `log` for each batch: the process, its device, and how many photos.

    `seconds`: that it takes over a batch. `together`: how many must be loaded before one begins. `fails`: kill, raise:
    what it does instead of encoding a black photo; load, disk, machine, start: how it cannot be loaded at all.
    """

    log: Path
    seconds: float = 0.0
    fails: str = ""
    together: int = 1

    def load(self, device: str) -> FakeEncoder:
        if self.fails == "load":
            raise ModelNotFound("the weights are not here")
        if self.fails == "disk":
            raise OSError("Input/output error")
        if self.fails == "machine":
            raise SearchEngineError("a process to decode photos in does not start")
        if self.fails == "start":
            os.kill(os.getpid(), signal.SIGKILL)
        self._wait_for_the_others()
        return LoggingEncoder(self, device)

    def _wait_for_the_others(self) -> None:
        """So that none does all of the work before another has started, as on a busy machine."""
        self.log.with_name(f"loaded-{os.getpid()}").touch()
        end = time.monotonic() + 60
        while len(list(self.log.parent.glob("loaded-*"))) < self.together and time.monotonic() < end:
            time.sleep(0.02)


class LoggingEncoder(FakeEncoder):
    def __init__(self, source: FakeSource, device: str) -> None:
        super().__init__(name=source.name)
        self.source, self.device = source, device

    def encode_pixels(self, pixels: PixelBatch) -> FloatMatrix:
        if (pixels == 0).all(axis=(1, 2, 3)).any():
            if self.source.fails == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.source.fails == "raise":
                raise RuntimeError("the device is gone\nand more of that")
        with self.source.log.open("a") as log:
            log.write(f"{os.getpid()} {self.device} {len(pixels)}\n")
        time.sleep(self.source.seconds)
        return super().encode_pixels(pixels)


@dataclass(frozen=True, kw_only=True)
class BlindSource(FakeSource):
    """Its worker sees no photo, as on a machine where the folder is not mounted."""

    def load(self, device: str) -> FakeEncoder:
        def read(store: LocalStore, key: str, *, max_bytes: int) -> tuple[StoredPhoto, bytes]:
            raise ImageError("cannot be read: No such file or directory")

        LocalStore.read = read  # type: ignore[method-assign]
        return super().load(device)


@dataclass(frozen=True, kw_only=True)
class FlakySource(FakeSource):
    """Its worker cannot read the first photo that it takes up, as while another program writes it."""

    def load(self, device: str) -> FakeEncoder:
        real = LocalStore.read

        def fail_once(store: LocalStore, key: str, *, max_bytes: int) -> tuple[StoredPhoto, bytes]:
            LocalStore.read = real  # type: ignore[method-assign]
            raise ImageError("changed while it was read")

        LocalStore.read = fail_once  # type: ignore[method-assign]
        return super().load(device)
