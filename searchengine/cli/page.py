"""A self-contained page of the hits: no script, no request to anywhere, light and dark."""

from __future__ import annotations

import base64
import html
import io
import os
from typing import TYPE_CHECKING
from urllib.parse import quote

from searchengine.cli.output import divided, line_after_matches, percent
from searchengine.cli.thumbnails import thumbnails_of
from searchengine.stores import LOCAL
from searchengine.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from searchengine.hits import Hit

THUMBNAIL_PX = 400

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #656d76; --paper: #fff; --match: #1a7f37; --other: #9a6700 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #8d96a0; --paper: #0d1117; --match: #3fb950; --other: #d29922 } }
body { font: 15px/1.4 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 24px }
h1 { font-size: 22px; overflow-wrap: anywhere }
main { display: flex; flex-wrap: wrap; gap: 12px }
figure { margin: 0; flex: 1 1 auto; max-width: 400px }
img, .gone { height: 220px; width: 100%; object-fit: cover; border-radius: 6px; display: block }
.gone { background: #8883; min-width: 220px; display: grid; place-items: center; color: var(--faint) }
figcaption { font-size: 13px; color: var(--faint); overflow-wrap: anywhere; max-width: 340px; padding-top: 4px }
figcaption b { color: var(--other) } .match figcaption b { color: var(--match) }
.line { flex-basis: 100%; color: var(--other); border-top: 1px solid var(--other); margin: 4px 0; padding-top: 4px }
"""


def render_page(hits: Sequence[Hit], *, title: str, match: float) -> str:
    """One HTML document with the thumbnails inside; a line marks where the matches end."""
    matches, others = divided(hits, match=match)
    figures = _figures(matches, matches=True)
    if line := line_after_matches(matches, others):
        figures.append(f'<p class="line">{html.escape(line)}</p>\n')
    figures += _figures(others, matches=False)
    return document(title, style=STYLE, body=f"<main>\n{''.join(figures) or '<p>Nothing found.</p>'}\n</main>")


def document(title: str, *, style: str, body: str) -> str:
    """An HTML document under the headline `title` that runs no script and asks nobody for anything."""
    shown = html.escape(printable(title))
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{shown}</title>
<style>{style}</style>
<h1>{shown}</h1>
{body}
</html>
"""


def _figures(hits: Sequence[Hit], *, matches: bool) -> list[str]:
    photos = thumbnails_of(hits, max_side_px=THUMBNAIL_PX)
    return [_figure(hit, photo, matches=matches) for hit, photo in zip(hits, photos, strict=True)]


def _figure(hit: Hit, photo: Image.Image | None, *, matches: bool) -> str:
    path = html.escape(printable(hit.path))
    name = html.escape(printable(os.path.basename(hit.path)))
    # Of a bucket or an archive there is nothing that a browser could open.
    link = f' href="{html.escape("file://" + quote(os.fsencode(hit.path)))}"' if hit.store == LOCAL else ""
    details = [f"{hit.width} x {hit.height}"] + ([hit.taken_at.replace("T", " ")] if hit.taken_at else [])
    return f"""<figure{' class="match"' if matches else ""}><a{link} title="{path}">{_picture(photo, name)}</a>
<figcaption><b>{hit.rank} &middot; {hit.score:.3f} &middot; {percent(hit.relevance)}</b> {name}<br>
{" &middot; ".join(html.escape(detail) for detail in details)}</figcaption></figure>
"""


def _picture(photo: Image.Image | None, name: str) -> str:
    if photo is None:
        return '<span class="gone">not readable now</span>'
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=80)
    return f'<img alt="{name}" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
