"""A query as it is written -> its tokens: operators, words, quoted texts, filters. Never fails; see docs/query.md."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from searchengine.conditions import CONDITIONS
from searchengine.text import printable

NAMES = "|".join(("image", "id", *CONDITIONS))
NUMBER = r"[+-]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
QUOTED = r'"(?:[^"\\]|\\.)*"'

# Words stand between blanks, ends or parentheses, signs between blanks or ends.
OPERATOR = re.compile(r"(?<![^\s()])(?:AND|OR|NOT)(?![^\s()])|(?<!\S)[+-](?!\S)")
# A ratio (2:1), a time (10:30) and "3: the title" are no weights.
WEIGHT = re.compile(rf"({NUMBER}):(?=[^\s0-9)])")
CONDITION = re.compile(rf"({NAMES}):(?=[^\s)])")
QUOTED_TEXT = re.compile(QUOTED, re.DOTALL)
# What begins a name or a number and forgets the rest.
LOOSE = re.compile(rf"(?:{NAMES}|{NUMBER}):(?=\s|$)")

MAY_BE_EXPRESSION = re.compile(
    rf"{OPERATOR.pattern}|(?<![^\s(:])(?:{NAMES}):(?=[^\s)])|\A[\s(]*(?:{NUMBER}:)?\"|\A[\s(]*{NUMBER}:(?=[(./~])"
)


class Fault(NamedTuple):
    """What is wrong with words where they are part of an expression, at a column from 0."""

    column: int
    reason: str


@dataclass(frozen=True)
class Token:
    """`kind` is an operator, a parenthesis, weight, condition, quoted, words, or end; `column` counts from 0.

    `text` is the number of a weight, the value of a condition, what is quoted, or the words.
    """

    kind: str
    text: str
    column: int
    name: str = ""
    fault: Fault | None = field(default=None, compare=False)

    def __str__(self) -> str:
        """As an error message calls it."""
        if self.kind in ("words", "quoted"):
            return f'the text "{_shortened(self.text)}"'
        if self.kind == "condition":
            return f"{self.name}:{_shortened(self.text)}"
        return {"weight": f"the weight {self.text}", "end": "the end"}.get(self.kind, self.kind)


def quoted(text: str) -> str:
    """A text in quotes, which the grammar takes as it stands."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def is_expression(tokens: list[Token]) -> bool:
    """Whether there is anything beside words: parentheses and quotes are found in prose, too, and so is `4:am`."""
    if any(token.kind not in ("words", "quoted", "weight", "(", ")") for token in tokens):
        return True
    kinds = [token.kind for token in tokens]
    if kinds[:1] == ["weight"]:
        return kinds[1] != "words" or tokens[1].text.startswith(("./", "../", "/", "~/"))
    return kinds == ["quoted"]


def tokens_of(text: str) -> list[Token]:
    """The tokens in their order."""
    tokens: list[Token] = []
    place, depth = 0, 0
    while True:
        place = _after_blanks(text, place)
        if place == len(text):
            return tokens
        operand_is_due = not tokens or tokens[-1].kind in ("AND", "OR", "NOT", "+", "-", "(", "weight")
        if operator := OPERATOR.match(text, place):
            tokens.append(Token(operator[0], operator[0], place))
            place = operator.end()
        elif text[place] in "()":
            tokens.append(Token(text[place], text[place], place))
            depth = max(0, depth + (1 if text[place] == "(" else -1))
            place += 1
        elif operand_is_due and (weight := WEIGHT.match(text, place)):
            tokens.append(Token("weight", weight[1], place))
            place = weight.end()
        elif condition := CONDITION.match(text, place):
            value, end = _value(text, condition.end())
            tokens.append(Token("condition", value, place, name=condition[1]))
            place = end
        elif (passage := QUOTED_TEXT.match(text, place)) and _is_boundary(text, passage.end()):
            tokens.append(Token("quoted", _unquoted(passage[0]), place))
            place = passage.end()
        else:
            end, fault = _words(text, place, in_parentheses=depth > 0)
            tokens.append(Token("words", text[place:end].rstrip(), place, fault=fault))
            place = end


def _words(text: str, start: int, *, in_parentheses: bool) -> tuple[int, Fault | None]:
    """Where the words from `start` end: at an operator, a filter, or the parenthesis that closes what they are in.

    Parentheses and quoted passages within the words are part of them.
    """
    fault = None
    if loose := LOOSE.match(text, start):
        fault = Fault(start, f"{loose[0]} must be followed by its value without a blank; or put the text in quotes")
    open_parentheses: list[int] = []
    place = start
    while place < len(text):
        begins_word = place == start or text[place - 1].isspace() or text[place - 1] == "("
        if begins_word and place > start and (OPERATOR.match(text, place) or CONDITION.match(text, place)):
            break
        if text[place] == "(":
            open_parentheses.append(place)
        elif text[place] == ")" and open_parentheses:
            open_parentheses.pop()
        elif text[place] == ")" and in_parentheses:
            break
        elif text[place] == ")":
            fault = fault or Fault(place, "this ) closes nothing; remove it, or put the text in quotes")
        elif text[place] == '"' and begins_word:
            passage = QUOTED_TEXT.match(text, place)
            if passage is None:
                fault = fault or Fault(place, "this quote is never closed; close it, or put the whole text in quotes")
            elif not text[passage.end() : passage.end() + 1].isalnum():
                place = passage.end()
                continue
        place += 1
    if open_parentheses:
        reason = "this ( follows without an operator, and is not closed before one; put the text in quotes"
        fault = fault or Fault(open_parentheses[0], reason)
    return place, fault


def _value(text: str, start: int) -> tuple[str, int]:
    """The value of a condition, quoted or up to a blank or the parenthesis that it is in, and where it ends."""
    passage = QUOTED_TEXT.match(text, start)
    if passage:
        return _unquoted(passage[0]), passage.end()
    place, opened = start, 0
    while place < len(text) and not text[place].isspace():
        opened += {"(": 1, ")": -1}.get(text[place], 0)
        if opened < 0:
            break
        place += 1
    return text[start:place], place


def _unquoted(passage: str) -> str:
    return re.sub(r'\\([\\"])', r"\1", passage[1:-1])


def _is_boundary(text: str, place: int) -> bool:
    return place == len(text) or text[place].isspace() or text[place] in "()"


def _after_blanks(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _shortened(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
