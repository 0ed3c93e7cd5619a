"""What the encoder is given for a query text: the text itself, but for a bare word, prompts with the word in them.

Encoders learned from whole sentences, so "dog" alone is an unusual text to them, and several sentences around it find
more dogs (section 3.1.4 of Radford et al. 2021, https://arxiv.org/abs/2103.00020). `scripts/quality.py` measures it:
docs/quality.md. For two words or more the gain is not beyond chance, so those stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from searchengine.models.published import PUBLISHED
from searchengine.vectors import Encoder, FloatMatrix, normalise

SLOT = "{}"

# Chosen on photos of Flickr8k's train split, held against its dev split and COCO.
MINI_PROMPTS = (
    "there is a {}.",
    "there is a {} in the picture.",
    "a photo of a {}.",
    "a picture of {}.",
)
CLIP_PROMPTS = ("a photo of a {}.",)  # the paper's own

_WORD = re.compile(r"[A-Za-zÀ-ɏ]+(?:['-][A-Za-zÀ-ɏ]+)*")  # the prompts are English


def prompts_of(encoder_name: str) -> tuple[str, ...]:
    """The prompts for a bare word, with ``{}`` in its place; only the word for an encoder of which none is measured."""
    if encoder_name == "mini":
        return MINI_PROMPTS
    return CLIP_PROMPTS if encoder_name in PUBLISHED else (SLOT,)


def query_texts(text: str, *, encoder_name: str) -> list[str]:
    """What stands for the query `text`: the encoder's prompts around a single word, else the text alone."""
    word = text.strip()
    if not _WORD.fullmatch(word):
        return [text]
    return [prompt.replace(SLOT, word) for prompt in prompts_of(encoder_name)]


def query_vectors(texts: Sequence[str], *, encoder: Encoder) -> FloatMatrix:
    """One unit vector a query text, float32 (n, dim): of several prompts, their mean.

    Raises QueryError for a text of more tokens than the encoder reads.
    """
    groups = [query_texts(text, encoder_name=encoder.name) for text in texts]
    if not groups:
        return np.empty((0, encoder.dim), np.float32)
    rows = encoder.encode_texts([prompt for group in groups for prompt in group])
    starts = np.cumsum([0, *(len(group) for group in groups)])
    vectors = np.empty((len(groups), encoder.dim), np.float32)
    for place, group in enumerate(groups):
        own = rows[starts[place] : starts[place + 1]]
        vectors[place] = own[0] if len(group) == 1 else normalise(own.mean(axis=0, dtype=np.float64)[None])[0]
    return vectors
