"""The query language: what is plain text, what an expression means, where an error is, and what comes back as text."""

from __future__ import annotations

import contextlib
import os
import re
import time
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchengine import captions
from searchengine.errors import QueryError, UsageError
from searchengine.filters import Filters
from searchengine.query import (
    MAX_CHARACTERS,
    MAX_DEPTH,
    MAX_OPERANDS,
    And,
    Condition,
    Image,
    Not,
    Or,
    Photo,
    Query,
    Sum,
    Term,
    Text,
    leaves_of,
    parse,
)
from searchengine.query_tokens import quoted

# -- plain text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a dog on a beach",
        "  a dog  and\ta cat ",
        "a t-shirt, black-and-white",
        "a dog's bed",
        "rock-paper",
        "C++ and signs+ or +signs",
        "a dog -cat",
        "2:1 ratio",
        "16:9",
        "at 10:30 in the morning",
        "4:am on a street",
        "2:dog",
        "note: the beach",
        "before: after",
        "a man (in red) on a bike",
        "(a dog) on grass",
        "((dog))",
        "a smile :)",
        "dogs/cats",
        'a sign that says "stop"',
        'a sign that says "this AND that - or so"',
        '"stop" sign',
        '"yes" "no"',
        '"a dog on a beach',
        'a 5" x 7" photo',
        "R&B AND_B BAND ORANGE NOTHING",
        "and or not",
        "https://example.org/a",
        "",
        " ",
        "/a holiday in 2023.",
    ],
)
def test_prose_stays_the_text_that_it_is(text: str) -> None:
    assert parse(text) == Text(text)


@given(st.text(st.characters(exclude_characters='+-":/.~'), max_size=60).filter(lambda text: text == text.lower()))
def test_a_text_without_operators_stays_as_it_is(text: str) -> None:
    assert parse(text) == Text(text)


def test_what_people_write_about_photos_is_hardly_ever_an_expression(data: Path) -> None:
    written = [
        caption
        for folder in ("flickr8k_dev", "flickr8k_train", "coco_cc")
        for photo in captions.read_captions(data / folder / "captions.json", images=data / folder / "images")
        for caption in photo.captions
    ]
    assert len(written) > 20_000
    others = [caption for caption in written if parse(caption) != Text(caption)]
    assert len(others) <= 3  # a dash between blanks, and two in capitals
    assert all(" - " in caption or caption.isupper() for caption in others)


@given(st.text(max_size=40).filter(str.strip))
def test_quotes_make_any_text_plain(text: str) -> None:
    assert parse(quoted(text)) == Text(text)
    assert parse(f"{quoted(text)} AND x") == And((Text(text), Text("x")))


def test_quotes_keep_what_looks_like_an_operator() -> None:
    assert parse('"rock - paper"') == Text("rock - paper")
    assert parse('"after:2023"') == Text("after:2023")
    assert parse(r'"a \"red\" C:\dog"') == Text(r'a "red" C:\dog')


# -- expressions -----------------------------------------------------------------------------------------------------

