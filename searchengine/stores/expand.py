"""Patterns that stand for many archives or lists: shard-{000..099}.tar, "s3://bucket/shard-*.tar"."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator

from searchengine.errors import StoreUnusable, UsageError
from searchengine.stores import MANIFESTS, TARS, ZIPS, KnownStores, StoredPhoto, Unlistable, home_of, is_url
from searchengine.text import printable

MAX_PLACES = 100_000

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_WILD = re.compile(r"[*?\[]")


def expanded(location: str, *, stores: KnownStores | None = None) -> list[str]:
    """The places that a location stands for, by default itself.

    Braces hold a range of numbers, as long as the longer of its ends where one begins with 0, or alternatives with
    commas between them, as in a shell and in webdataset. *, ? and [...] stand for what there is, in the names of
    archives and lists; URLs are listed by way of `stores`. Raises StoreUnusable where there is nothing such, or not all
    can be listed, UsageError for too many.
    """
    if not location.lower().endswith(ZIPS + TARS + MANIFESTS) or os.path.exists(os.path.expanduser(location)):
        return [location]
    known = stores or KnownStores()
    places = [match for place in _alternatives(location) for match in _matches(place, known)]
    return list(dict.fromkeys(places))


def _alternatives(location: str) -> list[str]:
    done: list[str] = []
    pending = [location]
    while pending:
        place = pending.pop()
        found = _BRACES.search(place)
        if found is None:
            done.append(place)
            continue
        start, end = place[: found.start()], place[found.end() :]
        first, last, names = found.groups()
        if first is not None and abs(int(last) - int(first)) >= MAX_PLACES:
            raise _too_many(location)
        parts = _numbers(first, last) if first is not None else names.split(",")
        pending += [start + part + end for part in reversed(parts)]
        if len(pending) + len(done) > MAX_PLACES:
            raise _too_many(location)
    return done


def _numbers(first: str, last: str) -> list[str]:
    width = max(len(first), len(last)) if "0" in (first[: len(first) > 1], last[: len(last) > 1]) else 0
    step = 1 if int(first) <= int(last) else -1
    return [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]


def _matches(place: str, stores: KnownStores) -> list[str]:
    if _wild_at(place) is None or os.path.exists(os.path.expanduser(place)):
        return [place]
    found = sorted(_matching_urls(place, stores) if is_url(place) else glob.iglob(os.path.expanduser(place)))
    if not found:
        raise StoreUnusable(f"nothing is called {printable(place)}; check the pattern, or mount the disk it is on")
    return found


def _matching_urls(pattern: str, stores: KnownStores) -> Iterator[str]:
    """What is listed below the last folder without a pattern in its name. * stays within a folder, as on a disk."""
    folder = pattern[: pattern.rindex("/", 0, _wild_at(pattern)) + 1]
    names = [re.compile(fnmatch.translate(name)) for name in pattern.removeprefix(folder).split("/")]
    for item in stores.at(folder).scan(folder):
        if isinstance(item, Unlistable):
            raise StoreUnusable(f"{printable(item.prefix)} cannot be listed: {item.reason}")
        if isinstance(item, StoredPhoto):
            parts = item.key.removeprefix(folder).split("/")
            if len(parts) == len(names) and all(name.match(part) for name, part in zip(names, parts, strict=True)):
                yield item.key


def _wild_at(place: str) -> int | None:
    """Where a pattern begins: not in a host, as [::1] is one, nor in the query of a web address."""
    found = _WILD.search(place, len(home_of(place)) if is_url(place) else 0)
    is_query = found is not None and found[0] == "?" and place.lower().startswith(("http://", "https://"))
    return None if found is None or is_query else found.start()


def _too_many(location: str) -> UsageError:
    return UsageError(f"{printable(location)} stands for more than {MAX_PLACES:,} places; give fewer")
