from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from searchengine.cli.options import device_option, encoder_for, json_option, settings_from
from searchengine.cli.output import notice, progress_bar
from searchengine.text import printable


@click.command("train", epilog="Example:  searchengine train captions.json --images photos --out mine.safetensors")
@click.argument("captions", metavar="CAPTIONS.json")
@click.option("--images", required=True, help="Folder that holds the captioned photos.")
@click.option(
    "--model",
    default="mini",
    show_default=True,
    help="Encoder to train: mini, a CLIP by its name in `searchengine models`, or a checkpoint.",
)
@click.option(
    "--out",
    default="heads.safetensors",
    show_default=True,
    help="File for the trained encoder; use it as --model FILE, or `searchengine models import FILE`.",
)
@click.option(
    "--epochs", type=click.IntRange(min=1), help="Passes over the photos [default: 40 for mini, 60 for a CLIP]."
)
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same encoder.")
@click.option(
    "--precision",
    metavar="fp32|bf16|fp16|int8",
    default="fp32",  # whatever indexes are made in, so that one seed gives one encoder
    show_default=True,
    help="Arithmetic of the towers while they are read.",
)
@device_option
@json_option
def command(
    captions: str,
    images: str,
    model: str,
    out: str,
    epochs: int | None,
    seed: int,
    precision: str,
    device: str | None,
    as_json: bool,
) -> None:
    """Train projection heads on your own captioned photos.

    The towers stay frozen; what follows them learns, by the contrastive loss of the CLIP paper: the heads of mini from
    the beginning, the projections of a CLIP from where they are. Some photos are held out, and Recall@K on these is
    told from before and after. The result is a new encoder with its own fingerprint, a CLIP's a whole checkpoint; no
    index and no file is touched. `searchengine reencode --model FILE` changes an index to it.
    """
    from indexer.train import refuse_to_replace, train
    from searchengine.captions import read_captions

    refuse_to_replace(Path(out))
    settings = settings_from(model=model, precision=precision, device=device)
    photos = read_captions(captions, images=images)
    encoder = encoder_for(settings)
    with progress_bar("training") as advance:
        report = train(photos, encoder=encoder, out=Path(out), epochs=epochs, seed=seed, on_progress=advance)
    for path, reason in report.failed:
        notice(f"skipped {printable(str(path))}: {reason}")
    told = report.as_dict()
    if as_json:
        click.echo(json.dumps(told))
    else:
        _print(told, out)
    if told["before"]:
        before, after = (found["text_to_image"]["recall@10"] for found in (told["before"], told))
        if after < before:
            notice(f"what was there found more of the photos held out (R@10 {before:.3f}, now {after:.3f}); keep that")


def _print(told: dict[str, Any], out: str) -> None:
    """What `indexer.train.TrainReport` has."""
    click.echo(
        f"trained on {told['photos']:,} photos, {told['captions']:,} captions in {told['seconds']:.0f} s; wrote {out}"
    )
    click.echo("loss by epoch: " + " ".join(f"{loss:.3f}" for loss in told["losses"]))
    if told["best_epoch"] < told["epochs"]:
        click.echo(f"epoch {told['best_epoch']} did best on the photos held out, and was kept")
    if not told["before"]:
        return
    for name in ("text_to_image", "image_to_text"):
        before, after = told["before"][name], told[name]
        recalls = "  ".join(f"R@{k} {before[f'recall@{k}']:.3f} -> {after[f'recall@{k}']:.3f}" for k in (1, 5, 10))
        click.echo(f"{name.replace('_', ' ')} on {told['validation_photos']:,} photos held out: {recalls}")
