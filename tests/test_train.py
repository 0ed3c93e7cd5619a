"""Training of heads: it learns, it repeats itself, it survives bad photos, and it writes all or nothing."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_references import random_weights, small_config, transformers_form
from commandline import Cli
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from indexer.prototypes import Prototypes, class_texts
from indexer.train import TrainReport, train_heads
from indexer.train_clip import ClipLearner
from indexer.train_mini import MiniLearner
from searchengine import load_encoder
from searchengine.captions import CaptionedPhoto, read_captions
from searchengine.errors import UsageError, WeightsError
from searchengine.evaluate import evaluate
from searchengine.models import registry
from searchengine.models.clip.architecture import ClipConfig
from searchengine.models.clip.checkpoints import Checkpoint
from searchengine.models.clip.configuration import FORMAT
from searchengine.models.clip.encoder import ClipEncoder
from searchengine.models.mini import parts
from searchengine.models.mini.efficientnet import EfficientNetLite2
from searchengine.models.mini.heads import CLASSES, FEATURES, SENTENCE, MiniHeads
from searchengine.vectors import normalise

PHOTOS = 24
SHIPPED = MiniHeads.load(parts.SHIPPED_HEADS)


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


def painted_mini() -> MiniLearner:
    return MiniLearner(PaintedImages(), HashedTexts(), heads=SHIPPED, name="mini")


def quick(photos: Sequence[CaptionedPhoto], out: Path, *, seed: int = 0, epochs: int = 3) -> TrainReport:
    return train_heads(
        photos,
        learner=painted_mini(),
        out=out,
        epochs=epochs,
        seed=seed,
        validation_share=0.25,
    )


def test_a_handful_of_captioned_photos_lowers_the_loss(
    few: list[CaptionedPhoto], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("indexer.projection.PROTOTYPES_PER_BATCH", 16)  # beside 24 photos, 448 would be all that counts
    tower = EfficientNetLite2.from_file(parts.locate(parts.IMAGE_TOWER))
    report = train_heads(
        few,
        learner=MiniLearner(tower, HashedTexts(), heads=SHIPPED, name="mini"),
        out=tmp_path / "heads.safetensors",
        epochs=30,
        validation_share=0,
    )
    assert report.losses[-1] < report.losses[0] - 0.5
    assert (report.photos, report.captions, report.epochs) == (PHOTOS, 5 * PHOTOS, 30)
    assert report.after is None
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
    assert report.before is not None
    assert report.after is not None
    assert report.after.text_to_image.recall[10] == 1  # of six photos
    told = report.as_dict()
    assert told["image_to_text"]["recall@1"] <= 1
    assert told["before"]["text_to_image"].keys() == told["text_to_image"].keys()
    assert report.best_epoch == report.epochs == 3, "the heads of mini are those of the last epoch"


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
        learner=painted_mini(),
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


# -- CLIP

COLOURS = {
    "red": (200, 30, 30), "green": (30, 160, 40), "blue": (30, 50, 200), "white": (240, 240, 240),
    "yellow": (230, 220, 40), "purple": (130, 30, 160), "orange": (240, 140, 20), "grey": (120, 120, 120),
}  # fmt: skip
PLACES = {"left": (24, 0), "right": (24, 48), "top": (0, 24), "bottom": (48, 24), "middle": (24, 24), "corner": (0, 0)}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[CaptionedPhoto]:
    """Flags in each colour, with a black square in each place."""
    folder = tmp_path_factory.mktemp("flags")
    captions = "a {} flag with a square at its {}", "{}, {}"
    photos = []
    for (colour, rgb), (place, (y, x)) in itertools.product(COLOURS.items(), PLACES.items()):
        pixels = np.full((64, 64, 3), rgb, np.uint8)
        pixels[y : y + 16, x : x + 16] = 0
        file = folder / f"{colour}-{place}.png"
        Image.fromarray(pixels).save(file)
        photos.append(CaptionedPhoto(path=file, captions=tuple(caption.format(colour, place) for caption in captions)))
    return photos


@pytest.fixture(scope="module")
def random_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP that nobody has trained: its features tell photos apart, and photos from texts not at all."""
    file = tmp_path_factory.mktemp("clip") / "tiny-quickgelu.safetensors"
    save_file(random_weights(tiny_config()), file)
    return file


