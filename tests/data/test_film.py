# SPDX-License-Identifier: Apache-2.0
"""Rendered films: repeatable, truthful to their events, and asked only what they answer."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from hourllava.data import TOPICS, Film, chance
from hourllava.data.film import COLOURS, part_of_day
from hourllava.data.questions import possible_answers


def test_a_film_is_its_seed() -> None:
    first, again, other = Film.random(5, 120), Film.random(5, 120), Film.random(6, 120)
    assert first == again
    assert first != other
    assert np.array_equal(first.frame(40, 64), again.frame(40, 64))


@pytest.mark.parametrize("seconds", [2, 4, 8, 33, 128, 3600])
def test_events_last_two_seconds_and_stay_in_one_scene(seconds: int) -> None:
    for seed in range(20):
        film = Film.random(seed, seconds)
        starts = [e.start for e in film.events]
        assert starts == sorted(starts)
        assert all(b - a >= 2 for a, b in itertools.pairwise(starts))
        assert all(0 <= s <= seconds - 2 for s in starts)
        assert film.scenes[0].start == 0
        assert film.scenes[-1].end == seconds
        for event in film.events:
            assert event.part_of_day == part_of_day(event.start + 0.5, seconds)
            if seconds >= 32:
                scene = next(s for s in film.scenes if s.start <= event.start < s.end)
                assert scene.landscape == event.landscape
                assert event.start + 2 <= scene.end


def test_an_event_is_drawn_where_and_when_it_is_said_to_be() -> None:
    film = Film.random(3, 200)
    for event in film.events:
        during = film.frame(event.start + 0.5, 64).astype(int)
        without = replace(film, events=()).frame(event.start + 0.5, 64).astype(int)
        rows, columns = (np.abs(during - without).sum(-1) > 100).nonzero()
        assert abs(np.median(rows) - event.y * 64) <= 5
        assert abs(np.median(columns) - event.x * 64) <= 5
        for second in (event.start - 0.5, event.start + 2.0):
            if 0 <= second < film.seconds and not any(0 <= second - e.start < 2 for e in film.events):
                assert np.array_equal(film.frame(second, 64), replace(film, events=()).frame(second, 64))
        top, left = event.place.split()
        assert (event.y > 0.6) == (top == "bottom")
        assert (event.x > 0.5) == (left == "right")


def test_a_still_shape_has_its_colour_at_its_centre() -> None:
    film = next(f for f in (Film.random(s, 64) for s in range(100)) if f.events[0].shape == "square")
    event = film.events[0]
    picture = film.frame(event.start + 0.5, 128)
    centre = picture[int(event.y * 128), int(event.x * 128)].astype(int)
    assert np.abs(centre - COLOURS[event.colour]).max() <= 2


def test_questions_cover_every_topic_and_have_possible_answers() -> None:
    answers = possible_answers()
    seen = set()
    for seed in range(10):
        questions = Film.random(seed, 3600).questions()
        assert len({q.text for q in questions}) == len(questions)
        for question in questions:
            assert question.answer in answers[question.topic]
            assert question.needle == (question.second is not None)
            seen.add(question.topic)
    assert seen == set(TOPICS)
    assert [round(1 / chance(t)) for t in TOPICS] == [3, 4, 6, 4, 6, 8]


def test_a_landscape_is_asked_about_only_if_one_event_happened_there() -> None:
    for seed in range(20):
        film = Film.random(seed, 3600)
        for question in (q for q in film.questions() if q.topic == "event"):
            inside = [e for e in film.events if f"the {e.landscape}?" in question.text]
            assert [e.shape for e in inside] == [question.answer]


def test_too_many_events_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Film.random(0, 4, events=3)
