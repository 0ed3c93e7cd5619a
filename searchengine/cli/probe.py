from __future__ import annotations

import json
import os
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

import click

from searchengine.cli.options import (
    device_option,
    encoder_for,
    filter_options,
    index_option,
    json_option,
    limits_from,
    model_option,
    open_for_reading,
    precision_option,
    settings_from,
)
from searchengine.cli.output import notice, progress_bar, silent_decoders, styled
from searchengine.cli.results import FOUND, NOTHING_FOUND
from searchengine.errors import ImageError, IndexNotFound, UsageError
from searchengine.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from searchengine.filters import Filters
    from searchengine.index.protocol import PhotoIndex
    from searchengine.probe import Probabilities, Probe
    from searchengine.settings import Settings
    from searchengine.vectors import Encoder

    Results = Generator[tuple[str, Probabilities], None, None]

TABLE_TOP = 3
MAX_LABEL_COLUMNS = 30


@click.group(
    "probe",
    epilog="Example:  searchengine probe fit labels.csv --out mine.probe  (then probe apply mine.probe --index --json)",
)
def command() -> None:
    """Learn classes from photos that you labelled, and apply them to any others.

    A linear probe is a small classifier on top of the encoder's vectors. Five photos of each class make one.
    """


@command.command("fit", epilog="Example:  searchengine probe fit labels.csv --images ~/Pictures --out dogs.probe")
@click.argument("labels", metavar="LABELS.csv")
@click.option("--out", required=True, metavar="FILE", help="File for the probe.")
@click.option("--images", metavar="DIR", help="Where relative paths begin [default: the folder of LABELS.csv].")
@click.option("--overwrite", is_flag=True, help="Replace FILE if there is one.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Deals the photos into parts.")
@index_option
@model_option
@precision_option
@device_option
@json_option
def fit(
    labels: str,
    out: str,
    images: str | None,
    overwrite: bool,
    seed: int,
    index: str | None,
    model: str | None,
    precision: str | None,
    device: str | None,
    as_json: bool,
) -> None:
    """Fit a probe to labelled photos, and tell how good it is and whether more labels would help.

    LABELS.csv begins with a line of column names, path (or file) and label among them; each other line is a photo.
    Every class needs three different photos at least, and is better with five or more. Vectors that the index has are
    used, others computed. Accuracy is measured on photos that were held out, and copies of a photo count as one.
    """
    from searchengine.labels import read_labels_csv
    from searchengine.photo_vectors import vectors_of
    from searchengine.probe import check_writable, save_probe
    from searchengine.probe_fit import examples_of
    from searchengine.probe_fit import fit as fit_probe

    out = os.path.expanduser(out)
    check_writable(out, overwrite=overwrite)
    photos = read_labels_csv(os.path.expanduser(labels), images=images and os.path.expanduser(images))
    settings = settings_from(index=index, model=model, precision=precision, device=device)
    encoder = encoder_for(settings)
    known = []
    opened = _index_of(settings, encoder)
    with opened or nullcontext(), silent_decoders(), progress_bar("embedding") as advance:
        outcomes = vectors_of(
            [photo.path for photo in photos],
            encoder=encoder,
            index=opened,
            limits=limits_from(settings),
            batch_size=settings.batch_size,
            workers=settings.workers or None,
        )
        for done, (photo, (_, outcome)) in enumerate(zip(photos, outcomes, strict=True)):
            advance(done, len(photos))
            if isinstance(outcome, ImageError):
                notice(f"skipped line {photo.line}, {printable(photo.path)}: {outcome}")
            else:
                known.append((photo, outcome))
        advance(len(photos), len(photos))
    with progress_bar("fitting") as advance:
        probe = fit_probe(examples_of(known), encoder=encoder, seed=seed, on_progress=advance)
    save_probe(out, probe, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps({"out": out, "model": probe.encoder, "failed": len(photos) - len(known), **probe.report}))
    else:
        _print_report(probe.report)
        notice(f"wrote {printable(out)}")


@command.command("apply", epilog="Example:  searchengine probe apply dogs.probe --index --under ~/Pictures/2024 --json")
@click.argument("file", metavar="FILE")
@click.argument("images", nargs=-1, metavar="[IMAGE...]")
@click.option(
    "--index",
    is_flag=False,
    flag_value="",
    metavar="[DIR]",
    help="Without IMAGE: all photos of the index, the default one if DIR is left out. With IMAGE: where their vectors "
    "may be found.",
)
@click.option(
    "--top", type=click.IntRange(min=1), help="Only the N likeliest labels [default: 3 in a table, else all]."
)
@filter_options
@device_option
@json_option
def apply(
    file: str,
    images: tuple[str, ...],
    index: str | None,
    top: int | None,
    filters: Filters,
    device: str | None,
    as_json: bool,
) -> int:
    """Tell for each photo the probability of each class that the probe FILE knows.

    The probabilities of a photo add up to 1 and presume that it shows one of the classes, each as often as among the
    labelled photos. `--index` takes the vectors that are stored and reads no photo; the filters narrow it. Files that
    cannot be used are skipped with a warning. Exit code 1 means that there was no photo to tell of.
    """
    from searchengine.probe import load_probe

    if not images and index is None:
        raise UsageError("there is no photo to apply the probe to; name some, or say --index for all that are indexed")
    if images and filters:
        raise UsageError("filters narrow the photos of the index; they do not go with photos that are named")
    settings = settings_from(index=index or None, device=device)
    probe = load_probe(os.path.expanduser(file))
    found = False
    with silent_decoders(), progress_bar("classifying") as advance:
        if images:
            results = _of_files(probe, [os.path.expanduser(image) for image in images], settings)
        else:
            results = _of_index(probe, settings, filters, advance)
        shown = min(top or (len(probe.classes) if as_json else TABLE_TOP), len(probe.classes))
        with closing(results):
            for path, probabilities in results:
                best = [(probe.classes[i], float(probabilities[i])) for i in (-probabilities).argsort(kind="stable")]
                _print_result(path, best[:shown], probe.classes, as_json=as_json, first=not found)
                found = True
    if not found:
        notice("no photo could be classified")
    return FOUND if found else NOTHING_FOUND


