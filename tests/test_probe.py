"""The linear probe: against scikit-learn, on labels that hold nothing, on few photos; its file; the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commandline import Cli
from fakes import FakeEncoder
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

import indexer
import searchengine
from searchengine.captions import read_captions
from searchengine.errors import ImageError, ModelMismatch, ModelNotFound, UsageError, WeightsError
from searchengine.filters import Filters
from searchengine.labels import LabelledPhoto, read_labels_csv
from searchengine.photo_vectors import PhotoVector, vectors_of
from searchengine.probe import Probe, classify_index, load_probe, save_probe
from searchengine.probe_fit import Examples, calibration_error, examples_of, fit, wilson
from searchengine.vectors import FloatMatrix, normalise

Paint = Callable[..., Path]
DIM = 16


@pytest.fixture(autouse=True)
def offline(own_home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHENGINE_OFFLINE", "1")


def drawn(counts: list[int], *, spread: float, seed: int = 0) -> Examples:
    """Photos around one random direction a class, as far from it as `spread` says."""
    rng = np.random.default_rng(seed)
    centres = normalise(np.random.default_rng(99).standard_normal((len(counts), DIM)))
    labels = np.repeat(np.arange(len(counts)), counts)
    noise = rng.standard_normal((len(labels), DIM)) / np.sqrt(DIM)
    classes = tuple(f"class {number}" for number in range(len(counts)))
    return Examples(vectors=normalise(centres[labels] + spread * noise), labels=labels, classes=classes, copies=0)


@pytest.fixture(scope="module")
def probe() -> Probe:
    return fit(drawn([30, 20, 10], spread=1.0), encoder=FakeEncoder(dim=DIM))


@pytest.fixture
def few_penalties(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice of C among four, which takes less time."""
    monkeypatch.setattr("searchengine.probe_fit.INVERSE_PENALTIES", (0.1, 1.0, 10.0, 100.0))


# -- fitting ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_penalties")
@pytest.mark.parametrize("counts", [[40, 25], [30, 20, 25]])
def test_probabilities_are_those_of_scikit_learn_after_the_temperature(counts: list[int]) -> None:
    examples = drawn(counts, spread=1.2)
    fitted = fit(examples, encoder=FakeEncoder(dim=DIM))
    theirs = LogisticRegression(C=fitted.report["C"], max_iter=1000).fit(examples.vectors, examples.labels)
    unseen = drawn([20] * len(counts), spread=1.5, seed=1).vectors
    powers = theirs.predict_proba(unseen) ** (1 / fitted.temperature)
    np.testing.assert_allclose(fitted.probabilities(unseen), powers / powers.sum(axis=1, keepdims=True), atol=1e-5)


@pytest.mark.usefixtures("few_penalties")
def test_accuracy_and_calibration_hold_on_photos_that_were_never_labelled() -> None:
    report = (fitted := fit(drawn([150, 100], spread=2.0), encoder=FakeEncoder(dim=DIM))).report
    new = drawn([3000, 2000], spread=2.0, seed=5)
    probabilities = fitted.probabilities(new.vectors)
    right = probabilities.argmax(axis=1) == new.labels
    assert report["accuracy_low"] <= right.mean() <= report["accuracy_high"]
    assert 0.7 < right.mean() < 0.95, "else there is nothing to calibrate"
    assert calibration_error(probabilities.max(axis=1), right) < 0.05
    assert report["classes"]["class 0"]["photos"] == 150
    assert report["most_frequent"] == 0.6


@pytest.mark.usefixtures("few_penalties")
@pytest.mark.parametrize("seed", range(2))
def test_labels_that_say_nothing_are_told_by_an_accuracy_of_chance(seed: int) -> None:
    examples = drawn([60, 60], spread=1.0, seed=seed)
    shuffled = np.random.default_rng(seed).permutation(examples.labels)
    report = fit(
        Examples(vectors=examples.vectors, labels=shuffled, classes=examples.classes, copies=0),
        encoder=FakeEncoder(dim=DIM),
    ).report
    assert report["accuracy_low"] <= 0.5
    assert report["last_doubling"]["low"] <= 0


@pytest.mark.usefixtures("few_penalties")
def test_the_learning_curve_tells_whether_more_labels_would_help() -> None:
    hard = fit(drawn([100, 100], spread=3.0), encoder=FakeEncoder(dim=DIM)).report
    easy = fit(drawn([100, 100], spread=0.3), encoder=FakeEncoder(dim=DIM)).report
    assert [point["photos"] for point in hard["learning_curve"]] == [2, 5, 10, 20, 40, 80, 160]
    assert hard["learning_curve"][-1]["accuracy"] == hard["accuracy"]
    assert hard["learning_curve"][0]["accuracy"] < hard["accuracy"] - 0.1
    assert easy["last_doubling"] == {"gain": 0.0, "low": 0.0, "high": 0.0}
    last = hard["last_doubling"]
    assert last["low"] <= last["gain"] <= last["high"]


