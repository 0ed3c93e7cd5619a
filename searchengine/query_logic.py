"""What AND, OR and NOT make of the probabilities of their parts.

AND takes their geometric mean. A product would be right for parts that are independent and as sure as they say. But
each is judged with caution, and the more cautious numbers are multiplied, the more of the photos that show all that was
asked for fall below the line of matches. The order within one AND is the same. OR takes its parts for independent, and
NOT turns them round. A filter is no judgement: whatever passes, it makes nothing likelier, so no mean counts it.

All is computed by logarithms, so that neither photos that match hardly nor photos that match surely look the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from searchengine.query_tree import And, Condition, Not, Or, Query

# Log-odds are compared in so many decimals: which of two equal photos comes first never depends on what rounds how.
DECIMALS = 9

Probabilities = NDArray[np.float64]


class Leaf(NamedTuple):
    """A condition that is not made of others, by its number; `negated` where the opposite is asked for."""

    number: int
    negated: bool
    is_filter: bool


class Branch(NamedTuple):
    """All of its parts hold, or any of them. No part is a branch of the same kind."""

    all_of: bool
    parts: tuple[Leaf | Branch, ...]


def is_filter(query: Query) -> bool:
    """Whether filters alone decide."""
    match query:
        case Not(part):
            return is_filter(part)
        case And(parts) | Or(parts):
            return all(is_filter(part) for part in parts)
    return isinstance(query, Condition)


def normal_form(query: Query) -> tuple[Leaf | Branch, list[Query]]:
    """The same with NOT before leaves only, by De Morgan's laws, and each AND in an AND, OR in an OR as one.

    So these laws hold by definition, which the mean of means, and its opposite, would break. Also what each leaf asks
    for, by its number: a text, a picture, a sum, or filters, however they are joined.
    """
    leaves: list[Query] = []

    def tree(query: Query, *, negated: bool) -> Leaf | Branch:
        filters = is_filter(query)
        if isinstance(query, Not) and not filters:
            return tree(query.part, negated=not negated)
        if isinstance(query, And | Or) and not filters:
            all_of = isinstance(query, And) != negated
            parts = [tree(part, negated=negated) for part in query.parts]
            inner = [part.parts if isinstance(part, Branch) and part.all_of == all_of else (part,) for part in parts]
            return Branch(all_of, tuple(chain.from_iterable(inner)))
        if query not in leaves:
            leaves.append(query)
        return Leaf(leaves.index(query), negated, filters)

    return tree(query, negated=False), leaves


def leaves_of(tree: Leaf | Branch) -> Iterator[Leaf]:
    if isinstance(tree, Leaf):
        yield tree
    else:
        for part in tree.parts:
            yield from leaves_of(part)


def log_odds(tree: Leaf | Branch, probability: Callable[[Leaf], Probabilities]) -> NDArray[np.float64]:
    """Those (n,) of the whole, from the probabilities (n,) of each leaf as if it were not negated.

    They rise with the probability of a leaf that is not negated and fall with that of one that is.
    """

    def logarithms(tree: Leaf | Branch) -> tuple[Probabilities, Probabilities]:
        """Of the probability that it holds, and that it fails."""
        if isinstance(tree, Leaf):
            holds = probability(tree)
            found = np.log(holds), np.log1p(-holds)
            return found[::-1] if tree.negated else found
        parts = [logarithms(part) for part in tree.parts]
        if tree.all_of:
            judged = sum(not (isinstance(part, Leaf) and part.is_filter) for part in tree.parts)
            every = np.sum([holds for holds, _ in parts], axis=0) / judged
            return every, np.log(-np.expm1(every))
        none = np.sum([fails for _, fails in parts], axis=0)
        return np.log(-np.expm1(none)), none

    with np.errstate(divide="ignore"):
        holds, fails = logarithms(tree)
    return np.round(holds - fails, DECIMALS)
