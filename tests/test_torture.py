"""A short scripts/torture, and that torture finds what it is for: indexers with a fault in them do not pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROUNDS = 4

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="killed children are forked")


def torture(photos: Path, tmp_path: Path, *, rounds: int, fault: str = "") -> subprocess.CompletedProcess[str]:
    """Run it in a process of its own, as it forks; `fault` is code that runs first, and spoils the indexer."""
    arguments = ["--rounds", str(rounds), "--photos", str(photos)]
    script = f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\nimport torture\n{fault}\n"
    script += f"sys.exit(torture.main({arguments!r}))"
    return subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=300
    )


def test_an_index_survives_some_rounds(photos: Path, tmp_path: Path) -> None:
    done = torture(photos, tmp_path, rounds=ROUNDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert done.stdout.splitlines()[-1].endswith("no divergence")
    assert len(done.stdout.splitlines()) == ROUNDS + 2


FORGETS_NO_PHOTO = """
from indexer.crawl import Crawl
Crawl.gone = lambda self: iter(())
"""

MOVED_PHOTOS_ARE_NEW = """
from indexer.crawl import Crawl
Crawl.former_row_of = lambda self, content_hash, *, after: None
"""

ROWS_BEFORE_THEIR_SEGMENT = """
import os
import time
from indexer import writer

write, commit = writer.write_segment, writer.IndexWriter.commit
late = []

def write_late(path, pieces, **options):
    elsewhere = path.with_name("." + path.name)
    late.append((elsewhere, path))
    return write(elsewhere, pieces, **options)

def commit_first(self, **options):
    commit(self, **options)
    while late:
        time.sleep(0.05)
        os.replace(*late.pop())

writer.write_segment, writer.IndexWriter.commit = write_late, commit_first
"""


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (FORGETS_NO_PHOTO, "is in the index, but is no file"),
        (MOVED_PHOTOS_ARE_NEW, "; its id was "),
        (ROWS_BEFORE_THEIR_SEGMENT, "segment"),
    ],
    ids=["deletions forgotten", "moves not seen", "rows before their segment"],
)
def test_a_faulty_indexer_is_found(photos: Path, tmp_path: Path, fault: str, found: str) -> None:
    done = torture(photos, tmp_path, rounds=100, fault=fault)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr
    assert "DIVERGENCE" in done.stdout
    assert found in done.stdout.split("DIVERGENCE")[1]
    assert "again: scripts/torture --rounds 1 --seed " in done.stdout