DOG, CAT, BEACH = Text("a dog"), Text("cat"), Text("beach")
AFTER_2023 = Condition("after", "2023-01-01T00:00:00")


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("a dog + cat", Sum((Term(1, DOG), Term(1, CAT)))),
        ("a dog - 0.5:cat", Sum((Term(1, DOG), Term(-0.5, CAT)))),
        ("-1:cat + a dog", Sum((Term(-1, CAT), Term(1, DOG)))),
        ("a dog - -2:cat", Sum((Term(1, DOG), Term(2, CAT)))),
        ('2:"a dog"', Sum((Term(2, DOG),))),
        ('1:"a dog"', DOG),
        ("2:(a dog + .5:cat) - beach", Sum((Term(2, Sum((Term(1, DOG), Term(0.5, CAT)))), Term(-1, BEACH)))),
        ("(a dog + cat) + beach", Sum((Term(1, Sum((Term(1, DOG), Term(1, CAT)))), Term(1, BEACH)))),
        ("id:4711 + a dog", Sum((Term(1, Photo(4711)), Term(1, DOG)))),
        ("id:4711", Photo(4711)),
        ("2:id:5 - cat", Sum((Term(2, Photo(5)), Term(-1, CAT)))),
        ("image:/x/y.jpg", Image("/x/y.jpg")),
        ('image:"/x - y.jpg" + cat', Sum((Term(1, Image("/x - y.jpg")), Term(1, CAT)))),
        ("a dog AND cat AND beach", And((DOG, CAT, BEACH))),
        ("a dog OR cat AND beach", Or((DOG, And((CAT, BEACH))))),
        ("(a dog OR cat) AND beach", And((Or((DOG, CAT)), BEACH))),
        ("(a dog AND cat) AND beach", And((And((DOG, CAT)), BEACH))),
        ("NOT a dog AND cat", And((Not(DOG), CAT))),
        ("NOT NOT a dog", Not(Not(DOG))),
        ("NOT(a dog)AND(cat)", And((Not(DOG), CAT))),
        ("NOT a dog + cat", Not(Sum((Term(1, DOG), Term(1, CAT))))),
        ("a dog - cat AND beach", And((Sum((Term(1, DOG), Term(-1, CAT))), BEACH))),
        ("a dog\nAND\tcat", And((DOG, CAT))),
        ("a man (in red) AND cat", And((Text("a man (in red)"), CAT))),
        ("(a man (in red) OR cat)", Or((Text("a man (in red)"), CAT))),
        ('a sign "this AND that" AND cat', And((Text('a sign "this AND that"'), CAT))),
        ('a 5" screen AND a 7" screen', And((Text('a 5" screen'), Text('a 7" screen')))),
        ("A DOG AND A CAT", And((Text("A DOG"), Text("A CAT")))),
        ("犬 AND 猫", And((Text("犬"), Text("猫")))),
        ("cat AND camera:Canon", And((CAT, Condition("camera", "Canon")))),
        ('cat AND camera:"Canon EOS (1)"', And((CAT, Condition("camera", "Canon EOS (1)")))),
        ("cat AND (under:/a(b)/c OR after:2023)", And((CAT, Or((Condition("under", "/a(b)/c"), AFTER_2023))))),
        ("after:2023", AFTER_2023),
    ],
)
def test_an_expression_means(text: str, meaning: Query) -> None:
    assert parse(text) == meaning
    assert parse(str(meaning)) == meaning


def test_the_promised_query_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pool.jpg").touch()
    monkeypatch.chdir(tmp_path)
    pool = Image(str(tmp_path / "pool.jpg"))
    terms = (Term(2, Text("golden retriever")), Term(1, pool), Term(-1, Text("fruit")))
    assert parse('2:"golden retriever" + ./pool.jpg - fruit') == Sum(terms)


def test_an_existing_file_written_as_a_path_is_a_picture_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.jpg", "Artist - Song AND more (2).jpg", 'a "b".png', "no extension"):
        path = tmp_path / name
        path.touch()
        for written in (f"./{name}", f"~/{name}", str(path)):
            assert parse(written) == Image(str(path))
            assert parse(str(parse(written))) == Image(str(path))
        assert parse(quoted(f"./{name}")) == Text(f"./{name}")
    assert parse("./a.jpg AND ~/a.jpg") == And((Image(str(tmp_path / "a.jpg")),) * 2)
    assert parse("2:./a.jpg") == Sum((Term(2, Image(str(tmp_path / "a.jpg"))),))
    assert parse("./none AND cat") == And((Text("./none"), CAT))


def test_days_and_folders_are_made_absolute_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse("under:photos") == Condition("under", os.path.realpath(tmp_path / "photos"))
    assert parse("before:today") == Condition("before", f"{date.today().isoformat()}T00:00:00")


