"""Reads the tensors of a file that torch.save or torch.jit.save wrote, and executes nothing of it.

Such a file is a zip with a pickle, `data.pkl`, that says which tensors there are, and their bytes in entries of their
own (https://pytorch.org/docs/stable/notes/serialization.html). A pickle may call any function by its name; here it gets
just those few below, none of which does more than note what it was called with. torch's own reader is as strict with
state dicts, but runs the code of TorchScript archives, which is what OpenAI published.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from searchengine.errors import WeightsError
from searchengine.models.tensors import Array, Bytes, NumberFormat
from searchengine.text import printable

FORMATS = {
    "HalfStorage": NumberFormat.FLOAT16,
    "BFloat16Storage": NumberFormat.BFLOAT16,
    "FloatStorage": NumberFormat.FLOAT32,
    "DoubleStorage": NumberFormat.FLOAT64,
    "LongStorage": NumberFormat.INT64,
    "IntStorage": NumberFormat.INT32,
    "BoolStorage": NumberFormat.BOOL,
    "ByteStorage": NumberFormat.UINT8,
}
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip's entry: its mark, the lengths of its name and of what follows it
MAX_PICKLE_BYTES = 4 * 2**20
MAX_CODE_BYTES = 16 * 2**20
MAX_DEPTH = 32
MAX_DIMENSIONS = 8
# What torch's two pickles are made of; none of these takes more memory than a few times its own bytes.
OPCODES = [
    getattr(pickle, name)[0]
    for name in (
        "PROTO STOP MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 NONE NEWTRUE NEWFALSE "
        "BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE GLOBAL NEWOBJ REDUCE BUILD BINPERSID "
        "BINPUT LONG_BINPUT BINGET LONG_BINGET SETITEM SETITEMS APPEND APPENDS"
    ).split()
]


class Storage(NamedTuple):
    numbers: NumberFormat
    key: str


class StoredTensor(NamedTuple):
    """Where a tensor lies in the archive: element numbers in its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Tree(dict[str, Any]):
    """Stands for an OrderedDict, or for an object of TorchScript's, whose attributes become its items."""

    def __init__(self) -> None:
        super().__init__()


class Archive:
    """The tensors of the file at `path`, by their dotted names; each is read when it is asked for.

    Raises WeightsError for a file that is damaged or holds what is no tensor.
    """

    metadata: ClassVar[dict[str, str]] = {}  # torch notes nothing

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[str, StoredTensor] = {}
        try:
            self._bytes: Bytes = np.asarray(np.memmap(path, np.uint8, mode="r"))
            self._zip = zipfile.ZipFile(path)
            entry = next((name for name in self._zip.namelist() if re.fullmatch(r"[^/]+/data\.pkl", name)), None)
            if entry is None:
                raise self._unusable("it is no archive of torch's")
            self._root = entry.partition("/")[0]
            content = _Unpickler(io.BytesIO(self._read(entry, MAX_PICKLE_BYTES))).load()
            self._tensors = dict(_flatten(content))
        except zipfile.BadZipFile:
            raise self._unusable("it is cut short or no archive of torch's") from None
        except (pickle.UnpicklingError, zlib.error, RuntimeError, OSError, EOFError, ValueError) as error:
            raise self._unusable(printable(str(error))) from None
        except (TypeError, AttributeError, LookupError, OverflowError) as error:
            raise self._unusable(f"its pickle makes no sense ({printable(str(error))})") from None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def mentions(self, text: str) -> bool:
        """Whether the source code that TorchScript keeps with its tensors, if there is any, contains `text`."""
        sources = (name for name in self._zip.namelist() if re.match(r"[^/]+/code/.*\.py$", name))
        try:
            return any(text.encode() in self._read(name, MAX_CODE_BYTES) for name in sources)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, OSError, EOFError, ValueError) as error:
            raise self._unusable(f"its code is damaged: {printable(str(error))}") from None

    def read(self, name: str) -> Array:
        """The tensor as it is stored, mapped and not to be written to; bfloat16 as float32.

        Raises WeightsError for damaged bytes.
        """
        tensor = self._tensors[name]
        try:
            data = self._content(f"{self._root}/data/{tensor.storage.key}")
            return tensor.storage.numbers.widened(_strided(data, tensor))
        except (KeyError, ValueError, TypeError, OverflowError, MemoryError, struct.error) as error:
            raise self._unusable(f"the bytes of {printable(name)} are damaged: {printable(str(error))}") from None

    def _content(self, entry: str) -> Bytes:
        """The bytes of an entry where they lie, when their CRC-32 has been checked. Raises KeyError, ValueError."""
        info = self._zip.getinfo(entry)
        if info.compress_type != zipfile.ZIP_STORED:  # torch's never are; else it may be a bomb
            raise ValueError("they are compressed")
        mark, name_bytes, extra_bytes = LOCAL_HEADER.unpack_from(self._bytes.data, info.header_offset)
        start = info.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
        content = self._bytes[start : start + info.file_size]
        if mark != b"PK\3\4" or info.flag_bits & 1 or len(content) != info.file_size:
            raise ValueError("they are not where the archive's directory says, or encrypted")
        if zlib.crc32(content.data) != info.CRC:
            raise ValueError("their CRC-32 is another")
        return content

    def _read(self, entry: str, limit_bytes: int) -> bytes:
        if self._zip.getinfo(entry).file_size > limit_bytes:
            raise ValueError(f"{printable(entry)} is over {limit_bytes} bytes, which no weights need")
        with self._zip.open(entry) as file:
            return file.read(limit_bytes)

    def _unusable(self, reason: str) -> WeightsError:
        return WeightsError(f"{printable(str(self._path))} cannot be used as weights: {reason}; fetch it again")


