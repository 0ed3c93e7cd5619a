"""The report of an evaluation as one page: figures with their intervals, and pictures of what was found worst."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from searchengine.cli.page import document
from searchengine.decode import DEFAULT_LIMITS, thumbnail
from searchengine.errors import ImageError
from searchengine.stores.local import read_local
from searchengine.text import printable

if TYPE_CHECKING:
    from searchengine.evaluate import Evaluation, Failure
    from searchengine.metrics import Interval, Retrieval

THUMBNAIL_PX = 240
WORST_CONCEPTS = 20

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #656d76; --paper: #fff; --line: #d0d7de; --right: #1a7f37 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #8d96a0; --paper: #0d1117; --line: #30363d; --right: #3fb950 } }
body { font: 15px/1.4 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 24px }
h1 { font-size: 22px } h2 { font-size: 18px; margin-top: 32px }
table { border-collapse: collapse } th, td { padding: 4px 14px 4px 0; text-align: left }
th { font-weight: 600; border-bottom: 1px solid var(--line) } small { color: var(--faint) }
section { border-top: 1px solid var(--line); padding: 12px 0 } section p { margin: 0 0 8px; overflow-wrap: anywhere }
.photos { display: flex; flex-wrap: wrap; gap: 10px } figure { margin: 0; width: 180px }
img, .gone { width: 180px; height: 135px; object-fit: cover; border-radius: 6px; display: block; background: #8883 }
.gone { display: grid; place-items: center; color: var(--faint) }
.right img, .right .gone { outline: 3px solid var(--right) }
figcaption { font-size: 12px; color: var(--faint); overflow-wrap: anywhere }
"""

NAMES = {
    "precision": "of what is shown as matches, the share that is right",
    "recall": "of what is right, the share that is shown",
    "f1": "F1 of the two",
    "oracle_f1": "F1 of the best cutoff of each query",
    "f1_of_oracle": "the one as a share of the other",
    "false_alarms": "searches for what is not in the library that show matches",
}


def render_evaluation(result: Evaluation, *, title: str) -> str:
    """One HTML document, no script, no request to anywhere; thumbnails inside."""
    body = f"""\
<p>{result.images:,} photos, {result.captions:,} captions, encoder {html.escape(printable(result.model))};
{result.duplicates:,} listed twice, {len(result.failed):,} not readable. In brackets: 95 % intervals.</p>
<h2>Captions and their photos</h2>
{_retrieval_table(result)}
{_concept_tables(result)}
<h2>Found worst</h2>
{_failures(result.worst)}"""
    return document(title, style=STYLE, body=body)


def _retrieval_table(result: Evaluation) -> str:
    def row(name: str, figures: Retrieval) -> list[str]:
        recalls = [_figure(share, figures.intervals.get(f"recall@{k}")) for k, share in figures.recall.items()]
        return [name, *recalls, _figure(figures.median_rank, figures.intervals.get("median_rank"), form=".1f")]

    heads = ["", *(f"R@{k}" for k in result.text_to_image.recall), "median rank"]
    return _table(heads, [row("text to image", result.text_to_image), row("image to text", result.image_to_text)])


def _concept_tables(result: Evaluation) -> str:
    concepts = result.concepts
    if concepts is None:
        return "<p>The captions share too few words for concepts to be asked for by name.</p>"
    figures = [
        [name, f"<small>{NAMES[name]}</small>", _figure(x, concepts.intervals[name])]
        for name, x in concepts.cutoff.items()
    ]
    worst = [
        [
            html.escape(printable(one.name)),
            f"{one.photos:,}",
            f"{one.average_precision:.3f}",
            f"{one.f1:.3f}",
            f"{one.oracle_f1:.3f}",
        ]
        for one in concepts.of_each[:WORST_CONCEPTS]
    ]
    return f"""<h2>{len(concepts.of_each):,} concepts, asked for by name</h2>
<p>Mean average precision {_figure(concepts.map, concepts.intervals["map"])}.</p>
{_table(["the line where matches end", "", ""], figures)}
<h2>Concepts found worst</h2>
{_table(["concept", "photos", "average precision", "F1", "F1 of the best cutoff"], worst)}"""


def _failures(worst: Sequence[Failure]) -> str:
    if not worst:
        return "<p>Every caption finds its own photo first.</p>"
    return "".join(
        f"""<section><p>&ldquo;{html.escape(printable(failure.caption))}&rdquo;<br>
<small>its photo, first here, came at rank {failure.rank:,g}; these came before it</small></p>
<div class="photos">{_photo(failure.path, failure.score, right=True)}{
            "".join(_photo(path, score, right=False) for path, score in failure.first)
        }</div></section>
"""
        for failure in worst
    )


def _photo(path: Path, score: float, *, right: bool) -> str:
    name = html.escape(printable(os.path.basename(path)))
    return (
        f"<figure{' class=right' if right else ''}>{_picture(path)}<figcaption>{score:.3f} {name}</figcaption></figure>"
    )


def _picture(path: Path) -> str:
    try:
        small = thumbnail(read_local(str(path), max_bytes=DEFAULT_LIMITS.max_file_bytes), max_side_px=THUMBNAIL_PX)
    except ImageError:
        return '<span class="gone">not readable now</span>'
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=75)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _table(heads: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _figure(value: float, interval: Interval | None, *, form: str = ".3f") -> str:
    if interval is None:
        return f"{value:{form}}"
    return f"{value:{form}} <small>[{interval[0]:{form}}, {interval[1]:{form}}]</small>"
