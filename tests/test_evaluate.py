"""Recall and ranks against a naive count, the two captions formats, and photos that are missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeEncoder
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.pipeline import build
from searchengine.captions import read_captions
from searchengine.errors import ModelMismatch, UsageError
from searchengine.evaluate import evaluate, image_to_text, text_to_image
from searchengine.index.reader import Index

Paint = Callable[..., Path]


def naive_rank(scores: list[float], own: set[int]) -> float:
    """Mean rank, over all orders of equal scores, of the first right answer."""
    best = max(scores[i] for i in own)
    better = sum(score > best for score in scores)
    right = sum(scores[i] == best for i in own)
    equal = sum(score == best for score in scores)
    # Among n equal places, r of them right, the first right one comes at (n + 1) / (r + 1) on average.
    return better + (equal + 1) / (right + 1)


@given(
    captions=st.lists(st.integers(1, 4), min_size=1, max_size=12),
    levels=st.sampled_from([1, 2, 4, 50]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=100)
def test_recall_and_ranks_are_those_of_a_naive_count(captions: list[int], levels: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    owner = np.repeat(np.arange(len(captions)), captions)
    images = np.eye(len(captions), dtype=np.float32)
    texts = np.float32(random.integers(0, levels, (len(owner), len(captions))) / levels)  # the scores themselves
    to_image = [naive_rank(texts[i].tolist(), {int(owner[i])}) for i in range(len(owner))]
    to_text = [naive_rank(texts[:, j].tolist(), set(np.flatnonzero(owner == j).tolist())) for j in range(len(captions))]
    for found, ranks in (
        (text_to_image(texts, images, owner), to_image),
        (image_to_text(texts, images, owner), to_text),
    ):
        assert found.median_rank == pytest.approx(float(np.median(ranks)))
        for k in (1, 5, 10):
            assert found.recall[k] == pytest.approx(sum(rank <= k for rank in ranks) / len(ranks))


def test_a_model_that_gives_every_pair_the_same_score_is_no_better_than_chance() -> None:
    ones = np.ones((20, 1), np.float32)
    found = text_to_image(ones, ones, np.arange(20))
    assert (found.median_rank, found.recall[1], found.recall[10]) == (10.5, 0, 0)


def test_two_captions_of_one_photo_that_tie_do_not_harm_each_other() -> None:
    images = np.eye(2, dtype=np.float32)
    texts = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    found = image_to_text(texts, images, np.array([0, 0, 1]))
    assert (found.recall[1], found.median_rank) == (1, 1)


def test_many_texts_are_ranked_in_blocks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    texts, images = random.standard_normal((50, 4)), random.standard_normal((25, 4))
    owner = np.repeat(np.arange(25), 2)
    whole = text_to_image(texts, images, owner), image_to_text(texts, images, owner)
    monkeypatch.setattr("searchengine.evaluate.ROWS_PER_BLOCK", 7)
    assert (text_to_image(texts, images, owner), image_to_text(texts, images, owner)) == whole


def written(tmp_path: Path, content: Any) -> Path:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(content))
    return file


def test_both_formats_say_the_same(tmp_path: Path) -> None:
    wanted = {"a.png": ("one", "two"), "sub/b.png": ("three",)}
    plain = [{"file": name, "captions": list(texts)} for name, texts in wanted.items()]
    named = [{"file_name": name, "captions": list(texts), "licence": 3} for name, texts in wanted.items()]
    coco = {
        "info": {},
        "images": [
            {"id": 7, "file_name": "a.png"},
            {"id": 9, "file_name": "sub/b.png"},
            {"id": 1, "file_name": "c.png"},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "caption": "one"},
            {"id": 2, "image_id": 9, "caption": "three"},
            {"id": 3, "image_id": 7, "caption": "two"},
            {"id": 4, "image_id": 9, "caption": "  "},
        ],
    }
    for content in (plain, named, coco):
        photos = read_captions(written(tmp_path, content), images=tmp_path)
        assert {str(photo.path.relative_to(tmp_path)): photo.captions for photo in photos} == wanted


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        7,
        None,
        "text",
        [{"file": "a.png"}],
        [{"captions": ["x"]}],
        [{"file": "a.png", "captions": "a dog"}],
        [{"file": "a.png", "captions": [7]}],
        [{"file": 7, "captions": ["x"]}],
        [{"file": "a.png", "captions": [" "]}],
        ["a.png"],
        {"images": [{"id": 1}], "annotations": []},
        {"images": [{"id": [1], "file_name": "a.png"}], "annotations": []},
    ],
)
def test_an_unknown_layout_is_refused_by_name(tmp_path: Path, content: Any) -> None:
    with pytest.raises(UsageError, match="captions.json"):
        read_captions(written(tmp_path, content), images=tmp_path)


def test_a_file_or_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(UsageError, match="missing.json cannot be read"):
        read_captions(tmp_path / "missing.json", images=tmp_path)
    with pytest.raises(UsageError, match="no.json is not JSON"):
        read_captions(tmp_path / "no.json", images=tmp_path)
    with pytest.raises(UsageError, match="nowhere does not exist"):
        read_captions(written(tmp_path, []), images=tmp_path / "nowhere")


def test_missing_photos_are_listed_and_left_out(tmp_path: Path, paint: Paint, encoder: FakeEncoder) -> None:
    for number in range(3):
        paint(f"{number}.png", number)
    (tmp_path / "bad.png").write_text("no")
    entries = [{"file": f"{name}.png", "captions": ["x", f"y {name}"]} for name in ("0", "bad", "1", "missing", "2")]
    photos = read_captions(written(tmp_path, entries), images=tmp_path)
    seen: list[tuple[int, int]] = []
    result = evaluate(photos, encoder=encoder, batch_size=2, on_progress=lambda *done: seen.append(done))
    assert (result.images, result.captions, result.model) == (3, 6, "fake")
    assert [path.name for path, _ in result.failed] == ["bad.png", "missing.png"]
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert result.as_dict()["failed"] == 2
    assert set(result.as_dict()["text_to_image"]) == {"recall@1", "recall@5", "recall@10", "median_rank"}
    with pytest.raises(UsageError, match="none of the 2 photos can be read"):
        evaluate([photos[1], photos[3]], encoder=encoder)


def test_vectors_of_the_index_are_used_and_give_the_same_result(
    tmp_path: Path, paint: Paint, encoder: FakeEncoder
) -> None:
    for number in range(8):
        paint(f"{'photos' if number % 2 else 'more'}/{number}.png", number)
    build(tmp_path / "index", [tmp_path / "photos"], encoder=FakeEncoder())
    entries = [
        {"file": f"{'photos' if number % 2 else 'more'}/{number}.png", "captions": [f"text {number}"]}
        for number in range(8)
    ]
    photos = read_captions(written(tmp_path, entries), images=tmp_path)
    alone = evaluate(photos, encoder=encoder)
    encoder.batches.clear()
    with Index(tmp_path / "index") as index:
        assert evaluate(photos, encoder=encoder, index=index, batch_size=3) == alone
        assert sum(encoder.batches) == 4
        with pytest.raises(ModelMismatch):
            evaluate(photos, encoder=FakeEncoder(name="other"), index=index)