def test_a_condition_is_the_filter_of_its_name() -> None:
    for written, filters in {
        "after:2023": Filters(after="2023-01-01T00:00:00"),
        "before:2023-05-31T18:30": Filters(before="2023-05-31T18:30:00"),
        "under:/x": Filters(under="/x"),
        "camera:canon": Filters(camera="canon"),
        'tag:"a dog"': Filters(tag="a dog"),
        "near:48.86,2.35,20": Filters(near=(48.86, 2.35, 20)),
        "min-side:100": Filters(min_side=100),
        "orientation:portrait": Filters(orientation="portrait"),
        "min-size:2M": Filters(min_size_bytes=2 * 2**20),
        "max-size:1.5K": Filters(max_size_bytes=1536),
    }.items():
        condition = parse(written)
        assert isinstance(condition, Condition)
        assert condition.filters == filters
    with pytest.raises(UsageError, match="no date"):
        Condition("after", "soon")


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "column", "reason"),
    [
        ("dog AND", 5, "AND needs something after it"),
        ("dog - ", 5, "- needs something after it"),
        ("AND dog", 1, "AND needs something before it"),
        ("- dog", 1, "- needs something before it"),
        ("dog AND OR cat", 9, "OR needs something before it"),
        ("dog AND () AND cat", 9, "( needs something after it"),
        ("do NOT enter", 4, "NOT follows without an operator"),
        ("a dog after:2023", 7, "after:2023 follows without an operator"),
        ("after:2023 a dog", 12, 'the text "a dog" follows without an operator'),
        ('"a" "b" AND c', 5, 'the text "b" follows without an operator'),
        ("(a) b AND c", 5, 'the text "b" follows without an operator'),
        ("(dog OR cat", 1, "this ( is never closed"),
        ("dog AND (cat", 9, "this ( is never closed"),
        ("dog OR cat)", 11, "this ) closes nothing"),
        ("(dog OR cat)) AND a", 13, "this ) closes nothing"),
        ("a dog (brown OR white)", 7, "this ( follows without an operator"),
        ('a dog "x AND cat', 7, "this quote is never closed"),
        ('"a dog AND cat', 1, "this quote is never closed"),
        ('cat AND ""', 9, "these quotes hold nothing"),
        ('cat AND " "', 9, "these quotes hold nothing"),
        ("dog + (cat AND x)", 7, "+, - and weights are for texts and pictures"),
        ("2:(cat AND x)", 1, "+, - and weights are for texts and pictures"),
        ("dog - after:2023", 7, "+, - and weights are for texts and pictures"),
        ("dog + NOT cat", 7, "NOT needs something before it"),
        ("1001:dog + cat", 1, "the weight 1001 must be at most 1,000"),
        ("0.1234567:dog + cat", 1, "up to 6 decimals"),
        ("dog AND after:soon", 9, "after: 'soon' is no date"),
        ("dog AND near:1,2", 9, "near: '1,2' is not LAT,LON,KM"),
        ("dog AND near:91,2,3", 9, "no place on Earth"),
        ("dog AND min-side:0", 9, "min-side: '0' is no number of pixels"),
        ("dog AND orientation:up", 9, "orientation: 'up' is no shape"),
        ("dog AND max-size:big", 9, "max-size: 'big' is no size"),
        ("dog AND after: 2023", 9, "after: must be followed by its value without a blank"),
        ("2: dog + cat", 1, "2: must be followed by its value without a blank"),
        ("dog AND id:x", 9, "id:x is no id"),
        ("dog AND ./none.jpg", 9, "there is no picture ./none.jpg"),
        ("2:~/none.HEIC - dog", 3, "there is no picture ~/none.HEIC"),
    ],
)
def test_an_error_names_its_column_in_one_line(text: str, column: int, reason: str) -> None:
    with pytest.raises(QueryError) as caught:
        parse(text)
    message = str(caught.value)
    assert message.startswith(f"column {column} of the query: ")
    assert reason in message
    assert "\n" not in message


def test_an_expression_has_limits() -> None:
    assert len(list(leaves_of(parse(" OR ".join("x" * MAX_OPERANDS))))) == MAX_OPERANDS
    with pytest.raises(QueryError, match=rf"column {5 * MAX_OPERANDS + 1} .* more than {MAX_OPERANDS} parts"):
        parse(" OR ".join("x" * (MAX_OPERANDS + 1)))
    for opening in ("(", "NOT "):
        closing = ")" if opening == "(" else ""
        assert parse(f"{opening * MAX_DEPTH}x{closing * MAX_DEPTH} AND y")
        with pytest.raises(QueryError, match=f"more than {MAX_DEPTH} parentheses"):
            parse(f"{opening * (MAX_DEPTH + 1)}x{closing * (MAX_DEPTH + 1)} AND y")
    deepest = parse(f"{'NOT ' * MAX_DEPTH}x + y")
    assert parse(str(deepest)) == deepest, "its text is no deeper than what was written"
    with pytest.raises(QueryError, match="an expression may have 10,000"):
        parse(f"x AND {'y' * MAX_CHARACTERS}")
    assert parse("y " * MAX_CHARACTERS) == Text("y " * MAX_CHARACTERS), "plain text is the encoder's to judge"


@pytest.mark.parametrize("piece", ['" ', '"', "(", ")", "a ", "after:", "\\", "1:", "NOT ", "x AND ", "( ", '\\" '])
def test_no_expression_takes_long_to_read(piece: str) -> None:
    text = ("x AND " + piece * MAX_CHARACTERS)[:MAX_CHARACTERS]
    started = time.monotonic()
    with contextlib.suppress(QueryError):
        parse(text)
    assert time.monotonic() - started < 2


