"""The label of a chosen option: true/false, answer1 to answer5, solution1/2, ending1 to ending4, option1/2.

`strict` reads the first statement of an answer ("the correct answer is answer3", "the answer is 3", "answer3 is
correct"), `flexible` falls back on the last label of the text, in any letter case and spelling ("Answer 3"). Where the
labels are true and false, "yes" and "no" say the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache, partial

from moa_peft.answers.latex import plain_latex
from moa_peft.answers.mentions import Mention, counted, judged_right
from moa_peft.answers.statements import own_answer, stated_parts, without_format_lines

_LABEL = re.compile(r"(\D*?)[\s_-]*([0-9]+)")
_MARKS = r"[\s*_`\"'$.,!()\[\]{}#]{0,20}"
# "3", "option (3)", "3: water", "3, because ..."; but not "3 apples", nor "3, 4".
_ONLY_NUMBER = re.compile(
    rf"{_MARKS}(?:(?:the\s)?(?:option|choice|answer|solution|ending|number|no\.)\s?)?{_MARKS}([0-9]{{1,3}})"
    rf"(?:{_MARKS}(?:\b(?:because|since|as)\b.*)?|[*_`]{{0,3}}[:)]\s.*)",
    re.IGNORECASE,
)
_YES_OR_NO = re.compile(r"[\s*_`\"']{0,20}(yes|no)\b(?=[*_`\"']*\s*(?:[.,;:!\n]|\Z)|\s+because\b)", re.IGNORECASE)


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
    read = partial(_read, choices=choices)
    text = own_answer(text, holds_answer=lambda piece: read(piece, flexible=True) is not None)
    return read(text, flexible=flexible)


def _read(text: str, *, choices: Sequence[str], flexible: bool) -> str | None:
    text = plain_latex(text)
    for part in stated_parts(text):
        mentions = counted(_mentions(part, choices), part, choices=choices)
        stated = mentions[0].choice if mentions else _short(part, choices)
        if stated is not None:
            return stated
    text = without_format_lines(text)
    named = _mentions(text, choices)
    mentions = counted(named, text, choices=choices)
    judged = judged_right(mentions, text)
    if judged is not None or not flexible:
        return judged
    if mentions:
        return mentions[-1].choice
    return _yes_or_no(text, choices) if named else _short(text, choices)


def _short(part: str, choices: Sequence[str]) -> str | None:
    """The label of a text that is only a number, where labels have numbers, or begins with "yes" or "no"."""
    number = _ONLY_NUMBER.fullmatch(part)
    if number is None:
        return _yes_or_no(part, choices)
    labels = [choice for choice in choices if (label := _LABEL.fullmatch(choice)) and label[2] == number[1]]
    return labels[0] if len(labels) == 1 else None


def _yes_or_no(text: str, choices: Sequence[str]) -> str | None:
    word = _YES_OR_NO.match(text) if set(choices) == {"true", "false"} else None
    return None if word is None else {"yes": "true", "no": "false"}[word[1].lower()]


def _mentions(text: str, choices: Sequence[str]) -> list[Mention]:
    found = []
    for match in _pattern(tuple(choices)).finditer(text):
        assert match.lastindex is not None
        found.append(Mention(choice=choices[match.lastindex - 1], start=match.start(), end=match.end()))
    return found


@lru_cache(maxsize=32)
def _pattern(choices: tuple[str, ...]) -> re.Pattern[str]:
    """One group per choice. A text may run on directly: "answer3The", "answer3answer3ans"."""
    patterns = []
    for choice in choices:
        label = _spellings(choice)
        patterns.append(rf"\b({label})(?:(?:{label})+[a-z]*\Z|(?:{label})*(?-i:(?![a-z0-9])))")
    return re.compile("|".join(patterns), re.IGNORECASE)


def _spellings(choice: str) -> str:
    numbered = _LABEL.fullmatch(choice)
    if numbered is None:
        return re.escape(choice)
    return rf"{re.escape(numbered[1])}(?:[\s_#-]|\s(?:number|no\.)\s)?[\[(]?{numbered[2]}"
