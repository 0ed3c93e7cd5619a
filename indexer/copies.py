"""Which of the photos that a run added or updated are exact copies of others: told when it ends, so by no order."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from searchengine.index.schema import Key, encode_key, images

_scratch = sa.MetaData()

recorded = sa.Table(
    "recorded",
    _scratch,
    sa.Column("store", Key, primary_key=True),
    sa.Column("key", Key, primary_key=True),
    prefixes=["TEMPORARY"],
    sqlite_with_rowid=False,
)


class Copies:
    """The names of what a run has recorded, in a temporary table of the index's own connection."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        with engine.begin() as connection:
            _scratch.drop_all(connection)
            _scratch.create_all(connection, checkfirst=False)

    def note(self, names: Sequence[tuple[str, str]]) -> None:
        """Names, (store, key) each, that were added or updated."""
        rows = [(encode_key(store), encode_key(key)) for store, key in names]
        if rows:
            with self._engine.begin() as connection:
                connection.exec_driver_sql("INSERT OR REPLACE INTO recorded VALUES (?, ?)", rows)

    def count(self) -> int:
        """How many of them have the content of another photo; of those with a content that is new, all but one."""
        is_recorded = sa.exists().where(recorded.c.store == images.c.store, recorded.c.key == images.c.key)
        contents = sa.select(images.c.vector_id).where(is_recorded)
        of_one_content = (
            sa.select(sa.func.count().label("photos"), sa.func.sum(sa.cast(is_recorded, sa.Integer)).label("recorded"))
            .where(images.c.vector_id.in_(contents))
            .group_by(images.c.vector_id)
            .subquery()
        )
        photos, ours = of_one_content.c.photos, of_one_content.c.recorded
        copies = sa.func.sum(sa.case((photos > ours, ours), else_=ours - 1))
        with self._engine.begin() as connection:
            return int(connection.execute(sa.select(sa.func.coalesce(copies, 0))).scalar_one())
