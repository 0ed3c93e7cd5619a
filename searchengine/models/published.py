"""The published weights that have a name here: where they are, and the sha256 that pins every byte of them.

OpenAI's own files are TorchScript archives, listed with their hashes in `clip/clip.py` of
https://github.com/openai/CLIP, under the MIT licence; each URL holds its file's sha256. The second URL is the storage
behind the first.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

CDN = "https://openaipublic.azureedge.net/clip/models"
STORAGE = "https://openaipublic.blob.core.windows.net/clip/models"


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """One file of weights. `urls` are tried in order, and all of them give the same bytes."""

    name: str
    architecture: str
    urls: tuple[str, ...]
    sha256: str
    size_bytes: int
    dim: int
    licence: str

    @property
    def published_as(self) -> str:
        """The file's name at its publisher's, and on a mirror."""
        return self.urls[0].rpartition("/")[2]

    def stored_in(self, folder: Path) -> Path:
        """Where the file is, or would be, in a folder of weights."""
        return folder / f"{self.name}.pt"

    def is_whole(self, path: Path) -> bool:
        """Whether `path` holds these very bytes."""
        return path.is_file() and path.stat().st_size == self.size_bytes and sha256_of(path) == self.sha256

    def is_in(self, folder: Path) -> bool:
        """Whether it was downloaded: its sha256 was checked before it got its final name."""
        file = self.stored_in(folder)
        return file.is_file() and file.stat().st_size == self.size_bytes


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _openai(name: str, architecture: str, file: str, *, sha256: str, size_bytes: int, dim: int) -> PublishedFile:
    return PublishedFile(
        name=name,
        architecture=architecture,
        urls=(f"{CDN}/{sha256}/{file}", f"{STORAGE}/{sha256}/{file}"),
        sha256=sha256,
        size_bytes=size_bytes,
        dim=dim,
        licence="MIT",
    )


CLIP_VIT_B_32 = _openai(
    "clip-vit-b-32",
    "ViT-B/32",
    "ViT-B-32.pt",
    sha256="40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    size_bytes=353_976_522,
    dim=512,
)
CLIP_VIT_B_16 = _openai(
    "clip-vit-b-16",
    "ViT-B/16",
    "ViT-B-16.pt",
    sha256="5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    size_bytes=350_837_078,
    dim=512,
)
CLIP_VIT_L_14 = _openai(
    "clip-vit-l-14",
    "ViT-L/14",
    "ViT-L-14.pt",
    sha256="b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    size_bytes=932_768_134,
    dim=768,
)
CLIP_VIT_L_14_336 = _openai(
    "clip-vit-l-14-336",
    "ViT-L/14@336px",
    "ViT-L-14-336px.pt",
    sha256="3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
    size_bytes=934_088_680,
    dim=768,
)

PUBLISHED = {file.name: file for file in (CLIP_VIT_B_32, CLIP_VIT_B_16, CLIP_VIT_L_14, CLIP_VIT_L_14_336)}

# What `--model auto` takes for a new index.
PREFERRED = CLIP_VIT_B_32.name
