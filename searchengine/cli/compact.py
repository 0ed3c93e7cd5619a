from __future__ import annotations

import json
from typing import Any

import click

from searchengine.cli.options import index_option, json_option, open_for_reading, parse_size, settings_from
from searchengine.cli.output import notice, progress_bar
from searchengine.cli.writing import writable
from searchengine.milvus import is_milvus


@click.command("compact", epilog="Example:  searchengine compact --memory 2G")
@click.option(
    "--kind",
    type=click.Choice(["auto", "flat", "scan", "ivf"]),
    default="auto",
    show_default=True,
    help="How to search: flat compares all vectors, scan short codes of all, ivf codes where it matters.",
)
@click.option("--memory", metavar="SIZE", help="What a search may keep in memory: 2G.")
@click.option(
    "--recall",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.99,
    show_default=True,
    help="Share of the ten best that ivf has to find.",
)
@click.option("--rebuild", is_flag=True, help="Build it anew, even where it is as it should be.")
@index_option
@json_option
def command(index: str | None, as_json: bool, memory: str | None, **choices: Any) -> None:
    """Merge segments, drop vectors of photos that are gone, and build what makes searches in large libraries fast.

    A library of 20,000 photos or more gets short codes of all its vectors (scan), from 200,000 on in lists of which a
    search reads few (ivf). They say where to look; scores are exact all the same, and `searchengine status` shows the
    recall that was measured. Newer photos are found at once, and become part of it the next time. Searches go on while
    this runs, and find what they found before. Worth it after many runs of `searchengine index`, or large ones.

    Milvus builds its own index and compacts by itself; for an index there, its staging index is tidied up.
    """
    from indexer.compact import compact

    settings = settings_from(index=index)
    memory_bytes = parse_size(memory, "--memory", units="KMGT")
    if is_milvus(settings.index):
        if choices["kind"] not in ("auto", "flat") or memory_bytes is not None:
            raise click.UsageError("--kind and --memory are for an index in a folder; Milvus searches in its own way")
        choices["kind"] = "flat"
    with writable(settings) as staged, progress_bar("vectors") as advance:
        done = compact(staged.index_folder, memory_bytes=memory_bytes, on_progress=advance, **choices)
    if as_json:
        from searchengine.index.status import status_of

        with open_for_reading(settings) as opened:
            click.echo(json.dumps(status_of(opened)))
        return
    if done.merged:
        click.echo(
            f"{done.merged:,} segments became {done.written:,}, {done.dropped:,} vectors of no photo were dropped; "
            f"{done.freed_bytes / 2**20:,.1f} MiB freed"
        )
    elif done.freed_bytes > 0:
        click.echo(f"segments are as they should be; {done.freed_bytes / 2**20:,.1f} MiB freed in the tables")
    if done.built:
        click.echo(
            f"built {done.built.kind} over {done.built.count:,} vectors, with recall@10 {done.built.recall_at_10:.3f} "
            "against exact search"
        )
        if done.built.recall_at_10 < done.built.recall_target:
            notice(f"that is below the {done.built.recall_target} asked for; --kind scan finds more, and is slower")
    if not (done.merged or done.freed_bytes > 0 or done.built):
        click.echo("nothing to do")
