from __future__ import annotations

import json
from contextlib import nullcontext

import click

from searchengine.cli.options import (
    device_option,
    encoder_for,
    index_option,
    json_option,
    model_option,
    precision_option,
    settings_from,
)
from searchengine.cli.output import notice, progress_bar
from searchengine.text import printable


@click.command("evaluate", epilog="Example:  searchengine evaluate captions.json --images photos --json")
@click.argument("captions", metavar="CAPTIONS.json")
@click.option("--images", required=True, help="Folder that holds the captioned photos.")
@index_option
@model_option
@precision_option
@device_option
@json_option
def command(
    captions: str,
    images: str,
    index: str | None,
    model: str | None,
    precision: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Measure retrieval on captioned photos, text to image and image to text.

    Vectors that the index has are used; what it lacks is embedded for the measurement and not stored.
    """
    from searchengine.captions import read_captions
    from searchengine.errors import IndexNotFound
    from searchengine.evaluate import evaluate
    from searchengine.index.reader import Index

    settings = settings_from(index=index, model=model, precision=precision, device=device)
    photos = read_captions(captions, images=images)
    encoder = encoder_for(settings)
    try:
        opened: Index | None = Index(settings.index_folder)
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
            batch_size=settings.batch_size,
            workers=settings.workers or None,
            on_progress=advance,
        )
    for path, reason in result.failed:
        notice(f"skipped {printable(str(path))}: {reason}")
    if as_json:
        click.echo(json.dumps(result.as_dict()))
        return
    click.echo(f"{result.images:,} photos, {result.captions:,} captions, encoder {printable(result.model)}")
    click.echo(f"{'':<14}  R@1    R@5    R@10   median rank")
    for name, retrieval in (("text to image", result.text_to_image), ("image to text", result.image_to_text)):
        recalls = "  ".join(f"{share:.3f}" for share in retrieval.recall.values())
        click.echo(f"{name:<14}  {recalls}  {retrieval.median_rank:g}")
