"""Zero-shot classification: photos into classes that are only named, never trained for.

A label becomes a vector by way of prompts, and a photo belongs to the label whose vector is nearest: section 3.1.4 of
Radford et al. 2021 (https://arxiv.org/abs/2103.00020). Works with every encoder, each with its own learned scale.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from searchengine.decode import DEFAULT_LIMITS, DecodeLimits, decode_bytes
from searchengine.errors import ImageError, UsageError
from searchengine.index.protocol import Vectors
from searchengine.index.segments import Ids
from searchengine.index.table import Rows
from searchengine.resources import resource
from searchengine.stores import KnownStores
from searchengine.text import printable
from searchengine.vectors import Encoder, FloatMatrix, normalise

Probabilities = NDArray[np.float64]
Pixels = NDArray[np.uint8]

# `imagenet`: the 80 templates of OpenAI's notebook Prompt_Engineering_for_ImageNet. `simple`: the seven of them that
# its forward selection kept; they do a bit better than all 80, at a tenth of the cost.
SHIPPED_TEMPLATES = ("imagenet", "simple")
SLOT = "{}"

PROMPTS_PER_CALL = 1024
MAX_LIST_BYTES = 16 * 2**20

SCORES_PER_BLOCK, ROWS_PER_BLOCK_AT_LEAST = 4 * 2**20, 64
FEW_LABELS = 32  # up to so many are found sooner one after the other than by sorting all


class Likeliest(NamedTuple):
    """The likeliest labels of n photos, best first: their places among all (n, top), int64, and probabilities, float32.

    Of labels equally likely, the one that was named first comes first.
    """

    labels: NDArray[np.int64]
    probabilities: FloatMatrix


def class_vectors(
    encoder: Encoder,
    labels: Sequence[str],
    *,
    templates: Sequence[str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> FloatMatrix:
    """One vector a label: the mean of its prompts' unit vectors, scaled to length 1. float32 (n_labels, dim).

    The prompts of a label are all `templates` with it in the place of ``{}``. `on_progress` is told how many of the
    labels are done. Raises UsageError for what `check_labels` and `check_templates` refuse, and for a prompt that is
    too long for the encoder.
    """
    labels, templates = check_labels(labels), check_templates(templates)
    vectors = np.empty((len(labels), encoder.dim), dtype=np.float32)
    labels_per_call = max(1, PROMPTS_PER_CALL // len(templates))
    for start in range(0, len(labels), labels_per_call):
        some = labels[start : start + labels_per_call]
        prompts = [template.replace(SLOT, label) for label in some for template in templates]
        rows = normalise(encoder.encode_texts(prompts)).reshape(len(some), len(templates), encoder.dim)
        vectors[start : start + len(some)] = normalise(rows.mean(axis=1, dtype=np.float64))
        on_progress(start + len(some), len(labels))
    return vectors


def probabilities(image_vectors: FloatMatrix, class_vectors: FloatMatrix, *, logit_scale: float) -> Probabilities:
    """softmax(logit_scale * cosine) over the labels: (n_images, dim) and (n_labels, dim) -> (n_images, n_labels).

    Both sides have unit rows. `logit_scale` is the encoder's: 100 for the published CLIP models.
    """
    logits = logit_scale * (image_vectors @ class_vectors.T).astype(np.float64)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))  # the largest is 1: no overflow
    result: Probabilities = shares / shares.sum(axis=1, keepdims=True)
    return result


def likeliest(image_vectors: FloatMatrix, class_vectors: FloatMatrix, *, logit_scale: float, top: int) -> Likeliest:
    """The `top` largest of `probabilities`, in float32: for many photos and labels several times as fast.

    A vector that is not finite, which is damage, has probabilities that are not numbers.
    """
    with np.errstate(invalid="ignore"):
        shares = np.matmul(image_vectors, np.float32(logit_scale) * class_vectors.T)
        shares -= shares.max(axis=1, keepdims=True)
        np.exp(shares, out=shares)
        totals = shares.sum(axis=1, keepdims=True)
    top = min(top, len(class_vectors))
    if top > FEW_LABELS:
        labels = np.argsort(-shares, axis=1, kind="stable")[:, :top]
        return Likeliest(labels, np.take_along_axis(shares, labels, axis=1) / totals)
    labels = np.empty((len(shares), top), np.int64)
    best = np.empty((len(shares), top), np.float32)
    every = np.arange(len(shares))
    for place in range(top):
        labels[:, place] = shares.argmax(axis=1)
        best[:, place] = shares[every, labels[:, place]]
        shares[every, labels[:, place]] = -1
    return Likeliest(labels, best / totals)


def classify_stored(
    table: Vectors, rows: Rows, *, class_vectors: FloatMatrix, logit_scale: float, top: int
) -> Generator[tuple[Ids, Likeliest], None, None]:
    """The likeliest labels of stored vectors, some `rows` of `table`: ids (n,) and labels, a block at a time.

    Takes memory for a block of SCORES_PER_BLOCK scores, however many vectors there are.
    """
    rows_per_block = max(ROWS_PER_BLOCK_AT_LEAST, SCORES_PER_BLOCK // len(class_vectors))
    for start in range(0, len(rows), rows_per_block):
        some = rows[start : start + rows_per_block]
        yield table.ids_of(some), likeliest(table.gather(some), class_vectors, logit_scale=logit_scale, top=top)


def classify(
    paths: Iterable[str],
    *,
    encoder: Encoder,
    class_vectors: FloatMatrix,
    limits: DecodeLimits = DEFAULT_LIMITS,
    batch_size: int = 32,
    workers: int | None = None,
) -> Generator[tuple[str, Probabilities | ImageError], None, None]:
    """For each path, URL or ARCHIVE!/member, in order, its probabilities (n_labels,), or why it has none.

    Threads decode a few batches ahead of the encoder; `paths` is read no faster, so it may be of any length.
    """

    stores = KnownStores()

    def decode(path: str) -> Pixels | ImageError:
        try:
            data = stores.read_at(path, max_bytes=limits.max_file_bytes)
            return decode_bytes(data, image_size=encoder.image_size, limits=limits).pixels
        except ImageError as error:
            return error

    workers = workers or os.cpu_count() or 1
    with closing(_decoded_ahead(paths, decode, workers=workers, ahead=2 * batch_size + workers)) as decoded:
        while batch := list(islice(decoded, batch_size)):
            crops = [outcome for _, outcome in batch if not isinstance(outcome, ImageError)]
            vectors = encoder.encode_pixels(np.stack(crops)) if crops else np.empty((0, encoder.dim), np.float32)
            rows = iter(probabilities(vectors, class_vectors, logit_scale=encoder.logit_scale))
            for path, outcome in batch:
                yield path, outcome if isinstance(outcome, ImageError) else next(rows)


def split_labels(text: str) -> list[str]:
    """The labels in ``a,b,c``; blanks around them do not count. Raises UsageError."""
    return check_labels([label.strip() for label in text.split(",")])


def read_labels(file: str | os.PathLike[str]) -> list[str]:
    """The labels in a UTF-8 file, one a line, commas and all; empty lines do not count. Raises UsageError."""
    return check_labels(_lines_of(Path(file), "labels", remedy="check the path"))


def read_templates(name: str) -> list[str]:
    """The templates that ship as `name` (`SHIPPED_TEMPLATES`), else those in the file `name`, one a line.

    Raises UsageError.
    """
    file = resource(f"templates/{name}.txt") if name in SHIPPED_TEMPLATES else Path(name)
    remedy = f"give {', '.join(SHIPPED_TEMPLATES)} or a file"
    return check_templates(_lines_of(file, "templates", remedy=remedy))


def check_labels(labels: Sequence[str]) -> list[str]:
    """The labels as a list. Raises UsageError where there is none, one is empty, or two are the same."""
    if isinstance(labels, str):  # a sequence too, of its letters
        raise UsageError("labels is one text; give a list of labels")
    if not labels:
        raise UsageError("there are no labels; name at least one class")
    if not all(label.strip() for label in labels):
        raise UsageError("a label is empty; take out the comma or the entry too many")
    label, count = Counter(labels).most_common(1)[0]
    if count > 1:
        raise UsageError(f"the label {label!r} is given {count} times; give each label once")
    return list(labels)


def check_templates(templates: Sequence[str]) -> list[str]:
    """The templates as a list. Raises UsageError where there is none, or one has no ``{}`` for the label."""
    if isinstance(templates, str):
        raise UsageError("templates is one text; give a list of templates")
    if not templates:
        raise UsageError("there are no templates; give at least one, such as 'a photo of a {}.'")
    for template in templates:
        if SLOT not in template:
            raise UsageError(f"the template {template!r} has no {SLOT}, the place of the label; put one in")
    return list(templates)


def _lines_of(file: Path, what: str, *, remedy: str) -> list[str]:
    """The lines that are not empty, without the blanks around them. Raises UsageError."""
    shown = f"the {what} file {printable(str(file))}"
    try:
        with open(file, "rb") as opened:  # a pipe will do
            content = opened.read(MAX_LIST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{shown} cannot be read: {error.strerror}; {remedy}") from None
    if len(content) > MAX_LIST_BYTES:
        raise UsageError(f"{shown} is larger than {MAX_LIST_BYTES:,} bytes; give a text file with one entry a line")
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UsageError(f"{shown} is not UTF-8 in line {line}; save it as UTF-8") from None
    entries = [line.strip() for line in lines if line.strip()]
    if not entries:
        raise UsageError(f"{shown} is empty; write one entry a line")
    return entries


def _decoded_ahead(
    paths: Iterable[str], decode: Callable[[str], Pixels | ImageError], *, workers: int, ahead: int
) -> Generator[tuple[str, Pixels | ImageError], None, None]:
    """Each path with what `decode` makes of it, in order, at most `ahead` of them under way."""
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        under_way: deque[tuple[str, Future[Pixels | ImageError]]] = deque()
        try:
            for path in paths:
                under_way.append((path, pool.submit(decode, path)))
                if len(under_way) >= ahead:
                    first, future = under_way.popleft()
                    yield first, future.result()
            for first, future in under_way:
                yield first, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
