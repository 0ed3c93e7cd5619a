from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from searchengine.cli.options import fetch_weights, json_option, settings_from
from searchengine.text import printable

if TYPE_CHECKING:
    from searchengine.models.registry import ModelInfo


@click.group("models", invoke_without_command=True, epilog="Example:  searchengine models import my-heads.safetensors")
@json_option
@click.pass_context
def command(context: click.Context, as_json: bool) -> None:
    """List the encoders; download or import one."""
    if context.invoked_subcommand is None:
        from searchengine.models.registry import list_models

        for info in list_models(settings_from().models_folder):
            _show(info, as_json=as_json)


@command.command("download", epilog="Example:  searchengine models download clip-vit-b-32")
@click.argument("name")
@json_option
def download(name: str, as_json: bool) -> None:
    """Make sure that the weights of an encoder are here and whole.

    A download that broke off goes on where it ended. The setting `mirror` names an address to try first, HTTPS_PROXY a
    proxy; with the setting `offline`, nothing is fetched.
    """
    from searchengine.models import registry
    from searchengine.models.mini import parts
    from searchengine.models.published import PUBLISHED

    settings = settings_from()
    if name in PUBLISHED:
        fetch_weights(PUBLISHED[name], settings)
    info = registry.find_model(name, models_folder=settings.models_folder)
    if registry.is_mini_heads(registry.find_weights(name, models_folder=settings.models_folder)):
        for part in parts.ALL:
            parts.locate(part)
    _show(info, as_json=as_json)


@command.command("import", epilog="Example:  searchengine models import ~/Downloads/ViT-B-32.pt")
@click.argument("file")
@json_option
def import_(file: str, as_json: bool) -> None:
    """Check a CLIP checkpoint, or a file made by `searchengine train`, and keep a copy, to be used by its name.

    OpenAI's own files are recognised by their content. Any other takes its name from the file.
    """
    from searchengine.models.registry import import_model

    _show(import_model(Path(file), models_folder=settings_from().models_folder), as_json=as_json)


def _show(info: ModelInfo, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(info)))
        return
    here = "here" if info.downloaded else "not here"
    size = f"{info.size_bytes / 2**20:.0f} MiB"
    click.echo(f"{printable(info.name):<20} dim {info.dim:<5} {size:>8}  {here:<9} {info.licence:<20} {info.about}")
