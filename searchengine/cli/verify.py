from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from searchengine.cli.options import index_option, json_option, settings_from
from searchengine.cli.output import notice, progress_bar
from searchengine.cli.writing import writable
from searchengine.milvus import is_milvus
from searchengine.settings import user_data

if TYPE_CHECKING:
    from indexer.verify import Verification
    from searchengine.settings import Settings

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
    settings = settings_from(index=index)
    check = _verify_milvus if is_milvus(settings.index) else _verify
    result = check(settings, stores=stores, repair=repair)
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


def _verify(settings: Settings, *, stores: bool, repair: bool) -> Verification:
    from indexer.verify import verify

    with progress_bar("reading photos") as advance:
        return verify(
            settings.index_folder,
            stores=stores,
            repair=repair,
            max_file_bytes=settings.max_file_bytes,
            workers=settings.workers or None,
            on_notice=notice,
            on_progress=advance,
        )


def _verify_milvus(settings: Settings, *, stores: bool, repair: bool) -> Verification:
    """What is in Milvus. To look at photos, and to repair, its staging index too, which knows them and is published."""
    from indexer.checks.milvus import check_milvus
    from indexer.checks.problems import Problem, Repair
    from indexer.verify import Verification

    def check() -> list[Problem]:
        with progress_bar("reading vectors") as advance:
            return check_milvus(settings.index, root=user_data() / "milvus", on_progress=advance)

    before = check()
    if not stores and not repair:
        return Verification(problems=before, repaired=[])
    with writable(settings, repair=repair) as staged:
        result = _verify(staged, stores=stores, repair=repair)
    left = check() if repair else before
    mended = [Repair(problem=problem, done="published again") for problem in before if problem not in left]
    return Verification(problems=left + result.problems, repaired=mended + result.repaired)
