"""What the run and its workers say to each other: names, numbers and vectors, never photos."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from indexer.report import Stage
from searchengine.decode import DecodeLimits
from searchengine.errors import SearchEngineError
from searchengine.metadata import PhotoMetadata
from searchengine.stores import StoredPhoto
from searchengine.vectors import Encoder, FloatMatrix


@dataclass(frozen=True, kw_only=True)
class EncoderSource:
    """Which encoder to load. `models_folder` is the folder of weights on the worker's machine."""

    name: str
    precision: str = "fp32"
    models_folder: Path | None = None

    def load(self, device: str) -> Encoder:
        """Raises ModelUnusable and its kin, UsageError."""
        from searchengine.models.registry import load_encoder

        return load_encoder(self.name, device=device, precision=self.precision, models_folder=self.models_folder)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a worker is told once. `fingerprint`: that of the run's encoder; the worker's must be the same.

    `batch_size`: photos that the encoder takes at once; on a GPU it is more where that suits it better.
    """

    source: EncoderSource
    fingerprint: str
    device: str
    decoders: int
    batch_size: int
    limits: DecodeLimits
    isolated: bool


@dataclass(frozen=True, slots=True)
class LeasedPhoto:
    """A photo by its names. `known`: whether the index has one of that name."""

    store: str
    listed: StoredPhoto
    known: bool


@dataclass(frozen=True, slots=True)
class Lease:
    """Photos for one worker to take up, by their positions in it."""

    number: int
    photos: dict[int, LeasedPhoto]


@dataclass(frozen=True, slots=True)
class Answer:
    """Which contents of the last `Question` the index has, or is about to have."""

    known: frozenset[bytes]


ToWorker = Lease | Answer


@dataclass(frozen=True, slots=True)
class Ready:
    """The worker has its encoder."""


@dataclass(frozen=True, slots=True)
class Question:
    """Contents, by their hashes, that the worker would decode unless they are known."""

    hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Embedded:
    """New content. Its vector is the row of the same place in `Findings.embeddings`."""

    content_hash: bytes
    metadata: PhotoMetadata


@dataclass(frozen=True, slots=True)
class Recognised:
    """Its content is known, by the last answer or because its twin was embedded before it."""

    content_hash: bytes
    metadata: PhotoMetadata


@dataclass(frozen=True, slots=True)
class Unusable:
    """`damaged` tells broken content from a file that could just not be read."""

    reason: str
    damaged: bool


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of a photo of a lease; `listed` is of the moment of reading."""

    lease: int
    position: int
    listed: StoredPhoto
    what: Embedded | Recognised | Unusable


@dataclass(frozen=True, kw_only=True)
class Findings:
    """`embeddings` has a unit row, float32, for each of `findings` that is `Embedded`, in their order.

    `seconds`: how long each stage of the worker has worked since the findings before.
    """

    findings: list[Finding]
    embeddings: FloatMatrix
    seconds: dict[Stage, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Refused:
    """The worker cannot do this run's work at all, and no other one in its place could."""

    error: SearchEngineError


@dataclass(frozen=True, slots=True)
class Lost:
    """The worker has ended, or is about to: another one in its place may do better."""

    reason: str


ToRun = Ready | Question | Findings | Refused | Lost
