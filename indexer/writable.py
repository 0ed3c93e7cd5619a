"""An index that may be written: made where there is none, of the expected encoder, with what a killed process left
cleared away."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from indexer.leftovers import finish_change
from indexer.lock import LockedIndex
from indexer.segments import check_named_segments, delete_orphans, next_id
from searchengine.errors import IndexFormatError, ModelMismatch
from searchengine.index.layout import RESTORE, IndexIdentity, make_folder, read_identity, write_identity
from searchengine.index.schema import migrate, schema_version
from searchengine.text import printable
from searchengine.vectors import Encoder


class WritableIndex(LockedIndex):
    """Open for writing, as a context manager.

    Raises IndexLocked while another process writes, ModelMismatch where the index belongs to another encoder.
    """

    def __init__(self, folder: str | os.PathLike[str], *, identity: IndexIdentity) -> None:
        super().__init__(folder)
        self.identity = identity

    def __enter__(self) -> Self:
        with self.disk_errors():
            make_folder(self.folder)
        super().__enter__()
        try:
            with self.disk_errors():
                self._prepare()
        except BaseException:
            self.release()
            raise
        return self

    def _prepare(self) -> None:
        make_folder(self.paths.segments)
        is_new = not self.paths.identity.exists()
        if not is_new:
            finish_change(self.paths)
            check_same_encoder(read_identity(self.folder), self.identity, folder=self.folder)
            if not self._has_tables():
                raise IndexFormatError(
                    f"the index at {printable(str(self.folder))} has lost its metadata.sqlite; {RESTORE}"
                )
        migrate(self.engine, self.paths.database)
        if not is_new:
            with self.engine.begin() as connection:
                check_named_segments(connection, self.paths, dim=self.identity.dim)
        # The tables come first: a folder with index.json is always a whole index. Tables that never held a vector are
        # what a process leaves that was killed between the two.
        if is_new:
            with self.engine.begin() as connection:
                was_used = next_id(connection, "vectors") > 1
            if was_used:
                raise IndexFormatError(f"the index at {printable(str(self.folder))} has lost its index.json; {RESTORE}")
            write_identity(self.folder, self.identity)
        delete_orphans(self.engine, self.paths)
        self.begin_run()

    def _has_tables(self) -> bool:
        if not self.paths.database.exists():
            return False
        with self.engine.begin() as connection:
            return schema_version(connection, self.paths.database) > 0


def identity_of(encoder: Encoder) -> IndexIdentity:
    """What an index says of the encoder that made it."""
    return IndexIdentity(
        encoder=encoder.name, fingerprint=encoder.fingerprint, dim=encoder.dim, precision=encoder.precision
    )


def check_same_encoder(known: IndexIdentity, wanted: IndexIdentity, *, folder: Path) -> None:
    """Raises ModelMismatch that names both encoders, IndexFormatError where only the dimension differs."""
    if (known.fingerprint, known.precision) != (wanted.fingerprint, wanted.precision):
        if known.encoder != wanted.encoder:
            remedy = f"use --model {known.encoder}, or "
        elif known.precision != wanted.precision:
            remedy = f"use --precision {known.precision}, or "
        else:
            remedy = "its weights have changed since: "
        raise ModelMismatch(
            f"the index at {printable(str(folder))} was made by encoder {known.encoder} in {known.precision} "
            f"({known.fingerprint[:12]}), not by {wanted.encoder} in {wanted.precision} ({wanted.fingerprint[:12]}); "
            f"{remedy}index into another folder with --index, or change the model of this index with: searchengine "
            f"reencode --model {wanted.encoder} --precision {wanted.precision}"
        )
    if known.dim != wanted.dim:
        raise IndexFormatError(
            f"the index at {printable(str(folder))} says dim {known.dim}, its encoder has {wanted.dim}; {RESTORE}"
        )
