"""The writing side: bring an index up to date with photo stores (`build`), train projection heads (`train`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from indexer.pipeline import Report, build

__all__ = ["Report", "build"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("indexer.pipeline"), name)
    raise AttributeError(f"module 'indexer' has no attribute {name!r}")
