from __future__ import annotations

import json

import click

from searchengine.cli.options import index_option, json_option, settings_from
from searchengine.cli.output import notice, progress_bar

PROBLEMS_FOUND = 1


@click.command("verify", epilog="Example:  searchengine verify --stores --repair")
@index_option
@click.option("--stores", is_flag=True, help="Read every indexed photo too, and compare it with what was indexed.")
@click.option("--repair", is_flag=True, help="Mend what can be mended, drop what cannot, and tell what to index again.")
@json_option
def command(index: str | None, stores: bool, repair: bool, as_json: bool) -> int:
    """Check the index, and the photos if you like; repair it.

    Photos are only ever read. Exits with 1 where problems are left.
    """
    from indexer.verify import verify

    settings = settings_from(index=index)
    with progress_bar("reading photos") as advance:
        result = verify(
            settings.index_folder,
            stores=stores,
            repair=repair,
            max_file_bytes=settings.max_file_bytes,
            workers=settings.workers or None,
            on_notice=notice,
            on_progress=advance,
        )
    if as_json:
        click.echo(json.dumps(result.as_dict()))
    else:
        for mended in result.repaired:
            click.echo(f"repaired: {mended.problem.object}: {mended.problem.message}; {mended.done}")
        for problem in result.problems:
            click.echo(f"{problem.object}: {problem.message}; {problem.remedy}")
        found = f"problems: {len(result.problems):,}" if result.problems else "no problems"
        click.echo(found + (f", repaired: {len(result.repaired):,}" if result.repaired else ""))
    return 0 if result.ok else PROBLEMS_FOUND
