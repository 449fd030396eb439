# SPDX-License-Identifier: Apache-2.0
"""What a model's reply chooses, read by rule as the benchmarks' own scripts do; no judge is asked.

A reply that no rule understands chooses nothing, and counts as wrong.
"""

import re

LETTERS = "ABCDEFGH"
# "The best answer is: (C)", "Answer: **B**", "the answer is option D"; what stands behind the last of them counts.
_AFTER_ANSWER = r"(?i:answer(?:\s+is)?\s*:?\s*(?:(?:option|choice)\s+)?)[\s\"'*(\[{]*([%s])(?![A-Za-z]|'[A-Za-z])"
_ALONE = r"(?<![A-Za-z])([%s])(?![A-Za-z]|'[A-Za-z])"


def read_letter(reply: str, choices: int = 4) -> str | None:
    """The capital letter that a reply chooses among the first `choices`: the one that follows "answer", else the first.

    Video-MME's and LongVideoBench's scripts take the first capital after such a phrase, in a word, too (the B of
    "Based"); here a letter has to stand alone. LongVideoBench's draws a letter where there is none, and this does not.
    LVBench's takes letters and leaves to the user how to get them.
    """
    allowed = LETTERS[:choices]
    named = re.findall(_AFTER_ANSWER % allowed, reply)
    if named:
        return named[-1]
    alone = re.search(_ALONE % allowed, reply)
    return alone[1] if alone else None


def read_first_letter(reply: str) -> str | None:
    """The letter of A to D with which a reply begins: `B`, `B. walking` or `B) walking`.

    As TempCompass reads multiple choice without its judge, for which it leaves every other reply.
    """
    found = re.match(r"([A-D])(?:[.)]|$)", reply.strip())
    return found[1] if found else None


def read_yes_no(reply: str) -> str | None:
    """`yes` or `no`, if a reply begins with one of these words (TempCompass)."""
    found = re.match(r"(yes|no)\b", reply.strip().lower())
    return found[1] if found else None


def read_caption(reply: str, question: str) -> str | None:
    """The label ("Option 1", "Caption A") of the caption that a reply repeats: all of its line, its text, or its label.

    Args:
        question: as TempCompass gives it: a line, and below it a line `label: text` for each caption.
    """
    said = reply.strip()
    bare = said.partition(") ")[2] or said  # "A) A man is running."
    for line in question.splitlines()[1:]:
        label, _, text = line.partition(": ")
        if text and (said == line or text in (said, bare) or said.replace(".", "") in (label, label.split()[-1])):
            return label
    return None
