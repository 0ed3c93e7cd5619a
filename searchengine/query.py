"""The query language: a query as it is written -> what it asks for, as a tree of plain values, and back.

    2:"golden retriever" + ./pool.jpg - fruit
    "a dog" AND NOT leash AND after:2023-01-01 AND near:48.86,2.35,20

The grammar, and when a query is plain text and no expression, are in docs/query.md. `str` of a tree is an expression
that `parse` turns into an equal tree.
"""

from __future__ import annotations

import os
import re
from typing import NoReturn

from searchengine.errors import QueryError, UsageError
from searchengine.pictures import expanded, is_written_as_path, names_a_picture
from searchengine.query_tokens import MAY_BE_EXPRESSION, Token, is_expression, tokens_of
from searchengine.query_tree import MAX_WEIGHT, WEIGHT_DECIMALS
from searchengine.query_tree import And as And
from searchengine.query_tree import Condition as Condition
from searchengine.query_tree import Image as Image
from searchengine.query_tree import Not as Not
from searchengine.query_tree import Or as Or
from searchengine.query_tree import Photo as Photo
from searchengine.query_tree import Query as Query
from searchengine.query_tree import Sum as Sum
from searchengine.query_tree import Term as Term
from searchengine.query_tree import Text as Text
from searchengine.query_tree import Vector as Vector
from searchengine.query_tree import leaves_of as leaves_of
from searchengine.text import printable

MAX_CHARACTERS = 10_000
MAX_OPERANDS = 32
MAX_DEPTH = 16


def parse(text: str, *, max_characters: int = MAX_CHARACTERS, files: bool = True) -> Query:
    """What a query asks for. One without operators is a `Text`, as it stands, or an `Image`, if it is a path to one.

    Without `files`, for queries of strangers, no file is looked for: what is written as a path is a text, `image:` is
    refused. Raises QueryError that names the column, from 1, of what is wrong in an expression.
    """
    if files and is_written_as_path(text) and os.path.isfile(expanded(text)):
        return Image(text)
    if MAY_BE_EXPRESSION.search(text):
        if len(text) > max_characters:
            raise QueryError(
                f"the query has {len(text):,} characters and operators, but an expression may have {max_characters:,}; "
                "shorten it"
            )
        tokens = tokens_of(text)
        if is_expression(tokens):
            return _Parser(tokens, end=len(text), files=files).query()
    return Image(text) if files and names_a_picture(text) else Text(text)


class _Parser:
    """By recursive descent: a method a rule of the grammar, which takes the tokens that the rule describes."""

    def __init__(self, tokens: list[Token], *, end: int, files: bool) -> None:
        self._files = files
        self._tokens = [*tokens, Token("end", "", end)]
        self._place = 0
        self._depth = 0
        self._operands = 0

    def query(self) -> Query:
        found = self._either()
        if self._next.kind == ")":
            _fail(self._next, "this ) closes nothing; remove it")
        if self._next.kind != "end":
            _fail(self._next, f"{self._next} follows without an operator; {ADVICE}")
        return found

    @property
    def _next(self) -> Token:
        return self._tokens[self._place]

    def _take(self, *kinds: str) -> Token | None:
        token = self._next
        if token.kind not in kinds:
            return None
        self._place += 1
        return token

    def _either(self) -> Query:
        parts = [self._all()]
        while self._take("OR"):
            parts.append(self._all())
        return Or(tuple(parts)) if len(parts) > 1 else parts[0]

    def _all(self) -> Query:
        parts = [self._negated()]
        while self._take("AND"):
            parts.append(self._negated())
        return And(tuple(parts)) if len(parts) > 1 else parts[0]

    def _negated(self) -> Query:
        negation = self._take("NOT")
        if negation is None:
            return self._sum()
        self._enter(negation)
        found = Not(self._negated())
        self._depth -= 1
        return found

    def _sum(self) -> Query:
        start = self._next
        weight, part = self._term()
        if weight == 1 and self._next.kind not in ("+", "-"):
            return part
        terms = [Term(weight, _vector(part, start))]
        while sign := self._take("+", "-"):
            start = self._next
            weight, part = self._term()
            terms.append(Term(weight if sign.kind == "+" else -weight, _vector(part, start)))
        return Sum(tuple(terms))

    def _term(self) -> tuple[float, Query]:
        token = self._take("weight")
        if token is None:
            return 1.0, self._operand()
        weight = float(token.text)
        if abs(weight) > MAX_WEIGHT or len(token.text.partition(".")[2]) > WEIGHT_DECIMALS:
            _fail(
                token, f"the weight {token.text} must be at most {MAX_WEIGHT:,}, with up to {WEIGHT_DECIMALS} decimals"
            )
        return weight, self._operand()

    def _operand(self) -> Query:
        opening = self._take("(")
        if opening:
            self._enter(opening)
            found = self._either()
            if not self._take(")"):
                if self._next.kind == "end":
                    _fail(opening, "this ( is never closed; close it, or put the text in quotes")
                _fail(self._next, f"{self._next} follows without an operator; {ADVICE}")
            self._depth -= 1
            return found
        token = self._take("words", "quoted", "condition")
        if token is None:
            before = self._tokens[self._place - 1] if self._place else None
            if self._next.kind in ("end", ")") and before:
                _fail(before, f"{before} needs something after it; {ADVICE}")
            _fail(self._next, f"{self._next} needs something before it; {ADVICE}")
        self._operands += 1
        if self._operands > MAX_OPERANDS:
            _fail(token, f"more than {MAX_OPERANDS} parts; ask for fewer at a time")
        if token.kind == "condition":
            if token.name == "image" and not self._files:
                _fail(
                    token, "image: names a file, and no file is read here; send the picture itself, or write id:NUMBER"
                )
            return _condition(token)
        if not token.text.strip():
            _fail(token, "these quotes hold nothing; describe what the photo shows")
        if token.kind == "quoted":
            return Text(token.text)
        if token.fault:
            _fail(Token("words", "", token.fault.column), token.fault.reason)
        try:
            return Image(token.text) if self._files and names_a_picture(token.text) else Text(token.text)
        except QueryError as error:
            _fail(token, str(error))

    def _enter(self, token: Token) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            _fail(token, f"more than {MAX_DEPTH} parentheses and NOTs within each other; write it more simply")


ADVICE = 'write AND, OR, + or - between two parts, or put a text that is meant as it stands in "quotes"'


def _vector(part: Query, start: Token) -> Vector:
    if isinstance(part, Condition | Not | And | Or):
        _fail(start, "+, - and weights are for texts and pictures; join conditions and filters with AND, OR, NOT")
    return part


def _condition(token: Token) -> Query:
    if token.name == "image":
        return Image(token.text)
    if token.name == "id":
        if not re.fullmatch(r"\d{1,18}", token.text, re.ASCII):
            _fail(token, f"id:{printable(token.text)} is no id; ids are the numbers in the results of a search")
        return Photo(int(token.text))
    try:
        return Condition(token.name, token.text)
    except UsageError as error:
        _fail(token, f"{token.name}: {error}, or put the text in quotes")


def _fail(token: Token, reason: str) -> NoReturn:
    raise QueryError(f"column {token.column + 1} of the query: {reason}")
