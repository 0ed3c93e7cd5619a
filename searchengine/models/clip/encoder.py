"""The encoder `clip`: weights from a file, each tower loaded when it is first used.

A text is run only as far as its end-of-text token: attention is causal, so what follows could not change the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from searchengine.errors import UsageError, WeightsError
from searchengine.models.clip.tokenizer import CONTEXT, EOT, VOCABULARY, ClipTokenizer
from searchengine.models.hashes import remembered_sha256
from searchengine.models.inputs import check_is_list, encode_in_batches
from searchengine.text import printable
from searchengine.vectors import FloatMatrix, PixelBatch, UsualScores, normalise

if TYPE_CHECKING:
    from searchengine.models.clip import text_numpy
    from searchengine.models.clip.checkpoints import Checkpoint
    from searchengine.models.clip.inference import ImageTower, TextTower
    from searchengine.vectors import ImageSource

# Counted up whenever the same photo or text would give another vector with the same weights.
PREPROCESSING_VERSION = 1

CACHED_TEXTS = 4096
# Tokens, padding included, of the texts that attention takes at once.
TOKENS_PER_BATCH = 4096
# As many texts as `text_numpy` encodes in a quarter of the time that torch takes to be imported.
FEW_TEXTS = 16

Tokens = tuple[int, ...]


class ClipEncoder:
    """Implements `searchengine.vectors.Encoder` with the checkpoint in `weights_file`.

    `sha256`: what the file must hash to, if that is known. `hashes_folder`: where hashes of files are remembered; None
    computes them. When weights are first needed: ModelNotFound, WeightsError,
    UsageError for a precision that `device` does not have, ModelUnusable for a device that is not there.
    """

    def __init__(
        self,
        *,
        name: str,
        weights_file: Path,
        device: str = "auto",
        precision: str = "fp32",
        sha256: str | None = None,
        hashes_folder: Path | None = None,
    ) -> None:
        self.name = name
        self.precision = precision
        self._weights_file, self._device, self._sha256 = weights_file, device, sha256
        self._hashes_folder = hashes_folder
        # What numpy's tower gave (True) and what torch's did (False).
        self._known_texts: dict[bool, dict[Tokens, FloatMatrix]] = {True: {}, False: {}}

    # Of OpenAI's ViT-B/32, by 1,296 texts and 18 photos whose vectors were published (tests/test_clip_golden.py).
    usual_scores = UsualScores(centre=0.192, spread=0.017)

    @property
    def dim(self) -> int:
        return self.checkpoint.config.dim

    @property
    def image_size(self) -> int:
        return self.checkpoint.config.image_size

    @property
    def logit_scale(self) -> float:
        return self.checkpoint.logit_scale

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(f"clip preprocessing {PREPROCESSING_VERSION}\n{self._hash}\n".encode())
        if self.precision != "fp32":
            digest.update(f"{self.precision}\n".encode())
        return digest.hexdigest()

    def encode_texts(self, texts: Sequence[str], *, truncate: bool = False) -> FloatMatrix:
        """Unit rows, float32 (n, dim). CLIP reads 77 tokens; a longer text raises QueryError, or is cut there."""
        check_is_list(texts, "texts")
        if not texts:
            return np.empty((0, self.dim), dtype=np.float32)
        tokens = [self.tokens_of(text, truncate=truncate) for text in texts]
        by_numpy = self._is_for_numpy(len(texts))
        known = self._known_texts[by_numpy]
        rows = {text: known[text] for text in set(tokens) if text in known}
        if unknown := set(tokens) - rows.keys():
            tower = self._numpy_text_tower if by_numpy else self._text_tower
            for batch in bucketed(unknown):
                rows.update(zip(batch, normalise(tower.encode(batch)), strict=True))
        self._remember(rows, by_numpy=by_numpy)
        return np.stack([rows[text] for text in tokens])

    def encode_images(self, images: Sequence[ImageSource]) -> FloatMatrix:
        """Unit rows, float32 (n, dim), for PIL images or paths. Raises ImageError that names the image."""
        return encode_in_batches(self, images)

    def encode_pixels(self, pixels: PixelBatch) -> FloatMatrix:
        """Unit rows, float32 (n, dim), for uint8 RGB crops (n, image_size, image_size, 3)."""
        size = self.image_size
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (size, size, 3):
            raise UsageError(f"pixels are {pixels.dtype} {pixels.shape}, expected uint8 (n, {size}, {size}, 3)")
        if not len(pixels):
            return np.empty((0, self.dim), dtype=np.float32)
        return normalise(self._image_tower.encode(pixels))

    def bare_towers(self) -> tuple[ImageTower, TextTower]:
        """Both towers without their projections, for who would learn others: their features have the towers' widths."""
        from torch import nn

        from searchengine.models.clip.inference import ImageTower, TextTower

        image, text = self.checkpoint.image_transformer(), self.checkpoint.text_transformer()
        image.projection, text.projection = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        return (
            ImageTower(image, device=self._device, precision=self.precision),
            TextTower(text, device=self._device, precision=self.precision),
        )

    def _is_for_numpy(self, texts: int) -> bool:
        """Whether texts are few enough to be encoded without torch; the vectors of the two differ by 1e-6.

        Only in fp32 on a CPU: an index that another precision made is searched in that, which only torch has. With the
        device `auto` that is so beside a GPU, too, where photos and many texts go: a few are encoded on the CPU sooner
        than torch finds it. Nothing else matters, so that a text has the same vector in every process.
        """
        return self.precision == "fp32" and self._device in ("auto", "cpu") and texts <= FEW_TEXTS

    def tokens_of(self, text: str, *, truncate: bool) -> Tokens:
        """As far as its end-of-text. Raises QueryError for a text that is too long, unless it is to be cut."""
        tokens = self._tokenizer.encode(text, truncate=truncate)
        return tuple(tokens[: tokens.index(EOT) + 1])  # a text may spell out an earlier one

    def _remember(self, rows: dict[Tokens, FloatMatrix], *, by_numpy: bool) -> None:
        known = self._known_texts[by_numpy]
        if len(known) + len(rows) > CACHED_TEXTS:
            known = self._known_texts[by_numpy] = {}  # another thread may read the old one
        if len(rows) <= CACHED_TEXTS:
            known.update(rows)

    @cached_property
    def _tokenizer(self) -> ClipTokenizer:
        return ClipTokenizer.load()

    @cached_property
    def _hash(self) -> str:
        return remembered_sha256(self._weights_file, folder=self._hashes_folder)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        from searchengine.models.clip.checkpoints import Checkpoint

        checkpoint = Checkpoint(self._weights_file)
        if self._sha256 is not None and self._hash != self._sha256:
            raise WeightsError(
                f"{printable(str(self._weights_file))} has sha256 {self._hash[:12]}, expected {self._sha256[:12]}; "
                f"fetch it again with: searchengine models download {self.name}"
            )
        config = checkpoint.config
        if (config.context, config.vocabulary) != (CONTEXT, VOCABULARY):
            raise WeightsError(
                f"{printable(str(self._weights_file))} reads {config.context} of {config.vocabulary:,} tokens, where "
                f"CLIP's tokenizer has {CONTEXT} of {VOCABULARY:,}; give a CLIP that was trained with it"
            )
        return checkpoint

    @cached_property
    def _image_tower(self) -> ImageTower:
        from searchengine.models.clip.inference import ImageTower

        return ImageTower(self.checkpoint.image_transformer(), device=self._device, precision=self.precision)

    @cached_property
    def _text_tower(self) -> TextTower:
        from searchengine.models.clip.inference import TextTower

        return TextTower(self.checkpoint.text_transformer(), device=self._device, precision=self.precision)

    @cached_property
    def _numpy_text_tower(self) -> text_numpy.TextTower:
        from searchengine.models.clip.text_numpy import TextTower

        return TextTower(self.checkpoint)


def bucketed(texts: set[Tokens]) -> Iterator[list[Tokens]]:
    """Texts of like length together; equal beginnings side by side."""
    bucket: list[Tokens] = []
    for text in sorted(texts, key=lambda text: (len(text), text)):
        if bucket and len(text) * (len(bucket) + 1) > TOKENS_PER_BATCH:
            yield bucket
            bucket = []
        bucket.append(text)
    if bucket:
        yield bucket
