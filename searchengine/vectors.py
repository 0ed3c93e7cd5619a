"""The vector contract: what every embedding in this project is, and who makes it.

An embedding matrix is float32, C-contiguous, of shape (n, dim), and each row has length 1 within
``UNIT_TOLERANCE``, so that a dot product is a cosine similarity in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from searchengine.errors import UsageError

if TYPE_CHECKING:
    import os

    from PIL import Image

    ImageSource = Image.Image | str | os.PathLike[str]

FloatMatrix = NDArray[np.float32]
PixelBatch = NDArray[np.uint8]

UNIT_TOLERANCE = 1e-3


class UsualScores(NamedTuple):
    """Centre and spread of the cosines between a text and photos that have nothing to do with it."""

    centre: float
    spread: float


@runtime_checkable
class Encoder(Protocol):
    """Puts texts and images into one space. All methods return unit rows, float32 (n, dim)."""

    @property
    def name(self) -> str:
        """The name in the registry, such as ``mini``, or the path of a checkpoint."""

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of the weights, the version of the preprocessing, and a precision that is not fp32."""

    @property
    def precision(self) -> str:
        """fp32, bf16, fp16 or int8: what the towers compute in. Vectors are float32 whichever it is."""

    @property
    def image_size(self) -> int:
        """Side, in pixels, of the square RGB crops that `encode_pixels` takes."""

    @property
    def logit_scale(self) -> float:
        """The learned inverse temperature: probabilities are softmax(logit_scale * cosine)."""

    @property
    def usual_scores(self) -> UsualScores: ...

    def encode_texts(self, texts: Sequence[str], *, truncate: bool = False) -> FloatMatrix:
        """A text of more tokens than the encoder reads raises QueryError, or with `truncate` is cut."""

    def encode_images(self, images: Sequence[ImageSource]) -> FloatMatrix: ...

    def encode_pixels(self, pixels: PixelBatch) -> FloatMatrix:
        """Encode uint8 RGB crops of shape (n, image_size, image_size, 3). Two threads may do so at once."""


# The squares of smaller numbers lose digits.
TINY = 1e-140


def normalise(vectors: NDArray[np.floating]) -> FloatMatrix:
    """Scale each row of (n, dim) to length 1.

    Raises UsageError for a row that is zero or not finite: it has no direction.
    """
    rows = np.asarray(vectors, dtype=np.float64)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    if not np.all(np.isfinite(lengths)) or np.any(lengths == 0):
        raise UsageError("a vector is zero or not finite, so it has no direction; check where it came from")
    if np.any(lengths < TINY):
        rows = np.where(lengths < TINY, rows * 2.0**512, rows)
        lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.ascontiguousarray(rows / lengths, dtype=np.float32)


def check_unit_rows(vectors: NDArray[np.generic], *, dim: int) -> FloatMatrix:
    """Return `vectors` as a (n, dim) float32 matrix, or raise UsageError that says what breaks the contract."""
    matrix = np.ascontiguousarray(vectors, dtype=np.float32)
    if matrix.ndim != 2 or matrix.shape[1] != dim:
        raise UsageError(f"vectors have shape {matrix.shape}, but this index holds (n, {dim})")
    lengths = np.linalg.norm(matrix, axis=1)
    if not np.all(np.isfinite(lengths)):
        raise UsageError("a vector has values that are not finite; check where it came from")
    worst = float(np.max(np.abs(lengths - 1), initial=0))
    if worst > UNIT_TOLERANCE:
        raise UsageError(f"a vector's length differs from 1 by {worst:.3g}; call searchengine.vectors.normalise first")
    return matrix
