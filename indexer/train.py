"""Contrastive training of the projection heads of ``mini`` on captioned photos. The towers stay frozen.

The loss is CLIP's, symmetric InfoNCE with a learned temperature (Radford et al. 2021, arXiv:2103.00020). Captions
alone would make the heads forget what the towers know, so each batch also holds class prototypes: the features that a
photo of an ImageNet class would have, as far as the classifier's own weights tell, paired with the class's names. A
photo and its mirror image are both seen. The same photos, settings and seed give the same heads on one machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from indexer.projection import HeadsNetwork
from indexer.prototypes import Prototypes, class_texts
from searchengine.captions import CaptionedPhoto
from searchengine.decode import decode_file
from searchengine.errors import ImageError, UsageError
from searchengine.evaluate import Retrieval, image_to_text, text_to_image
from searchengine.models.mini.encoder import load_image_tower, load_text_tower
from searchengine.models.mini.heads import FEATURES, MiniHeads, save_heads
from searchengine.models.mini.parts import IMAGE_SIZE

EPOCHS = 40
BATCH = 512
PROTOTYPES_PER_BATCH = 640
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 2e-3, 0.05, 0.05
# The temperature learns ten times as fast as the weights, since it is one number.
MAX_SCALE, SCALE_RATE = 100.0, 10.0
# How strongly a class's name is pushed towards the label part of the space, which never forgets.
NAME_WEIGHT = 0.4
VALIDATION_SHARE = 0.03
DECODE_BATCH = 32


class ImageTower(Protocol):
    @property
    def classifier_weight(self) -> Tensor: ...

    @property
    def classifier_bias(self) -> Tensor: ...

    def describe(self, pixels: Tensor) -> Tensor: ...


class TextTower(Protocol):
    def encode(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]: ...


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """`losses` and `validation_losses` have one mean an epoch; Recall@K is over the photos held out, if any."""

    photos: int
    captions: int
    validation_photos: int
    epochs: int
    seconds: float
    losses: list[float]
    validation_losses: list[float]
    text_to_image: Retrieval | None
    image_to_text: Retrieval | None
    failed: list[tuple[Path, str]]

    def as_dict(self) -> dict[str, Any]:
        return {
            "photos": self.photos,
            "captions": self.captions,
            "validation_photos": self.validation_photos,
            "epochs": self.epochs,
            "seconds": self.seconds,
            "losses": self.losses,
            "validation_losses": self.validation_losses,
            "text_to_image": self.text_to_image and self.text_to_image.as_dict(),
            "image_to_text": self.image_to_text and self.image_to_text.as_dict(),
            "failed": len(self.failed),
        }


def train(
    photos: Sequence[CaptionedPhoto],
    *,
    out: Path,
    epochs: int | None = None,
    seed: int = 0,
    device: str = "auto",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TrainReport:
    """`train_heads` with the installed towers. The heads train on the CPU, where one seed gives one result."""
    return train_heads(
        photos,
        image_tower=load_image_tower(device),
        text_tower=load_text_tower(),
        out=out,
        epochs=EPOCHS if epochs is None else epochs,
        seed=seed,
        on_progress=on_progress,
    )


def train_heads(
    photos: Sequence[CaptionedPhoto],
    *,
    image_tower: ImageTower,
    text_tower: TextTower,
    out: Path,
    epochs: int = EPOCHS,
    seed: int = 0,
    validation_share: float = VALIDATION_SHARE,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> TrainReport:
    """Train heads and write them to `out`, whole or not at all.

    `on_progress(done, total)` counts photos described and, after them, epochs. Memory holds 12 kB a photo, never its
    pixels. Photos that cannot be decoded are skipped and listed. Raises UsageError if fewer than two are left to train
    on, or if `epochs` or `validation_share` make no sense.
    """
    if epochs < 1 or not 0 <= validation_share < 1:
        raise UsageError(f"epochs {epochs}, validation_share {validation_share}: use at least 1, and 0 to below 1")
    started = time.monotonic()
    steps = len(photos) + epochs
    kept, views, failed = _describe(photos, image_tower, lambda done: on_progress(done, steps))
    bounds = np.cumsum([len(photo.captions) for photo in kept])[:-1]
    all_captions = [caption for photo in kept for caption in photo.captions]
    captions = np.split(text_tower.encode(all_captions, truncate=True), bounds)
    order = np.random.default_rng(seed).permutation(len(kept))
    held_out = round(len(kept) * validation_share)
    chosen, validation = order[held_out:].tolist(), order[:held_out].tolist()
    if len(chosen) < 2:
        raise UsageError(f"{len(chosen)} of {len(photos):,} photos are left to train on; give at least two that decode")

    generator = torch.Generator().manual_seed(seed)
    training = _Pairs(views[:, chosen], [torch.from_numpy(captions[i]) for i in chosen], generator)
    texts = class_texts(text_tower.encode)
    weight, bias = image_tower.classifier_weight.float().cpu(), image_tower.classifier_bias.float().cpu()
    prototypes = Prototypes(weight, bias, training.views[0], texts, generator)
    network = HeadsNetwork(training.views[0], texts, generator)
    held = _Held(views[0, validation].numpy(), [captions[i] for i in validation])
    losses: list[float] = []
    validation_losses: list[float] = []
    trainer = _Trainer(network, training, prototypes, epochs, generator)
    for epoch in range(epochs):
        losses.append(trainer.run_epoch())
        if validation:
            validation_losses.append(held.loss(network))
        on_progress(len(photos) + epoch + 1, steps)
    counts = {"photos": len(chosen), "captions": sum(len(captions[i]) for i in chosen), "epochs": epochs, "seed": seed}
    save_heads(out, network.tensors(), logit_scale=float(network.scale.detach().exp()), counts=counts)
    retrievals = held.retrievals(MiniHeads.load(out)) if validation else (None, None)
    return TrainReport(
        photos=counts["photos"],
        captions=counts["captions"],
        validation_photos=len(validation),
        epochs=epochs,
        seconds=time.monotonic() - started,
        losses=losses,
        validation_losses=validation_losses,
        text_to_image=retrievals[0],
        image_to_text=retrievals[1],
        failed=failed,
    )


def _describe(
    photos: Sequence[CaptionedPhoto], tower: ImageTower, on_progress: Callable[[int], None]
) -> tuple[list[CaptionedPhoto], Tensor, list[tuple[Path, str]]]:
    """The photos that decode, their features and their mirror images', (2, n, 3048), and the others with the reason."""

    def read(photo: CaptionedPhoto) -> NDArray[np.uint8] | str:
        try:
            return decode_file(photo.path, image_size=IMAGE_SIZE)
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
                pixels = torch.from_numpy(np.stack(crops))  # (b, 260, 260, 3)
                both = tower.describe(torch.cat([pixels, pixels.flip(2)])).float().cpu()
                views.append(both.reshape(2, len(crops), FEATURES))
            on_progress(start + len(part))
    return kept, torch.cat(views, 1) if views else torch.empty(2, 0, FEATURES), failed


