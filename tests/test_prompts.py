"""A bare word is asked for by several prompts, everything else as it stands; the same in every way to ask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeEncoder
from hypothesis import given
from hypothesis import strategies as st

from indexer.pipeline import build
from searchengine.index.reader import Index
from searchengine.models.published import PUBLISHED
from searchengine.prompts import MINI_PROMPTS, prompts_of, query_texts, query_vectors
from searchengine.search import Searcher
from searchengine.vectors import FloatMatrix, normalise


class Named(FakeEncoder):
    """Has the name of an encoder whose prompts are known, and keeps what it is given."""

    def __init__(self, name: str = "mini") -> None:
        super().__init__()
        self.name = name
        self.texts: list[str] = []

    def encode_texts(self, texts: Sequence[str], *, truncate: bool = False) -> FloatMatrix:
        self.texts.extend(texts)
        return super().encode_texts(texts, truncate=truncate)


@pytest.mark.parametrize("word", ["dog", " dog ", "DOG", "café", "merry-go-round", "o'clock", "żółw"])
def test_a_bare_word_becomes_the_prompts_of_the_encoder(word: str) -> None:
    bare = word.strip()
    assert query_texts(word, encoder_name="mini") == [prompt.replace("{}", bare) for prompt in MINI_PROMPTS]
    for name in PUBLISHED:
        assert query_texts(word, encoder_name=name) == [f"a photo of a {bare}."]


@pytest.mark.parametrize(
    "text",
    ["a dog", "dog.", "dog, cat", "dog\ncat", "2024", "route66", "{}", "-dog", "犬", "собака", "dog" + " " * 3 + "x"],
)
def test_anything_else_is_asked_for_as_it_stands(text: str) -> None:
    for name in ("mini", *PUBLISHED):
        assert query_texts(text, encoder_name=name) == [text]


def test_an_encoder_whose_prompts_nobody_measured_gets_the_word_alone() -> None:
    for name in ("/models/heads.safetensors", "clip", "fake", ""):
        assert query_texts("dog", encoder_name=name) == ["dog"]


def test_every_prompt_has_one_place_for_the_word() -> None:
    for name in ("mini", *PUBLISHED):
        assert all(prompt.count("{}") == 1 for prompt in prompts_of(name))


@given(st.lists(st.sampled_from(["dog", "cat", "a dog", "two cats on a mat", "x"]), max_size=6))
def test_a_querys_vector_is_the_mean_of_its_prompts_whatever_is_asked_beside_it(texts: list[str]) -> None:
    vectors = query_vectors(texts, encoder=Named())
    assert vectors.shape == (len(texts), 16)
    assert vectors.dtype == np.float32
    for vector, text in zip(vectors, texts, strict=True):
        rows = FakeEncoder().encode_texts(query_texts(text, encoder_name="mini"))
        assert np.array_equal(
            vector, rows[0] if len(rows) == 1 else normalise(rows.mean(axis=0, dtype=np.float64)[None])[0]
        )


def test_one_call_of_the_encoder_does_for_all_queries(tmp_path: Path, photos: Path) -> None:
    build(tmp_path / "index", [photos], encoder=FakeEncoder(), isolated=False)
    encoder = Named("mini")
    with Index(tmp_path / "index") as index:
        searcher = Searcher(index, encoder)
        alone = [searcher.search(text, k=5) for text in ("dog", "a dog")]
        assert encoder.texts == [*query_texts("dog", encoder_name="mini"), "a dog"]
        together = searcher.search_many(["dog", "a dog"], k=5)
        assert together == alone
        assert searcher.search_vector(searcher.text_vector("dog"), k=5, kind="text") == alone[0]
