"""Options that several commands share, and how they become settings, encoders and indexes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

from searchengine.errors import IndexNotFound

if TYPE_CHECKING:
    from searchengine.index.reader import Index
    from searchengine.settings import Settings
    from searchengine.vectors import Encoder

Command = Callable[..., Any]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON: one object, or one a line.")
index_option = click.option(
    "--index",
    "index",
    help="Folder of the index [default: SEARCHENGINE_INDEX, or your data folder].",
)
model_option = click.option(
    "--model", help="Encoder: auto, a name from `searchengine models`, or a file made by `train`."
)
device_option = click.option("--device", help="Where the encoder runs: auto, cpu, cuda, cuda:1, mps.")


def filter_options(command: Command) -> Command:
    """Adds --after, --before, --under, --camera and --near, and hands them on as one `filters`."""

    @click.option("--after", metavar="DATE", help="Taken on DATE (2024, 2024-05, 2024-05-31) or later.")
    @click.option("--before", metavar="DATE", help="Taken before DATE.")
    @click.option("--under", metavar="FOLDER", help="Only photos below FOLDER.")
    @click.option("--camera", metavar="NAME", help="Only photos by a camera whose name contains NAME.")
    @click.option("--near", metavar="LAT,LON,KM", help="Only photos taken at most KM kilometres from a place.")
    @functools.wraps(command)
    def wrapper(
        *args: Any,
        after: str | None,
        before: str | None,
        under: str | None,
        camera: str | None,
        near: str | None,
        **kwargs: Any,
    ) -> Any:
        from searchengine.index.filters import Filters

        filters = Filters(
            after=parse_date(after, "--after"),
            before=parse_date(before, "--before"),
            under=under,
            camera=camera,
            near=parse_near(near),
        )
        return command(*args, filters=filters, **kwargs)

    return wrapper


def parse_date(text: str | None, option: str) -> str | None:
    """The first instant of a year, month, day, or a time itself, in ISO 8601."""
    if text is None:
        return None
    for form in ("%Y", "%Y-%m", "%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S"):
        try:
            return datetime.strptime(text, form).isoformat()
        except ValueError:
            continue
    relative = {"today": date.today(), "yesterday": date.today() - timedelta(days=1)}.get(text.lower())
    if relative is None:
        raise click.BadParameter(f"{text!r} is no date; write 2024, 2024-05, 2024-05-31 or today", param_hint=option)
    return datetime(relative.year, relative.month, relative.day).isoformat()


def parse_near(text: str | None) -> tuple[float, float, float] | None:
    if text is None:
        return None
    try:
        latitude, longitude, radius_km = (float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not LAT,LON,KM such as 48.86,2.35,10", param_hint="--near") from None
    if not (abs(latitude) <= 90 and abs(longitude) <= 180 and 0 <= radius_km < math.inf):
        raise click.BadParameter(f"{text!r} is no place on Earth with a radius in km", param_hint="--near")
    return latitude, longitude, radius_km


def settings_from(**flags: Any) -> Settings:
    from searchengine.settings import load_settings

    return load_settings(flags)


def open_for_reading(settings: Settings) -> Index:
    from searchengine.index.reader import Index

    return Index(settings.index_folder)


def encoder_of(index: Index, settings: Settings) -> Encoder:
    """The encoder that made `index`. Raises ModelNotFound, ModelMismatch with a remedy."""
    from searchengine.models.registry import load_encoder

    return load_encoder(index.identity.encoder, device=settings.device, models_folder=settings.models_folder)


def encoder_for(settings: Settings) -> Encoder:
    """The encoder that --model asks for; `auto` means the index's own, for a new index the best one available."""
    from searchengine.index.layout import read_identity
    from searchengine.models.registry import canonical_name, load_encoder

    name = settings.model
    if name == "auto":
        try:
            name = read_identity(settings.index_folder).encoder
        except IndexNotFound:
            name = "mini"
    name = canonical_name(name, models_folder=settings.models_folder)
    return load_encoder(name, device=settings.device, models_folder=settings.models_folder)