class _Pairs:
    """Photos with their captions' vectors, drawn in batches of random views and captions."""

    def __init__(self, views: Tensor, captions: list[Tensor], generator: torch.Generator) -> None:
        self.views = views  # (2, n, 3048)
        self.captions = torch.cat(captions)  # (all, 384)
        self._counts = torch.tensor([len(c) for c in captions])
        self._starts = self._counts.cumsum(0) - self._counts
        self._generator = generator
        self.size = min(BATCH, views.shape[1])

    def __len__(self) -> int:
        return self.views.shape[1] // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(self.views.shape[1], generator=self._generator)
        for rows in order[: len(self) * self.size].reshape(-1, self.size):
            view = torch.randint(2, rows.shape, generator=self._generator)
            first, second = self._draw(rows), self._draw(rows)
            # Half of the texts are the mean of two captions: a point between two ways to say it is a way to say it.
            both = torch.rand(len(rows), 1, generator=self._generator) < 0.5
            yield self.views[view, rows], F.normalize(first + both * second, dim=1)

    def _draw(self, rows: Tensor) -> Tensor:
        offset = (torch.rand(len(rows), generator=self._generator) * self._counts[rows]).long()
        return self.captions[self._starts[rows] + offset]


class _Trainer:
    """AdamW with a warm-up and a cosine to zero."""

    def __init__(
        self, network: HeadsNetwork, pairs: _Pairs, prototypes: Prototypes, epochs: int, generator: torch.Generator
    ) -> None:
        self._network, self._pairs, self._prototypes = network, pairs, prototypes
        # Dropout draws from torch's global generator, which is lent to it and given back.
        self._dropout_seed = int(torch.randint(2**31, (), generator=generator))
        steps = epochs * len(pairs)
        weights = [p for name, p in network.named_parameters() if name != "scale"]
        self._optimiser = torch.optim.AdamW(
            [
                {"params": weights, "weight_decay": WEIGHT_DECAY},
                {"params": [network.scale], "weight_decay": 0.0, "lr": LEARNING_RATE * SCALE_RATE},
            ],
            lr=LEARNING_RATE,
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimiser,
            lambda step: min(1, (step + 1) / (WARM_UP * steps)) * (1 + math.cos(math.pi * min(1, step / steps))) / 2,
        )

    def run_epoch(self) -> float:
        """One pass over the photos. Returns the mean loss."""
        self._network.train()
        losses = []
        with torch.random.fork_rng(devices=[]):
            self._dropout_seed += 1
            torch.manual_seed(self._dropout_seed)
            for features, sentences in self._pairs:
                class_features, names = self._prototypes.draw(PROTOTYPES_PER_BATCH)
                loss = self._network.loss(torch.cat([features, class_features]), torch.cat([sentences, names]))
                names_gate = F.logsigmoid(self._network.text_gate(names)).mean()
                self._optimiser.zero_grad()
                (loss - NAME_WEIGHT * names_gate).backward()  # type: ignore[no-untyped-call]
                self._optimiser.step()
                self._schedule.step()
                with torch.no_grad():
                    self._network.scale.clamp_(max=math.log(MAX_SCALE))
                losses.append(float(loss.detach()))
        return sum(losses) / len(losses)


class _Held:
    """The photos held out: their loss, each with its first caption, and their Recall@K over all captions."""

    def __init__(self, features: NDArray[np.float32], captions: list[NDArray[np.float32]]) -> None:
        self._features, self._captions = features, captions

    @torch.no_grad()
    def loss(self, network: HeadsNetwork) -> float:
        network.eval()
        first = np.stack([sentences[0] for sentences in self._captions])
        return float(network.loss(torch.from_numpy(self._features), torch.from_numpy(first)))

    def retrievals(self, trained: MiniHeads) -> tuple[Retrieval, Retrieval]:
        images, texts = trained.image(self._features), trained.text(np.concatenate(self._captions))
        owner = np.repeat(np.arange(len(images)), [len(c) for c in self._captions])
        return text_to_image(texts, images, owner), image_to_text(texts, images, owner)
