from __future__ import annotations

import json
from typing import Any

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
        from searchengine.index.status import status_of

        if as_json:
            click.echo(json.dumps(status_of(opened)))
        else:
            _print_status(status_of(opened), place=opened.place)


def _print_status(status: dict[str, Any], *, place: str) -> None:
    rows = {
        "index": place,
        "images": f"{status['images']:,}",
        "vectors": f"{status['vectors']:,} of dimension {status['dim']}"
        + (f", in {status['segments']:,} segments" if status["segments"] else ""),
        "failures": f"{status['failures']:,}" + (" (status --failures lists them)" if status["failures"] else ""),
        "model": f"{printable(status['model'])} in {status['precision']} ({status['fingerprint'][:12]})",
        "search": _describe_search(status),
        "size": "as Milvus knows" if status["size_bytes"] is None else f"{status['size_bytes'] / 2**20:,.1f} MiB",
        "last run": _describe_run(status["last_run"]) if status["last_run"] else "none yet",
    }
    if change := status["model_change"]:
        rows["changing"] = (
            f"to {printable(change['model'])} in {change['precision']}: {change['vectors']:,} vectors are made "
            "(searchengine reencode goes on, or --cancel)"
        )
    for name, value in rows.items():
        click.echo(f"{name:<9} {value}")


def _describe_search(status: dict[str, Any]) -> str:
    if status["index_kind"] == "milvus":
        return "by Milvus; scores are exact"
    if status["index_kind"] == "flat":
        return "flat: every vector is compared, so it is exact"
    described = f"{status['index_kind']}: recall@10 {status['recall_at_10']:.3f} against exact search; scores are exact"
    newer = status["vectors_not_in_ann"]
    return described + (f"; {newer:,} newer vectors are all compared" if newer else "")


def _describe_run(run: dict[str, Any]) -> str:
    counted = ", ".join(f"{run[name]:,} {name}" for name in ("added", "updated", "moved", "deleted", "failed"))
    return f"{run['started_at']}: {counted}" + ("" if run["finished_at"] else " (it did not finish)")
