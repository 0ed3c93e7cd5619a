from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from typing import TYPE_CHECKING, NamedTuple

import click

from searchengine.cli.options import (
    device_option,
    encoder_for,
    filter_options,
    json_option,
    limits_from,
    model_option,
    open_for_reading,
    precision_option,
    settings_from,
)
from searchengine.cli.output import notice, progress_bar, silent_decoders, styled
from searchengine.cli.results import FOUND, NOTHING_FOUND
from searchengine.cli.writing import writable
from searchengine.errors import ImageError, ModelMismatch, UsageError
from searchengine.text import printable

if TYPE_CHECKING:
    from searchengine.filters import Filters
    from searchengine.settings import Settings
    from searchengine.stores import ImageStore
    from searchengine.vectors import Encoder, FloatMatrix

TABLE_TOP = 3
MAX_LABEL_COLUMNS = 30
LINES_AT_ONCE = 1000  # of an index: they come by the hundred thousand
TAG_PROBABILITY = 0.5  # more likely than all other labels together


class Classified(NamedTuple):
    """A photo with its likeliest labels, best first; `id` is None for a file."""

    path: str
    id: int | None
    best: list[tuple[str, float]]


class Choice(NamedTuple):
    """The classes, by name and prompts, and which of them are kept of a photo."""

    names: list[str]
    templates: list[str]
    top: int
    min_probability: float


@click.command("classify", epilog="Example:  searchengine classify ~/Pictures/2024 --labels dog,cat,bicycle --json")
@click.argument("images", nargs=-1, metavar="[IMAGE...]")
@click.option("--labels", metavar="A,B,C", help="The classes, by name.")
@click.option("--labels-file", metavar="FILE", help="The classes in a UTF-8 file, one a line; they may hold commas.")
@click.option("--template", multiple=True, metavar="TEXT", help="A prompt; {} is the label. Repeatable: an ensemble.")
@click.option("--templates", metavar="imagenet|simple|FILE", help="A set of prompts [default: simple].")
@click.option(
    "--top",
    type=click.IntRange(min=1),
    help="Only the N likeliest labels [default: 3 in a table or as tags, else all].",
)
@click.option(
    "--min-probability",
    type=click.FloatRange(0, 1),
    metavar="P",
    help="Only labels at least so probable, and photos that have one [default: all, as tags 0.5].",
)
@click.option("--write-tags", is_flag=True, help="Keep the labels of all photos in the index, for `search --tag`.")
@filter_options
@click.option(
    "--index",
    is_flag=False,
    flag_value="",
    metavar="[DIR]",
    help="All photos of the index, by their stored vectors; the default one if DIR is left out.",
)
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
    min_probability: float | None,
    write_tags: bool,
    filters: Filters,
    index: str | None,
    model: str | None,
    device: str | None,
    precision: str | None,
    as_json: bool,
) -> int:
    """Sort photos into classes that you name: for each photo, the probability of each label.

    IMAGE is a picture or a folder of them. `--index` without IMAGE takes all photos of the index by their stored
    vectors, and reads no photo; the filters narrow it. The probabilities of a photo add up to 1, so they tell which of
    the labels fits best, not whether any does; an extra label such as "something else" can take the rest. Files that
    cannot be used are skipped with a warning. Exit code 1 means that none could be classified.

    --write-tags keeps the labels in the index: `search --tag dog` finds only photos with that one. Run it again for
    photos added since; only those are looked at. A label given again with others replaces what was kept for it.
    `searchengine tags` lists them.
    """
    names = _names(labels, labels_file)
    settings = settings_from(index=index or None, model=model, device=device, precision=precision)
    if not images and index is None and not write_tags:
        raise UsageError("there is no photo to classify; name some, or say --index for all that are indexed")
    if images and filters:
        raise UsageError("filters narrow the photos of the index; they do not go with photos that are named")
    if write_tags and (images or filters):
        raise UsageError("tags are kept for all photos in the index; leave out IMAGE and filters, or --write-tags")
    all_of_them = as_json and not write_tags
    choice = Choice(
        names=names,
        templates=_prompts(template, templates),
        top=min(top or (len(names) if all_of_them else TABLE_TOP), len(names)),
        min_probability=(TAG_PROBABILITY if write_tags else 0.0) if min_probability is None else min_probability,
    )
    if len(names) == 1:
        notice("with a single label its probability is always 1; give two or more to tell photos apart")
    if write_tags:
        return _write_tags(choice, settings, as_json=as_json)
    if not images:
        with closing(_of_index(choice, settings, filters)) as found:
            return _show(found, choice, as_json=as_json, lines_at_once=LINES_AT_ONCE)
    with silent_decoders(), closing(_of_files(images, choice, settings)) as found:
        return _show(found, choice, as_json=as_json, lines_at_once=1)


def _of_files(images: Sequence[str], choice: Choice, settings: Settings) -> Generator[Classified, None, None]:
    from searchengine import zeroshot

    sources = _sources(images)
    encoder = encoder_for(settings)
    with closing(
        zeroshot.classify(
            _paths(sources),
            encoder=encoder,
            class_vectors=_class_vectors(encoder, choice),
            limits=limits_from(settings),
            batch_size=settings.batch_size,
            workers=settings.workers or None,
        )
    ) as outcomes:
        for path, outcome in outcomes:
            if isinstance(outcome, ImageError):
                notice(f"skipped {printable(path)}: {outcome}")
                continue
            order = (-outcome).argsort(kind="stable")[: choice.top]
            yield Classified(path, None, [(choice.names[i], float(outcome[i])) for i in order])


