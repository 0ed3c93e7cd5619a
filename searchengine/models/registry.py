"""The encoders by name: which there are, whether their weights are here, and how to load one.

A name is one of `BUILT_IN`, the name of an imported file (`models import`), or the path of a file that
`searchengine train` wrote.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from searchengine.errors import ModelNotFound, UsageError
from searchengine.index.layout import write_durably
from searchengine.models.mini import parts
from searchengine.text import printable
from searchengine.vectors import Encoder

BUILT_IN = ("mini",)
SUFFIX = ".safetensors"


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A line of `searchengine models`. `size_bytes` is what all of its weights take on disk."""

    name: str
    dim: int
    size_bytes: int
    downloaded: bool
    licence: str
    about: str


def list_models(models_folder: Path) -> Iterator[ModelInfo]:
    """The built-in encoders, then the imported ones by name."""
    missing = parts.missing()
    yield ModelInfo(
        name="mini",
        dim=parts.DIM,
        size_bytes=parts.size_bytes() + parts.SHIPPED_HEADS.stat().st_size,
        downloaded=not missing,
        licence="Apache-2.0 and MIT",
        about="EfficientNet-Lite2 and MiniLM with projection heads of ours; installs from the package registry",
    )
    for file in sorted(models_folder.glob("*" + SUFFIX)):
        yield ModelInfo(
            name=file.stem,
            dim=parts.DIM,
            size_bytes=parts.size_bytes() + file.stat().st_size,
            downloaded=not missing,
            licence="yours",
            about="projection heads for mini, imported",
        )


def load_encoder(
    name: str, *, device: str = "auto", precision: str = "fp32", models_folder: Path | None = None
) -> Encoder:
    """The encoder called `name`. Its towers are loaded when they are first used, its heads at once.

    Raises ModelNotFound for an unknown name or missing weights, WeightsError for weights that are not what they
    should be, UsageError for a `precision` that it does not have (mini has fp32).
    """
    from searchengine.models.mini.encoder import MiniEncoder

    if precision != "fp32":
        raise UsageError(f"the encoder {printable(name)} has precision fp32, not {precision!r}")
    return MiniEncoder(name=name, heads_file=find_heads(name, models_folder=models_folder), device=device)


def find_heads(name: str, *, models_folder: Path | None) -> Path:
    """The file of projection heads that `name` stands for. Raises ModelNotFound."""
    if name == "mini":
        return parts.SHIPPED_HEADS
    if models_folder is not None and os.path.basename(name) == name and (models_folder / (name + SUFFIX)).is_file():
        return models_folder / (name + SUFFIX)
    if Path(name).is_file():
        return Path(name)
    imported = [file.stem for file in sorted(models_folder.glob("*" + SUFFIX))] if models_folder else []
    raise ModelNotFound(
        f"there is no encoder {printable(name)}; use one of {', '.join([*BUILT_IN, *imported])}, "
        "or the path of a file made by: searchengine train"
    )


def canonical_name(name: str, *, models_folder: Path) -> str:
    """The name an index should remember: a path is made absolute, so that it is found from anywhere."""
    if name in BUILT_IN or (models_folder / (name + SUFFIX)).is_file():
        return name
    return str(Path(name).absolute())


def import_model(file: Path, *, models_folder: Path) -> ModelInfo:
    """Check a file of trained heads and keep a copy under its stem. Raises ModelNotFound, WeightsError."""
    from searchengine.models.mini.heads import MiniHeads

    if not file.is_file():
        raise ModelNotFound(f"there is no file {printable(str(file))}; give one made by: searchengine train")
    MiniHeads.load(file)
    if file.stem in BUILT_IN:
        raise ModelNotFound(f"the name {file.stem} is taken by a built-in encoder; rename the file, then import it")
    models_folder.mkdir(parents=True, exist_ok=True)
    write_durably(models_folder / (file.stem + SUFFIX), file.read_bytes())
    return next(info for info in list_models(models_folder) if info.name == file.stem)
