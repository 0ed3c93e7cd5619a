"""CLIP's tokens, against OpenAI's own tokenizer and open_clip's copy of it, both as their packages ship them."""
# ruff: noqa: RUF001  # characters that look alike are what is tested

from __future__ import annotations

import hashlib
import html.entities
import importlib.util
import itertools
import json
import random
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ftfy
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from searchengine.errors import QueryError, UsageError, WeightsError
from searchengine.models.clip import tokenizer as module
from searchengine.models.clip.tokenizer import CONTEXT, EOT, MAX_CHARACTERS, SOT, VOCABULARY, ClipTokenizer

# Either package's spelling of SOT and EOT, in a text that its tokenizer has cleaned.
SPECIAL_ENDINGS = ("oftext|>", "of_text>")


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer.load()


def load_reference(package: str, file: str) -> ModuleType:
    """A package's module, read from its file: the packages themselves would import torchvision."""
    spec = importlib.util.find_spec(package)
    path = Path((spec.submodule_search_locations or [""])[0], file) if spec else None
    if path is None or not path.is_file():
        pytest.skip(f"{package}/{file} is not installed; pip install --no-deps -r tests/references.txt")
    located = importlib.util.spec_from_file_location(f"reference_{package}", path)
    assert located and located.loader
    loaded = importlib.util.module_from_spec(located)
    located.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def openai() -> Any:
    return load_reference("clip", "simple_tokenizer.py").SimpleTokenizer()


@pytest.fixture(scope="module")
def open_clip() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        stub = ModuleType("torch")  # named in annotations; its tensors are not needed for the tokens
        vars(stub).update(Tensor=object, LongTensor=object)
        patch.setitem(sys.modules, "torch", stub)
        patch.setenv("TOKENIZERS_PARALLELISM", "set by the module, and restored by this fixture")
        loaded = load_reference("open_clip", "tokenizer.py")
    return loaded.SimpleTokenizer()


