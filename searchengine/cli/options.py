"""Options that several commands share, and how they become settings, encoders and indexes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from searchengine.cli.output import notice, progress_bar
from searchengine.conditions import circle_of, date_of, size_bytes_of
from searchengine.errors import IndexNotFound, ModelUnusable, UsageError
from searchengine.filters import ORIENTATIONS, Filters, Orientation

if TYPE_CHECKING:
    from searchengine.decode import DecodeLimits
    from searchengine.index.layout import IndexIdentity
    from searchengine.index.protocol import PhotoIndex
    from searchengine.models.published import PublishedFile
    from searchengine.settings import Settings
    from searchengine.vectors import Encoder

Command = Callable[..., Any]
Value = TypeVar("Value")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON: one object, or one a line.")
index_option = click.option(
    "--index",
    "index",
    help="Folder of the index, or milvus://HOST:PORT/NAME [default: SEARCHENGINE_INDEX, or your data folder].",
)
model_option = click.option(
    "--model", help="Encoder: auto, a name from `searchengine models`, a CLIP checkpoint, or a file made by `train`."
)
precision_option = click.option(
    "--precision",
    metavar="fp32|bf16|fp16|int8",
    help="Arithmetic of photos: mini has fp32 and int8; an index keeps the one it began with.",
)
device_option = click.option("--device", help="Where the encoder runs: auto, cpu, cuda, cuda:1, mps.")


def filter_options(command: Command) -> Command:
    """Adds the options that narrow a search to some photos, and hands them on as one `filters`."""

    @click.option("--after", metavar="DATE", help="Taken on DATE (2024, 2024-05, 2024-05-31) or later.")
    @click.option("--before", metavar="DATE", help="Taken before DATE.")
    @click.option(
        "--under",
        metavar="PLACE",
        help="Only photos below PLACE: a folder, an archive, a folder in one (ARCHIVE!/folder), or a URL.",
    )
    @click.option("--camera", metavar="NAME", help="Only photos by a camera whose name contains NAME.")
    @click.option("--near", metavar="LAT,LON,KM", help="Only photos taken at most KM kilometres from a place.")
    @click.option("--min-side", type=click.IntRange(min=1), metavar="PX", help="Shorter side of at least PX pixels.")
    @click.option("--orientation", type=click.Choice(ORIENTATIONS), help="Only photos of this shape.")
    @click.option("--min-size", metavar="SIZE", help="Only files of SIZE (300K, 2M, 1G) or more.")
    @click.option("--max-size", metavar="SIZE", help="Only files of SIZE or less.")
    @click.option("--tag", multiple=True, metavar="LABEL", help="Only photos that `classify` tagged so; repeatable.")
    @functools.wraps(command)
    def wrapper(
        *args: Any,
        after: str | None,
        before: str | None,
        under: str | None,
        camera: str | None,
        near: str | None,
        min_side: int | None,
        orientation: Orientation | None,
        min_size: str | None,
        max_size: str | None,
        tag: tuple[str, ...],
        **kwargs: Any,
    ) -> Any:
        filters = Filters(
            after=parse_date(after, "--after"),
            before=parse_date(before, "--before"),
            under=under,
            camera=camera,
            near=parse_near(near),
            min_side=min_side,
            orientation=orientation,
            min_size_bytes=parse_size(min_size, "--min-size"),
            max_size_bytes=parse_size(max_size, "--max-size"),
            tag=tag,
        )
        return command(*args, filters=filters, **kwargs)

    return wrapper


def parse_date(text: str | None, option: str) -> str | None:
    """The first instant of a year, month, day, or a time itself, in ISO 8601."""
    return _parsed(date_of, text, option)


def parse_near(text: str | None) -> tuple[float, float, float] | None:
    return _parsed(circle_of, text, "--near")


def parse_size(text: str | None, option: str, *, units: str = "KMG") -> int | None:
    """Bytes: a number, or one with a letter of `units`, each 1,024 times the one before."""
    return _parsed(functools.partial(size_bytes_of, units=units), text, option)


def _parsed(read: Callable[[str], Value], text: str | None, option: str) -> Value | None:
    if text is None:
        return None
    try:
        return read(text)
    except UsageError as error:
        raise click.BadParameter(str(error), param_hint=option) from None


def settings_from(**flags: Any) -> Settings:
    from searchengine.settings import load_settings

    return load_settings(flags)


def limits_from(settings: Settings) -> DecodeLimits:
    from searchengine.decode import DecodeLimits

    return DecodeLimits.of(settings)


def open_for_reading(settings: Settings) -> PhotoIndex:
    from searchengine.index.protocol import open_index

    return open_index(settings.index_place)


def encoder_of(index: PhotoIndex, settings: Settings) -> Encoder:
    """The encoder that made `index`. Raises ModelNotFound, ModelMismatch with a remedy."""
    from searchengine.models.registry import load_encoder

    known = index.identity
    return load_encoder(
        known.encoder, device=settings.device, precision=known.precision, models_folder=settings.models_folder
    )


def encoder_for(settings: Settings) -> Encoder:
    """The encoder that --model asks for, downloaded where it must be.

    Where `auto` chose a CLIP for a new index and its download fails, that is told and mini takes its place.
    """
    from searchengine.models.published import PUBLISHED
    from searchengine.models.registry import load_encoder

    name = choose_model(settings)
    if name in PUBLISHED and not PUBLISHED[name].is_in(settings.models_folder):
        try:
            fetch_weights(PUBLISHED[name], settings)
        except ModelUnusable as error:
            if settings.model != "auto" or identity_of(settings) is not None:
                raise
            notice(str(error))
            name = "mini"
    return load_encoder(
        name, device=settings.device, precision=_precision(name, settings), models_folder=settings.models_folder
    )


def choose_model(settings: Settings) -> str:
    """The name that --model means. `auto` is the index's own encoder, for a new index the best one to be had.

    Whether a CLIP can be downloaded is found out within five seconds. Raises ModelNotFound.
    """
    from searchengine.models.published import PUBLISHED
    from searchengine.models.registry import canonical_name, find_weights

    known = identity_of(settings)
    if settings.model == "auto":
        return known.encoder if known else _best_available(settings)
    name = canonical_name(settings.model, models_folder=settings.models_folder)
    if name not in PUBLISHED:
        find_weights(name, models_folder=settings.models_folder)
    return name


def fetch_weights(file: PublishedFile, settings: Settings) -> None:
    """Download published weights, with a notice and, on a terminal, a bar. Raises ModelNotFound, WeightsError."""
    from searchengine.models.download import download

    if not settings.offline and not file.is_in(settings.models_folder):
        notice(f"downloading the encoder {file.name}: {_mebibytes(file.size_bytes)} MiB")
    with progress_bar(f"downloading {file.name}, MiB") as advance:
        download(
            file,
            folder=settings.models_folder,
            mirror=settings.mirror,
            offline=settings.offline,
            on_progress=lambda done, total: advance(_mebibytes(done), _mebibytes(total)),
            on_notice=notice,
        )


def _best_available(settings: Settings) -> str:
    """CLIP ViT-B/32 if its weights are here or on offer, else mini, with a notice that says how to get CLIP."""
    from searchengine.models.download import can_download
    from searchengine.models.published import PREFERRED, PUBLISHED

    best = PUBLISHED[PREFERRED]
    if best.is_in(settings.models_folder):
        return PREFERRED
    if settings.offline:
        reason = "the setting offline forbids to fetch it"
    elif can_download(best, mirror=settings.mirror):
        return PREFERRED
    else:
        reason = "it cannot be fetched from here now"
    notice(
        f"taking the encoder mini: {PREFERRED} is not here, and {reason}; to get it, run "
        f"`searchengine models download {PREFERRED}`, then index with --model {PREFERRED} into a new --index"
    )
    return "mini"


def _precision(name: str, settings: Settings) -> str:
    """The index's own for its own encoder, unless --precision was given; a setting that mini lacks is for CLIPs.

    Raises ModelNotFound.
    """
    from searchengine.models.mini import parts
    from searchengine.models.registry import find_weights, is_mini_heads

    if settings.origins["precision"] != "flag":
        known = identity_of(settings)
        if known is not None and known.encoder == name:
            return known.precision
        lacks_it = settings.precision not in parts.PRECISIONS
        if lacks_it and is_mini_heads(find_weights(name, models_folder=settings.models_folder)):
            return "fp32"
    return settings.precision


def identity_of(settings: Settings) -> IndexIdentity | None:
    """The identity card of the index, if there is one. Raises IndexFormatError, IndexUnusable."""
    from searchengine.index.layout import read_identity
    from searchengine.milvus import is_milvus

    try:
        if is_milvus(settings.index):
            with open_for_reading(settings) as index:
                return index.identity
        return read_identity(settings.index_folder)
    except IndexNotFound:
        return None


def _mebibytes(size_bytes: int) -> int:
    return round(size_bytes / 2**20)
