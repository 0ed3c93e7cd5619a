"""Tables of docs/quality.md about whole libraries: zero-shot classes and tags, a change of model."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import numpy as np
from quality_data import Photos, cell, table

from indexer.reencode import reencode
from indexer.tags import TaggingRequest, write_tags
from indexer.train import train
from searchengine.captions import CaptionedPhoto
from searchengine.errors import ModelMismatch
from searchengine.filters import Filters
from searchengine.index.reader import Index
from searchengine.index.segments import Segment
from searchengine.index.table import VectorTable
from searchengine.models.registry import load_encoder
from searchengine.probe_fit import wilson
from searchengine.search import Searcher
from searchengine.vectors import Encoder, normalise
from searchengine.zeroshot import classify_stored, read_templates

MILLION, MANY_LABELS, TOP = 1_000_000, 1_000, 3
SEARCHES_AFTER = 100
THINGS = ("dog", "child", "ball", "bike", "snow", "water", "street")


def classification(encoder: Encoder) -> str:
    """A million vectors into a thousand classes: 100,000 different ones, ten times over."""
    random = np.random.default_rng(0)
    matrix = normalise(random.standard_normal((MILLION // 10, encoder.dim)))
    classes = normalise(random.standard_normal((MANY_LABELS, encoder.dim)))
    segments = [
        Segment(f"{number}.faiss", matrix, np.arange(len(matrix)) + number * len(matrix) + 1) for number in range(10)
    ]
    rows = []
    for count, labels in ((MILLION // 10, MANY_LABELS), (MILLION, 10), (MILLION, MANY_LABELS)):
        library = VectorTable(segments[: count * 10 // MILLION], dim=encoder.dim)
        started = time.perf_counter()
        seen = 0
        for ids, _ in classify_stored(
            library, library.living_rows, class_vectors=classes[:labels], logit_scale=encoder.logit_scale, top=TOP
        ):
            seen += len(ids)
        assert seen == count
        rows.append([f"{count:,}", f"{labels:,}", f"{time.perf_counter() - started:.1f} s"])
    return table(["vectors of 512", "labels", f"the {TOP} likeliest of each"], rows)


def tags(photos: Photos, encoder: Encoder, *, work: Path) -> str:
    """How often a tag is right, and how many photos get the one they should: by what several captions say."""
    index = work / "tags.index"
    shutil.copytree(photos.index, index, dirs_exist_ok=True)
    known = {concept.name: concept for concept in photos.concepts}
    labels = [*(name for name in THINGS if name in known), "something else"]
    place_of = {str(path.resolve()): place for place, path in enumerate(photos.paths)}
    rows = []
    for least in (0.3, 0.5, 0.7, 0.9):
        request = TaggingRequest(labels=labels, templates=read_templates("simple"), top=1, min_probability=least)
        write_tags(index, request, encoder=encoder)
        right = given = wanted = 0
        with Index(index) as opened:
            for name in labels[:-1]:
                tagged = np.zeros(len(photos.paths), np.bool_)
                found = opened.keys_of(opened.vector_ids(Filters(tag=name)))
                tagged[[place_of[path] for rows_of in found.values() for _, path in rows_of]] = True
                counted, shown = known[name].counted, known[name].shown
                right += int((tagged & shown).sum())
                given += int((tagged & counted).sum())
                wanted += int(shown.sum())
        precision, recall = (right / given, *wilson(right, given)), (right / wanted, *wilson(right, wanted))
        rows.append([f"{least:g}", f"{given:,}", cell(precision), cell(recall)])
    return table(["--min-probability", "tags", "right", "of what shows it, tagged"], rows)


def model_change(photos: Photos, encoder: Encoder, *, work: Path) -> str:
    """Searches go on while every photo is embedded anew by an encoder that was trained on their captions."""
    index, heads = work / "change.index", work / "heads.safetensors"
    shutil.copytree(photos.index, index)
    listed = [CaptionedPhoto(path=p, captions=c) for p, c in zip(photos.paths, photos.captions, strict=True)]
    train(listed, encoder=encoder, out=heads, epochs=2)
    changed = load_encoder(str(heads))
    before = _ids(index)
    counts = {"before": 0, "refused": 0, "after": 0}
    over = threading.Event()
    slowest = 0.0

    def search() -> None:
        nonlocal slowest
        used, opened = encoder, Index(index)
        while not over.is_set() or counts["after"] < SEARCHES_AFTER:
            started = time.perf_counter()
            try:
                assert Searcher(opened, used).search("a dog on a beach", k=5)
                counts["before" if used is encoder else "after"] += 1
            except ModelMismatch:
                counts["refused"] += 1
                opened.close()
                used, opened = changed, Index(index)
            slowest = max(slowest, time.perf_counter() - started)
        opened.close()

    searching = threading.Thread(target=search)
    searching.start()
    started = time.perf_counter()
    report = reencode(index, encoder=changed)
    seconds = time.perf_counter() - started
    over.set()
    searching.join()
    assert report.swapped
    assert _ids(index) == before
    row = [f"{len(photos.paths):,}", f"{seconds:.1f} s", f"{counts['before']:,}", f"{counts['refused']:,}"]
    row += [f"{counts['after']:,}", f"{1000 * slowest:.0f} ms"]
    heads_of = ["photos", "change", "searches answered by the old model", "told to open again"]
    return table([*heads_of, "answered by the new one", "slowest of all"], [row])


def _ids(index: Path) -> dict[str, tuple[int, int]]:
    with Index(index) as opened:
        keys = opened.keys_of(opened.snapshot().table.ids)
        return {path: (image, vector) for vector, rows in keys.items() for image, path in rows}
