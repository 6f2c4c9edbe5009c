"""The label of a chosen option: true/false, answer1 to answer5, solution1/2, ending1 to ending4, option1/2.

`strict` reads the first statement of an answer ("the correct answer is answer3"), `flexible` falls back on the last
label of the text, in any letter case and spelling ("Answer 3").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from moa_peft.answers.latex import plain_latex
from moa_peft.answers.mentions import Mention, counted
from moa_peft.answers.statements import own_answer, stated_parts, without_format_lines

_LABEL = re.compile(r"(\D*?)[\s_-]*([0-9]+)")


def extract_option(text: str, *, choices: Sequence[str], flexible: bool) -> str | None:
    """Read the chosen label out of a generated text.

    Args:
        text: what the model wrote.
        choices: the labels, in order.
        flexible: whether the last label of the text counts where no statement holds one.

    Returns:
        The label as it stands in `choices`, or None: there is none, or the text denies it, lists several, or only
        repeats the choices.
    """
    text = plain_latex(own_answer(text))
    for part in stated_parts(text):
        mentions = counted(_mentions(part, choices), part, choices=choices)
        if mentions:
            return mentions[0].choice
    if not flexible:
        return None
    text = without_format_lines(text)
    mentions = counted(_mentions(text, choices), text, choices=choices)
    return mentions[-1].choice if mentions else None


def _mentions(text: str, choices: Sequence[str]) -> list[Mention]:
    found = []
    for match in _pattern(tuple(choices)).finditer(text):
        assert match.lastindex is not None
        found.append(Mention(choice=choices[match.lastindex - 1], start=match.start(), end=match.end()))
    return found


@lru_cache(maxsize=32)
def _pattern(choices: tuple[str, ...]) -> re.Pattern[str]:
    """One group per choice. A capital letter may follow directly, where a text runs on: "answer3The"."""
    return re.compile("|".join(rf"\b({_spellings(choice)})(?-i:(?![a-z0-9]))" for choice in choices), re.IGNORECASE)


def _spellings(choice: str) -> str:
    numbered = _LABEL.fullmatch(choice)
    if numbered is None:
        return re.escape(choice)
    return rf"{re.escape(numbered[1])}(?:[\s_#-]|\s(?:number|no\.)\s)?[\[(]?{numbered[2]}"
