from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing, suppress
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
from searchengine.cli.output import notice, progress_bar, silent_decoders, styled
from searchengine.cli.results import FOUND, NOTHING_FOUND
from searchengine.errors import ImageError, UsageError
from searchengine.text import printable

if TYPE_CHECKING:
    from searchengine.stores import ImageStore

TABLE_TOP = 3
MAX_LABEL_COLUMNS = 30


@click.command("classify", epilog="Example:  searchengine classify ~/Pictures/2024 --labels dog,cat,bicycle --json")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("--labels", metavar="A,B,C", help="The classes, by name.")
@click.option("--labels-file", metavar="FILE", help="The classes in a UTF-8 file, one a line; they may hold commas.")
@click.option("--template", multiple=True, metavar="TEXT", help="A prompt; {} is the label. Repeatable: an ensemble.")
@click.option("--templates", metavar="imagenet|simple|FILE", help="A set of prompts [default: simple].")
@click.option(
    "--top", type=click.IntRange(min=1), help="Only the N likeliest labels [default: 3 in a table, else all]."
)
@index_option
@model_option
@device_option
@precision_option
@json_option
def command(
    images: tuple[str, ...],
    labels: str | None,
    labels_file: str | None,
    template: tuple[str, ...],
    templates: str | None,
    top: int | None,
    index: str | None,
    model: str | None,
    device: str | None,
    precision: str | None,
    as_json: bool,
) -> int:
    """Sort photos into classes that you name: for each photo, the probability of each label.

    IMAGE is a picture or a folder of them. The probabilities of a photo add up to 1, so they tell which of the labels
    fits best, not whether any does; an extra label such as "something else" can take the rest. Files that cannot be
    used are skipped with a warning. Exit code 1 means that none could be classified.
    """
    from searchengine import zeroshot

    names = _names(labels, labels_file)
    prompts = _prompts(template, templates)
    sources = _sources(images)
    settings = settings_from(index=index, model=model, device=device, precision=precision)
    encoder = encoder_for(settings)
    if len(names) == 1:
        notice("with a single label its probability is always 1; give two or more to tell photos apart")
    with progress_bar("reading labels") as advance:
        vectors = zeroshot.class_vectors(encoder, names, templates=prompts, on_progress=advance)
    shown = min(top or (len(names) if as_json else TABLE_TOP), len(names))
    width = min(max(len(printable(name)) for name in names), MAX_LABEL_COLUMNS)
    classified = False
    with (
        silent_decoders(),
        closing(
            zeroshot.classify(
                _paths(sources),
                encoder=encoder,
                class_vectors=vectors,
                limits=limits_from(settings),
                batch_size=settings.batch_size,
                workers=settings.workers or None,
            )
        ) as outcomes,
    ):
        for path, outcome in outcomes:
            if isinstance(outcome, ImageError):
                notice(f"skipped {printable(path)}: {outcome}")
                continue
            best = [(names[i], float(outcome[i])) for i in (-outcome).argsort(kind="stable")[:shown]]
            if as_json:
                _print_json(path, best)
            else:
                if not classified:
                    click.echo(styled(f"{'p':>6}  {'label':<{width}}  " * shown + "path", bold=True))
                _print_row(path, best, width=width)
            classified = True
    if not classified:
        notice("no photo could be classified")
    return FOUND if classified else NOTHING_FOUND


def _names(labels: str | None, labels_file: str | None) -> list[str]:
    from searchengine.zeroshot import read_labels, split_labels

    if labels is not None and labels_file is not None:
        raise UsageError("--labels and --labels-file both name the classes; give one of them")
    if labels is not None:
        return split_labels(labels)
    if labels_file is not None:
        return read_labels(os.path.expanduser(labels_file))
    raise UsageError("no labels to choose from; name them with --labels dog,cat,bicycle or --labels-file FILE")


def _prompts(template: tuple[str, ...], templates: str | None) -> list[str]:
    from searchengine.zeroshot import check_templates, read_templates

    if template and templates is not None:
        raise UsageError("--template and --templates both name the prompts; give one of them")
    if template:
        return check_templates(template)
    return read_templates("simple" if templates is None else os.path.expanduser(templates))


def _sources(images: tuple[str, ...]) -> list[tuple[str, ImageStore | None]]:
    """Each argument, with the store that lists it if it is a folder. Raises StoreUnusable."""
    from searchengine.stores import open_store

    paths = [os.path.expanduser(image) for image in images]
    return [(path, open_store(path) if os.path.isdir(path) else None) for path in paths]


def _paths(sources: list[tuple[str, ImageStore | None]]) -> Iterator[str]:
    """Files as they were given; what is below a folder by the rules of `index`, and under the name of that folder."""
    from searchengine.formats import is_photo
    from searchengine.stores import StoredPhoto, Unlistable

    for given, store in sources:
        if store is None:
            yield given
            continue
        for item in store.scan():
            if isinstance(item, Unlistable):
                notice(f"skipped {printable(item.prefix)}: {item.reason}")
            elif isinstance(item, StoredPhoto):
                with suppress(ImageError):  # what cannot be read, and has no extension, is not known to be a photo
                    if is_photo(store, item.key):
                        yield os.path.join(given, item.key.removeprefix(store.prefix))


def _print_json(path: str, best: list[tuple[str, float]]) -> None:
    # Vectors are float32: more than six digits would promise what is not known.
    click.echo(json.dumps({"path": path, "probabilities": {label: float(f"{p:.6g}") for label, p in best}}))


def _print_row(path: str, best: list[tuple[str, float]], *, width: int) -> None:
    cells = []
    for label, p in best:
        text = printable(label)
        text = text if len(text) <= width else f"{text[: width - 1]}…"
        cells.append(f"{p:>6.1%}  {text:<{width}}  ")
    click.echo(cells[0] + styled("".join(cells[1:]), dim=True) + printable(path))
