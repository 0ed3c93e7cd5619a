"""A linear probe: probabilities of classes that were learned from labelled photos, from their vectors alone.

softmax((vector @ weights.T + bias) / temperature): logistic regression (fitted in probe_fit.py), then temperature
scaling (Guo et al. 2017, https://arxiv.org/abs/1706.04599). numpy alone. A file is safetensors: `weights` and `bias`,
float32, and the facts as JSON with a sha256 over all of it. Nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from searchengine.errors import ModelMismatch, ModelNotFound, UsageError, WeightsError
from searchengine.filters import Filters
from searchengine.index.layout import write_durably
from searchengine.index.photos import ImageRow
from searchengine.index.protocol import PhotoIndex
from searchengine.text import printable
from searchengine.vectors import FloatMatrix, check_unit_rows

Probabilities = NDArray[np.float64]

FORMAT, VERSION = "searchengine-probe", 1
MAX_FILE_BYTES = 256 * 2**20
LARGEST = 1e9  # no number of a fit comes near; with larger ones probabilities would be none
FIT_AGAIN = "fit it again with `searchengine probe fit`"
VECTORS_PER_BLOCK = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """`weights` float32 (classes, dim), `bias` float32 (classes,). `encoder`, `precision` and `fingerprint` tell whose
    vectors it takes. `report` is what `fit` measured."""

    encoder: str
    precision: str
    fingerprint: str
    classes: tuple[str, ...]
    weights: FloatMatrix
    bias: FloatMatrix
    temperature: float
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        return int(self.weights.shape[1])

    def probabilities(self, vectors: FloatMatrix) -> Probabilities:
        """Unit rows float32 (n, dim) -> float64 (n, classes); each row adds up to 1. Raises UsageError."""
        logits = check_unit_rows(vectors, dim=self.dim) @ self.weights.T + self.bias
        return softmax(logits.astype(np.float64) / self.temperature)

    def check_encoder(self, *, name: str, fingerprint: str, dim: int, whose: str) -> None:
        """Raises ModelMismatch where `fingerprint` is not that of the probe's encoder; `whose` says what has it.

        Raises WeightsError where it is, but the encoder's vectors have another `dim` than the probe takes.
        """
        if fingerprint != self.fingerprint:
            raise ModelMismatch(
                f"the probe was fitted on vectors of the encoder {printable(self.encoder)} "
                f"({self.fingerprint[:12]}), but {whose} {printable(name)} ({fingerprint[:12]}); apply it to photos "
                f"with its own encoder, or fit another one"
            )
        if dim != self.dim:
            raise WeightsError(
                f"the probe takes vectors of {self.dim:,} dimensions, but {whose} {printable(name)}, which it names, "
                f"and that has {dim:,}; {FIT_AGAIN}"
            )


def softmax(logits: NDArray[np.float64]) -> Probabilities:
    """Along the last axis."""
    shares = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: Probabilities = shares / shares.sum(axis=-1, keepdims=True)
    return result


def classify_index(
    probe: Probe,
    index: PhotoIndex,
    *,
    filters: Filters | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[ImageRow, Probabilities]]:
    """Each photo of the index that passes `filters`, with its probabilities (classes,), from the stored vectors.

    In the order of the vectors' ids, then of the photos'. A vector that is not finite, which is damage that `verify`
    tells, is left out. Raises ModelMismatch if the index is of another encoder, WeightsError if the probe cannot be.
    """
    known = index.identity
    probe.check_encoder(name=known.encoder, fingerprint=known.fingerprint, dim=known.dim, whose="the index is of")
    table = index.snapshot().table
    ids = table.living_ids
    if filters:
        ids = ids[np.isin(ids, index.vector_ids(filters))]
    for start in range(0, len(ids), VECTORS_PER_BLOCK):
        on_progress(start, len(ids))
        some = ids[start : start + VECTORS_PER_BLOCK]
        vectors = table.gather(table.rows_of(some))
        sound = np.isfinite(vectors).all(axis=1)
        some, probabilities = some[sound], probe.probabilities(vectors[sound])
        photos, places = index.photos_of(some, filters=filters)
        rows = index.images(photos)
        for photo, place in zip(photos.tolist(), places.tolist(), strict=True):
            if photo in rows:  # else it went between the two readings
                yield rows[photo], probabilities[place]
    on_progress(len(ids), len(ids))


def save_probe(file: str | os.PathLike[str], probe: Probe, *, overwrite: bool = False) -> None:
    """Write it whole or not at all. Raises UsageError where `file` exists and may not be overwritten."""
    from safetensors.numpy import save

    check_writable(file, overwrite=overwrite)
    facts = {
        "version": VERSION,
        "encoder": probe.encoder,
        "precision": probe.precision,
        "fingerprint": probe.fingerprint,
        "classes": list(probe.classes),
        "temperature": probe.temperature,
        "report": probe.report,
    }
    weights, bias = (np.ascontiguousarray(part, np.float32) for part in (probe.weights, probe.bias))
    entry = json.dumps({"facts": facts, "sha256": _checksum(facts, weights, bias)}, sort_keys=True)
    write_durably(Path(file), save({"weights": weights, "bias": bias}, {FORMAT: entry}))


def check_writable(file: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Whether `file` can be made, before work is put into it. Raises UsageError."""
    shown = printable(os.fspath(file))
    if os.path.lexists(file) and not (overwrite and os.path.isfile(file)):
        remedy = "choose another name" if os.path.isdir(file) else "choose another name, or say --overwrite"
        raise UsageError(f"{shown} exists already; {remedy}")
    if not os.access(os.path.dirname(os.path.abspath(file)), os.W_OK | os.X_OK):
        raise UsageError(f"{shown} cannot be written: its folder does not exist or is not writable; choose another")


