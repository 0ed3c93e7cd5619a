"""The encoder `mini`: frozen towers, trained heads, one space of 512 dimensions.

Each tower is loaded when it is first used: a text query never loads torch, an indexing run never the text tower.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from searchengine.decode import crop_pixels, decode_file
from searchengine.errors import ImageError, ModelUnusable, UsageError
from searchengine.models.mini import parts
from searchengine.models.mini.heads import MiniHeads
from searchengine.text import printable
from searchengine.vectors import FloatMatrix, PixelBatch

if TYPE_CHECKING:
    from searchengine.models.mini.efficientnet import EfficientNetLite2
    from searchengine.models.mini.minilm import MiniLM
    from searchengine.vectors import ImageSource

IMAGES_PER_BATCH = 32


class MiniEncoder:
    """Implements `searchengine.vectors.Encoder` with the heads in the file `heads_file`.

    Raises WeightsError for unusable heads at once; ModelNotFound and WeightsError for a tower when it is first used.
    """

    dim = parts.DIM
    image_size = parts.IMAGE_SIZE

    def __init__(self, *, name: str, heads_file: Path, device: str = "auto") -> None:
        self.name = name
        self._heads_file = heads_file
        self._heads = MiniHeads.load(heads_file)
        self._device = device

    @cached_property
    def fingerprint(self) -> str:
        return parts.fingerprint(self._heads_file)

    @property
    def logit_scale(self) -> float:
        return self._heads.logit_scale

    def encode_texts(self, texts: Sequence[str]) -> FloatMatrix:
        """Unit rows, float32 (n, 512). Words beyond MiniLM's 256 tokens do not count."""
        if isinstance(texts, str):  # a sequence too, of its letters
            raise UsageError("texts is one text; give a list of texts")
        if not texts:
            return np.empty((0, self.dim), dtype=np.float32)
        return self._heads.text(self._text_tower.encode(texts))

    def encode_images(self, images: Sequence[ImageSource]) -> FloatMatrix:
        """Unit rows, float32 (n, 512), for PIL images or paths. Raises ImageError that names the image."""
        if isinstance(images, str):
            raise UsageError("images is one path; give a list of images")
        rows = [np.empty((0, self.dim), dtype=np.float32)]
        for start in range(0, len(images), IMAGES_PER_BATCH):
            crops = [self._crop(image) for image in images[start : start + IMAGES_PER_BATCH]]
            rows.append(self.encode_pixels(np.stack(crops)))
        return np.concatenate(rows)

    def encode_pixels(self, pixels: PixelBatch) -> FloatMatrix:
        """Unit rows, float32 (n, 512), for uint8 RGB crops (n, 260, 260, 3)."""
        import torch

        features: NDArray[np.float32] = self._image_tower.describe(torch.from_numpy(pixels)).cpu().numpy()
        return self._heads.image(features)

    def _crop(self, image: ImageSource) -> NDArray[np.uint8]:
        if isinstance(image, Image.Image):
            return crop_pixels(image, image_size=self.image_size)
        try:
            return decode_file(image, image_size=self.image_size)
        except ImageError as error:
            raise ImageError(f"{printable(os.fspath(image))}: {error}") from None

    @cached_property
    def _text_tower(self) -> MiniLM:
        return load_text_tower()

    @cached_property
    def _image_tower(self) -> EfficientNetLite2:
        return load_image_tower(self._device)


def load_text_tower() -> MiniLM:
    """The installed text tower. Raises ModelNotFound, WeightsError."""
    from searchengine.models.mini.minilm import MiniLM

    parts.locate(parts.TOKENIZER)
    return MiniLM.from_folder(parts.locate(parts.TEXT_TOWER).parent)


def load_image_tower(device: str) -> EfficientNetLite2:
    """The installed image tower; `auto` is a GPU where there is one.

    Raises ModelNotFound, WeightsError, ModelUnusable for a device that cannot be used.
    """
    import torch

    from searchengine.models.mini.efficientnet import EfficientNetLite2

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise ModelUnusable(f"the device {device} cannot be used here ({reason}); use --device cpu") from None
    return EfficientNetLite2.from_file(parts.locate(parts.IMAGE_TOWER), device=device)
