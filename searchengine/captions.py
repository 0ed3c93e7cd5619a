"""Photos with captions, as evaluation and training read them."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from searchengine.errors import UsageError
from searchengine.text import printable


@dataclass(frozen=True, kw_only=True)
class CaptionedPhoto:
    path: Path
    captions: tuple[str, ...]


def read_captions(file: str | os.PathLike[str], *, images: str | os.PathLike[str]) -> list[CaptionedPhoto]:
    """Read a captions file; photos are looked up below the folder `images`.

    Two formats are known: ``[{"file" or "file_name": ..., "captions": [...]}]`` and that of COCO's caption annotations,
    ``{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}``. Raises UsageError.
    """
    shown = printable(os.fspath(file))
    try:
        content = json.loads(Path(file).read_text("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"the captions file {shown} cannot be read: {error.strerror}; check the path") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the captions file {shown} is not JSON: {error}") from None
    if not Path(images).is_dir():
        raise UsageError(f"the folder of images {printable(os.fspath(images))} does not exist; check --images")
    try:
        entries = _coco(content) if isinstance(content, dict) else _plain(content)
        photos = [
            CaptionedPhoto(path=Path(images, name), captions=tuple(c for c in captions if c.strip()))
            for name, captions in entries
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(
            f"the captions file {shown} has an unknown layout ({type(error).__name__}: {error}); "
            'expected [{"file": name, "captions": [text, ...]}, ...] or the format of COCO'
        ) from None
    photos = [photo for photo in photos if photo.captions]
    if not photos:
        raise UsageError(f"the captions file {shown} names no photo with a caption")
    return photos


def _plain(content: Any) -> list[tuple[str, list[str]]]:
    entries = [(entry["file"] if "file" in entry else entry["file_name"], entry["captions"]) for entry in content]
    if any(not isinstance(captions, list) for _, captions in entries):  # a text would pass for a list of letters
        raise TypeError("captions must be a list")
    return entries


def _coco(content: dict[str, Any]) -> list[tuple[str, list[str]]]:
    captions: dict[Any, list[str]] = defaultdict(list)
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    return [(entry["file_name"], captions[entry["id"]]) for entry in content["images"]]
