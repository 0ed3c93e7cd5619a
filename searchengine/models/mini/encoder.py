"""The encoder `mini`: frozen towers, trained heads, one space of 512 dimensions.

Each tower is loaded when it is first used: a text query never loads torch, an indexing run never the text tower.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from searchengine.errors import UsageError
from searchengine.models.inputs import check_is_list, encode_in_batches
from searchengine.models.mini import parts
from searchengine.models.mini.heads import MiniHeads
from searchengine.text import printable
from searchengine.vectors import FloatMatrix, PixelBatch, UsualScores

if TYPE_CHECKING:
    from searchengine.models.mini.efficientnet import EfficientNetLite2
    from searchengine.models.mini.minilm import MiniLM
    from searchengine.vectors import ImageSource

# Photos that the heads take at once.
BLOCK = 16


class MiniEncoder:
    """Implements `searchengine.vectors.Encoder` with the heads in the file `heads_file`.

    `precision`: fp32, or int8 for an image tower in 8-bit integers, on a CPU. `hashes_folder`: where hashes of the
    frozen parts are remembered; None computes them.

    Raises WeightsError for unusable heads and UsageError for another precision at once; ModelNotFound and WeightsError
    for a tower when it is first used, then also UsageError for int8 on a GPU.
    """

    dim = parts.DIM
    image_size = parts.IMAGE_SIZE
    usual_scores = UsualScores(centre=0.073, spread=0.066)  # by scripts/fit_relevance.py

    def __init__(
        self,
        *,
        name: str,
        heads_file: Path,
        device: str = "auto",
        precision: str = "fp32",
        hashes_folder: Path | None = None,
    ) -> None:
        if precision not in parts.PRECISIONS:
            raise UsageError(
                f"the encoder {printable(name)} has no precision {precision}; "
                f"use --precision {' or '.join(parts.PRECISIONS)}, or a CLIP"
            )
        self.name, self.precision = name, precision
        self._hashes_folder = hashes_folder
        self._heads_file = heads_file
        self.heads = MiniHeads.load(heads_file)
        self._device = device
        self._one_thread = threading.Lock()

    @cached_property
    def fingerprint(self) -> str:
        return parts.fingerprint(self._heads_file, precision=self.precision)

    @property
    def logit_scale(self) -> float:
        return self.heads.logit_scale

    def encode_texts(self, texts: Sequence[str], *, truncate: bool = False) -> FloatMatrix:
        """Unit rows, float32 (n, 512). MiniLM reads 256 tokens; a longer text raises QueryError, or is cut there."""
        check_is_list(texts, "texts")
        if not texts:
            return np.empty((0, self.dim), dtype=np.float32)
        return self.heads.text(self.text_tower.encode(texts, truncate=truncate))

    def encode_images(self, images: Sequence[ImageSource]) -> FloatMatrix:
        """Unit rows, float32 (n, 512), for PIL images or paths. Raises ImageError that names the image."""
        return encode_in_batches(self, images)

    def encode_pixels(self, pixels: PixelBatch) -> FloatMatrix:
        """Unit rows, float32 (n, 512), for uint8 RGB crops (n, 260, 260, 3).

        On a CPU a vector depends neither on what is beside it nor on the number of threads.
        """
        import torch
        from threadpoolctl import threadpool_limits

        images = torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
        features: NDArray[np.float32] = self.image_tower.describe(images).numpy()
        rows = np.empty((len(features), self.dim), dtype=np.float32)
        # BLAS adds up in an order that goes by shape and threads; so both are always the same. Two threads that set
        # and restore its threads at once would leave it with one for good.
        with self._one_thread, threadpool_limits(1, user_api="blas"):
            for start in range(0, len(features), BLOCK):
                some = features[start : start + BLOCK]
                block = np.zeros((BLOCK, features.shape[1]), dtype=np.float32)
                block[: len(some)] = some
                rows[start : start + BLOCK] = self.heads.image(block)[: len(some)]
        return rows

    @cached_property
    def text_tower(self) -> MiniLM:
        return load_text_tower(hashes_folder=self._hashes_folder)

    @cached_property
    def image_tower(self) -> EfficientNetLite2:
        return load_image_tower(self._device, precision=self.precision, hashes_folder=self._hashes_folder)


def load_text_tower(*, hashes_folder: Path | None = None) -> MiniLM:
    """The installed text tower. Raises ModelNotFound, WeightsError."""
    from searchengine.models.mini.minilm import MiniLM

    parts.locate(parts.TOKENIZER, hashes_folder=hashes_folder)
    return MiniLM.from_folder(parts.locate(parts.TEXT_TOWER, hashes_folder=hashes_folder).parent)


def load_image_tower(device: str, *, precision: str = "fp32", hashes_folder: Path | None = None) -> EfficientNetLite2:
    """The installed image tower; `auto` is a GPU where there is one, except for integers.

    Raises ModelNotFound, WeightsError, ModelUnusable for a device that cannot be used, UsageError for int8 on a GPU.
    """
    from searchengine.models.devices import choose_device
    from searchengine.models.mini.efficientnet import EfficientNetLite2

    file = parts.locate(parts.IMAGE_TOWER, hashes_folder=hashes_folder)
    return EfficientNetLite2.from_file(file, device=str(choose_device(device, precision)), precision=precision)