def _of_index(choice: Choice, settings: Settings, filters: Filters) -> Generator[Classified, None, None]:
    from searchengine import zeroshot

    with open_for_reading(settings) as index:
        encoder = encoder_for(settings)
        if encoder.fingerprint != index.identity.fingerprint:
            by = f"by encoder {printable(index.identity.encoder)}, not by {printable(encoder.name)}"
            raise ModelMismatch(f"the index at {index.place} was made {by}; leave out --model")
        table = index.snapshot().table
        rows = table.rows_of(index.vector_ids(filters) if filters else table.living_ids)
        blocks = zeroshot.classify_stored(
            table,
            rows,
            class_vectors=_class_vectors(encoder, choice),
            logit_scale=encoder.logit_scale,
            top=choice.top,
        )
        for ids, found in blocks:
            photos = index.keys_of(ids, filters=filters)
            columns = (ids.tolist(), found.labels.tolist(), found.probabilities.tolist())
            for vector_id, places, shares in zip(*columns, strict=True):
                best = [(choice.names[place], share) for place, share in zip(places, shares, strict=True)]
                for image_id, path in photos.get(vector_id, ()):
                    yield Classified(path, image_id, best)


def _class_vectors(encoder: Encoder, choice: Choice) -> FloatMatrix:
    from searchengine import zeroshot

    with progress_bar("reading labels") as advance:
        return zeroshot.class_vectors(encoder, choice.names, templates=choice.templates, on_progress=advance)


def _show(found: Iterator[Classified], choice: Choice, *, as_json: bool, lines_at_once: int) -> int:
    width = min(max(len(printable(name)) for name in choice.names), MAX_LABEL_COLUMNS)
    lines = [] if as_json else [styled(f"{'p':>6}  {'label':<{width}}  " * choice.top + "path", bold=True)]
    any_found = False
    for photo in found:
        # Not a number: the vector is damaged, which `verify` tells.
        best = [(label, p) for label, p in photo.best if p >= choice.min_probability]
        if not best:
            continue
        any_found = True
        lines.append(_json_of(photo, best) if as_json else _row_of(photo, best, width=width, columns=choice.top))
        if len(lines) >= lines_at_once:
            click.echo("\n".join(lines))
            lines.clear()
    if any_found and lines:
        click.echo("\n".join(lines))
    if not any_found:
        notice("no photo could be classified")
    return FOUND if any_found else NOTHING_FOUND


def _write_tags(choice: Choice, settings: Settings, *, as_json: bool) -> int:
    from indexer.tags import TaggingRequest, write_tags

    open_for_reading(settings).close()
    request = TaggingRequest(
        labels=choice.names, templates=choice.templates, top=choice.top, min_probability=choice.min_probability
    )
    with writable(settings) as written:
        with progress_bar("vectors") as advance:
            done = write_tags(written.index_folder, request, encoder=encoder_for(written), on_progress=advance)
        with open_for_reading(written) as index:
            counts = {label: photos for label, photos in index.tags() if label in set(choice.names)}
    if as_json:
        click.echo(json.dumps({"classified": done.classified, "labels": counts}))
        return FOUND
    click.echo(f"looked at {done.classified:,} vectors" if done.classified else "nothing to do: no photo is new")
    for label, photos in counts.items():
        click.echo(f"{photos:>9,}  {printable(label)}")
    return FOUND


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


def _sources(images: Sequence[str]) -> list[tuple[str, ImageStore | None]]:
    """Each argument, with the store that lists it if it is one. Raises StoreUnusable."""
    from searchengine.stores import is_store, open_store

    paths = [os.path.expanduser(image) for image in images]
    return [(path, open_store(path) if is_store(path) else None) for path in paths]


def _paths(sources: list[tuple[str, ImageStore | None]]) -> Iterator[str]:
    """Files as they were given; what is below a folder by the rules of `index`, and under the name of that folder."""
    from searchengine.formats import is_photo
    from searchengine.stores import LOCAL, StoredPhoto, Unlistable

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
                        is_local = store.name == LOCAL
                        yield os.path.join(given, item.key.removeprefix(store.prefix)) if is_local else item.key


def _json_of(photo: Classified, best: list[tuple[str, float]]) -> str:
    # Vectors are float32: more than six digits would promise what is not known.
    line = {"path": photo.path, "probabilities": {label: float(f"{p:.6g}") for label, p in best}}
    return json.dumps(line if photo.id is None else line | {"id": photo.id})


def _row_of(photo: Classified, best: list[tuple[str, float]], *, width: int, columns: int) -> str:
    cells = []
    for label, p in best:
        text = printable(label)
        text = text if len(text) <= width else f"{text[: width - 1]}…"
        cells.append(f"{p:>6.1%}  {text:<{width}}  ")
    cells += [" " * (width + 10)] * (columns - len(cells))
    return cells[0] + styled("".join(cells[1:]), dim=True) + printable(photo.path)
