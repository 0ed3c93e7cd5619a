"""Labelled sets from captions, by the rules in the module's own words, and what a cutoff is worth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from searchengine.concepts import (
    Concept,
    Cutoff,
    bootstrap,
    keep_above,
    keep_best,
    keep_to_largest_gap,
    label_concepts,
    label_photos,
    measure_cutoff,
    oracle_f1,
)
from searchengine.vectors import FloatMatrix

NOTHING = ["It is quiet .", "Grey in grey ."]


def labelled(*photos: list[str], least: int = 1) -> dict[str, Concept]:
    """By name; the photos stand beside two that show nothing."""
    concepts = label_concepts([*photos, NOTHING, NOTHING], min_photos=least)
    return {concept.name: concept for concept in concepts}


def states(concept: Concept) -> str:
    """Of each photo: + shows it, - does not, ? is not counted."""
    return "".join(
        "+" if shown else "-" if counted else "?" for shown, counted in zip(concept.shown, concept.counted, strict=True)
    )


def on_a_line(scores: list[float]) -> tuple[FloatMatrix, FloatMatrix]:
    """A query, and a library of unit vectors that have these scores."""
    library = np.array([[score, np.sqrt(1 - score**2)] for score in scores], np.float32)
    return np.array([1.0, 0.0], np.float32), library


def test_a_photo_shows_what_two_of_its_captions_say_and_is_not_counted_where_one_does() -> None:
    found = labelled(["A cat sleeps .", "The cat ."], ["A cat .", "An animal ."], ["The sea .", "Sand ."])
    assert states(found["cat"]) == "+?---"


def test_the_forms_of_a_word_are_one_concept_called_by_the_form_that_is_said_most() -> None:
    found = labelled(["Two dogs run .", "Dogs running ."], ["The dogs .", "A dog ."], ["Puppies .", "A puppy ."])
    assert states(found["dogs"]) == "+++--"
    assert "dog" not in found


def test_what_is_said_implies_what_it_is_a_kind_of() -> None:
    found = labelled(["A poodle .", "The poodle ."], ["A boat .", "A canoe ."])
    assert states(found["poodle"]) == "+----"[:4]
    assert states(found["dog"]) == "+---"
    assert states(found["animal"]) == "+---"
    assert states(found["boat"]) == "-+--"


def test_two_words_side_by_side_are_a_concept_and_photos_that_say_them_apart_are_not_counted() -> None:
    found = labelled(
        ["A tennis ball .", "The tennis ball ."],
        ["Tennis with a ball .", "Tennis and a ball ."],
        ["A ball .", "Ball !"],
    )
    assert states(found["tennis ball"]) == "+?---"


def test_words_that_name_nothing_and_words_that_captions_do_not_agree_on_are_no_concepts() -> None:
    opinion = [["A hat .", "A man ."]] * 3
    found = labelled(["A red hat .", "The hat is red ."], *opinion)
    assert "red" not in found
    assert "the" not in found
    assert "hat" not in found


def test_a_concept_needs_enough_photos_that_show_it_and_enough_that_do_not() -> None:
    photos = [["A cat .", "A cat ."]] * 3
    assert "cat" in labelled(*photos, least=2)
    assert "cat" not in labelled(*photos, least=4)
    assert label_concepts([["A cat .", "A cat ."]] * 5, min_photos=1) == []


def test_photos_match_that_share_two_concepts_and_do_not_where_they_share_none() -> None:
    both, guitar, sand = ["A guitar on a boat .", "Guitar , boat ."], ["A guitar .", "Guitar ."], ["Sand .", "Sand ."]
    filler = [[f"{word} .", f"A {word} ."] for word in "tree lamp stone cloud moon star leaf brush clock".split()]
    concepts = label_concepts([both, both, guitar, sand, *filler], min_photos=1)
    of_each = dict(label_photos(concepts, min_photos=1))
    assert sorted(of_each) == [0, 1]
    assert states(of_each[0]) == "?+?" + "-" * 10


def test_the_labels_of_real_captions_are_what_a_person_would_expect(data: Path) -> None:
    entries = json.loads((data / "coco_cc" / "captions.json").read_text("utf-8"))
    found = {concept.name: concept for concept in label_concepts([e["captions"] for e in entries], min_photos=3)}
    assert {"pizza", "skateboard", "stop sign", "elephant", "toilet"} <= set(found)
    assert not {"a", "the", "with", "standing", "white"} & set(found)
    for concept in found.values():
        assert concept.shown.sum() >= 3
        assert not (concept.shown & ~concept.counted).any()


def test_a_cutoff_is_measured_as_by_hand() -> None:
    query, library = on_a_line([0.9, 0.8, 0.7, 0.6, 0.5])
    concept = Concept(
        name="x", shown=np.array([True, False, True, False, False]), counted=np.array([True, True, True, False, True])
    )
    cutoff = measure_cutoff([concept], queries=query[None], library=library, judge=keep_above(0.55))
    assert cutoff.precision == pytest.approx([2 / 3])  # the fourth is kept, but not counted
    assert cutoff.recall == pytest.approx([1])
    assert cutoff.f1 == pytest.approx([0.8])
    assert cutoff.oracle_f1 == pytest.approx([0.8])
    assert cutoff.false_alarm.tolist() == [True]  # the second is kept, of a library without all that may show it
    assert measure_cutoff(
        [concept], queries=query[None], library=library, judge=keep_above(0.85)
    ).false_alarm.tolist() == [False]


def test_who_keeps_nothing_has_no_precision_and_no_f1() -> None:
    query, library = on_a_line([0.9, 0.1])
    concept = Concept(name="x", shown=np.array([True, False]), counted=np.array([True, True]))
    cutoff = measure_cutoff([concept], queries=query[None], library=library, judge=keep_above(0.95))
    assert np.isnan(cutoff.precision[0])
    assert (cutoff.recall[0], cutoff.f1[0]) == (0, 0)
    assert cutoff.summary()["f1_of_oracle"] == (0, 0, 0)


@given(st.lists(st.tuples(st.floats(-0.99, 0.99), st.booleans()), min_size=1, max_size=30))
def test_no_cutoff_beats_the_oracle(photos: list[tuple[float, bool]]) -> None:
    query, library = on_a_line([score for score, _ in photos])
    shown = np.array([is_shown for _, is_shown in photos])
    shown[0] = True
    concept = Concept(name="x", shown=shown, counted=np.ones(len(shown), np.bool_))
    best = oracle_f1(library @ query, concept)
    for judge in (keep_best(1), keep_best(3), keep_to_largest_gap(), keep_above(0.2)):
        cutoff = measure_cutoff([concept], queries=query[None], library=library, judge=judge)
        if len(np.unique(library @ query)) == len(shown):
            assert cutoff.f1[0] <= best + 1e-12


def test_the_baselines_keep_what_their_names_say() -> None:
    query, library = on_a_line([0.1, 0.9, 0.85, 0.2])
    assert keep_best(2)(query, library).tolist() == [False, True, True, False]
    assert keep_best(9)(query, library).all()
    assert keep_to_largest_gap()(query, library).tolist() == [False, True, True, False]
    assert keep_to_largest_gap()(query, library[:1]).tolist() == [True]
    assert keep_to_largest_gap()(query, library[:0]).tolist() == []
    assert keep_above(0.86)(query, library).tolist() == [False, True, False, False]


@pytest.mark.filterwarnings("error")
def test_what_is_not_known_of_any_query_has_no_interval_and_warns_of_nothing() -> None:
    found = bootstrap(lambda drawn: float(np.full(5, np.nan)[drawn].mean()), count=5)
    assert np.isnan(found).all()
    cutoff = Cutoff(
        precision=np.full(5, np.nan),
        recall=np.zeros(5),
        f1=np.zeros(5),
        oracle_f1=np.zeros(5),
        false_alarm=np.ones(5, np.bool_),
    )
    assert np.isnan(cutoff.summary()["precision"]).all()


def test_a_bootstrap_interval_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(3).normal(5, 2, 400)
    mean, low, high = bootstrap(lambda drawn: float(values[drawn].mean()), count=len(values))
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert low < mean < high
