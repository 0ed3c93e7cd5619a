"""The encoders by name: which there are, whether their weights are here, and how to load one.

A name is `mini`, one of `PUBLISHED`, the name of an imported file (`models import`), or the path of a file: of a CLIP
checkpoint, or of heads that `searchengine train` wrote. What a file is, its content tells.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from searchengine.errors import ModelNotFound, WeightsError
from searchengine.index.layout import publish
from searchengine.models.mini import parts
from searchengine.models.published import PUBLISHED, PublishedFile
from searchengine.text import printable
from searchengine.vectors import Encoder

SUFFIXES = (".safetensors", ".pt")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A line of `searchengine models`. `size_bytes` is what all of its weights take on disk; `url` and `sha256` are
    told of published files."""

    name: str
    dim: int
    size_bytes: int
    downloaded: bool
    licence: str
    about: str
    url: str | None = None
    sha256: str | None = None


def list_models(models_folder: Path) -> Iterator[ModelInfo]:
    """mini, the published CLIPs, then the imported encoders by name."""
    yield ModelInfo(
        name="mini",
        dim=parts.DIM,
        size_bytes=parts.size_bytes() + parts.SHIPPED_HEADS.stat().st_size,
        downloaded=not parts.missing(),
        licence="Apache-2.0 and MIT",
        about="EfficientNet-Lite2 and MiniLM with projection heads of ours; installs from the package registry",
    )
    for published in PUBLISHED.values():
        yield _about_published(published, models_folder)
    for file in _imported(models_folder):
        yield _about_imported(file)


def find_model(name: str, *, models_folder: Path) -> ModelInfo:
    """The line of one encoder. Raises ModelNotFound for a name that is not in the list."""
    for info in list_models(models_folder):
        if info.name == name:
            return info
    raise ModelNotFound(f"there is no encoder {printable(name)}; `searchengine models` lists those that there are")


def load_encoder(
    name: str, *, device: str = "auto", precision: str = "fp32", models_folder: Path | None = None
) -> Encoder:
    """The encoder called `name`. Nothing is downloaded: `searchengine models download` does that.

    Raises ModelNotFound for an unknown name or missing weights, WeightsError for weights that are not what they
    should be, UsageError for a `precision` that it does not have (mini has fp32 and int8; CLIP also bf16 and fp16).
    """
    file = find_weights(name, models_folder=models_folder)
    if is_mini_heads(file):
        from searchengine.models.mini.encoder import MiniEncoder

        return MiniEncoder(name=name, heads_file=file, device=device, precision=precision, hashes_folder=models_folder)
    from searchengine.models.clip.encoder import ClipEncoder

    pinned = PUBLISHED[name].sha256 if name in PUBLISHED else None
    return ClipEncoder(
        name=name,
        weights_file=file,
        device=device,
        precision=precision,
        sha256=pinned,
        hashes_folder=models_folder,
    )


def find_weights(name: str, *, models_folder: Path | None) -> Path:
    """The file that `name` stands for: a CLIP checkpoint, or heads for mini. Raises ModelNotFound."""
    if name == "mini":
        return parts.SHIPPED_HEADS
    if name in PUBLISHED:
        if models_folder is None or not PUBLISHED[name].is_in(models_folder):
            raise ModelNotFound(
                f"the weights of {name} are not here; get them with: searchengine models download {name}"
            )
        return PUBLISHED[name].stored_in(models_folder)
    imported = {} if models_folder is None else {file.stem: file for file in _imported(models_folder)}
    if name in imported:
        return imported[name]
    if Path(name).is_file():
        return Path(name)
    raise ModelNotFound(
        f"there is no encoder {printable(name)}; use one of {', '.join(['mini', *PUBLISHED, *imported])}, "
        "or the path of a CLIP checkpoint or of a file made by: searchengine train"
    )


def weights_files(name: str, *, models_folder: Path | None) -> list[Path]:
    """The files of weights that the encoder `name` reads, and may keep mapped. Raises ModelNotFound."""
    file = find_weights(name, models_folder=models_folder)
    return [file, *parts.paths()] if is_mini_heads(file) else [file]


def is_mini_heads(file: Path) -> bool:
    """Whether `file` says that it holds projection heads for mini; it may still be damaged."""
    from searchengine.models.mini.heads import FORMAT

    try:
        with safe_open(str(file), framework="numpy") as opened:
            return FORMAT in (opened.metadata() or {})
    except (OSError, SafetensorError):
        return False


