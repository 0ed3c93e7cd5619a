from __future__ import annotations

import json

import click

from searchengine.cli.options import json_option, settings_from
from searchengine.text import printable


@click.command("config", epilog="Example:  SEARCHENGINE_WORKERS=4 searchengine config")
@json_option
def command(as_json: bool) -> None:
    """Show each setting, its value and where it came from.

    Later ones win: the defaults, your config.toml, SEARCHENGINE_* in the environment, flags.
    """
    from searchengine.settings import NAMES, user_file

    settings = settings_from()
    values: dict[str, object] = {name: getattr(settings, name) for name in NAMES}
    values |= {"index": settings.index_place, "models": str(settings.models_folder)}
    if as_json:
        click.echo(json.dumps({name: {"value": values[name], "origin": settings.origins[name]} for name in NAMES}))
        return
    for name in NAMES:
        click.echo(f"{name:<15} {printable(str(values[name])):<40} {printable(settings.origins[name])}")
    exists = "" if user_file().is_file() else " (there is none yet)"
    click.echo(f"your own settings go into {printable(str(user_file()))}{exists}", err=True)
