"""Training of heads: it learns, it repeats itself, it survives bad photos, and it writes all or nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from indexer.prototypes import Prototypes, class_texts
from indexer.train import TrainReport, train_heads
from searchengine.captions import CaptionedPhoto, read_captions
from searchengine.errors import UsageError
from searchengine.models.mini import parts
from searchengine.models.mini.efficientnet import EfficientNetLite2
from searchengine.models.mini.heads import CLASSES, FEATURES, SENTENCE, MiniHeads
from searchengine.vectors import normalise

PHOTOS = 24


class HashedTexts:
    """Sentence vectors that depend on the text alone; a thousand class names cost nothing."""

    def encode(self, texts: Sequence[str], *, truncate: bool = False) -> NDArray[np.float32]:
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") for text in texts]
        rows = np.stack([np.random.default_rng(seed).normal(size=SENTENCE) for seed in seeds])
        return normalise(rows)


class PaintedImages:
    """Features that depend on a photo's mean colours alone."""

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        self.classifier_weight = torch.from_numpy(draw.normal(0, 0.05, (CLASSES, 1280)).astype(np.float32))
        self.classifier_bias = torch.zeros(CLASSES)
        self._mix = torch.from_numpy(draw.normal(size=(12, FEATURES)).astype(np.float32))

    def describe(self, pixels: Tensor) -> Tensor:
        quarters = pixels.float().reshape(len(pixels), 2, 130, 2, 130, 3).mean((2, 4)).flatten(1) / 255
        return (quarters @ self._mix).abs()


@pytest.fixture(scope="module")
def few(data: Path) -> list[CaptionedPhoto]:
    folder = data / "flickr8k_train"
    return read_captions(folder / "captions.json", images=folder / "images")[:PHOTOS]


def quick(photos: Sequence[CaptionedPhoto], out: Path, *, seed: int = 0, epochs: int = 3) -> TrainReport:
    return train_heads(
        photos,
        image_tower=PaintedImages(),
        text_tower=HashedTexts(),
        out=out,
        epochs=epochs,
        seed=seed,
        validation_share=0.25,
    )


def test_a_handful_of_captioned_photos_lowers_the_loss(
    few: list[CaptionedPhoto], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexer.train.PROTOTYPES_PER_BATCH", 16)  # beside 24 photos, 448 would be all that counts
    tower = EfficientNetLite2.from_file(parts.locate(parts.IMAGE_TOWER))
    report = train_heads(
        few,
        image_tower=tower,
        text_tower=HashedTexts(),
        out=tmp_path / "heads.safetensors",
        epochs=30,
        validation_share=0,
    )
    assert report.losses[-1] < report.losses[0] - 0.5
    assert (report.photos, report.captions, report.epochs) == (PHOTOS, 5 * PHOTOS, 30)
    assert report.text_to_image is None
    assert MiniHeads.load(tmp_path / "heads.safetensors").logit_scale > 0


def test_one_seed_gives_one_result_and_another_seed_another(few: list[CaptionedPhoto], tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = quick(few, tmp_path / "first.safetensors")
    torch.manual_seed(2)
    again = quick(few, tmp_path / "again.safetensors")
    other = quick(few, tmp_path / "other.safetensors", seed=1)
    assert first.losses == again.losses != other.losses
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_a_training_leaves_torch_s_global_generator_as_it_was(few: list[CaptionedPhoto], tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    quick(few[:4], tmp_path / "heads.safetensors", epochs=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_the_report_counts_what_was_held_out(few: list[CaptionedPhoto], tmp_path: Path) -> None:
    report = quick(few, tmp_path / "heads.safetensors")
    assert (report.photos, report.validation_photos) == (18, 6)
    assert len(report.losses) == len(report.validation_losses) == 3
    assert report.text_to_image is not None
    assert report.text_to_image.recall[10] == 1  # of six photos
    assert report.as_dict()["image_to_text"]["recall@1"] <= 1


def test_bad_photos_are_skipped_with_their_reason(few: list[CaptionedPhoto], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    photos = [*few[:6], CaptionedPhoto(path=broken, captions=("a dog",)), *few[6:12]]
    report = quick(photos, tmp_path / "heads.safetensors", epochs=1)
    assert [path for path, _ in report.failed] == [broken]
    assert "not a picture" in report.failed[0][1]
    assert report.photos + report.validation_photos == 12


def test_too_few_photos_are_refused_and_nothing_is_written(few: list[CaptionedPhoto], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least two"):
        quick(few[:1], tmp_path / "heads.safetensors")
    with pytest.raises(UsageError, match="at least 1"):
        quick(few, tmp_path / "heads.safetensors", epochs=0)
    assert not list(tmp_path.iterdir())


def test_progress_counts_photos_and_then_epochs(few: list[CaptionedPhoto], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    train_heads(
        few,
        image_tower=PaintedImages(),
        text_tower=HashedTexts(),
        out=tmp_path / "heads.safetensors",
        epochs=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(PHOTOS, PHOTOS + 2), (PHOTOS + 1, PHOTOS + 2), (PHOTOS + 2, PHOTOS + 2)]


def test_prototypes_are_of_different_classes_and_within_what_photos_show() -> None:
    tower, draw = PaintedImages(), np.random.default_rng(0)
    features = torch.from_numpy(np.abs(draw.normal(size=(50, FEATURES))).astype(np.float32))
    texts = class_texts(HashedTexts().encode)
    generator = torch.Generator().manual_seed(0)
    prototypes = Prototypes(tower.classifier_weight, tower.classifier_bias, features, texts, generator)
    simulated, sentences = prototypes.draw(200)
    assert simulated.shape == (200, FEATURES)
    assert sentences.shape == (200, SENTENCE)
    assert len(torch.unique(sentences, dim=0)) == 200
    pooled = simulated[:, : FEATURES - CLASSES]
    assert (pooled >= features[:, : FEATURES - CLASSES].amin(0)).all()
    assert (pooled <= features[:, : FEATURES - CLASSES].amax(0)).all()