@pytest.mark.usefixtures("few_penalties")
@pytest.mark.parametrize("shots", [3, 5])
def test_a_few_photos_a_class_are_enough_and_promise_no_certainty(shots: int) -> None:
    fitted = fit(drawn([shots] * 2, spread=0.5), encoder=FakeEncoder(dim=DIM))
    new = drawn([200] * 2, spread=0.5, seed=1)
    probabilities = fitted.probabilities(new.vectors)
    assert (probabilities.argmax(axis=1) == new.labels).mean() > 0.9
    assert fitted.report["accuracy_low"] < 0.9, "so few cannot prove more"
    assert probabilities.max(axis=1).mean() < 0.99


@pytest.mark.usefixtures("few_penalties")
def test_the_same_seed_gives_the_same_probe() -> None:
    examples = drawn([8, 8], spread=1.0)
    first, again, other = (fit(examples, encoder=FakeEncoder(dim=DIM), seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.weights, again.weights)
    assert first.report == again.report != other.report


def labelled(*photos: tuple[str, str, bytes]) -> list[tuple[LabelledPhoto, PhotoVector]]:
    rows = normalise(np.random.default_rng(0).standard_normal((256, DIM)))
    return [
        (LabelledPhoto(path=path, label=label, line=line), PhotoVector(content, rows[content[0]]))
        for line, (path, label, content) in enumerate(photos, start=2)
    ]


def test_copies_of_a_photo_count_as_one_so_that_none_is_on_both_sides() -> None:
    photos = [(f"{number}.jpg", "ab"[number % 2], bytes([number])) for number in range(20)]
    copies = [(f"copy-{name}", label, content) for name, label, content in photos for _ in range(4)]
    alone, together = examples_of(labelled(*photos)), examples_of(labelled(*photos, *copies))
    np.testing.assert_array_equal(together.vectors, alone.vectors)
    np.testing.assert_array_equal(together.labels, alone.labels)
    assert (alone.copies, together.copies) == (0, 80)


def test_examples_that_make_no_probe_are_refused_with_what_is_missing() -> None:
    with pytest.raises(UsageError, match=r"c\.jpg \(line 4, 'cat'\) is a copy of a\.jpg \(line 2, 'dog'\)"):
        examples_of(labelled(("a.jpg", "dog", b"1"), ("b.jpg", "dog", b"2"), ("c.jpg", "cat", b"1")))
    with pytest.raises(UsageError, match="at least two classes"):
        examples_of(labelled(("a.jpg", "dog", b"1"), ("b.jpg", "dog", b"2")))
    with pytest.raises(UsageError, match="no photo to learn from"):
        examples_of([])
    dogs = [(f"{number}.jpg", "dog", bytes([number])) for number in range(3)]
    cats = [("x.jpg", "cat", b"x"), ("y.jpg", "cat", b"y"), ("copy of y.jpg", "cat", b"y")]
    with pytest.raises(UsageError, match="'cat' has 2 different photos; label at least 3"):
        examples_of(labelled(*dogs, *cats))


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0), (950, 1000, 0.9347, 0.9618)],
)
def test_the_interval_is_wilsons(right: int, count: int, low: float, high: float) -> None:
    assert wilson(right, count) == pytest.approx((low, high), abs=1e-4)


def test_calibration_error_is_the_gap_between_what_is_promised_and_what_is_kept() -> None:
    half = np.array([True, False] * 50)
    assert calibration_error(np.full(100, 0.5), half) == pytest.approx(0)
    assert calibration_error(np.ones(100), half) == pytest.approx(0.5)
    assert calibration_error(np.array([0.9, 0.6]), np.array([True, True])) == pytest.approx(0.25)


# -- labels ----------------------------------------------------------------------------------------------------------