def canonical_name(name: str, *, models_folder: Path) -> str:
    """The name an index should remember: a path is made absolute, so that it is found from anywhere."""
    known = {"mini", *PUBLISHED, *(file.stem for file in _imported(models_folder))}
    return name if name in known else str(Path(name).absolute())


def import_model(file: Path, *, models_folder: Path) -> ModelInfo:
    """Check a CLIP checkpoint or trained heads and keep a copy under its stem; published bytes get their own name.

    Raises ModelNotFound where there is no file or its name is taken, WeightsError for content that cannot be used.
    """
    if not file.is_file():
        raise ModelNotFound(
            f"there is no file {printable(str(file))}; give a CLIP checkpoint, or a file made by: searchengine train"
        )
    for published in PUBLISHED.values():
        if published.is_whole(file):
            with _copied(file, published.stored_in(models_folder)):
                pass
            return _about_published(published, models_folder)
    if is_mini_heads(file):
        return _import_heads(file, models_folder)
    return _import_checkpoint(file, models_folder)


def _import_heads(file: Path, models_folder: Path) -> ModelInfo:
    from searchengine.models.mini.heads import MiniHeads

    with _copied(file, _free_name(file.stem, ".safetensors", models_folder)) as copy:
        MiniHeads.load(copy)
    return _about_imported(models_folder / (file.stem + ".safetensors"))


def _import_checkpoint(file: Path, models_folder: Path) -> ModelInfo:
    """The copy stands alone, so its name tells what the publisher's configuration beside the original did."""
    from searchengine.models.clip.checkpoints import Checkpoint

    checkpoint = Checkpoint(file)
    stem = file.stem
    if checkpoint.activation_source != "file" and "gelu" not in stem.lower():
        stem += f"-{checkpoint.config.activation.replace('_', '')}"
    final = _free_name(stem, file.suffix if file.suffix in SUFFIXES else ".pt", models_folder)
    with _copied(file, final) as copy:
        if Checkpoint(copy).config != checkpoint.config:
            raise WeightsError(
                f"{printable(str(file))} needs the configuration beside it, more than a name can tell; "
                f"use it where it is, with: --model {printable(str(file))}"
            )
    return _about_imported(final)


def _free_name(stem: str, suffix: str, models_folder: Path) -> Path:
    """Where to keep an import, which may replace one of its own kind. Raises ModelNotFound for a name that is taken."""
    taken = {"mini", *PUBLISHED, *(known.stem for known in _imported(models_folder) if known.suffix != suffix)}
    if stem in taken:
        raise ModelNotFound(f"the name {printable(stem)} is taken by another encoder; rename the file, then import it")
    return models_folder / (stem + suffix)


@contextmanager
def _copied(file: Path, final: Path) -> Iterator[Path]:
    """Gives a copy to look at, which takes its final name unless something is wrong with it."""
    final.parent.mkdir(parents=True, exist_ok=True)
    copy = final.with_name(final.name + ".tmp")
    try:
        shutil.copyfile(file, copy)
        yield copy
        publish(copy, final)
    finally:
        copy.unlink(missing_ok=True)


def _imported(models_folder: Path) -> list[Path]:
    files = sorted(file for suffix in SUFFIXES for file in models_folder.glob("*" + suffix))
    return [file for file in files if file.stem != "mini" and file.stem not in PUBLISHED]


def _about_published(published: PublishedFile, models_folder: Path) -> ModelInfo:
    return ModelInfo(
        name=published.name,
        dim=published.dim,
        size_bytes=published.size_bytes,
        downloaded=published.is_in(models_folder),
        licence=published.licence,
        about=f"CLIP {published.architecture} of Radford et al. (2021), with OpenAI's weights",
        url=published.urls[0],
        sha256=published.sha256,
    )


def _about_imported(file: Path) -> ModelInfo:
    """What a file holds; one that cannot be used is told as such, and spoils no list."""
    size_bytes, dim, usable = file.stat().st_size, parts.DIM, True
    if is_mini_heads(file):
        size_bytes, usable, about = size_bytes + parts.size_bytes(), not parts.missing(), "projection heads for mini"
    else:
        from searchengine.models.clip.checkpoints import Checkpoint

        try:
            config = Checkpoint(file).config
            dim, about = config.dim, f"CLIP with patches of {config.patch_size} and pictures of {config.image_size} px"
        except WeightsError as error:
            dim, usable, about = 0, False, str(error)
    return ModelInfo(
        name=file.stem,
        dim=dim,
        size_bytes=size_bytes,
        downloaded=usable,
        licence="yours",
        about=f"{about}, imported" if usable else about,
    )