def assert_equal(texts: list[str], tokenizer: ClipTokenizer, openai: Any, open_clip: Any) -> None:
    """All three give the same tokens, over the whole length of each text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CONTEXT", 10**9)
        for text in texts:
            tokens = tokenizer.encode(text)
            assert (tokens[0], tokens[-1]) == (SOT, EOT)
            assert tokens[1:-1] == openai.encode(text), ascii(text)
            if not any(ending in open_clip.clean_fn(text) for ending in SPECIAL_ENDINGS):
                assert tokens[1:-1] == open_clip.encode(text), ascii(text)


# --- equality


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("a diagram", [320, 22697]),
        ("a dog", [320, 1929]),
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        ("hello world!", [3306, 1002, 256]),
        ("", []),
    ],
)
def test_published_examples_have_their_published_tokens(
    text: str, tokens: list[int], tokenizer: ClipTokenizer, openai: Any
) -> None:
    assert tokenizer.encode(text) == [SOT, *tokens, EOT]
    assert openai.encode(text) == tokens


def test_every_caption_of_the_shared_data_has_the_tokens_of_both_references(
    data: Path, tokenizer: ClipTokenizer, openai: Any, open_clip: Any
) -> None:
    captions = {
        caption
        for folder in ("flickr8k_dev", "flickr8k_train", "coco_cc")
        for photo in json.loads((data / folder / "captions.json").read_text("utf-8"))
        for caption in photo["captions"]
    }
    golden = set(np.load(data / "golden" / "golden_vectors.npz", allow_pickle=False)["texts"].tolist())
    assert len(captions) > 25_000
    assert len(golden) > 1_000
    assert_equal(sorted(captions | golden), tokenizer, openai, open_clip)


ODD_CASES = "İ ı ß ẞ ſ Ǆ ǅ ǆ Ω K Å Σ ΑΣ ΟΔΟΣ ς ŉ ǰ ΐ և ﬁ ﬀ ﬆ Ⅷ ⓐ Ⓐ Ꭰ ꭰ Ა ა 𐐀 ᾳ ͅ ᾼ I i".split(" ")
SPACES = [chr(code) for code in (*range(9, 14), *range(28, 33), 0x85, 0xA0, 0x1680, *range(0x2000, 0x2010))]
SPACES += list("\u2028\u2029\u202f\u205f\u2060\u3000\ufeff\u180e\r\n")
MARKS = "\u0300\u0301\u0302\u0308\u0316\u0327\u0345\u20dd\u20e3\ufe0e\ufe0f\u0c4d\u0e31\u064b"
EMOJI = "👨‍👩‍👧‍👦 👩🏽‍🚀 🏳️‍🌈 🇩🇪 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ❤️ 0️⃣ ☃ 😀 🫠 👍🏿".split(" ")
SPECIALS = (
    "<|startoftext|> <|endoftext|> <|STARTofText|> <|ſtartoftext|> <start_of_text> <end_of_text> </w> <| |> <|".split()
)
CONTRACTIONS = "it's IT'S don't we're I've I'm she'll he'd it’s 'ſ '’s 'tis ''s o'clock 'LL ʼs".split()
NUMBERS = "0 1234567890 ٣٤ ४ Ⅳ ½ ² ① 一 𝟘 ௰ 3.14 1,000".split()
SENTENCE = "A man in a blue shirt is standing on a ladder cleaning a window , isn't he ?".split()
ENTITIES = sorted(html.entities.html5)


def fuzzed(count: int, *, seed: int) -> list[str]:
    """Strings of one to eight pieces, each of a random kind."""
    rng = random.Random(seed)

    def code_points(low: int, high: int) -> str:
        return "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(1, 5)))

    def mojibake() -> str:
        text = rng.choice(
            ["schön", "café", "naïve – “yes”", "Привет", "日本語", "😀", "l’été", code_points(0x80, 0x2FFF)]
        )
        for _ in range(rng.randrange(1, 3)):
            codec = rng.choice(["latin-1", "windows-1252", "windows-1251", "mac_roman", "cp437"])
            text = text.encode("utf-8", "replace").decode(codec, "ignore")
        return text

    def entity() -> str:
        code = rng.choice([rng.randrange(0x120), rng.randrange(0x11_1000), 0xD83D])
        name = rng.choice([rng.choice(ENTITIES), f"#{code};", f"#x{code:x};", f"#X{code:X}", f"#{code}", "NTILDE;"])
        return "&" + "amp;" * rng.choice([0, 0, 0, 1, 2, 3, 4]) + name

    def long_word() -> str:
        letters = rng.choice(["ab", "etaoinshrdlu", "漢字", "!?", "😀😁", "ãÂ", "aé"])
        return "".join(rng.choices(letters, k=rng.randrange(30, 90)))

    kinds: list[Callable[[], str]] = [
        lambda: code_points(0, 0x80),
        lambda: code_points(0x20, 0x7F),
        lambda: code_points(0, 0xA0),  # control characters of both sets
        lambda: code_points(0xA0, 0x600),
        lambda: code_points(0, 0x1_0000),  # with lone surrogates
        lambda: code_points(0x1_0000, 0x11_0000),
        lambda: code_points(0x1_F300, 0x1_FB00),
        lambda: code_points(0xD800, 0xE000),
        mojibake,
        entity,
        long_word,
        lambda: rng.choice("aeıoἀ漢") + "".join(rng.choices(MARKS, k=rng.randrange(1, 6))),
        lambda: f"\x1b[{rng.randrange(99)}m",
        *(
            lambda words=words: rng.choice(words)
            for words in (ODD_CASES, SPACES, EMOJI, SPECIALS, CONTRACTIONS, NUMBERS)
        ),
        *[lambda: rng.choice(SENTENCE)] * 4,
    ]
    return [
        rng.choice(["", " ", "\n"]).join(rng.choice(kinds)() for _ in range(rng.randrange(1, 9))) for _ in range(count)
    ]


def test_twenty_thousand_fuzzed_strings_have_the_tokens_of_both_references(
    tokenizer: ClipTokenizer, openai: Any, open_clip: Any
) -> None:
    texts = fuzzed(20_000, seed=7)
    assert len(set(texts)) > 18_000
    assert_equal(texts, tokenizer, openai, open_clip)


def test_every_character_of_unicode_outside_the_ideographs_has_the_tokens_of_both_references(
    tokenizer: ClipTokenizer, openai: Any, open_clip: Any
) -> None:
    characters = [chr(code) for code in range(sys.maxunicode + 1)]
    cased = [character for character in characters if character.lower() != character or character.upper() != character]
    others = [character for character in characters if unicodedata.category(character) not in {"Lo", "Cn", "Co", "Cs"}]
    chosen = sorted({*cased, *others})
    texts = [
        "\n".join(f"x{character}y" for character in chosen[start : start + 16]) for start in range(0, len(chosen), 16)
    ]
    assert len(chosen) > 15_000
    assert_equal(texts, tokenizer, openai, open_clip)


@given(text=st.text())
@example(text="ſ'ſ <|endoftext|>&amp;lt;")
@settings(max_examples=400)
def test_any_text_has_the_tokens_of_both_references(
    text: str, tokenizer: ClipTokenizer, openai: Any, open_clip: Any
) -> None:
    assert_equal([text], tokenizer, openai, open_clip)


@given(text=st.text(st.characters(codec="ascii")))
@settings(max_examples=400)
def test_any_ascii_text_has_the_tokens_of_both_references(
    text: str, tokenizer: ClipTokenizer, openai: Any, open_clip: Any
) -> None:
    assert_equal([text], tokenizer, openai, open_clip)


def test_ftfy_leaves_visible_ascii_without_entities_alone() -> None:
    """What lets `encode` do without ftfy. No fix of ftfy looks at more than the neighbourhood of a character."""
    visible = [chr(code) for code in range(0x20, 0x7F) if chr(code) != "&"]
    for text in map("".join, itertools.chain(visible, itertools.product(visible, repeat=2))):
        assert ftfy.fix_text(text) == text
    every_triple = "".join(map("".join, itertools.product(visible, repeat=3)))
    assert ftfy.fix_text(every_triple) == every_triple


@given(text=st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters="&"), max_size=400))
def test_ftfy_leaves_any_visible_ascii_text_without_entities_alone(text: str) -> None:
    assert ftfy.fix_text(text) == text


def test_a_long_word_has_the_tokens_of_both_references(tokenizer: ClipTokenizer, openai: Any, open_clip: Any) -> None:
    rng = random.Random(3)
    alphabets = ["a", "ab", "hahaha", "etaoinshrdlu", "abcdefghijklmnopqrstuvwxyz", "漢字仮名", "!?.", "👩‍🚀"]
    words = ["".join(rng.choices(alphabet, k=1_500)) for alphabet in alphabets]
    assert_equal(words, tokenizer, openai, open_clip)


def test_specials_within_a_text_are_openais_and_not_open_clips(
    tokenizer: ClipTokenizer, openai: Any, open_clip: Any
) -> None:
    text = "a <|startoftext|> b <|EndOfText|>"
    assert tokenizer.encode(text)[1:-1] == openai.encode(text) == [320, SOT, 321, EOT]
    assert open_clip.encode(text) != openai.encode(text)
    theirs = "a <start_of_text> b <End_Of_Text>"
    assert open_clip.encode(theirs) == [320, SOT, 321, EOT]
    assert tokenizer.encode(theirs)[1:-1] == openai.encode(theirs) != open_clip.encode(theirs)


@pytest.mark.parametrize("text", ["a \ud800", "\udcff", "\ude00\ud83d", "&#xd800;"], ids=ascii)
def test_a_lone_surrogate_is_read_as_the_replacement_character(
    text: str, tokenizer: ClipTokenizer, openai: Any
) -> None:
    tokens = tokenizer.encode(text)
    assert tokens[1:-1] == openai.encode(text)
    assert "\ufffd" in tokenizer.decode(tokens)


def test_surrogates_that_make_a_pair_are_read_as_their_character(tokenizer: ClipTokenizer) -> None:
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("😀")


def test_a_text_that_openais_tokenizer_fails_on_is_refused(tokenizer: ClipTokenizer, openai: Any) -> None:
    text = f"a &#{'9' * 5_000};"
    with pytest.raises(ValueError, match="4300 digits"):
        openai.encode(text)
    with pytest.raises(QueryError, match=r'the text "a &#9+…" has a character reference .* remove it'):
        tokenizer.encode(text, truncate=True)


# --- limits


def test_a_text_may_have_77_tokens_and_no_more(tokenizer: ClipTokenizer) -> None:
    assert len(tokenizer.encode("dog " * 75)) == CONTEXT
    with pytest.raises(QueryError) as refused:
        tokenizer.encode("dog " * 76)
    assert str(refused.value) == (
        f'the text "{"dog " * 9}dog…" has 78 tokens, more than the 77 that CLIP reads; '
        "shorten it, or encode it with truncate=True"
    )


def test_the_refused_text_is_shown_on_one_line(tokenizer: ClipTokenizer) -> None:
    with pytest.raises(QueryError, match=r'^the text "a\\n\\x1b\[31mb+…" has 10,001 characters') as refused:
        tokenizer.encode("a\n\x1b[31m" + "b" * 9_994)
    assert str(refused.value).isprintable()


def test_truncation_keeps_the_beginning_and_ends_with_eot(tokenizer: ClipTokenizer) -> None:
    text = "one two three four five " * 20
    tokens = tokenizer.encode(text, truncate=True)
    assert len(tokens) == CONTEXT
    assert tokens[-1] == EOT
    assert EOT not in tokens[:-1]
    assert tokens[:-1] == tokenizer.encode("one two three four five " * 15)[:-1]


def test_truncation_leaves_a_text_that_fits_alone(tokenizer: ClipTokenizer) -> None:
    for text in ("", "a dog", "dog " * 75):
        assert tokenizer.encode(text, truncate=True) == tokenizer.encode(text)


def test_a_text_of_too_many_characters_is_refused_even_for_truncation(tokenizer: ClipTokenizer) -> None:
    assert tokenizer.encode(" " * MAX_CHARACTERS) == [SOT, EOT]
    with pytest.raises(QueryError, match=r'the text "x{39}…" has 1,000,000 characters, more than 10,000; shorten it'):
        tokenizer.encode("x" * 1_000_000, truncate=True)


@pytest.mark.parametrize(
    "text",
    [
        "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=MAX_CHARACTERS)),
        "a" * MAX_CHARACTERS,
        "𠀀" * MAX_CHARACTERS,
        "\ufb2c" * MAX_CHARACTERS,  # three characters each, once normalised
        "a" + "\u0301\u0316" * (MAX_CHARACTERS // 2 - 1),
        "&" + "amp;" * (MAX_CHARACTERS // 4 - 1),
        "\n" * MAX_CHARACTERS,
    ],
    ids=["random letters", "one letter", "four bytes", "expanding", "marks", "nested entities", "lines"],
)
def test_no_text_takes_long(text: str, tokenizer: ClipTokenizer) -> None:
    started = time.monotonic()
    tokenizer.encode(text, truncate=True)
    assert time.monotonic() - started < 3


# --- decoding


def test_decoding_gives_the_cleaned_text_back(tokenizer: ClipTokenizer) -> None:
    tokens = tokenizer.encode("  A dog's\tbowl, 24 &amp; 3 naïve 犬 👍🏿! ")
    assert tokenizer.decode(tokens[1:-1]) == "a dog 's bowl , 2 4 & 3 naïve 犬 👍🏿! "
    assert tokenizer.decode(tokens) == f"<|startoftext|>{tokenizer.decode(tokens[1:-1])}<|endoftext|>"


@given(words=st.lists(st.text(st.characters(categories=["Ll", "Lo"]), min_size=1), max_size=8))
def test_words_come_back_as_openais_tokenizer_cleans_them(
    words: list[str], tokenizer: ClipTokenizer, openai: Any
) -> None:
    text = " ".join(words)
    cleaned = " ".join(ftfy.fix_text(text).lower().split())
    decoded = tokenizer.decode(tokenizer.encode(text, truncate=True)[1:-1])
    assert decoded == openai.decode(openai.encode(text)[: CONTEXT - 2])
    if len(openai.encode(text)) <= CONTEXT - 2:
        assert decoded.replace(" ", "") == cleaned.replace(" ", "")


def test_each_token_decodes_as_in_openais_tokenizer(tokenizer: ClipTokenizer, openai: Any) -> None:
    assert len(openai.encoder) == VOCABULARY
    for token in range(VOCABULARY):
        assert tokenizer.decode([token]) == openai.decode([token])


@given(tokens=st.lists(st.integers(0, VOCABULARY - 1)))
def test_any_tokens_decode_as_in_openais_tokenizer(tokens: list[int], tokenizer: ClipTokenizer, openai: Any) -> None:
    assert tokenizer.decode(tokens) == openai.decode(tokens)


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_a_token_outside_the_vocabulary_is_refused(token: int, tokenizer: ClipTokenizer) -> None:
    with pytest.raises(UsageError, match=f"^{token} is not a token of CLIP"):
        tokenizer.decode([320, token])


# --- the merges


def test_the_merges_are_the_published_ones() -> None:
    sha256 = hashlib.sha256(module.MERGES_FILE.read_bytes()).hexdigest()
    assert sha256 == "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a" == module.MERGES_SHA256
    assert "Copyright (c) 2021 OpenAI" in Path(f"{module.MERGES_FILE}.LICENSE").read_text("utf-8")


def test_a_merge_joins_only_what_earlier_merges_made(tokenizer: ClipTokenizer) -> None:
    """What makes one heap as good as a pass over the word for each merge."""
    assert len(tokenizer._merges) == module.MERGES
    known = set(tokenizer._letters)
    for pair in tokenizer._merges:
        left, right = pair.split(" ")
        assert {left, right} <= known
        assert left + right not in known
        known.add(left + right)


@pytest.mark.parametrize("damage", ["a byte", "cut", "empty"])
def test_a_damaged_merges_file_is_refused(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytearray(module.MERGES_FILE.read_bytes())
    content[1000] ^= 1
    damaged = {"a byte": content, "cut": content[:1_000], "empty": b""}[damage]
    path = tmp_path / "merges.gz"
    path.write_bytes(damaged)
    monkeypatch.setattr(module, "MERGES_FILE", path)
    with pytest.raises(WeightsError, match=r"merges\.gz has sha256 \w{12}, expected 924691ac288e; reinstall"):
        ClipTokenizer.load()


def test_a_missing_merges_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MERGES_FILE", tmp_path / "merges.gz")
    with pytest.raises(WeightsError, match=r"merges\.gz cannot be read \(No such file.*\); reinstall searchengine"):
        ClipTokenizer.load()


# --- cost


def test_a_plain_text_needs_neither_torch_nor_ftfy() -> None:
    script = """
import sys
from searchengine.models.clip.tokenizer import ClipTokenizer
assert len(ClipTokenizer.load().encode("A dog, isn't it?")) == 9
print(sorted({"torch", "numpy", "ftfy", "html", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_loading_takes_less_than_a_tenth_of_a_second() -> None:
    times = []
    for _ in range(5):
        started = time.monotonic()
        ClipTokenizer.load()
        times.append(time.monotonic() - started)
    assert min(times) < 0.1


def test_words_are_remembered_within_bounds_and_unspoilt(tokenizer: ClipTokenizer) -> None:
    first = tokenizer.encode("a remembered word")
    first[1] = 0
    assert tokenizer.encode("a remembered word")[1] == 320
    fresh = ClipTokenizer.load()
    for start in range(0, module.CACHED_WORDS + 1_000, 10):
        fresh.encode(" ".join(chr(0x4E00 + number) for number in range(start, start + 10)))
    assert fresh._cached_tokens_of.cache_info().currsize == module.CACHED_WORDS
    seen = fresh._cached_tokens_of.cache_info()
    fresh.encode("x" * (module.CACHED_CHARACTERS + 1))  # a long word is not kept
    assert fresh._cached_tokens_of.cache_info() == seen
