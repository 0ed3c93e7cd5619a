"""The writing side: bring an index up to date with photo stores (`build`), train projection heads (`train`)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from indexer.pipeline import build
    from indexer.report import Report

__all__ = ["Report", "build"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        module = "indexer.report" if name == "Report" else "indexer.pipeline"
        return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'indexer' has no attribute {name!r}")
