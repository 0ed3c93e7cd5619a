"""The files of the repository's `config/` folder, wherever they were installed."""

from __future__ import annotations

from pathlib import Path

# A wheel carries config/ inside the package; a checkout has it beside the package.
_INSTALLED = Path(__file__).parent / "config"
_CHECKOUT = Path(__file__).parent.parent / "config"


def resource(name: str) -> Path:
    """The path of the file `name` of `config/`, such as ``labels/imagenet.txt``."""
    return (_INSTALLED if _INSTALLED.is_dir() else _CHECKOUT) / name
