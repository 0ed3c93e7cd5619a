"""The trained heads of ``mini``: what two frozen towers say, brought into one space of 512 dimensions. numpy alone.

Each side gives two unit vectors and a weight g between 0 and 1 for the second of them, and the row is

    [ sqrt(1 - g) * caption part (312) , sqrt(g) * label part (200) ]

so that a cosine is the sum of two matches. On the text side a gate tells from the words how much each counts: a bare
name asks for the label part, a sentence for the caption part. All images share one weight.

- The caption part is learned from captioned photos: three small networks a side, each a line plus a hidden layer, whose
  unit outputs stand side by side, which makes their cosine the mean of three cosines.
- The label part keeps what the classifier knows of 1,000 classes. On the image side it is the mean of the names'
  sentence vectors, weighted by the probabilities of the ten likeliest; on the text side the query's own sentence
  vector; both through one fixed projection (Norouzi et al. 2014, https://arxiv.org/abs/1312.5650, call it ConSE).

A file holds these tensors, float16 or float32; n_i = 2048, n_t = 384, m networks of h hidden and d outputs:

    image.mean, image.deviation (n_i)      text.gate.weight (n_t)          *.gate.bias (1)
    *.linear.weight (m d, n)               *.linear.bias (m d)
    *.hidden.weight (m h, n)               *.hidden.bias (m h)             *.out.weight (m, h, d)
    labels (1000, 512 - m d)               projection (384, 512 - m d)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from searchengine.errors import UsageError, WeightsError
from searchengine.index.layout import write_durably
from searchengine.text import printable

FloatArray = NDArray[np.float32]

DIM = 512
POOLED, CLASSES, SENTENCE = 2048, 1000, 384
FEATURES = POOLED + CLASSES
LIKELIEST = 10
# A channel that no training photo drove this far out would otherwise speak louder than all others.
MAX_DEVIATIONS = 6.0
# Sentence vectors have length 1; times sqrt(384) their entries are about as large as standardised features.
SENTENCE_SCALE = float(np.sqrt(SENTENCE))

FORMAT, VERSION = "searchengine-mini-heads", 1
REMEDY = "give a file made by `searchengine train`; if it is the shipped one, reinstall searchengine"


@dataclass(frozen=True)
class Side:
    """One side's networks. linear (m d, n), hidden (m h, n), out (m, h, d)."""

    linear: FloatArray
    linear_bias: FloatArray
    hidden: FloatArray
    hidden_bias: FloatArray
    out: FloatArray

    def caption_part(self, x: FloatArray) -> FloatArray:
        """x: (n, n_i or n_t). Returns (n, m d), unit rows."""
        networks, width, outputs = self.out.shape
        hidden = np.maximum(x @ self.hidden.T + self.hidden_bias, 0)  # (n, m h)
        split = hidden.reshape(len(x), networks, width).transpose(1, 0, 2)  # (m, n, h)
        learned = np.matmul(split, self.out).transpose(1, 0, 2)  # (n, m, d)
        parts = (x @ self.linear.T + self.linear_bias).reshape(learned.shape) + learned
        return unit(unit(parts).reshape(len(x), networks * outputs))


@dataclass(frozen=True)
class MiniHeads:
    """Both sides, the label space that they share, and the learned inverse temperature."""

    image_side: Side
    text_side: Side
    image_gate_bias: FloatArray
    text_gate: FloatArray
    text_gate_bias: FloatArray
    mean: FloatArray
    deviation: FloatArray
    labels: FloatArray
    projection: FloatArray
    logit_scale: float

    @classmethod
    def load(cls, path: Path) -> MiniHeads:
        """Read what `save_heads` wrote. Raises WeightsError for anything else, or for values that are not finite."""
        try:
            with safe_open(str(path), framework="numpy") as file:
                facts = json.loads((file.metadata() or {}).get(FORMAT, "{}"))
                tensors = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise _unusable(path, f"cannot be read as safetensors ({error})") from error
        return cls.from_tensors(tensors, facts, path=path)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, NDArray[np.generic]], facts: Mapping[str, object], *, path: Path
    ) -> MiniHeads:
        """Check names, shapes and values. `path` is for messages. Raises WeightsError."""
        if not isinstance(facts, dict) or "version" not in facts:
            raise _unusable(path, "does not hold projection heads for mini")
        if facts["version"] != VERSION or facts.get("dim") != DIM:
            found = f"version {facts['version']}, dim {facts.get('dim')}"
            raise _unusable(path, f"holds heads of {found}, but this program reads version {VERSION}, dim {DIM}")
        logit_scale = facts.get("logit_scale")
        if not isinstance(logit_scale, float) or not 0 < logit_scale < float("inf"):
            raise _unusable(path, "lacks a positive logit_scale")
        taken = _Taker(tensors, path)
        sides = {name: taken.side(name, inputs) for name, inputs in (("image", POOLED), ("text", SENTENCE))}
        learned = len(sides["image"].linear)
        if learned != len(sides["text"].linear) or learned >= DIM:
            raise _unusable(path, f"has caption parts of {learned} and {len(sides['text'].linear)} dimensions")
        heads = cls(
            image_side=sides["image"],
            text_side=sides["text"],
            image_gate_bias=taken("image.gate.bias", 1),
            text_gate=taken("text.gate.weight", SENTENCE),
            text_gate_bias=taken("text.gate.bias", 1),
            mean=taken("image.mean", POOLED),
            deviation=taken("image.deviation", POOLED),
            labels=taken("labels", CLASSES, DIM - learned),
            projection=taken("projection", SENTENCE, DIM - learned),
            logit_scale=logit_scale,
        )
        if not np.all(heads.deviation > 0):
            raise _unusable(path, "has deviations that are not positive")
        return heads

    def image(self, features: FloatArray) -> FloatArray:
        """What `EfficientNetLite2.describe` gives, float32 (n, 3048) -> float32 (n, 512), unit rows.

        Raises UsageError for another shape, or for values that are not finite.
        """
        _check("image features", features, FEATURES)
        x = np.clip((features[:, :POOLED] - self.mean) / self.deviation, -MAX_DEVIATIONS, MAX_DEVIATIONS)
        label = unit(likeliest(features[:, POOLED:]) @ self.labels)
        return join(self.image_side.caption_part(x), label, self.image_gate_bias)

    def text(self, sentences: FloatArray) -> FloatArray:
        """Sentence vectors of MiniLM, float32 (n, 384), unit rows -> float32 (n, 512), unit rows.

        Raises UsageError for another shape, or for values that are not finite.
        """
        _check("sentence vectors", sentences, SENTENCE)
        x = sentences * np.float32(SENTENCE_SCALE)
        gate = (x @ self.text_gate + self.text_gate_bias).astype(np.float32, copy=False)
        return join(self.text_side.caption_part(x), unit(sentences @ self.projection), gate)