def test_labels_are_read_as_spreadsheets_write_them(tmp_path: Path) -> None:
    text = (
        '\ufeffLabel,notes, File \r\ndog,,a.jpg\r\n\r\n sea lion ,"two\r\nlines","b, c.jpg"\r\n'
        "dog,again,a.jpg\r\n,,\r\nd,,/x/y.jpg\r\n"
    )
    (tmp_path / "labels.csv").write_bytes(text.encode())
    photos = read_labels_csv(tmp_path / "labels.csv")
    assert [(photo.path, photo.label, photo.line) for photo in photos] == [
        (str(tmp_path / "a.jpg"), "dog", 2),
        (str(tmp_path / "b, c.jpg"), "sea lion", 4),
        ("/x/y.jpg", "d", 8),
    ]
    (tmp_path / "photos").mkdir()
    assert read_labels_csv(tmp_path / "labels.csv", images=tmp_path / "photos")[0].path == f"{tmp_path}/photos/a.jpg"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["line 1", "path,label"]),
        (b"a.jpg,dog\nb.jpg,cat\n", ["line 1", "path,label"]),
        (b"path;label\na.jpg;dog\n", ["line 1", "path;label"]),
        (b"path,file,label\n", ["line 1", "one column"]),
        (b"path,label\n", ["no photo"]),
        (b"path,label\na.jpg,dog\nb.jpg\n", ["line 3", "1 cells"]),
        (b'path,label\n"a\n.jpg",dog\nb.jpg,\n', ["line 4", "no label"]),
        (b"path,label\n,dog\n", ["line 2", "path is empty"]),
        (b"path,label\na.jpg,dog\nb.jpg,cat\na.jpg,cat\n", ["line 4", "'dog' in line 2"]),
        (b'path,label\na.jpg,dog\n"b.jpg,cat\nc.jpg,dog\n', ["line 3", "quotation"]),
        (b"path,label\na.jpg,dog\n\xff.jpg,cat\n", ["UTF-8", "line 3"]),
        (b"path,label\na\x00.jpg,dog\n", ["line 2"]),
    ],
)
def test_a_mistake_in_the_labels_is_told_with_its_line(tmp_path: Path, content: bytes, words: list[str]) -> None:
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_labels_csv(tmp_path / "labels.csv")
    for word in ["labels.csv", *words]:
        assert word in str(caught.value)


def test_labels_or_images_that_are_not_there_are_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none.csv cannot be read: No such file"):
        read_labels_csv(tmp_path / "none.csv")
    with pytest.raises(UsageError, match="--images"):
        read_labels_csv(tmp_path / "none.csv", images=tmp_path / "none")


# -- vectors ---------------------------------------------------------------------------------------------------------


def test_vectors_come_from_the_index_where_it_has_the_content(
    paint: Paint, tmp_path: Path, encoder: FakeEncoder
) -> None:
    photos = [paint(f"photos/{number}.png", number) for number in range(5)]
    indexer.build(tmp_path / "i", [tmp_path / "photos"], encoder=encoder)
    encoder.batches.clear()
    given = [*map(str, photos), str(paint("copy.png", 3)), str(tmp_path / "none.png"), str(paint("new.png", 9))]
    with searchengine.open_index(tmp_path / "i") as index:
        found = dict(vectors_of(given, encoder=encoder, index=index, batch_size=3))
        with pytest.raises(ModelMismatch, match="made by encoder fake, not by other"):
            list(vectors_of(given, encoder=FakeEncoder(name="other"), index=index))
    assert list(found) == given
    assert encoder.batches == [1]
    assert isinstance(found.pop(str(tmp_path / "none.png")), ImageError)
    for path, outcome in found.items():
        assert isinstance(outcome, PhotoVector)
        np.testing.assert_allclose(outcome.vector, encoder.encode_images([path])[0], atol=1e-6)


def test_the_whole_index_is_told_from_stored_vectors_copies_and_filters_included(
    paint: Paint, tmp_path: Path, encoder: FakeEncoder, probe: Probe
) -> None:
    for number in range(6):
        paint(f"photos/{number % 2}/{number}.png", number)
    paint("photos/0/copy.png", 1)
    paint("photos/gone.png", 7)
    indexer.build(tmp_path / "i", [tmp_path / "photos"], encoder=encoder)
    (tmp_path / "photos/gone.png").unlink()
    indexer.build(tmp_path / "i", [tmp_path / "photos"], encoder=encoder)
    with searchengine.open_index(tmp_path / "i") as index:
        found = {photo.key: row for photo, row in classify_index(probe, index)}
        under = Filters(under=str(tmp_path / "photos/0"))
        some = [photo.key for photo, _ in classify_index(probe, index, filters=under)]
    expected = sorted(str(file) for file in (tmp_path / "photos").rglob("*.png"))
    assert sorted(found) == expected
    assert sorted(some) == [path for path in expected if "/photos/0/" in path]
    for path, row in found.items():
        np.testing.assert_allclose(row, probe.probabilities(encoder.encode_images([path]))[0], atol=1e-6)
        assert row.sum() == pytest.approx(1)


