"""The encoder `clip` on random weights: what it promises of vectors, texts, precisions and identity."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from searchengine.captions import read_captions
from searchengine.errors import ImageError, ModelUnusable, QueryError, UsageError, WeightsError
from searchengine.models.clip import encoder as encoder_module
from searchengine.models.clip import linear as linear_module
from searchengine.models.clip.checkpoints import Checkpoint
from searchengine.models.clip.encoder import ClipEncoder
from searchengine.models.clip.linear import Int8Linear, PackedLinear
from searchengine.models.clip.model import Prompts
from searchengine.models.clip.smoothing import smooth
from searchengine.models.devices import LargestBatch
from searchengine.vectors import Encoder, FloatMatrix

WIDTH, LAYERS, DIM, SIZE, PATCH = 128, 3, 64, 32, 8
CAPTIONS = [
    "a dog",
    "a dog on a beach",
    "a dog on a beach at night, seen from far away, with a boat behind it",
    "two men",
    "",
    "ein Hund 🐕",
]


def random_checkpoint(file: Path) -> Path:
    """A small CLIP under OpenAI's names. Its gains and biases are random too, and some channels are outliers."""
    generator = torch.Generator().manual_seed(0)

    def matrix(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 1.5 / shape[-1] ** 0.5

    def norm(name: str) -> dict[str, torch.Tensor]:
        gains = 1 + 0.2 * torch.randn(WIDTH, generator=generator)
        gains[:2] *= 15
        return {f"{name}.weight": gains, f"{name}.bias": 0.1 * torch.randn(WIDTH, generator=generator)}

    def linear(name: str, out: int, inputs: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": matrix(out, inputs), f"{name}.bias": 0.1 * torch.randn(out, generator=generator)}

    tensors = {
        "visual.conv1.weight": matrix(WIDTH, 3, PATCH, PATCH) / 4,
        "visual.class_embedding": matrix(WIDTH),
        "visual.positional_embedding": matrix(1 + (SIZE // PATCH) ** 2, WIDTH),
        "visual.proj": matrix(WIDTH, DIM),
        "positional_embedding": matrix(77, WIDTH),
        "text_projection": matrix(WIDTH, DIM),
        "token_embedding.weight": matrix(49408, WIDTH),
        "logit_scale": torch.tensor(100.0).log(),
    }
    for name in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        tensors |= norm(name)
    for tower in ("visual.", ""):
        for number in range(LAYERS):
            block = f"{tower}transformer.resblocks.{number}."
            tensors |= norm(block + "ln_1") | norm(block + "ln_2")
            tensors |= {block + "attn.in_proj_weight": matrix(3 * WIDTH, WIDTH)}
            tensors |= {block + "attn.in_proj_bias": 0.1 * torch.randn(3 * WIDTH, generator=generator)}
            tensors |= linear(block + "attn.out_proj", WIDTH, WIDTH)
            tensors |= linear(block + "mlp.c_fc", 4 * WIDTH, WIDTH) | linear(block + "mlp.c_proj", WIDTH, 4 * WIDTH)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("weights") / "small-quickgelu.safetensors")


Make = Callable[..., ClipEncoder]


@pytest.fixture(scope="module")
def make(weights: Path) -> Make:
    def make(**options: Any) -> ClipEncoder:
        return ClipEncoder(**({"name": "small", "weights_file": weights, "device": "cpu"} | options))

    return make


@pytest.fixture(scope="module")
def clip(make: Make) -> ClipEncoder:
    return make()


@pytest.fixture(scope="module")
def photos_64(data: Path) -> FloatMatrix:
    """64 crops of real photos, uint8 (64, 32, 32, 3)."""
    from searchengine.decode import decode_file

    files = sorted((data / "flickr8k_dev" / "images").iterdir())[:64]
    return np.stack([decode_file(file, image_size=SIZE) for file in files])


def exact_images(weights: Path, pixels: Any) -> FloatMatrix:
    """The network as `model` has it, a photo at a time."""
    from searchengine.models.clip.preprocess import normalise_pixels

    tower = Checkpoint(weights).image_transformer()
    with torch.inference_mode():
        rows = torch.cat([tower(normalise_pixels(torch.from_numpy(crop[None]))) for crop in pixels])
    return np.asarray(F.normalize(rows, dim=1).numpy())


def exact_texts(clip: ClipEncoder, weights: Path, texts: list[str]) -> FloatMatrix:
    """A text at a time, padded to 77 tokens as OpenAI does it: what follows the end must not matter."""
    tower = Checkpoint(weights).text_transformer()
    rows = []
    for text in texts:
        tokens = clip._tokenizer.encode(text)
        padded = tokens + [0] * (77 - len(tokens))
        x = tower.tokens[padded] + tower.positions
        prompts = Prompts.pack([list(range(77))])
        with torch.inference_mode():
            for block in tower.blocks:
                x = block(x, tower._attend_causally(prompts))
            rows.append(tower.projection(tower.norm_post(x[len(tokens) - 1 : len(tokens)])))
    return np.asarray(F.normalize(torch.cat(rows), dim=1).numpy())


def centred_cosines(exact: FloatMatrix, rounded: FloatMatrix) -> FloatMatrix:
    centre = exact.mean(axis=0)
    a, b = exact - centre, rounded - centre
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


# -- vectors ----------------------------------------------------------------------------------------------------------


def test_it_keeps_the_contract_of_an_encoder(clip: ClipEncoder) -> None:
    assert isinstance(clip, Encoder)
    assert (clip.name, clip.dim, clip.image_size, clip.precision) == ("small", DIM, SIZE, "fp32")
    assert clip.logit_scale == pytest.approx(100)
    assert clip.encode_texts([]).shape == clip.encode_images([]).shape == (0, DIM)
    assert clip.encode_pixels(np.empty((0, SIZE, SIZE, 3), np.uint8)).shape == (0, DIM)


@pytest.mark.parametrize("count", [1, 2, 3, 17, 64])
def test_photos_have_the_vectors_of_the_plain_network_however_many_come_at_once(
    clip: ClipEncoder, weights: Path, photos_64: Any, count: int
) -> None:
    given = clip.encode_pixels(photos_64[:count])
    assert given.dtype == np.float32
    np.testing.assert_allclose(given, exact_images(weights, photos_64[:count]), atol=1e-5)


def test_photos_in_parts_have_the_vectors_of_the_plain_network(make: Make, weights: Path, photos_64: Any) -> None:
    encoder = make()
    encoder._image_tower._largest = LargestBatch(5)  # as on a device that is neither a CPU nor a CUDA device
    np.testing.assert_allclose(encoder.encode_pixels(photos_64[:17]), exact_images(weights, photos_64[:17]), atol=1e-5)


def test_on_a_device_that_is_neither_a_cpu_nor_a_cuda_device_threads_take_turns(
    make: Make, photos_64: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = make()._image_tower
    tower._largest = LargestBatch(64)
    forward, together, met = tower._forward, threading.Barrier(2), []

    def meet(images: torch.Tensor) -> torch.Tensor:
        with suppress(threading.BrokenBarrierError):
            met.append(together.wait(timeout=0.2))
        return forward(images)

    monkeypatch.setattr(tower, "_forward", meet)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(tower.encode, [photos_64[:2], photos_64[2:4]])
    assert not met
    np.testing.assert_allclose(np.concatenate([one, other]), tower.encode(photos_64[:4]), atol=1e-5)


def test_texts_have_the_vectors_of_the_plain_network_run_over_all_77_tokens(clip: ClipEncoder, weights: Path) -> None:
    np.testing.assert_allclose(clip.encode_texts(CAPTIONS), exact_texts(clip, weights, CAPTIONS), atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
def test_a_photo_does_not_depend_on_those_beside_it(make: Make, photos_64: Any, precision: str) -> None:
    encoder = make(precision=precision)
    together = encoder.encode_pixels(photos_64)
    alone = np.concatenate([encoder.encode_pixels(photos_64[i : i + 1]) for i in (0, 31, 63)])
    np.testing.assert_allclose(together[[0, 31, 63]], alone, atol=1e-4 if precision == "bf16" else 1e-5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(CAPTIONS), min_size=1, max_size=8))
def test_a_text_does_not_depend_on_those_beside_it(clip: ClipEncoder, texts: list[str]) -> None:
    alone = {text: clip.encode_texts([text])[0] for text in set(texts)}
    clip._known_texts[True].clear()
    np.testing.assert_allclose(clip.encode_texts(texts), np.stack([alone[text] for text in texts]), atol=1e-5)


def test_images_may_be_pictures_or_paths(clip: ClipEncoder, data: Path) -> None:
    file = data / "golden" / "images" / "astronaut.png"
    rows = clip.encode_images([file, str(file), Image.open(file)])
    np.testing.assert_allclose(rows[1:], rows[[0, 0]], atol=1e-5)
    with pytest.raises(ImageError, match="nowhere.jpg"):
        clip.encode_images([data / "nowhere.jpg"])


def test_pixels_that_cannot_be_written_to_are_read(clip: ClipEncoder, photos_64: Any) -> None:
    frozen = photos_64[:2].copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(clip.encode_pixels(frozen), clip.encode_pixels(photos_64[:2]))


def test_what_is_no_list_or_no_crop_is_refused(clip: ClipEncoder) -> None:
    with pytest.raises(UsageError, match="texts is 'a dog'; give a list"):
        clip.encode_texts("a dog")
    with pytest.raises(UsageError, match="images is"):
        clip.encode_images("a.jpg")
    with pytest.raises(UsageError, match=r"expected uint8 \(n, 32, 32, 3\)"):
        clip.encode_pixels(np.zeros((1, 224, 224, 3), np.uint8))
    with pytest.raises(UsageError, match="float32"):
        clip.encode_pixels(np.zeros((1, SIZE, SIZE, 3), np.float32))  # type: ignore[arg-type]


# -- texts ------------------------------------------------------------------------------------------------------------


def test_a_text_of_more_than_77_tokens_is_refused_unless_it_may_be_cut(clip: ClipEncoder) -> None:
    long = "dog " * 76
    with pytest.raises(QueryError, match="78 tokens"):
        clip.encode_texts([long])
    cut = clip.encode_texts([long], truncate=True)
    np.testing.assert_allclose(cut, clip.encode_texts(["dog " * 75]), atol=1e-6)


def test_a_text_ends_where_it_spells_out_the_end(clip: ClipEncoder) -> None:
    rows = clip.encode_texts(["a dog <|endoftext|> and a cat", "a dog"])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)


def test_a_text_is_computed_once(clip: ClipEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    tower = clip._numpy_text_tower
    encode = tower.encode
    monkeypatch.setattr(tower, "encode", lambda batch: seen.append(len(batch)) or encode(batch))
    first = clip.encode_texts(["only once", "ONLY  once", "only twice"])
    assert sum(seen) == 2
    np.testing.assert_array_equal(clip.encode_texts(["only twice", "only once"]), first[[2, 0]])
    assert sum(seen) == 2


def test_the_memory_for_texts_is_bounded(clip: ClipEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder_module, "CACHED_TEXTS", 5)
    known = clip._known_texts = {True: {}, False: {}}
    rows = clip.encode_texts([f"number {i}" for i in range(12)])
    assert len(known[True]) <= 5
    clip.encode_texts(["a", "b", "c", "d"])
    clip.encode_texts(["e", "f", "g"])
    assert 0 < len(known[True]) <= 5
    np.testing.assert_allclose(clip.encode_texts(["number 3"])[0], rows[3], atol=1e-6)


def test_many_texts_are_taken_in_bounded_batches(clip: ClipEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{'very ' * (i % 30)}good {i}" for i in range(60)]
    clip._known_texts[False].clear()
    whole = clip.encode_texts(texts)
    clip._known_texts[False].clear()
    monkeypatch.setattr(encoder_module, "TOKENS_PER_BATCH", 100)
    np.testing.assert_allclose(clip.encode_texts(texts), whole, atol=1e-5)


# -- precisions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "least"), [("bf16", 0.999), ("fp16", 0.99999), ("int8", 0.99)])
def test_another_precision_changes_little(
    make: Make, clip: ClipEncoder, photos_64: Any, precision: str, least: float, data: Path
) -> None:
    photos = read_captions(data / "flickr8k_dev" / "captions.json", images=data / "flickr8k_dev" / "images")[:50]
    texts = [photo.captions[0] for photo in photos]
    other = make(precision=precision)
    for exact, rounded in (
        (clip.encode_pixels(photos_64), other.encode_pixels(photos_64)),
        (clip.encode_texts(texts), other.encode_texts(texts)),
    ):
        cosines = centred_cosines(exact, rounded)
        assert cosines.mean() > least
        assert not np.array_equal(exact, rounded)


def test_smoothing_changes_no_result(weights: Path, photos_64: Any) -> None:
    checkpoint = Checkpoint(weights)
    image, text = checkpoint.image_transformer(), checkpoint.text_transformer()
    pixels = torch.from_numpy(photos_64[:4]) / 255
    prompts = Prompts.pack([[49406, 5, 6, 7, 49407], [49406, 9, 49407]])
    with torch.inference_mode():
        before = image(pixels), text(prompts)
        smooth(image)
        smooth(text)
        after = image(pixels), text(prompts)
    for exact, smoothed in zip(before, after, strict=True):
        torch.testing.assert_close(smoothed, exact, atol=1e-4, rtol=1e-4)


def test_smoothing_is_what_keeps_int8_exact_where_channels_are_outliers(
    make: Make, clip: ClipEncoder, photos_64: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = clip.encode_pixels(photos_64)
    smoothed = centred_cosines(exact, make(precision="int8").encode_pixels(photos_64)).mean()
    monkeypatch.setattr("searchengine.models.clip.inference.smooth", lambda network: None)
    plain = centred_cosines(exact, make(precision="int8").encode_pixels(photos_64)).mean()
    assert 1 - smoothed < (1 - plain) / 2


@pytest.mark.parametrize("fused", ["none", "swish", "gelu"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "public"])
def test_a_packed_product_is_the_plain_one(monkeypatch: pytest.MonkeyPatch, fused: Any, packed: bool) -> None:
    if not packed:
        monkeypatch.setattr(linear_module, "has_packed_products", lambda: False)
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 64), torch.randn(48), torch.randn(7, 64)
    plain = {"none": lambda y: y, "swish": F.silu, "gelu": F.gelu}[fused](F.linear(x, weight, bias))
    torch.testing.assert_close(PackedLinear(weight, bias, fused=fused)(x), plain, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("least", [None, -0.3])
@pytest.mark.parametrize("fast", [True, False], ids=["integers", "emulated"])
def test_a_product_of_integers_is_off_by_its_rounding_only(
    monkeypatch: pytest.MonkeyPatch, least: float | None, fast: bool
) -> None:
    if not fast:
        monkeypatch.setattr(linear_module, "has_fast_integers", lambda: False)
    elif not linear_module.has_fast_integers():
        pytest.skip("this processor has no instruction for 8-bit integers")
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 64), torch.randn(48)
    x = torch.randn(9, 64) * torch.logspace(-3, 3, 9)[:, None]  # rows of any size
    x = x if least is None else x.clamp_min(least)
    y = Int8Linear(weight, bias, least=least)(x)
    exact = F.linear(x, weight, bias)
    # Half a step of each input and of each weight, at the worst all of one sign.
    extent = x.abs().amax(1, keepdim=True) if least is None else x.amax(1, keepdim=True) - least
    step = extent / (127 if least is None else 255)
    weight_step = weight.abs().amax(1) / 127
    worst = step / 2 * weight.abs().sum(1) + (x.abs() + step / 2).sum(1, keepdim=True) * weight_step / 2
    assert ((y - exact).abs() <= worst * 1.01 + 1e-5).all()
    # The rows of a product do not see each other.
    torch.testing.assert_close(Int8Linear(weight, bias, least=least)(x[4:5]), y[4:5])


def test_a_row_of_zeros_is_no_trouble_for_integers() -> None:
    weight, bias = torch.randn(8, 16), torch.randn(8)
    torch.testing.assert_close(Int8Linear(weight, bias)(torch.zeros(2, 16)), bias.expand(2, -1))


def test_a_precision_that_cannot_be_had_is_refused(make: Make) -> None:
    with pytest.raises(UsageError, match="the precision 'fp8' is unknown; use one of fp32, bf16, fp16, int8"):
        make(precision="fp8").encode_texts(["a"])
    assert make(precision="int8", device="auto").encode_texts(["a"]).shape == (1, DIM)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused(make: Make) -> None:
    with pytest.raises(ModelUnusable, match="the device cuda cannot be used here"):
        make(device="cuda").encode_texts(["a"])


# -- identity ---------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_the_bytes_and_the_precision(
    make: Make, clip: ClipEncoder, weights: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "quickgelu.safetensors"
    copy.write_bytes(weights.read_bytes())
    assert make(weights_file=copy, name="other").fingerprint == clip.fingerprint
    prints = {make(precision=precision).fingerprint for precision in ("fp32", "bf16", "fp16", "int8")}
    assert len(prints) == 4
    assert clip.fingerprint in prints
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    copy.write_bytes(changed)
    assert make(weights_file=copy).fingerprint != clip.fingerprint


def test_weights_that_do_not_hash_to_what_is_known_are_refused(make: Make) -> None:
    with pytest.raises(WeightsError, match="expected 000000000000; fetch it again"):
        make(sha256="0" * 64).encode_texts(["a"])


@pytest.mark.parametrize(
    ("name", "shape"), [("positional_embedding", (64, WIDTH)), ("token_embedding.weight", (100, WIDTH))]
)
def test_weights_that_the_tokenizer_does_not_fit_are_refused(
    make: Make, weights: Path, tmp_path: Path, name: str, shape: tuple[int, int]
) -> None:
    tensors = load_file(weights)
    save_file(tensors | {name: torch.zeros(shape)}, tmp_path / "quickgelu.safetensors")
    with pytest.raises(WeightsError, match="where CLIP's tokenizer has 77 of 49,408"):
        make(weights_file=tmp_path / "quickgelu.safetensors").encode_texts(["a"])


def test_making_one_and_asking_its_fingerprint_loads_no_torch(weights: Path) -> None:
    script = (
        "import sys, pathlib\nfrom searchengine.models.clip.encoder import ClipEncoder\n"
        "print(ClipEncoder(name='x', weights_file=pathlib.Path(sys.argv[1])).fingerprint[:0], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, weights], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
