"""Contrastive training of what follows an encoder's frozen towers, on captioned photos.

Each photo, its mirror image and each caption go through the towers once; all epochs learn from these features, as
`contrastive.py` tells. What learns is in `train_mini.py` and `train_clip.py`. The same photos, settings and seed give
the same result on one machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from indexer.contrastive import Best, FloatArray, Heads, Held, Network, Pairs, Recalls, Trainer
from searchengine.captions import CaptionedPhoto
from searchengine.decode import decode_file
from searchengine.errors import ImageError, UsageError
from searchengine.text import printable
from searchengine.vectors import Encoder

DECODE_BATCH = 32


class Learner(Protocol):
    """An encoder whose heads can be trained. n_i and n_t are the widths of its towers.

    With `keeps_best`, the result is that of the epoch that did best on the photos held out, or what was there before,
    and a training ends when none has been better for a third of `epochs`.
    """

    name: str
    image_size: int
    epochs: int
    learning_rate: float
    validation_share: float
    keeps_best: bool

    def describe(self, pixels: Tensor) -> Tensor:
        """uint8 (n, s, s, 3) -> float32 (n, n_i), on the CPU."""

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """Returns (n, n_t); long texts are cut."""

    def before(self) -> Heads: ...

    def network(self, features: Tensor, generator: torch.Generator) -> Network:
        """`features` (n, n_i) are those of the photos to train on."""

    def save(self, network: Network, out: Path, counts: Mapping[str, int]) -> Heads:
        """Write the encoder with what was learned, whole or not at all, and give its heads."""


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """`losses` and `validation_losses` have one mean an epoch; `before` and `after` are over photos held out, if any.

    `best_epoch` is the one that was kept, 0 if none was better than what was there.
    """

    model: str
    photos: int
    captions: int
    validation_photos: int
    epochs: int
    best_epoch: int
    seconds: float
    losses: list[float]
    validation_losses: list[float]
    before: Recalls | None
    after: Recalls | None
    failed: list[tuple[Path, str]]

    def as_dict(self) -> dict[str, Any]:
        after = self.after.as_dict() if self.after else {"text_to_image": None, "image_to_text": None}
        return {
            "model": self.model,
            "photos": self.photos,
            "captions": self.captions,
            "validation_photos": self.validation_photos,
            "epochs": self.epochs,
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
            "losses": self.losses,
            "validation_losses": self.validation_losses,
            **after,
            "before": self.before and self.before.as_dict(),
            "failed": len(self.failed),
        }


def train(
    photos: Sequence[CaptionedPhoto],
    *,
    encoder: Encoder,
    out: Path,
    epochs: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TrainReport:
    """Train what follows the towers of `encoder`, which is mini or a CLIP; see `train_heads`.

    The towers compute where the encoder does, in its precision; the heads train on the CPU, where one seed gives one
    result.
    """
    return train_heads(photos, learner=learner_of(encoder), out=out, epochs=epochs, seed=seed, on_progress=on_progress)


def learner_of(encoder: Encoder) -> Learner:
    """Raises UsageError for an encoder that has no heads to train."""
    from searchengine.models.clip.encoder import ClipEncoder
    from searchengine.models.mini.encoder import MiniEncoder

    if isinstance(encoder, MiniEncoder):
        from indexer.train_mini import MiniLearner

        return MiniLearner(encoder.image_tower, encoder.text_tower, heads=encoder.heads, name=encoder.name)
    if isinstance(encoder, ClipEncoder):
        from indexer.train_clip import ClipLearner

        return ClipLearner(encoder)
    raise UsageError(f"the encoder {printable(encoder.name)} cannot be trained; take mini or a CLIP")


def train_heads(
    photos: Sequence[CaptionedPhoto],
    *,
    learner: Learner,
    out: Path,
    epochs: int | None = None,
    seed: int = 0,
    validation_share: float | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TrainReport:
    """Train heads and write an encoder with them to `out`, whole or not at all.

    `on_progress(done, total)` counts photos described and, after them, epochs. Memory holds the features of the towers,
    about 12 kB a photo, never its pixels. Photos that cannot be decoded are skipped and listed. Raises UsageError if
    `out` is there already, if fewer than two photos are left to train on, or if `epochs` or `validation_share` make no
    sense.
    """
    epochs = learner.epochs if epochs is None else epochs
    share = learner.validation_share if validation_share is None else validation_share
    if epochs < 1 or not 0 <= share < 1:
        raise UsageError(f"epochs {epochs}, validation_share {share}: use at least 1, and 0 to below 1")
    refuse_to_replace(out)
    started = time.monotonic()
    steps = len(photos) + epochs
    kept, views, failed = _describe(photos, learner, lambda done: on_progress(done, steps))
    bounds = np.cumsum([len(photo.captions) for photo in kept])[:-1]
    all_captions = [caption for photo in kept for caption in photo.captions]
    order = np.random.default_rng(seed).permutation(len(kept))
    held_out = round(len(kept) * share)
    chosen, validation = order[held_out:].tolist(), order[:held_out].tolist()
    if len(chosen) < 2:
        raise UsageError(f"{len(chosen)} of {len(photos):,} photos are left to train on; give at least two that decode")
    captions = np.split(learner.encode(all_captions), bounds)

    generator = torch.Generator().manual_seed(seed)
    network = learner.network(views[0, chosen], generator)
    training = Pairs(views[:, chosen], [torch.from_numpy(captions[i]) for i in chosen], network, generator)
    held = Held(views[0, validation].numpy(), [captions[i] for i in validation])
    losses: list[float] = []
    validation_losses: list[float] = []
    trainer = Trainer(network, training, epochs, learner.learning_rate, generator)
    best = Best(network, held.loss(network) if validation else math.inf)
    for epoch in range(1, epochs + 1):
        losses.append(trainer.run_epoch())
        if validation:
            validation_losses.append(held.loss(network))
            if learner.keeps_best and best.is_long_past(epoch, validation_losses[-1], patience=max(3, epochs // 3)):
                break
        on_progress(len(photos) + epoch, steps)
    best_epoch = best.restore() if learner.keeps_best and validation else epochs
    if len(losses) < epochs:
        on_progress(steps, steps)
    counts = {"photos": len(chosen), "captions": sum(len(captions[i]) for i in chosen), "epochs": epochs, "seed": seed}
    refuse_to_replace(out)
    after = learner.save(network, out, counts)
    return TrainReport(
        model=learner.name,
        photos=counts["photos"],
        captions=counts["captions"],
        validation_photos=len(validation),
        epochs=len(losses),
        best_epoch=best_epoch,
        seconds=time.monotonic() - started,
        losses=losses,
        validation_losses=validation_losses,
        before=held.recalls(learner.before()) if validation else None,
        after=held.recalls(after) if validation else None,
        failed=failed,
    )


def refuse_to_replace(out: Path) -> None:
    """Raises UsageError where something is there that an encoder would take the place of."""
    if out.exists():
        raise UsageError(f"{printable(str(out))} is there already, and nothing is written over; give another --out")
    if not out.parent.is_dir():
        raise UsageError(f"the folder {printable(str(out.parent))} does not exist; make it, or give another --out")


def _describe(
    photos: Sequence[CaptionedPhoto], learner: Learner, on_progress: Callable[[int], None]
) -> tuple[list[CaptionedPhoto], Tensor, list[tuple[Path, str]]]:
    """The photos that decode, their features and their mirror images', (2, n, n_i), and the others with the reason."""

    def read(photo: CaptionedPhoto) -> NDArray[np.uint8] | str:
        try:
            return decode_file(photo.path, image_size=learner.image_size)
        except ImageError as error:
            return str(error)

    kept: list[CaptionedPhoto] = []
    failed: list[tuple[Path, str]] = []
    views = []
    with ThreadPoolExecutor(2) as pool:
        for start in range(0, len(photos), DECODE_BATCH):
            part = photos[start : start + DECODE_BATCH]
            crops = []
            for photo, crop in zip(part, pool.map(read, part), strict=True):
                if isinstance(crop, str):
                    failed.append((photo.path, crop))
                else:
                    kept.append(photo)
                    crops.append(crop)
            if crops:
                pixels = torch.from_numpy(np.stack(crops))  # (b, s, s, 3)
                both = learner.describe(torch.cat([pixels, pixels.flip(2)]))
                views.append(both.reshape(2, len(crops), -1))
            on_progress(start + len(part))
    return kept, torch.cat(views, 1) if views else torch.empty(2, 0, 0), failed
