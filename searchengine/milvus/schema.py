"""How an index lies in Milvus: its collections, their fields, and texts as Milvus can keep them.

NAME_state           one row a fact: which collection has the photos, the commit, failures, labels, the writer's lease
NAME_<fingerprint>   one entity a photo, with its vector; its id is the photo's, `images.id` of a local index

Copies of a photo are several entities with one `vector_id`, and each holds the vector, for Milvus cannot join. The row
`state` of NAME_state names the collection of the photos together with the encoder and the number of the commit, so a
change of the model is one upsert, and a reader learns all three at once.

Fields without a fact are null. Expressions are said to take no null for anything, `not` of it neither; where that
matters, `is null` is asked for by name (expressions.py). Milvus 2.5 is the first that has nullable fields.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from searchengine.errors import IndexFormatError, IndexTooNew
from searchengine.index.layout import METRIC, PRECISIONS, IndexIdentity
from searchengine.index.photos import ImageRow
from searchengine.milvus.connection import REQUEST_SECONDS, Connection

if TYPE_CHECKING:
    from pymilvus import CollectionSchema

FORMAT_VERSION = 1

# Milvus allows so many bytes in a VARCHAR, elements in an ARRAY, hits of a search and rows of a query's page.
MAX_TEXT_BYTES = 65_535
MAX_TAGS_OF_A_PHOTO = 4096
MAX_HITS = 16_384

STATE = "state"
LAST_RUN = "last_run"
FAILURE, LABEL = "failure/", "label/"  # how the names of such rows begin
PART = "#"  # a value that is too long for a row goes on in rows of its name, this, and a number
NOTHING = [1.0, 0.0]  # the vector of each row of NAME_state

# Of an entity, what `ImageRow` holds, by the names of both.
ROW_FIELDS = tuple(field.name for field in fields(ImageRow))
# Texts of people and file systems, which are stored `escaped`; so is each of `tags`.
ESCAPED_FIELDS = frozenset({"store", "key", "etag", "camera"})
# What follows from other fields (`derived`) and serves expressions alone.
DERIVED_FIELDS = ("draw", "orientation", "camera_folded")
# What is looked up, or narrows a search to few of many.
INDEXED_FIELDS = (
    "vector_id",
    "content_hash",
    "key",
    "taken_at",
    "latitude",
    "longitude",
    "draw",
    "camera_folded",
)

# Of the indexes, by their kinds.
PARAMETERS: Mapping[str, dict[str, Any]] = {
    "FLAT": {"metric_type": "IP"},
    "HNSW": {"metric_type": "IP", "params": {"M": 16, "efConstruction": 200}},
    "INVERTED": {},
}

_ESCAPE = re.compile(r"[%\x00-\x1f\x7f\udc80-\udcff]")
_ESCAPED = re.compile(r"%([0-9a-f]{2})")


@dataclass(frozen=True, kw_only=True)
class State:
    """One committed state: the collection of its photos, what made their vectors, and how many there are.

    `commit` grows with every publication. `vectors` counts those of copies once.
    """

    collection: str
    commit: int
    identity: IndexIdentity
    images: int
    vectors: int
    format_version: int = FORMAT_VERSION

    def payload(self) -> str:
        """As the row `state` holds it."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def parse(cls, payload: str, *, place: str) -> State:
        """Raises IndexFormatError, IndexTooNew; `place` names the index in them."""
        try:
            read = json.loads(payload)
            if read["format_version"] > FORMAT_VERSION:
                raise IndexTooNew(
                    f"the index at {place} has format {read['format_version']}, this program knows up to "
                    f"{FORMAT_VERSION}; upgrade searchengine"
                )
            state = cls(**{**read, "identity": IndexIdentity(**read["identity"])})
        except (ValueError, TypeError, KeyError):
            raise damaged(place) from None
        identity = state.identity
        texts = (state.collection, identity.encoder, identity.fingerprint)
        numbers = (state.commit, state.images, state.vectors, identity.dim)
        if (
            not all(isinstance(text, str) for text in texts)
            or not all(type(number) is int and number >= 0 for number in numbers)
            or identity.metric != METRIC
            or identity.precision not in PRECISIONS
        ):
            raise damaged(place)
        return state


def damaged(place: str) -> IndexFormatError:
    return IndexFormatError(
        f"the index at {place} is damaged: it does not say what it holds; drop its collections in Milvus, or delete "
        f"its file, then index again as before, or copy a local one there: searchengine copy FOLDER {place}"
    )


def state_collection(name: str) -> str:
    return f"{name}_state"


def photos_collection(name: str, fingerprint: str) -> str:
    """Where the photos are whose vectors the encoder of that fingerprint made."""
    return f"{name}_{fingerprint[:8]}"


def escaped(text: str) -> str:
    """`text` as UTF-8 can hold it and an expression can name it, so that beginnings stay beginnings.

    Bytes that are not UTF-8 (PEP 383), control characters and % become %XX. `unescaped` gives exactly `text` again.
    """
    return _ESCAPE.sub(lambda found: f"%{ord(found[0]) & 0xFF:02x}", text)


def unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda found: _character(int(found[1], 16)), text)


def _character(byte: int) -> str:
    return chr(byte if byte < 0x80 else 0xDC00 + byte)


def folded(text: str) -> str:
    """In the case in which SQLite compares: of ASCII letters only."""
    return "".join(c.lower() if c.isascii() else c for c in text)


def orientation(width: int, height: int) -> str:
    return "landscape" if width > height else "portrait" if width < height else "square"


def draws(vector_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order (n,) in which vectors are drawn for a sample (`index.sampling`), as numbers that an INT64 holds."""
    from searchengine.index.sampling import hashes

    return (hashes(vector_ids) ^ np.uint64(1 << 63)).view(np.int64)


def draw_at(share: float) -> int:
    """Below it is that share of all draws, nearly."""
    return int(share * 2**64) - 2**63


def derived(*, vector_id: int, width: int, height: int, camera: str | None) -> dict[str, Any]:
    """The fields of an entity that serve expressions alone; `camera` as it is, not escaped."""
    return {
        "draw": int(draws(np.array([vector_id], np.int64))[0]),
        "orientation": orientation(width, height),
        "camera_folded": None if camera is None else escaped(folded(camera)),
    }


def photo_schema(dim: int) -> CollectionSchema:
    """Of the collection with the photos; vectors are float32 (dim,), unit."""
    from pymilvus import CollectionSchema, DataType, FieldSchema

    def text(name: str, *, nullable: bool = False) -> FieldSchema:
        return FieldSchema(name, DataType.VARCHAR, max_length=MAX_TEXT_BYTES, nullable=nullable)

    def several(name: str, kind: DataType, **limits: int) -> FieldSchema:
        return FieldSchema(name, DataType.ARRAY, element_type=kind, max_capacity=MAX_TAGS_OF_A_PHOTO, **limits)

    return CollectionSchema(
        [
            FieldSchema("id", DataType.INT64, is_primary=True),
            FieldSchema("vector_id", DataType.INT64),
            FieldSchema("content_hash", DataType.VARCHAR, max_length=64),
            FieldSchema("embedding", DataType.FLOAT_VECTOR, dim=dim),
            text("store"),
            text("key"),
            FieldSchema("size_bytes", DataType.INT64),
            FieldSchema("mtime_ns", DataType.INT64),
            text("etag", nullable=True),
            FieldSchema("width", DataType.INT64),
            FieldSchema("height", DataType.INT64),
            text("taken_at", nullable=True),
            FieldSchema("latitude", DataType.DOUBLE, nullable=True),
            FieldSchema("longitude", DataType.DOUBLE, nullable=True),
            text("camera", nullable=True),
            several("tags", DataType.VARCHAR, max_length=MAX_TEXT_BYTES),
            several("tag_probabilities", DataType.DOUBLE),
            FieldSchema("digest", DataType.VARCHAR, max_length=64),
            FieldSchema("draw", DataType.INT64),
            FieldSchema("orientation", DataType.VARCHAR, max_length=16),
            text("camera_folded", nullable=True),
        ],
        enable_dynamic_field=False,
    )


def state_schema() -> CollectionSchema:
    """Of NAME_state: `payload` is JSON as ASCII, which holds names that are not UTF-8, too."""
    from pymilvus import CollectionSchema, DataType, FieldSchema

    return CollectionSchema(
        [
            FieldSchema("name", DataType.VARCHAR, max_length=512, is_primary=True),
            FieldSchema("payload", DataType.VARCHAR, max_length=MAX_TEXT_BYTES),
            FieldSchema("nothing", DataType.FLOAT_VECTOR, dim=2),  # Milvus wants a vector in every collection
        ],
        enable_dynamic_field=False,
    )


def make_photos(connection: Connection, collection: str, *, dim: int) -> None:
    """An empty collection for photos. Milvus Lite compares every vector; a server searches a graph of them.

    Whoever wants another index of the vectors makes it with the tools of Milvus; searches go by what they find.
    """
    indexes = {"embedding": "FLAT" if connection.is_lite else "HNSW"} | dict.fromkeys(INDEXED_FIELDS, "INVERTED")
    if not connection.is_lite:  # which indexes no arrays
        indexes["tags"] = "INVERTED"
    _make(connection, collection, photo_schema(dim), indexes=indexes)


def make_state(connection: Connection, collection: str) -> None:
    """An empty NAME_state; Milvus loads no collection whose vectors have no index."""
    _make(connection, collection, state_schema(), indexes={"nothing": "FLAT"})


def _make(connection: Connection, collection: str, schema: CollectionSchema, *, indexes: Mapping[str, str]) -> None:
    client = connection.client
    with connection.errors_named():
        client.create_collection(collection, schema=schema, consistency_level="Bounded", timeout=REQUEST_SECONDS)
        for field, kind in indexes.items():
            one = client.prepare_index_params()
            one.add_index(field, index_type=kind, **PARAMETERS[kind])
            # There is nothing to index yet, and to wait for it would take half a second each.
            client.create_index(collection, one, sync=False, timeout=REQUEST_SECONDS)
    connection.load(collection)
