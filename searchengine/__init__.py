"""Semantic search over photos: find any picture by describing it, or by another picture.

    index = searchengine.open_index("photos.index")
    searcher = searchengine.Searcher(index, searchengine.load_encoder("mini"))
    hits = searcher.search("a dog on a beach", k=10)

Importing this package loads neither torch nor faiss; each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from searchengine import errors

if TYPE_CHECKING:
    from searchengine.filters import Filters
    from searchengine.hits import Hit
    from searchengine.index.protocol import PhotoIndex
    from searchengine.search import Searcher
    from searchengine.vectors import Encoder

__version__ = "0.1.0"
__all__ = ["Filters", "Hit", "Searcher", "errors", "load_encoder", "open_index"]

HOMES = {"Filters": "searchengine.filters", "Hit": "searchengine.hits", "Searcher": "searchengine.search"}


def open_index(place: str | os.PathLike[str]) -> PhotoIndex:
    """Open an index for reading: a folder, or `milvus://HOST:PORT/NAME`. Raises IndexNotFound, IndexFormatError."""
    from searchengine.index.protocol import open_index

    return open_index(place)


def load_encoder(name: str = "mini", *, device: str = "auto", precision: str = "fp32") -> Encoder:
    """The encoder called `name`, or the one in the file `name`. Raises ModelNotFound, WeightsError, UsageError."""
    from searchengine.models.registry import load_encoder
    from searchengine.settings import load_settings

    folder = load_settings().models_folder
    return load_encoder(name, device=device, precision=precision, models_folder=folder)


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module 'searchengine' has no attribute {name!r}")
