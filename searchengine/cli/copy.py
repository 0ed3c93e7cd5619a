from __future__ import annotations

import json

import click

from searchengine.cli.interrupts import ctrl_c_stops
from searchengine.cli.options import json_option
from searchengine.cli.output import progress_bar


@click.command("copy", epilog="Example:  searchengine copy photos.index milvus://localhost:19530/photos")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option("--replace", is_flag=True, help="Also where DST has photos, and none of them is in SRC.")
@json_option
def command(source: str, destination: str, replace: bool, as_json: bool) -> None:
    """Make the index DST the same as the index SRC: a folder, milvus://HOST:PORT/NAME or milvus:///folder/photos.db.

    DST is made if there is none. Photos are compared by id and digest, and only those that differ move: run it again
    to go on after Ctrl-C or a crash, or to bring what is new. Photos that only DST has leave it. Ids, vectors, tags and
    failures stay as they are; in the end all digests are compared, and a sample of vectors byte for byte.

    A copy in a folder is searched exactly until `searchengine compact` makes searches of large libraries fast.
    """
    from indexer.copy import copy

    with ctrl_c_stops() as stop, progress_bar("copying") as advance:
        report = copy(source, destination, replace=replace, on_progress=advance, stop=stop)
    if as_json:
        click.echo(json.dumps(report.as_dict()))
        return
    names = ("added", "updated", "deleted")
    told = ", ".join(f"{count:,} {name}" for name in names if (count := getattr(report, name))) or "nothing to do"
    click.echo(f"{told}; {report.unchanged:,} unchanged")
    click.echo(
        f"{report.photos:,} photos agree by their digests, {report.sampled:,} of them read back byte for byte; "
        f"{report.seconds:.1f} s"
    )
