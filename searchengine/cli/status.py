from __future__ import annotations

import json

import click

from searchengine.cli.options import index_option, json_option, open_for_reading, settings_from
from searchengine.text import printable


@click.command("status", epilog="Example:  searchengine status --failures")
@index_option
@click.option("--failures", is_flag=True, help="List the files that could not be used, each with its reason.")
@json_option
def command(index: str | None, failures: bool, as_json: bool) -> None:
    """Show what is in the index."""
    with open_for_reading(settings_from(index=index)) as opened:
        if failures:
            for store, key, reason in opened.failed_photos():
                line = {"store": store, "path": key, "reason": reason}
                click.echo(json.dumps(line) if as_json else f"{printable(key)}: {reason}")
            return
        snapshot = opened.snapshot()
        size_bytes = opened.size_bytes()
        status = {
            "images": opened.count_images(),
            "vectors": len(snapshot) if snapshot.alive is None else len(snapshot.alive),
            "segments": len(snapshot.segments),
            "failures": opened.count_failures(),
            "model": opened.identity.encoder,
            "fingerprint": opened.identity.fingerprint,
            "dim": opened.dim,
            "precision": opened.identity.precision,
            "index_kind": "flat",
            "recall_at_10": 1.0,
            "size_bytes": size_bytes,
            "last_run": opened.last_run(),
        }
        folder = opened.folder
    if as_json:
        click.echo(json.dumps(status))
        return
    last_run = status["last_run"]
    rows = {
        "index": printable(str(folder)),
        "images": f"{status['images']:,}",
        "vectors": f"{status['vectors']:,} of dimension {status['dim']}, in {status['segments']:,} segments",
        "failures": f"{status['failures']:,}" + (" (status --failures lists them)" if status["failures"] else ""),
        "model": f"{printable(str(status['model']))} ({str(status['fingerprint'])[:12]})",
        "search": "exact: every vector is compared",
        "size": f"{size_bytes / 2**20:,.1f} MiB",
        "last run": _describe_run(last_run) if isinstance(last_run, dict) else "none yet",
    }
    for name, value in rows.items():
        click.echo(f"{name:<9} {value}")


def _describe_run(run: dict[str, object]) -> str:
    counted = ", ".join(f"{run[name]:,} {name}" for name in ("added", "updated", "moved", "deleted", "failed"))
    return f"{run['started_at']}: {counted}" + ("" if run["finished_at"] else " (it did not finish)")