class _Unpickler(pickle._Unpickler):
    """The interpreter of pickles that is written in Python, less most of its opcodes.

    The one in C sets memory aside for the greatest index of the memo, and overflows its stack on nested keys.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        opcode: pickle._Unpickler.dispatch[opcode] for opcode in OPCODES
    }

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Tree) or not isinstance(state, dict):
            raise pickle.UnpicklingError("it gives a state to what has none")
        self.stack[-1].update(state)

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.BUILD[0]] = load_build

    def _set(self, items: list[Any]) -> None:
        names, values = items[::2], items[1::2]
        if not isinstance(self.stack[-1], dict) or not all(type(name) in (str, int) for name in names):
            raise pickle.UnpicklingError("it gives names that are none")
        self.stack[-1].update(zip(names, values, strict=True))

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in FORMATS:
            return FORMATS[name]
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return _rebuild_tensor if name == "_rebuild_tensor_v2" else _rebuild_parameter
        if (module, name) == ("collections", "OrderedDict"):
            return Tree
        if module == "__torch__" or module.startswith("__torch__."):
            return Tree
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a plain set of weights")

    def persistent_load(self, pid: Any) -> Storage:
        kind, numbers, key, _, _ = pid
        if kind != "storage" or not isinstance(numbers, NumberFormat) or not re.fullmatch(r"\w+", key):
            raise pickle.UnpicklingError("it names a storage that cannot be")
        return Storage(numbers, key)


def _rebuild_tensor(storage: Storage, offset: int, shape: Any, stride: Any, *_: Any) -> StoredTensor:
    shape, stride = tuple(shape), tuple(stride)
    if (
        not isinstance(storage, Storage)
        or not len(shape) == len(stride) <= MAX_DIMENSIONS
        or not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *shape, *stride))
    ):
        raise pickle.UnpicklingError("it describes a tensor that cannot be")
    if math.prod(shape) > 2**32:
        raise pickle.UnpicklingError("it describes a tensor of more than 2**32 values")
    return StoredTensor(storage, offset, shape, stride)


def _rebuild_parameter(tensor: StoredTensor, *_: Any) -> StoredTensor:
    return tensor


def _strided(data: Bytes, tensor: StoredTensor) -> Array:
    """The values of a tensor among its storage's bytes. Raises ValueError where they reach beyond."""
    values = data.view(tensor.storage.numbers.value)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
    if 0 in tensor.shape:
        return np.empty(tensor.shape, values.dtype)
    # numpy's own check of strides can be made to overflow.
    if last >= len(values) or math.prod(tensor.shape) > len(values):
        raise ValueError("there are fewer than it has values")
    size_bytes = values.itemsize
    # A step along a side of length 1 is never taken, and may be any number.
    strides = [step * size_bytes if n > 1 else 0 for n, step in zip(tensor.shape, tensor.stride, strict=True)]
    return np.ndarray(tensor.shape, values.dtype, values, tensor.offset * size_bytes, strides)


def _flatten(content: Any) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors in nested dicts, by the path of their names; what several dicts hold is found in the first."""
    seen: set[int] = set()

    def walk(value: Any, prefix: str, depth: int) -> Iterator[tuple[str, StoredTensor]]:
        if isinstance(value, StoredTensor):
            yield prefix, value
        elif isinstance(value, dict) and depth < MAX_DEPTH and id(value) not in seen:
            seen.add(id(value))
            for name, inner in value.items():
                yield from walk(inner, f"{prefix}.{name}" if prefix else str(name), depth + 1)

    return walk(content, "", 0)
