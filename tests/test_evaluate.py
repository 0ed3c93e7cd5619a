"""Recall and ranks against a naive count, the two captions formats, and photos that are missing."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import Cli
from fakes import FakeEncoder
from hypothesis import given, settings
from hypothesis import strategies as st

from indexer.pipeline import build
from searchengine.captions import CaptionedPhoto, read_captions
from searchengine.cli.evaluation_page import render_evaluation
from searchengine.errors import ModelMismatch, UsageError
from searchengine.evaluate import evaluate, image_to_text, text_to_image
from searchengine.index.reader import Index
from searchengine.metrics import average_precision, ranks_of_images, retrieval
from searchengine.models import registry

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
    monkeypatch.setattr("searchengine.metrics.ROWS_PER_BLOCK", 7)
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


def entries_of(tmp_path: Path, entries: list[tuple[str, list[str]]]) -> list[CaptionedPhoto]:
    return read_captions(
        written(tmp_path, [{"file": name, "captions": captions} for name, captions in entries]), images=tmp_path
    )


def test_a_photo_that_is_listed_twice_or_copied_counts_once(tmp_path: Path, paint: Paint, encoder: FakeEncoder) -> None:
    for number in range(3):
        paint(f"{number}.png", number)
    shutil.copyfile(tmp_path / "1.png", tmp_path / "copy.png")
    once = [("0.png", ["a", "b"]), ("1.png", ["c", "d", "e"]), ("2.png", ["f"])]
    more = [*once[:2], ("./0.png", ["a", "b"]), ("copy.png", ["e", "c"]), once[2], ("2.png", ["f"])]
    plain, doubled = (evaluate(entries_of(tmp_path, entries), encoder=encoder) for entries in (once, more))
    assert (plain.duplicates, doubled.duplicates) == (0, 3)
    assert replace(doubled, duplicates=0) == plain
    assert (doubled.images, doubled.captions) == (3, 6)


def test_captions_of_a_copy_are_added_to_those_of_its_photo(tmp_path: Path, paint: Paint, encoder: FakeEncoder) -> None:
    paint("0.png", 0)
    shutil.copyfile(tmp_path / "0.png", tmp_path / "copy.png")
    result = evaluate(entries_of(tmp_path, [("0.png", ["a"]), ("copy.png", ["b", "b"])]), encoder=encoder)
    assert (result.images, result.captions, result.text_to_image.recall[1]) == (1, 3, 1.0)


@given(
    wrong=st.lists(st.integers(0, 5), max_size=6),
    right=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    seed=st.integers(0, 9),
)
def test_average_precision_is_the_mean_precision_at_each_right_photo_equals_counted_as_late(
    wrong: list[int], right: list[int], seed: int
) -> None:
    precisions = []
    for place, score in enumerate(sorted(right, reverse=True), start=1):
        precisions.append(place / (place + sum(other >= score for other in wrong)))
    order = np.random.default_rng(seed).permutation(len(wrong) + len(right))
    scores, shown = np.float32(wrong + right)[order], np.array([False] * len(wrong) + [True] * len(right))[order]
    assert average_precision(scores, shown) == pytest.approx(np.mean(precisions))


def test_intervals_hold_their_figures_are_narrower_for_more_photos_and_the_same_each_time() -> None:
    widths = []
    for photos in (20, 2000):
        ranks = np.random.default_rng(0).integers(1, 20, 5 * photos).astype(np.float64)
        owner = np.repeat(np.arange(photos), 5)
        found = retrieval(ranks, owner=owner)
        assert found == retrieval(ranks, owner=owner)
        figures = found.as_dict()
        for name, (low, high) in found.intervals.items():
            assert low <= figures[name] <= high  # type: ignore[operator]
        assert set(found.intervals) == {"recall@1", "recall@5", "recall@10", "median_rank"}
        widths.append(found.intervals["recall@5"][1] - found.intervals["recall@5"][0])
    assert widths[1] < 0.25 * widths[0]


def test_captions_of_one_photo_are_drawn_together() -> None:
    """Five captions that always agree tell no more than one, and the interval must say so."""
    one = np.random.default_rng(1).integers(1, 20, 100).astype(np.float64)
    five, owner = np.repeat(one, 5), np.repeat(np.arange(100), 5)
    alone, agreeing = retrieval(one, owner=np.arange(100)), retrieval(five, owner=owner)
    assert agreeing.intervals["recall@5"] == pytest.approx(alone.intervals["recall@5"], abs=1e-9)


def test_the_worst_failures_are_one_caption_a_photo_with_what_came_first_instead(
    tmp_path: Path, paint: Paint, encoder: FakeEncoder
) -> None:
    for number in range(12):
        paint(f"{number}.png", number)
    entries = [(f"{number}.png", [f"text {number} {place}" for place in range(3)]) for number in range(12)]
    photos = entries_of(tmp_path, entries)
    result = evaluate(photos, encoder=encoder)
    images = encoder.encode_images([photo.path for photo in photos])
    texts = encoder.encode_texts([caption for photo in photos for caption in photo.captions])
    ranks = ranks_of_images(texts, images, np.repeat(np.arange(12), 3)).reshape(12, 3)
    assert [failure.rank for failure in result.worst] == sorted(ranks.max(axis=1)[ranks.max(axis=1) > 1], reverse=True)
    for failure in result.worst:
        scores = images @ encoder.encode_texts([failure.caption])[0]
        order = [photos[place].path for place in np.argsort(-scores, kind="stable")]
        assert order.index(failure.path) == failure.rank - 1
        assert [path for path, _ in failure.first] == [path for path in order[:5] if path != failure.path][:4]


def concepts_of(tmp_path: Path, paint: Paint) -> list[CaptionedPhoto]:
    """Twelve photos of dogs, twelve of cats, each said by both captions."""
    entries = []
    for number in range(24):
        paint(f"{number}.png", number)
        thing = "dog" if number % 2 else "cat"
        entries.append((f"{number}.png", [f"a {thing} sleeps", f"one {thing} runs"]))
    return entries_of(tmp_path, entries)


def test_what_captions_say_is_asked_for_by_name(tmp_path: Path, paint: Paint, encoder: FakeEncoder) -> None:
    photos = concepts_of(tmp_path, paint)
    result = evaluate(photos, encoder=encoder)
    assert result.concepts is not None
    found = {concept.name: concept for concept in result.concepts.of_each}
    assert {"dog", "cat"} <= set(found)
    images = encoder.encode_images([photo.path for photo in photos])
    scores = images @ encoder.encode_texts(["dog"])[0]
    shown = np.arange(24) % 2 == 1
    assert found["dog"].photos == 12
    assert found["dog"].average_precision == pytest.approx(average_precision(scores, shown))
    assert result.concepts.map == pytest.approx(np.mean([one.average_precision for one in result.concepts.of_each]))
    written_out = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert (written_out["concepts"], written_out["map"]) == (len(found), result.concepts.map)
    assert {"precision", "recall", "f1", "oracle_f1", "false_alarms"} <= set(written_out["cutoff"])
    assert set(written_out["intervals"]["concepts"]) == {"map", *written_out["cutoff"]}
    assert set(written_out["intervals"]["text_to_image"]) == set(written_out["text_to_image"])


def test_without_concepts_there_is_nothing_to_ask_by_name(tmp_path: Path, paint: Paint, encoder: FakeEncoder) -> None:
    paint("0.png", 0)
    result = evaluate(entries_of(tmp_path, [("0.png", ["a b"])]), encoder=encoder)
    assert result.concepts is None
    figures = result.as_dict()
    assert (figures["concepts"], figures["map"], figures["cutoff"]) == (0, None, None)
    assert "share too few words" in render_evaluation(result, title="x")


def test_the_report_is_one_page_with_the_pictures_inside_and_everything_escaped(
    tmp_path: Path, paint: Paint, encoder: FakeEncoder
) -> None:
    photos = concepts_of(tmp_path, paint)
    nasty = '<script>alert(1)</script> & "x"'
    paint("<b>.png", 99)
    photos.append(CaptionedPhoto(path=tmp_path / "<b>.png", captions=(nasty,)))
    result = evaluate(photos, encoder=encoder)
    (tmp_path / "1.png").unlink()
    page = render_evaluation(replace(result, worst=result.worst[:30]), title=f"of {nasty}")
    assert "<script" not in page
    assert "<b>" not in page
    assert 'src="http' not in page
    assert "default-src 'none'" in page
    assert page.count('src="data:image/jpeg;base64,') > len(result.worst)
    assert page.count("its photo, first here, came at rank") == len(result.worst)
    assert "not readable now" in page
    for failure in result.worst:
        assert html.escape(failure.caption) in page


@pytest.mark.usefixtures("own_home")
def test_the_command_writes_the_report_and_the_figures(
    cli: Cli, tmp_path: Path, paint: Paint, encoder: FakeEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "load_encoder", lambda *_, **__: encoder)
    concepts_of(tmp_path, paint)
    arguments = ["evaluate", tmp_path / "captions.json", "--images", tmp_path, "--model", "mini"]
    done = cli(*arguments, "--report", tmp_path / "report.html", "--json")
    (line,) = done.lines
    assert {"text_to_image", "image_to_text", "images", "captions", "model"} <= set(line)
    assert {"recall@1", "recall@5", "recall@10", "median_rank"} <= set(line["image_to_text"])
    assert (tmp_path / "report.html").read_text("utf-8").startswith("<!doctype html>")
    assert "asked for by name" in cli(*arguments).out
    assert cli(*arguments, "--report", tmp_path / "0.png").code == 2
    assert (tmp_path / "0.png").stat().st_size > 0
    monkeypatch.setenv("SEARCHENGINE_MAX_PIXELS", "1")
    for report in ("report.html", "new.html"):
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
        refused = cli(*arguments, "--report", tmp_path / report)
        assert (refused.code, refused.out) == (2, "")
        assert "max_pixels" in refused.err
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
