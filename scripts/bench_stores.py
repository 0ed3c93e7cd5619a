"""How fast photos come from a bucket beside a folder: near and far, with and without fetching ahead.

    scripts/bench_stores.py PHOTOS [--count 500] [--rounds 3] [--delay-ms 50]

Runs of `indexer.build` over the same JPEGs: in a folder, in a bucket of SeaweedFS on loopback, and in the same bucket
behind a relay that keeps every packet for half of DELAY_MS each way. "In turn": the threads that decode read, too, as
they do from a folder. The encoder takes no time, so what is measured is reading and decoding. Rounds are interleaved;
medians are told. The listing is told by itself.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from unittest.mock import patch

import s3fs
from bench_crawl import RandomEncoder
from hardware import cpu_name

import indexer
from searchengine.formats import EXTENSIONS
from searchengine.stores.s3 import S3Files

BUCKET = "bench"
KEY, SECRET = "bench", "bench-secret"
START_SECONDS = 60
PORTS = {"master": 17333, "volume": 17080, "filer": 17888, "s3": 17443}


@contextmanager
def seaweed(folder: Path) -> Iterator[int]:
    """SeaweedFS on loopback with its S3 gateway; gives that one's port."""
    (folder / "data").mkdir()
    identity = {"name": KEY, "credentials": [{"accessKey": KEY, "secretKey": SECRET}]}
    settings = {"identities": [{**identity, "actions": ["Admin", "Read", "Write", "List"]}]}
    (folder / "s3.json").write_text(json.dumps(settings))
    command = [str(Path(sys.executable).with_name("weed")), "server", f"-dir={folder / 'data'}"]
    command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3", f"-s3.config={folder / 's3.json'}"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += [f"-{name}.port={port}" for name, port in PORTS.items()]
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                client(PORTS["s3"]).mkdir(BUCKET)
                client(PORTS["s3"]).pipe_file(f"{BUCKET}/ready", b"x")
                client(PORTS["s3"]).rm_file(f"{BUCKET}/ready")
                break
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield PORTS["s3"]
    finally:
        server.kill()
        server.wait()


def client(port: int) -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(
        key=KEY,
        secret=SECRET,
        endpoint_url=f"http://127.0.0.1:{port}",
        client_kwargs={"region_name": "us-east-1"},
        skip_instance_cache=True,
    )


@contextmanager
def relay(port: int, *, delay_seconds: float) -> Iterator[int]:
    """A port, of a process of its own, that leads to `port` with `delay_seconds` each way."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        process = multiprocessing.Process(target=pass_on, args=(listening, port, delay_seconds), daemon=True)
        process.start()
        try:
            yield listening.getsockname()[1]
        finally:
            process.kill()
            process.join()


def pass_on(listening: socket.socket, port: int, delay_seconds: float) -> None:
    async def one_way(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(1 << 16):
            loop.call_later(delay_seconds, writer.write, data)
        loop.call_later(delay_seconds, writer.close)

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(one_way(reader, far_writer), one_way(far_reader, writer), return_exceptions=True)

    async def serve() -> None:
        server = await asyncio.start_server(connect, sock=listening)
        await server.serve_forever()

    asyncio.run(serve())


def fill(folder: Path, port: int) -> None:
    files = client(port)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: files.pipe_file(f"{BUCKET}/{path.name}", path.read_bytes()), folder.iterdir()))


def measure(location: str, *, port: int, ahead: bool) -> tuple[float, float]:
    """Photos a second of a run without its listing, and the seconds that the listing took."""
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
    reads = patch.object(S3Files, "reads_at_once", S3Files.reads_at_once if ahead else 0)
    with tempfile.TemporaryDirectory() as folder, reads:
        report = indexer.build(Path(folder) / "index", [location], encoder=RandomEncoder(), workers=os.cpu_count())
    assert report.failed == 0
    listing = report.seconds_by_stage["list"]
    return report.added / (report.seconds - listing), listing


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--delay-ms", type=float, default=50.0)
    given = parser.parse_args()
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        del os.environ[name]
    os.environ.update(AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION="us-east-1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photos"
        folder.mkdir()
        found = sorted(path for path in given.photos.rglob("*") if path.suffix.lower() in EXTENSIONS)[: given.count]
        for number, path in enumerate(found):
            shutil.copyfile(path, folder / f"{number:06}{path.suffix}")
        with seaweed(Path(name)) as near, relay(near, delay_seconds=given.delay_ms / 2000) as far:
            fill(folder, near)
            bucket = f"s3://{BUCKET}"
            runs = {
                "a folder": (str(folder), near, True),
                "a bucket, 0 ms, in turn": (bucket, near, False),
                "a bucket, 0 ms, ahead": (bucket, near, True),
                f"a bucket, {given.delay_ms:.0f} ms, in turn": (bucket, far, False),
                f"a bucket, {given.delay_ms:.0f} ms, ahead": (bucket, far, True),
            }
            measured: dict[str, list[tuple[float, float]]] = {title: [] for title in runs}
            for _ in range(given.rounds):
                for title, (location, port, ahead) in runs.items():
                    measured[title].append(measure(location, port=port, ahead=ahead))
        size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{len(found):,} photos, {size / len(found) / 1000:.0f} kB each; medians of {given.rounds} rounds in turn")
    print(f"{cpu_name()}, {os.cpu_count()} cores; Python {platform.python_version()}\n")
    print("| photos in | photos/s | listing, s |\n| --- | --- | --- |")
    for title, results in measured.items():
        rates, listings = zip(*results, strict=True)
        print(f"| {title} | {statistics.median(rates):.0f} | {statistics.median(listings):.2f} |")


if __name__ == "__main__":
    main()