# -- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(probe: Probe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "some.probe"
    save_probe(path, probe)
    return path


def test_a_saved_probe_says_the_same_to_the_bit(probe: Probe, saved: Path) -> None:
    again = load_probe(saved)
    vectors: FloatMatrix = drawn([5, 5, 5], spread=1.0, seed=3).vectors
    np.testing.assert_array_equal(again.probabilities(vectors), probe.probabilities(vectors))
    assert (again.classes, again.report) == (probe.classes, probe.report)
    assert (again.encoder, again.fingerprint) == ("fake", FakeEncoder(dim=DIM).fingerprint)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_file_that_lost_a_bit_or_its_end_is_refused(saved: Path, place: float, bit: int, cut: bool) -> None:
    content = bytearray(saved.read_bytes())
    at = int(place * len(content))
    content[at] ^= 1 << bit
    damaged = saved.with_name("damaged.probe")
    damaged.write_bytes(content[:at] if cut else content)
    with pytest.raises(WeightsError, match="searchengine probe fit"):
        load_probe(damaged)


def test_what_is_no_probe_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"weights": np.zeros((2, 3), np.float32)}, tmp_path / "other.safetensors")
    (tmp_path / "pickle").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    for name in ("other.safetensors", "pickle"):
        with pytest.raises(WeightsError, match=f"{name}.*probe fit"):
            load_probe(tmp_path / name)
    with pytest.raises(WeightsError):
        load_probe(tmp_path)
    with pytest.raises(ModelNotFound, match="does not exist"):
        load_probe(tmp_path / "none")


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"temperature": 1e-320}, "damaged"),
        ({"weights": np.full((3, DIM), 3e38, np.float32)}, "damaged"),
        ({"bias": np.full(3, np.nan, np.float32)}, "damaged"),
        ({"classes": ("a", "a", "b")}, "damaged"),
    ],
)
def test_what_fit_cannot_have_written_is_refused_whatever_its_checksum(
    tmp_path: Path, probe: Probe, change: dict[str, Any], remedy: str
) -> None:
    save_probe(tmp_path / "hostile.probe", replace(probe, **change))
    with pytest.raises(WeightsError, match=remedy):
        load_probe(tmp_path / "hostile.probe")


def test_a_version_that_is_no_number_writes_nothing_to_the_terminal(
    tmp_path: Path, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("searchengine.probe.VERSION", "\x1b[2J")
        save_probe(tmp_path / "hostile.probe", probe)
    with pytest.raises(WeightsError, match="of version") as caught:
        load_probe(tmp_path / "hostile.probe")
    assert str(caught.value).isprintable()


def test_an_existing_file_is_only_replaced_on_request(tmp_path: Path, probe: Probe) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"precious")
    with pytest.raises(UsageError, match="--overwrite"):
        save_probe(photo, probe)
    assert photo.read_bytes() == b"precious"
    save_probe(photo, probe, overwrite=True)
    assert load_probe(photo).classes == probe.classes
    for path, words in ((tmp_path, "exists already"), (tmp_path / "none" / "x", "cannot be written")):
        with pytest.raises(UsageError, match=words):
            save_probe(path, probe, overwrite=True)
    assert os.listdir(tmp_path) == ["photo.jpg"]


# -- the command, on real photos with mini ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dogs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[tuple[Path, str]]]:
    """A folder of photos that three captions say show a dog, and of such that none does; and their index."""
    folder = tmp_path_factory.mktemp("dogs")
    source = data / "flickr8k_dev"
    chosen: dict[str, list[Path]] = {"dog": [], "other": []}
    images = source if (source / json.loads((source / "captions.json").read_text())[0]["file"]).exists() else None
    for photo in read_captions(source / "captions.json", images=images or source / "images"):
        said = sum("dog" in caption.lower().split() for caption in photo.captions)
        if said in (0, 3, 4, 5):
            chosen["dog" if said else "other"].append(photo.path)
    photos = [(path, label) for label, paths in chosen.items() for path in paths[:12]]
    (folder / "photos").mkdir()
    for path, _ in photos:
        (folder / "photos" / path.name).write_bytes(path.read_bytes())
    indexer.build(folder / "i", [folder / "photos"], encoder=searchengine.load_encoder("mini", device="cpu"))
    return folder, folder / "i", photos


def write_labels(file: Path, photos: list[tuple[Path, str]]) -> Path:
    file.write_text("path,label\n" + "".join(f"{path.name},{label}\n" for path, label in photos), "utf-8")
    return file


