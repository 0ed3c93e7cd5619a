"""Rows through a CUDA device. Order, rests and memory are tested anywhere; tests marked `gpu` need a device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commandline import Cli
from fake_cuda import FakeCuda
from hypothesis import given
from hypothesis import strategies as st
from test_clip_encoder import SIZE, random_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from searchengine.errors import ModelUnusable, UsageError
from searchengine.models import cuda as cuda_module
from searchengine.models.clip.checkpoints import Checkpoint
from searchengine.models.clip.encoder import ClipEncoder
from searchengine.models.clip.inference import ImageTower, kernels_of
from searchengine.models.clip.preprocess import normalise_pixels
from searchengine.models.cuda import WARM_UPS, CudaRows
from searchengine.models.devices import LargestBatch
from searchengine.models.mini import parts
from searchengine.models.mini.efficientnet import EfficientNetLite2
from searchengine.vectors import FloatMatrix

CPU = torch.device("cpu")


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    has_device = torch.cuda.is_available()
    return pytest.mark.gpu(pytest.mark.skipif(not has_device, reason="there is no CUDA device here")(test))


# -- on a model of a device -------------------------------------------------------------------------------------------

Make = Callable[..., tuple[FakeCuda, CudaRows]]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    def make(*, rows_per_part: int, **options: Any) -> tuple[FakeCuda, CudaRows]:
        device = FakeCuda(**options)
        monkeypatch.setattr(cuda_module, "torch", device)
        return device, CudaRows(device.compute, device=CPU, rows_per_part=rows_per_part)  # type: ignore[arg-type]

    return make


def numbers(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float32)[:, None].expand(count, 2).contiguous()


def check(rows: CudaRows, count: int) -> None:
    assert torch.equal(rows.run(numbers(count)), numbers(count) * 2 + 1)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 20), st.booleans())
def test_each_row_comes_back_in_its_place_whatever_the_parts_and_the_memory(
    make: Make, count: int, rows_per_part: int, room: int, records: bool
) -> None:
    _, rows = make(rows_per_part=rows_per_part, room=room, records=records)
    for _ in range(2):
        check(rows, count)


@given(st.integers(1, 60), st.integers(1, 16), st.lists(st.booleans(), max_size=30))
def test_no_row_is_lost_or_doubled_where_memory_runs_out_in_the_middle(
    count: int, most: int, failures: list[bool]
) -> None:
    largest, sizes = LargestBatch(most), [most]

    def work(part: torch.Tensor) -> torch.Tensor:
        sizes.append(largest.rows)
        if len(part) > 1 and failures and failures.pop():
            raise torch.OutOfMemoryError
        return part * 2

    assert torch.equal(torch.cat(list(largest.run(work, numbers(count)))), numbers(count) * 2)
    assert sizes == sorted(sizes, reverse=True)


def test_a_part_is_sent_on_a_stream_of_its_own_while_the_one_before_it_is_computed(make: Make) -> None:
    device, rows = make(rows_per_part=3, records=False)
    check(rows, 3)
    device.log.clear()
    check(rows, 10)
    # What is computed is logged when somebody waits for it: to use its slot again, or for the results.
    assert device.log == [
        *("send 0", "send 3", "compute 0", "send 6", "compute 3", "send 9"),
        *("compute 6", "compute 9"),
    ]
    assert len(set(device.sent_on)) == 1
    assert device.sent_on[0] is not device.current


def test_kernels_are_recorded_at_the_first_full_part_and_played_from_then_on(make: Make) -> None:
    device, rows = make(rows_per_part=4)
    check(rows, 3)
    assert device.computed == [3]
    check(rows, 14)
    check(rows, 8)
    assert device.computed == [3, *[4] * (WARM_UPS + 1), 2]


def test_what_cannot_be_recorded_is_launched_for_good(make: Make) -> None:
    device, rows = make(rows_per_part=4, records=False)
    stream = device.current
    check(rows, 8)
    assert device.current is stream
    assert not device.pools
    assert device.computed == [*[4] * (WARM_UPS + 1), 4, 4]
    device.computed.clear()
    check(rows, 9)
    assert device.computed == [4, 4, 1]


def test_parts_that_do_not_fit_are_halved_and_recorded_anew(make: Make) -> None:
    device, rows = make(rows_per_part=16, room=5)
    check(rows, 20)
    assert device.computed == [16, 8, *[4] * (WARM_UPS + 1)]
    assert [graph.rows for graph in device.graphs] == [4]
    assert [len(slot._there) for slot in rows._slots] == [4, 4]


@pytest.mark.parametrize("rest", [1, 3])
def test_a_rest_that_does_not_fit_beside_the_recording_takes_its_place(make: Make, rest: int) -> None:
    device, rows = make(rows_per_part=4, room=4)
    check(rows, 8 + rest)
    assert device.computed == [*[4] * (WARM_UPS + 1), rest, rest]
    assert not device.graphs
    device.computed.clear()
    check(rows, 8 + rest)
    assert device.computed == [4, 4, rest]


def test_a_device_without_room_for_one_row_says_so_and_works_once_there_is_room(make: Make) -> None:
    device, rows = make(rows_per_part=4, room=0)
    with pytest.raises(ModelUnusable, match="--device cpu"):
        rows.run(numbers(7))
    device.room = 9
    check(rows, 7)


def test_threads_take_turns(make: Make) -> None:
    device, rows = make(rows_per_part=2)
    other = threading.Thread(target=check, args=(rows, 5), daemon=True)
    compute = device.compute
    waited: list[bool] = []

    def slow(part: Any) -> Any:
        if not waited:
            waited.append(False)
            other.start()
            other.join(0.2)
            waited.append(other.is_alive())
        return compute(part)

    rows._compute = slow
    check(rows, 3)
    other.join(10)
    assert waited == [False, True]
    assert not other.is_alive()


# -- what is recorded -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("gpu") / "small-quickgelu.safetensors")


@pytest.fixture(scope="module")
def mini_weights() -> Path:
    return parts.locate(parts.IMAGE_TOWER)


@pytest.fixture(scope="module")
def crops() -> Any:
    return np.random.default_rng(0).integers(0, 256, (300, SIZE, SIZE, 3), dtype=np.uint8)


def test_what_a_gpu_is_to_compute_is_what_the_plain_network_computes(weights: Path, crops: Any) -> None:
    network, pixels = Checkpoint(weights).image_transformer(), torch.from_numpy(crops[:3])
    with torch.inference_mode():
        assert torch.equal(kernels_of(network, CPU)(pixels), network(normalise_pixels(pixels)))


# All that is seen of torch.tensor(value, device=...).
CONSTANT_FROM_THE_HOST = "detach_.default"


class Operators(TorchDispatchMode):
    """Notes where each operator's tensors are, and its name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.places: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func.__name__)
        tensors = torch.utils._pytree.tree_leaves((args, kwargs, result))
        self.places |= {tensor.device.type for tensor in tensors if isinstance(tensor, torch.Tensor)}
        return result


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_network_waits_for_nothing_and_takes_nothing_from_the_host(weights: Path, precision: str) -> None:
    """Otherwise it could not be recorded. On torch's device without values, where reading one fails, too."""
    tower = ImageTower(Checkpoint(weights).image_transformer(), device="meta", precision=precision)
    compute = kernels_of(tower._network, torch.device("meta"))
    pixels = torch.empty((5, SIZE, SIZE, 3), dtype=torch.uint8, device="meta")
    with torch.inference_mode(), Operators() as network:
        compute(pixels)
    assert "linear.default" in network.names
    assert network.places == {"meta"}
    with torch.inference_mode(), Operators() as with_constants:
        normalise_pixels(pixels)
    assert CONSTANT_FROM_THE_HOST in with_constants.names
    assert CONSTANT_FROM_THE_HOST not in network.names


