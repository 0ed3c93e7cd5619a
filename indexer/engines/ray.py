"""Workers as actors of a Ray cluster (https://docs.ray.io): one a GPU, or where there is none, one a machine.

`index --engine ray` joins the cluster that RAY_ADDRESS names or that `ray start` started on this machine, else it
starts one of this machine alone, which asks everybody for a token. `ray://HOST:PORT` goes through a Ray Client server.

Ray tells when a machine is lost; what becomes of its photos is `crew.py`'s business, so Ray itself repeats nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import warnings
from queue import Empty, SimpleQueue
from typing import Any

from indexer.engines import Place
from indexer.engines.messages import EncoderSource, Lost, Setup, ToRun, ToWorker
from searchengine.errors import SearchEngineError, UsageError
from searchengine.text import printable

DEVICES = ("auto", "cpu", "cuda")
# Vectors and names go through the object store, photos never do.
OBJECT_STORE_BYTES = 256 * 2**20
LOOPBACK = "127.0.0.1"
CONNECT_SECONDS = 10.0


class RayEngine:
    """`address`: of a Ray Client server, as ray://HOST:PORT; None joins or starts a cluster as told above.

    `device`: what the workers encode on: auto (GPUs, if the cluster has any), cpu or cuda.
    """

    def __init__(self, source: EncoderSource, *, address: str | None = None, device: str = "auto") -> None:
        """Raises UsageError where Ray is not installed, or for a device that it does not give out."""
        if device not in DEVICES:
            raise UsageError(f"--device is {device}, but Ray gives out the devices; use one of {', '.join(DEVICES)}")
        try:
            import ray
        except ImportError:
            raise UsageError(
                "--engine ray needs the extra ray; install it with: pip install 'searchengine[ray]'"
            ) from None
        self.source = source
        self._ray: Any = ray
        self._address = address
        self._device = device
        self._print: Any = ray._private.worker.print_to_stdstream
        self._joined = False
        self._links: dict[Any, RayLink] = {}  # by what each is waited for with
        self._lock = threading.Lock()

    def places(self) -> list[Place]:
        self._join()
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        on_gpus = self._device != "cpu" and any(node["Resources"].get("GPU") for node in nodes)
        places = []
        for node in nodes:
            name, cores = node["NodeManagerHostname"], int(node["Resources"].get("CPU", 0))
            workers = int(node["Resources"].get("GPU", 0)) if on_gpus else min(cores, 1)
            for number in range(workers):
                places.append(
                    Place(
                        name=f"GPU {number} of {name}" if on_gpus else name,
                        device="cuda" if on_gpus else "cpu",
                        cores=max(1, cores // workers),
                        share=1 / workers,
                        node=node["NodeID"],
                    )
                )
        if not places or (self._device == "cuda" and not on_gpus):
            what = "GPU" if self._device == "cuda" else "processor"
            raise SearchEngineError(f"the Ray cluster has no {what} to give; `ray status` shows what it has")
        return places

    def start(self, place: Place, setup: Setup) -> RayLink:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = self._ray.remote(Actor).options(
            num_cpus=place.cores,
            num_gpus=int(place.device == "cuda"),
            max_restarts=0,
            max_concurrency=2,
            # Where that machine is lost, on another one, once it has room.
            scheduling_strategy=NodeAffinitySchedulingStrategy(place.node, soft=True),
        )
        link = RayLink(actor.remote(setup), ray=self._ray)
        self._listen_to(link)
        return link

    def hear(self, timeout_seconds: float) -> list[tuple[RayLink, ToRun]]:
        with self._lock:
            waiting = list(self._links)
        if not waiting:
            time.sleep(timeout_seconds)
            return []
        said: list[tuple[RayLink, ToRun]] = []
        ready, _ = self._ray.wait(waiting, num_returns=1, timeout=timeout_seconds)
        for reference in ready:
            with self._lock:
                link = self._links.pop(reference)
            try:
                messages = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                messages = [Lost(_reason(error))]
            said += [(link, message) for message in messages]
            if isinstance(messages[-1], Lost):
                link.end()
            else:
                self._listen_to(link)
        return said

    def close(self) -> None:
        with self._lock:
            links, self._links = list(self._links.values()), {}
        for link in links:
            link.end()
        if self._joined:
            self._ray.shutdown()
            self._ray._private.worker.print_to_stdstream = self._print
            self._joined = False

    def _listen_to(self, link: RayLink) -> None:
        reference = link.actor.say.remote()
        with self._lock:
            self._links[reference] = link

    def _join(self) -> None:
        """Raises SearchEngineError where there is no cluster."""
        if self._ray.is_initialized():  # by the program that this is a library of
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = self._address or os.environ.get("RAY_ADDRESS")
        # Ray finds the one on this machine, and what it takes to be let in, by itself.
        options: dict[str, Any] = {"address": self._address, "log_to_driver": False, "logging_level": logging.ERROR}
        if not address and not _runs_here():
            # Some of its processes listen on all interfaces; by itself it asks for a token there.
            options |= {"address": "local", "_node_ip_address": LOOPBACK, "include_dashboard": False}
            options |= {"object_store_memory": OBJECT_STORE_BYTES}
        try:
            if address:
                _check_that_it_answers(address)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._ray.init(**options)
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise SearchEngineError(
                f"no Ray cluster can be used at {printable(address or 'this machine')} ({reason}); see `ray status` "
                "there, start one with `ray start --head`, see that all of it has the same Python and Ray and, where "
                "it asks for a token, that RAY_AUTH_MODE=token and RAY_AUTH_TOKEN are set here"
            ) from None
        self._joined = True
        # Where a machine is lost, Ray says so at length on standard output, which is for results.
        self._ray._private.worker.print_to_stdstream = _be_silent


class RayLink:
    """The run's end of what leads to an actor."""

    def __init__(self, actor: Any, *, ray: Any) -> None:
        self.actor = actor
        self._end = ray.kill
        self._gone = (ray.exceptions.RayError, ConnectionError)

    def send(self, message: ToWorker) -> None:
        with contextlib.suppress(*self._gone):  # which `hear` will tell
            self.actor.hear.remote(message)

    def end(self) -> None:
        with contextlib.suppress(*self._gone):
            self._end(self.actor, no_restart=True)


class Actor:
    """A worker inside Ray: `say` waits for what it has to say, while `hear` tells it what the run says."""

    def __init__(self, setup: Setup) -> None:
        from indexer.engines.worker import Worker

        self._said: SimpleQueue[ToRun] = SimpleQueue()
        self._worker = Worker(setup, send=self._said.put)
        threading.Thread(target=self._worker.run, name="work", daemon=True).start()

    def hear(self, message: ToWorker) -> None:
        self._worker.hear(message)

    def say(self) -> list[ToRun]:
        messages = [self._said.get()]
        while True:
            try:
                messages.append(self._said.get_nowait())
            except Empty:
                return messages


def _runs_here() -> bool:
    """Whether `ray start` has left word of a cluster on this machine, and that still runs."""
    from ray._private.services import find_bootstrap_address

    address = find_bootstrap_address(None)
    try:
        _check_that_it_answers(address or "")
    except OSError:
        return False
    return bool(address)


def _check_that_it_answers(address: str) -> None:
    """Raises OSError at once where nobody listens, which Ray would try to reach for minutes; ValueError."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()


def _be_silent(*arguments: Any, **options: Any) -> None:
    pass


def _reason(error: Exception) -> str:
    """Its last line, which names the cause; those before it tell of Ray's own doings."""
    return str(error).strip().rpartition("\n")[2].strip() or type(error).__name__
