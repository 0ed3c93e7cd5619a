"""Text to the tokens of CLIP: lower-cased byte-level BPE, equal to OpenAI's own tokenizer for any text.

The method is that of Sennrich et al. 2016 (https://arxiv.org/abs/1508.07909) over bytes instead of characters, as in
GPT-2 (Radford et al. 2019). OpenAI's tokenizer is ``clip/simple_tokenizer.py`` of https://github.com/openai/CLIP. What
it does to odd texts is kept, because the model was trained on it:

- ftfy repairs mojibake, turns a lone surrogate into U+FFFD and removes most control characters.
- HTML entities are decoded twice more after ftfy has decoded them.
- ``<|startoftext|>`` and ``<|endoftext|>`` in a text, in either case, become SOT and EOT. (open_clip, otherwise equal,
  spells them ``<start_of_text>`` and ``<end_of_text>``.)
- U+0345, a combining mark that is a letter in upper case, is no part of any word and disappears.

Two kinds of text are refused: one of more than MAX_CHARACTERS, and one with a decimal character reference of more than
4,300 digits, on which Python's ``html.unescape`` fails and OpenAI's tokenizer with it.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from pathlib import Path

import regex

from searchengine.errors import QueryError, UsageError, WeightsError
from searchengine.text import printable

CONTEXT = 77  # tokens of a text, SOT and EOT included
VOCABULARY = 49_408  # 256 bytes, the same at the end of a word, the merges, SOT and EOT
SOT, EOT = 49_406, 49_407
SPECIALS = {"<|startoftext|>": SOT, "<|endoftext|>": EOT}
END = "</w>"  # what marks the last symbol of a word

MERGES_FILE = Path(__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
MERGES = VOCABULARY - 2 * 256 - len(SPECIALS)  # the file has more; CLIP uses the first of them

# `&amp;amp;amp;...` and a long row of combining marks take quadratic time before there is a token, in ftfy and in
# Unicode normalisation: half a second for this many characters, half a minute for ten times as many.
MAX_CHARACTERS = 10_000

CACHED_WORDS, CACHED_CHARACTERS = 16_384, 64  # words kept with their tokens, and the longest that is kept

# Contractions, words, single digits, and whatever else is not space. Matched without regard to case, which even in
# lower-cased text makes a difference to U+017F, the long s, and to U+0345.
WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """Texts to tokens and back. Make one with `load`; it may be shared between threads."""

    def __init__(self, merges: Sequence[str]) -> None:
        """merges: the MERGES pairs of symbols, such as ``"a n"`` or ``"an d</w>"``, the most frequent first."""
        self._merges = merges
        self._ranks = dict(zip(merges, range(len(merges)), strict=True))
        self._alphabet = _alphabet()
        letters = list(self._alphabet.values())
        self._letters = letters + [letter + END for letter in letters]
        self._letter_tokens = {letter: token for token, letter in enumerate(self._letters)}
        self._bytes = {ord(letter): byte for byte, letter in self._alphabet.items()}
        self._word = regex.compile(WORD, regex.IGNORECASE)
        self._cached_tokens_of = lru_cache(CACHED_WORDS)(self._tokens_of)

    @classmethod
    def load(cls) -> ClipTokenizer:
        """The tokenizer of the published merges, which are part of this package.

        Raises WeightsError if their file is missing or damaged.
        """
        try:
            packed = MERGES_FILE.read_bytes()
        except OSError as error:
            raise WeightsError(
                f"{printable(str(MERGES_FILE))} cannot be read ({error.strerror}); reinstall searchengine"
            ) from error
        sha256 = hashlib.sha256(packed).hexdigest()
        if sha256 != MERGES_SHA256:
            raise WeightsError(
                f"{printable(str(MERGES_FILE))} has sha256 {sha256[:12]}, expected {MERGES_SHA256[:12]}; "
                "reinstall searchengine"
            )
        lines = gzip.decompress(packed).decode().split("\n", 1 + MERGES)
        return cls(lines[1 : 1 + MERGES])  # the first line is a title

    def encode(self, text: str, *, truncate: bool = False) -> list[int]:
        """The tokens of `text`, SOT first and EOT last; at most CONTEXT, each below VOCABULARY.

        A text of more tokens raises QueryError, or with `truncate` keeps the first CONTEXT - 1 of them and EOT, as
        OpenAI's does. Also raises QueryError for a text that the module's docstring calls refused.
        """
        if len(text) > MAX_CHARACTERS:
            raise QueryError(
                f'the text "{_shortened(text)}" has {len(text):,} characters, more than {MAX_CHARACTERS:,}; shorten it'
            )
        tokens = [SOT]
        for word in self._word.findall(_clean(text)):
            tokens += self._cached_tokens_of(word) if len(word) <= CACHED_CHARACTERS else self._tokens_of(word)
        tokens.append(EOT)
        if len(tokens) <= CONTEXT:
            return tokens
        if truncate:
            return [*tokens[: CONTEXT - 1], EOT]
        raise QueryError(
            f'the text "{_shortened(text)}" has {len(tokens)} tokens, more than the {CONTEXT} that CLIP reads; '
            "shorten it, or encode it with truncate=True"
        )

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of `tokens`: lower case, a space after each word, SOT and EOT spelt out, broken UTF-8 as U+FFFD.

        Raises UsageError for a token outside the vocabulary.
        """
        symbols = "".join(self._symbol(token) for token in tokens)
        return symbols.translate(self._bytes).encode("latin-1").decode("utf-8", "replace").replace(END, " ")

    def _symbol(self, token: int) -> str:
        if not 0 <= token < VOCABULARY:
            raise UsageError(f"{token} is not a token of CLIP; they run from 0 to {VOCABULARY - 1}")
        if token < len(self._letters):
            return self._letters[token]
        if token < SOT:
            return self._merges[token - len(self._letters)].replace(" ", "")
        return next(special for special, of in SPECIALS.items() if of == token)

    def _tokens_of(self, word: str) -> tuple[int, ...]:
        """Byte pair encoding of a word of n bytes in O(n log n).

        Of all neighbours that a merge joins, those of the lowest rank are joined first, from left to right. A heap
        finds them without going through the word again after each merge. The tokens are those of the original, which
        does go through it again, because a merge makes only such pairs possible as have a higher rank than its own.
        """
        if word in SPECIALS:
            return (SPECIALS[word],)
        symbols = list(word.encode().decode("latin-1").translate(self._alphabet))
        symbols[-1] += END
        tokens = [self._letter_tokens[symbol] for symbol in symbols]
        # A linked list. It ends with an empty symbol, and joined symbols are empty too: no merge has an empty part.
        symbols.append("")
        following = [*range(1, len(symbols)), -1]
        preceding = list(range(-1, len(symbols) - 1))

        def rank(left: int) -> int | None:
            return self._ranks.get(f"{symbols[left]} {symbols[following[left]]}")

        heap = [(merge, left) for left in range(len(tokens)) if (merge := rank(left)) is not None]
        heapify(heap)
        while heap:
            merge, left = heappop(heap)
            if rank(left) != merge:  # one of the two has been joined to another neighbour since
                continue
            right = following[left]
            symbols[left] += symbols[right]
            symbols[right] = ""
            tokens[left] = len(self._letters) + merge
            following[left] = following[right]
            preceding[following[left]] = left
            for changed in (preceding[left], left):
                if (merge_next := rank(changed)) is not None:
                    heappush(heap, (merge_next, changed))
        return tuple(token for token, symbol in zip(tokens, symbols, strict=False) if symbol)


def _alphabet() -> dict[int, str]:
    """A visible character for each byte, in the order of their tokens: Latin-1's own, or else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)).difference(visible))
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


def _clean(text: str) -> str:
    # ftfy changes nothing in visible ASCII without entities, and takes 40 ms to import.
    if not (text.isascii() and text.isprintable()) or "&" in text:
        import html

        import ftfy

        try:
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        except ValueError as error:  # from int, which reads no more than 4,300 digits
            raise QueryError(
                f'the text "{_shortened(text)}" has a character reference of thousands of digits; remove it'
            ) from error
    return " ".join(text.split()).lower()


def _shortened(text: str) -> str:
    return printable(text if len(text) <= 40 else text[:39] + "…")