def test_mini_waits_for_nothing_and_takes_nothing_from_the_host(mini_weights: Path) -> None:
    tower = EfficientNetLite2.from_file(mini_weights, device="meta")
    pixels = torch.empty((5, 260, 260, 3), dtype=torch.uint8, device="meta")
    with torch.inference_mode(), Operators() as network:
        tower._describe(pixels)
    assert {"conv2d.default", "matmul.default"} <= network.names
    assert network.places == {"meta"}
    assert CONSTANT_FROM_THE_HOST not in network.names


def test_mini_gives_a_cuda_device_all_of_a_batch_and_no_batch_that_is_empty(mini_weights: Path) -> None:
    tower, asked = EfficientNetLite2.from_file(mini_weights), []
    pixels = torch.zeros((5, 260, 260, 3), dtype=torch.uint8)
    expected = tower.describe(pixels)
    tower._cuda = SimpleNamespace(run=lambda rows: asked.append(len(rows)) or tower._describe(rows))  # type: ignore
    torch.testing.assert_close(tower.describe(pixels), expected)
    assert tower.describe(pixels[:0]).shape == (0, expected.shape[1])
    with pytest.raises(UsageError, match="expected uint8"):
        tower.describe(pixels[:, :200])
    assert asked == [5]


# -- on a device ------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_device(weights: Path) -> Iterator[Callable[[str], ClipEncoder]]:
    yield lambda precision: ClipEncoder(name="small", weights_file=weights, device="cuda", precision=precision)
    torch.cuda.empty_cache()


def on_the_cpu(weights: Path, crops: Any) -> FloatMatrix:
    return ClipEncoder(name="small", weights_file=weights, device="cpu").encode_pixels(crops)


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_photo_has_the_vector_that_it_has_on_a_cpu(
    on_device: Callable[[str], ClipEncoder], weights: Path, crops: Any, precision: str
) -> None:
    rows = on_device(precision).encode_pixels(crops)
    cosines = (rows * on_the_cpu(weights, crops)).sum(axis=1)
    assert cosines.mean() > (0.99999 if precision == "fp32" else 0.999)


@gpu
@pytest.mark.parametrize("count", [1, 127, 128, 129, 256, 300])
def test_a_photo_does_not_depend_on_how_many_are_encoded_on_a_device(
    on_device: Callable[[str], ClipEncoder], crops: Any, count: int
) -> None:
    encoder = on_device("fp32")
    together = encoder.encode_pixels(crops[:count])
    some = sorted({0, count // 2, count - 1})
    alone = np.concatenate([encoder.encode_pixels(crops[i : i + 1]) for i in some])
    np.testing.assert_allclose(together[some], alone, atol=1e-4)


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_recording_computes_what_launched_kernels_do_to_the_bit(weights: Path, crops: Any, precision: str) -> None:
    tower = ImageTower(Checkpoint(weights).image_transformer(), device="cuda", precision=precision)
    recorded = [tower.encode(crops[:256]) for _ in range(2)]
    assert tower._cuda is not None
    assert tower._cuda._recording is not None
    tower._cuda._recording, tower._cuda._can_record = None, False
    launched = tower.encode(crops[:256])
    for rows in recorded:
        np.testing.assert_array_equal(rows, launched)


@gpu
def test_mini_describes_photos_on_a_device_as_on_a_cpu(mini_weights: Path) -> None:
    pixels = torch.randint(0, 256, (150, 260, 260, 3), dtype=torch.uint8)
    tower, expected = (EfficientNetLite2.from_file(mini_weights, device=device) for device in ("cuda", "cpu"))
    rows = [tower.describe(pixels) for _ in range(2)]
    assert tower._cuda is not None
    assert tower._cuda._recording is not None
    # Not closer than a device's products of 19-bit floats (TF32), which convolutions take.
    for some in rows:
        assert (torch.cosine_similarity(some, expected.describe(pixels)) > 0.999).all()


@gpu
def test_what_cannot_be_recorded_on_a_device_is_launched() -> None:
    def compute(rows: torch.Tensor) -> torch.Tensor:
        return rows * int(rows.new_tensor(2))  # waits for the device, twice

    rows, data = CudaRows(compute, device=torch.device("cuda"), rows_per_part=4), torch.arange(22.0)[:, None]
    for _ in range(2):
        assert torch.equal(rows.run(data), data * 2)
        assert not rows._can_record
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert not torch.cuda.is_current_stream_capturing()
    torch.cuda.empty_cache()  # fails for as long as the allocator holds a recording to be under way


@gpu
def test_parts_that_do_not_fit_into_a_device_are_halved_until_they_do() -> None:
    row_bytes, limit_bytes = 2**24, 10 * 2**24

    def compute(rows: torch.Tensor) -> torch.Tensor:
        return rows.expand(-1, row_bytes // 4).contiguous().amax(1)

    rows, data = CudaRows(compute, device=torch.device("cuda"), rows_per_part=64), torch.arange(150.0)[:, None]
    torch.cuda.empty_cache()
    _, total_bytes = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + limit_bytes) / total_bytes)
    try:
        for _ in range(2):
            assert torch.equal(rows.run(data), data[:, 0])
        assert 1 <= rows._largest.rows <= 9
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@gpu
@pytest.mark.usefixtures("own_home")
def test_an_index_made_on_a_device_ranks_as_one_made_on_a_cpu(photos: Path, tmp_path: Path, cli: Cli) -> None:
    queries = sorted(str(file) for file in photos.rglob("*.jpg"))
    found: dict[str, list[dict[str, float]]] = {}
    for device in ("cpu", "cuda"):
        index = tmp_path / device
        assert cli("index", photos, "--index", index, "--model", "mini", "--device", device).code == 0
        options = ("-k", "20", "--index", index, "--device", "cpu", "--json")
        found[device] = [
            {hit["path"]: hit["score"] for hit in cli("search", "--like", query, *options).lines} for query in queries
        ]
    for on_cpu, on_gpu in zip(found["cpu"], found["cuda"], strict=True):
        assert on_cpu.keys() == on_gpu.keys()
        assert next(iter(on_cpu)) == next(iter(on_gpu))
        # The order may differ where scores do not.
        scores = np.array([on_cpu[path] for path in on_gpu])
        assert (np.diff(scores) < 5e-3).all()
        np.testing.assert_allclose(list(on_gpu.values()), scores, atol=5e-3)