def test_a_probe_of_five_photos_a_class_tells_dogs_and_needs_no_heavy_import(
    cli: Cli, dogs: tuple[Path, Path, list[tuple[Path, str]]], tmp_path: Path
) -> None:
    folder, index, photos = dogs
    labels = write_labels(tmp_path / "labels.csv", [(Path("gone.jpg"), "dog"), *photos[:5], *photos[12:17]])
    out = tmp_path / "dogs.probe"
    fitted = cli("probe", "fit", labels, "--images", folder / "photos", "--out", out, "--index", index, "--json")
    assert fitted.code == 0, fitted.err
    report = json.loads(fitted.out)
    assert set(report) >= {
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "classes",
        "calibration_error",
        "learning_curve",
    }
    assert list(report["classes"]) == ["dog", "other"]
    assert (report["photos"], report["failed"]) == (10, 1)
    assert "skipped line 2" in fitted.err

    code = f"""
import json, sys
sys.argv = ["searchengine", "probe", "apply", {str(out)!r}, "--index", {str(index)!r}, "--json"]
from searchengine.cli import main
try:
    main()
finally:
    print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}} & {{"sklearn", "scipy", "torch", "PIL"}})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *lines, loaded = done.stdout.splitlines()
    assert json.loads(loaded) == []
    stored = {os.path.basename(line["path"]): line["probabilities"] for line in map(json.loads, lines)}
    assert len(stored) == 24
    unseen = [*photos[5:12], *photos[17:]]
    assert (
        sum(max(stored[path.name], key=lambda name: stored[path.name][name]) == label for path, label in unseen) >= 12
    )

    chosen = [folder / "photos" / path.name for path, _ in photos[:3]]
    named = cli("probe", "apply", out, *chosen, tmp_path / "none.jpg", "--index", tmp_path / "none", "--json")
    assert named.code == 0
    assert "none.jpg" in named.err
    for line in named.lines:
        assert line["probabilities"] == pytest.approx(stored[os.path.basename(line["path"])], abs=1e-3)
    table = cli("probe", "apply", out, chosen[0], "--index", index, "--top", "1")
    assert table.out.splitlines()[1].split()[1:] == ["dog", str(chosen[0])]
    assert cli("probe", "apply", out, tmp_path / "none.jpg", "--index", index).code == 1


def test_fit_shows_its_report_and_replaces_no_file(
    cli: Cli, dogs: tuple[Path, Path, list[tuple[Path, str]]], tmp_path: Path
) -> None:
    folder, index, photos = dogs
    arguments = ["fit", write_labels(folder / "photos/labels.csv", photos), "--index", index, "--out"]
    out = tmp_path / "dogs.probe"
    shown = cli("probe", *arguments, out)
    for words in ("24 photos, 2 classes", "accuracy", "held out", "dog ", "fitted on", "doubling"):
        assert words in shown.out
    before = out.read_bytes()
    again = cli("probe", *arguments, out)
    assert (again.code, out.read_bytes()) == (2, before)
    assert "--overwrite" in again.err
    assert cli("probe", *arguments, out, "--overwrite", "--seed", "3").code == 0
    assert out.read_bytes() != before


def test_wrong_probes_are_refused_with_the_promised_exit_codes(
    cli: Cli, dogs: tuple[Path, Path, list[tuple[Path, str]]], tmp_path: Path, probe: Probe, saved: Path
) -> None:
    folder, index, photos = dogs
    photo = folder / "photos" / photos[0][0].name
    (tmp_path / "damaged").write_bytes(saved.read_bytes()[:-1])
    with searchengine.open_index(index) as opened:
        mini = opened.identity
    save_probe(tmp_path / "narrow", replace(probe, encoder=mini.encoder, fingerprint=mini.fingerprint))
    for arguments, code, words in (
        ([saved, "--index", index], 4, "encoder fake"),
        ([saved, photo], 4, "fake"),
        ([tmp_path / "damaged", photo], 4, "searchengine probe fit"),
        ([tmp_path / "narrow", "--index", index], 4, f"vectors of {DIM} dimensions"),
        ([tmp_path / "narrow", photo], 4, "searchengine probe fit"),
        ([tmp_path / "none", photo], 4, "does not exist"),
        ([saved], 2, "--index"),
        ([saved, photo, "--under", folder], 2, "filters"),
        ([saved, "--index", tmp_path / "no-index"], 3, "no index"),
    ):
        outcome = cli("probe", "apply", *arguments)
        assert (outcome.code, outcome.out) == (code, ""), outcome.err
        assert words in outcome.err
