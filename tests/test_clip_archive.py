"""Archives of torch's: honest ones give what torch.load gives, and hostile ones run nothing and raise WeightsError."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_references import little_memory_and_time
from conftest import QUICK
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from searchengine.errors import WeightsError
from searchengine.models.clip.archive import Archive


@pytest.fixture(autouse=True)
def bounds() -> Iterator[None]:
    with little_memory_and_time():
        yield


# --- archives from raw pickles


def found(module: str, name: str) -> bytes:
    """What find_class is asked for."""
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def literal(value: object) -> bytes:
    """The opcodes of a plain value, without the frame around them."""
    return pickle.dumps(value, 2)[2:-1]


def sequence(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + sequence(*arguments) + b"R"


def storage(*, dtype: str = "FloatStorage", key: object = "0", kind: object = "storage") -> bytes:
    return sequence(literal(kind), found("torch", dtype), literal(key), literal("cpu"), literal(4)) + b"Q"


def tensor(
    *, at: bytes | None = None, offset: object = 0, shape: object = (2, 2), stride: object = (2, 1), dtype: str = ""
) -> bytes:
    at = storage(dtype=dtype or "FloatStorage") if at is None else at
    rest = (literal(offset), literal(shape), literal(stride), literal(False), call(ORDERED))
    return call(REBUILD, at, *rest)


def mapping(**values: bytes) -> bytes:
    return b"}(" + b"".join(literal(name) + value for name, value in values.items()) + b"u"


REBUILD = found("torch._utils", "_rebuild_tensor_v2")
PARAMETER = found("torch._utils", "_rebuild_parameter")
ORDERED = found("collections", "OrderedDict")
MODULE = found("__torch__.a", "B")
NEW_MODULE = MODULE + b")\x81"
FOUR_FLOATS = struct.pack("<4f", 1, 2, 3, 4)


def write(path: Path, body: bytes, *, data: bytes = FOUR_FLOATS, compression: int = zipfile.ZIP_STORED) -> Path:
    """An archive whose pickle is `body`, and whose storage 0 holds `data`."""
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        archive.writestr("archive/data/0", data)
        archive.writestr("archive/version", "3\n")
    return path


def read_all(path: Path) -> dict[str, Tensor]:
    archive = Archive(path)
    tensors = {name: torch.from_numpy(np.array(archive.read(name))) for name in archive.shapes}
    for name, shape in archive.shapes.items():
        assert tuple(tensors[name].shape) == shape
    return tensors


def assert_refused(path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be used as weights") as caught:
        read_all(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_raw_pickles_of_these_tests_are_read_where_nothing_is_wrong_with_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", mapping(weight=tensor()))
    assert torch.equal(read_all(path)["weight"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert torch.equal(torch.load(path, weights_only=True)["weight"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))


# --- honest archives


def storages() -> st.SearchStrategy[Tensor]:
    floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    integers = (torch.int64, torch.int32, torch.uint8, torch.bool)
    return st.builds(
        lambda dtype, count, seed: torch.randint(0, 100, (count,), generator=torch.Generator().manual_seed(seed)).to(
            dtype
        ),
        st.sampled_from([*floats, *integers]),
        st.integers(1, 60),
        st.integers(0, 99),
    )


@st.composite
def views(draw: st.DrawFn) -> list[Tensor]:
    """Of one storage: parts that overlap, steps, transposes, a single value, nothing."""
    whole = draw(storages())
    found_views = [whole]
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(whole)))
        part = whole[start : draw(st.integers(start, len(whole))) : draw(st.integers(1, 3))]
        rows = draw(st.sampled_from([n for n in range(1, len(part) + 1) if len(part) % n == 0] or [1]))
        found_views.append(part.view(rows, -1).T if len(part) else part)
    return [*found_views, whole[draw(st.integers(0, len(whole) - 1))]]


@settings(max_examples=60)
@given(st.lists(views(), min_size=1, max_size=4))
def test_tensors_equal_those_that_torch_loads(tmp_path_factory: pytest.TempPathFactory, groups: list[Any]) -> None:
    path = Path(QUICK or tmp_path_factory.getbasetemp()) / f"searchengine-archive-{os.getpid()}.pt"
    state = {f"group{a}.view{b}": view for a, group in enumerate(groups) for b, view in enumerate(group)}
    try:
        torch.save(state, path)
        theirs, ours = torch.load(path, weights_only=True), read_all(path)
    finally:
        path.unlink()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        value = value.float() if value.dtype == torch.bfloat16 else value  # numpy has no such numbers
        assert ours[name].dtype == value.dtype
        assert ours[name].shape == value.shape
        assert torch.equal(ours[name], value)


def test_names_are_the_path_through_nested_dicts(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    inner = OrderedDict(weight=torch.ones(2), steps=7, parameter=torch.nn.Parameter(torch.zeros(3)))
    torch.save({"epoch": 3, "state_dict": {"module.a": inner, 5: torch.zeros(1)}, "none": None, "list": [1.5]}, path)
    assert Archive(path).shapes == {
        "state_dict.module.a.weight": (2,),
        "state_dict.module.a.parameter": (3,),
        "state_dict.5": (1,),
    }


def test_a_modules_own_state_dict_is_read(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(module.state_dict(), tmp_path / "a.pt")
    tensors = read_all(tmp_path / "a.pt")
    assert set(tensors) == set(module.state_dict())
    assert torch.equal(tensors["0.weight"], module[0].weight)


def test_a_torchscript_archive_gives_its_tensors_and_not_its_program(tmp_path: Path) -> None:
    class Doubling(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(3, 2)
            self.register_buffer("steps", torch.tensor(7))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x) * 2.5
            return y

    module = Doubling().half()
    torch.jit.script(module).save(str(tmp_path / "a.pt"))
    tensors = read_all(tmp_path / "a.pt")
    assert {name: value.dtype for name, value in tensors.items()} == {
        "inner.weight": torch.float16,
        "inner.bias": torch.float16,
        "steps": torch.int64,
    }
    assert torch.equal(tensors["inner.weight"], module.inner.weight)
    archive = Archive(tmp_path / "a.pt")
    assert archive.mentions("2.5")
    assert not archive.mentions("1.702")


# --- what a pickle asks for


@pytest.mark.parametrize(
    "module, name",
    [
        ("os", "system"),
        ("posix", "system"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("__builtin__", "eval"),
        ("subprocess", "Popen"),
        ("torch", "load"),
        ("torch", "FloatTensor"),
        ("torch.hub", "load"),
        ("torch._utils", "_rebuild_device_tensor_from_numpy"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch.jit._pickle", "build_intlist"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections", "defaultdict"),
        ("__torch__evil", "B"),
        ("__torch", "B"),
        ("searchengine.models.clip.archive", "Archive"),
        ("", ""),
    ],
)
def test_a_function_that_no_weights_need_is_refused_and_not_called(module: str, name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    argument = f"__import__('os').system('touch {canary}')" if name in ("eval", "exec") else f"touch {canary}"
    called = call(found(module, name), literal(argument))
    stacked = literal(module) + literal(name) + b"\x93" + sequence(literal(argument)) + b"R"
    instance = b"(" + literal(argument) + b"i" + module.encode() + b"\n" + name.encode() + b"\n"
    for body in (called, stacked, instance, mapping(weight=called), call(ORDERED) + called + b"b"):
        assert_refused(write(tmp_path / "a.pt", body))
    assert not canary.exists()


def test_a_pickle_that_python_made_of_an_object_with_a_reduce_is_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Malice:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
            return os.system, (f"touch {canary}",)

    for number in range(pickle.HIGHEST_PROTOCOL + 1):
        pickled = pickle.dumps({"weight": Malice()}, number)
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
        assert_refused(tmp_path / "a.pt")
    torch.save({"weight": Malice()}, tmp_path / "b.pt")
    assert_refused(tmp_path / "b.pt")
    assert not canary.exists()


HUGE = 10**30
UNFIT: dict[str, bytes] = {
    "nothing": b"",
    "no end": literal("abc") + b"0",
    "unknown opcode": b"\xff",
    "negative size": mapping(w=tensor(shape=(-2, 2))),
    "negative stride": mapping(w=tensor(stride=(-2, 1))),
    "negative offset": mapping(w=tensor(offset=-1)),
    "offset beyond the storage": mapping(w=tensor(offset=3)),
    "shape beyond the storage": mapping(w=tensor(shape=(3, 2))),
    "stride beyond the storage": mapping(w=tensor(stride=(3, 1))),
    "more values than the storage": mapping(w=tensor(shape=(1000, 1000), stride=(0, 0))),
    "offset that overflows": mapping(w=tensor(offset=2**63 - 1)),
    "stride that overflows": mapping(w=tensor(stride=(2**62, 2**62))),
    "stride beyond int64": mapping(w=tensor(stride=(HUGE, 1))),
    "offset beyond int64": mapping(w=tensor(offset=HUGE)),
    "shape beyond int64": mapping(w=tensor(shape=(HUGE, 0), stride=(0, 1))),
    "shape that wraps around": mapping(w=tensor(shape=(2**32, 2**32), stride=(0, 0))),
    "boolean sizes": mapping(w=tensor(shape=(True, True), stride=(True, True))),
    "fractional sizes": mapping(w=tensor(shape=(2.0, 2.0))),
    "text as a shape": mapping(w=tensor(shape="22", stride="21")),
    "nothing as a shape": mapping(w=tensor(shape=None)),
    "shape and stride of unequal length": mapping(w=tensor(stride=(1,))),
    "a shape of a million sizes": mapping(w=tensor(shape=(2,) * 10**6, stride=(0,) * 10**6)),
    "a shape of a million huge sizes": mapping(w=tensor(shape=(2**31 - 1,) * 10**6, stride=(0,) * 10**6)),
    "no storage": mapping(w=tensor(at=literal(None))),
    "a word for a storage": mapping(w=tensor(at=literal("0"))),
    "a module for a storage": mapping(w=tensor(at=NEW_MODULE)),
    "an unknown dtype": mapping(w=tensor(at=storage(dtype="ComplexFloatStorage"))),
    "a key with a path": mapping(w=tensor(at=storage(key="../data.pkl"))),
    "an absolute key": mapping(w=tensor(at=storage(key="/etc/passwd"))),
    "a key of another type": mapping(w=tensor(at=storage(key=7))),
    "a key that is not there": mapping(w=tensor(at=storage(key="1"))),
    "another kind": mapping(w=tensor(at=storage(kind="module"))),
    "a short persistent id": mapping(w=literal(("storage",)) + b"Q"),
    "a persistent id that is none": mapping(w=literal(None) + b"Q"),
    "a textual persistent id": mapping(w=b"P0\n"),
    "no arguments": mapping(w=call(REBUILD)),
    "a dtype that is called": mapping(w=call(found("torch", "FloatStorage"), literal(1))),
    "a module with arguments": mapping(w=call(MODULE, literal(1))),
    "an extension": b"\x82\x01",
    "a memo that is not there": b"h\x07",
    "a memo beyond memory": literal(1) + b"p" + b"1" * 18 + b"\n",
    "a word beyond memory": b"\x8d" + struct.pack("<Q", 2**63),
    "a long word": b"\x8d" + struct.pack("<Q", 2**40),
    "bytes beyond memory": b"\x8e" + struct.pack("<Q", 2**63),
    "an array of bytes beyond memory": b"\x96" + struct.pack("<Q", 2**62),
    "an array of many bytes": b"\x96" + struct.pack("<Q", 2**40),
    "a frame of many bytes": b"\x95" + struct.pack("<Q", 2**40),
    "too long a number": b"I" + b"9" * 10**5 + b"\n",
    "a number as a name, too long to show": b"}" + literal(10**5000) + tensor() + b"s",
    "a list as a name": b"}" + b"]" + tensor() + b"s",
    "state for a shape": mapping(w=tensor() + mapping(shape=literal((-5, 2))) + b"b"),
    "state for the shape's type": mapping(w=tensor() + mapping(shape=literal(5)) + b"b"),
    "state for an offset": mapping(w=tensor() + mapping(offset=literal("x")) + b"b"),
    "state for a storage": mapping(w=tensor(at=storage() + mapping(dtype=literal("x")) + b"b")),
    "state for a key": mapping(w=tensor(at=storage() + mapping(key=literal("../data.pkl")) + b"b")),
    "state for a function": mapping(w=REBUILD + literal((None, {"__code__": 1})) + b"b"),
    "state for a class": mapping(w=MODULE + literal({"a": 1}) + b"b"),
}  # fmt: skip


@pytest.mark.parametrize("body", UNFIT.values(), ids=UNFIT)
def test_a_pickle_of_nonsense_is_refused(body: bytes, tmp_path: Path) -> None:
    assert_refused(write(tmp_path / "a.pt", body))


def test_a_number_of_bytes_that_is_no_number_of_values_is_refused(tmp_path: Path) -> None:
    assert_refused(write(tmp_path / "a.pt", mapping(w=tensor()), data=FOUR_FLOATS[:-1]))
    assert_refused(write(tmp_path / "a.pt", mapping(w=tensor()), data=b""))


@pytest.mark.parametrize(
    "body",
    [
        b"}q\x00" + literal("a") + b"h\x00s",
        b"}q\x00(" + literal("a") + b"h\x00" + literal("b") + b"h\x00" + literal("w") + tensor() + b"u",
        NEW_MODULE + b"q\x00}" + literal("a") + b"h\x00sb",
        b"".join(b"}" + literal("a") for _ in range(100)) + tensor() + b"s" * 100,
        b"]" * 10**5 + b"a" * (10**5 - 1),
        literal(1) + b"r" + struct.pack("<I", 2**32 - 1),
        literal(1) + b"r" + struct.pack("<I", 2**28),
        mapping(w=call(ORDERED) + mapping(items=MODULE) + b"b"),
        literal(3),
        literal([1, {"a": 2}]),
        NEW_MODULE + literal(7) + b"b",
        NEW_MODULE + literal({1: 2}) + b"b",
    ],
    ids=(
        "self|self twice|module|deep|deep list|huge memo|large memo|hidden method|number|nested|odd state|odd names"
    ).split("|"),
)
def test_circles_depths_and_other_values_end_without_tensors_or_are_refused(body: bytes, tmp_path: Path) -> None:
    try:
        tensors = read_all(write(tmp_path / "a.pt", body))
    except WeightsError:
        return
    assert len(tensors) <= 40


def test_dicts_that_share_their_parts_do_not_multiply(tmp_path: Path) -> None:
    """Each of 30 dicts holds the next twice: 2**30 paths."""
    body = mapping(w=tensor()) + b"q\x00"
    for number in range(30):
        body += b"}(" + literal("a") + b"h" + bytes([number]) + literal("b") + b"h" + bytes([number])
        body += b"uq" + bytes([number + 1])
    try:
        tensors = read_all(write(tmp_path / "a.pt", body))
    except WeightsError:
        return
    assert len(tensors) <= 40


def test_a_name_nested_too_deep_to_be_hashed_does_not_crash_the_process(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", b"}" + b")" + b"\x85" * 10**6 + literal(1) + b"s")
    program = (
        "import sys, pathlib\n"
        "from searchengine.errors import WeightsError\n"
        "from searchengine.models.clip.archive import Archive\n"
        "try:\n    Archive(pathlib.Path(sys.argv[1]))\n"
        "except WeightsError:\n    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr[-500:]


# --- bombs and damage


@pytest.mark.parametrize("filler", [b"}", b"]", b"\x8f", b"N0"], ids=["dicts", "lists", "sets", "nothings"])
def test_a_small_file_that_unpickles_to_gigabytes_is_refused(filler: bytes, tmp_path: Path) -> None:
    body = filler * (60 * 2**20 // len(filler))
    path = write(tmp_path / "a.pt", body, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**20
    assert_refused(path)


def test_a_pickle_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as file:
            for _ in range(1024):
                file.write(bytes(2**20))
    assert_refused(path)
    lie = bytearray(path.read_bytes())
    at = lie.rindex(b"PK\x01\x02")
    lie[at + 24 : at + 28] = struct.pack("<I", 1000)  # its size, as the zip's directory tells
    path.write_bytes(lie)
    assert_refused(path)


def test_a_storage_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + mapping(w=tensor()) + b".")
        with archive.open("archive/data/0", "w", force_zip64=True) as file:
            for _ in range(1024):
                file.write(bytes(2**20))
    assert path.stat().st_size < 2**23
    assert_refused(path)


def test_code_that_unpacks_to_gigabytes_or_is_damaged_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + mapping(w=tensor()) + b".")
        with archive.open("archive/code/__torch__/a.py", "w", force_zip64=True) as file:
            for _ in range(1024):
                file.write(bytes(2**20))
    with pytest.raises(WeightsError):
        Archive(path).mentions("1.702")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + mapping(w=tensor()) + b".")
        archive.writestr("archive/code/__torch__/a.py", "a program")
    path.write_bytes(path.read_bytes().replace(b"a program", b"a problem"))
    with pytest.raises(WeightsError):
        Archive(path).mentions("1.702")


@pytest.mark.parametrize(
    "names", [[], ["data.pkl"], ["a/b/data.pkl"], ["archive/constants.pkl"], ["model.safetensors"]]
)
def test_a_zip_without_a_pickle_where_torch_puts_it_is_refused(names: list[str], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name in names:
            archive.writestr(name, b"\x80\x02}.")
    assert_refused(tmp_path / "a.pt")


def test_an_archive_with_a_password_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt", mapping(w=tensor()))
    content = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(mark)
        while at >= 0:
            content[at + place] |= 1
            at = content.find(mark, at + 1)
    path.write_bytes(content)
    assert_refused(path)


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("honest") / "a.pt"
    generator = torch.Generator().manual_seed(0)
    torch.save({f"layer{n}.weight": torch.randn(4, 5, generator=generator).half() for n in range(8)}, path)
    return path.read_bytes()


@settings(max_examples=150)
@given(cut=st.floats(0, 1, exclude_max=True))
def test_an_archive_cut_short_anywhere_is_refused(
    honest: bytes, cut: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.pt"
    path.write_bytes(honest[: int(cut * len(honest))])
    assert_refused(path)


def test_a_flipped_bit_of_a_tensor_is_noticed(honest: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(honest)
    rng = random.Random(0)
    expected = read_all(path)
    with zipfile.ZipFile(path) as archive:
        starts = [info.header_offset for info in archive.infolist() if "/data/" in info.filename]
    for start in starts:
        length = sum(struct.unpack("<HH", honest[start + 26 : start + 30]))
        at = start + 30 + length + rng.randrange(40)
        path.write_bytes(honest[:at] + bytes([honest[at] ^ 1 << rng.randrange(8)]) + honest[at + 1 :])
        assert_refused(path)
    assert len(starts) == len(expected) == 8


@settings(max_examples=300)
@given(seed=st.integers(0, 2**31))
def test_random_damage_is_refused_or_changes_nothing(
    honest: bytes, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = random.Random(seed)
    damaged = bytearray(honest)
    for _ in range(rng.choice([1, 1, 2, 8])):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(honest)
    expected = read_all(path)
    path.write_bytes(damaged)
    try:
        tensors = read_all(path)
    except WeightsError:
        return
    for name, value in tensors.items():
        assert name in expected and torch.equal(value, expected[name])


@settings(max_examples=400)
@given(seed=st.integers(0, 2**31))
def test_a_random_change_of_the_pickle_is_refused_or_read_as_it_stands(
    honest: bytes, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The zip is whole here and vouches for the changed pickle, so that it is the pickle's reader that is tried."""
    rng = random.Random(seed)
    with zipfile.ZipFile(io.BytesIO(honest)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    changed = bytearray(entries["a/data.pkl"])
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(2, len(changed))
        kind = rng.randrange(4)
        if kind == 0:
            changed[at] = rng.randrange(256)
        elif kind == 1:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del changed[at : at + rng.randrange(1, 20)]
        else:
            other = rng.randrange(2, len(changed))
            changed[at:at] = changed[other : other + rng.randrange(1, 60)]
    path = tmp_path_factory.getbasetemp() / "changed.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, bytes(changed) if name == "a/data.pkl" else content)
    try:
        read_all(path)
    except WeightsError as error:
        assert "\n" not in str(error)
