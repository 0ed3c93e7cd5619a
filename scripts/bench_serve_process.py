"""`searchengine serve` as a process of its own, and what it takes of the machine: for scripts/bench_serve.py."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
SETTLE_SECONDS = 60
PAGE_BYTES, TICKS = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_CLK_TCK")


class Service:
    """The service of an index, on a free port; `close` it."""

    def __init__(self, index: Path) -> None:
        command = [sys.executable, "-m", "searchengine", "serve", "--index", str(index), "--port", "0", "--json"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.url: str = json.loads(self.process.stdout.readline())["url"].rstrip("/")
        self.memory: list[tuple[int, int]] = []  # resident, and of that not shared with any file, once a second
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()

    def close(self) -> int:
        """Its exit code, when it was asked to end."""
        self._ended.set()
        self._watcher.join()
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def memory_bytes(self) -> tuple[int, int]:
        """Resident, with the vectors that it has mapped, and without what belongs to files; its children's, too."""
        each = [_memory_bytes(pid) for pid in self._pids()]
        return sum(resident for resident, _ in each), sum(own for _, own in each)

    def cpu_seconds(self) -> float:
        return sum(_cpu_seconds(pid) for pid in self._pids())

    def settle(self) -> None:
        """Until what wrk did not wait for is answered: less than a twentieth of a core is used."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline:
            used = self.cpu_seconds()
            time.sleep(0.5)
            if self.cpu_seconds() - used < 0.025:
                return
        raise SystemExit(f"the service is still busy {SETTLE_SECONDS} s after the last request")

    def ask(self, target: str) -> str:
        with urllib.request.urlopen(f"{self.url}{target}", timeout=60) as answer:
            text: str = answer.read().decode()
        return text

    def stage_seconds(self) -> dict[str, float]:
        """The work of all requests so far, by stage."""
        text = self.ask("/metrics")
        return {stage: float(sum_) for stage, sum_ in re.findall(r'_seconds_sum\{stage="(\w+)"\} (\S+)', text)}

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            self.memory.append(self.memory_bytes())

    def _pids(self) -> Iterator[int]:
        yield self.process.pid
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            with suppress(FileNotFoundError):  # a thread that has just ended
                yield from map(int, (task / "children").read_text().split())


def _memory_bytes(pid: int) -> tuple[int, int]:
    try:
        resident, shared = map(int, Path(f"/proc/{pid}/statm").read_text().split()[1:3])
    except OSError:  # it has just ended
        return 0, 0
    return resident * PAGE_BYTES, (resident - shared) * PAGE_BYTES


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS
