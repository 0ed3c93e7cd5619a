"""The writing side: bring an index up to date with photo stores (`build`), publish it in Milvus (`staged`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from indexer.pipeline import build
    from indexer.report import Report
    from indexer.staging import staged

__all__ = ["Report", "build", "staged"]

HOMES = {"Report": "indexer.report", "build": "indexer.pipeline", "staged": "indexer.staging"}


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module 'indexer' has no attribute {name!r}")
