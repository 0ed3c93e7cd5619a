"""all-MiniLM-L6-v2 in numpy: the frozen text tower of the encoder ``mini``.

A BERT of six layers (Devlin et al. 2018, https://arxiv.org/abs/1810.04805), distilled by Wang et al. 2020
(https://arxiv.org/abs/2002.10957) and trained on sentence pairs the way of Reimers and Gurevych 2019
(https://arxiv.org/abs/1908.10084). It needs neither torch nor transformers, whose imports would cost a search from the
command line seconds.

Activations are (width, tokens), a token a column, so that a weight matrix multiplies them as it lies in the file, which
is mapped into memory and never copied. Texts of one length in tokens share a batch, so nothing is padded or masked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from searchengine.errors import QueryError, WeightsError
from searchengine.models.layers import FloatArray, LayerNorm, Linear, attend, gelu
from searchengine.models.tensors import SafetensorsFile
from searchengine.text import printable

TokenArray = NDArray[np.uint16]

LAYERS, HEADS = 6, 12
WIDTH, HEAD_WIDTH, HIDDEN = 384, 32, 1536
VOCABULARY, POSITIONS = 30_522, 512
MAX_TOKENS = 256  # the published sentence encoder's limit, not the tokenizer file's
NORM_EPSILON = 1e-12

BATCH_TOKENS, BATCH_TEXTS = 480, 1024  # what is in memory at once, as activations and as tokens


@dataclass(frozen=True)
class Layer:
    query: Linear
    key: Linear
    value: Linear
    attention_out: Linear
    attention_norm: LayerNorm
    widen: Linear
    narrow: Linear
    norm: LayerNorm

    def __call__(self, x: FloatArray, length: int) -> FloatArray:
        # x: (width, tokens) of texts that all have `length` tokens
        x = self.attention_norm(x + self.attention_out(self.attend(x, length)))
        return self.norm(x + self.narrow(gelu(self.widen(x))))

    def attend(self, x: FloatArray, length: int) -> FloatArray:
        query, key, value = (
            linear(x).reshape(HEADS, HEAD_WIDTH, -1, length).swapaxes(1, 2)  # (heads, texts, head width, length)
            for linear in (self.query, self.key, self.value)
        )
        mixed = attend(query, key, value)
        return mixed.swapaxes(1, 2).reshape(WIDTH, -1)  # (width, tokens)


class MiniLM:
    """Sentences to unit vectors of 384 numbers."""

    def __init__(self, tensors: Tensors, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._words = tensors.take("embeddings.word_embeddings.weight", VOCABULARY, WIDTH)
        positions = tensors.take("embeddings.position_embeddings.weight", POSITIONS, WIDTH)
        self._positions = positions[:MAX_TOKENS] + tensors.take("embeddings.token_type_embeddings.weight", 2, WIDTH)[0]
        self._norm = tensors.norm("embeddings.LayerNorm")
        self._layers = [tensors.layer(f"encoder.layer.{number}.") for number in range(LAYERS)]

    @classmethod
    def from_folder(cls, folder: Path) -> MiniLM:
        """Load ``model.safetensors`` and ``tokenizer.json`` as published with all-MiniLM-L6-v2.

        Raises WeightsError if either is missing, damaged, or another model's.
        """
        path = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing more specific
            raise WeightsError(f"{path} cannot be read as a tokenizer ({error}); fetch it again") from error
        if tokenizer.get_vocab_size() != VOCABULARY:
            raise WeightsError(f"{path} has {tokenizer.get_vocab_size()} tokens, not {VOCABULARY}; fetch it again")
        tokenizer.no_padding()
        tokenizer.enable_truncation(MAX_TOKENS)
        return cls(Tensors(folder / "model.safetensors"), tokenizer)

    def encode(self, texts: Sequence[str], *, truncate: bool = False) -> FloatArray:
        """Mean over the last layer's tokens, then scaled to length 1.

        texts: n strings, 0 included. Returns float32 (n, 384). A text of more than 256 tokens raises QueryError, or
        with `truncate` is read as far as these go.
        """
        vectors = np.empty((len(texts), WIDTH), np.float32)

        def fill(batch: tuple[list[int], TokenArray]) -> None:
            rows, tokens = batch
            mean = self._forward(tokens)  # (texts, width)
            vectors[rows] = mean / np.linalg.norm(mean, axis=1, keepdims=True)

        batches = list(self._batches(texts, truncate=truncate))
        if len(batches) == 1:
            fill(batches[0])
        else:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(fill, batches))
        return vectors

    def _batches(self, texts: Sequence[str], *, truncate: bool) -> Iterator[tuple[list[int], TokenArray]]:
        tokens: list[TokenArray] = []
        for start in range(0, len(texts), BATCH_TEXTS):
            # A lone surrogate, as in the name of a file that is not UTF-8, has no encoding that tokenizers accepts.
            chunk = [text.encode("utf-8", "replace").decode() for text in texts[start : start + BATCH_TEXTS]]
            for text, encoding in zip(chunk, self._tokenizer.encode_batch_fast(chunk), strict=True):
                if encoding.overflowing and not truncate:
                    raise QueryError(
                        f'the text "{printable(text[:40])}..." has more than the {MAX_TOKENS} tokens that mini reads; '
                        "shorten it, or encode it with truncate=True"
                    )
                tokens.append(np.array(encoding.ids, np.uint16))
        # The longest first, so that no thread is left alone with one of them at the end.
        order = sorted(range(len(texts)), key=lambda row: len(tokens[row]), reverse=True)
        for length, members in groupby(order, key=lambda row: len(tokens[row])):
            while rows := list(islice(members, max(1, BATCH_TOKENS // length))):
                yield rows, np.stack([tokens[row] for row in rows])

    def _forward(self, tokens: TokenArray) -> FloatArray:
        # tokens: (texts, length)
        texts, length = tokens.shape
        embedded = self._words[tokens] + self._positions[:length]  # (texts, length, width)
        x = self._norm(np.ascontiguousarray(embedded.reshape(-1, WIDTH).T))  # (width, tokens)
        for layer in self._layers:
            x = layer(x, length)
        mean: FloatArray = x.reshape(WIDTH, texts, length).mean(2).T  # (texts, width)
        return mean


class Tensors:
    """The tensors of a safetensors file, mapped into memory, each held against the shape that is due."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = SafetensorsFile(path)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{path} cannot be read as a safetensors file ({error}); fetch it again") from error

    def take(self, name: str, *shape: int) -> FloatArray:
        try:
            tensor = self._file.read(name)
            if tensor.dtype != np.float32 or tensor.shape != shape:
                raise ValueError(f"is {tensor.dtype} {list(tensor.shape)}, not float32 {list(shape)}")
            return tensor
        except (KeyError, ValueError) as error:
            raise WeightsError(f"{self._path}: {name} is missing or damaged ({error}); fetch it again") from error

    def linear(self, name: str, width_in: int, width_out: int) -> Linear:
        return Linear(self.take(f"{name}.weight", width_out, width_in), self.take(f"{name}.bias", width_out))

    def norm(self, name: str) -> LayerNorm:
        return LayerNorm(self.take(f"{name}.weight", WIDTH), self.take(f"{name}.bias", WIDTH), NORM_EPSILON)

    def layer(self, name: str) -> Layer:
        attention, output = f"{name}attention.", f"{name}output."
        query, key, value = (self.linear(f"{attention}self.{part}", WIDTH, WIDTH) for part in ("query", "key", "value"))
        mix = self.linear(f"{attention}output.dense", WIDTH, WIDTH)
        widen = self.linear(f"{name}intermediate.dense", WIDTH, HIDDEN)
        narrow = self.linear(f"{output}dense", HIDDEN, WIDTH)
        norms = self.norm(f"{attention}output.LayerNorm"), self.norm(f"{output}LayerNorm")
        return Layer(query, key, value, mix, norms[0], widen, narrow, norms[1])