def join(caption: FloatArray, label: FloatArray, gate: FloatArray) -> FloatArray:
    """(n, m d) and (n, 512 - m d), unit rows, and the gate's logits (n,) or (1,) -> (n, 512), unit rows."""
    with np.errstate(over="ignore"):  # exp reaches infinity where the gate reaches 0
        share = 1 / (1 + np.exp(-gate))[:, None]  # (n, 1)
    row = np.concatenate([np.sqrt(1 - share) * caption, np.sqrt(share) * label], axis=1)
    return np.ascontiguousarray(unit(row), dtype=np.float32)


def likeliest(logits: FloatArray) -> FloatArray:
    """The probabilities of the ten likeliest classes, zero elsewhere. (n, 1000) -> (n, 1000)."""
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    tenth = np.partition(exp, -LIKELIEST, axis=1)[:, -LIKELIEST, None]
    kept: FloatArray = np.where(exp >= tenth, exp / exp.sum(axis=1, keepdims=True), 0).astype(np.float32)
    return kept


def unit(rows: FloatArray) -> FloatArray:
    """Scale to length 1 along the last axis; a row of zeros stays one."""
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    scaled: FloatArray = rows / np.maximum(lengths, np.float32(1e-12))
    return scaled


def save_heads(
    path: Path, tensors: Mapping[str, NDArray[np.generic]], *, logit_scale: float, counts: Mapping[str, int]
) -> None:
    """Write heads as float16, whole or not at all, after the checks of `MiniHeads.load`. Raises WeightsError."""
    with np.errstate(over="ignore"):  # what is too large for float16 becomes infinite, and the checks say so
        stored = {name: np.ascontiguousarray(tensor, dtype=np.float16) for name, tensor in sorted(tensors.items())}
    facts = {"version": VERSION, "dim": DIM, "logit_scale": logit_scale, **counts}
    MiniHeads.from_tensors(stored, facts, path=path)
    # One entry, because safetensors writes several in an order that changes from run to run.
    write_durably(path, save(stored, {FORMAT: json.dumps(facts, sort_keys=True)}))


class _Taker:
    """Tensors by name as float32, each held against the shape that is expected; None stands for any size."""

    def __init__(self, tensors: Mapping[str, NDArray[np.generic]], path: Path) -> None:
        self._tensors, self._path = tensors, path

    def __call__(self, name: str, *shape: int | None) -> FloatArray:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise _unusable(self._path, f"has no tensor {name}")
        fits = len(shape) == tensor.ndim and all(s in (None, t) for s, t in zip(shape, tensor.shape, strict=True))
        if not fits or tensor.dtype not in (np.float16, np.float32):
            raise _unusable(self._path, f"has {name} of shape {tensor.shape} and type {tensor.dtype}, expected {shape}")
        values = np.ascontiguousarray(tensor, dtype=np.float32).reshape(tensor.shape)
        if not np.all(np.isfinite(values)):
            raise _unusable(self._path, f"has values in {name} that are not finite")
        return values

    def side(self, name: str, inputs: int) -> Side:
        out = self(f"{name}.out.weight", None, None, None)
        networks, hidden, outputs = out.shape
        return Side(
            linear=self(f"{name}.linear.weight", networks * outputs, inputs),
            linear_bias=self(f"{name}.linear.bias", networks * outputs),
            hidden=self(f"{name}.hidden.weight", networks * hidden, inputs),
            hidden_bias=self(f"{name}.hidden.bias", networks * hidden),
            out=out,
        )


def _check(what: str, rows: FloatArray, width: int) -> None:
    if rows.ndim != 2 or rows.shape[1] != width:
        raise UsageError(f"{what} have shape {rows.shape}, expected (n, {width})")
    if not np.all(np.isfinite(rows)):
        raise UsageError(f"{what} hold values that are not finite; check where they came from")


def _unusable(path: Path, finding: str) -> WeightsError:
    return WeightsError(f"{printable(str(path))} {finding}; {REMEDY}")