def _of_index(probe: Probe, settings: Settings, filters: Filters, advance: Callable[[int, int], None]) -> Results:
    from searchengine.probe import classify_index

    with open_for_reading(settings) as index:
        for photo, probabilities in classify_index(probe, index, filters=filters, on_progress=advance):
            yield photo.key, probabilities


def _of_files(probe: Probe, paths: list[str], settings: Settings) -> Results:
    """Raises ModelMismatch where the probe's encoder is no longer what it was."""
    from searchengine.models.registry import load_encoder
    from searchengine.photo_vectors import vectors_of

    encoder = load_encoder(
        probe.encoder, device=settings.device, precision=probe.precision, models_folder=settings.models_folder
    )
    probe.check_encoder(
        name=encoder.name,
        fingerprint=encoder.fingerprint,
        dim=encoder.dim,
        whose="the encoder of this name here is",
    )
    with _index_of(settings, encoder) or nullcontext() as index:
        for path, outcome in vectors_of(
            paths,
            encoder=encoder,
            index=index,
            limits=limits_from(settings),
            batch_size=settings.batch_size,
            workers=settings.workers or None,
        ):
            if isinstance(outcome, ImageError):
                notice(f"skipped {printable(path)}: {outcome}")
            else:
                yield path, probe.probabilities(outcome.vector[None])[0]


def _index_of(settings: Settings, encoder: Encoder) -> PhotoIndex | None:
    """The index, where there is one and it has this encoder's vectors."""
    try:
        index = open_for_reading(settings)
    except IndexNotFound:
        return None
    if index.identity.fingerprint == encoder.fingerprint:
        return index
    index.close()
    return None


def _print_report(report: dict[str, Any]) -> None:
    copies = f" ({report['copies']:,} copies left out)" if report["copies"] else ""
    click.echo(f"{report['photos']:,} photos{copies}, {len(report['classes']):,} classes")
    click.echo(
        f"accuracy {report['accuracy']:.1%} ({report['accuracy_low']:.1%} to {report['accuracy_high']:.1%}) on photos "
        f"held out; the most frequent class alone would be right in {report['most_frequent']:.1%}"
    )
    click.echo(f"probabilities are off by {report['calibration_error']:.1%} on average")
    width = max(len("class"), *(len(printable(name)) for name in report["classes"]))
    click.echo(styled(f"\n{'class':<{width}}  photos  precision  recall", bold=True))
    for name, known in report["classes"].items():
        precision = "-" if known["precision"] is None else f"{known['precision']:.1%}"
        click.echo(f"{printable(name):<{width}}  {known['photos']:>6,}  {precision:>9}  {known['recall']:>6.1%}")
    click.echo(styled("\nfitted on  accuracy", bold=True))
    for point in report["learning_curve"]:
        click.echo(f"{point['photos']:>9,}  {point['accuracy']:>8.1%}")
    last = report["last_doubling"]
    if last is None:
        click.echo("\ntoo few photos of some class to tell whether more labels would help")
        return
    advice = (
        "as many labels again may help, though seldom by as much"
        if last["low"] > 0
        else "no sign that as many labels again would help"
    )
    span = f"{100 * last['gain']:+.1f} points ({100 * last['low']:+.1f} to {100 * last['high']:+.1f})"
    click.echo(f"\nthe last doubling of the labels brought {span}: {advice}")


def _print_result(
    path: str, best: list[tuple[str, float]], classes: tuple[str, ...], *, as_json: bool, first: bool
) -> None:
    if as_json:
        # Vectors are float32: more than six digits would promise what is not known.
        click.echo(json.dumps({"path": path, "probabilities": {label: float(f"{p:.6g}") for label, p in best}}))
        return
    width = min(max(len(printable(name)) for name in classes), MAX_LABEL_COLUMNS)
    if first:
        click.echo(styled(f"{'p':>6}  {'label':<{width}}  " * len(best) + "path", bold=True))
    cells = []
    for label, p in best:
        text = printable(label)
        cells.append(f"{p:>6.1%}  {text if len(text) <= width else f'{text[: width - 1]}…':<{width}}  ")
    click.echo(cells[0] + styled("".join(cells[1:]), dim=True) + printable(path))