def load_probe(file: str | os.PathLike[str]) -> Probe:
    """Raises ModelNotFound where there is no such file, WeightsError where it is damaged or something else."""
    from safetensors import SafetensorError, safe_open

    shown = f"the probe {printable(os.fspath(file))}"
    try:
        found = os.stat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE_BYTES:
            raise WeightsError(f"{shown} is no file, or too large for one; {FIT_AGAIN}")
        with safe_open(os.fspath(file), framework="numpy") as opened:
            entry = (opened.metadata() or {}).get(FORMAT)
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ModelNotFound(f"{shown} does not exist; check the path, or {FIT_AGAIN}") from None
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"{shown} cannot be read ({printable(str(error))}); {FIT_AGAIN}") from None
    if entry is None:
        raise WeightsError(f"{shown} is no probe; name a file that `searchengine probe fit` wrote")
    try:
        content = json.loads(entry)
        facts, weights, bias = content["facts"], tensors["weights"], tensors["bias"]
        version = facts["version"]
        sound = content["sha256"] == _checksum(facts, weights, bias)
    except (ValueError, TypeError, KeyError, RecursionError, AttributeError):
        raise WeightsError(f"{shown} is damaged: it lacks what a probe holds; {FIT_AGAIN}") from None
    if version != VERSION:
        found_version = printable(str(version))
        raise WeightsError(f"{shown} is of version {found_version}, this program reads {VERSION}; {FIT_AGAIN}")
    if not sound or not _fits(facts, weights, bias):
        raise WeightsError(f"{shown} is damaged: its checksum does not hold; {FIT_AGAIN}")
    return Probe(
        encoder=facts["encoder"],
        precision=facts["precision"],
        fingerprint=facts["fingerprint"],
        classes=tuple(facts["classes"]),
        weights=weights,
        bias=bias,
        temperature=facts["temperature"],
        report=facts["report"],
    )


def _checksum(facts: dict[str, Any], weights: FloatMatrix, bias: FloatMatrix) -> str:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for part in (weights, bias):
        digest.update(f"{part.shape} {part.dtype}".encode() + part.tobytes())
    return digest.hexdigest()


def _fits(facts: dict[str, Any], weights: FloatMatrix, bias: FloatMatrix) -> bool:
    """Whether parts of the right checksum, which anyone can compute, make a probe."""
    texts = [facts.get(name) for name in ("encoder", "precision", "fingerprint")]
    classes, temperature = facts.get("classes"), facts.get("temperature")
    return (
        all(isinstance(text, str) for text in texts)
        and isinstance(classes, list)
        and all(isinstance(name, str) for name in classes)
        and isinstance(temperature, float)
        and 1 / LARGEST < temperature < LARGEST
        and weights.dtype == bias.dtype == np.float32
        and weights.ndim == 2
        and bias.shape == (len(classes),) == weights.shape[:1]
        and len(set(classes)) == len(classes) >= 2
        and all(bool(np.all(np.abs(part) < LARGEST)) for part in (weights, bias))
        and isinstance(facts.get("report"), dict)
    )
