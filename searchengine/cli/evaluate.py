from __future__ import annotations

import json
from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from searchengine.cli.options import (
    device_option,
    encoder_for,
    index_option,
    json_option,
    limits_from,
    model_option,
    precision_option,
    settings_from,
)
from searchengine.cli.output import notice, progress_bar
from searchengine.cli.results import writable
from searchengine.text import printable

if TYPE_CHECKING:
    from searchengine.evaluate import Evaluation
    from searchengine.metrics import Interval


@click.command("evaluate", epilog="Example:  searchengine evaluate captions.json --images photos --json")
@click.argument("captions", metavar="CAPTIONS.json")
@click.option("--images", required=True, help="Folder that holds the captioned photos.")
@click.option(
    "--report", metavar="FILE.html", help="Also write a page of the figures, with pictures of what went worst."
)
@index_option
@model_option
@precision_option
@device_option
@json_option
def command(
    captions: str,
    images: str,
    report: str | None,
    index: str | None,
    model: str | None,
    precision: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Measure retrieval on captioned photos: whether captions find their photo, and photos their captions.

    What several captions of a photo say is also asked for by name ("dog"): mean average precision, and how well the
    line where matches end is drawn. Each figure comes with its 95 % interval. Vectors that the index has are used; what
    it lacks is embedded for the measurement and not stored. A photo that is listed twice counts once.
    """
    from searchengine.captions import read_captions
    from searchengine.errors import IndexNotFound
    from searchengine.evaluate import evaluate
    from searchengine.index.protocol import PhotoIndex, open_index

    settings = settings_from(index=index, model=model, precision=precision, device=device)
    page = None if report is None else writable(report, ".html", ".htm")
    photos = read_captions(captions, images=images)
    encoder = encoder_for(settings)
    try:
        opened: PhotoIndex | None = open_index(settings.index_place)
    except IndexNotFound:
        opened = None
    if opened is not None and opened.identity.fingerprint != encoder.fingerprint:
        opened.close()
        opened = None
    with opened or nullcontext(), progress_bar("embedding") as advance:
        result = evaluate(
            photos,
            encoder=encoder,
            index=opened,
            limits=limits_from(settings),
            batch_size=settings.batch_size,
            workers=settings.workers or None,
            on_progress=advance,
        )
    for path, reason in result.failed:
        notice(f"skipped {printable(str(path))}: {reason}")
    if page is not None:
        from searchengine.cli.evaluation_page import render_evaluation

        page.write_text(render_evaluation(result, title=f"Evaluation of {captions}"), "utf-8")
        notice(f"wrote {printable(str(page))}")
    if as_json:
        click.echo(json.dumps(result.as_dict()))
    else:
        _print(result)


def _print(result: Evaluation) -> None:
    click.echo(f"{result.images:,} photos, {result.captions:,} captions, encoder {printable(result.model)}")
    click.echo(f"{'':<14}  {'R@1':<20}  {'R@5':<20}  {'R@10':<20}  median rank")
    for name, retrieval in (("text to image", result.text_to_image), ("image to text", result.image_to_text)):
        intervals = retrieval.intervals
        shares = [_figure(share, intervals[f"recall@{k}"]) for k, share in retrieval.recall.items()]
        low, high = intervals["median_rank"]
        click.echo(f"{name:<14}  {'  '.join(shares)}  {retrieval.median_rank:g} [{low:g}, {high:g}]")
    concepts = result.concepts
    if concepts is None:
        return
    click.echo(f"{len(concepts.of_each):,} concepts asked for by name, and the line where matches end")
    for name, value in {"map": concepts.map, **concepts.cutoff}.items():
        click.echo(f"{name:<14}  {_figure(value, concepts.intervals[name])}")


def _figure(value: float, interval: Interval) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
