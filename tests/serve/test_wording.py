# SPDX-License-Identifier: Apache-2.0
"""Text comes out as soon as it is certain, and is in the end what the tokens say."""

import pytest
from tiny_model import make_tokenizer

from hourllava.serve.wording import Wording

TOKENIZER = make_tokenizer()  # one token a byte


def pieces(text: str, stop: tuple[str, ...] = (), cut: int = 0) -> tuple[list[str], str, bool]:
    """What comes out for each byte but the last `cut` ones, what in the end, and whether a stop text came."""
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    assert len(tokens) == len(text.encode())
    wording, given = Wording(TOKENIZER, stop), []
    for token in tokens[: len(tokens) - cut]:
        given.append(wording.add(token))
        if wording.stopped:
            return given, "", True
    return given, wording.rest(), False


def test_letters_come_one_by_one() -> None:
    assert pieces("red") == (["r", "e", "d"], "", False)


def test_characters_come_whole() -> None:
    given, rest, _ = pieces("aé🎬")
    assert given == ["a", "", "é", "", "", "", "🎬"]
    assert rest == ""


def test_half_a_character_is_told_in_the_end() -> None:
    given, rest, _ = pieces("aé", cut=1)
    assert given == ["a", ""]
    assert rest == "\ufffd"


def test_white_space_at_the_ends_is_left_out() -> None:
    given, rest, _ = pieces("\n  a b \n")
    assert given == ["", "", "", "a", "", " b", "", ""]
    assert rest == ""


def test_stop_text_ends_it() -> None:
    given, _, stopped = pieces("one. Two. Three", (". T", "never"))
    assert stopped
    assert "".join(given) == "one"


def test_what_may_become_a_stop_text_waits() -> None:
    given, rest, stopped = pieces("abXaXYabc", ("XY!", "bcd"))
    assert not stopped
    assert "".join(given) + rest == "abXaXYabc"
    # "b" may begin "bcd", "X" may begin "XY!".
    assert given == ["a", "", "b", "Xa", "", "", "XYa", "", ""]
    assert rest == "bc"


@pytest.mark.parametrize(
    ("text", "stop", "kept"), [("aab", ("ab",), "a"), ("abc", ("c", "bc"), "a"), ("x", ("x",), "")]
)
def test_the_first_stop_text_counts(text: str, stop: tuple[str, ...], kept: str) -> None:
    given, _, stopped = pieces(text, stop)
    assert stopped
    assert "".join(given) == kept