# -- laws ------------------------------------------------------------------------------------------------------------

TEXTS = st.builds(Text, st.text(st.characters(exclude_categories=()), min_size=1, max_size=8).filter(str.strip))
PATHS = st.builds(Image, st.text(st.characters(exclude_categories=()), max_size=8).map("/".__add__))
PHOTOS = st.builds(Photo, st.integers(0, 10**18 - 1))
CONDITIONS = st.one_of(
    st.sampled_from(
        [Condition("after", "2023-05"), Condition("near", "48.86,2.35,20"), Condition("orientation", "square")]
    ),
    st.builds(Condition, st.just("min-side"), st.integers(1, 10**9 - 1).map(str)),
    st.builds(
        Condition,
        st.just("camera"),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
    ),
    st.builds(Condition, st.just("under"), st.text(st.characters(exclude_characters="\0"), max_size=8)),
)
WEIGHTS = st.integers(-(10**9), 10**9).map(lambda millionths: millionths / 10**6)


def sums_of(parts: st.SearchStrategy[Query]) -> st.SearchStrategy[Query]:
    terms = st.builds(Term, WEIGHTS | st.sampled_from([1, -1]), parts)
    several = st.lists(terms, min_size=2, max_size=3)
    return (several | terms.filter(lambda term: term.weight != 1).map(lambda term: [term])).map(tuple).map(Sum)


def joined(parts: st.SearchStrategy[Query]) -> st.SearchStrategy[Query]:
    several = st.lists(parts, min_size=2, max_size=3).map(tuple)
    return st.one_of(parts, parts.map(Not), several.map(And), several.map(Or))


VECTORS = TEXTS | PATHS | PHOTOS
QUERIES = joined(joined(VECTORS | sums_of(VECTORS | sums_of(VECTORS)) | CONDITIONS))


@given(QUERIES.filter(lambda query: len(list(leaves_of(query))) <= MAX_OPERANDS))
@settings(max_examples=300)
def test_a_query_comes_out_of_its_text_as_it_went_in(query: Query) -> None:
    assert parse(str(query)) == query


PIECES = (
    "AND OR NOT + - ( ) \" \\ dog a_cat 2: -0.5: after: 2023 under:/x image:x ./x id:4 4 : é camera:' - near:1,2,3"
).split(" ")


@given(st.lists(st.sampled_from([*PIECES, " ", " ", " ", "\n"]), max_size=16).map("".join))
@settings(max_examples=500)
def test_any_text_is_understood_or_refused_with_a_column_that_is_there(text: str) -> None:
    try:
        query = parse(text)
    except QueryError as error:
        found = re.match(r"column (\d+) of the query: ", str(error))
        assert found
        assert 1 <= int(found[1]) <= len(text)
    else:
        assert query == Text(text) or parse(str(query)) == query


@given(st.text(st.characters(exclude_categories=()), max_size=30))
def test_no_text_crashes_the_parser(text: str) -> None:
    try:
        assert parse(text)
    except QueryError:
        assert text


@pytest.mark.parametrize("name", ["~\0", "~\ud800", "/\ud800", "\udc41\0"])
def test_a_name_that_no_user_and_no_file_can_have_crashes_nothing(name: str) -> None:
    assert parse(name) == Text(name)
    assert parse(f"image:{name} AND dog") == parse(f'image:"{name}" AND dog')
    with pytest.raises(QueryError, match="column 9 of the query: under: under is"):
        parse(f"dog AND under:{name}")


def test_the_grammar_in_the_documents_names_every_rule_and_condition() -> None:
    from searchengine.conditions import CONDITIONS as NAMES

    document = (Path(__file__).parent.parent / "docs" / "query.md").read_text("utf-8")
    grammar = document.split("```ebnf")[1].split("```")[0]
    defined = set(re.findall(r"^([a-z]+) +=", grammar, re.MULTILINE))
    used = set(re.findall(r"\b[a-z]+\b", re.sub(r'"[^"]*"|\'"\'|\?[^?]*\?|\(\*.*?\*\)', "", grammar)))
    assert used <= defined
    assert set(NAMES) <= set(re.findall(r'"([a-z-]+)"', grammar))
    for number in (MAX_OPERANDS, MAX_DEPTH, f"{MAX_CHARACTERS:,}"):
        assert str(number) in document
