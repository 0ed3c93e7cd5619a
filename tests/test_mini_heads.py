"""The trained heads: unit rows on both sides, the shipped file, and refusal of anything that is not heads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from searchengine.errors import UsageError, WeightsError
from searchengine.models.mini import parts
from searchengine.models.mini.heads import (
    CLASSES,
    DIM,
    FEATURES,
    POOLED,
    SENTENCE,
    MiniHeads,
    likeliest,
    save_heads,
    unit,
)
from searchengine.resources import resource

Tensors = dict[str, NDArray[np.float32]]


def tiny_tensors(seed: int = 0) -> Tensors:
    draw = np.random.default_rng(seed)
    networks, hidden, outputs = 2, 3, 4
    shapes: dict[str, tuple[int, ...]] = {
        "image.mean": (POOLED,),
        "image.deviation": (POOLED,),
        "labels": (CLASSES, DIM - networks * outputs),
        "projection": (SENTENCE, DIM - networks * outputs),
    }
    for side, inputs in (("image", POOLED), ("text", SENTENCE)):
        shapes |= {
            f"{side}.linear.weight": (networks * outputs, inputs),
            f"{side}.linear.bias": (networks * outputs,),
            f"{side}.hidden.weight": (networks * hidden, inputs),
            f"{side}.hidden.bias": (networks * hidden,),
            f"{side}.out.weight": (networks, hidden, outputs),
            f"{side}.gate.bias": (1,),
        }
    shapes["text.gate.weight"] = (SENTENCE,)
    tensors = {name: draw.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    tensors["image.deviation"] = np.abs(tensors["image.deviation"]) + np.float32(0.1)
    return tensors


@pytest.fixture(scope="module")
def shipped() -> MiniHeads:
    return MiniHeads.load(parts.SHIPPED_HEADS)


@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]), rows=st.integers(0, 5))
@settings(max_examples=40)
def test_rows_of_both_sides_have_length_one_whatever_the_towers_say(
    shipped: MiniHeads, seed: int, scale: float, rows: int
) -> None:
    draw = np.random.default_rng(seed)
    features = (scale * draw.normal(size=(rows, FEATURES))).astype(np.float32)
    sentences = unit(draw.normal(size=(rows, SENTENCE)).astype(np.float32))
    for vectors in (shipped.image(features), shipped.text(sentences)):
        assert vectors.shape == (rows, DIM)
        assert vectors.dtype == np.float32
        assert vectors.flags.c_contiguous
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4)


def test_a_row_does_not_depend_on_its_batch(shipped: MiniHeads) -> None:
    features = np.random.default_rng(0).normal(size=(6, FEATURES)).astype(np.float32)
    alone = np.concatenate([shipped.image(features[i : i + 1]) for i in range(6)])
    np.testing.assert_allclose(shipped.image(features), alone, atol=1e-5)


def test_the_shipped_heads_have_a_sensible_temperature(shipped: MiniHeads) -> None:
    assert 10 < shipped.logit_scale <= 100


def test_only_the_ten_likeliest_classes_count() -> None:
    logits = np.random.default_rng(0).normal(size=(4, CLASSES)).astype(np.float32)
    probabilities = likeliest(logits)
    assert ((probabilities > 0).sum(axis=1) == 10).all()
    assert (probabilities.argmax(axis=1) == logits.argmax(axis=1)).all()


def test_saved_heads_load_the_same(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    save_heads(tmp_path / "heads.safetensors", tensors, logit_scale=20.5, counts={"photos": 3})
    loaded = MiniHeads.load(tmp_path / "heads.safetensors")
    assert loaded.logit_scale == 20.5
    np.testing.assert_array_equal(loaded.labels, tensors["labels"].astype(np.float16).astype(np.float32))
    assert [path.name for path in tmp_path.iterdir()] == ["heads.safetensors"]


def drop_tensor(tensors: Tensors) -> None:
    del tensors["labels"]


def cut_tensor(tensors: Tensors) -> None:
    tensors["image.mean"] = tensors["image.mean"][:-1]


def poison_tensor(tensors: Tensors) -> None:
    tensors["text.linear.bias"][0] = np.nan


def overflow_tensor(tensors: Tensors) -> None:
    tensors["text.linear.bias"][0] = np.finfo(np.float32).max


def flatten_deviation(tensors: Tensors) -> None:
    tensors["image.deviation"][0] = 0


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (drop_tensor, "no tensor labels"),
        (cut_tensor, "image.mean of shape"),
        (poison_tensor, "not finite"),
        (overflow_tensor, "not finite"),
        (flatten_deviation, "deviations"),
    ],
)
def test_tensors_that_are_not_heads_are_never_written(
    tmp_path: Path, damage: Callable[[Tensors], None], finding: str
) -> None:
    tensors = tiny_tensors()
    damage(tensors)
    with pytest.raises(WeightsError, match=finding):
        save_heads(tmp_path / "heads.safetensors", tensors, logit_scale=20.0, counts={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 7, 100, 5000])
def test_a_truncated_file_is_refused_with_a_remedy(tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(parts.SHIPPED_HEADS.read_bytes()[:size])
    with pytest.raises(WeightsError, match="searchengine train"):
        MiniHeads.load(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be read"):
        MiniHeads.load(tmp_path / "absent.safetensors")


def test_another_models_safetensors_are_refused() -> None:
    with pytest.raises(WeightsError, match="does not hold projection heads"):
        MiniHeads.load(parts.locate(parts.TEXT_TOWER))


def test_wrong_inputs_are_named(shipped: MiniHeads) -> None:
    with pytest.raises(UsageError, match=r"expected \(n, 384\)"):
        shipped.text(np.zeros((2, 5), np.float32))
    with pytest.raises(UsageError, match="not finite"):
        shipped.image(np.full((1, FEATURES), np.nan, np.float32))


def test_a_text_needs_no_torch() -> None:
    code = "import sys, searchengine.models.mini.heads; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_the_class_names_are_a_thousand_and_distinct() -> None:
    names = [line.split(",")[0] for line in resource("labels/imagenet.txt").read_text("utf-8").splitlines()]
    assert len(names) == len(set(names)) == CLASSES
    assert (names[1], names[402], names[963]) == ("goldfish", "acoustic guitar", "pizza")