def tiny_config() -> ClipConfig:
    return small_config(vocabulary=49408, patch_size=16, side=4, image_layers=1, text_layers=1)


def learner(file: Path, *, precision: str = "fp32", learning_rate: float = 0.01) -> ClipLearner:
    encoder = load_encoder(str(file), precision=precision)
    assert isinstance(encoder, ClipEncoder)
    made = ClipLearner(encoder)
    made.learning_rate = learning_rate  # from nothing, there is a longer way to go than from a CLIP that was trained
    return made


@pytest.fixture(scope="module")
def trained(flags: list[CaptionedPhoto], random_clip: Path) -> tuple[Path, TrainReport]:
    before = random_clip.read_bytes()
    out = random_clip.parent / "flags.safetensors"
    report = train_heads(flags, learner=learner(random_clip), out=out, epochs=500, validation_share=0.25)
    assert random_clip.read_bytes() == before
    return out, report


def test_a_clip_learns_to_find_photos_that_it_has_not_seen(trained: tuple[Path, TrainReport]) -> None:
    _, report = trained
    assert (report.photos, report.validation_photos) == (36, 12)
    assert report.before is not None
    assert report.after is not None
    for before, after in (
        (report.before.text_to_image, report.after.text_to_image),
        (report.before.image_to_text, report.after.image_to_text),
    ):
        assert before.recall[5] < 0.6, "chance is 5 in 12"
        assert after.recall[1] >= before.recall[1] + 0.2
        assert after.recall[5] >= 0.75
    assert report.losses[-1] < report.losses[0]
    assert min(report.validation_losses) == report.validation_losses[report.best_epoch - 1]


def test_the_trained_clip_is_a_checkpoint_like_any_other(
    trained: tuple[Path, TrainReport], random_clip: Path, flags: list[CaptionedPhoto], tmp_path: Path
) -> None:
    """It has a fingerprint of its own, finds what it learned in every precision, and is imported by its stem."""
    file, _ = trained
    base, encoder = load_encoder(str(random_clip)), load_encoder(str(file))
    assert encoder.fingerprint != base.fingerprint
    assert (encoder.dim, encoder.image_size) == (base.dim, base.image_size)
    assert encoder.logit_scale != base.logit_scale
    for precision in ("fp32", "bf16", "int8"):
        found = evaluate(flags, encoder=load_encoder(str(file), precision=precision))
        assert found.text_to_image.recall[5] > 0.6, precision
    assert evaluate(flags, encoder=base).text_to_image.recall[5] < 0.3
    info = registry.import_model(file, models_folder=tmp_path)
    assert (info.name, info.dim, info.downloaded) == ("flags", 32, True)
    imported = registry.load_encoder("flags", models_folder=tmp_path)
    assert imported.fingerprint == encoder.fingerprint


def test_few_texts_are_encoded_without_torch_by_a_trained_clip_too(trained: tuple[Path, TrainReport]) -> None:
    encoder = load_encoder(str(trained[0]))
    few = encoder.encode_texts(["red over blue"])  # by numpy
    many = encoder.encode_texts(["red over blue", *(f"photo {number}" for number in range(20))])
    np.testing.assert_allclose(few[0], many[0], atol=1e-5)


def test_one_seed_gives_one_clip(flags: list[CaptionedPhoto], random_clip: Path, tmp_path: Path) -> None:
    for name in ("first", "again"):
        train_heads(flags, learner=learner(random_clip), out=tmp_path / name, epochs=2)
    train_heads(flags, learner=learner(random_clip), out=tmp_path / "other", epochs=2, seed=1)
    first, again, other = ((tmp_path / name).read_bytes() for name in ("first", "again", "other"))
    assert first == again != other


def test_a_training_that_does_no_good_keeps_what_was_there(
    flags: list[CaptionedPhoto], trained: tuple[Path, TrainReport], tmp_path: Path
) -> None:
    out, made = tmp_path / "same.safetensors", learner(trained[0], learning_rate=50)
    report = train_heads(flags, learner=made, out=out, epochs=30, validation_share=0.25)
    assert report.best_epoch == 0
    assert report.epochs == 10, "a third of the epochs without one that was better"
    assert report.before is not None
    assert report.after is not None
    assert report.before.as_dict() == report.after.as_dict()
    base, same = (load_encoder(str(file)) for file in (trained[0], out))
    np.testing.assert_allclose(same.encode_texts(["a dog"]), base.encode_texts(["a dog"]), atol=1e-6)


