"""A search from the command line imports and reads what its query needs, and no more.

That numpy's text tower gives the features of torch's, in every architecture and form, tests/test_clip_model.py and
tests/test_clip_checkpoints.py show.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_references import random_weights, small_config, transformers_form
from safetensors.torch import save_file

import indexer
from searchengine.errors import UsageError, WeightsError
from searchengine.models import hashes
from searchengine.models.clip.checkpoints import Checkpoint
from searchengine.models.clip.encoder import FEW_TEXTS, ClipEncoder
from searchengine.models.clip.text_numpy import TextTower
from searchengine.models.hashes import remembered_sha256
from searchengine.models.published import sha256_of
from searchengine.models.registry import load_encoder
from searchengine.models.tensors import SafetensorsFile

CONFIG = small_config(vocabulary=49_408, dim=64, text_layers=3)
HEAVY = {"torch", "torchvision", "transformers", "PIL", "ftfy", "fastapi", "httpx", "uvicorn"}
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights(CONFIG)


def save(weights: Weights, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> Path:
    halves = {name: tensor.half() for name, tensor in weights.items()}
    return save(halves, tmp_path_factory.mktemp("clip") / "small-quickgelu.safetensors")


def fresh_process(code: str, *arguments: object, models: Path) -> Any:
    """What a new process prints as JSON in its last line, `loaded()` being what it has imported so far."""
    start = f"import json, sys\ndef loaded(): return sorted({HEAVY!r} & set(sys.modules))\n"
    done = subprocess.run(
        [sys.executable, "-c", start + code, *map(str, arguments)],
        env=os.environ | {"SEARCHENGINE_MODELS": str(models), "SEARCHENGINE_OFFLINE": "1", "SEARCHENGINE_WARM": "off"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


# A command as a user gives it, and after its own output what it has imported.
COMMAND = (
    "import searchengine.cli\n"
    "sys.argv[0] = 'searchengine'\n"
    "try:\n    searchengine.cli.main()\n"
    "except SystemExit as end:\n    print(json.dumps([end.code, loaded()]))\n"
)


@dataclass
class Library:
    index: Path
    models: Path


@pytest.fixture(scope="module")
def library_of(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Library]:
    from conftest import painted

    photos = tmp_path_factory.mktemp("photos")
    for seed in range(3):
        painted(seed).save(photos / f"{seed}.png")

    def make(model: str, precision: str = "fp32") -> Library:
        folder = tmp_path_factory.mktemp("library")
        name = str(checkpoint) if model == "clip" else model
        encoder = load_encoder(name, device="cpu", precision=precision, models_folder=folder / "models")
        indexer.build(folder / "index", [photos], encoder=encoder)
        return Library(folder / "index", folder / "models")

    return make


# --- imports


@pytest.mark.parametrize("model", ["mini", "clip"])
def test_a_text_search_imports_neither_torch_nor_pillow(model: str, library_of: Callable[..., Library]) -> None:
    library = library_of(model)
    for query in (["a dog"], ["a dog", "--not", "a cat", "--format", "json"]):
        code, loaded = fresh_process(COMMAND, "search", *query, "--index", library.index, models=library.models)
        assert (code, loaded) == (0, [])


def test_an_index_of_another_precision_is_searched_with_torch(library_of: Callable[..., Library]) -> None:
    library = library_of("clip", precision="int8")
    code, loaded = fresh_process(COMMAND, "search", "a dog", "--index", library.index, models=library.models)
    assert (code, "torch" in loaded) == (0, True)


ENCODER = (
    "from pathlib import Path\nfrom searchengine.models.clip.encoder import ClipEncoder\n"
    "clip = ClipEncoder(name='small', weights_file=Path(sys.argv[1]), device=sys.argv[2], precision='fp32')\n"
)


def test_numpys_tower_is_for_few_texts_and_torchs_for_many_and_for_photos(checkpoint: Path, tmp_path: Path) -> None:
    few, before, many, after, again = fresh_process(
        ENCODER
        + "import numpy as np\n"
        + "few, before = clip.encode_texts(['a dog', 'two men on a beach']), loaded()\n"
        + f"many, after = clip.encode_texts([f'a dog {{n}}' for n in range({FEW_TEXTS + 1})]), loaded()\n"
        + "clip.encode_pixels(np.zeros((1, clip.image_size, clip.image_size, 3), np.uint8))\n"
        + "again = clip.encode_texts(['a dog 1', 'two men on a beach'])\n"
        + "print(json.dumps([few.tolist(), before, many.tolist(), after, again.tolist()]))\n",
        checkpoint,
        "auto" if not torch.cuda.is_available() else "cpu",
        models=tmp_path,
    )
    assert (before, after) == ([], ["torch"])
    here = ClipEncoder(name="small", weights_file=checkpoint, device="cpu")
    expected = here.encode_texts(["a dog", "two men on a beach", "a dog 1"]).tolist()
    assert expected == [*few, again[0]], "to the bit, whatever was imported or encoded before"
    assert again[1] == few[1]
    np.testing.assert_allclose(many[1], again[0], rtol=0, atol=1e-6)


def test_a_text_has_the_same_vector_to_the_bit_alone_and_beside_others(checkpoint: Path) -> None:
    texts = ["a dog", "a dog on a beach", "", "ein Hund 🐕", "two men " * 20]
    clip = ClipEncoder(name="small", weights_file=checkpoint, device="cpu")
    together = clip.encode_texts(texts)
    assert "_numpy_text_tower" in vars(clip)
    for text, row in zip(texts, together, strict=True):
        alone = ClipEncoder(name="small", weights_file=checkpoint, device="cpu")
        np.testing.assert_array_equal(alone.encode_texts([text])[0], row)


def test_a_device_or_precision_that_needs_torch_gets_it(checkpoint: Path) -> None:
    for options in ({"precision": "bf16"}, {"precision": "fp16"}, {"precision": "int8"}):
        clip = ClipEncoder(name="small", weights_file=checkpoint, device="cpu", **options)
        clip.encode_texts(["a dog"])
        assert "_text_tower" in vars(clip)
    with pytest.raises(UsageError, match="fp8"):
        ClipEncoder(name="small", weights_file=checkpoint, precision="fp8").encode_texts(["a"])


# --- what is read


def test_damage_to_the_image_side_is_no_matter_to_a_text(weights: Weights, tmp_path: Path) -> None:
    """None of it is looked at, so that a text costs nothing for it."""
    odd = {**weights, "visual.proj": torch.full_like(weights["visual.proj"], torch.nan)}
    path = tmp_path / "odd-openai.pt"
    torch.save(odd, path)
    with pytest.raises(WeightsError, match="finite"):
        Checkpoint(path).image_tensors()
    assert np.isfinite(TextTower(Checkpoint(path)).encode([[1, 2, 49_407]])).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["token_embedding.weight", "transformer.resblocks.2.mlp.c_fc.weight"])
def test_no_text_is_encoded_with_weights_that_are_no_finite_numbers(
    name: str, value: float, dtype: torch.dtype, weights: Weights, tmp_path: Path
) -> None:
    """Also where no text of the day asks for the row that is damaged."""
    odd = weights[name].to(dtype, copy=True)
    odd.view(-1)[-7] = value
    path = save({**weights, name: odd}, tmp_path / "odd-openai.safetensors")
    with pytest.raises(WeightsError, match="values that are not finite numbers"):
        TextTower(Checkpoint(path))


def test_the_greatest_half_is_a_finite_number(weights: Weights, tmp_path: Path) -> None:
    halves = weights["token_embedding.weight"].half()
    halves[5, :2] = torch.tensor([65504, -65504])
    path = save({**weights, "token_embedding.weight": halves}, tmp_path / "great-openai.safetensors")
    assert Checkpoint(path).text_tensors(as_stored=["tokens"])["tokens"][5, 1] == -65504


def test_a_flipped_bit_of_the_text_side_is_noticed(weights: Weights, tmp_path: Path) -> None:
    path = tmp_path / "a-openai.pt"
    torch.save({name: tensor.half() for name, tensor in weights.items()}, path)
    content = bytearray(path.read_bytes())
    at = content.index(weights["token_embedding.weight"].half().numpy()[40_000].tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="token_embedding.weight are damaged"):
        TextTower(Checkpoint(path))


def test_weights_that_are_float32_in_the_file_are_not_copied(weights: Weights, tmp_path: Path) -> None:
    tensors = Checkpoint(save(weights, tmp_path / "a-openai.safetensors")).text_tensors()
    products = [name for name in tensors if name.endswith(("widen.weight", "qkv.weight")) or name == "tokens"]
    assert len(products) == 1 + 2 * CONFIG.text.layers
    for name in products:
        assert not tensors[name].flags.owndata and not tensors[name].flags.writeable
    separate = Checkpoint(save(transformers_form(weights), tmp_path / "b-openai.safetensors")).text_tensors()
    assert all(np.array_equal(separate[name], tensor) for name, tensor in tensors.items())


HEADERS: dict[str, Any] = {
    "beyond the end": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    "before the beginning": {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]},
    "backwards": {"dtype": "F32", "shape": [0], "data_offsets": [8, 0]},
    "negative": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]},
    "huge": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]},
    "no numbers": {"dtype": "F32", "shape": ["a"], "data_offsets": [0, 8]},
    "true": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
    "not all of the data": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    "no shape": {"dtype": "F32", "data_offsets": [0, 8]},
    "a list": [],
    "too many dimensions": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [4, 8]},
    "endless dimensions": {"dtype": "F32", "shape": [2**40] * 300_000, "data_offsets": [0, 8]},
    "an endless number": {"dtype": "F32", "shape": [2], "data_offsets": [10**4000, 0]},
    "endless numbers": {"dtype": "F32", "shape": [10**4000] * 8, "data_offsets": [0, 8]},
}


@pytest.mark.parametrize("entry", HEADERS.values(), ids=HEADERS)
def test_a_safetensors_header_that_lies_is_refused(entry: Any, tmp_path: Path) -> None:
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError) as refusal:
        SafetensorsFile(tmp_path / "a")
    assert len(str(refusal.value)) < 200
    (tmp_path / "b").write_bytes((2**40).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="header would have"):
        SafetensorsFile(tmp_path / "b")


def test_a_type_of_number_that_is_unknown_is_refused_shortly(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F8" * 10**6, "shape": [8], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="of which nothing is known") as refusal:
        SafetensorsFile(tmp_path / "a").read("a")
    assert len(str(refusal.value)) < 200


# --- the fingerprint


def models_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return folder


def settled(path: Path, content: bytes = b"weights", *, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that was written long enough ago, by a clock that has gone on since."""
    path.write_bytes(content)
    now = time.time_ns() + 2 * hashes.SETTLED_NS
    monkeypatch.setattr(hashes.time, "time_ns", lambda: now)
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read for their hash."""
    files: list[Path] = []
    monkeypatch.setattr(hashes, "sha256_of", lambda path: files.append(path) or sha256_of(path))
    return files


def test_a_file_is_hashed_once(tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = settled(tmp_path / "a.pt", monkeypatch=monkeypatch), models_folder(tmp_path)
    expected = hashlib.sha256(b"weights").hexdigest()
    assert [remembered_sha256(file, folder=folder) for _ in range(3)] == [expected] * 3
    assert hashed == [file]
    assert [remembered_sha256(file, folder=None) for _ in range(2)] == [expected] * 2
    assert len(hashed) == 3
    monkeypatch.chdir(tmp_path)
    assert remembered_sha256(Path("a.pt"), folder=folder) == expected
    assert len(hashed) == 3
    assert [path.name for path in folder.iterdir()] == ["hashes.json"]


def test_a_file_that_changed_has_another_hash_even_if_size_and_mtime_are_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = settled(tmp_path / "a.pt", monkeypatch=monkeypatch), models_folder(tmp_path)
    before, first = file.stat(), remembered_sha256(file, folder=folder)
    with open(file, "r+b") as opened:  # the same inode, too
        opened.write(b"WEIGHTS")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    assert first != remembered_sha256(file, folder=folder) == hashlib.sha256(b"WEIGHTS").hexdigest()
    other = tmp_path / "other.pt"
    other.write_bytes(b"another")
    os.replace(other, file)
    assert remembered_sha256(file, folder=folder) == hashlib.sha256(b"another").hexdigest()


def test_a_file_that_has_just_changed_is_hashed_again(tmp_path: Path, hashed: list[Path]) -> None:
    file = tmp_path / "a.pt"
    file.write_bytes(b"weights")
    for _ in range(2):
        remembered_sha256(file, folder=tmp_path)
    assert len(hashed) == 2
    assert not (tmp_path / "hashes.json").exists()


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = settled(tmp_path / "a.pt", monkeypatch=monkeypatch)

    def disturbed(path: Path) -> str:
        sha256 = sha256_of(path)
        path.write_bytes(b"other")
        return sha256

    with monkeypatch.context() as patch:
        patch.setattr(hashes, "sha256_of", disturbed)
        remembered_sha256(file, folder=tmp_path)
    assert remembered_sha256(file, folder=tmp_path) == hashlib.sha256(b"other").hexdigest()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b"\xff", b"[" * 10**5, b'{"a": 1}', bytes(2**20 + 1)], ids=lambda c: repr(c[:9])
)
def test_a_damaged_memory_is_none_and_is_mended(
    content: bytes, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = settled(tmp_path / "a.pt", monkeypatch=monkeypatch)
    (tmp_path / "hashes.json").write_bytes(content)
    for _ in range(2):
        assert remembered_sha256(file, folder=tmp_path) == hashlib.sha256(b"weights").hexdigest()
    assert hashed == [file]


@pytest.mark.parametrize("value", [None, 7, [], ["x"], [0, 0, 0, 0, 0, "0" * 64], {"a": 1}], ids=repr)
def test_what_is_remembered_of_another_state_is_not_believed(
    value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = settled(tmp_path / "a.pt", monkeypatch=monkeypatch)
    (tmp_path / "hashes.json").write_text(json.dumps({str(file): value}))
    assert remembered_sha256(file, folder=tmp_path) == hashlib.sha256(b"weights").hexdigest()


@pytest.mark.skipif(os.name != "posix", reason="there are no such permissions here")
def test_a_memory_that_others_may_write_is_not_believed(
    tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = settled(tmp_path / "a.pt", monkeypatch=monkeypatch)
    remembered_sha256(file, folder=tmp_path)
    (tmp_path / "hashes.json").chmod(0o666)
    remembered_sha256(file, folder=tmp_path)
    assert len(hashed) == 2


@pytest.mark.parametrize("hindrance", ["no folder", "a file", "a pipe"])
def test_where_nothing_can_be_remembered_a_file_is_hashed_each_time(
    hindrance: str, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = settled(tmp_path / "a.pt", monkeypatch=monkeypatch), tmp_path / "models"
    if hindrance == "a file":
        folder.write_bytes(b"")
    elif hindrance == "a pipe":
        os.mkfifo(models_folder(tmp_path) / "hashes.json")
        monkeypatch.setattr(hashes, "_remember", lambda *_: None)  # it would be replaced
    for _ in range(2):
        assert remembered_sha256(file, folder=folder) == hashlib.sha256(b"weights").hexdigest()
    assert len(hashed) == 2
    assert folder.exists() == (hindrance != "no folder")


def test_the_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "MAX_KNOWN", 3)
    for number in range(5):
        remembered_sha256(settled(tmp_path / f"{number}.pt", monkeypatch=monkeypatch), folder=tmp_path)
    assert [Path(name).name for name in json.loads((tmp_path / "hashes.json").read_text())] == ["2.pt", "3.pt", "4.pt"]


def test_an_encoder_has_one_fingerprint_whether_its_hash_is_remembered_or_not(
    checkpoint: Path, tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = settled(tmp_path / "small-quickgelu.safetensors", checkpoint.read_bytes(), monkeypatch=monkeypatch)
    prints = {load_encoder(str(copy), models_folder=folder).fingerprint for folder in (None, tmp_path, tmp_path)}
    assert len(prints) == 1
    assert len(hashed) == 2
    changed = bytearray(copy.read_bytes())
    changed[-1] ^= 1
    copy.write_bytes(changed)
    assert load_encoder(str(copy), models_folder=tmp_path).fingerprint not in prints
    pinned = ClipEncoder(name="x", weights_file=copy, sha256=sha256_of(checkpoint), hashes_folder=tmp_path)
    with pytest.raises(WeightsError, match="expected"):
        pinned.encode_texts(["a dog"])
