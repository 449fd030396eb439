# SPDX-License-Identifier: Apache-2.0
"""What odd replies choose."""

import pytest

from hourllava.evaluate.replies import read_caption, read_first_letter, read_letter, read_yes_no


@pytest.mark.parametrize(
    ("reply", "chosen"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("  C) three", "C"),
        ("(D)", "D"),
        ("**B**", "B"),
        ("\\boxed{C}", "C"),
        ("'A'", "A"),
        ("The best answer is: C. Three.", "C"),
        ("The best answer is C", "C"),
        ("Answer: (B)", "B"),
        ("Answer:\n\nD", "D"),
        ("the correct answer is option D.", "D"),
        ("Best answer: C", "C"),
        ("Option B is right", "B"),
        ("Based on the video, the answer is C.", "C"),
        ("Based on what Dana says, C", "C"),
        ("A and B are wrong, so the answer is D", "D"),
        ("The answer is B. A would be too early, D too late.", "B"),
        ("The answer is A at first sight; on reflection the answer is C", "C"),
        ("I think D", "D"),
        ("vitamin C", "C"),
        ("A man in red", "A"),  # as the benchmarks' scripts have it
        ("", None),
        ("   \n", None),
        ("b", None),
        ("E", None),
        ("None of the above", None),
        ("BCD", None),
        ("Based on Dana's words", None),
        ("D's", None),
        ("a red car", None),
        ("!!!!!!!!", None),
        ("1. B", "B"),
        ("选B。", "B"),  # a letter among signs of another script stands alone, too
    ],
)
def test_letters(reply: str, chosen: str | None) -> None:
    assert read_letter(reply) == chosen


def test_letters_go_as_far_as_there_are_choices() -> None:
    assert read_letter("E", 5) == "E"
    assert read_letter("C", 2) is None
    assert read_letter("The answer is E, not B", 4) == "B"


@pytest.mark.parametrize(
    ("reply", "chosen"),
    [
        ("B", "B"),
        (" B. dribbling\n", "B"),
        ("C) passing", "C"),
        ("The best option is B", None),  # left to the judge
        ("Both", None),
        ("B and C", None),
        ("E.", None),
        ("", None),
    ],
)
def test_letters_that_begin_a_reply(reply: str, chosen: str | None) -> None:
    assert read_first_letter(reply) == chosen


@pytest.mark.parametrize(
    ("reply", "chosen"),
    [
        ("yes", "yes"),
        ("Yes, he is.", "yes"),
        (" NO.", "no"),
        ("No", "no"),
        ("not at all", None),
        ("nobody", None),
        ("I would say yes", None),
        ("", None),
    ],
)
def test_yes_or_no(reply: str, chosen: str | None) -> None:
    assert read_yes_no(reply) == chosen


@pytest.mark.parametrize(
    ("reply", "chosen"),
    [
        ("Option 1: A man dunks.", "Option 1"),
        ("Option 2", "Option 2"),
        ("Option 2.", "Option 2"),
        ("2", "Option 2"),
        ("A man dribbles.", "Option 2"),
        ("B) A man dribbles.", "Option 2"),
        ("\nOption 1\n", "Option 1"),
        ("Option 3", None),
        ("A man", None),
        ("Option 1: A man dunks", None),
        ("", None),
    ],
)
def test_captions(reply: str, chosen: str | None) -> None:
    question = "Which description is a better match?\nOption 1: A man dunks.\nOption 2: A man dribbles.\n"
    assert read_caption(reply, question) == chosen
