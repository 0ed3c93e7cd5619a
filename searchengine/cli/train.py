from __future__ import annotations

import json
from pathlib import Path

import click

from searchengine.cli.options import device_option, json_option, settings_from
from searchengine.cli.output import notice, progress_bar
from searchengine.text import printable


@click.command("train", epilog="Example:  searchengine train captions.json --images photos --out mine.safetensors")
@click.argument("captions", metavar="CAPTIONS.json")
@click.option("--images", required=True, help="Folder that holds the captioned photos.")
@click.option(
    "--out",
    default="heads.safetensors",
    show_default=True,
    help="File for the trained heads; use it as --model FILE, or `searchengine models import FILE`.",
)
@click.option(
    "--epochs", type=click.IntRange(min=1), help="Passes over the photos [default: enough for the shipped heads]."
)
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same heads.")
@device_option
@json_option
def command(
    captions: str, images: str, out: str, epochs: int | None, seed: int, device: str | None, as_json: bool
) -> None:
    """Train projection heads on your own captioned photos.

    The towers stay frozen and only the heads learn, by the contrastive loss of the CLIP paper. The result is a new
    encoder with its own fingerprint; no index is touched.
    """
    from indexer.train import train
    from searchengine.captions import read_captions

    settings = settings_from(device=device)
    photos = read_captions(captions, images=images)
    with progress_bar("training") as advance:
        report = train(photos, out=Path(out), epochs=epochs, seed=seed, device=settings.device, on_progress=advance)
    for path, reason in report.failed:
        notice(f"skipped {printable(str(path))}: {reason}")
    if as_json:
        click.echo(json.dumps(report.as_dict()))
        return
    click.echo(
        f"trained on {report.photos:,} photos, {report.captions:,} captions in {report.seconds:.0f} s; wrote {out}"
    )
    click.echo("loss by epoch: " + " ".join(f"{loss:.3f}" for loss in report.losses))
    for name, retrieval in (("text to image", report.text_to_image), ("image to text", report.image_to_text)):
        if retrieval is not None:
            recalls = "  ".join(f"R@{k} {share:.3f}" for k, share in retrieval.recall.items())
            click.echo(f"{name} on {report.validation_photos:,} photos held out: {recalls}")
