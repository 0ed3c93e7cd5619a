"""CLIP's networks against transformers', OpenAI's and open_clip's, with the same random weights.

Features have a standard deviation of about 1, and may differ by 1e-5: twenty times what a float32 of that size can
resolve, after up to 24 layers that sum in another order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from clip_references import (
    Reference,
    our_checkpoint,
    our_image_features,
    our_numpy_text_features,
    our_text_features,
    random_weights,
    small_config,
    transformers_form,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from searchengine.models.clip.architecture import VIT_B_16, VIT_B_32, VIT_L_14, Activation, ClipConfig
from searchengine.models.clip.checkpoints import Checkpoint
from searchengine.models.clip.model import Prompts

TOLERANCE = 1e-5
Tokens = list[int]


def random_pixels(config: ClipConfig, count: int, seed: int = 0) -> Tensor:
    size = config.image_size
    return torch.randn(count, size, size, 3, generator=torch.Generator().manual_seed(seed))


def random_text(length: int, vocabulary: int, rng: random.Random) -> Tokens:
    """`length` tokens; the last is the greatest, which is where the references read."""
    return [*(rng.randrange(vocabulary - 1) for _ in range(length - 1)), vocabulary - 1]


def gap(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


# --- the published sizes


@dataclass
class Case:
    config: ClipConfig
    weights: dict[str, Tensor]
    pixels: Tensor
    texts: list[Tokens]
    image_features: Tensor
    text_features: Tensor
    numpy_text_features: Tensor


# Text lengths; there are as many images.
TRUE_SIZES = {"ViT-B/32": (VIT_B_32, (77, 9)), "ViT-B/16": (VIT_B_16, (13,)), "ViT-L/14": (VIT_L_14, (11,))}


@pytest.fixture(scope="module", params=TRUE_SIZES)
def true_size(request: pytest.FixtureRequest, folder: Path) -> Iterator[Case]:
    config, lengths = TRUE_SIZES[request.param]
    weights = random_weights(config)
    pixels = random_pixels(config, len(lengths))
    texts = [random_text(length, config.vocabulary, random.Random(length)) for length in lengths]
    checkpoint = our_checkpoint(weights, config.activation, folder)
    assert checkpoint.config == config
    yield Case(
        config,
        weights,
        pixels,
        texts,
        our_image_features(checkpoint, pixels),
        our_text_features(checkpoint, texts),
        our_numpy_text_features(checkpoint, texts),
    )
    weights.clear()  # 1.7 GB


@pytest.mark.parametrize("name", ["openai", "open_clip", "transformers"])
def test_features_at_the_published_sizes_are_the_references(true_size: Case, name: str) -> None:
    reference = Reference(name, true_size.config, true_size.weights)
    assert true_size.image_features.std().item() == pytest.approx(1, abs=0.2)
    assert true_size.text_features.std().item() == pytest.approx(1, abs=0.2)
    assert gap(true_size.image_features, reference.image_features(true_size.pixels)) < TOLERANCE
    expected = reference.text_features(true_size.texts)
    assert gap(true_size.text_features, expected) < TOLERANCE
    assert gap(true_size.numpy_text_features, expected) < TOLERANCE
    assert gap(true_size.numpy_text_features, true_size.text_features) < TOLERANCE


# --- small ones of any shape


@st.composite
def configs(draw: st.DrawFn) -> ClipConfig:
    activations: tuple[Activation, ...] = ("quick_gelu", "gelu")
    return small_config(
        image_width=64 * draw(st.integers(1, 3)),
        text_width=64 * draw(st.integers(1, 3)),
        image_layers=draw(st.integers(1, 3)),
        text_layers=draw(st.integers(1, 3)),
        patch_size=draw(st.integers(4, 16)),
        side=draw(st.integers(2, 4)),
        dim=draw(st.integers(1, 80)),
        vocabulary=draw(st.integers(4, 200)),
        activation=draw(st.sampled_from(activations)),
    )


def ragged_texts(vocabulary: int) -> st.SearchStrategy[list[Tokens]]:
    """Of 2 to 77 tokens, most of which begin alike. The last token is the greatest of its text."""
    middle = vocabulary // 2
    inside = st.lists(st.integers(0, middle - 1), min_size=1, max_size=38)
    parts = st.tuples(st.integers(0, 38), inside, st.integers(middle, vocabulary - 1))
    texts = st.tuples(inside, st.lists(parts, min_size=1, max_size=6))
    return texts.map(lambda drawn: [[*drawn[0][:shared], *rest, end] for shared, rest, end in drawn[1]])


@settings(max_examples=10)
@given(st.data())
def test_features_of_any_small_architecture_are_the_references(folder: Path, data: st.DataObject) -> None:
    config = data.draw(configs())
    texts = data.draw(ragged_texts(config.vocabulary))
    seed = data.draw(st.integers(0, 2**31))
    weights, pixels = random_weights(config, seed), random_pixels(config, data.draw(st.integers(1, 3)), seed)
    checkpoint = our_checkpoint(weights, config.activation, folder)
    image_features, text_features = our_image_features(checkpoint, pixels), our_text_features(checkpoint, texts)
    assert checkpoint.config == config
    assert gap(our_numpy_text_features(checkpoint, texts), text_features) < TOLERANCE
    for name in (
        ("openai", "open_clip", "transformers")
        if config.activation == "quick_gelu"
        else (
            "open_clip",
            "transformers",
        )
    ):
        reference = Reference(name, config, weights)
        assert gap(image_features, reference.image_features(pixels)) < TOLERANCE, name
        assert gap(text_features, reference.text_features(texts)) < TOLERANCE, name


@settings(max_examples=10)
@given(configs(), st.integers(0, 2**31))
def test_weights_by_either_publishers_names_give_the_same_features(folder: Path, config: ClipConfig, seed: int) -> None:
    weights = random_weights(config, seed)
    text = random_text(9, config.vocabulary, random.Random(seed))
    pixels = random_pixels(config, 1, seed)
    one = our_checkpoint(weights, config.activation, folder)
    other = our_checkpoint(transformers_form(weights), config.activation, folder)
    assert one.config == other.config
    assert torch.equal(our_image_features(one, pixels), our_image_features(other, pixels))
    for text_features in (our_text_features, our_numpy_text_features):
        assert torch.equal(text_features(one, [text]), text_features(other, [text]))
    assert one.logit_scale == other.logit_scale == pytest.approx(math.exp(weights["logit_scale"]))


@dataclass
class Small:
    config: ClipConfig
    weights: dict[str, Tensor]
    checkpoint: Checkpoint
    reference: Reference


@pytest.fixture(scope="module")
def small(folder: Path) -> Small:
    config = small_config(text_layers=3)
    weights = random_weights(config)
    checkpoint = our_checkpoint(weights, config.activation, folder)
    return Small(config, weights, checkpoint, Reference("openai", config, weights))


def test_texts_of_every_length_in_one_batch_have_the_references_features(small: Small) -> None:
    rng = random.Random(1)
    texts = [random_text(length, small.config.vocabulary, rng) for length in range(2, 78)]
    rng.shuffle(texts)
    assert gap(our_text_features(small.checkpoint, texts), small.reference.text_features(texts)) < TOLERANCE


@pytest.mark.parametrize(
    "texts",
    [
        [[7]],
        [[3, 7]],
        [[3, 7], [3, 7]],
        [[3, 7], [3, 7, 2, 9], [3, 7, 2, 9, 8, 5, 20]],
        [[3, 7, 2, 9, 8, 5, 20], [3, 7, 2, 9], [3, 7], [1, 2], [3, 7, 2, 9]],
        [[5, 5, 5, 5, 5, 6], [5, 5, 6], [5, 6]],
        [[*[4] * 76, 5], [*[4] * 75, 5], [4, 5]],
    ],
    ids=["one token", "one text", "twins", "each a beginning of the next", "mixed", "repetitions", "full length"],
)
def test_texts_that_share_rows_have_the_references_features(small: Small, texts: list[Tokens]) -> None:
    assert gap(our_text_features(small.checkpoint, texts), small.reference.text_features(texts)) < TOLERANCE


def test_a_batch_of_images_has_the_features_of_each(small: Small) -> None:
    pixels = random_pixels(small.config, 7)
    together = our_image_features(small.checkpoint, pixels)
    for number, image in enumerate(pixels):
        assert gap(together[number : number + 1], our_image_features(small.checkpoint, image[None])) < TOLERANCE


def test_nothing_is_blind_to_its_input(small: Small) -> None:
    """The features that are compared above depend on every colour, place and token."""
    pixels = random_pixels(small.config, 1)
    features = our_image_features(small.checkpoint, pixels)
    for change in (pixels.flip(1), pixels.flip(2), pixels.flip(3), pixels.transpose(1, 2).contiguous()):
        assert gap(features, our_image_features(small.checkpoint, change)) > 0.1
    text = [5, 17, 30, 99]
    features = our_text_features(small.checkpoint, [text])
    for other in ([17, 5, 30, 99], [5, 17, 17, 30, 99], [5, 17, 31, 99], [6, 17, 30, 99], [5, 17, 30, 98]):
        assert gap(features, our_text_features(small.checkpoint, [other])) > 0.1


def test_a_wrong_activation_shows_in_the_features(folder: Path) -> None:
    config = small_config()
    weights, pixels, text = random_weights(config), random_pixels(config, 2), [5, 17, 30, 99]
    right, wrong = (our_checkpoint(weights, name, folder) for name in ("quick_gelu", "gelu"))
    assert wrong.config == replace(right.config, activation="gelu")
    assert gap(our_image_features(right, pixels), our_image_features(wrong, pixels)) > 500 * TOLERANCE
    assert gap(our_text_features(right, [text]), our_text_features(wrong, [text])) > 500 * TOLERANCE


# --- Prompts.pack

FEW_TOKENS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=8)


@given(FEW_TOKENS)
def test_each_path_spells_its_text(texts: list[Tokens]) -> None:
    prompts = Prompts.pack(texts)
    for text, path, length in zip(texts, prompts.paths, prompts.lengths, strict=True):
        assert length == len(text)
        assert prompts.tokens[path[:length]].tolist() == text
        assert prompts.places[path[:length]].tolist() == list(range(len(text)))
        assert (path[length:] == path[length - 1]).all()


@given(FEW_TOKENS)
def test_there_is_one_row_for_each_distinct_beginning(texts: list[Tokens]) -> None:
    prompts = Prompts.pack(texts)
    beginnings = {tuple(text[:end]) for text in texts for end in range(1, len(text) + 1)}
    assert len(prompts.tokens) == len(prompts.places) == len(prompts.sources) == len(beginnings)
    spelled = {}  # row -> what stands on the way to it
    for text, path in zip(texts, prompts.paths.tolist(), strict=True):
        for end in range(1, len(text) + 1):
            assert spelled.setdefault(path[end - 1], text[:end]) == text[:end]
    assert set(spelled) == set(range(len(beginnings)))


@given(FEW_TOKENS)
def test_each_row_knows_where_it_first_comes(texts: list[Tokens]) -> None:
    prompts = Prompts.pack(texts)
    flat = prompts.paths.flatten().tolist()
    assert prompts.sources.tolist() == [flat.index(row) for row in range(len(prompts.tokens))]


@settings(max_examples=15)
@given(st.data())
def test_texts_have_the_same_features_together_in_any_order_and_alone(small: Small, data: st.DataObject) -> None:
    """Any tokens, with no end-of-text: a whole text may be the beginning of another."""
    token = st.integers(0, data.draw(st.sampled_from([1, 3, 99])))
    texts = data.draw(st.lists(st.lists(token, min_size=1, max_size=77), min_size=1, max_size=6))
    order = data.draw(st.permutations(range(len(texts))))
    together = our_text_features(small.checkpoint, texts)
    shuffled = our_text_features(small.checkpoint, [texts[number] for number in order])
    alone = torch.cat([our_text_features(small.checkpoint, [text]) for text in texts])
    assert gap(together[list(order)], shuffled) < TOLERANCE
    assert gap(together, alone) < TOLERANCE