@pytest.mark.parametrize("form", ["transformers", "torch"])
def test_each_publisher_s_form_can_be_trained_in_the_precision_that_is_asked_for(
    form: str, flags: list[CaptionedPhoto], tmp_path: Path
) -> None:
    """The configuration that lies beside the one, and the name of the other, are noted in what comes out."""
    (tmp_path / "from").mkdir()
    weights = random_weights(tiny_config())
    if form == "transformers":
        file = tmp_path / "from" / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in transformers_form(weights).items()}, file)
        sides = {"vision_config": {"hidden_act": "gelu", "num_attention_heads": 2, "hidden_size": 128}}
        sides["text_config"] = {"hidden_act": "gelu", "num_attention_heads": 1, "hidden_size": 64}
        (tmp_path / "from" / "config.json").write_text(json.dumps({"model_type": "clip", **sides}))
    else:
        file = tmp_path / "from" / "half-gelu.pt"
        torch.save({name: tensor.half() for name, tensor in weights.items()}, file)
    out = tmp_path / "out.safetensors"
    report = train_heads(flags, learner=learner(file, precision="int8"), out=out, epochs=20, validation_share=0.25)
    assert report.best_epoch > 0
    config = Checkpoint(out).config
    assert (config.activation, config.image.heads, config.text.heads) == ("gelu", 2, 1)
    assert load_encoder(str(out), precision="int8").encode_texts(["a dog"]).shape == (1, 32)


def test_nothing_is_written_over(flags: list[CaptionedPhoto], random_clip: Path, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "there").write_bytes(b"mine")
    (tmp_path / "photos.index").mkdir()
    for out in ("there", "photos.index", "nowhere/heads.safetensors"):
        with pytest.raises(UsageError, match="is there already|does not exist"):
            train_heads(flags, learner=learner(random_clip), out=tmp_path / out, epochs=1)
    assert (tmp_path / "there").read_bytes() == b"mine"
    outcome = cli("train", "captions.json", "--images", ".", "--out", tmp_path / "there")
    assert outcome.code == 2
    assert "nothing is written over" in outcome.err


def test_the_command_trains_a_clip_and_tells_before_and_after(
    flags: list[CaptionedPhoto], random_clip: Path, tmp_path: Path, cli: Cli, own_home: None
) -> None:
    captions = [{"file": photo.path.name, "captions": photo.captions} for photo in flags]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    arguments = ["train", tmp_path / "captions.json", "--images", flags[0].path.parent, "--model", random_clip]
    outcome = cli(*arguments, "--out", tmp_path / "a.safetensors", "--epochs", "3", "--json")
    assert outcome.code == 0, outcome.err
    (told,) = outcome.lines
    assert (told["photos"], told["validation_photos"], len(told["losses"])) == (43, 5, 3)
    assert told["before"]["text_to_image"].keys() == told["text_to_image"].keys()
    outcome = cli(*arguments, "--out", tmp_path / "b.safetensors", "--epochs", "3", "--precision", "bf16")
    assert outcome.code == 0, outcome.err
    assert "text to image on 5 photos held out: R@1 " in outcome.out
    refused = cli(*arguments[:4], "--model", "mini", "--precision", "bf16", "--out", tmp_path / "c.safetensors")
    assert (refused.code, "mini has no precision bf16" in refused.err) == (2, True)


@pytest.mark.parametrize(
    "note", ["no json", '{"version": 9, "activation": "gelu"}', '{"version": 1, "activation": "relu"}', "[]"]
)
def test_a_damaged_note_in_a_trained_clip_is_told(note: str, tmp_path: Path) -> None:
    save_file(random_weights(small_config()), tmp_path / "x.safetensors", metadata={FORMAT: note})
    with pytest.raises(WeightsError, match="what it notes of its weights cannot be understood"):
        Checkpoint(tmp_path / "x.safetensors")
